# SPDX-License-Identifier: Apache-2.0
"""python -m examples.or_agents.closed_circle: a small model that formulates.

  python -m examples.or_agents.closed_circle --output=workdirs/circle

A byte-level T5 learns text -> compact JSON (by variable) on generated problems:
all of its weights on one family of problems (the base), then MoLoRA, and LoRA
with as many parameters, on all families (SFT), then on pairs of its own answers
by the solver's verdict (DPO). One server has the base and all adapters; the
agents solve problems whose sentences were held out. table.md and table.json
have the accuracy and the execution rate with 95 % intervals. A step whose
result is in --output is not done again. RATES were chosen by

  python -m examples.or_agents.closed_circle --output=workdirs/circle \
    --rates 1.5e-3 3e-3 6e-3 1.2e-2
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import moepeft
from examples.or_agents import languages, pipeline, rewards, sentences, vote
from examples.or_agents.execution import Execution
from examples.or_agents.families import Scale
from examples.or_agents.generate import Sample, samples, write_rows
from examples.or_agents.problem import Problem
from examples.or_agents.training_rows import direct_row
from moepeft.agent import chat_model
from moepeft.agent.chat_model import ChatModel, ServerModel
from moepeft.agent.flags import number_in_range
from moepeft.core import files
from moepeft.core.untrusted import parse_json
from moepeft.evaluation import bootstrap

METHODS = {
  'lora': 'lora(rank=4)',
  'molora': 'molora(experts=10, rank=4)',
}
# Learning rates of SFT.
RATES = {'lora': 3e-3, 'molora': 6e-3}
STAGES = ('sft', 'dpo')
BASE = 'base'
# Small problems, whose texts and formulations a small model can hold.
SCALE = Scale(entities=2, resources=1, largest=9, varied=False)
BASE_FAMILIES = ('knapsack',)
# Bytes; the longest text and formulation have fewer.
INPUTS_LENGTH, TARGETS_LENGTH = 160, 96
CONFIG = 'configs/molora_t5.py'
_STARTUP_SECONDS = 900
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of the experiment, which are flags of the command.

  Attributes:
    seeds: seeds of each arm.
    rows: problems to train on.
    test_rows: problems with held-out templates.
    validation_rows: further ones, to choose learning rates by.
    base_steps, sft_steps, dpo_steps: training steps.
    batch_size: rows of a step.
    pair_rows: problems to train on that are answered for pairs.
    votes: sampled answers of a vote.
  """

  seeds: int = 2
  rows: int = 20_000
  test_rows: int = 100
  validation_rows: int = 200
  base_steps: int = 2000
  sft_steps: int = 300
  dpo_steps: int = 20
  batch_size: int = 32
  pair_rows: int = 250
  votes: int = 5


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The agents' answers to a problem.

  Attributes:
    single: the greedy answer's verdict.
    vote: whether the value that wins the vote is right.
  """

  single: rewards.Verdict
  vote: bool


MEASURES = {
  'accuracy': lambda outcome: outcome.single.is_right,
  'runs': lambda outcome: outcome.single.runs,
  'vote': lambda outcome: outcome.vote,
}


class Circle:
  """The experiment in a folder.

  Attributes:
    folder: has data, work directories, logs and tables.
    sizes: the sizes.
  """

  def __init__(self, folder: str, sizes: Sizes):
    self.folder, self.sizes = os.path.abspath(folder), sizes
    os.makedirs(self.folder, exist_ok=True)

  def path(self, *names: str) -> str:
    """A path in the folder."""
    return os.path.join(self.folder, *names)

  def run(self) -> dict[str, Any]:
    """Runs all steps that are left; returns the table."""
    self.write_data()
    self.train_base()
    names = {}
    for seed in range(self.sizes.seeds):
      for method in METHODS:
        sft = self.train_sft(method, seed)
        self.write_pairs(sft, method, seed)
        names[f'{method}_sft_{seed}'] = sft
        names[f'{method}_dpo_{seed}'] = self.train_dpo(sft, method, seed)
    test = _read_lines(self.path('test.jsonl'))
    outcomes = self.evaluate(names, test)
    table = make_table(
      outcomes, majority(self.path('train.jsonl'), test), self.sizes.seeds
    )
    files.write_text(
      self.path('table.json'), json.dumps(table, indent=1) + '\n'
    )
    files.write_text(self.path('table.md'), format_table(table))
    return table

  def search_rates(self, rates: Sequence[float]) -> None:
    """Prints SFT's accuracy at each rate on the validation rows, one seed."""
    self.write_data()
    self.train_base()
    rows = _read_lines(self.path('validation.jsonl'))
    prompts = [row['text'] for row in rows]
    for rate, method in itertools.product(rates, METHODS):
      workdir = self.path('runs', f'{method}_rate_{rate:g}')
      self._train_adapter(workdir, method, 0, rate)
      replies = moepeft.load(workdir).generate(prompts, TARGETS_LENGTH)
      right = [
        rewards.judge(reply.text, row['value']).is_right
        for reply, row in zip(replies, rows, strict=True)
      ]
      print(f'{method}, learning rate {rate:g}: {np.mean(right):.1%} right')

  def write_data(self) -> None:
    """Writes base.jsonl, train.jsonl, validation.jsonl and test.jsonl."""
    if os.path.exists(self.path('test.jsonl')):
      return
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    test_rows = self.sizes.test_rows
    held_out_rows = test_rows + self.sizes.validation_rows
    for sample in samples(
      0, SCALE, sentences.FAMILIES, draw_template=sentences.draw_template
    ):
      row = sample.row
      target = with_names(sample).to_json(by_variable=True)
      if (
        max(len(row['text']) - INPUTS_LENGTH, len(target) - TARGETS_LENGTH) >= 0
      ):
        continue
      if row['split'] == 'train' and len(train) < self.sizes.rows:
        row |= {'problem': target}
        train.append(direct_row(row, len(train)) | {'value': row['value']})
      if row['split'] == 'held_out_template':
        held_out.append(row)
      if len(train) == self.sizes.rows and len(held_out) >= held_out_rows:
        break
    base = (row for row in train if row['dataset'] in BASE_FAMILIES)
    write_rows(self.path('base.jsonl'), base)
    write_rows(self.path('train.jsonl'), iter(train))
    validation = held_out[test_rows:held_out_rows]
    write_rows(self.path('validation.jsonl'), iter(validation))
    # The last one, as its presence says that all are there.
    write_rows(self.path('test.jsonl'), iter(held_out[:test_rows]))

  def train_base(self) -> None:
    """Trains all weights on one family, and writes a model to serve."""
    if os.path.exists(self.path(BASE, 'tokenizer_config.json')):
      return
    workdir = self.path('runs', BASE)
    self._train(
      workdir,
      f'--config.steps={self.sizes.base_steps}',
      '--config.method=full',
      '--config.optimizer.learning_rate=2e-3',
      f'--config.data.path={self.path("base.jsonl")}',
    )
    self._command(
      'convert',
      f'--workdir={workdir}',
      '--to=hf',
      '--overwrite',
      f'--output={self.path(BASE)}',
    )
    write_byte_tokenizer(self.path(BASE))

  def train_sft(self, method: str, seed: int) -> str:
    """Trains an adapter on all families; returns its work directory."""
    workdir = self.path('runs', f'{method}_sft_{seed}')
    self._train_adapter(workdir, method, seed, RATES[method])
    return workdir

  def train_dpo(self, sft: str, method: str, seed: int) -> str:
    """Trains an adapter on pairs; returns its work directory."""
    workdir = self.path('runs', f'{method}_dpo_{seed}')
    self._train(
      workdir,
      f'--config.steps={self.sizes.dpo_steps}',
      '--config.objective=dpo',
      '--config.data.source=preference',
      f'--config.data.path={self._pairs(method, seed)}',
      f'--config.model.adapter={sft}',
      f'--config.preference.reference={sft}',
      '--config.preference.sft_weight=1.0',
      *self._adapter(method, seed),
      '--config.optimizer.learning_rate=5e-5',
    )
    return workdir

  def write_pairs(self, sft: str, method: str, seed: int) -> None:
    """Writes pairs of an adapter's answers, right and wrong by the solver.

    Where none of two answers is right, the formulation that the problem was
    made from is the better one.
    """
    path = self._pairs(method, seed)
    if os.path.exists(path):
      return
    rows = _read_lines(self.path('train.jsonl'))
    step = max(len(rows) // self.sizes.pair_rows, 1)
    rows = rows[seed % step :: step][: self.sizes.pair_rows]
    prompts = [row['inputs'] for row in rows for _ in range(2)]
    replies = moepeft.load(sft).generate(
      prompts, TARGETS_LENGTH, temperature=1.0, seed=1000 * seed
    )
    pairs = []
    for i, row in enumerate(rows):
      texts = [reply.text for reply in replies[2 * i : 2 * i + 2]]
      verdicts = [rewards.judge(text, row['value']) for text in texts]
      right = [
        text
        for text, verdict in zip(texts, verdicts, strict=True)
        if verdict.is_right
      ]
      pairs += [
        {
          'prompt': row['inputs'],
          'chosen': right[0] if right else row['targets'],
          'rejected': text,
        }
        for text, verdict in zip(texts, verdicts, strict=True)
        if not verdict.is_right and text.strip()
      ]
    if not pairs:
      raise ValueError(
        f'every answer of {sft} is right; raise --pair_rows to find wrong ones'
      )
    write_rows(path, iter(pairs))

  def evaluate(
    self, adapters: Mapping[str, str], test: Sequence[Mapping[str, Any]]
  ) -> dict[str, list[Outcome]]:
    """Serves the base and its adapters, and lets the agents solve the test."""
    outcomes = {}
    with self._server(adapters) as base_url:
      client = chat_model.make_client(base_url)
      for name in (BASE, *adapters):
        path = self.path('outcomes', f'{name}.json')
        if not os.path.exists(path):
          model = ServerModel(client, name, stream=False)
          _write_outcomes(path, self.solve_all(model, test))
        outcomes[name] = _read_outcomes(path)
    return outcomes

  def solve_all(
    self, model: ChatModel, test: Sequence[Mapping[str, Any]]
  ) -> list[Outcome]:
    """The agents' outcome for each problem, with one model."""

    def solve_row(row: Mapping[str, Any]) -> Outcome:
      greedy = solve_once(row['text'], model, temperature=0.0, seed=0)
      sampled = [
        solve_once(row['text'], model, temperature=0.7, seed=seed)
        for seed in range(self.sizes.votes)
      ]
      values = [answer.value for answer in sampled]
      value, _ = vote.vote(values, [0] * len(values))
      return Outcome(
        rewards.judge_outcome(greedy, row['value']),
        value is not None and vote.agree(value, row['value']),
      )

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      return list(pool.map(solve_row, test))

  def _train_adapter(
    self, workdir: str, method: str, seed: int, rate: float
  ) -> None:
    self._train(
      workdir,
      f'--config.steps={self.sizes.sft_steps}',
      f'--config.data.path={self.path("train.jsonl")}',
      *self._adapter(method, seed),
      f'--config.optimizer.learning_rate={rate}',
    )

  def _pairs(self, method: str, seed: int) -> str:
    return self.path(f'pairs_{method}_{seed}.jsonl')

  def _adapter(self, method: str, seed: int) -> list[str]:
    """Flags of an adapter's training: equal budgets, equal scales."""
    return [
      f'--config.seed={seed}',
      f'--config.model.path={self.path(BASE)}',
      f'--config.method={METHODS[method]}',
      f'--config.budget=params:{METHODS["molora"]}',
      '--config.scale=matched',
    ]

  def _train(self, workdir: str, *flags: str) -> None:
    if os.path.exists(os.path.join(workdir, 'summary.json')):
      return
    self._command(
      'train',
      f'--config={CONFIG}',
      f'--workdir={workdir}',
      f'--config.batch_size={self.sizes.batch_size}',
      '--config.data.source=jsonl',
      '--config.data.tokenizer=bytes',
      f'--config.data.inputs_length={INPUTS_LENGTH}',
      f'--config.data.targets_length={TARGETS_LENGTH}',
      '--config.optimizer.schedule=cosine',
      '--config.optimizer.warmup_steps=10',
      '--config.evaluation.before=False',
      '--config.evaluation.after=False',
      '--config.log.plots=False',
      '--config.log.trackers=',
      *flags,
    )

  def _command(self, module: str, *flags: str) -> None:
    """Runs a command of moepeft, whose output goes to log.txt."""
    print(f'{time.strftime("%H:%M:%S")} moepeft.{module} {flags[1]}')
    with open(self.path('log.txt'), 'a', encoding='utf-8') as log:
      command = [sys.executable, '-m', f'moepeft.{module}', *flags]
      result = subprocess.run(command, stdout=log, stderr=log, check=False)
    if result.returncode:
      raise ValueError(
        f'moepeft.{module} ended with {result.returncode}; the reason is at '
        f'the end of {self.path("log.txt")}'
      )

  @contextlib.contextmanager
  def _server(self, adapters: Mapping[str, str]) -> Iterator[str]:
    """Yields the address of a server of the base and its adapters."""
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    command = [
      *(sys.executable, '-m', 'moepeft.serve', f'--model={self.path(BASE)}'),
      *(f'--adapter={name}={workdir}' for name, workdir in adapters.items()),
      *(f'--port={port}', f'--slots={_THREADS}', '--noaccess_log'),
      f'--adapter_slots={max(8, len(adapters))}',
      *(f'--places={INPUTS_LENGTH + TARGETS_LENGTH}', '--norouting'),
    ]
    with open(self.path('server.txt'), 'w', encoding='utf-8') as log:
      process = subprocess.Popen(command, stdout=log, stderr=log)
      try:
        _wait_until_ready(f'http://127.0.0.1:{port}/ready', process, log.name)
        yield f'http://127.0.0.1:{port}/v1'
      finally:
        process.terminate()
        process.wait()


def write_byte_tokenizer(folder: str) -> None:
  """Writes moepeft's tokenizer 'bytes' as a tokenizer.json for the server."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast
  from transformers.convert_slow_tokenizer import bytes_to_unicode

  special = {'<pad>': 0, '</s>': 1, '<unk>': 2}
  letters = bytes_to_unicode().items()
  vocab = special | {letter: byte + len(special) for byte, letter in letters}
  tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token='<pad>',
    eos_token='</s>',
    unk_token='<unk>',
    clean_up_tokenization_spaces=False,
  ).save_pretrained(folder)


def with_names(sample: Sample) -> Problem:
  """A sample's problem, whose variables have the names of the text."""
  names = [item['name'] for item in sample.instance.fields['items']]
  variables = tuple(
    dataclasses.replace(variable, name=name)
    for variable, name in zip(sample.problem.variables, names, strict=True)
  )
  return dataclasses.replace(sample.problem, variables=variables)


def solve_once(
  text: str, model: ChatModel, temperature: float, seed: int
) -> Execution:
  """The agents' solution of a text by one JSON formulation of the model.

  Raises:
    ReplyError: the server gives no reply.
  """
  settings = pipeline.Settings(
    direct=True,
    options={
      'temperature': temperature,
      'seed': seed,
      'max_tokens': TARGETS_LENGTH,
    },
  )
  chosen = languages.choose_languages(['json'])
  report = pipeline.solve_text(text, model, chosen, None, settings)
  return report.programs[0].last


def majority(train_path: str, test: Sequence[Mapping[str, Any]]) -> list[bool]:
  """Whether the most frequent value of a problem's family is right."""
  counts = collections.defaultdict(collections.Counter)
  for row in _read_lines(train_path):
    counts[row['dataset']][row['value']] += 1
  return [
    vote.agree(counts[row['family']].most_common(1)[0][0], row['value'])
    for row in test
  ]


def make_table(
  outcomes: Mapping[str, Sequence[Outcome]],
  baseline: Sequence[bool],
  seeds: int,
) -> dict[str, Any]:
  """{row: {measure: [mean, low, high]}} in percent, and paired differences.

  Intervals are the percentile bootstrap over problems and seeds.

  Args:
    outcomes: of `Circle.evaluate`.
    baseline: of `majority`.
  """
  draws = {('majority', 'accuracy'): np.array(baseline, float)[:, None]}
  rows = {BASE: [BASE]}
  for stage in STAGES:
    for method in METHODS:
      name = f'{method}_{stage}'
      rows[name] = [f'{name}_{seed}' for seed in range(seeds)]
  for row, names in rows.items():
    for measure, score in MEASURES.items():
      draws[row, measure] = np.array(
        [[score(o) for o in outcomes[name]] for name in names], float
      ).T
  table: dict[str, Any] = collections.defaultdict(dict)
  for (row, measure), each in draws.items():
    table[row][measure] = _percent(each)
  last = STAGES[-1]
  for name, better, worse in (
    ('molora less lora, sft', 'molora_sft', 'lora_sft'),
    ('molora less lora, dpo', 'molora_dpo', 'lora_dpo'),
    ('lora, dpo less sft', f'lora_{last}', 'lora_sft'),
    ('molora, dpo less sft', f'molora_{last}', 'molora_sft'),
  ):
    for measure in MEASURES:
      table[name][measure] = _percent(
        draws[better, measure], draws[worse, measure]
      )
  for row in rows:
    table[f'{row}, vote less one answer']['accuracy'] = _percent(
      draws[row, 'vote'], draws[row, 'accuracy']
    )
  return dict(table)


def format_table(table: Mapping[str, Any]) -> str:
  """The table in Markdown."""
  heads = {
    'accuracy': 'accuracy, one answer',
    'runs': 'execution rate',
    'vote': 'accuracy, vote',
  }
  lines = [
    f'| | {" | ".join(heads.values())} |',
    f'| --- |{" ---: |" * len(heads)}',
  ]
  for name, row in table.items():
    cells = [
      '{:.1f} ({:.1f} to {:.1f})'.format(*row[measure])
      if measure in row
      else ''
      for measure in heads
    ]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _percent(
  each: np.ndarray, less: np.ndarray | None = None
) -> tuple[float, float, float]:
  """(mean, low, high) of scores [n, seeds], or of a paired difference."""
  difference = each if less is None else each - less
  n, seeds = difference.shape
  resampled = bootstrap.means(difference, np.ones((n, seeds)))
  resampled = (resampled * bootstrap.seed_weights(seeds)).sum(axis=1)
  low, high = bootstrap.interval(resampled)
  return tuple(round(100 * float(x), 2) for x in (difference.mean(), low, high))


def _wait_until_ready(url: str, process: subprocess.Popen, log: str) -> None:
  """
  Raises:
    ValueError: the server ended, or is not ready in time.
  """
  end = time.monotonic() + _STARTUP_SECONDS
  while time.monotonic() < end and process.poll() is None:
    with contextlib.suppress(urllib.error.URLError, OSError):
      with urllib.request.urlopen(url, timeout=5) as answer:
        if answer.status == 200:
          return
    time.sleep(1)
  raise ValueError(
    f'the server is not ready; the reason is at the end of {log}'
  )


def _read_lines(path: str) -> list[dict[str, Any]]:
  return [parse_json(line) for line in files.read_text(path).splitlines()]


def _write_outcomes(path: str, outcomes: Sequence[Outcome]) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  text = json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1)
  files.write_text(path, text + '\n')


