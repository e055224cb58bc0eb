# SPDX-License-Identifier: Apache-2.0
"""The routing command on rows of every kind, and on a run."""

import json
import types

import pytest

from moepeft import config as config_lib
from moepeft import routing, train
from moepeft.checkpoints.hf import model as hf
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.evaluation.routing import rows
from moepeft.evaluation.routing.reduce import merge_to_lora
from moepeft.inference.loaded_model import load_model, load_run

from ... import chat_cases, commands
from ...training.test_train import card
from . import planted
from .planted import CONFIG


def read(path, tokenizer=None, most=9):
  run = types.SimpleNamespace(
    config=config_lib.default(), tokenizer=tokenizer or ByteTokenizer()
  )
  return rows.read(run, planted.collator(), str(path), most)


def dump(path, *lines):
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def test_rows_have_their_task_and_language(tmp_path):
  row = {'inputs': 'x', 'targets': 'y'}
  path = dump(
    tmp_path / 'mine.jsonl',
    row | {'task': 'b', 'language': 'de'},
    row | {'dataset': 'a'},
    row,
  )
  assert [(r.task, r.language, r.item.inputs) for r in read(path)] == [
    ('a', '', 'x'),
    ('b', 'de', 'x'),
    ('mine', '', 'x'),
  ]


def test_rows_of_a_task_are_evenly_spaced(tmp_path):
  lines = [{'inputs': str(i), 'targets': 'y'} for i in range(6)]
  path = dump(tmp_path / 'mine.jsonl', *lines)
  assert [r.item.inputs for r in read(path, most=3)] == ['0', '2', '4']


def test_conversations_are_rendered_by_the_chat_template(tmp_path):
  chat_cases.tokenizer().save_pretrained(tmp_path / 'tokenizer')
  tokenizer = HuggingFaceTokenizer(str(tmp_path / 'tokenizer'))
  turns = [{'role': 'user', 'content': 'hi'}]
  path = dump(tmp_path / 'x.jsonl', {'messages': turns, 'language': 'en'})
  (row,) = read(path, tokenizer)
  assert (row.task, row.language) == ('x', 'en')
  text = '<|im_start|>user\nhi<|im_end|>\n'
  assert tokenizer.show(row.item.ids) == text


def test_a_bad_row_is_named(tmp_path):
  path = dump(
    tmp_path / 'x.jsonl', {'inputs': 'x', 'targets': 'y', 'language': 3}
  )
  with pytest.raises(ValueError, match="line 1: expected text in 'language'"):
    read(path)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ((), 'name one run'),
    (('a', 'b'), 'name one run'),
    (('a',), '--output is missing'),
    (('a', '--split=2', '--prune=2'), '--split is for a LoRA'),
    (('a', '--router=topk(k=2)'), 'router of --split=EXPERTS; give both'),
    (('a', '--output={}/page', '--task=x'), '--merge averages; give both'),
    (('{}/none', '--output={}/page'), 'is no work directory of moepeft.train'),
  ],
)
def test_a_wrong_command_line_is_one_sentence(tmp_path, args, message):
  args = [arg.format(tmp_path) for arg in args]
  done = commands.run('moepeft.routing', *args)
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.count('\n') == 1


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """A run of the planted model's base on two of the embedded tasks."""
  _, variables = planted.model()
  base = tmp_path_factory.mktemp('base') / 'hf'
  hf.save(str(base), CONFIG, variables['params'])
  workdir = str(tmp_path_factory.mktemp('begun'))
  config = card(str(base), steps=2, **{'data.tasks': 'stars,kind'})
  train.train(config, workdir)
  return workdir


def test_a_run_s_held_out_rows_are_routed_and_shown(begun, tmp_path):
  run = load_run(begun)
  # 32 held-out rows of each task.
  collected = routing.collect_run(run, max_examples=5, texts=1)
  assert collected.tasks == ('kind', 'stars') and collected.rows == 10
  assert [text.task for text in collected.texts] == ['kind', 'stars']
  folder = str(tmp_path / 'page')
  index, *drawn = routing.write(run, collected, folder)
  html = (tmp_path / 'page' / 'index.html').read_text()
  assert index == f'{folder}/index.html' and '"path": "' in html
  names = {path.rpartition('/')[2] for path in drawn}
  assert {'experts.png', 'router_weight.png', 'router_entropy.png'} < names
  assert 'expert_by_task_decoder_cross.png' in names


def test_a_reduced_adapter_is_written_and_has_its_loss(begun, tmp_path):
  run = load_run(begun)
  rows = routing.read_rows(run, max_examples=3)
  collected = routing.collect_rows(run, rows)
  reduced = merge_to_lora(
    run.model.adapter_map, run.variables['peft'], collected, 6
  )
  path = str(tmp_path / 'lora')
  before, after = routing.save_derived(run, reduced, path, rows)
  # Two steps have hardly moved B from zero: both are nearly the base.
  assert after == pytest.approx(before, rel=1e-3)
  loaded = load_model(run.config.model.path, path)
  assert loaded.method.startswith('lora(rank=6, alpha=6.0')
  with pytest.raises(ValueError, match='already contains adapter.json'):
    routing.save_derived(run, reduced, path, rows)
