# SPDX-License-Identifier: Apache-2.0
"""Texts of batches are those of rows alone, and end where they should."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import prompts
from moepeft.answering import Answering
from moepeft.beams import Beams
from moepeft.data.vocabulary import Bytes
from moepeft.decoding import greedy
from moepeft.generation import Generation, Settings, keys
from moepeft.models.decoder import Decoder, DecoderConfig
from moepeft.nn.start import fresh
from moepeft.sampling import Sampling
from moepeft.talk import Manner, Talk, conversation

from .contracts import small

WORDS = Bytes()
T5 = dataclasses.replace(
  small.GATED, vocab=263, encoder_layers=1, decoder_layers=1
)
DECODER = DecoderConfig(
  vocab=263,
  d_model=11,
  heads=3,
  kv_heads=1,
  head_dim=6,
  ffn=17,
  layers=1,
  length=127,
)
TEXTS = ['a', 'where is it?', '你好']
# Of a few hundred ids, those that are letters.
LETTERS = {ord(c) + 3 for c in 'abcdefghijklmnopqrstuvwxyz '}


@functools.cache
def made(kind):
  """A model that says letters, with weights that matter."""
  if kind == 't5':
    model, _ = small.make('full', T5)
    variables = {'params': small.params(T5)}
  else:
    model = Decoder(DECODER)
    variables = fresh(model, {'inputs': jnp.zeros((1, 2), jnp.int32)}, 1)
  keys = iter(jax.random.split(jax.random.key(2), 999))
  moved = lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape)  # noqa: E731
  variables = jax.tree.map(moved, variables)
  others = [i for i in range(263) if i not in LETTERS]
  kernel = np.array(variables['params']['head']['kernel'])
  kernel[:, others] = 0
  variables['params']['head']['kernel'] = jnp.asarray(kernel)
  return model, variables


def ids(kind, texts=TEXTS):
  return [prompts.plain(WORDS, text, kind == 'decoder') for text in texts]


def generation(kind, **settings):
  settings = {'length': 11, 'ends': (-1,), **settings}
  return Generation(made(kind)[0], WORDS, Settings(**settings))


KINDS = pytest.mark.parametrize('kind', ['t5', 'decoder'])


@KINDS
def test_texts_are_those_of_the_loop_and_of_rows_alone(kind):
  model, variables = made(kind)
  rows = ids(kind)
  found = generation(kind).texts(variables, rows)
  assert list(map(len, found)) == [11] * 3
  # The second without padding and neighbours.
  inputs = jnp.array([rows[1]])
  alone = greedy(model, variables, {'inputs': inputs}, 11, eos=-1)
  assert found[1] == WORDS.decode(alone[0].tolist())
  assert generation(kind).texts(variables, rows[::-1]) == found[::-1]


@KINDS
@pytest.mark.parametrize('every', [1, 3, 99])
def test_streamed_texts_are_the_texts(kind, every):
  variables = made(kind)[1]
  ours, rows = generation(kind), ids(kind)
  news = list(ours.stream(variables, rows, every=every))
  found = [
    ''.join(parts) for parts in zip(*[n.texts for n in news], strict=True)
  ]
  assert found == ours.texts(variables, rows)
  assert sum(n.tokens for n in news) == 3 * 11
  # One at the start, then so many at once, then what was held back.
  assert len(news) == 2 + -(-10 // every)


@KINDS
def test_texts_end_at_stop_strings_and_at_ids(kind):
  variables = made(kind)[1]
  rows = ids(kind)
  free = generation(kind).texts(variables, rows)
  stop = free[1][4:6]
  cut = [text.split(stop)[0] for text in free]
  assert generation(kind, stops=(stop, 'Z')).texts(variables, rows) == cut
  end = ord(free[0][3]) + 3
  ended = [text.split(free[0][3])[0] for text in free]
  assert generation(kind, ends=(end, 1)).texts(variables, rows) == ended
  # A row that stopped is told no more tokens of.
  news = generation(kind, stops=(stop,)).stream(variables, rows, every=1)
  alone = generation(kind, stops=(stop,)).stream(variables, rows[1:2], every=1)
  assert sum(n.tokens for n in alone) == len(cut[1]) + 2
  assert sum(n.tokens for n in news) <= 3 * 11


@KINDS
def test_a_seed_says_the_same_again_whatever_stands_beside(kind):
  variables, rows = made(kind)[1], ids(kind)
  ours = generation(kind, sampling=Sampling(temperature=2.0, top_k=20))
  found = ours.texts(variables, rows, keys(7, 3))
  assert ours.texts(variables, rows, keys(7, 3)) == found
  assert ours.texts(variables, rows, keys(8, 3)) != found
  assert ours.texts(variables, rows[2:], keys(7, 3)[2:]) == found[2:]


@KINDS
def test_beams_are_texts_too(kind):
  variables, rows = made(kind)[1], ids(kind)
  found = generation(kind, beams=Beams(3)).texts(variables, rows)
  assert list(map(len, found)) == [11] * 3
  one = generation(kind, beams=Beams(1)).texts(variables, rows)
  assert one == generation(kind).texts(variables, rows)


def test_evaluations_answer_with_decoders_as_with_t5():
  model, variables = made('decoder')
  ours = Answering(model, WORDS, 64, 11, 2)
  expected = generation('decoder', ends=(WORDS.eos,)).texts(
    variables, ids('decoder')
  )
  assert ours.texts(variables, TEXTS) == expected
  # The end of a prompt is kept.
  short = Answering(model, WORDS, 5, 11, 2)
  assert short.texts(variables, ['x' * 9 + 'is it']) == short.texts(
    variables, ['is it']
  )


@pytest.mark.parametrize(
  'values, message',
  [
    ({'length': 0}, 'at least 1 token; got length=0'),
    ({'length': 3, 'least': 4}, 'from 0 to length=3; got 4'),
    ({'beams': Beams(2), 'least': 1}, 'beams are searched'),
    ({'beams': Beams(2), 'sampling': Sampling(1.0)}, 'beams are searched'),
  ],
)
def test_settings_that_cannot_be_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    Settings(**{'length': 11, 'ends': (1,), **values})


def test_a_prompt_longer_than_the_model_is_refused():
  ours = generation('decoder')
  with pytest.raises(ValueError, match='120 tokens and an answer up to 11'):
    ours.texts(made('decoder')[1], [[5] * 120])


def test_an_empty_prompt_is_refused():
  with pytest.raises(ValueError, match='an empty prompt'):
    prompts.plain(WORDS, '', decoder_only=True)
  assert prompts.plain(WORDS, '', decoder_only=False) == [1]


def test_ends_are_the_vocabularys_and_the_models(tmp_path):
  assert prompts.ends(WORDS, str(tmp_path)) == (1,)
  for said, expected in ((7, (1, 7)), ([7, 1, 9], (1, 7, 9)), (None, (1,))):
    file = tmp_path / 'generation_config.json'
    file.write_text(json.dumps({'eos_token_id': said}))
    assert prompts.ends(WORDS, str(tmp_path)) == expected


def talk(kind, sampling=None, stops=(), **manner):
  how = sampling or Sampling()
  settings = Settings(11, (-1,), sampling=how, stops=stops)
  return Talk(*made(kind), WORDS, settings, Manner(**manner))


@KINDS
def test_a_talk_prints_the_same_streamed_and_in_batches(kind, capsys):
  expected = generation(kind).texts(made(kind)[1], ids(kind))
  for manner in ({}, {'streamed': True}, {'batch_size': 2}):
    ours = talk(kind, **manner)
    ours.all(TEXTS)
    assert capsys.readouterr().out.splitlines() == expected
    assert ours.speed.tokens == 33 and ours.speed.seconds > 0
  ours.each(iter(TEXTS))
  assert capsys.readouterr().out.splitlines() == expected


def test_answers_to_a_prompt_differ_and_do_not_depend_on_others(capsys):
  # The five most probable are letters, none of them a line break.
  warm = Sampling(temperature=3.0, top_k=5)

  def said(texts, **manner):
    talk('decoder', warm, num=3, seed=5, **manner).all(texts)
    return capsys.readouterr().out.splitlines()

  found = said(TEXTS)
  # Two of three may end at once; all three never do here.
  assert all(len(set(found[i : i + 3])) > 1 for i in (0, 3, 6))
  assert said(TEXTS[1:2]) == found[3:6]
  assert said(TEXTS[:2], streamed=True) == found[:6]


def test_a_conversation_is_turns_of_both():
  assert conversation('Be brief.', ['a', 'b', 'c']) == [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
    {'role': 'user', 'content': 'c'},
  ]
  with pytest.raises(ValueError, match='bytes has no chat template'):
    talk('decoder', chat=True).all(['a'])


def command(*args, **options):
  return subprocess.run(
    [sys.executable, '-m', 'moepeft.generate', *args],
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
    **options,
  )


def test_the_command_answers_from_a_model_and_from_the_terminal():
  done = command('--model=package:t5_tiny', '--length=5', input='ab\n\ncd\n')
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) >= 2
  assert 'tokens/s' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  'args, said',
  [
    ((), 'one of --workdir'),
    (('--model=package:none', '--prompt=a'), "ships no model 'none'"),
    (('--model=/nowhere/x', '--prompt=a'), '/nowhere/x'),
    (('--model=x', '--temperature=-1'), 'temperature is at least 0'),
    (('--model=x', '--num=2'), 'set --temperature'),
    (('--model=x', '--file=/nowhere/y', '--prompt=a'), 'leave one out'),
    (('--model=package:t5_tiny', '--prompt=a', '--chat'), 'no chat template'),
  ],
)
def test_bad_flags_are_one_sentence(args, said):
  done = command(*args, stdin=subprocess.DEVNULL)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()[-1:]
  assert line.startswith('error: ') and said in line
  assert 'Traceback' not in done.stderr
