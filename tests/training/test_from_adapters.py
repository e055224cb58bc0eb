# SPDX-License-Identifier: Apache-2.0
"""Mixtures whose experts are trained adapters: read, frozen, exported.

Two adapters of rank 3 at q and v of a decoder of two layers.
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moepeft
from moepeft import convert, train
from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.restore import restore_adapter
from moepeft.core.types import Routing
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference import loaded_model
from moepeft.models import weight_mapping
from moepeft.moe import router_state
from moepeft.training import setup
from scripts import lorahub

from .. import commands
from ..contracts import answers
from ..preferences import card, written

LORA = "lora(rank=3, alpha=5.0, targets='decoder/self/q|decoder/self/v')"
ROUTER = 'router=topk(k=1)'
ROW = json.dumps({'inputs': 'the sun is 3', 'targets': ' and the moon is 4'})


def trained_adapter(path, model_path, method, seed, sha256=None):
  """Exports an adapter that is off its start; returns its tree."""
  config = card({'llama': model_path, 'data': ''}, method=method)
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  rng = np.random.default_rng(seed)
  tree = jax.tree.map(
    lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32),
    base_lib.initialise(base, model, 0)['peft'],
  )
  described = adapter_lib.describe(
    built.method,
    'official',
    base.path,
    sha256 or base.sha256,
    base.config.family,
    base.config,
  )
  adapter_lib.save(str(path), tree, described)
  return tree


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """A base, its text, and exported adapters by their names."""
  folder = tmp_path_factory.mktemp('places')
  actual = written(folder)
  rows = [f'the sun is {i} and the moon is {i + 1}' for i in range(60)]
  (folder / 'text.txt').write_text('\n\n'.join(rows))
  actual['text'] = str(folder / 'text.txt')
  base = actual['llama']
  actual['trees'] = [
    trained_adapter(folder / name, base, LORA, seed)
    for seed, name in enumerate('ab')
  ]
  trained_adapter(folder / 'rank', base, LORA.replace('3', '2', 1), 2)
  trained_adapter(folder / 'vectors', base, 'ia3', 3)
  trained_adapter(folder / 'two', base, 'lora(rank=2) + ia3', 4)
  trained_adapter(folder / 'foreign', base, LORA, 5, sha256='0' * 64)
  names = ('a', 'b', 'rank', 'vectors', 'two', 'foreign')
  return actual | {name: str(folder / name) for name in names}


def mixture(*paths, options=ROUTER):
  return f'mixture(from_adapters={[*paths]}, {options})'


def config_of(places, method, **changes):
  text = {
    'objective': 'causal',
    'data.source': 'text',
    'data.path': places['text'],
    'steps': 3,
    'method': method,
  }
  return card(places, **text | changes)


def stacked(places):
  """{path in the mixture's tree: the two adapters' arrays as experts}."""
  first, second = map(weight_mapping.flatten, places['trees'])
  result = {}
  for path in first:
    # a [l, d, e, r], b [l, e, r, n, h].
    axis = 2 if path.endswith('/a') else 1
    pair = np.stack([first[path], second[path]], axis)
    result[path.replace('/lora/', '/mixture/')] = pair
  return result


def run_config(places):
  """Frozen experts, with accumulation, remat and weight decay."""
  # One path names the file itself.
  method = mixture(places['a'] + '/adapter.safetensors', places['b'])
  changes = {
    'gradient_accumulation_steps': 2,
    'model.remat': 'full',
    'optimizer.weight_decay': 0.1,
  }
  return config_of(places, method, **changes)


@pytest.fixture(scope='module')
def run(places, tmp_path_factory):
  """The run of that config."""
  workdir = str(tmp_path_factory.mktemp('run'))
  train.train(run_config(places), workdir)
  return workdir


def test_only_the_router_is_trained(places, run):
  tree, _ = restore_adapter(run)
  arrays = weight_mapping.flatten(tree)
  experts = stacked(places)
  for path, array in experts.items():
    np.testing.assert_array_equal(arrays[path], array)
  routers = {path for path in arrays if path.endswith('/router/kernel')}
  assert arrays.keys() == experts.keys() | routers
  assert len(routers) == 2
  start = setup.build(run_config(places), run, dry_run=True).state
  begun = weight_mapping.flatten(start.trainable)
  assert all(np.abs(arrays[p] - begun[p]).max() > 1e-3 for p in routers)
  moments = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(start.opt)
    if leaf.ndim
  ]
  assert moments and all("['router']['kernel']" in name for name in moments)


def test_a_token_sent_to_one_expert_gets_that_adapter(places):
  method = mixture(places['a'], places['b'])
  config = config_of(places, method)
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  variables, _ = base_lib.with_experts(
    base_lib.initialise(base, model, 0), model, built, base
  )
  batch = {'inputs': jnp.arange(14).reshape(2, 7) + 5}
  config.method = LORA
  alone, _ = base_lib.module(base, config)
  logits = []
  for expert, tree in enumerate(places['trees']):
    weights = jnp.broadcast_to(jnp.eye(2)[expert], (2, 2, 7, 2))
    actual = model.apply(variables, batch, routing=Routing(weights, weights))
    expected = alone.apply(variables | {'peft': tree}, batch)
    # The same sums in another order.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    logits.append(actual)
  assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_an_export_needs_the_files_no_more(places, run, tmp_path, monkeypatch):
  # The base has no tokenizer of its own.
  monkeypatch.setattr(
    loaded_model, 'load_tokenizer', lambda *names: ByteTokenizer()
  )
  moved = {name: str(tmp_path / name) for name in 'ab'}
  exported = str(tmp_path / 'exported')
  assert convert.main(['', f'--workdir={run}', f'--output={exported}']) == 0
  files = [Path(places[name]) / 'adapter.safetensors' for name in 'ab']
  sha256s = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
  for name, path in moved.items():
    shutil.move(places[name], path)
  try:
    described = json.loads((tmp_path / 'exported/adapter.json').read_text())
    assert described['experts'] == [
      {'path': str(files[0]), 'sha256': sha256s[0]},
      {'path': places['b'], 'sha256': sha256s[1]},
    ]
    assert 'experts=2' in described['method']
    assert places['a'] not in described['method']
    texts = (['the sun is 3'], [' and the moon is 4'])
    trained = moepeft.load(run).log_probs(*texts)
    served = moepeft.load(places['llama'], adapter=exported).log_probs(*texts)
    base = moepeft.load(places['llama']).log_probs(*texts)
  finally:
    for name, path in moved.items():
      shutil.move(path, places[name])
  np.testing.assert_allclose(served, trained, rtol=1e-5, atol=1e-5)
  assert np.abs(np.subtract(base, trained)).max() > 0.01


def test_experts_can_be_trained_further(places, tmp_path):
  method = mixture(places['a'], places['b'], options='train_experts=True')
  train.train(config_of(places, method, steps=1), str(tmp_path))
  arrays = weight_mapping.flatten(restore_adapter(str(tmp_path))[0])
  for path, array in stacked(places).items():
    moved = np.abs(arrays[path] - array).max()
    # A step of Adam moves a number by the rate, 1e-2.
    assert 1e-3 < moved < 0.1


def test_a_run_goes_on_with_the_same_files_alone(places, run, tmp_path):
  config = run_config(places)
  train.train(config, run)
  # Other content at the same paths.
  a, b, other = places['a'], places['b'], str(tmp_path / 'other')

  def swap():
    for source, target in ((a, other), (b, a), (other, b)):
      shutil.move(source, target)

  swap()
  try:
    with pytest.raises(ValueError, match='another run: its experts is'):
      train.train(config, run)
  finally:
    swap()


@pytest.mark.parametrize(
  ('names', 'options', 'message'),
  [
    (('a', 'nowhere'), ROUTER, 'nowhere holds no adapter.safetensors or'),
    (('a', 'foreign'), ROUTER, 'foreign was trained on another base than'),
    (('a', 'rank'), ROUTER, r'one method, .*rank=3.*rank=2.*leave one out'),
    (('a', 'vectors'), ROUTER, "one method, .*/vectors is 'ia3'"),
    (('two', 'a'), ROUTER, r'ia3.*but an expert is one adapter of lora, .*ia3'),
    (('a', 'b'), 'experts=2', 'takes one of experts and from_adapters'),
    (('a', 'b'), "share='a'", "no parameter in common; write share=''"),
    (('a', 'b'), 'router=uniform', 'trains nothing: .*train_experts=True'),
    (
      ('a', 'b'),
      "expert=lora(rank=2), targets='decoder/self/q|decoder/self/v'",
      r"/a is .lora.*differs from the mixture's expert",
    ),
    (('',), ROUTER, 'from_adapters is a list of paths'),
  ],
)
def test_mistakes_have_one_sentence(places, tmp_path, names, options, message):
  paths = [places.get(name, name) for name in names]
  config = config_of(places, mixture(*paths, options=options))
  with pytest.raises(ValueError, match=message) as error:
    setup.build(config, str(tmp_path), dry_run=True)
  assert '\n' not in str(error.value)


def test_experts_that_start_fresh_are_always_trained(places, tmp_path):
  config = config_of(places, 'mixture(expert=lora, train_experts=False)')
  with pytest.raises(ValueError, match='train_experts is for experts that'):
    setup.build(config, str(tmp_path), dry_run=True)


def gated(path, places, seed):
  """Exports a mixture of one expert with its gate; returns its tree."""
  method = f'mixture(expert={LORA.split(", targets")[0]}), experts=1, '
  targets = LORA.split('targets=')[1]
  method += f'router=sigmoid, targets={targets}'
  return trained_adapter(path, places['llama'], method, seed)


def test_phatgoose_trains_a_gate_alone(places, tmp_path):
  router = 'router=sigmoid(kernel_init=zeros)'
  config = config_of(places, mixture(places['a'], options=router))
  training = setup.build(config, str(tmp_path), dry_run=True)
  trained, rest = router_state.split(
    training.state.trainable, training.method.frozen_arrays
  )
  gates = weight_mapping.flatten(trained)
  assert {path.split('/', 3)[-1] for path in gates} == {
    'q/mixture/router/kernel',
    'v/mixture/router/kernel',
  }
  # sigmoid(0) = 1/2 of the adapter at first.
  assert all((np.asarray(gate) == 0).all() for gate in gates.values())
  assert len(weight_mapping.flatten(rest)) == 4


def test_phatgoose_routes_by_the_gates_of_its_adapters(places, tmp_path):
  trees = [gated(tmp_path / name, places, i) for i, name in enumerate('ab')]
  paths = [str(tmp_path / name) for name in 'ab']
  config = config_of(places, f'phatgoose(from_adapters={paths})')
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  variables, files = base_lib.with_experts(
    base_lib.initialise(base, model, 0), model, built, base
  )
  assert [file['path'] for file in files] == paths
  arrays = weight_mapping.flatten(variables['peft'])
  first, second = map(weight_mapping.flatten, trees)
  for path, array in arrays.items():
    # Of one expert each: a [l, d, 1, r], b [l, 1, r, ...], kernel [l, i, 1].
    axis = {'a': 2, 'b': 1, 'kernel': 2}[path.rpartition('/')[-1]]
    of_one = path.replace('/phatgoose/', '/mixture/')
    expected = np.concatenate([first[of_one], second[of_one]], axis)
    np.testing.assert_array_equal(array, expected)
  assert len(arrays) == 6


@pytest.mark.slow
def test_phatgoose_from_its_config_to_its_scores(places, tmp_path, monkeypatch):
  monkeypatch.setattr(
    loaded_model, 'load_tokenizer', lambda *names: ByteTokenizer()
  )
  exports = []
  for name in 'ab':
    router = 'router=sigmoid(kernel_init=zeros)'
    config = config_of(places, mixture(places[name], options=router))
    workdir = str(tmp_path / f'run_{name}')
    train.train(config, workdir)
    exports.append(str(tmp_path / f'gated_{name}'))
    assert (
      convert.main(['', f'--workdir={workdir}', f'--output={exports[-1]}']) == 0
    )
  output = str(tmp_path / 'out')
  values = f'model={places["llama"]},adapters={"|".join(exports)}'
  path = f'configs/methods/phatgoose.py:{values}'
  assert convert.main(['', f'--config={path}', f'--output={output}']) == 0
  tree, metadata = adapter_lib.load(output)
  assert 'phatgoose(' in metadata['method']
  kernels = [
    array
    for path, array in weight_mapping.flatten(tree).items()
    if path.endswith('/router/kernel')
  ]
  assert all(np.abs(kernel).min(axis=(0, 1)).all() for kernel in kernels)
  texts = (['the sun is 3'], [' and the moon is 4'])
  scores = [
    moepeft.load(places['llama'], adapter=adapter).log_probs(*texts)[0]
    for adapter in ('', output, places['a'])
  ]
  assert np.ptp(scores) > 0.01


@pytest.mark.slow
def test_hardrouted_trains_one_router_of_a_layer(places, tmp_path, monkeypatch):
  monkeypatch.setattr(
    loaded_model, 'load_tokenizer', lambda *names: ByteTokenizer()
  )
  paths = [places[name] for name in 'ab']
  method = f"hardrouted(from_adapters={paths}) + lora(rank=2, targets='*/o')"
  workdir, exported = str(tmp_path / 'run'), str(tmp_path / 'exported')
  train.train(config_of(places, method), workdir)
  arrays = weight_mapping.flatten(restore_adapter(workdir)[0])
  for path, array in stacked(places).items():
    path = path.replace('/mixture/', '/hardrouted/')
    np.testing.assert_array_equal(arrays.pop(path), array)
  assert arrays.keys() == {
    'decoder/layers/self/q/hardrouted/router/kernel',
    *(f'decoder/layers/self/o/lora/{leaf}' for leaf in 'ab'),
  }
  assert convert.main(['', f'--workdir={workdir}', f'--output={exported}']) == 0
  texts = (['the sun is 3'], [' and the moon is 4'])
  scores = [
    model.log_probs(*texts)[0]
    for model in (
      moepeft.load(workdir),
      moepeft.load(places['llama'], adapter=exported),
    )
  ]
  np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)
  expected = uncached_log_probs(moepeft.load(workdir), *texts)
  np.testing.assert_allclose(scores[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_xlora_is_trained_exported_scored_and_generated_with(
  places, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    loaded_model, 'load_tokenizer', lambda *names: ByteTokenizer()
  )
  paths = [places[name] for name in 'ab']
  config = config_of(places, f'xlora(from_adapters={paths})', steps=20)
  workdir, exported = str(tmp_path / 'run'), str(tmp_path / 'exported')
  train.train(config, workdir)
  assert convert.main(['', f'--workdir={workdir}', f'--output={exported}']) == 0
  start = setup.build(config, workdir, dry_run=True).state
  begun = weight_mapping.flatten(start.trainable)
  trained = weight_mapping.flatten(restore_adapter(workdir)[0])
  moved = {
    path.partition('/xlora/')[-1]
    for path, array in trained.items()
    if (np.asarray(array) != begun[path]).any()
  }
  assert moved == {'router/kernel', 'router/bias'}
  texts = (['the sun is 3'], [' and the moon is 4'])
  model = moepeft.load(places['llama'], adapter=exported)
  (served,) = model.log_probs(*texts)
  (from_run,) = moepeft.load(workdir).log_probs(*texts)
  (plain,) = moepeft.load(places['llama']).log_probs(*texts)
  np.testing.assert_allclose(served, from_run, rtol=1e-5, atol=1e-5)
  assert np.abs(served - plain).max() > 0.01
  (expected,) = uncached_log_probs(model, *texts)
  np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-4)
  prompt, (answer,) = texts[0][0], model.generate(texts[0], max_new_tokens=5)
  ids = model.loaded.prompt_encoder()([prompt])
  logits = answers.uncached_logits(
    model.loaded.model, model.loaded.variables, ids, answer.token_ids, 64
  )
  assert answer.token_ids == tuple(logits.argmax(axis=-1)[:5])


def uncached_log_probs(model, prompts, texts):
  """`Model.log_probs` by whole calls, as in training."""
  loaded, tokenizer = model.loaded, model.loaded.tokenizer
  rows = []
  for prompt, text in zip(prompts, texts, strict=True):
    answer = [*tokenizer.encode(text), tokenizer.eos]
    ids = loaded.prompt_encoder()([prompt])
    logits = answers.uncached_logits(
      loaded.model, loaded.variables, ids, answer[:-1], 64
    )
    log_p = np.asarray(jax.nn.log_softmax(logits))
    rows.append(log_p[range(len(answer)), answer])
  return rows


HALVES = (
  [f'the sun is {i} and the moon is {i + 1}' for i in range(40)],
  [f'my cat ate {i} but her dog ate {i + 2}' for i in range(40)],
)


def taught(places, folder, rows, method, steps):
  """An exported adapter that was trained on rows of text."""
  folder.mkdir()
  (folder / 'text.txt').write_text('\n\n'.join(rows))
  changes = {'data.path': str(folder / 'text.txt'), 'steps': steps}
  changes |= {'optimizer.learning_rate': 1e-2}
  workdir, output = str(folder / 'run'), str(folder / 'exported')
  train.train(config_of(places, method, **changes), workdir)
  assert convert.main(['', f'--workdir={workdir}', f'--output={output}']) == 0
  return output


def library(places, folder, preset, halves):
  """The preset's mixture of an adapter for each half, without training it."""
  paths = []
  for name, rows in zip('ab', halves, strict=True):
    path = taught(places, folder / name, rows, 'lora(rank=8)', 30)
    if preset == 'phatgoose':
      gate = (
        f"mixture(from_adapters=['{path}'], router=sigmoid(kernel_init=zeros))"
      )
      path = taught(places, folder / f'gate_{name}', rows, gate, 10)
    paths.append(path)
  method = f'{preset}(from_adapters={paths}, router={preset}(k=1))'
  output = str(folder / 'mixture')
  arguments = [f'--method={method}', f'--base={places["llama"]}']
  assert convert.main(['', *arguments, f'--output={output}']) == 0
  return moepeft.load(places['llama'], adapter=output)


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['arrow', 'phatgoose'])
def test_a_library_knows_what_its_adapters_were_taught(
  places, tmp_path, monkeypatch, preset
):
  """Beside the base, and a library whose words were shuffled."""
  monkeypatch.setattr(
    loaded_model, 'load_tokenizer', lambda *names: ByteTokenizer()
  )
  rng = np.random.default_rng(0)
  shuffled = [
    [''.join(rng.permutation([*row])) for row in rows] for rows in HALVES
  ]
  for name in ('own', 'shuffled'):
    (tmp_path / name).mkdir()
  own = library(places, tmp_path / 'own', preset, HALVES)
  control = library(places, tmp_path / 'shuffled', preset, shuffled)
  base = moepeft.load(places['llama'])
  for prompt, answer in (
    ('the sun is 3', ' and the moon is 4'),
    ('my cat ate 3', ' but her dog ate 5'),
  ):
    loss = {
      name: -model.log_probs([prompt], [answer])[0].mean()
      for name, model in (('own', own), ('control', control), ('base', base))
    }
    assert loss['own'] < loss['control'] < loss['base'], loss
    (expected,) = uncached_log_probs(own, [prompt], [answer])
    assert loss['own'] == pytest.approx(-expected.mean(), rel=1e-4)


