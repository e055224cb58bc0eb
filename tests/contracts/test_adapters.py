# SPDX-License-Identifier: Apache-2.0
"""Contracts of every adapter method, over the whole registry."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.seq2seq import loss_sums
from moepeft.peft import METHODS, build
from moepeft.peft.method_text import method_entry, resolve
from moepeft.peft.prefix import model_prefix_ids

from . import small, small_decoders

few = pytest.mark.parametrize(
  'method', small.others_slow(small.METHODS, quick=small.FEW)
)
# For what takes longest: the method that has every kind of leaf.
mixture = pytest.mark.parametrize(
  'method', small.others_slow(small.METHODS, quick=small.FEW[1:])
)
# float32 sums of other order over a depth of five layers.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def apply(model, variables, batch):
  return small.jitted(model)(variables, batch)


def test_small_methods_cover_the_registry():
  methods = small.METHODS + small_decoders.METHODS
  named = {m.split('(')[0].split(' ')[0] for m in methods}
  assert named | {'full'} == set(METHODS)


def starts_elsewhere(method):
  specs = resolve(method)
  return any(method_entry(spec).initial_change for spec in specs)


# A method whose first output is computed from the base; scales; a mixture.
IDENTITY = small.others_slow(
  ((m, small.GATED) for m in small.METHODS if not starts_elsewhere(m)),
  quick=small.ONE_EACH[1:],
) + small.others_slow(
  ((m, small.RELU) for m in small.ONE_EACH), quick=small.FEW[1:]
)


@pytest.mark.parametrize(
  ('method', 'config'),
  IDENTITY,
  ids=lambda v: v if isinstance(v, str) else '1.1' if v.gated else '1.0',
)
def test_identity_at_initialisation(method, config):
  if 'topk' in method and 'renormalize' not in method and 'mov' in method:
    pytest.fail('such a mixture does not start at the base; test it apart')
  model, _ = small.make(method, config)
  variables = small.variables(method, config)
  base = apply(t5.T5(config), {'params': variables['params']}, small.batch())
  adapted = apply(model, variables, small.batch())
  # Routers' weights sum to one up to float32 rounding.
  np.testing.assert_allclose(adapted, base, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('method', filter(starts_elsewhere, small.METHODS))
def test_a_method_says_that_it_does_not_start_at_the_base(method):
  model, _ = small.make(method)
  variables = small.variables(method)
  base = apply(
    t5.T5(small.GATED), {'params': variables['params']}, small.batch()
  )
  assert np.abs(apply(model, variables, small.batch()) - base).max() > 0.01


def test_official_topk_mixture_of_vectors_starts_away_from_the_base():
  method = 'mov(experts=3, router=topk(k=1, renormalize=False))'
  model, _ = small.make(method)
  variables = small.variables(method)
  base = apply(
    t5.T5(small.GATED), {'params': variables['params']}, small.batch()
  )
  # About 1/3 of every key, value and gate is left (released code, 2.5).
  assert np.abs(apply(model, variables, small.batch()) - base).max() > 0.01


@few
def test_params_are_untouched_in_values_and_paths(method):
  model, _ = small.make(method)
  chex.assert_trees_all_equal(
    small.params(), init_params(model, small.batch(), 0)['params']
  )


# In the fast suite tests/peft/test_experts_per_layer.py has it of T5, with
# gradients; other models have tests of their own.
@pytest.mark.slow
@pytest.mark.parametrize('method', small.METHODS)
def test_scan_equals_loop(method):
  variables = small.variables(method, noise=0.1)
  looped, _ = small.make(method, scan=False)
  apart = {key: small.unstack(tree) for key, tree in variables.items()}
  np.testing.assert_allclose(
    apply(looped, apart, small.batch()),
    apply(small.make(method)[0], variables, small.batch()),
    **CLOSE,
  )


@mixture
def test_unrolled_layers_equal_scanned_ones(method):
  # Two at a time, of three: the last is left over.
  variables = small.variables(method, noise=0.1)
  unrolled, _ = small.make(method, unroll=2)
  np.testing.assert_allclose(
    apply(unrolled, variables, small.batch()),
    apply(small.make(method)[0], variables, small.batch()),
    **CLOSE,
  )


# In the fast suite test_router_kinds.py has it, of three mixtures at once.
@pytest.mark.slow
@pytest.mark.parametrize('method', small.METHODS)
@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_no_gradient(method, remat):
  expected = gradients(method, 'none')
  actual = gradients(method, remat)
  chex.assert_trees_all_close(actual, expected, **CLOSE)
  moves = any(np.abs(a).max() > 0 for a in jax.tree.leaves(actual))
  # The batch has no placeholders of soft prompts.
  assert moves != bool(model_prefix_ids(small.make(method)[0]))


def gradients(method, remat):
  model, _ = small.make(method, remat=remat)
  variables = small.variables(method, noise=0.1)

  def loss(peft):
    return mean_loss(
      *loss_sums(model.apply, {**variables, 'peft': peft}, small.batch(), None)
    )

  return jax.jit(jax.grad(loss))(variables['peft'])


@mixture
def test_vmap_over_a_bank_equals_one_by_one(method):
  model, _ = small.make(method)
  one, two = small.variables(method), small.variables(method, noise=0.1)
  bank = jax.tree.map(lambda a, b: jnp.stack([a, b]), one['peft'], two['peft'])

  def run(peft):
    return apply(model, {'params': one['params'], 'peft': peft}, small.batch())

  both = jax.jit(jax.vmap(run))(bank)
  np.testing.assert_allclose(both[0], run(one['peft']), **CLOSE)
  np.testing.assert_allclose(both[1], run(two['peft']), **CLOSE)


@few
def test_bfloat16_activations_keep_float32_adapters(method):
  model, _ = small.make(method, dtype=jnp.bfloat16)
  variables = small.variables(method, noise=0.1)
  assert {a.dtype for a in jax.tree.leaves(variables['peft'])} <= {
    jnp.dtype('float32')
  }
  logits = apply(model, variables, small.batch())
  exact = apply(small.make(method)[0], variables, small.batch())
  assert logits.dtype == jnp.float32
  real = small.batch()['targets_mask']
  error = np.linalg.norm((logits - exact)[real])
  # bfloat16 keeps 8 bits; five layers and saturated gates widen it.
  assert error < 0.1 * np.linalg.norm(exact[real])


@few
def test_padding_never_moves_logits(method):
  model, _ = small.make(method)
  variables = small.variables(method, noise=0.1)
  batch = small.batch()
  real = batch['targets_mask']
  other = dict(batch)
  for side, mask in (('inputs', 'inputs_mask'), ('decoder_inputs', None)):
    remaining = (
      batch[mask]
      if mask
      else jnp.pad(real[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    )
    other[side] = jnp.where(remaining, batch[side], 31)
  wide = {
    key: jnp.pad(other[key], ((0, 0), (0, 4)), constant_values=0)
    for key in other
  }
  expected = apply(model, variables, batch)
  np.testing.assert_allclose(
    apply(model, variables, other)[real], expected[real], **CLOSE
  )
  actual = apply(model, variables, wide)[:, : expected.shape[1]]
  np.testing.assert_allclose(actual[real], expected[real], **CLOSE)


@few
def test_one_trace_serves_every_batch_of_a_shape(method):
  model, _ = small.make(method)
  variables = small.variables(method)
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(variables, batch):
    # Built anew: equal modules must be equal to jit.
    return small.make(method)[0].apply(variables, batch)

  run.trace(variables, small.batch(seed=1))
  run.trace(variables, small.batch(seed=2))
  assert hash(model) == hash(small.make(method)[0])


# Sizes of the small model: d 11, n*h 15, f 17; 2 encoder, 3 decoder layers.
_D, _NH, _F, _H = 11, 15, 17, 5
_ATTENTIONS = 2 + 2 * 3
_LAYERS = 2 + 3


def _lora(r):
  attention = 4 * (_D + _NH) * r
  return _ATTENTIONS * attention + _LAYERS * 2 * (_D + _F) * r


def _molora(e, r):
  routers = _ATTENTIONS * (3 * _D + _NH) + _LAYERS * (_D + _F)
  return e * (_lora(r) + routers)


def _shared_a(e, r):
  # One A a site; B, the router and both for each of the experts.
  a = _ATTENTIONS * (3 * _D + _NH) * r + _LAYERS * (_D + _F) * r
  return _molora(e, r) - (e - 1) * a


_IA3 = _ATTENTIONS * 2 * _NH + _LAYERS * _F


@pytest.mark.parametrize(
  ('method', 'semantics', 'expected'),
  [
    ('full', 'official', 0),
    ('lora(rank=3)', 'official', _lora(3)),
    ('lora(rank=3)', 'paper', _lora(3) + _LAYERS * (_D + _F) * 3),
    # One magnitude an output.
    (
      'dora(rank=3)',
      'official',
      _lora(3) + _ATTENTIONS * (3 * _NH + _D) + _LAYERS * (_F + _D),
    ),
    # One value a rank, of four projections an attention and two others.
    (
      'adalora(rank=3, target_rank=2)',
      'official',
      _lora(3) + (4 * _ATTENTIONS + 2 * _LAYERS) * 3,
    ),
    ('ia3', 'official', _IA3),
    # K and V: one [h, e] kernel a site; feed-forward: [f, e].
    (
      'mov(experts=3)',
      'official',
      3 * (_IA3 + _ATTENTIONS * 2 * _H + _LAYERS * _F),
    ),
    ('mov(experts=3)', 'paper', 3 * (2 * _IA3)),
    ('molora(experts=3, rank=2)', 'official', _molora(3, 2)),
    ('molora(experts=3, rank=2, router=uniform)', 'official', 3 * _lora(2)),
    ('molora(experts=3, rank=2, router=random)', 'official', 3 * _lora(2)),
    (
      "mixture(expert=lora(rank=2), experts=3, share='a')",
      'official',
      _shared_a(3, 2),
    ),
    # q, k, v, o and wo; two projections with biases beside the feed-forward;
    # a router of 4 x 6 hidden units in each layer and cross-attention.
    (
      'moa(rank=2, size=3)',
      'official',
      _ATTENTIONS * 4 * (_D + _NH) * 2
      + _LAYERS * ((_D + _F) * 2 + 2 * _D * 3 + _D + 3)
      + (_LAYERS + 3) * (2 * (_D * 24 + 24) + 24 * 6 + 6),
    ),
    ('prompt(length=3)', 'official', 3 * _D),
    # Ranks and outputs at q and v.
    ('vera(rank=3)', 'official', _ATTENTIONS * 2 * (3 + _NH)),
    (
      'bitfit',
      'official',
      _ATTENTIONS * (3 * _NH + _D) + _LAYERS * (2 * _F + _D),
    ),
    # One before each sublayer, and one after each stack.
    ('ln_tuning', 'official', (_ATTENTIONS + _LAYERS + 2) * _D),
    # An embedding, and three projections with biases.
    (
      'p_tuning(length=3, hidden=2)',
      'official',
      3 * _D + (_D * 2 + 2) + (2 * 2 + 2) + (2 * _D + _D),
    ),
    ('prefix(length=3)', 'official', _ATTENTIONS * 2 * 3 * _NH),
  ],
)
def test_parameter_count_equals_its_formula(method, semantics, expected):
  model, _ = small.make(method, semantics=semantics)
  shapes = jax.eval_shape(lambda: model.init(small.RNGS, small.batch()))
  peft = shapes.get('peft', {})
  assert sum(math.prod(a.shape) for a in jax.tree.leaves(peft)) == expected


@pytest.mark.parametrize(
  'method',
  [
    pytest.param('lora(rank=3)', marks=pytest.mark.slow),
    pytest.param('dora(rank=3)', marks=pytest.mark.slow),
    pytest.param("lora(rank=3, init_weights='pissa')", marks=pytest.mark.slow),
    pytest.param('vera(rank=3) + ln_tuning', marks=pytest.mark.slow),
    pytest.param('adalora(rank=3, target_rank=2)', marks=pytest.mark.slow),
    # LoRA's and a ratio, with heads last, first and none, and beside another.
    "dora(rank=3, targets='*/k|*/cross/o|*/wo') + ia3(targets='*/k|*/act')",
    "ia3(targets='*/k|*/v|*/wo')",
    "ia3(targets='*/wo|*/q', on='input')",
  ],
)
def test_merged_equals_unmerged(method):
  from moepeft.peft.merge import merge

  model, built = small.make(method)
  variables = small.variables(method, noise=0.1)
  merged = jax.jit(functools.partial(merge, built))(variables)
  weight_mapping.check(
    {
      k: a.shape for k, a in weight_mapping.flatten(variables['params']).items()
    },
    {k: a.shape for k, a in weight_mapping.flatten(merged).items()},
    'merging changes a path',
    'mend merge',
  )
  np.testing.assert_allclose(
    apply(t5.T5(small.GATED), {'params': merged}, small.batch()),
    apply(model, variables, small.batch()),
    **CLOSE,
  )


@pytest.mark.parametrize(
  'method', ['mov(experts=3)', 'molora(experts=3)', 'full', 'prompt', 'prefix']
)
def test_mixtures_refuse_to_merge_and_say_why(method):
  from moepeft.peft.merge import merge

  _, built = small.make(method)
  with pytest.raises(ValueError, match='cannot be merged.*(token|base)'):
    merge(built, small.variables(method))


def test_a_dora_around_another_adapter_refuses_to_merge():
  from moepeft.peft.merge import merge

  # What it divides by is the norm of the base's kernel alone.
  _, built = small.make("ia3(targets='*/k') + dora(rank=3, targets='*/k')")
  with pytest.raises(ValueError, match='dora cannot be merged at .*put it'):
    merge(built, {})


def test_merge_of_official_ia3_goes_into_wo():
  from moepeft.peft.merge import merge

  model, built = small.make('ia3')
  variables = small.variables('ia3', noise=0.1)
  merged = jax.jit(functools.partial(merge, built))(variables)
  np.testing.assert_allclose(
    apply(t5.T5(small.GATED), {'params': merged}, small.batch()),
    apply(model, variables, small.batch()),
    **CLOSE,
  )


@pytest.mark.parametrize(
  ('method', 'said'),
  [
    ('lorra', 'no method'),
    ('lora(rang=3)', 'no option rang'),
    ("lora(targets='*/qq')", "'\\*/qq' matches no site"),
    ('molora(router=topkk)', 'no router'),
    ('molora(router=topk(kk=1))', 'no option kk'),
    ('full + lora', 'full trains alone'),
    ('lora(', 'cannot read the method'),
    ('lora(4)', 'cannot read the method'),
    ('lora(rank=1, rank=2)', 'given twice'),
    ('lora(rank=0)', "lora's option rank is at least 1"),
    ('lora(rank=2.5)', 'option rank is of type int; got 2.5'),
    ('lora(rank=x)', 'option rank is of type int'),
    ('lora(rank=True)', 'option rank is of type int'),
    ('lora(alpha=None)', 'option alpha is of type float'),
    ('lora(dropout=1.0)', 'option dropout is at least 0'),
    ('lora(targets=3)', 'option targets is of type str'),
    ('mov(experts=0)', 'option experts is at least 1'),
    ('molora(router=3)', 'a router is written like'),
    ('molora(router=topk(k=0))', 'option k is at least 1'),
    ('prompt(length=0)', 'option length is at least 1'),
    ('prompt + lora + prompt', 'prompt can stand only once'),
    ('prompt + p_tuning', 'prompt or p_tuning can stand only once'),
  ],
)
def test_a_wrong_method_is_one_clear_sentence(method, said):
  with pytest.raises(ValueError, match=said):
    build(method, t5.sites(small.GATED))


def test_an_adapter_of_another_shape_is_refused():
  model, _ = small.make('lora(rank=3)')
  variables = small.variables('lora(rank=2, alpha=16)')
  with pytest.raises(ValueError, match='expected shape .* got'):
    apply(model, variables, small.batch())
