# SPDX-License-Identifier: Apache-2.0
"""The command `python -m moepeft.convert`."""

import json
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from moepeft import convert
from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import quantize
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft, peft_config
from moepeft.checkpoints.t5x import model as t5x
from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.peft import build
from moepeft.peft.merge import merge

from .. import chat_cases
from .cases import CONFIGS, adapter_tree, assert_equal_trees, random_params

CONFIG = CONFIGS['gated-untied']
PARAMS = random_params(CONFIG)
# What the released code, peft and moepeft can all hold.
LORA = AdapterWeights(
  "lora(rank=7, alpha=16, targets='encoder/self/q|*/mlp/wo')",
  adapter_tree(
    CONFIG,
    {'lora/a': '{in}r', 'lora/b': 'r{out}'},
    ['encoder/self/q', 'encoder/mlp/wo', 'decoder/mlp/wo'],
  ),
)
MOV = AdapterWeights(
  "mov(experts=2, router=softmax, reads='heads', targets='*/mlp/act')",
  adapter_tree(
    CONFIG,
    {'mov/scale': 'ef', 'mov/router/kernel': 'fe'},
    ['encoder/mlp/act', 'decoder/mlp/act'],
  ),
)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """A directory with one input of each form."""
  directory = tmp_path_factory.mktemp('inputs')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(directory)
    save_inputs()
  return directory


def save_inputs():
  hf.save('hf', CONFIG, PARAMS)
  t5x.save('t5x', CONFIG, PARAMS, step=3)
  t5x.save('both', CONFIG, PARAMS, LORA)
  t5x.save('mixture', CONFIG, PARAMS, MOV)
  peft.save('peft', CONFIG, LORA, base='hf')
  sha256 = weight_mapping.content_hash(PARAMS)
  card = adapter_lib.describe(
    LORA.method, 'official', 'hf', sha256, 't5', CONFIG
  )
  adapter_lib.save('moepeft', LORA.tree, card)
  adapter_lib.save('mixed', MOV.tree, card | {'method': MOV.method})


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, capsys):
  """Runs the command in a directory with one input of each form."""
  # T5X writes a thousand small files, which no conversion changes.
  for path in inputs.iterdir():
    if path.name in ('t5x', 'both', 'mixture'):
      (tmp_path / path.name).symlink_to(path)
    else:
      shutil.copytree(path, tmp_path / path.name)
  monkeypatch.chdir(tmp_path)

  def run(*arguments):
    code = convert.main(['convert', *arguments])
    return code, capsys.readouterr().err

  return run


def converted(run, source, form, *more):
  arguments = (f'--input={source}', '--output=out', f'--to={form}', *more)
  assert run(*arguments) == (0, '')


@pytest.mark.parametrize('source', ['hf', 't5x'])
@pytest.mark.parametrize('form', ['hf', 't5x'])
def test_base_models_go_both_ways(run, source, form):
  converted(run, source, form)
  loaded = {'hf': hf, 't5x': t5x}[form].load('out')
  assert loaded.config == CONFIG
  assert_equal_trees(loaded.params, PARAMS)


def test_dtype_casts_the_base(run):
  converted(run, 't5x', 'hf', '--dtype=bfloat16')
  expected = hf.load('hf', 'bfloat16').params
  assert_equal_trees(hf.load('out').params, expected)


@pytest.mark.parametrize('source', ['peft', 'moepeft'])
@pytest.mark.parametrize('form', ['peft', 'moepeft', 't5x'])
def test_adapters_go_all_ways(run, source, form):
  converted(run, source, form)
  if form == 'moepeft':
    tree, card = adapter_lib.load('out')
    actual = AdapterWeights(card['method'], tree)
    assert card['base'] == adapter_lib.load('moepeft')[1]['base']
  elif form == 'peft':
    actual = peft.load('out', CONFIG)
    assert peft_config.read('out')['base_model_name_or_path'] == 'hf'
  else:
    loaded = t5x.load('out')
    assert_equal_trees(loaded.params, PARAMS)
    actual = loaded.adapter
  assert actual.method == LORA.method
  assert_equal_trees(actual.tree, LORA.tree)