def test_lorahub_sums_a_and_b_apart():
  trees = [{'a': np.full((2, 2), x), 'b': np.eye(2)} for x in (1.0, 2.0)]
  tree = lorahub.combined(trees, np.array([0.5, -1.0]))
  # 1/2 - 2 and (1/2 - 1) I: their product is not the sum of the products.
  np.testing.assert_allclose(tree['a'], np.full((2, 2), -1.5))
  np.testing.assert_allclose(tree['b'], -0.5 * np.eye(2))


def test_lorahub_s_search_stays_within_its_bounds():
  target = np.array([1.0, -3.0])
  best, least = lorahub.search(
    lambda w: float(np.sum((w - target) ** 2)), 2, 200, seed=0
  )
  # The second weight ends at its bound, 1.5 away from the target.
  np.testing.assert_allclose(best, [1.0, -1.5], atol=0.05)
  assert least == pytest.approx(1.5**2, rel=0.01)


@pytest.mark.parametrize(
  ('rows', 'names', 'message'),
  [
    ('', 'a', 'rows.jsonl holds no rows; expected at least one'),
    ('{"inputs": "a", ', 'a', r'rows.jsonl, line 1: not JSON .*; mend or'),
    ('{"text": "a"}', 'a', "line 1: expected text in 'inputs'"),
    (ROW, ('a', 'nowhere'), 'nowhere does not exist; expected the work'),
    (ROW, ('a', 'foreign'), 'foreign was trained on another base than'),
    (ROW, ('a', 'rank'), 'adapters of one method; got .*rank=3.*rank=2'),
    (ROW, ('a', 'vectors'), 'adapters of one method; got .* ia3'),
    (ROW, ('vectors',), "that add a term, such as lora; .* is 'ia3'"),
    (ROW, ('',), 'name them, --adapters=A,B'),
  ],
)
def test_lorahub_answers_mistakes_in_one_sentence(
  places, tmp_path, rows, names, message
):
  (tmp_path / 'rows.jsonl').write_text(rows)
  paths = [places.get(name, name) for name in names]
  data, output = str(tmp_path / 'rows.jsonl'), str(tmp_path / 'out')
  with pytest.raises(ValueError, match=message) as error:
    lorahub.find(places['llama'], paths, data, output)
  assert '\n' not in str(error.value)


