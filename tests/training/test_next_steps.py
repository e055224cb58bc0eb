# SPDX-License-Identifier: Apache-2.0
"""The commands that a run ends with fit the method and the model."""

import shlex

import pytest

from moepeft import config as config_lib
from moepeft.peft.build import build
from moepeft.training import next_steps

SITES = {
  'encoder/self/q': 'query',
  'encoder/self/k': 'key',
  'encoder/self/v': 'value',
}


def commands(
  method, chat=False, prompt='', workdir='work dirs/law', task='', **changes
):
  config = config_lib.default()
  config.model.path = 'package:t5_tiny'
  for key, value in changes.items():
    section, _, name = key.partition('__')
    config[section][name] = value
  built = build(method, SITES)
  lines = next_steps.commands(workdir, config, built, chat, prompt, task)
  return {name: shlex.split(line) for name, line in lines.items()}


@pytest.mark.parametrize(
  ('method', 'merged'),
  [
    ("lora(rank=2, targets='*/q')", True),
    ("molora(experts=3, rank=2, targets='*/q')", False),
    ("lora(rank=2, targets='*/q') + mov(experts=3, targets='*/k')", False),
  ],
)
def test_what_can_be_merged_is_exported_as_a_whole_model(method, merged):
  export = commands(method)['export it']
  assert export[:3] == ['python', '-m', 'moepeft.convert']
  assert '--workdir=work dirs/law' in export
  assert '--output=work dirs/law_export' in export
  assert ('--to=hf' in export) == merged


def test_a_fully_tuned_model_is_exported_before_it_is_served():
  lines = commands('full')
  assert list(lines) == ['try it', 'export it', 'serve it']
  assert '--to=hf' in lines['export it']
  assert lines['serve it'][3:] == ['--model=work dirs/law_export']


def test_an_adapter_is_served_over_its_base():
  lines = commands('lora', model__quantize='int8')
  assert lines['serve it'][2:] == [
    'moepeft.serve',
    '--model=package:t5_tiny',
    '--adapter=law=work dirs/law',
    '--quantise=int8',
  ]


def test_an_adapter_that_routes_by_the_task_is_tried_with_one():
  method = "moelora(router=task(tasks=['a', 'b']))"
  assert '--task=a' in commands(method)['try it']
  assert '--task=b' in commands(method, task='b')['try it']


def test_a_chat_model_is_tried_by_a_turn_and_t5_by_an_example():
  plain = commands('lora', prompt="Is it 'so'?")['try it']
  assert plain[2:] == [
    'moepeft.generate',
    '--workdir=work dirs/law',
    "--prompt=Is it 'so'?",
  ]
  chat = commands('lora', chat=True)['try it']
  assert '--chat' in chat and '--prompt=What is LoRA?' in chat
  # A text of many lines is no example on a command line.
  assert '--prompt=Some text' in commands('lora', prompt='a\nb')['try it']


def test_no_command_has_a_word_to_fill_in(capsys):
  summary = {'seconds': 1.5, 'method': 'lora'}
  config = config_lib.default()
  config.model.path = 'base'
  lines = next_steps.commands('runs/a', config, build('lora', SITES), False)
  places = {'a': '', **lines}
  next_steps.print_next_steps(summary, ['accuracy rose: B'], ['x'] * 9, places)
  output = capsys.readouterr().out.splitlines()
  assert output[:2] == ['done in 1.5 s: lora', '  accuracy rose: B']
  assert sum(line.startswith('  note: ') for line in output) == 3
  assert len(output) == 2 + 3 + 3
  assert not any('DIR' in line for line in output)
