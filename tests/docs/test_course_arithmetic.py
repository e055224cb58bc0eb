# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of docs/course.md, from formulas, `count` and XLA.

A row of a table has a symbol, a formula in Python and a value. The formulas are
computed from the sizes that the page gives, whose source is the package.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from transformers import DeepseekV3Config

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.count_flops import (
  batch_shapes,
  flops_per_token,
  products,
)
from moepeft.checkpoints.count_parameters import count
from moepeft.core.types import Context
from moepeft.models import FAMILIES
from moepeft.models.decoder.model import Decoder
from moepeft.nn import initializers
from moepeft.objectives.cross_entropy import DEFAULTS, token_nll_and_loss
from moepeft.training import memory_estimate

from .test_pages import read, tables

PAGES = ('docs/course.md', 'docs/course.zh.md')
LORA, MOLORA = 'lora(rank=4)', 'molora(experts=4, rank=4)'
pages = pytest.mark.parametrize('page', PAGES)


def number(text: str) -> float:
  return float(text.replace(',', ''))


def rounds_to(value: float, shown: str) -> bool:
  """Whether a value is a number of the page, to the digits that it shows."""
  digits = len(shown.partition('.')[2])
  return abs(value - number(shown)) <= (0.5 + 1e-6) * 10.0**-digits


def evaluate(formula: str, symbols: dict[str, float]) -> float:
  return eval(formula, {'__builtins__': {}}, symbols)  # noqa: S307


@functools.cache
def table_rows(page: str) -> list[list[str]]:
  return [
    [cell.strip() for cell in row]
    for table in tables(read(page))
    for row in table
  ]


def rows_of_symbols(page: str) -> list[list[str]]:
  """Rows that begin with a symbol and end with a value."""
  return [
    row
    for row in table_rows(page)
    if re.fullmatch(r'`\w+`', row[0]) and re.fullmatch(r'[\d.,]+', row[-1])
  ]


@functools.cache
def values(page: str) -> dict[str, float]:
  """{symbol: the value that the page shows}."""
  return {row[0].strip('`'): number(row[-1]) for row in rows_of_symbols(page)}


def config_of(method: str, layers: int = 0):
  config = importlib.import_module('configs.sft_smollm2').get_config()
  config.method = method
  if layers:
    with config.unlocked():
      config.model.shape.layers = layers
  return config


@pages
def test_values_are_those_of_their_formulas(page):
  symbols = {}
  for row in rows_of_symbols(page):
    name, formula, shown = row[0].strip('`'), row[-2].strip('`'), row[-1]
    is_size = len(row) == 3
    value = number(shown) if is_size else evaluate(formula, symbols)
    assert rounds_to(value, shown), (name, value)
    assert name not in symbols
    symbols[name] = value
  assert len(symbols) > 45


@pages
def test_sizes_are_those_of_the_model_and_of_the_config(page):
  config, shown = config_of(MOLORA), values(page)
  size = FAMILIES['llama'].sizes[config.model.size]
  expected = {
    'v': size.vocab,
    'd': size.d_model,
    'n': size.heads,
    'k': size.kv_heads,
    'h': size.head_dim,
    'f': size.ffn,
    'l': size.layers,
    't': config.data.length,
    'rows': config.batch_size,
    'r': 4,
    'e': 4,
  }
  assert {name: shown[name] for name in expected} == expected
  # One row after the other.
  assert config.gradient_accumulation_steps == config.batch_size


@pages
def test_numbers_of_the_text_are_those_of_the_tables(page):
  text = re.sub(r'^\|.*\|$', '', read(page), flags=re.M)
  in_tables = set(
    re.findall(
      r'\d+(?:,\d{3})+',
      ' '.join(cell for row in table_rows(page) for cell in row),
    )
  )
  assert set(re.findall(r'\d+(?:,\d{3})+', text)) <= in_tables


@pages
@pytest.mark.parametrize(
  'method, trained, forward, backward',
  [
    (LORA, 'lora', 'forward', 'backward'),
    (MOLORA, 'molora', 'molora_forward', 'molora_backward'),
  ],
)
def test_count_prints_these_parameters_and_flops(
  page, method, trained, forward, backward
):
  shown = values(page)
  parameters, flops = counted(method)
  assert parameters['params'] == shown['weights']
  assert parameters['peft'] == shown[trained]
  assert flops == {'forward': shown[forward], 'backward': shown[backward]}


@functools.cache
def counted(method: str):
  config = config_of(method)
  return count(config), flops_per_token(config)