def test_lorahub_tries_one_weight_at_least():
  options = (f'--{name}=A' for name in ('model', 'adapters', 'data', 'output'))
  result = commands.run('scripts.lorahub', *options, '--steps=0')
  assert result.returncode == 2
  assert result.stderr == 'error: flag --steps=0: 0 is not a positive integer\n'


@pytest.mark.slow
def test_lorahub_writes_the_lora_that_fits_examples_best(
  places, tmp_path, monkeypatch
):
  monkeypatch.setattr(lorahub, 'load_tokenizer', lambda *names: ByteTokenizer())
  (tmp_path / 'rows.jsonl').write_text(ROW)
  data, output = str(tmp_path / 'rows.jsonl'), str(tmp_path / 'out')
  paths = [places[name] for name in 'ab']

  def find(steps):
    return lorahub.find(
      places['llama'], paths, data, output, steps=steps, max_length=32
    )

  weights, base_loss = find(0)
  np.testing.assert_array_equal(weights, [0, 0])
  shutil.rmtree(output)
  weights, loss = find(30)
  assert loss < base_loss - 0.01
  tree, metadata = adapter_lib.load(output)
  assert metadata['method'].startswith('lora(')
  written, expected = map(
    weight_mapping.flatten, (tree, lorahub.combined(places['trees'], weights))
  )
  for path, array in expected.items():
    np.testing.assert_allclose(written[path], array, rtol=1e-6)


