# SPDX-License-Identifier: Apache-2.0
"""Decoders with a cache, in batches of different lengths, equal whole calls."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.inference.decode import How, advance, begin, greedy, start, step
from moepeft.inference.sampling import Sampling
from moepeft.models.decoder import model as decoder
from moepeft.models.decoder.model import Decoder, DecoderConfig
from moepeft.nn.initializers import init_params
from moepeft.nn.scan_layers import unstack_layers
from moepeft.peft import build
from tests import ROOT

from ..contracts import small

CONFIG = DecoderConfig(
  vocab=37,
  d_model=11,
  heads=6,
  kv_heads=3,
  head_dim=4,
  ffn=17,
  layers=3,
  length=31,
)
OTHER = dataclasses.replace(
  CONFIG,
  positions='learned',
  gated=False,
  activation='gelu',
  centred=True,
  tied=True,
  attention_bias=True,
  out_bias=True,
  mlp_bias=True,
)
WINDOWED = dataclasses.replace(
  CONFIG,
  window=3,
  windowed=(True, False, True),
  attention_cap=5.0,
  qk_norm=True,
)
ALIBI = dataclasses.replace(CONFIG, positions='alibi')
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20])
NEW = 6
BEGIN = jax.jit(begin, static_argnums=(0, 3))
STEP = jax.jit(step, static_argnums=0)
ENDLESS = How(Sampling(), jnp.array([-1]))


@functools.cache
def made(method='full', config=CONFIG):
  """(model, variables), moved away from where they do nothing."""
  built = build(method, decoder.sites(config))
  model = Decoder(config, built.adapter_map)
  batch = {'inputs': jnp.zeros((1, 2), jnp.int32)}
  variables = init_params(model, batch, 1)
  keys = iter(jax.random.split(jax.random.key(2), 999))
  moved = lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape)  # noqa: E731
  return model, jax.tree.map(moved, variables)


def batch(prompts=PROMPTS, s=9):
  lengths = np.array([len(row) for row in prompts])
  # Padding that would be seen if it were looked at.
  ids = np.full((len(prompts), s), 3, np.int32)
  for row, own in zip(ids, prompts, strict=True):
    row[: len(own)] = own
  return {'inputs': ids, 'inputs_mask': np.arange(s) < lengths[:, None]}


@functools.partial(jax.jit, static_argnums=0)
def plain(model, variables, ids):
  return model.apply(variables, {'inputs': ids})


def whole(model, variables, text):
  """Logits [n, v] at every token of one text, without a cache."""
  # What comes after a token does not reach it; so all are one program.
  ids = jnp.array([text + [4] * (12 - len(text))])
  return np.asarray(plain(model, variables, ids)[0, : len(text)])


def near(found, expected, of_largest):
  """Within a share of the largest logit: rounding is of sums that large."""
  most = of_largest * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=most)


def fed(model, variables, texts, prompts):
  """Logits [b, new, v] where the texts' tokens after prompts are given."""
  logits, memory = BEGIN(model, variables, batch(prompts), NEW)
  found = [logits]
  for i in range(1, NEW):
    tokens = jnp.array(
      [t[len(p) + i - 1] for t, p in zip(texts, prompts, strict=True)]
    )
    logits, memory = STEP(model, variables, memory, tokens, jnp.int32(i))
    found.append(logits)
  return np.stack(found, axis=1)


METHODS = (
  'full',
  *small.METHODS,
  "lora(rank=2, sites='head|*/o')",
)


@pytest.mark.parametrize(
  'method, config',
  [
    *small.others_slow(((m, CONFIG) for m in METHODS), quick=small.FEW[1:]),
    *small.others_slow(
      (
        ('molora(experts=3, rank=2, router=topk(k=2))', OTHER),
        ('molora(experts=3, rank=2)', WINDOWED),
        ('mov(experts=3)', ALIBI),
      ),
      quick=(),
    ),
  ],
)
def test_cached_logits_of_rows_together_equal_uncached_ones_alone(
  method, config
):
  model, variables = made(method, config)
  rng = np.random.default_rng(0)
  texts = [[*p, *rng.integers(2, 37, NEW - 1).tolist()] for p in PROMPTS]
  found = fed(model, variables, texts, PROMPTS)
  for row, text, prompt in zip(found, texts, PROMPTS, strict=True):
    expected = whole(model, variables, text)[len(prompt) - 1 :]
    # Each is as far as 6e-6 of its largest logit from what float64 says (a
    # batch of one at lora(rank=3), its single logits by 2e-5): rounding, some
    # 90 times 2 ** -24 after three layers. That it is no more: see below.
    near(row, expected, 2e-5)


