# SPDX-License-Identifier: Apache-2.0
"""The engine's cached steps equal whole calls without a cache, in float64, for
every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.base import example_batch
from moepeft.data.batching.router_inputs import embedding_size
from moepeft.inference.adapters.served_modules import request_tasks
from moepeft.inference.api import RouterFields
from moepeft.models.decoder import model as decoder
from moepeft.models.decoder.model import Decoder, DecoderConfig
from moepeft.nn.initializers import init_params
from moepeft.peft import build

from ...contracts import answers, small

CONFIG = DecoderConfig(
  vocab=37,
  d_model=11,
  heads=6,
  kv_heads=3,
  head_dim=4,
  ffn=17,
  layers=3,
  length=32,
)
GPT2 = dataclasses.replace(
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
TOP = 20
AT = "targets='*/q|*/wo'"
# By the prompt, by the task, and by a first pass of the base.
SMEAR = 'smear(experts=3, size=2)'
MOELORA = (
  "moelora(experts=3, dropout=0.0, router=task(tasks=['a', 'b']), "
  "targets='*/q|*/wo')"
)
HMORA = 'hmora(experts=3, rank=2, dropout=0.0)'
XLORA = f"molora(experts=3, rank=2, reads='first_pass', {AT})"
EMBEDDING = (
  "molora(experts=3, rank=2, reads='embedding', embedding_size=5, "
  "targets='*/q|*/wo')"
)
RANDOM = f'molora(experts=3, rank=2, router=random(k=2), {AT})'


# Soft prompts are tried in tests/inference/test_soft_prompts.py.
METHODS = (
  'full',
  RANDOM,
  *(
    method
    for method in small.METHODS
    if not method.startswith(('prompt', 'p_tuning'))
  ),
  XLORA,
  EMBEDDING,
  "lora(rank=2, targets='head|*/o')",
)
# Of the largest logit: the model computes in float64, and its logits are
# rounded to float32 for the sampler.
CLOSE = 4e-7


@functools.cache
def make(method, config):
  """(model, variables), moved away from where they do nothing."""
  built = build(method, decoder.sites(config))
  model = Decoder(config, built.adapter_map)
  variables = init_params(model, example_batch(), 1)
  return model, small.moved(variables, 0.3, 2)


def check_in_float64(model, variables, prompts):
  """Compares the log-probabilities of the best tokens of every step."""
  variables = jax.tree.map(np.asarray, variables)
  with jax.enable_x64(True):
    model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    variables = jax.tree.map(lambda a: jnp.asarray(a, 'float64'), variables)
    tasks = request_tasks(model.adapter_map)
    ids = [1 + i % len(tasks) if tasks else 0 for i in range(len(prompts))]
    size = embedding_size(model.adapter_map)
    embeddings = [
      tuple(np.float32(np.cos(np.arange(size) + i)).tolist())
      for i in range(len(prompts))
    ]
    fields = [
      RouterFields(tasks[i - 1] if i else '', embedding)
      for i, embedding in zip(ids, embeddings, strict=True)
    ]
    cached = answers.engine_answers(
      model, variables, prompts, 6, fields, logprobs=TOP
    )
    for prompt, answer, task, embedding in zip(
      prompts, cached, ids, embeddings, strict=True
    ):
      logits = answers.uncached_logits(
        *(model, variables, prompt, answer.ids),
        task=task,
        embedding=embedding,
      )
      assert logits.dtype == np.float64 and len(answer.ids) == 6
      expected = np.asarray(jax.nn.log_softmax(logits))
      for token, row in zip(answer.tokens, expected[:-1], strict=True):
        assert token.id == row.argmax() and len(token.top) == TOP
        ids, logprobs = map(list, zip(*token.top, strict=True))
        np.testing.assert_allclose(
          logprobs, row[ids], rtol=0, atol=CLOSE * np.abs(logits).max()
        )


@pytest.mark.parametrize(
  'method, config',
  [
    *small.others_slow(
      (
        *((method, CONFIG) for method in METHODS),
        ('molora(experts=3, rank=2)', WINDOWED),
        ('mov(experts=3)', ALIBI),
        ('lora(rank=3)', ALIBI),
      ),
      # Its router computes with its path.
      quick=(RANDOM, SMEAR, MOELORA, XLORA),
    ),
    (f'molora(experts=3, rank=2, router=topk(k=2), {AT})', GPT2),
    (f'lora(rank=3, {AT})', WINDOWED),
  ],
)
def test_a_decoders_cached_logits_are_the_uncached(method, config):
  check_in_float64(*make(method, config), PROMPTS)


@pytest.mark.parametrize(
  'method',
  small.others_slow(
    (*small.ONE_EACH, SMEAR, MOELORA, HMORA, EMBEDDING),
    quick=(small.FEW[1], SMEAR),
  ),
)
def test_an_encoder_decoders_cached_logits_are_the_uncached(method):
  model, _ = small.make(method)
  variables = small.variables(method, noise=0.1)
  check_in_float64(model, variables, answers.real_rows(small.batch()))