@pytest.mark.parametrize('form', ['hf', 'peft', 'moepeft'])
def test_base_and_adapter_of_one_checkpoint_come_apart(run, form):
  converted(run, 'both', form)
  assert_equal_trees(hf.load('out/base').params, PARAMS)
  if form == 'peft':
    actual = peft.load('out/adapter', CONFIG).tree
  else:
    actual, card = adapter_lib.load('out/adapter')
    assert card['base']['path'] == 'out/base'
    assert card['base']['sha256'] == hf.load('out/base').sha256
    assert adapter_lib.config_of(card) == CONFIG
  assert_equal_trees(actual, LORA.tree)


def test_the_hash_is_of_the_base_that_was_written(run):
  converted(run, 'both', 'moepeft', '--dtype=float16')
  base = adapter_lib.load('out/adapter')[1]['base']
  assert base['sha256'] == hf.load('out/base').sha256


def test_top_k_comes_from_the_flag(run):
  converted(run, 'mixture', 'moepeft', '--top_k=1')
  method = adapter_lib.load('out/adapter')[1]['method']
  assert 'router=topk(k=1, renormalize=False)' in method


@pytest.fixture
def trained(run, tmp_path, monkeypatch):
  """Puts a run's result into the work directory 'run'."""

  def put(tree, **entries):
    card = adapter_lib.load('moepeft')[1] | {'seed': 5, 'step': 7} | entries
    module = types.ModuleType('moepeft.checkpoints.manager')
    module.restore_trained = lambda workdir: (tree, card)
    monkeypatch.setitem(sys.modules, 'moepeft.checkpoints.restore', module)
    monkeypatch.setattr('moepeft.checkpoints.restore', module, raising=False)
    (tmp_path / 'run').mkdir()
    config = {'optimizer': {'decay_initial_step': 1_100_000}}
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))

  return put


def test_workdir_exports_what_was_trained(run, trained):
  trained(LORA.tree, trainable='peft')
  assert run('--workdir=run', '--output=out') == (0, '')
  assert adapter_lib.load('out')[1] == adapter_lib.load('moepeft')[1]
  for name in (adapter_lib.ARRAYS, adapter_lib.METADATA_FILE):
    with (
      open(f'out/{name}', 'rb') as actual,
      open(f'moepeft/{name}', 'rb') as f,
    ):
      assert actual.read() == f.read()


@pytest.mark.parametrize('adapter', [LORA, MOV], ids=['lora', 'mov'])
def test_a_run_becomes_a_t5x_checkpoint_of_its_step(run, trained, adapter):
  trained(adapter.tree, trainable='peft', method=adapter.method)
  assert run('--workdir=run', '--output=out', '--to=t5x') == (0, '')
  # 7 steps after the 1,100,000 of config.optimizer.decay_initial_step.
  loaded = t5x.load('out/checkpoint_1100007')
  assert_equal_trees(loaded.params, PARAMS)
  assert loaded.adapter.method == adapter.method
  assert_equal_trees(loaded.adapter.tree, adapter.tree)


def test_a_run_on_a_moved_base_names_it(run, trained):
  trained(LORA.tree, trainable='peft')
  arguments = ('--workdir=run', '--output=out', '--to=t5x')
  assert run(*arguments, '--base=t5x') == (0, '')
  hf.save('other', CONFIG, random_params(CONFIG, seed=9))
  code, error = run(*arguments, '--base=other', '--overwrite')
  assert (code, 'other is not the base' in error) == (2, True)


def test_a_run_becomes_a_peft_adapter(run, trained):
  trained(LORA.tree, trainable='peft')
  assert run('--workdir=run', '--output=out', '--to=peft') == (0, '')
  assert_equal_trees(peft.load('out', CONFIG).tree, LORA.tree)


@pytest.mark.parametrize('source', ['peft', 'moepeft', 'workdir'])
def test_an_adapter_as_hf_is_merged_into_its_base(run, trained, source):
  for name in ('tokenizer.json', 'generation_config.json', 'notes.txt'):
    Path('hf', name).write_text('{}')
  if source == 'workdir':
    trained(LORA.tree, trainable='peft')
    assert run('--workdir=run', '--output=out', '--to=hf') == (0, '')
  else:
    converted(run, source, 'hf')
  built = build(LORA.method, t5.sites(CONFIG))
  expected = merge(built, {'params': PARAMS, 'peft': LORA.tree})
  expected = jax.tree.map(np.asarray, expected)
  assert_equal_trees(hf.load('out').params, expected)
  assert sorted(file.name for file in Path('out').iterdir()) == [
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
  ]