@pytest.mark.parametrize(
  'method, config',
  [
    *small.others_slow(
      (
        *((m, CONFIG) for m in ('full', *small.ONE_EACH)),
        ('molora(experts=3, rank=2)', CONFIG),
        ("tokens(new='3|5-7')", CONFIG),
      ),
      quick=small.FEW,
    ),
    (small.ONE_EACH[-1], OTHER),
    ("lora(rank=3, sites='*/q|*/wo')", WINDOWED),
    ("lora(rank=3, sites='*/q|*/wo')", ALIBI),
  ],
)
def test_in_float64_cached_logits_equal_uncached_ones_to_ten_digits(
  method, config
):
  model, variables = made(method, config)
  rng = np.random.default_rng(0)
  texts = [[*p, *rng.integers(2, 37, NEW - 1).tolist()] for p in PROMPTS]
  # Kept for other tests, so made in float32.
  variables = jax.tree.map(np.asarray, variables)
  with jax.enable_x64(True):
    exact = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    variables = jax.tree.map(lambda a: jnp.asarray(a, 'float64'), variables)
    together = fed(exact, variables, texts, PROMPTS)
    alone = fed(exact, variables, texts[1:2], PROMPTS[1:2])
    assert together.dtype == alone.dtype == np.float64
    # Seen: 6e-15. A router's choice of two must not change, and does not.
    near(alone[0], together[1], 1e-10)
    for row, text, prompt in zip(together, texts, PROMPTS, strict=True):
      near(row, whole(exact, variables, text)[len(prompt) - 1 :], 1e-10)


@pytest.mark.parametrize(
  'method', small.others_slow(small.ONE_EACH, quick=small.FEW[1:])
)
def test_in_float64_an_encoder_decoders_cached_logits_are_the_uncached(method):
  model, _ = small.make(method, dtype=jnp.float64, param_dtype=jnp.float64)
  variables = jax.tree.map(np.asarray, small.variables(method, noise=0.1))
  sides = {k: np.asarray(small.batch()[k]) for k in ('inputs', 'inputs_mask')}
  said = np.random.default_rng(0).integers(2, 37, (3, NEW)).astype(np.int32)
  with jax.enable_x64(True):
    variables = jax.tree.map(lambda a: jnp.asarray(a, 'float64'), variables)
    logits, memory = BEGIN(model, variables, sides, NEW)
    found = [logits]
    for i in range(1, NEW):
      logits, memory = STEP(
        model, variables, memory, said[:, i - 1], jnp.int32(i)
      )
      found.append(logits)
    shifted = np.pad(said[:, :-1], ((0, 0), (1, 0)))
    expected = jax.jit(model.apply)(
      variables, {**sides, 'decoder_inputs': shifted}
    )
    assert expected.dtype == np.float64
    near(np.stack(found, axis=1), np.asarray(expected), 1e-10)


def test_padding_beyond_learned_positions_is_refused():
  model, variables = made('full', OTHER)
  with pytest.raises(ValueError, match='31 positions; got prompts'):
    greedy(model, variables, batch(s=32), 1)


def test_layers_written_out_are_the_same_model():
  method = "molora(experts=3, rank=2, sites='*/q|*/wo')"
  model, variables = made(method)
  plain = model.clone(scan=False)
  own = {key: unstack_layers(tree) for key, tree in variables.items()}
  expected = greedy(model, variables, batch(), NEW, eos=-1)
  found = greedy(plain, own, batch(), NEW, eos=-1)
  np.testing.assert_array_equal(found, expected)


