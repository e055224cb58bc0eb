# SPDX-License-Identifier: Apache-2.0
"""A row of a mixed batch computes what its adapter's own model computes."""

import jax
import numpy as np
import pytest

from moepeft.inference.adapters.pool import AdapterPool
from moepeft.nn.adapter_hook import AdapterMap

from ...contracts import small, small_decoders
from .. import banked

# Sums of other orders, ranks padded and scales multiplied in before instead
# of after: some of float32's last digits.
CLOSE = 1e-5
QWEN2 = small_decoders.CONFIGS['qwen2']
T5 = ('ia3', 'output', 'topk')
# Biases at q, k and v, which DoRA leaves alone; two LoRA in one bank.
DECODER = ('dora', 'large', 'small', 'mov')
REST = tuple(sorted({*banked.ADAPTERS} - {*DECODER} | {'large'}))
CONFIGS = {
  't5': (small.RELU, T5),
  'decoder': (QWEN2, DECODER),
  'all': (QWEN2, REST),
  't5-more': (small.GATED, ('dora', 'mov', 'random', 'large', 'inputs')),
}
SLOW = ('all', 't5', 't5-more')


def serve(config, tmp_path, names, slots=4):
  """(base, banks with the adapters, {name: (built, tree)})."""
  base = banked.base_of(config)
  made = {
    name: banked.save(tmp_path / name, base, banked.ADAPTERS[name], seed)
    for seed, name in enumerate(names)
  }
  paths = {name: path for name, (path, _, _) in made.items()}
  return base, AdapterPool(base, paths, slots=slots), made


def assert_close(found, wanted):
  """To CLOSE of the largest."""
  assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in CONFIGS
  ],
)
def mixed(request, tmp_path_factory):
  """A batch of one text under no adapter and under each."""
  config, names = CONFIGS[request.param]
  place = tmp_path_factory.mktemp(request.param)
  base, banks, made = serve(config, place, names)
  batch = banked.batch_of(base)
  rows = ['', *names]
  logits = np.asarray(banked.together(base, banks, rows, batch))
  return base, made, batch, dict(zip(rows, logits, strict=True))


def test_each_row_is_as_its_own_model_computes_it(mixed):
  base, made, batch, rows = mixed
  for name, (_, built, tree) in made.items():
    alone = np.asarray(banked.alone(base, built, tree, batch))
    assert_close(rows[name], alone)
    # Else it would show nothing.
    assert np.abs(alone - rows['']).max() > 0.05, name
    # What the trainer's loss is made of.
    served, own = (
      np.asarray(jax.nn.log_softmax(x)) for x in (rows[name], alone)
    )
    np.testing.assert_allclose(served, own, rtol=0, atol=1e-4)


def test_a_row_of_the_base_is_near_the_base_in_a_batch_of_all(mixed):
  # XLA fuses a program of many forms otherwise, and adds in another order.
  base, _, batch, rows = mixed
  model = banked.model_of(base, AdapterMap())
  expected = jax.jit(model.apply)({'params': base.params}, batch)
  assert_close(rows[''], np.asarray(expected))


# One text of each method. DoRA takes 20 s to compile, so the fast suite has
# (IA)^3 alone.
ONE_EACH = {
  method.partition('(')[0]: method
  for method in ('prompt(length=3)', *reversed(banked.ADAPTERS.values()))
}


@pytest.mark.parametrize(
  'method',
  [
    pytest.param(method, marks=() if method == 'ia3' else pytest.mark.slow)
    for method in ONE_EACH.values()
  ],
)
def test_the_first_slot_is_the_base_bit_for_bit(method):
  """Operation by operation, on arrays of one shape.

  Compiled, the two are different programs: XLA fuses them differently, and on
  some processors a sum then has another order.
  """
  base = banked.base_of(small_decoders.CONFIGS['llama'])
  banks = AdapterPool(base, methods=[method], slots=2)
  assert set(banks.tree) == {method.partition('(')[0]}
  batch = banked.batch_of(base)
  rows = jax.tree.map(lambda a: np.stack([a, a]), batch)
  model = banked.model_of(base, AdapterMap())
  with jax.disable_jit():
    expected = jax.vmap(lambda row: model.apply({'params': base.params}, row))(
      rows
    )
    logits = banked.together(base, banks, ['', ''], batch)
  np.testing.assert_array_equal(logits, expected)


def test_layers_with_unlike_counts_of_experts_are_served(tmp_path):
  base = banked.base_of(QWEN2)
  text = (
    'molora(experts_per_layer=[2, 4, 3], rank=2, router=topk(k=2), '
    "targets='*/q')"
  )
  path, built, tree = banked.save(tmp_path / 'layers', base, text)
  banks = AdapterPool(base, {'layers': path}, slots=2)
  batch = banked.batch_of(base)
  without, served = banked.together(base, banks, ['', 'layers'], batch)
  alone = np.asarray(banked.alone(base, built, tree, batch))
  assert_close(np.asarray(served), alone)
  assert np.abs(alone - np.asarray(without)).max() > 0.05