def test_what_was_trained_on_a_quantised_base_is_merged_into_that(run, trained):
  base = adapter_lib.load('moepeft')[1]['base'] | {'quantise': 'nf4'}
  trained(LORA.tree, trainable='peft', base=base)
  assert run('--workdir=run', '--output=out', '--to=hf') == (0, '')
  seen = quantize.unpack(quantize.pack(PARAMS, CONFIG, 'nf4'), CONFIG)
  built = build(LORA.method, t5.sites(CONFIG))
  expected = merge(built, {'params': seen, 'peft': LORA.tree})
  expected = jax.tree.map(np.asarray, expected)
  assert_equal_trees(hf.load('out').params, expected)
  kernel = expected['decoder']['layers']['self']['k']['kernel']
  assert (kernel != PARAMS['decoder']['layers']['self']['k']['kernel']).any()
  # The codes are of what training read, whatever is written.
  more = ('--dtype=bfloat16', '--overwrite')
  assert run('--workdir=run', '--output=out', '--to=hf', *more) == (0, '')
  cast = jax.tree.map(lambda a: a.astype('bfloat16'), expected)
  assert_equal_trees(hf.load('out').params, cast)


@pytest.mark.parametrize('form', ['moepeft', 'peft', 'hf'])
def test_the_template_that_a_run_was_trained_by_goes_along(run, trained, form):
  from transformers import AutoTokenizer

  trained(LORA.tree, trainable='peft')
  chat_cases.tokenizer(template='none of it').save_pretrained('words')
  Path('own.jinja').write_text(chat_cases.CHATML)
  data = {'chat_template': 'own.jinja', 'system_prompt': 'Be brief.'}
  data |= {'tokenizer': 'words'}
  Path('run', 'config.json').write_text(json.dumps({'data': data}))
  assert run('--workdir=run', '--output=out', f'--to={form}') == (0, '')
  actual = AutoTokenizer.from_pretrained('words')
  actual.chat_template = Path('out', 'chat_template.jinja').read_text()
  if form == 'hf':
    # The directory's own, whatever the tokenizer brought.
    assert AutoTokenizer.from_pretrained('out').chat_template == (
      actual.chat_template
    )
  turns = [{'role': 'user', 'content': 'a'}]
  assert actual.apply_chat_template(turns, tokenize=False) == (
    '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n'
  )


@pytest.mark.parametrize('form', ['hf', 't5x'])
def test_a_whole_trained_model_goes_out(run, trained, form):
  params = random_params(CONFIG, seed=3)
  trained(params, trainable='params', method='full')
  arguments = ('--workdir=run', '--output=out', f'--to={form}')
  assert run(*arguments) == (0, '')
  path = {'hf': 'out', 't5x': 'out/checkpoint_1100007'}[form]
  loaded = {'hf': hf, 't5x': t5x}[form].load(path)
  assert_equal_trees(loaded.params, params)


@pytest.mark.parametrize(
  ('trainable', 'options', 'said'),
  [
    ('params', ['--to=peft'], 'trained a whole model'),
    ('params', ['--to=moepeft'], 'trained a whole model'),
    ('params', ['--to=t5x', '--dtype=float16'], '--dtype is for'),
  ],
)
def test_a_run_in_a_form_that_cannot_hold_it_is_refused(
  run, trained, trainable, options, said
):
  trained(PARAMS if trainable == 'params' else LORA.tree, trainable=trainable)
  code, error = run('--workdir=run', '--output=out', *options)
  assert (code, said in error) == (2, True)


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--input=hf', '--to=t5x'], '--output is missing'),
    (['--output=out', '--to=hf'], '--input is missing'),
    (['--config=no.py', '--output=out'], 'no.py'),
    (['--method=arrow', '--config=configs/sft.py', '--output=out'], 'keep one'),
    (['--input=hf', '--output=out'], '--to is missing'),
    (['--input=hf', '--output=out', '--to=gguf'], 'gguf'),
    (['--input=peft', '--output=out', '--to=gguf'], 'gguf'),
    (['--input=moepeft', '--output=out', '--to=gguf'], 'gguf'),
    (['--input=hf', '--output=out', '--form=hf'], 'form'),
    (['hf', '--output=out', '--to=hf'], "unexpected argument 'hf'"),
    (['--input=hf', '--output=out', '--to=peft'], 'holds no adapter'),
    (['--input=mixed', '--output=out', '--to=hf'], 'mov cannot be merged'),
    (['--input=mixture', '--output=out', '--to=peft'], 'cannot represent'),
    (['--input=/no/such', '--output=out', '--to=hf'], '/no/such is not'),
    (['--input=.', '--output=out', '--to=hf'], 'none of the known formats'),
    (['--input=hf', '--output=peft', '--to=hf'], 'already contains'),
    (
      ['--input=peft', '--output=out', '--to=moepeft', '--base=moepeft'],
      'expected a base model',
    ),
    (
      ['--input=moepeft', '--output=out', '--to=t5x', '--base=mixture2'],
      'mixture2',
    ),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_bad_input_is_one_sentence_and_code_2(
  run, arguments, said, monkeypatch
):
  hub = pytest.importorskip('huggingface_hub')

  def offline(*args, **kwargs):
    raise OSError('offline')

  monkeypatch.setattr(hub, 'snapshot_download', offline)
  code, error = run(*arguments)
  assert code == 2
  assert said in error
  assert len(error.splitlines()) == 1
  assert 'Traceback' not in error