@pages
def test_estimate_of_memory_has_these_bytes(page):
  shown = values(page)
  estimate = memory_estimate.estimate_training(config_of(LORA))
  assert estimate.weights == shown['weight_bytes'] + shown['adapter_bytes']
  # AdamW and the schedule count steps, an int32 each.
  counters = estimate.training - shown['gradient_bytes'] - shown['adam_bytes']
  assert 0 <= counters <= 16


@pages
def test_parameters_of_families_are_those_of_their_formulas(page):
  rows = [
    row
    for row in table_rows(page)
    if len(row) == 4 and re.fullmatch(r'`[\dx +*()]+`', row[1])
  ]
  assert len(rows) == 7
  for _, formula, experts, shown in rows:
    counts = [int(x) for x in re.findall(r'\d+', experts)] or [0]
    # English names the experts in use first, Chinese last.
    computed = [evaluate(formula.strip('`'), {'x': x}) for x in sorted(counts)]
    assert '/'.join(f'{n:,}' for n in computed) == shown


@pages
@pytest.mark.parametrize(
  'model, family, size',
  [
    ('GPT-2 small', 'gpt2', 'small'),
    ('Llama 3 8B', 'llama', '3-8b'),
    ('Qwen2.5 7B', 'qwen2', '2.5-7b'),
    ('Qwen3 8B', 'qwen3', '8b'),
  ],
)
def test_dense_models_of_the_package_have_these_parameters(
  page, model, family, size
):
  (shown,) = (row[-1] for row in table_rows(page) if row[0] == model)
  assert f'{base_parameters(family, size):,}' == shown


@functools.cache
def base_parameters(family: str, size: str) -> int:
  config = config_of('lora(rank=1)')
  config.model.family, config.model.size = family, size
  return count(config)['params']


@pages
@pytest.mark.parametrize('family', ['GPT-2', 'Llama 3', 'Qwen2.5', 'Qwen3'])
def test_options_of_families_are_those_of_the_package(page, family):
  (row,) = (row for row in table_rows(page) if row[0] == family)
  _, norm, positions, attention, feed_forward, _, _ = row
  name, size = {
    'GPT-2': ('gpt2', 'small'),
    'Llama 3': ('llama', '3-8b'),
    'Qwen2.5': ('qwen2', '2.5-7b'),
    'Qwen3': ('qwen3', '8b'),
  }[family]
  c = FAMILIES[name].sizes[size]
  assert norm == ('LayerNorm' if c.centred else 'RMSNorm')
  shown = [number(n) for n in re.findall(r'[\d,]*\d', positions)]
  assert shown == [c.rope.theta if c.positions == 'rope' else c.length]
  assert attention[:3] == ('GQA' if c.kv_heads < c.heads else 'MHA')
  assert ('RMSNorm' in attention) == c.qk_norm
  assert feed_forward == ('SwiGLU' if c.gated else 'GELU')


class UnscannedStep:
  """A training step of a few layers of SmolLM2, without a scan."""

  def __init__(self, method: str, layers: int):
    config = config_of(method, layers)
    family, shape = base_lib.shape(config.model)
    base = base_lib.Base(family, shape, None, '', '')
    model, built = base_lib.module(base, config)
    model = model.clone(scan=False)
    shapes = initializers.shapes(model, base_lib.example_batch())
    batch, self.tokens = batch_shapes(config, shape, built)

    def loss(trained, weights, batch):
      variables = {'params': weights, built.trainable: trained}
      rngs = {'router': jax.random.key(0)}
      logits = model.apply(variables, batch, train=True, rngs=rngs)
      return jnp.mean(token_nll_and_loss(logits, batch['targets'], DEFAULTS)[1])

    self.args = shapes[built.trainable], shapes['params'], batch
    self.step = jax.value_and_grad(loss)

  def products(self) -> float:
    return products(self.step, *self.args) / self.tokens

  @functools.cached_property
  def compiled(self):
    return jax.jit(self.step).lower(*self.args).compile()


unscanned_step = functools.cache(UnscannedStep)


