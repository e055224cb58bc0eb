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

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.count_flops import (
  flops_per_token,
  loss_of_shapes,
  products,
)
from moepeft.checkpoints.count_parameters import count
from moepeft.core.types import Context
from moepeft.models import FAMILIES
from moepeft.models.decoder.model import Decoder
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
  in_tables = set(re.findall(r'\d+(?:,\d{3})+', ' '.join(
    cell for row in table_rows(page) for cell in row
  )))
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
