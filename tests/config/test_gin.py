# SPDX-License-Identifier: Apache-2.0
"""gin files with T5X's names give the configs of configs/paper."""

import importlib.util
import itertools
import json
import os

import pytest

from moepeft.config import gin as gin_files
from moepeft.config.gin import flags as gin_flags
from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from tests import ROOT

from .. import commands

METHODS = ('full', 'ia3', 'lora', 'mov', 'molora')
RUN = 'gin/molora.gin'


def twin(size, method):
  path = ROOT / 'configs' / 'paper' / f't5_{size}_{method}.py'
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def flat(config):
  return weight_mapping.flatten(json.loads(config.to_json()))


def load(*files, cached='', **macros):
  """The translation of files of this repository with overrides."""
  bindings = [f'{name}={value!r}' for name, value in macros.items()]
  return gin_files.load(files, bindings, (str(ROOT),), cached)


def bound(*bindings, files=(RUN,)):
  return gin_files.load(files, bindings, (str(ROOT),)).config


def size_file(size):
  return f'gin/models/t5_1_1_{size}.gin'


@pytest.mark.parametrize(
  ('size', 'method'), itertools.product(('large', 'xl', 'xxl'), METHODS)
)
def test_run_and_size_file_equal_their_card(size, method):
  files = (size_file(size), f'gin/{method}.gin')
  translated = load(*files)
  assert flat(translated.config) == flat(twin(size, method))
  assert (translated.model_dir, translated.notes) == ('', ())
  # T5X's users put the model first; nothing depends on it.
  assert flat(load(*files[::-1]).config) == flat(translated.config)


@pytest.mark.parametrize('size', ['small', 'base', 'large', 'xl', 'xxl'])
def test_size_files_name_released_sizes(size):
  config = load(RUN, size_file(size)).config
  assert (config.model.size, dict(config.model.shape)) == (size, {})


def test_without_a_size_it_is_large_and_said():
  translated = load(RUN)
  assert flat(translated.config) == flat(twin('large', 'molora'))
  (note,) = translated.notes
  assert gin_files.DEFAULT_MODEL_FILE in note


def test_other_sizes_are_the_nearest_and_a_shape():
  model = load(RUN, size_file('xl'), NUM_HEADS=7, NUM_DECODER_LAYERS=3)
  assert model.config.model.size == 'xl'
  shape = dict(model.config.model.shape)
  assert shape == {'heads': 7, 'decoder_layers': 3}
  with pytest.raises(ValueError, match='has another size'):
    load(RUN, NUM_HEADS=7, INITIAL_CHECKPOINT_PATH='package:t5_tiny')
  assert t5.config('xl').heads != 7


MACROS = [
  ('ACTIVATION_DTYPE', 'float32', 'model/dtype', 'float32'),
  ('BATCH_SIZE', 7, 'batch_size', 7),
  ('DROPOUT_RATE', 0, 'model/dropout', 0.0),
  ('EVAL_PERIOD', 70, 'evaluation/every_steps', 70),
  # Batches, 32 rows each.
  ('EVAL_STEPS', 3, 'evaluation/max_examples', 96),
  ('INITIAL_CHECKPOINT_PATH', 'a/b', 'model/path', 'a/b'),
  ('LABEL_SMOOTHING', 0.1, 'loss/label_smoothing', 0.1),
  ('LEARNING_RATE', 0.01, 'optimizer/learning_rate', 0.01),
  ('LOSS_NORMALIZING_FACTOR', 'NUM_REAL_TARGET_TOKENS', 'loss/average_over',
   'tokens'),
  ('METHOD', "molora(router=topk(k=2))", 'method',
   'molora(router=topk(k=2), experts=10, rank=4)'),
  ('MIXTURE_OR_TASK_MODULE', 'my.tasks', 'imports', 'my.tasks'),
  ('MIXTURE_OR_TASK_NAME', 'my_task', 'data/mixture', 'my_task'),
  ('NUM_EXPERTS', 5, 'method', 'molora(experts=5, rank=4)'),
  ('NUM_MICROBATCHES', 2, 'gradient_accumulation_steps', 2),
  ('NUM_PARTITIONS', 2, 'sharding/model_parallel_size', 2),
  ('NUM_PARTITIONS', 2, 'sharding/preset', 'tp'),
  ('PACKING', False, 'data/packing', False),
  ('RANDOM_SEED', 3, 'seed', 3),
  ('RANK', 5, 'method', 'molora(experts=10, rank=5)'),
  ('REMAT_POLICY', 'full', 'model/remat', 'full'),
  ('STEP_OFFSET', 100_000, 'optimizer/decay_initial_step', 1_000_000),
  ('TASK_FEATURE_LENGTHS', {'inputs': 5, 'targets': 3},
   'data/inputs_length', 5),
  ('TRAIN_STEPS', 70, 'steps', 70),
  ('TRAIN_STEPS_RELATIVE', 71, 'steps', 71),
  ('Z_LOSS', 0, 'loss/z_loss', 0.0),
]  # fmt: skip


