# SPDX-License-Identifier: Apache-2.0
"""A prompt and its answers as ids, and what of them fits a row.

The prompt is the same on all sides and never trained. What is too long costs
it its beginning, or the row: no answer is cut beside one that is whole.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from moepeft.data.batching import collators, decoder_only
from moepeft.data.batching.decoder_only import Sample
from moepeft.data.batching.packing import IdPair
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.example import BadRow
from moepeft.data.tokenizers.tokenizer import (
  HuggingFaceTokenizer,
  Tokenizer,
  require_eos,
)

# The share of a decoder's row that a prompt keeps beside long answers.
_LEAST = 4

# A conversation as ids, of which the last run of trained tokens is the answer.
Render = Callable[[Conversation], Sample]
# (prompt, answers) -> EncodedAnswers
Encode = Callable[[Conversation, Sequence[Turn]], 'EncodedAnswers']


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedAnswers:
  """A row as ids, of any length: its prompt, and (ids, trained) of answers."""

  prompt: np.ndarray
  answers: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerBudget:
  """The part of a row that fits.

  Attributes:
    prompt: what is left of it.
    cap: tokens of each answer that are kept, all of them unless both are cut.
    room: tokens that there are for an answer.
    cut: whether anything was cut.
  """

  prompt: np.ndarray
  cap: int
  room: int
  cut: bool


def row_encoder(
  data: ConfigDict, collator: collators.Collator, render: Render | None
) -> Encode:
  """A function that encodes a row.

  Args:
    collator: of one side.
    render: of a decoder; by default `renderer`'s.

  Raises:
    ValueError: config.data asks for what pairs have not, or has no template.
  """
  if data.train_on != 'answers':
    raise ValueError(
      f'config.data.train_on={data.train_on!r} does nothing with '
      "config.data.source='preference', whose prompts are never trained; set "
      "it to 'answers'"
    )
  if not isinstance(collator, decoder_only.CausalCollator):
    if data.chat_template:
      raise ValueError(
        f'config.data.chat_template={data.chat_template!r} does nothing with '
        'an encoder-decoder, which reads prompts as plain text; leave it empty'
      )
    tokenizer = collator.tokenizer

    def encode_pair(prompt, answers) -> EncodedAnswers:
      _check_plain(prompt, answers)
      end = np.int32(require_eos(tokenizer))
      texts = [plain_text(prompt), *(turn.content for turn in answers)]
      encoded = tokenizer.encode_all(texts)
      ids = [np.append(np.asarray(text, np.int32), end) for text in encoded]
      return EncodedAnswers(
        ids[0], tuple((x, np.ones(len(x), bool)) for x in ids[1:])
      )

    return encode_pair
  render = render or make_renderer(data, collator.tokenizer)

  def encode_decoder(prompt, answers) -> EncodedAnswers:
    prompts, answer_parts = [], []
    # Of no other turn is anything trained, so none is cut from what is before.
    context = [dataclasses.replace(t, trained=False) for t in prompt.turns]
    for answer in answers:
      turns = (*context, dataclasses.replace(answer, trained=True))
      whole = render(dataclasses.replace(prompt, turns=turns))
      start = _last_run(whole.loss_mask)
      prompts.append(whole.ids[:start])
      answer_parts.append((whole.ids[start:], whole.loss_mask[start:]))
    if any(
      not np.array_equal(prompts[0], prompt_ids) for prompt_ids in prompts
    ):
      raise BadRow(
        'the chat template makes another prompt of each answer; name one that '
        'does not with config.data.chat_template'
      )
    return EncodedAnswers(prompts[0], tuple(answer_parts))

  return encode_decoder


def _last_run(trained: np.ndarray) -> int:
  """The start of the last run of trained tokens."""
  if not trained.any():
    raise BadRow('no token of the answer is trained; mend or remove the row')
  last = int(np.flatnonzero(trained)[-1])
  untrained = np.flatnonzero(~trained[:last])
  return int(untrained[-1]) + 1 if len(untrained) else 0


def make_renderer(data: ConfigDict, tokenizer: Tokenizer) -> Render:
  """The chat template, or plain text where the tokenizer has none.

  Raises:
    ValueError: config.data.chat_template cannot be read, or is for bytes.
  """
  if data.chat_template or has_chat_template(tokenizer):
    return chat_dataset.load_chat_template(data, tokenizer).encode

  def plain(whole: Conversation) -> Sample:
    _check_plain(whole)
    prompt = dataclasses.replace(whole, turns=whole.turns[:-1])
    (prompt_ids,) = decoder_only.encode_prompts(tokenizer, [plain_text(prompt)])
    (ids,) = decoder_only.encode_answers(tokenizer, [whole.turns[-1].content])
    return decoder_only.make_sample(prompt_ids, ids)

  return plain


def _check_plain(whole: Conversation, answers: Sequence[Turn] = ()) -> None:
  """Plain text is what turns say, so there must be no more to them."""
  turns = (*whole.turns, *answers)
  if whole.tools or any(
    turn.calls or turn.thought or turn.name and turn.role != 'tool'
    for turn in turns
  ):
    raise BadRow(
      'a turn calls tools or has thoughts or a name, or the row has tools, '
      'which only a chat template writes; set config.data.chat_template, or '
      'remove the row'
    )


def has_chat_template(tokenizer: Tokenizer) -> bool:
  """Whether a vocabulary brings a chat template."""
  hf_tokenizer = (
    tokenizer.tokenizer if isinstance(tokenizer, HuggingFaceTokenizer) else None
  )
  return bool(hf_tokenizer is not None and hf_tokenizer.chat_template)


def plain_text(prompt: Conversation) -> str:
  """Turns as plain text: a single one as it is, several by their roles."""
  if len(prompt.turns) == 1:
    return prompt.turns[0].content
  return '\n'.join(f'{turn.role}: {turn.content}' for turn in prompt.turns)


def fit_answers(
  parts: EncodedAnswers, collator: collators.Collator, too_long: str
) -> AnswerBudget | None:
  """The part of a row that fits; None where the row is left out."""
  prompt = parts.prompt
  lengths = [len(ids) for ids, _ in parts.answers]
  longest, shortest = max(lengths), min(lengths)
  if not isinstance(collator, decoder_only.CausalCollator):
    most, available = collator.lengths
    over = len(prompt) > most
    if over and too_long == 'drop':
      return None
    left = prompt[:most]
    if too_long == 'prompt':
      left = decoder_only.keep_last(prompt, most, collator.tokenizer.bos)
    if longest <= available:
      return AnswerBudget(left, longest, available, over)
    cut = too_long == 'end' and shortest > available
    return AnswerBudget(left, available, available, True) if cut else None
  # One token more than are fed.
  row = collator.length + 1
  if len(prompt) + longest <= row:
    return AnswerBudget(prompt, longest, row - len(prompt), False)
  if too_long == 'prompt':
    left = row - longest
    if left < min(len(prompt), row // _LEAST):
      return None
    prompt_end = decoder_only.keep_last(prompt, left, collator.tokenizer.bos)
    return AnswerBudget(prompt_end, longest, longest, True)
  available = row - len(prompt)
  # Both ends are cut or none.
  cut = too_long == 'end' and shortest > available >= 1
  return AnswerBudget(prompt, available, available, True) if cut else None


def answers_equal(parts: EncodedAnswers, span: AnswerBudget) -> bool:
  """Whether two answers have become one: nothing is learnt of them."""
  cut = [tuple(part[: span.cap] for part in answer) for answer in parts.answers]
  return len(cut) > 1 and all(
    np.array_equal(part, first_part)
    for answer in cut[1:]
    for part, first_part in zip(answer, cut[0], strict=True)
  )


def make_side(
  prompt: np.ndarray, answer, cap: int, collator: collators.Collator
):
  """One answer with its prompt, as the collator of one side encodes it."""
  ids, trained = (part[:cap] for part in answer)
  if not isinstance(collator, decoder_only.CausalCollator):
    return IdPair(prompt, ids)
  untrained = np.zeros(len(prompt), bool)
  return Sample(
    np.concatenate([prompt, ids]).astype(np.int32),
    np.concatenate([untrained, trained]),
  )
