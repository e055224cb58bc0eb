# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: rows more of a table, trained alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.models.decoder import model as decoder
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.seq2seq import loss_sums
from moepeft.peft.prefix import model_prefix_ids, placeholder_ids

from ..contracts import small, small_decoders
from ..prompted import CLOSE, METHOD, applied, made, model_of

FRONT = (37, 38, 39)
CONFIGS = {
  't5': small.GATED,
  # Its head is the table.
  't5 1.0': small.RELU,
  'llama': small_decoders.CONFIGS['llama'],
  # Vectors are scaled as tokens are, and given learned positions.
  'gemma': small_decoders.CONFIGS['gemma'],
  'gpt2': small_decoders.CONFIGS['gpt2'],
}
every = pytest.mark.parametrize(
  'kind', small.others_slow(CONFIGS, quick=('t5', 'gemma', 'gpt2'))
)


def batch_of(config, front=FRONT):
  """A batch of the config's, with ids in front of its texts."""
  if isinstance(config, t5.T5Config):
    actual = small.batch()
  else:
    actual = small_decoders.batch()
  b = len(actual['inputs'])
  ids = jnp.broadcast_to(jnp.array(front, jnp.int32), (b, len(front)))
  real = jnp.ones((b, len(front)), bool)
  return actual | {
    'inputs': jnp.concatenate([ids, actual['inputs']], axis=1),
    'inputs_mask': jnp.concatenate([real, actual['inputs_mask']], axis=1),
  }


def longer(params, vectors):
  """A base whose table has rows more: the vectors."""
  table = params['embed']['embedding']
  rows = jnp.concatenate([table, vectors])
  actual = {**params, 'embed': {'embedding': rows}}
  if 'kernel' in params.get('head', {}):
    more = ((0, 0), (0, len(vectors)))
    actual['head'] = {'kernel': jnp.pad(params['head']['kernel'], more)}
  return actual


@every
def test_a_prompt_is_rows_more_of_the_table(kind):
  config = CONFIGS[kind]
  model, variables = made(config)
  batch = batch_of(config)
  actual = applied(model)(variables, batch)
  vectors = variables['peft']['embed']['prompt']['vectors']
  wide = dataclasses.replace(config, vocab=config.vocab + 3)
  base = {'params': longer(variables['params'], vectors)}
  expected = applied(model_of(wide, 'full'))(base, batch)
  real = batch[
    'targets_mask' if isinstance(config, t5.T5Config) else 'inputs_mask'
  ]
  np.testing.assert_allclose(
    actual[real], expected[real][:, : config.vocab], **CLOSE
  )
  # Else it would show nothing.
  plain = applied(model)(variables, batch_of(config, (5, 6, 7)))
  assert np.abs(plain - actual)[real].max() > 0.01


@every
def test_a_row_without_placeholders_is_the_bases_bit_for_bit(kind):
  config = CONFIGS[kind]
  model, variables = made(config)
  batch = batch_of(config, ())
  np.testing.assert_array_equal(
    applied(model)(variables, batch),
    applied(model_of(config, 'full'))({'params': variables['params']}, batch),
  )


def test_a_prompt_starts_as_tokens_that_differ():
  params = small.params()
  model = model_of(small.GATED, 'prompt(length=7)')
  actual = init_params(model, small.batch(), 5, params)['peft']['embed'][
    'prompt'
  ]
  table = np.asarray(params['embed']['embedding'])
  rows = [int(np.abs(table - row).sum(1).argmin()) for row in actual['vectors']]
  assert len(set(rows)) == 7
  np.testing.assert_array_equal(actual['vectors'], table[rows])
  again = init_params(model, small.batch(), 6, params)['peft']['embed'][
    'prompt'
  ]
  assert (again['vectors'] != actual['vectors']).any()


def test_a_prompt_may_be_longer_than_the_vocabulary():
  model = model_of(small.GATED, 'prompt(length=41)')
  actual = init_params(model, small.batch(), 5, small.params())['peft']
  assert actual['embed']['prompt']['vectors'].shape == (41, 11)


def test_prompts_stand_at_the_embedding_only():
  with pytest.raises(ValueError, match="acts at 'embed' only"):
    init_params(
      model_of(small.GATED, "prompt(targets='head')"), small.batch(), 0
    )


def test_placeholders_are_the_ids_after_the_vocabulary():
  assert model_prefix_ids(model_of(small.GATED)) == FRONT
  assert model_prefix_ids(model_of(small.GATED, f'lora + {METHOD}')) == FRONT
  assert placeholder_ids(model_of(small.GATED, 'lora').adapter_map, 37) == ()


@pytest.mark.parametrize('kind', small.others_slow(CONFIGS, quick=('llama',)))
def test_training_a_prompt_lowers_the_loss_and_moves_nothing_else(kind):
  config = CONFIGS[kind]
  model, variables = made(config, METHOD, 0.0)
  batch = batch_of(config)
  if isinstance(config, decoder.DecoderConfig):
    targets = jnp.pad(batch['inputs'][:, 1:], ((0, 0), (0, 1)))
    real = batch['inputs_mask'] & (targets > 0) & (targets < config.vocab)
    batch |= {'targets': targets, 'targets_mask': real}
  optimizer = optax.adam(0.1)

  @jax.jit
  def update(peft, opt):
    def loss(peft):
      own = {**variables, 'peft': peft}
      return mean_loss(*loss_sums(model.apply, own, batch, None))

    value, gradient = jax.value_and_grad(loss)(peft)
    changes, opt = optimizer.update(gradient, opt)
    return optax.apply_updates(peft, changes), opt, value

  peft, opt = variables['peft'], optimizer.init(variables['peft'])
  assert [a.shape for a in jax.tree.leaves(peft)] == [(3, config.d_model)]
  losses = []
  for _ in range(20):
    peft, opt, value = update(peft, opt)
    losses.append(float(value))
  assert losses[-1] < 0.97 * losses[0]
