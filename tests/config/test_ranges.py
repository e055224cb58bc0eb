# SPDX-License-Identifier: Apache-2.0
"""Every number and every enumerated text has its range, and is held to it."""

import ast
import math

import pytest
from ml_collections import ConfigDict

from moepeft import config as config_lib
from moepeft import moe, registries
from moepeft.checkpoints import quantize
from moepeft.config import check as config_check
from moepeft.config.ranges import ALLOWED, TEXTS
from moepeft.core import sharding
from moepeft.core.ranges import MAX_SEED, Choices, Range
from moepeft.data.batching import decoder_only
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat.formats import FORMATS
from moepeft.data.text import dataset as text_dataset
from moepeft.models import FAMILIES
from moepeft.nn import attention, scan_layers
from moepeft.objectives import cross_entropy as loss
from moepeft.objectives import dpo
from moepeft.peft import METHODS, build
from moepeft.peft.method import options_of
from tests import ROOT

_PACKAGE = ROOT / 'moepeft'
_SITES = FAMILIES['llama'].sites(FAMILIES['llama'].config('tiny'))


def leaves(config, prefix=''):
  """(key, value) of every leaf but model.shape, whose keys the model has."""
  for key, value in config.items():
    name = f'{prefix}{key}'
    if name == 'model.shape':
      continue
    if isinstance(value, ConfigDict):
      yield from leaves(value, f'{name}.')
    else:
      yield name, value


DEFAULTS = dict(leaves(config_lib.default()))
NUMBERS = [
  key for key, allowed in ALLOWED.items() if isinstance(allowed, Range)
]
CHOICES = [
  key for key, allowed in ALLOWED.items() if isinstance(allowed, Choices)
]


def test_every_key_has_a_range_or_choices_or_takes_any_text():
  free = {key for key, value in DEFAULTS.items() if isinstance(value, bool)}
  free |= {'sharding.rules'}
  assert set(DEFAULTS) - free == set(ALLOWED) | set(TEXTS)
  assert set(ALLOWED).isdisjoint(TEXTS)


def test_every_default_is_allowed():
  config_check.check_ranges(config_lib.default())


@pytest.mark.parametrize(
  ('key', 'names'),
  [
    ('preference.loss', dpo.LOSSES),
    ('loss.average_over', loss.AVERAGE_OVER),
    ('model.quantize', ('', *quantize.FORMATS)),
    ('data.format', ('', *FORMATS)),
    ('data.train_on', chat_dataset.TRAIN_ON),
    ('data.truncation', decoder_only.TRUNCATIONS),
    ('data.pretraining_objective', text_dataset.PRETRAINING_OBJECTIVES),
    ('model.attention', attention.IMPLEMENTATIONS),
    ('model.remat', scan_layers.REMAT),
    ('sharding.preset', sharding.PRESETS),
  ],
)
def test_choices_are_those_of_the_code_that_reads_them(key, names):
  assert set(ALLOWED[key].names) == set(names)


@pytest.mark.parametrize('key', registries.BY_KEY)
def test_the_choices_of_an_entry_are_its_registry_s(key):
  config = changed(key, 'no_such_entry')
  names = ', '.join(registries.BY_KEY[key])
  with pytest.raises(ValueError, match=f'^config.{key} is one of {names}; '):
    config_check.check(config, registries.BY_KEY)


def test_every_key_that_an_entry_reads_exists():
  for key, registry in registries.BY_KEY.items():
    for name, entry in registry.items():
      unknown = set(getattr(entry, 'config_keys', ())) - set(DEFAULTS)
      assert not unknown, (key, name)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data.path': 'rows'}, "source='tasks', only with jsonl or datasets or"),
    (
      {'optimizer.decay_initial_step': 3},
      "name='adamw', only with adafactor; set one of",
    ),
    (
      {'data.source': 'preference', 'data.replay': 'x.txt'},
      "replay='x.txt' does nothing with config.data.source='preference'",
    ),
  ],
)
def test_keys_that_no_code_would_read_are_refused(changes, message):
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    config_check.check(config, registries.BY_KEY)


def changed(key, value):
  config = config_lib.default()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict({key: value})
  return config


@pytest.mark.parametrize('key', NUMBERS)
@pytest.mark.parametrize(
  'value', [math.nan, -math.inf, 1e300, -(2**80), 2**1000, 'many', None]
)
def test_no_number_is_nan_or_huge(key, value):
  with pytest.raises(ValueError, match=f'^config.{key} is ') as error:
    config_check.check_ranges(changed(key, value))
  assert len(str(error.value)) < 300


@pytest.mark.parametrize('key', [k for k in NUMBERS if 'temper' not in k])
def test_no_number_but_the_temperature_is_infinite(key):
  with pytest.raises(ValueError, match=f'^config.{key} is '):
    config_check.check_ranges(changed(key, math.inf))
  config_check.check_ranges(changed('data.temperature', math.inf))


@pytest.mark.parametrize('key', CHOICES)
def test_a_wrong_choice_lists_all_and_suggests_the_nearest(key):
  names = [name for name in ALLOWED[key].names if name]
  with pytest.raises(ValueError, match=f'^config.{key} is one of ') as error:
    config_check.check_ranges(changed(key, f'{names[0]}x'))
  assert all(name in str(error.value) for name in names)
  assert str(error.value).endswith('?')


