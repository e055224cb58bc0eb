# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a prompt and its answers, and truncates them to a row.

All sides have the same prompt, without a loss on it. A row that is too long
loses the prompt's beginning or is left out. Answers are truncated only if all
of them are too long.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from moepeft.data.batching import collators, decoder_only
from moepeft.data.batching.decoder_only import Sample
from moepeft.data.batching.packing import TokenizedPair
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.chat.truncate import last_answer_start
from moepeft.data.example import BadRow
from moepeft.data.tokenizers.tokenizer import (
  HuggingFaceTokenizer,
  Tokenizer,
  require_eos,
)

# Next to long answers, a prompt keeps at least 1 / 4 of a decoder's row.
_PROMPT_DIVISOR = 4

# Encodes a conversation; the last run of tokens with a loss is the answer.
Render = Callable[[Conversation], Sample]
# (prompt, answers) -> EncodedAnswers
Encode = Callable[[Conversation, Sequence[Turn]], 'EncodedAnswers']


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedAnswers:
  """A tokenized row of any length.

  Attributes:
    prompt: int32 [n].
    answers: (ids int32 [m], loss mask bool [m]) of each answer.
  """

  prompt: np.ndarray
  answers: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerBudget:
  """The part of a row that fits.

  Attributes:
    prompt: the truncated prompt, int32 [n].
    answer_length: tokens that the row's answers are truncated to, which is the
      longest answer's length if nothing is truncated.
    max_length: tokens that any answer to the prompt may have.
    cut: whether anything was truncated.
  """

  prompt: np.ndarray
  answer_length: int
  max_length: int
  cut: bool


