# SPDX-License-Identifier: Apache-2.0
"""Each number of configs/paper, with where it stands.

Sources: the code released with arXiv:2309.05444, its configs/{t0,ia3,lora,
mov,molora}.gin and scripts/*.sh, and T5X's defaults that these leave alone.
tests/config/test_gin.py holds the gin files to the same cards.
"""

import importlib.util
import itertools

import pytest

from moepeft.evaluation import published
from tests import ROOT

CARDS = ROOT / 'configs' / 'paper'
SIZES = ('large', 'xl', 'xxl')
METHODS = ('full', 'ia3', 'lora', 'mov', 'molora')
GRID = list(itertools.product(SIZES, METHODS))


def card(size, method, values=''):
  path = CARDS / f't5_{size}_{method}.py'
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(values)


# (learning rate, rows a batch, TRAIN_STEPS, save period): base_learning_rate
# and SaveCheckpointConfig.period of each gin file; BATCH_SIZE and TRAIN_STEPS
# of its script, which counts from the base's step 1,100,000.
PUBLISHED_HYPERPARAMETERS = {
  'full': (1e-3, 256, 1_110_000, 1_000),
  'ia3': (3e-4, 32, 1_600_000, 50_000),
  'lora': (3e-4, 32, 1_600_000, 50_000),
  'mov': (3e-4, 32, 1_600_000, 10_000),
  'molora': (3e-4, 32, 1_600_000, 10_000),
}


@pytest.mark.parametrize(('size', 'method'), GRID)
def test_rate_batch_steps_and_saves_are_the_released_ones(size, method):
  c = card(size, method)
  rate, rows, steps, period = PUBLISHED_HYPERPARAMETERS[method]
  assert (c.optimizer.learning_rate, c.batch_size) == (rate, rows)
  # The restored step is Adafactor's clock, of full fine-tuning too.
  assert (c.steps, c.optimizer.decay_initial_step) == (
    steps - 1_100_000,
    1_100_000,
  )
  # keep 60 in every gin file.
  assert (c.checkpoint.every_steps, c.checkpoint.max_to_keep) == (period, 60)


@pytest.mark.parametrize(('size', 'method'), GRID)
def test_what_all_runs_share_is_the_released_ones(size, method):
  c = card(size, method)
  # scripts/*.sh: TASK_FEATURE_LENGTHS, PACKING, MIXTURE_OR_TASK_NAME.
  assert (c.data.inputs_length, c.data.targets_length) == (1024, 256)
  assert (c.data.packing, c.data.mixture) == (True, 't0_train')
  # LOSS_NORMALIZING_FACTOR='AVERAGE_PER_SEQUENCE'; T5X: z 1e-4, no smoothing.
  assert (c.loss.average_over, c.loss.z_loss, c.loss.label_smoothing) == (
    'sequences',
    1e-4,
    0.0,
  )
  # finetune_no_eval.gin: DROPOUT_RATE 0.1, num_microbatches None.
  assert (c.model.dropout, c.gradient_accumulation_steps) == (0.1, 1)
  # ACTIVATION_DTYPE bfloat16, parameters float32.
  assert (c.model.dtype, c.model.param_dtype) == ('bfloat16', 'float32')
  assert (c.model.size, c.model.version) == (size, '1.1')
  # Adafactor; factors='constant'; no weight decay, no clip of the whole
  # gradient (its own clip of 1.0 is of each tensor's update).
  o = c.optimizer
  assert (o.name, o.schedule, o.warmup_steps) == ('adafactor', 'constant', 0)
  assert (o.weight_decay, o.max_grad_norm) == (0.0, 0.0)
  # No loss of the router is applied.
  assert set(c.router_losses.values()) == {0.0}
  assert c.semantics == 'official'


def test_methods_are_the_gin_files():
  for size in SIZES:
    assert card(size, 'full').method == 'full'
    assert card(size, 'ia3').method == 'ia3'
    # mov.gin: 30 experts; molora.gin: 10 experts of rank 4.
    assert card(size, 'mov').method == 'mov(experts=30)'
    assert card(size, 'molora').method == 'molora(experts=10, rank=4)'
  # lora.gin: rank 16 on large shapes, where the paper's table has rank 4.
  assert card('large', 'lora').method == 'lora(rank=16)'
  assert card('xl', 'lora').method == 'lora(rank=4)'


def test_every_method_of_the_papers_tables_has_a_card():
  n_configs = 0
  for size in SIZES:
    for row in published.table(f't5_{size}'):
      if row.method:
        name, _, options = row.method.rstrip(')').partition('(')
        assert card(size, name, options.replace(' ', '')).method == row.method
        n_configs += 1
  # 9 rows of large, 11 of xl and 6 of xxl without Sanh et al.'s.
  assert n_configs == 26