@pytest.mark.slow
def test_first_layer_has_fewer_products_without_a_scan():
  shown = values(PAGES[0])
  # The head's product and the gradient of its input.
  head = 2 * 2 * shown['table']
  layers = shown['forward'] + shown['backward'] - head
  step = unscanned_step(LORA, 2)
  expected = head + layers * 2 / shown['l'] - shown['first_layer']
  assert step.products() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
  'method, trained, forward, backward',
  [
    (LORA, 'lora', 'forward', 'backward'),
    (MOLORA, 'molora', 'molora_forward', 'molora_backward'),
  ],
)
def test_compiled_step_has_these_arguments_and_flops(
  method, trained, forward, backward
):
  shown = values(PAGES[0])
  steps = [unscanned_step(method, layers) for layers in (2, 3)]
  less, more = (
    step.compiled.cost_analysis()['flops'] / step.tokens for step in steps
  )
  layers = shown[forward] + shown[backward] - 2 * 2 * shown['table']
  # Norms, activations and softmaxes are beside the products.
  assert 1 < (more - less) / (layers / shown['l']) < 1.05
  less, more = (
    step.compiled.memory_analysis().argument_size_in_bytes for step in steps
  )
  # Ids and targets (int32) and a mask of the ids are the rest.
  whole = 4 * (shown['weights'] + shown[trained]) + 9 * shown['t']
  assert less + (shown['l'] - 2) * (more - less) == whole


@pytest.mark.slow
def test_compiled_step_holds_these_activations():
  shown = values(PAGES[0])
  less, more = (
    unscanned_step(LORA, layers).compiled.memory_analysis().temp_size_in_bytes
    for layers in (2, 3)
  )
  layer = more - less
  assert 1 <= layer / (shown['saved_bytes'] / shown['l']) < 2
  assert 0.95 < (less - 2 * layer) / shown['logits_bytes'] < 1.05


def compile_decode(sequences: int, layers: int):
  """(compiled decode step, FLOPs of its products)."""
  shown = values(PAGES[0])
  config = config_of(LORA, layers)
  model = Decoder(base_lib.shape(config.model)[1], scan=False)
  ids = jax.ShapeDtypeStruct((sequences, 1), jnp.int32)

  def context(positions):
    length = int(shown['s'])
    return Context(decode=True, cache_length=length, positions=positions)

  def make(ids, positions):
    rng = jax.random.key(0)
    return model.init(rng, ids, context(positions), method='extend')

  def step(variables, ids, positions):
    return model.apply(
      variables,
      ids,
      context(positions),
      method='extend',
      mutable=['cache'],
    )

  args = (jax.eval_shape(make, ids, ids), ids, ids)
  return jax.jit(step).lower(*args).compile(), products(step, *args)


@pytest.mark.slow
def test_compiled_decode_step_has_these_arguments_and_flops():
  shown = values(PAGES[0])
  (single, flops_of_single), (double, flops_of_double) = (
    compile_decode(1, layers) for layers in (1, 2)
  )
  head = 2 * shown['table']
  layer = (shown['token_flops'] - head) / shown['l']
  assert flops_of_single == head + layer
  assert flops_of_double - flops_of_single == layer
  less, more = (p.cost_analysis()['flops'] for p in (single, double))
  assert 1 < (more - less) / layer < 1.05
  less, more = (
    p.memory_analysis().argument_size_in_bytes for p in (single, double)
  )
  whole = shown['read_bytes'] + shown['cache_bytes'] + 8
  assert less + (shown['l'] - 1) * (more - less) == whole
  many, _ = compile_decode(3, 1)
  added = many.memory_analysis().argument_size_in_bytes - less
  assert added == 2 * (shown['cache_bytes'] / shown['l'] + 8)


@pages
def test_deepseek_is_as_transformers_has_it(page):
  c = DeepseekV3Config()
  d, n, e = c.hidden_size, c.num_attention_heads, c.n_routed_experts
  latents = c.q_lora_rank, c.kv_lora_rank
  rotary, plain = c.qk_rope_head_dim, c.qk_nope_head_dim
  attention = (
    d * sum(latents)
    + sum(latents)
    + d * rotary
    + latents[0] * n * (plain + rotary)
    + latents[1] * n * (plain + c.v_head_dim)
    + n * c.v_head_dim * d
  )
  dense = c.first_k_dense_replace

  def parameters(experts):
    expert = 3 * d * c.moe_intermediate_size
    sparse = (experts + c.n_shared_experts) * expert + e * d + e
    layers = c.num_hidden_layers * (attention + 2 * d)
    layers += dense * 3 * d * c.intermediate_size
    layers += (c.num_hidden_layers - dense) * sparse
    return 2 * c.vocab_size * d + layers + d

  options, sizes = (row for row in table_rows(page) if row[0] == 'DeepSeek-V3')
  active = c.num_experts_per_tok
  assert sizes[-1] == f'{parameters(active):,}/{parameters(e):,}'
  positions = {int(n) for n in re.findall(r'\d+', options[2])}
  assert {rotary, rotary + plain} <= positions
  assert set(re.findall(r'\d+', options[3])) == {str(latents[1]), str(rotary)}
  assert set(re.findall(r'\d+', options[5])) == {
    str(c.n_shared_experts),
    str(dense),
  }