def _read_outcomes(path: str) -> list[Outcome]:
  return [
    Outcome(rewards.Verdict(**entry['single']), entry['vote'])
    for entry in json.loads(files.read_text(path))
  ]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  parser = argparse.ArgumentParser(
    'python -m examples.or_agents.closed_circle',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--output', default='workdirs/circle', help='The folder of the results.'
  )
  parser.add_argument(
    '--rates',
    type=number_in_range(float, 1e-6, 1.0),
    nargs='+',
    metavar='RATE',
    help="SFT's accuracy at these learning rates on other problems, instead.",
  )
  for field in dataclasses.fields(Sizes):
    parser.add_argument(
      f'--{field.name}',
      type=number_in_range(int, 1, 1_000_000),
      default=field.default,
      help=f'Default: {field.default}.',
    )
  flags = vars(parser.parse_args(argv))
  rates = flags.pop('rates')
  started = time.monotonic()
  try:
    circle = Circle(flags.pop('output'), Sizes(**flags))
    if rates:
      circle.search_rates(rates)
    else:
      circle.run()
  except (ValueError, OSError, ImportError) as e:
    parser.exit(2, f'error: {e}\n')
  if not rates:
    print(files.read_text(circle.path('table.md')))
  print(f'{(time.monotonic() - started) / 60:.0f} minutes')
  return 0


if __name__ == '__main__':
  sys.exit(main())
