# SPDX-License-Identifier: Apache-2.0
"""Small engines, one who asks them, and what their answers must be."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.inference.adapters.fixed import AcquiredAdapter
from moepeft.inference.api import (
  Finished,
  LoadedAdapter,
  PromptLogprobs,
  Request,
  Token,
  UnknownAdapter,
)
from moepeft.inference.engine.calls import EngineCall
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models.decoder.model import Decoder, sites
from moepeft.nn.initializers import init_params
from moepeft.peft import build

from ..contracts import small, small_decoders

LENGTH = 47
CONFIG = dataclasses.replace(
  small_decoders.CONFIGS['llama'], length=LENGTH, layers=2
)
# At a kernel with heads and one without.
METHOD = "molora(experts=3, rank=2, targets='*/q|*/wo')"
V = CONFIG.vocab
# Two rooms, two sizes of chunks and of batches, and no more programs.
SETTINGS = EngineConfig(
  slots=3,
  max_model_len=LENGTH,
  queue=40,
  chunk=8,
  min_chunk=2,
  cache_lens=(13, LENGTH),
  batch_sizes=(1, 3),
  routing=True,
)
# Of an engine that is waited for: the machine may be busy with others.
SECONDS = 120


class Stacked:
  """Banks of one form; `contents` are 'peft' trees by their hashes."""

  def __init__(self, adapter_map, contents, names, entry='molora'):
    """
    Args:
      contents: {hash: 'peft' tree}, the first the identity's.
      names: {name: hash}.
      entry: the adapters' name in the trees.
    """
    self.adapter_map, self.entry = adapter_map, entry
    self._shas = list(contents)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *contents.values())
    self.tree = {'form': stacked}
    self.bytes = sum(a.nbytes for a in jax.tree.leaves(stacked))
    self.names = dict(names)
    self.acquired = collections.Counter()

  def row_tree(self, tree, slots, layer=None):
    place = slots[0] if layer is None else (slots[0], layer)
    return jax.tree.map(lambda a: a[place], tree['form'])

  def acquire(self, name):
    if name and name not in self.names:
      raise UnknownAdapter(f'no adapter {name!r}')
    sha256 = self.names[name] if name else ''
    self.acquired[sha256] += 1
    slot = self._shas.index(sha256) if name else 0
    acts = {self.entry: frozenset(path for path, _ in self.adapter_map.entries)}
    return AcquiredAdapter(
      np.array([slot], np.int32), sha256, sites=acts if name else {}
    )

  def release(self, adapter):
    assert self.acquired[adapter.sha256] > 0, 'released more often than taken'
    self.acquired[adapter.sha256] -= 1

  def loaded(self):
    return [
      LoadedAdapter(name, METHOD, sha256, 7, '')
      for name, sha256 in self.names.items()
    ]

  def read(self, path):
    return path

  def put(self, name, read):
    self.names[name] = read
    return self.loaded()[-1]

  def unload(self, name):
    del self.names[name]


@functools.cache
def decoder():
  """(model, params, {hash: 'peft'}) of the shared engine; '' does nothing."""
  base, variables = small_decoders.make(CONFIG)
  params = variables['params']
  model = Decoder(CONFIG, build(METHOD, sites(CONFIG)).adapter_map)
  clean = init_params(model, small_decoders.batch(), 3, params)['peft']
  contents = {'': clean, 'one': moved(clean, 0), 'two': moved(clean, 1)}
  contents['nan'] = jax.tree.map(lambda a: np.full_like(a, np.nan), clean)
  return model, params, contents


def moved(tree, seed):
  """Away from where it does nothing."""
  return small.moved(tree, 0.2, seed)


def banks():
  """Adapters 'one', 'two', and one that is broken."""
  model, _, contents = decoder()
  names = {'one': 'one', 'two': 'two', 'broken': 'nan'}
  return Stacked(model.adapter_map, contents, names)


@functools.cache
def _full(model):
  return jax.jit(lambda variables, batch: model.apply(variables, batch))


def logprobs(ids, model, variables, places=LENGTH):
  """log-probabilities [t, v] of what follows each token, by one whole call."""
  row = np.zeros((1, places), np.int32)
  row[0, : len(ids)] = ids
  mask = np.arange(places)[None] < len(ids)
  batch = {'inputs': row, 'inputs_mask': mask}
  logits = _full(model)(variables, batch)
  # All places at once: each length would be a program.
  return np.asarray(jax.nn.log_softmax(logits))[0, : len(ids)]


def expected(ids, adapter=''):
  """`logprobs` of the shared engine's model with an adapter's hash."""
  model, params, contents = decoder()
  return logprobs(ids, model, {'params': params, 'peft': contents[adapter]})


class Answer:
  """What came of a request."""

  def __init__(self):
    self.events, self._over = [], threading.Event()

  def deliver(self, event):
    self.events.append(event)
    if isinstance(event, Finished):
      self._over.set()

  def wait(self):
    """Itself, once it has finished."""
    assert self._over.wait(SECONDS), f'no end came after {self.events}'
    return self

  @property
  def end(self):
    self.wait()
    assert [isinstance(e, Finished) for e in self.events].count(True) == 1
    assert isinstance(self.events[-1], Finished)
    return self.events[-1]

  @property
  def scored(self):
    """The answer's tokens."""
    self.wait()
    return [e.token for e in self.events if isinstance(e, Token)]

  @property
  def tokens(self):
    return [token.id for token in self.scored]

  @property
  def prompt(self):
    self.wait()
    (actual,) = [e for e in self.events if isinstance(e, PromptLogprobs)]
    return actual.tokens


_NUMBERS = itertools.count()


def ask(engine, ids, max_new_tokens=5, hear=None, **options):
  """Submits; an `Answer` that is not waited for.

  Args:
    hear: called with each event after it is noted, on the engine's thread.
  """
  answer = Answer()
  answer.id = options.pop('id', f'r{next(_NUMBERS)}')

  def deliver(event):
    answer.deliver(event)
    if hear is not None:
      hear(event)

  engine.submit(
    Request(answer.id, tuple(ids), max_new_tokens, **options), deliver
  )
  return answer


@contextlib.contextmanager
def paused(engine):
  """The engine does nothing inside, so that what is asked there is asked at
  once."""
  begun, go_on = threading.Event(), threading.Event()

  def wait():
    begun.set()
    return go_on.wait(SECONDS)

  with engine._condition:
    engine._enqueue(EngineCall(wait))
  # Requests put before the engine takes this task would run in its turn.
  assert begun.wait(SECONDS)
  try:
    yield
  finally:
    go_on.set()


@contextlib.contextmanager
def running(model, params, banks, settings):
  """A started engine, which is stopped at the end."""
  engine = Engine(model, params, banks, settings)
  engine.start()
  try:
    yield engine
  finally:
    engine.stop()


def idle(engine):
  """Whether no request has anything, after all have ended."""
  stats = engine.stats()
  slots = engine._core.scheduler.prefix_cache.slots
  return (
    stats.running == stats.waiting == 0
    and not any(slot.busy for slot in slots)
    and not engine._core.scheduler.has_unfinished
  )


def prompt(seed, size):
  """Tokens."""
  return tuple(np.random.default_rng(seed).integers(2, V, size).tolist())