def test_tokens_do_not_depend_on_how_often_the_loop_is_called():
  model, variables = made('mov(experts=3)')
  expected = greedy(model, variables, batch(), 7, eos=-1)
  rows = start(model, variables, batch(), ENDLESS, 7)
  for until in (1, 2, 5, 99):
    rows = advance(model, variables, rows, ENDLESS, until)
    assert int(rows.count) == min(until, 7)
  np.testing.assert_array_equal(rows.tokens, expected)


def test_several_ends_and_the_least_tokens():
  model, variables = made()
  free = np.asarray(greedy(model, variables, batch(), 7, eos=-1))
  ends = jnp.array([int(free[0, 2]), int(free[1, 4])])
  found = run(How(Sampling(), ends))
  for row, plain in zip(found, free, strict=True):
    at = np.flatnonzero(np.isin(plain, ends))
    last = at[0] + 1 if len(at) else 7
    assert row.tolist() == plain[:last].tolist() + [0] * (7 - last)
  later = run(How(Sampling(), ends, jnp.int32(5)))
  assert not np.isin(later[:, :5], ends).any()


def run(how, keys=None, prompts=PROMPTS, length=7, variables=None):
  model, own = made()
  rows = start(model, variables or own, batch(prompts), how, length, keys)
  return np.asarray(advance(model, variables or own, rows, how, length).tokens)


def test_a_sampled_row_does_not_depend_on_the_rows_beside_it():
  keys = jax.vmap(jax.random.key)(jnp.arange(4))
  s = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.3)
  how = How(s, jnp.array([-1]))
  together = run(how, keys)
  order = np.array([2, 0, 3, 1])
  mixed = run(how, keys[order], [PROMPTS[i] for i in order])
  np.testing.assert_array_equal(mixed, together[order])
  alone = run(how, keys[1:2], PROMPTS[1:2])
  np.testing.assert_array_equal(alone[0], together[1])
  # Other seeds say something else.
  assert (run(how, keys[::-1]) != together).any()


def test_a_repetition_penalty_counts_prompt_and_answer():
  how = How(Sampling(repetition_penalty=1e9), jnp.array([-1]))
  # Of 37 ids there is always one whose logit is positive, or nearer to 0.
  tokens = run(how, length=7)
  for row, prompt in zip(tokens, PROMPTS, strict=True):
    said = [*prompt, *row.tolist()]
    assert len(set(row.tolist()) | set(prompt)) == len(said)


def test_padding_is_no_token_that_was_there():
  model, variables = made()
  how = How(Sampling(repetition_penalty=1.3), jnp.array([-1]))
  rows = start(model, variables, batch(), how, 7)
  for seen, prompt, first in zip(rows.seen, PROMPTS, rows.tokens, strict=True):
    # Rows are padded with 3.
    assert set(np.flatnonzero(seen)) == {*prompt, int(first[0])}


@pytest.mark.slow
def test_layouts_change_neither_steps_nor_tokens_of_a_decoder(tmp_path):
  flags = os.environ.get('XLA_FLAGS', '')
  env = os.environ | {
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
  }
  path = tmp_path / 'found.json'
  command = [sys.executable, '-m', 'tests.contracts.decoded', str(path)]
  done = subprocess.run(
    command, env=env, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  assert found.pop('devices') == 8
  expected, *_ = found.pop('one')
  # Of l d k h: d over eight devices, k over four, which eight do not divide.
  shares = {'dp': 1, 'fsdp': 1 / 8, 'tp': 1 / 4, 'tp8': 1}
  for name, (tokens, specs, off, held) in found.items():
    assert tokens == expected, name
    # Layers, rows, keys, heads: one spec for all of it.
    heads = [None, 'model'] if name == 'tp' else []
    # Of eight devices along 'model' there is one along 'data'.
    assert specs == [[] if name == 'tp8' else [None, 'data', *heads]], name
    assert held == shares[name], name
    # The loss and every gradient, but for the order of float32 sums, which
    # weights three times their usual size make more of: 4e-4 was seen.
    assert max(off.values()) <= 2e-3, (name, off)
