# SPDX-License-Identifier: Apache-2.0
"""New tokens: deltas on a few rows of the embedding and the head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.models.decoder import model as decoder
from moepeft.models.decoder.model import Decoder, DecoderConfig
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import init_params
from moepeft.peft import build
from moepeft.peft.methods.tokens import token_ids

CONFIG = DecoderConfig(
  vocab=37, d_model=11, heads=2, kv_heads=1, head_dim=6, ffn=13, layers=1
)
BATCH = {'inputs': jnp.array([[3, 5, 7, 2, 36], [6, 1, 3, 3, 9]])}
METHOD = "tokens(new='3|5-7')"


@pytest.mark.parametrize('tied', [False, True])
def test_deltas_are_changed_rows_of_the_table_and_of_the_head(tied):
  config = dataclasses.replace(CONFIG, tied=tied, scale_embedding=tied)
  model = Decoder(config, build(METHOD, decoder.sites(config)).adapter_map)
  variables = init_params(model, BATCH, 0)
  peft = variables['peft']
  leaves = jax.tree.leaves(peft)
  # Four rows of the table, and of the head where it is its own.
  assert [a.shape for a in leaves] == [(4, 11)] * (1 if tied else 2)
  apply = jax.jit(model.apply)
  plain = jax.jit(Decoder(config).apply)
  base = plain({'params': variables['params']}, BATCH)
  np.testing.assert_array_equal(apply(variables, BATCH), base)
  rng = np.random.default_rng(0)
  moved = jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), peft
  )
  params = jax.tree.map(jnp.asarray, variables['params'])
  rows = jnp.array([3, 5, 6, 7])
  embed, head = params['embed'], params.get('head')
  own = moved['embed']['tokens']['delta']
  embed['embedding'] = embed['embedding'].at[rows].add(own)
  if not tied:
    own = moved['head']['tokens']['delta']
    head['kernel'] = head['kernel'].at[:, rows].add(own.T)
  adapted = apply({'params': variables['params'], 'peft': moved}, BATCH)
  # Sums of eleven products in another order.
  np.testing.assert_allclose(
    adapted, plain({'params': params}, BATCH), rtol=1e-4, atol=1e-5
  )
  assert np.abs(adapted - base).max() > 0.1


TABLE = BaseLayer(lambda x: x, shape=(37, 11), kernel=lambda: None)


def test_ids_are_named_one_by_one_or_as_a_range():
  assert token_ids('5-7|3', TABLE) == (3, 5, 6, 7)


@pytest.mark.parametrize(
  ('new', 'said'),
  [
    ('', "new='1|2'"),
    ('<|im_start|>', 'names ids like'),
    ('3|37', 'expected ids below 37'),
  ],
)
def test_ids_that_cannot_be_are_refused(new, said):
  with pytest.raises(ValueError, match=said):
    token_ids(new, TABLE)


def test_a_projection_has_no_tokens():
  with pytest.raises(ValueError, match="acts at 'embed' and 'head' only"):
    token_ids('3', BaseLayer(lambda x: x, eqn='btd,df->btf', shape=(11, 13)))
