# SPDX-License-Identifier: Apache-2.0
"""Forms of attention compute the same; one of them in less memory."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints import base
from moepeft.config.defaults import default
from moepeft.models.decoder.model import Decoder, DecoderConfig
from moepeft.models.t5.model import T5
from moepeft.nn import attention, chunked_attention, dot_product_attention
from moepeft.nn.attention import Heads
from moepeft.nn.attention_mask import NO_WINDOW, AttentionMask, CausalMask
from moepeft.nn.initializers import init_params
from moepeft.nn.positions import alibi, alibi_slopes, sinusoidal

from ..contracts import small

B, T, S, N, K, H = 2, 23, 29, 6, 2, 5


def heads(seed=0, dtype=jnp.float32):
  """q, k and v whose logits are of a size where softmax is sharp."""
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  return Heads(
    *(
      jax.random.normal(key, shape, dtype)
      for key, shape in zip(keys, shapes, strict=True)
    )
  )


def structured_mask(window=NO_WINDOW, slopes=None):
  """Queries at places 6 to 28 of 29; two segments, and padding at the end."""
  places = jnp.broadcast_to(jnp.arange(S), (B, S))
  segments = jnp.where(places < 11, 1, 2)
  real = places < jnp.array([[S], [S - 4]])
  return AttentionMask(
    places[:, S - T :],
    places,
    segments[:, S - T :],
    jnp.where(real, segments, -1),
    jnp.int32(window),
    slopes,
  )


@pytest.mark.parametrize(
  'window, cap, slopes, explicit',
  [
    (NO_WINDOW, 0.0, None, False),
    (7, 0.0, tuple(alibi_slopes(N)), False),
    (4, 2.0, None, True),
    pytest.param(NO_WINDOW, 0.0, None, True, marks=pytest.mark.slow),
    pytest.param(7, 0.0, tuple(alibi_slopes(N)), True, marks=pytest.mark.slow),
    pytest.param(4, 2.0, None, False, marks=pytest.mark.slow),
  ],
)
def test_chunked_equals_naive(window, cap, slopes, explicit):
  seen = structured_mask(window, None if slopes is None else jnp.array(slopes))
  inputs = heads()
  mask = inputs.replace(mask=seen.mask(), bias=seen.bias())
  chunks = mask if explicit else inputs.replace(structured_mask=seen)
  weights = jax.random.normal(jax.random.key(1), (B, T, N, H))
  # A padded query whose window is all padding may give anything.
  sees = jnp.any(seen.mask(), -1)[:, 0, :, None, None]

  def value(form, options, heads):
    out = form(heads, 0.7, cap=cap, **options) * sees
    return jnp.sum(out * weights), out

  def both(form, options, given):
    q, k, v = given.q, given.k, given.v
    run = lambda q, k, v: value(  # noqa: E731
      form, options, given.replace(q=q, k=k, v=v)
    )
    return jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(q, k, v)

  actual = both(chunked_attention.attend, dict(chunk=5), chunks)
  naive = both(attention.attend, {}, mask)
  for left, right in zip(
    jax.tree.leaves(actual), jax.tree.leaves(naive), strict=True
  ):
    # Sums of up to 29 numbers of size 1 in another order.
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


@functools.cache
def compiled_attend(form, scale, **options):
  run = attention.IMPLEMENTATIONS[form]
  return jax.jit(lambda heads: run(heads, scale, **options))


@pytest.mark.parametrize('t', [64, 150])
def test_blocks_of_causal_queries_equal_all_queries_at_once(t):
  shape = jax.eval_shape(heads)
  keys = jax.random.split(jax.random.key(8), 4)
  q, k, v = (
    jax.random.normal(key, (B, t, *a.shape[2:]))
    for key, a in zip(keys, (shape.q, shape.k, shape.v), strict=False)
  )
  real = jnp.arange(t) < jnp.array([[t], [t - 9]])
  segments = jnp.broadcast_to(jnp.where(jnp.arange(t) < 11, 1, 2), (B, t))
  whole = Heads(
    *(q, k, v),
    bias=jax.random.normal(keys[3], (1, N, t, t)),
    mask=attention.attention_mask(real, real, segments, segments, causal=True),
  )

  @jax.jit
  def value(inputs):
    # The queries of padding see no key.
    y = attention.attend(inputs, 0.3, jax.random.key(4), 0.4, cap=2.0)
    return jnp.sum(jnp.where(real[..., None, None], y, 0) ** 2)

  def gradients(inputs):
    return jax.grad(value, allow_int=True)(inputs).replace(mask=None)

  blocks = whole.replace(causal=True)
  np.testing.assert_allclose(value(blocks), value(whole), rtol=1e-5)
  for actual, expected in zip(
    jax.tree.leaves(gradients(blocks)),
    jax.tree.leaves(gradients(whole)),
    strict=True,
  ):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form', ['naive', 'chunked', 'fused'])
@pytest.mark.parametrize('grouped', [True, False])
def test_bfloat16_logits_are_not_rounded(form, grouped):
  q, k, v = (x.astype(jnp.bfloat16) for x in (heads().q, heads().k, heads().v))
  if not grouped:
    # As in T5, each query head has keys of its own.
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
  # A product of five normal numbers twice is of std 5 ** 0.5: now 16, where
  # bfloat16's steps are 1/16 to 1/4 and a weight is off by up to an eighth.
  scale = 16 / H**0.5
  given = Heads(q, k, v, mask=structured_mask().mask())
  wide = given.replace(
    **{n: getattr(given, n).astype(jnp.float32) for n in 'qkv'}
  )
  exact = compiled_attend('naive', scale)(wide)
  options = dict(chunk=5) if form == 'chunked' else {}
  rounded = compiled_attend(form, scale, **options)(given)
  error = np.abs(np.asarray(rounded, np.float32) - exact)
  # Weights and the result are rounded to 2 ** -9 of outputs up to 4, a few
  # times over; rounded logits give 0.1.
  assert error.max() < 0.025


def queries_at(queries):
  return jnp.zeros(S, bool).at[queries].set(True)


@jax.jit
def value_of_queries(window, chosen, q, v):
  """(sum of squares of the chosen queries' outputs, its gradient)."""
  places = jnp.broadcast_to(jnp.arange(S), (B, S))
  one = jnp.ones((B, S), int)
  seen = AttentionMask(places, places, one, one, window)

  def value(q):
    given = heads().replace(q=q, v=v, structured_mask=seen)
    out = chunked_attention.attend(given, chunk=5)
    return jnp.sum(jnp.where(chosen[:, None, None], out, 0) ** 2)

  return jax.value_and_grad(value)(q)


@pytest.mark.parametrize(
  'window, queries, unseen',
  [
    # Tokens 5 to 28 are in the future of 0 to 4.
    (NO_WINDOW, slice(0, 5), slice(5, S)),
    # 15 is the first of its part; 9 is 6 tokens before it.
    (6, slice(15, 20), slice(0, 10)),
    (6, slice(15, 20), slice(20, S)),
  ],
)
def test_parts_that_no_query_of_a_part_sees_are_not_computed(
  window, queries, unseen
):
  given = heads()
  q = jnp.concatenate([given.q, given.q[:, :6]], axis=1)
  run = functools.partial(
    value_of_queries, jnp.int32(window), queries_at(queries)
  )
  expected = run(q, given.v)
  # Nought times what is no number would be none.
  actual = run(q, given.v.at[:, unseen].set(jnp.nan))
  for left, right in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    # Other queries' gradients are nought times NaN, and not asked for.
    left, right = (a if a.ndim == 0 else a[:, queries] for a in (left, right))
    np.testing.assert_array_equal(left, right)


@jax.jit
@jax.value_and_grad
def value_of_mask(q, seen):
  given = heads().replace(q=q, structured_mask=seen)
  return jnp.sum(chunked_attention.attend(given, chunk=7) ** 2)


@pytest.mark.parametrize('where', ['padding', 'future'])
def test_a_query_that_sees_nothing_stays_finite(where):
  seen = structured_mask()
  if where == 'padding':
    seen = seen.replace(key_segments=jnp.full((B, S), -1))
  else:
    seen = seen.replace(query_positions=seen.query_positions - S)
  out, gradient = value_of_mask(heads().q, seen)
  assert np.isfinite(out) and np.isfinite(gradient).all()


def test_dropout_keeps_the_mean_and_some_weights():
  given = heads().replace(structured_mask=structured_mask())
  given = given.replace(v=jnp.ones_like(given.v))
  attend = functools.partial(chunked_attention.attend, dropout=0.4, chunk=5)
  out = jax.jit(attend)(given, rng=jax.random.key(0))
  # Each of 2 * 23 * 6 outputs is a mean of 0 or 1 / 0.6: all together 1.
  assert np.abs(np.mean(out) - 1) < 0.1
  assert np.std(out) > 0.1
  exact = jax.jit(attend)(given, rng=None)
  np.testing.assert_allclose(exact, jnp.ones_like(out), rtol=1e-5)


def test_advice_that_lengthens_keys_must_say_what_is_seen():
  given = heads().replace(structured_mask=structured_mask())
  longer = jnp.concatenate([given.k, given.k[:, :1]], axis=1)
  with pytest.raises(ValueError, match='keys from 29 to 30'):
    chunked_attention.attend(given.replace(k=longer, v=longer))


SMALL = DecoderConfig(
  vocab=11, d_model=8, heads=2, kv_heads=1, head_dim=4, ffn=8, layers=2
)


def compiled(form, t):
  """The gradient's program on a row of t tokens."""
  model = Decoder(SMALL, attention=form)
  batch = {'inputs': jax.ShapeDtypeStruct((1, t), jnp.int32)}
  params = jax.eval_shape(model.init, jax.random.key(0), batch)
  loss = lambda params, batch: jnp.sum(model.apply(params, batch))  # noqa: E731
  return jax.jit(jax.grad(loss)).lower(params, batch).compile()


def largest(program):
  """The most elements of an array in the program."""
  shapes = re.findall(r'(?:f32|pred|s32|bf16)\[([\d,]+)\]', program.as_text())
  return max(int(np.prod([int(n) for n in s.split(',')])) for s in shapes)


def test_chunked_holds_no_array_of_queries_and_keys():
  short, long = (compiled('chunked', t) for t in (1024, 2048))
  # Logits of 256 x 256 for two heads, or of 2 layers x 2048 x 8 features.
  assert largest(long) < 2048 * 2048 / 8
  assert largest(compiled('naive', 256)) >= 256 * 256
  sizes = [
    program.memory_analysis().temp_size_in_bytes for program in (short, long)
  ]
  # Twice the row, twice the memory; less where something does not grow.
  assert sizes[1] < 2.2 * sizes[0]


def test_fused_refuses_what_it_can_not_say():
  given = heads()
  with pytest.raises(ValueError, match='no soft caps'):
    dot_product_attention.attend(given, cap=2.0)
  with pytest.raises(ValueError, match='no dropout'):
    dot_product_attention.attend(given, rng=jax.random.key(0), dropout=0.1)
  mask = structured_mask(5).mask()
  np.testing.assert_allclose(
    compiled_attend('fused', 0.3)(given.replace(mask=mask)),
    compiled_attend('naive', 0.3)(given.replace(mask=mask)),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  'window', [0, pytest.param(1, marks=pytest.mark.slow), 4]
)
def test_fused_by_lengths_equals_masks(window):
  given = heads()
  given = given.replace(k=given.k[:, :T], v=given.v[:, :T])
  # A whole row, and one of six tokens.
  causal_mask = CausalMask(jnp.arange(T) < jnp.array([[T], [6]]), window)
  weights = jax.random.normal(jax.random.key(1), (B, T, N, H))

  def value(form, given):
    def of(q, k, v):
      out = form(given.replace(q=q, k=k, v=v), 0.7)
      # Padding far behind its row's tokens sees none, and may give anything.
      return jnp.sum(out * weights * causal_mask.token_mask[:, :, None, None])

    return jax.jit(jax.value_and_grad(of, (0, 1, 2)))(given.q, given.k, given.v)

  actual = value(
    dot_product_attention.attend, given.replace(structured_mask=causal_mask)
  )
  naive = value(attention.attend, given.replace(mask=causal_mask.mask()))
  for left, right in zip(
    jax.tree.leaves(actual), jax.tree.leaves(naive), strict=True
  ):
    # Sums of up to 23 numbers of size 1 in another order.
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
  expected = attention.attention_mask(
    causal_mask.token_mask, causal_mask.token_mask, causal=True, window=window
  )
  np.testing.assert_array_equal(causal_mask.mask(), expected)


@pytest.mark.parametrize(
  ('changes', 'packed', 'expected'),
  [
    ({}, False, (None, True, None)),
    ({'window': 4}, False, (None, True, (3, 0))),
    # Layers that differ, and rows of several texts, need a mask.
    ({'window': 4, 'windowed': (True, False)}, False, ('mask', False, None)),
    ({}, True, ('mask', False, None)),
    ({'positions': 'alibi'}, False, ('mask', False, None)),
  ],
)
def test_fused_is_told_lengths_where_they_say_it_all(
  changes, packed, expected, monkeypatch
):
  requests = []

  def record(q, k, v, bias=None, mask=None, is_causal=False, **options):
    given = None if mask is None else 'mask'
    requests.append((given, is_causal, options.get('local_window_size')))
    return q

  monkeypatch.setattr(jax.nn, 'dot_product_attention', record)
  batch = {'inputs': jax.ShapeDtypeStruct((2, 7), jnp.int32)}
  if packed:
    batch |= dict.fromkeys(
      ('inputs_segments', 'inputs_positions'), batch['inputs']
    )
  config = dataclasses.replace(SMALL, **changes)
  model = Decoder(config, attention='fused')
  jax.eval_shape(model.init, jax.random.key(0), batch)
  assert set(requests) == {expected}


def of_heads(h=64, t=8, dtype=jnp.bfloat16, **changes):
  q = jax.ShapeDtypeStruct((2, t, 4, h), dtype)
  return Heads(q, q, q, **changes)


@pytest.mark.parametrize(
  ('platform', 'capability'),
  [('cpu', ''), ('tpu', ''), ('gpu', 'gfx942'), ('gpu', '7.5'), ('gpu', '')],
)
def test_cudnn_is_not_asked_where_it_is_not(platform, capability):
  assert (
    dot_product_attention.implementation(platform, capability, of_heads())
    == 'xla'
  )


@pytest.mark.parametrize('capability', ['8.0', '8.6', '9.0', '10.0', '12.0'])
def test_cudnn_is_asked_for_what_it_knows(capability):
  def choose(heads):
    return dot_product_attention.implementation('gpu', capability, heads)

  square = jnp.ones((2, 1, 8, 8), bool)
  assert choose(of_heads()) == 'cudnn'
  assert choose(of_heads(dtype=jnp.float16, h=128)) == 'cudnn'
  assert choose(of_heads(t=7)) == 'cudnn'
  assert choose(of_heads(mask=square)) == 'cudnn'
  for other in (
    of_heads(dtype=jnp.float32),
    of_heads(h=136),
    of_heads(h=60),
    of_heads(t=7, mask=square[:, :, :7, :7]),
    of_heads(bias=square.astype(jnp.bfloat16)),
  ):
    assert choose(other) == 'xla'


def test_t5_is_fused_or_refuses():
  batch, variables = small.batch(), small.variables('full')
  naive, actual = (
    small.jitted(T5(small.GATED, attention=form))(variables, batch)
    for form in ('naive', 'fused')
  )
  real = np.asarray(batch['targets_mask'])
  np.testing.assert_allclose(
    np.asarray(actual)[real], np.asarray(naive)[real], rtol=2e-5, atol=2e-5
  )
  with pytest.raises(ValueError, match='which T5 does not'):
    T5(small.GATED, attention='chunked').apply(variables, batch)


def test_the_config_says_which_and_others_are_refused():
  config = default()
  config.model.path, config.model.family = '', 'llama'
  config.model.size, config.model.attention = 'tiny', 'chunked'
  model, _ = base.module(base.load(config.model), config)
  assert model.attention == 'chunked'
  with pytest.raises(ValueError, match="got 'sparse'"):
    Decoder(SMALL, attention='sparse').init(
      jax.random.key(0), {'inputs': jnp.zeros((1, 2), jnp.int32)}
    )


def test_slopes_of_alibi():
  # Halves from 1/2 on for 8 heads; for 6 those of 4 heads, then 1/2 and 1/8.
  assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
  assert alibi_slopes(6) == [2.0**-i for i in (2, 4, 6, 8, 1, 3)]
  bias = alibi(6, jnp.array([[5, 9]]), jnp.arange(7))
  assert bias.shape == (1, 6, 2, 7)
  # The head of slope 1/16, three tokens back.
  assert bias[0, 1, 0, 2] == -3 / 16


def test_slopes_are_those_of_bloom():
  torch = pytest.importorskip('torch')
  bloom = pytest.importorskip('transformers.models.bloom.modeling_bloom')
  for count in (1, 5, 6, 16, 25):
    mask = torch.ones(1, 7)
    reference = bloom.build_alibi_tensor(mask, count, torch.float32)
    reference = reference.numpy().reshape(count, 7)
    actual = alibi(count, jnp.full((1, 1), 6), jnp.arange(7))[0, :, 0]
    # Theirs is the slope times the key's place: a constant away from ours.
    np.testing.assert_allclose(actual - actual[:, :1], reference, rtol=1e-5)


def test_sines_and_cosines():
  # d = 4: wave lengths 2 pi and 2 pi * 100.
  actual = sinusoidal(jnp.array([[0, 3]]), 4)
  expected = [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)]
  np.testing.assert_allclose(actual[0, 1], expected, rtol=1e-5)
  np.testing.assert_array_equal(actual[0, 0], [0, 0, 1, 1])


def test_windows_wider_than_the_row_change_nothing():
  batch = {'inputs': jnp.arange(1, 8)[None]}
  params = init_params(Decoder(SMALL), batch, 0)
  whole, wide, narrow = (
    jax.jit(Decoder(dataclasses.replace(SMALL, window=window)).apply)(
      params, batch
    )
    for window in (0, 7, 6)
  )
  np.testing.assert_allclose(wide, whole, rtol=1e-5)
  assert np.abs(narrow[0, 6] - whole[0, 6]).max() > 1e-6
  np.testing.assert_allclose(narrow[0, :6], whole[0, :6], rtol=1e-5)
