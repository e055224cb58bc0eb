# SPDX-License-Identifier: Apache-2.0
"""A run that cannot fit into memory is refused with both figures."""

import jax
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft import train
from moepeft.checkpoints import base as base_lib
from moepeft.core import memory
from moepeft.training import memory_estimate, optimizers


def config(**changes):
  c = config_lib.default()
  c.data.inputs_length, c.data.targets_length = 31, 7
  c.batch_size = 6
  c.update_from_flattened_dict(changes)
  return c


def decoder(**changes):
  own = {
    'model.path': '',
    'model.family': 'llama',
    'model.size': 'tiny',
    'method': 'full',
    'objective': 'causal',
  }
  return config(**own | changes)


def test_the_estimate_equals_what_a_run_allocates():
  c = config()
  estimate = memory_estimate.estimate_training(c)
  base = base_lib.load(c.model)
  model, built = base_lib.module(base, c)
  variables = base_lib.initialise(base, model, 0)
  state = optimizers.make_optimizer(c.optimizer, c.steps).init(
    variables['peft']
  )
  nbytes = [
    sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    for tree in (variables, variables['peft'], state)
  ]
  assert estimate.weights == nbytes[0]
  # A gradient as large as what is trained, and the optimizer's arrays.
  assert estimate.training == nbytes[1] + nbytes[2]


def test_a_batch_is_counted_by_rows_tokens_and_vocabulary():
  # 6 rows of 31 + 7 tokens of 9 bytes; 3 rows at once have states of
  # d_model 128 and logits of 384, float32 (moepeft/assets/t5_tiny).
  estimate = memory_estimate.estimate_training(
    config(gradient_accumulation_steps=2)
  )
  assert estimate.batch == 6 * 38 * 9
  assert estimate.activations == 3 * (38 * 128 + 7 * 384) * 4
  # Of a decoder every token is predicted: d_model 128, vocabulary 259.
  estimate = memory_estimate.estimate_training(decoder(**{'data.length': 101}))
  assert estimate.batch == 6 * 101 * 9
  assert estimate.activations == 6 * 101 * (128 + 259) * 4


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'method': 'molora(experts=65536, rank=65536)'}, 'lower the rank, exp'),
    ({'method': 'prompt(length=65536)'}, None),
    ({'batch_size': 1_000_000, 'data.inputs_length': 2**20}, 'batch_size'),
    ({'data.num_workers': 256}, 'lower config.data.num_workers'),
  ],
)
def test_a_run_that_cannot_fit_is_refused_with_figures(
  changes, said, monkeypatch, tmp_path
):
  monkeypatch.setattr(memory, 'available', lambda: (10**10, 'this machine'))
  if said is None:
    memory_estimate.check(config(**changes))
    return
  text = rf'at least [0-9,.]+ \w+ of memory .*this machine has 10 GB; .*{said}'
  with pytest.raises(ValueError, match=text):
    train.train(config(**changes), str(tmp_path / 'w'))
  assert not (tmp_path / 'w').exists()


def test_a_model_that_is_too_large_is_refused_before_it_is_made(monkeypatch):
  monkeypatch.setattr(memory, 'available', lambda: (10**9, 'this machine'))
  with pytest.raises(ValueError, match='this machine has 1 GB'):
    memory_estimate.check(decoder(**{'model.size': '3-70b'}))


@pytest.mark.parametrize(
  ('changes', 'bytes_each'),
  # Keys and values of 4 layers of 2 heads of 32, and of 2 layers of 4 of 24.
  [
    ({'model.family': 'llama', 'model.size': 'tiny'}, 2 * 4 * 2 * 32 * 4),
    ({'model.path': 'package:t5_tiny'}, 2 * 2 * 4 * 24 * 4),
  ],
)
def test_a_cache_of_answers_is_counted(changes, bytes_each, monkeypatch):
  c = config(**{'model.path': '', 'method': 'full'} | changes)
  family, shape = base_lib.shape(c.model)
  model, _ = base_lib.module(base_lib.Base(family, shape, None, '', ''), c)
  rows, tokens = 5, 1_000_000
  least = rows * tokens * bytes_each
  monkeypatch.setattr(memory, 'available', lambda: (2 * least, 'x'))
  memory_estimate.check_answers(model, rows, tokens)
  monkeypatch.setattr(memory, 'available', lambda: (least, 'x'))
  with pytest.raises(ValueError, match='5 answers of 1,000,000 tokens need'):
    memory_estimate.check_answers(model, rows, tokens)


def test_without_a_figure_nothing_is_refused(monkeypatch):
  monkeypatch.setattr(memory, 'available', lambda: (0, ''))
  memory_estimate.check(config(method='molora(experts=65536, rank=65536)'))


def test_a_control_group_bounds_the_machine(tmp_path):
  info, group = tmp_path / 'meminfo', tmp_path / 'group'
  info.write_text('MemTotal: 9 kB\nMemAvailable: 7000 kB\nSwapFree: 500 kB\n')
  assert memory._available_on_host(str(info), str(group)) == 7500 * 1024
  group.mkdir()
  (group / 'memory.max').write_text('max\n')
  (group / 'memory.current').write_text('1\n')
  assert memory._available_on_host(str(info), str(group)) == 7500 * 1024
  # 3,000,000 allowed, 1,000,000 held, of which 400,000 can be dropped.
  (group / 'memory.max').write_text('3000000\n')
  (group / 'memory.current').write_text('1000000\n')
  (group / 'memory.stat').write_text('anon 600000\nfile 400000\n')
  assert memory._available_on_host(str(info), str(group)) == 2_400_000
  assert (
    memory._available_on_host(str(tmp_path / 'none'), str(tmp_path / 'none'))
    == 0
  )


@pytest.mark.parametrize(
  ('count', 'text'),
  [(999, '0.999 kB'), (2_100_000_000, '2.1 GB'), (10**18, '1,000,000 TB')],
)
def test_bytes_are_read_by_people(count, text):
  assert memory.text(count) == text


def test_this_machine_tells_its_memory():
  there, where = memory.available()
  assert where and np.isfinite(there)