@pytest.mark.parametrize(('macro', 'value', 'key', 'expected'), MACROS)
def test_a_macro_changes_its_key(macro, value, key, expected):
  before = flat(twin('large', 'molora'))
  after = flat(load(RUN, **{macro: value}).config)
  assert after[key] == expected != before[key]


BINDINGS = [
  ('trainer.Trainer.num_microbatches=2', 'gradient_accumulation_steps', 2),
  ('t5x.utils.SaveCheckpointConfig.period=7', 'checkpoint/every_steps', 7),
  ('SaveCheckpointConfig.keep=None', 'checkpoint/max_to_keep', 1_000_000),
  ('train_script.train.eval_period=7', 'evaluation/every_steps', 7),
  ('train/utils.DatasetConfig.pack=False', 'data/packing', False),
  ('utils.DatasetConfig.split="test"', 'data/split', 'test'),
  (
    'utils.create_learning_rate_scheduler.base_learning_rate=0.01',
    'optimizer/learning_rate',
    0.01,
  ),
  ('models.EncoderDecoderModel.z_loss=0.01', 'loss/z_loss', 0.01),
  (
    'adafactor.Adafactor.weight_decay_rate=0.01',
    'optimizer/weight_decay',
    0.01,
  ),
  ('network.T5Config.dropout_rate=0.0', 'model/dropout', 0.0),
]  # fmt: skip


@pytest.mark.parametrize(('binding', 'key', 'expected'), BINDINGS)
def test_a_binding_of_t5x_changes_its_key(binding, key, expected):
  before = flat(twin('large', 'molora'))
  assert flat(bound(binding))[key] == expected != before[key]


def test_the_later_of_macro_and_binding_counts():
  binding = 'train_script.train.eval_period=7'
  assert bound('EVAL_PERIOD=5', binding).evaluation.every_steps == 7
  assert bound(binding, 'EVAL_PERIOD=5').evaluation.every_steps == 5


@pytest.mark.parametrize(
  ('path', 'train_steps', 'steps', 'clock'),
  [
    ('', 500_000, 500_000, 1_100_000),
    # As in the released scripts: 1.1 M of pretraining and 500,000 of tuning.
    ('gs://b/xl/checkpoint_1100000', 1_600_000, 500_000, 1_100_000),
    ('b/checkpoint_1000000/', 1_000_001, 1, 1_000_000),
    # Names no step: PRETRAINED_STEPS holds.
    ('google/t5-v1_1-base', 500_000, 500_000, 1_100_000),
  ],
)
def test_train_steps_count_from_the_restored_step(
  path, train_steps, steps, clock
):
  config = load(
    RUN, INITIAL_CHECKPOINT_PATH=path, TRAIN_STEPS=train_steps
  ).config
  assert (config.steps, config.optimizer.decay_initial_step) == (steps, clock)


def test_the_latest_checkpoint_of_a_folder_is_counted_from(tmp_path):
  for step in (9, 10):
    (tmp_path / f'checkpoint_{step}').mkdir()
    (tmp_path / f'checkpoint_{step}' / 'checkpoint').touch()
  path = str(tmp_path)
  config = load(RUN, INITIAL_CHECKPOINT_PATH=path, TRAIN_STEPS=13).config
  assert (config.steps, config.optimizer.decay_initial_step) == (3, 10)


def test_relative_steps_need_no_arithmetic():
  path = 'b/checkpoint_1100000'
  config = load(
    RUN, INITIAL_CHECKPOINT_PATH=path, TRAIN_STEPS_RELATIVE=7
  ).config
  assert (config.steps, config.optimizer.decay_initial_step) == (7, 1_100_000)


