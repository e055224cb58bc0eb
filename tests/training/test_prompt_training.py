# SPDX-License-Identifier: Apache-2.0
"""The main job with a soft prompt, and what is made of its run."""

import dataclasses

import jax
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft import convert, evaluate, generate, train
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.restore import restore_adapter
from moepeft.inference import loaded_model
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.generator import GenerationConfig, Generator
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.decoder.model import Decoder
from moepeft.peft import build
from moepeft.peft.prefix import model_prefix_ids
from moepeft.runs.metrics_log import read

from ..contracts import small_decoders
from ..prompted import LLAMA
from . import test_decoder_training as decoders
from .test_train import base as base
from .test_train import card

METHOD = 'prompt(length=5)'


def vectors(workdir):
  tree, _ = restore_adapter(str(workdir))
  # Nothing else was trained.
  assert list(tree) == ['embed'] and list(tree['embed']) == ['prompt']
  return np.asarray(tree['embed']['prompt']['vectors'])


@pytest.mark.slow
def test_the_job_trains_a_prompt_which_evaluates_and_serves(base, tmp_path):
  config = card(
    base,
    method=METHOD,
    **{
      'optimizer.learning_rate': 0.1,
      'data.packing': True,
      'evaluation.every_steps': 2,
      'evaluation.max_batches': 1,
    },
  )
  train.train(config, str(tmp_path))
  rows = read(str(tmp_path / 'metrics.jsonl'))
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert len(losses) == 4 and np.isfinite(losses).all()
  run = loaded_model.load_run(str(tmp_path))
  # It was moved, from rows of the table.
  actual = vectors(tmp_path)
  table = run.variables['params']['embed']['embedding']
  assert actual.shape == (5, 11)
  assert np.abs(actual[:, None] - table[None]).sum(-1).min() > 0.1
  # Rows behind the prompt, as in training.
  total, measured = evaluate.evaluate(
    str(tmp_path), metrics=['loss'], max_examples=1
  )
  (*_, last) = (r['validation_loss'] for r in rows if 'validation_loss' in r)
  assert total['validation_loss'] == pytest.approx(last, rel=1e-5)
  assert measured
  said = generate.answer(
    run.model, run.variables, run.tokenizer, ['a', 'bc'], 3
  )
  generator = Generator(
    run.model, run.variables, run.tokenizer, GenerationConfig(3, (1,))
  )
  ids = [[*run.tokenizer.encode(text), 1] for text in ('a', 'bc')]
  assert said == generator.generate_texts(ids)
  served = AdapterPool(base_lib.load(config.model), {'it': str(tmp_path)})
  stored = served.acquire('it')
  assert stored.soft_prompt_ids == (263, 264, 265, 266, 267)
  own = served.tree['prompt']['embed']['prompt']
  slot = own['vectors'][stored.row[0]]
  # Rounded up to eight.
  np.testing.assert_array_equal(slot[:5], actual)
  assert not slot[5:].any() and own['on'].tolist()[stored.row[0]] == 1


@pytest.mark.slow
def test_what_mlps_compute_in_training_is_exported_and_served(base, tmp_path):
  method = 'p_tuning(length=5, hidden=3) + prefix(length=2, hidden=3)'
  run_folder, exported = str(tmp_path / 'run'), str(tmp_path / 'exported')
  train.train(card(base, method=method), run_folder)
  arguments = ['', f'--workdir={run_folder}', f'--output={exported}']
  assert convert.main(arguments) == 0
  run = loaded_model.load_run(run_folder)
  adapter = base_lib.load_adapter(exported, run.model.config)
  assert adapter.method == 'prompt(length=5) + prefix(length=2)'
  family = FAMILIES[run.model.config.family]
  built = build(adapter.method, family.sites(run.model.config))
  model = run.model.clone(adapter_map=built.adapter_map)
  variables = {'params': run.variables['params'], 'peft': adapter.tree}
  inputs = np.array([[*model_prefix_ids(run.model), 9, 8, 7]])
  batch = {'inputs': inputs, 'decoder_inputs': np.array([[0, 5, 6]])}
  expected = run.model.apply(run.variables, batch)
  # Float32 sums in another order.
  np.testing.assert_allclose(
    model.apply(variables, batch), expected, rtol=1e-4, atol=1e-4
  )
  # The run itself is served as its export.
  pool = AdapterPool(base_lib.load(card(base).model), {'it': run_folder})
  (bucket,) = pool.buckets
  # Rounded up to powers of two.
  assert bucket.method == 'prompt(length=8) + prefix(length=4)'


@pytest.mark.slow
@pytest.mark.parametrize(
  'method',
  ['p_tuning(length=5, hidden=3)', 'prefix(length=2, hidden=3, dropout=0.1)'],
)
def test_an_interrupted_run_of_an_mlp_resumes_to_the_same_bytes(
  method, base, tmp_path
):
  # An export has what the MLP computed; the checkpoint has to have the MLP.
  whole, parts = str(tmp_path / 'whole'), str(tmp_path / 'parts')
  train.train(card(base, method=method), whole)
  train.train(card(base, method=method, steps=2), parts)
  train.train(card(base, method=method), parts)
  expected, actual = map(
    weight_mapping.flatten, (restore_adapter(p)[0] for p in (whole, parts))
  )
  assert any(path.endswith('/embedding') for path in expected)
  assert actual.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(actual[path], array, err_msg=path)


@pytest.mark.parametrize(
  'source', ['tasks', pytest.param('text', marks=pytest.mark.slow)]
)
def test_a_decoder_is_trained_behind_a_prompt(source, tmp_path):
  config = dataclasses.replace(LLAMA, layers=1)
  params = small_decoders.make(config)[1]['params']
  hf.save(str(tmp_path / 'base'), config, jax.tree.map(np.asarray, params))
  more = {'data.packing': True, 'method': METHOD}
  if source == 'text':
    (tmp_path / 'a.txt').write_text(decoders.WORDS * 40)
    more |= {'data.source': 'text', 'data.path': str(tmp_path / 'a.txt')}
  c = decoders.card(**more)
  c.model.path, c.model.family, c.model.size = str(tmp_path / 'base'), '', ''
  c.model.shape = config_lib.default().model.shape
  train.train(c, str(tmp_path / 'run'))
  assert vectors(tmp_path / 'run').shape == (5, config.d_model)
  run = loaded_model.load_run(str(tmp_path / 'run'))
  assert isinstance(run.model, Decoder)
  total, _ = evaluate.evaluate(str(tmp_path / 'run'), max_examples=1)
  assert np.isfinite(total['validation_loss'])