@pytest.mark.parametrize(
  'arguments',
  [
    (
      "--method=arrow(from_adapters=['moepeft', 'peft'], router=arrow(k=1))",
      '--base=hf',
    ),
    (
      '--config=configs/methods/arrow.py:adapters=moepeft|peft,model=other',
      "--config.method=arrow(from_adapters=['moepeft','peft'],router=arrow(k=1))",
      '--config.model.path=hf',
    ),
  ],
  ids=['method', 'config'],
)
def test_trained_adapters_become_a_mixture_without_training(run, arguments):
  code, error = run(*arguments, '--output=out')
  assert (code, error) == (0, '')
  tree, metadata = adapter_lib.load('out')
  assert [e['path'] for e in metadata['experts']] == ['moepeft', 'peft']
  assert 'from_adapters' not in metadata['method']
  arrays = weight_mapping.flatten(tree)
  experts = weight_mapping.flatten(LORA.tree)
  for path, kernel in arrays.items():
    site, _, leaf = path.rpartition('/arrow/router/')
    if leaf != 'kernel':
      continue
    a, b = (np.asarray(experts[f'{site}/lora/{name}']) for name in 'ab')
    for layer in range(len(kernel)):
      rank = a.shape[-1]
      term = a[layer].reshape(-1, rank) @ b[layer].reshape(rank, -1)
      # The left singular vector here is the paper's right one; up to its sign.
      top = np.linalg.svd(term)[0][:, 0]
      np.testing.assert_allclose(np.abs(top @ kernel[layer]), [1, 1], rtol=1e-5)
  assert any(path.endswith('/router/kernel') for path in arrays)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    ("mixture(from_adapters=['moepeft'], router=softmax)", 'are trained; tr'),
    ('arrow(expert=3)', 'arrow has no option expert'),
    ('lora', 'are trained; train it with'),
    ('arrow', "arrow(from_adapters=['a', 'b'])"),
    ('mixture(expert=lora, router=arrow)', 'is computed from trained'),
  ],
)
def test_a_mixture_that_needs_training_is_not_converted(run, method, message):
  code, error = run(f'--method={method}', '--base=hf', '--output=out')
  assert code == 2
  assert message in error and len(error.splitlines()) == 1


def test_another_base_than_the_trained_one_is_refused(run):
  hf.save('other', CONFIG, random_params(CONFIG, seed=9))
  code, error = run(
    '--input=moepeft', '--output=out', '--to=t5x', '--base=other'
  )
  assert code == 2
  assert 'other is not the base' in error


def test_overwrite_replaces_an_earlier_output(run):
  converted(run, 'hf', 'hf')
  code, error = run('--input=t5x', '--output=out', '--to=hf')
  assert (code, 'already contains' in error) == (2, True)
  converted(run, 't5x', 't5x', '--overwrite')
  np.testing.assert_array_equal(
    t5x.load('out').params['embed']['embedding'], PARAMS['embed']['embedding']
  )


def test_help_shows_every_flag(run, capsys):
  assert convert.main(['convert', '--help']) == 0
  shown = capsys.readouterr().out
  for flag in ('input', 'output', 'to', 'workdir', 'base', 'dtype', 'top_k'):
    assert f'--{flag}' in shown