@pytest.mark.parametrize(
  ('factors', 'pretrained', 'warmup'),
  [
    ('constant', 0, 0),
    ('constant * linear_warmup', 0, 70),
    # T5X's ramp counts from step 0 of the pretraining: it is over.
    ('constant*linear_warmup', 100, 0),
  ],
)
def test_warm_up_counts_from_the_pretrainings_start(
  factors, pretrained, warmup
):
  config = load(
    RUN, FACTORS=factors, WARMUP_STEPS=70, PRETRAINED_STEPS=pretrained
  ).config
  assert config.optimizer.warmup_steps == warmup


WRONG = [
  (['TRAIN_STEP=3'], 'the supported ones are TRAIN_STEPS,'),
  (['utils.SaveCheckpointConfig.perod=3'], 'are SaveCheckpointConfig.period,'),
  (['adafactor.Adafactor.decay_rat=3'], 'are Adafactor.decay_rate,'),
  (['LORA_RANK=3'], 'set RANK instead'),
  (["TRAIN_STEPS='3'"], "TRAIN_STEPS is of type int; got '3'"),
  (['BATCH_SIZE=True'], 'BATCH_SIZE is of type int; got True'),
  (['BATCH_SIZE=3.0'], 'BATCH_SIZE is of type int; got 3.0'),
  (['PACKING=1'], 'PACKING is of type bool; got 1'),
  (['PACKING=None'], 'PACKING is of type bool; got None'),
  (['DROPOUT_RATE="a"'], "DROPOUT_RATE is of type float; got 'a'"),
  (["TASK_FEATURE_LENGTHS={'inputs': 3}"], 'TASK_FEATURE_LENGTHS is like'),
  (['LOSS_NORMALIZING_FACTOR=3'], "'NUM_REAL_TARGET_TOKENS'; got 3"),
  (['LOSS_NORMALIZING_FACTOR=None'], "'NUM_REAL_TARGET_TOKENS'; got None"),
  (['REMAT_POLICY="some"'], "'none', 'minimal', 'full'; got 'some'"),
  (['OPTIMIZER=@optax.adamw()'], 'got @optax.adamw()'),
  (['FACTORS="constant * rsqrt_decay"'], 'factors is'),
  (['adafactor.Adafactor.decay_rate=0.7'], 'always 0.8 here; got 0.7'),
  (['METHOD="mov(experts=3)"'], 'set each option once'),
  (["INITIAL_CHECKPOINT_PATH='a/checkpoint_1100000'"], 'TRAIN_STEPS=1600000'),
  (['USE_CACHED_TASKS=True'], '--seqio_additional_cache_dirs=DIR'),
  (['BATCH_SIZE=%NOWHERE'], '%NOWHERE is not defined'),
  (['A=%B', 'B=%A', 'BATCH_SIZE=%A'], 'refers to itself'),
  (['BATCH_SIZE=%gin.REQUIRED'], 'BATCH_SIZE is required'),
  (['MODEL_DIR=/tmp/x'], 'is not gin'),
  (['MODEL_DIR=dir'], 'strings are quoted'),
  (['TASK_FEATURE_LENGTHS={'], 'is not gin'),
]  # fmt: skip


@pytest.mark.parametrize(
  ('bindings', 'message'), WRONG, ids=lambda value: str(value)[:40]
)
def test_what_is_wrong_is_one_sentence(bindings, message):
  with pytest.raises(ValueError) as error:
    bound(*bindings)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_file_that_lacks_what_a_run_needs_is_named_with_it():
  with pytest.raises(ValueError, match='sets METHOD, MIXTURE_OR_TASK_NAME'):
    load(size_file('xl'))


def write(folder, name, text):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return str(path)


def test_files_stack_and_include_what_lies_beside_them(tmp_path):
  write(tmp_path, 'mine/shared.gin', f"include '{RUN}'\nRANK = 3\nFIVE = 5\n")
  first = write(tmp_path, 'mine/a.gin', "include 'shared.gin'\nRANK = %FIVE\n")
  second = write(tmp_path, 'b.gin', 'NUM_EXPERTS = %FIVE\nFIVE = 7\n')
  # A macro has one value in the end, wherever it is referred to.
  assert load(first, second).config.method == 'molora(experts=7, rank=7)'


def test_a_missing_file_is_named_with_who_includes_it(tmp_path):
  with pytest.raises(ValueError, match="'no.gin' does not exist"):
    load('no.gin')
  path = write(tmp_path, 'a.gin', "include 'no.gin'\n")
  with pytest.raises(ValueError, match=r"'no.gin' \(included by .*a.gin\)"):
    load(path)