@pytest.mark.slow
def test_scores_with_and_without_a_cache_are_equal(places, monkeypatch):
  monkeypatch.setattr(
    loaded_model, 'load_tokenizer', lambda *names: ByteTokenizer()
  )
  texts = (['the sun is 3', 'a'], [' and the moon is 4', ''])
  model = moepeft.load(places['llama'], adapter=places['a'])
  for one, other in zip(
    model.log_probs(*texts), uncached_log_probs(model, *texts), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('is_gated', 'router', 'message'),
  [
    (
      False,
      'phatgoose(k=1)',
      'by the gates of adapters, and .*/a has none',
    ),
    (True, 'topk(k=1)', 'a mixture of one expert, whose router .* would drop'),
  ],
)
def test_gates_are_where_the_router_reads_them(
  places, tmp_path, is_gated, router, message
):
  path = places['a']
  if is_gated:
    path = str(tmp_path / 'a')
    gated(path, places, 0)
  config = config_of(places, mixture(path, options=f'router={router}'))
  with pytest.raises(ValueError, match=message):
    setup.build(config, str(tmp_path), dry_run=True)


def test_a_router_that_is_computed_from_adapters_needs_them(places, tmp_path):
  config = config_of(places, 'arrow(rank=2)')
  with pytest.raises(ValueError, match='arrow has a router that is computed'):
    setup.build(config, str(tmp_path), dry_run=True)