def row_encoder(
  data: ConfigDict, collator: collators.Collator, render: Render | None
) -> Encode:
  """Makes a function that encodes a row.

  Args:
    collator: the model's collator.
    render: encodes a decoder's conversations; by default `make_renderer`'s.

  Raises:
    ValueError: a key of config.data has no effect on preferences, or the chat
      template cannot be read.
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

    def encode_seq2seq(prompt, answers) -> EncodedAnswers:
      _check_plain(prompt, answers)
      eos = np.int32(require_eos(tokenizer))
      texts = [plain_text(prompt), *(turn.content for turn in answers)]
      encoded = tokenizer.encode_all(texts)
      ids = [np.append(np.asarray(text, np.int32), eos) for text in encoded]
      return EncodedAnswers(
        ids[0], tuple((x, np.ones(len(x), bool)) for x in ids[1:])
      )

    return encode_seq2seq
  render = render or make_renderer(data, collator.tokenizer)

  def encode_decoder(prompt, answers) -> EncodedAnswers:
    prompts, encoded = [], []
    # Without a loss on the context, the first loss marks the answer's start.
    context = [dataclasses.replace(t, trained=False) for t in prompt.turns]
    for answer in answers:
      turns = (*context, dataclasses.replace(answer, trained=True))
      sample = render(dataclasses.replace(prompt, turns=turns))
      if not sample.loss_mask.any():
        raise BadRow(
          'no token of the answer is trained; mend or remove the row'
        )
      start = last_answer_start(sample.loss_mask)
      prompts.append(sample.ids[:start])
      encoded.append((sample.ids[start:], sample.loss_mask[start:]))
    if any(
      not np.array_equal(prompts[0], prompt_ids) for prompt_ids in prompts
    ):
      raise BadRow(
        'the chat template makes another prompt of each answer; name one that '
        'does not with config.data.chat_template'
      )
    return EncodedAnswers(prompts[0], tuple(encoded))

  return encode_decoder


def make_renderer(data: ConfigDict, tokenizer: Tokenizer) -> Render:
  """Encodes by the chat template, or as plain text without one.

  Raises:
    ValueError: config.data.chat_template cannot be read, or the tokenizer is
      of bytes.
  """
  if data.chat_template or has_chat_template(tokenizer):
    return chat_dataset.load_chat_template(data, tokenizer).encode

  def encode_plain(chat: Conversation) -> Sample:
    _check_plain(chat)
    prompt = dataclasses.replace(chat, turns=chat.turns[:-1])
    (prompt_ids,) = decoder_only.encode_prompts(tokenizer, [plain_text(prompt)])
    (ids,) = decoder_only.encode_answers(tokenizer, [chat.turns[-1].content])
    return decoder_only.make_sample(prompt_ids, ids)

  return encode_plain


def _check_plain(chat: Conversation, answers: Sequence[Turn] = ()) -> None:
  """
  Raises:
    BadRow: the row has tools, calls, thoughts or names, which plain text
      cannot represent.
  """
  turns = (*chat.turns, *answers)
  if chat.tools or any(
    turn.calls or turn.thought or turn.name and turn.role != 'tool'
    for turn in turns
  ):
    raise BadRow(
      'a turn calls tools or has thoughts or a name, or the row has tools, '
      'which only a chat template writes; set config.data.chat_template, or '
      'remove the row'
    )


def has_chat_template(tokenizer: Tokenizer) -> bool:
  """Whether a tokenizer has a chat template."""
  hf_tokenizer = (
    tokenizer.tokenizer if isinstance(tokenizer, HuggingFaceTokenizer) else None
  )
  return bool(hf_tokenizer is not None and hf_tokenizer.chat_template)


def plain_text(prompt: Conversation) -> str:
  """The content of a single turn; 'role: content' lines of several turns."""
  if len(prompt.turns) == 1:
    return prompt.turns[0].content
  return '\n'.join(f'{turn.role}: {turn.content}' for turn in prompt.turns)


def fit_answers(
  encoded: EncodedAnswers, collator: collators.Collator, truncation: str
) -> AnswerBudget | None:
  """The part of a row that fits; None if the row is left out.

  Args:
    truncation: config.data.truncation.
  """
  prompt, bos = encoded.prompt, collator.tokenizer.bos
  lengths = [len(ids) for ids, _ in encoded.answers]
  longest, shortest = max(lengths), min(lengths)
  if not isinstance(collator, decoder_only.CausalCollator):
    max_prompt, max_answer = collator.lengths
    cut = len(prompt) > max_prompt
    if cut and truncation == 'drop':
      return None
    if truncation == 'prompt':
      prompt = decoder_only.keep_last(prompt, max_prompt, bos)
    prompt = prompt[:max_prompt]
    if longest <= max_answer:
      return AnswerBudget(prompt, longest, max_answer, cut)
    cut = truncation == 'end' and shortest > max_answer
    return AnswerBudget(prompt, max_answer, max_answer, True) if cut else None
  # The last token is only a target, so a row has one token more than inputs.
  row_length = collator.length + 1
  max_answer = row_length - len(prompt)
  if longest <= max_answer:
    return AnswerBudget(prompt, longest, max_answer, False)
  if truncation == 'prompt':
    max_prompt = row_length - longest
    if max_prompt < min(len(prompt), row_length // _PROMPT_DIVISOR):
      return None
    prompt = decoder_only.keep_last(prompt, max_prompt, bos)
    return AnswerBudget(prompt, longest, longest, True)
  # A whole answer next to a truncated one would be an unfair comparison.
  cut = truncation == 'end' and shortest > max_answer >= 1
  return AnswerBudget(prompt, max_answer, max_answer, True) if cut else None


def answers_equal(encoded: EncodedAnswers, budget: AnswerBudget) -> bool:
  """Whether a pair's truncated answers are equal, so that none is better."""
  truncated = [
    tuple(array[: budget.answer_length] for array in answer)
    for answer in encoded.answers
  ]
  return len(truncated) > 1 and all(
    np.array_equal(array, first_array)
    for answer in truncated[1:]
    for array, first_array in zip(answer, truncated[0], strict=True)
  )


def make_side(
  prompt: np.ndarray,
  answer: tuple[np.ndarray, np.ndarray],
  max_length: int,
  collator: collators.Collator,
) -> TokenizedPair | Sample:
  """A prompt with one answer of at most `max_length` ids, for the collator."""
  ids, loss_mask = (array[:max_length] for array in answer)
  if not isinstance(collator, decoder_only.CausalCollator):
    return TokenizedPair(prompt, ids)
  return Sample(
    np.concatenate([prompt, ids]).astype(np.int32),
    np.concatenate([np.zeros(len(prompt), bool), loss_mask]),
  )