def test_files_that_include_each_other_are_refused(tmp_path):
  path = write(tmp_path, 'a.gin', "include 'b.gin'\n")
  write(tmp_path, 'b.gin', "include 'a.gin'\n")
  with pytest.raises(
    ValueError, match='a.gin includes itself, through .*b.gin'
  ):
    load(path)


def test_a_wrong_line_is_named(tmp_path):
  path = write(tmp_path, 'a.gin', f"include '{RUN}'\n\nBATCH = 3\n")
  with pytest.raises(ValueError, match=r'BATCH \(.*a.gin:3\) is not supported'):
    load(path)
  path = write(tmp_path, 'b.gin', 'BATCH_SIZE = 3\nRANK 4\n')
  with pytest.raises(ValueError, match=r'b.gin.* is not gin: .*'):
    load(path)


T5X_STYLE = """
from __gin__ import dynamic_registration
import __main__ as train_script
import seqio
from t5x import utils
import my_tasks

MODEL_DIR = %gin.REQUIRED
BATCH_SIZE = 128
USE_HARDWARE_RNG = True
MODEL = @models.EncoderDecoderModel()
train_script.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  total_steps = %TRAIN_STEPS
train/utils.DatasetConfig:
  batch_size = %BATCH_SIZE
  seed = None
infer_eval/utils.DatasetConfig.batch_size = 3
partitioning.PjitPartitioner:
  num_partitions = 1
  logical_axis_rules = @partitioning.standard_logical_axis_rules()
"""


def test_a_file_of_a_t5x_user_is_read_and_what_is_left_out_is_named(tmp_path):
  path = write(tmp_path, 'user.gin', T5X_STYLE)
  translated = load(size_file('xl'), RUN, path, MODEL_DIR='x', RANDOM_SEED=None)
  assert translated.model_dir == 'x'
  expected = flat(twin('xl', 'molora'))
  expected |= {'batch_size': 128, 'imports': 'my_tasks'}
  assert flat(translated.config) == expected
  left, seed = translated.notes
  for name in (
    'import seqio',
    'import t5x',
    'USE_HARDWARE_RNG',
    'MODEL',
    'train_script.train.model',
    'infer_eval/utils.DatasetConfig',
    'partitioning.PjitPartitioner',
  ):
    assert name in left.split(': ')[1].split(', ')
  assert 'seed 0' in seed


def test_several_modules_may_register_tasks(tmp_path):
  path = write(tmp_path, 'user.gin', 'import mine\nimport other\n')
  translated = load(RUN, path, MIXTURE_OR_TASK_MODULE='other')
  assert translated.config.imports == 'other,mine'


def test_the_text_of_a_translation_reads_back_to_it(tmp_path):
  path = write(tmp_path, 'user.gin', T5X_STYLE)
  first = load(RUN, path, MODEL_DIR='x', TASK_FEATURE_LENGTHS={
    'inputs': 7, 'targets': 5
  })  # fmt: skip
  again = load(write(tmp_path, 'config.gin', first.text))
  assert flat(again.config) == flat(first.config)
  assert (again.model_dir, again.text) == (first.model_dir, first.text)


def flags(*options):
  argv = gin_flags.rewrite_flags(['train', *options])
  return gin_flags.translate(argv, (str(ROOT),))


def test_the_released_scripts_options_are_understood():
  # What scripts/molora_train.sh of the released code gives to t5x.train,
  # arXiv:2309.05444.
  path = 'gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_large'
  translated = flags(
    '--gin_search_paths=/no/such/folder',
    '--gin_file=gin/models/t5_1_1_large.gin',
    '--gin_file=gin/molora.gin',
    "--gin.MODEL_DIR='run'",
    "--gin.LOSS_NORMALIZING_FACTOR='AVERAGE_PER_SEQUENCE'",
    "--gin.MIXTURE_OR_TASK_NAME='t0_train'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 1024, 'targets': 256}",
    f"--gin.INITIAL_CHECKPOINT_PATH='{path}/checkpoint_1100000'",
    '--gin.TRAIN_STEPS=1_600_000',
    '--gin.USE_CACHED_TASKS=True',
    '--gin.PACKING=True',
    '--seqio_additional_cache_dirs=cached',
    '--gin.BATCH_SIZE=32',
  )
  expected = flat(twin('large', 'molora'))
  expected['model/path'] = f'{path}/checkpoint_1100000'
  expected['data/path'] = 'cached'
  assert flat(translated.config) == expected
  assert translated.model_dir == 'run'