@pytest.mark.parametrize('key', TEXTS)
def test_a_text_is_a_text(key):
  with pytest.raises(ValueError, match=f'^config.{key} is a text; got None'):
    config_check.check_ranges(changed(key, None))


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('seed', MAX_SEED + 1),
    ('steps', -1),
    ('batch_size', 10**8),
    ('data.num_workers', 1000),
    ('data.length', 10**9),
    ('model.dropout', 1.5),
    ('optimizer.learning_rate', 0.0),
  ],
)
def test_values_that_were_accepted_or_hung_are_refused(key, value):
  with pytest.raises(ValueError, match=f'^config.{key} is at|is above'):
    config_check.check_ranges(changed(key, value))


ENTRIES = {
  **{name: entry.options() for name, entry in METHODS.items()},
  **{name: options_of(entry.module) for name, entry in moe.ROUTERS.items()},
}


@pytest.mark.parametrize('name', ENTRIES)
def test_every_option_of_a_method_or_router_is_declared(name):
  # `new` is a small language; an expert and a router are texts of their own,
  # and what the experts of a mixture may share, the expert says.
  free = {'new', 'expert', 'router', 'share'}
  undeclared = {
    key
    for key, option in ENTRIES[name].items()
    if option.allowed is None and not isinstance(option.default, bool)
  }
  assert undeclared <= free


@pytest.mark.parametrize(
  ('method', 'option'),
  [
    ('molora(experts=0)', 'experts'),
    ('molora(experts=1000000000)', 'experts'),
    ('molora(rank=-1)', 'rank'),
    ('molora(dropout=1.5)', 'dropout'),
    ('molora(alpha=1e999)', 'alpha'),
    ('lora(rank=1000000000)', 'rank'),
    ('dora(rank=0)', 'rank'),
    ('mov(experts=-3)', 'experts'),
    ("mov(reads='headz')", 'reads'),
    ("ia3(on='inputs')", 'on'),
    ('prompt(length=0)', 'length'),
    ('molora(router=topk(k=0))', 'k'),
    ('molora(router=softmax(jitter=2.0))', 'jitter'),
    ('molora(router=softmax(dropout=1.0))', 'dropout'),
    (f'molora(router=random(seed={2**80}))', 'seed'),
  ],
)
def test_options_out_of_range_are_refused_when_the_text_is_read(method, option):
  with pytest.raises(ValueError, match=f"'s option {option} is "):
    build(method, _SITES)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    ('molora(experts=10**9)', 'cannot read the method'),
    ('molora(expert=3)', "did you mean 'experts'"),
    ('molra', "did you mean 'molora'"),
    ('molora(router=softmaxx)', "did you mean 'softmax'"),
    ("mov(reads='headz')", "did you mean 'heads'"),
    ('(' * 5000, 'cannot read the method'),
    ('lora(rank=' + '-' * 9000 + '1)', 'cannot read the method'),
    ('lora(rank={[]: 1})', 'cannot read the method'),
    ('lora(rank=' + '9' * 5000 + ')', 'cannot read the method'),
    ('x' * 20000, 'cannot read the method'),
  ],
)
def test_a_wrong_method_is_one_short_sentence(method, message):
  with pytest.raises(ValueError, match=message.replace('(', r'\(')) as error:
    build(method, _SITES)
  assert len(str(error.value)) < 300


def test_tokens_beyond_the_vocabulary_are_refused_before_they_are_listed():
  config = config_lib.default()
  config.model.path, config.model.family = '', 'llama'
  config.model.size = 'tiny'
  config.method = "tokens(new='0-99999999999999')"
  from moepeft.checkpoints.count_parameters import count

  with pytest.raises(ValueError, match='expected ids below 259'):
    count(config)


def flag_calls():
  """(file, call) of each definition of a numeric flag in the package."""
  for path in _PACKAGE.rglob('*.py'):
    # The server's are its own tests'.
    if 'serve' in path.parts:
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        'flags.DEFINE_integer',
        'flags.DEFINE_float',
      ):
        yield path.name, node


def test_every_numeric_flag_has_both_bounds():
  calls, open_ended = list(flag_calls()), []
  assert len(calls) > 15
  for file, call in calls:
    bounds = {keyword.arg for keyword in call.keywords}
    if not {'lower_bound', 'upper_bound'} <= bounds:
      open_ended.append(f'{file}: {ast.unparse(call.args[0])}')
  assert open_ended == []


@pytest.mark.parametrize(
  ('allowed', 'value', 'inside'),
  [
    (Range(0, 1), 0, True),
    (Range(0, 1), 1, True),
    (Range(0, 1, above=True), 0, False),
    (Range(0, 1, below=True), 1, False),
    (Range(0, 1), True, False),
    (Range(0, 1), math.nan, False),
    (Range(0, 1, infinite=True), math.inf, True),
    (Range(0, 1, infinite=True), -math.inf, False),
  ],
)
def test_a_range_holds_its_ends_and_no_truth_values(allowed, value, inside):
  assert (value in allowed) == inside