def test_cached_tasks_may_be_named_by_their_key():
  named = '--config.data.path=cached'
  translated = flags(f'--gin_file={RUN}', '--gin.USE_CACHED_TASKS=True', named)
  assert translated.config.data.path == 'cached'
  with pytest.raises(ValueError, match='leave one out'):
    flags(f'--gin_file={RUN}', '--gin.USE_CACHED_TASKS=False', named)


def test_the_work_directory_is_given_once_or_named_after_the_files():
  file, here = f'--gin_file={RUN}', '--workdir=x'
  assert flags(file, '--gin.MODEL_DIR="x"', here).model_dir == 'x'
  assert flags(here, file).model_dir == 'x'
  assert flags('--workdir', 'x', '--gin_file', RUN).model_dir == 'x'
  two_files = flags(f'--gin_file={size_file("xl")}', file)
  assert two_files.model_dir == os.path.join('workdirs', 't5_1_1_xl_molora')
  with pytest.raises(ValueError, match='keep one'):
    flags(file, '--gin.MODEL_DIR="y"', here)


def test_flags_that_exclude_or_need_each_other_are_refused():
  with pytest.raises(ValueError, match='both set'):
    flags(f'--gin_file={RUN}', '--config=configs/molora_t5.py')
  for alone in ('gin_search_paths', 'seqio_additional_cache_dirs'):
    with pytest.raises(ValueError, match='need --gin_file'):
      flags(f'--{alone}=x')


def test_no_gin_flag_is_no_translation():
  assert flags('--config=configs/molora_t5.py', '--config.steps=3') is None


@pytest.mark.slow
def test_count_prints_the_same_as_for_the_card():
  size, method = f'--gin_file={size_file("xl")}', '--gin_file=gin/mov.gin'
  # The key above all: 30 experts in the file, 20, then 60.
  gin = commands.run('moepeft.count', size, method, '--gin.NUM_EXPERTS=20',
    '--config.method=mov(experts=60)', '--noflops',
  )  # fmt: skip
  card = commands.run(
    'moepeft.count',
    '--config=configs/paper/t5_xl_mov.py:experts=60',
    '--noflops',
  )
  assert (gin.returncode, gin.stderr) == (0, '')
  assert gin.stdout == card.stdout
  # 60 experts on T5 1.1 xl, arXiv:2309.05444.
  assert json.loads(gin.stdout)['peft'] == 47_738_880


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ([f'--gin_file={RUN}', '--gin.TRAIN_STEP=3'], 'are TRAIN_STEPS,'),
    ([f'--gin_file={RUN}', '--config.stepz=3'], 'there is no config.stepz'),
  ],
)
def test_a_wrong_command_line_is_one_sentence_and_code_2(options, message):
  done = commands.run('moepeft.count', *options)
  assert done.returncode == 2
  lines = done.stderr.splitlines()
  lines = [line for line in lines if not line.startswith('gin: ')]
  (line,) = lines
  assert line.startswith('error: ') and message in line


def test_help_mentions_gin_files():
  help_text = commands.run('moepeft.count', '--help').stdout
  assert '--gin.NAME=VALUE' in help_text
  assert (
    '--config: A config file' in help_text and '--[no]traceback' in help_text
  )


@pytest.mark.slow
def test_a_run_keeps_its_gin_files_as_one(tmp_path):
  small = [
    "--gin.INITIAL_CHECKPOINT_PATH='package:t5_tiny'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}",
    '--gin.PACKING=False',
    '--gin.BATCH_SIZE=2',
    '--gin.METHOD="ia3"',
    '--gin.TRAIN_STEPS=1',
    f"--gin.MODEL_DIR='{tmp_path / 'run'}'",
    '--config.data.source=tasks',
    '--config.data.mixture=',
    '--config.evaluation.before=False',
    '--config.evaluation.after=False',
  ]
  done = commands.run('moepeft.train', '--gin_file=gin/ia3.gin', *small)
  assert done.returncode == 0, done.stderr
  gin_file = tmp_path / 'run' / 'config.gin'
  written = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert (written['steps'], written['method']) == (1, 'ia3')
  # What --config.key=value changed is not gin's to say.
  expected = flat(gin_files.load([str(gin_file)]).config)
  changed = {
    k for k, v in weight_mapping.flatten(written).items() if v != expected[k]
  }
  assert changed == {
    'data/source', 'data/mixture', 'evaluation/before', 'evaluation/after'
  }  # fmt: skip
