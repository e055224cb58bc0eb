# SPDX-License-Identifier: Apache-2.0
"""Texts of batches are those of rows alone, and end where they should."""

import dataclasses
import functools
import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft import generate
from moepeft.data.chat.formats import Turn
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.evaluation.greedy_answers import BatchGenerator
from moepeft.evaluation.rank_classification import Ranker
from moepeft.inference import prompts
from moepeft.inference.beam_search import BeamConfig
from moepeft.inference.chat_repl import ChatRepl, ReplConfig
from moepeft.inference.generator import (
  GenerationConfig,
  Generator,
  row_seeds,
)
from moepeft.inference.sampling import Sampling
from moepeft.models.decoder.model import Decoder, DecoderConfig
from moepeft.nn.initializers import init_params
from moepeft.tasks import Example

from .. import chat_cases, commands
from ..contracts import answers, small

EMPTY = tempfile.NamedTemporaryFile()
WORDS = ByteTokenizer()
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
# Of a length that is no power of two, which lengths are rounded up to.
LEARNED = dataclasses.replace(
  DECODER,
  family='gpt2',
  kv_heads=3,
  positions='learned',
  length=97,
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
    model = Decoder(LEARNED if kind == 'learned' else DECODER)
    variables = init_params(model, {'inputs': jnp.zeros((1, 2), jnp.int32)}, 1)
  variables = small.moved(variables, 0.3, 2)
  others = [i for i in range(263) if i not in LETTERS]
  kernel = np.array(variables['params']['head']['kernel'])
  kernel[:, others] = 0
  variables['params']['head']['kernel'] = jnp.asarray(kernel)
  return model, variables


def ids(kind, texts=TEXTS):
  return [prompts.encode_text(WORDS, text, kind != 't5') for text in texts]


@functools.cache
def generation(kind, **settings):
  settings = {'max_new_tokens': 11, 'eos_token_ids': (-1,), **settings}
  return Generator(*made(kind), WORDS, GenerationConfig(**settings))


KINDS = pytest.mark.parametrize(
  'kind', ['decoder', pytest.param('t5', marks=pytest.mark.slow)]
)


@KINDS
def test_texts_are_those_of_whole_calls_and_of_rows_alone(kind):
  model, variables = made(kind)
  rows = ids(kind)
  actual = generation(kind).generate_texts(rows)
  assert list(map(len, actual)) == [11] * 3
  # The second without padding and neighbours.
  alone = answers.uncached_greedy(model, variables, rows[1], 11)
  assert actual[1] == WORDS.decode(alone)
  assert generation(kind).generate_texts(rows[::-1]) == actual[::-1]


@KINDS
def test_streamed_texts_are_the_texts(kind):
  actual, rows = generation(kind), ids(kind)
  texts, tokens = [''] * 3, [0] * 3
  for chunk in actual.stream(rows):
    texts[chunk.row] += chunk.text
    tokens[chunk.row] += chunk.token is not None
  assert texts == actual.generate_texts(rows)
  assert tokens == [11] * 3


@KINDS
def test_texts_end_at_stop_strings_and_at_ids(kind):
  rows = ids(kind)
  free = generation(kind).generate_texts(rows)
  stop = free[1][4:6]
  cut = [text.split(stop)[0] for text in free]
  actual = generation(kind, stop_strings=(stop, 'Z'))
  assert actual.generate_texts(rows) == cut
  end = ord(free[0][3]) + 3
  ended = [text.split(free[0][3])[0] for text in free]
  assert generation(kind, eos_token_ids=(end, 1)).generate_texts(rows) == ended
  # No token is computed after the stop string.
  chunks = list(actual.stream(rows[1:2]))
  assert [c.token is None for c in chunks] == [False] * (len(cut[1]) + 2) + [
    True
  ]


@KINDS
def test_a_seed_says_the_same_again_whatever_stands_beside(kind):
  rows = ids(kind)
  candidate = generation(kind, sampling=Sampling(temperature=2.0, top_k=20))
  actual = candidate.generate_texts(rows, row_seeds(7, 3))
  assert candidate.generate_texts(rows, row_seeds(7, 3)) == actual
  assert candidate.generate_texts(rows, row_seeds(8, 3)) != actual
  assert candidate.generate_texts(rows[2:], row_seeds(7, 3)[2:]) == actual[2:]


@KINDS
def test_beams_are_texts_too(kind):
  rows = ids(kind)
  actual = generation(kind, beams=BeamConfig(3)).generate_texts(rows)
  assert list(map(len, actual)) == [11] * 3
  one = generation(kind, beams=BeamConfig(1)).generate_texts(rows)
  assert one == generation(kind).generate_texts(rows)
  stop = actual[1][4:6]
  stopped = generation(kind, beams=BeamConfig(3), stop_strings=(stop,))
  cut = [text.split(stop)[0] for text in actual]
  assert stopped.generate_texts(rows) == cut


def test_evaluations_answer_with_decoders_as_with_t5():
  model, variables = made('decoder')
  actual = BatchGenerator(model, WORDS, 64, 11, 2)
  # In the form of training: a line's end stands between inputs and targets.
  expected = generation('decoder', eos_token_ids=(WORDS.eos,)).generate_texts(
    ids('decoder', [f'{text}\n' for text in TEXTS])
  )
  assert actual.texts(variables, TEXTS) == expected
  assert generate.answer(model, variables, WORDS, TEXTS, 11) == expected
  # The end of a prompt is kept.
  short = BatchGenerator(model, WORDS, 6, 11, 2)
  long = short.texts(variables, ['x' * 9 + 'is it'])
  assert long == short.texts(variables, ['is it'])


def test_a_prompt_that_is_cut_still_begins_as_texts_do():
  words = ByteTokenizer(bos=2)
  actual = BatchGenerator(made('decoder')[0], words, 5, 11, 2)
  # Bytes plus 3: c 102, d 103, e 104, and the line's end 13.
  assert actual._encode('abcde') == ([2, 102, 103, 104, 13], True)
  assert actual._encode('cde') == ([2, 102, 103, 104, 13], False)
  row = Example('t', 'p', 0, 'abcde', 'y', ('y', 'n'), 0)
  ranker = Ranker(made('decoder')[0], words, 5, 3, 2)
  (ranked,) = ranker.prepare([row])
  assert list(ranked.inputs) == [2, 102, 103, 104, 13] and ranked.cut


def uncached(prompt, count):
  """Greedy tokens of whole calls, in rows as long as there are places."""
  model, variables = made('learned')
  text = np.zeros((1, 97), np.int32)
  text[0, : len(prompt)] = prompt
  for at in range(len(prompt), len(prompt) + count):
    logits = plain_call(model, variables, {'inputs': text})
    text[0, at] = np.argmax(logits[0, at - 1])
  return text[0, len(prompt) : len(prompt) + count].tolist()


@functools.partial(jax.jit, static_argnums=0)
def plain_call(model, variables, batch):
  return model.apply(variables, batch)


def test_all_learned_positions_are_used_and_no_other():
  # 86 + 11 = 97. Rounded up they would be 128 + 32.
  prompt = np.random.default_rng(0).integers(3, 259, 86).tolist()
  expected = uncached(prompt, 11)
  actual = generation('learned')
  assert actual.generate_ids([prompt]) == [expected]
  together = actual.generate_ids([[5], prompt, prompt[:70]])
  assert together == [uncached([5], 11), expected, uncached(prompt[:70], 11)]
  searched = generation('learned', beams=BeamConfig(1))
  assert searched.generate_ids([prompt]) == [expected]
  chunks = list(actual.stream([prompt]))
  assert ''.join(chunk.text for chunk in chunks) == WORDS.decode(expected)
  for wrong in (actual, searched):
    with pytest.raises(ValueError, match='87 tokens and an answer up to 11'):
      wrong.generate_ids([[5], [*prompt, 5]])


def test_an_evaluation_uses_all_learned_positions_and_refuses_more():
  model, variables = made('learned')
  candidate = BatchGenerator(model, WORDS, 86, 11, 2)
  text = 'which one is it? ' * 9
  # The last 85 bytes, and the line's end.
  expected = uncached([*WORDS.encode(text)[-85:], 13], 11)
  (actual,) = candidate.texts(variables, [text])
  assert actual == WORDS.decode([i for i in expected if i > 1])
  for kind, most in (('learned', 87), ('decoder', 117)):
    with pytest.raises(ValueError, match=f'has {most} tokens and an answer up'):
      BatchGenerator(made(kind)[0], WORDS, most, 11, 2)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'max_new_tokens': 0}, 'at least 1 token; got max_new_tokens=0'),
    ({'min_new_tokens': 12}, 'from 0 to max_new_tokens=11; got 12'),
    ({'stop_strings': ('a', '')}, 'a stop string is empty'),
    ({'beams': BeamConfig(2), 'min_new_tokens': 1}, 'beams are searched'),
    ({'beams': BeamConfig(2), 'sampling': Sampling(1.0)}, 'beams are searched'),
    (
      {
        'beams': BeamConfig(2),
        'sampling': Sampling(logit_bias=((3, 1.0),)),
      },
      'beams are searched',
    ),
  ],
)
def test_settings_that_cannot_be_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    GenerationConfig(**{'max_new_tokens': 11, 'eos_token_ids': (1,), **values})


def test_a_prompt_longer_than_the_model_is_refused():
  actual = generation('decoder')
  with pytest.raises(ValueError, match='120 tokens and an answer up to 11'):
    actual.generate_texts([[5] * 120])


def test_an_empty_prompt_is_refused():
  with pytest.raises(ValueError, match='the prompt is empty'):
    prompts.encode_text(WORDS, '', decoder_only=True)
  with pytest.raises(ValueError, match='prompt 1 has no token'):
    generation('decoder').generate_texts([[5], []])
  assert prompts.encode_text(ByteTokenizer(bos=2), '', decoder_only=True) == [2]
  assert prompts.encode_text(WORDS, '', decoder_only=False) == [1]


def test_ends_are_the_templates_too(tmp_path):
  # <|im_end|> is 2, and not the end of this vocabulary's texts.
  words = templated_words()
  words.eos = 0
  assert prompts.eos_token_ids(words, '') == (0, 2)
  # An end that is text is none, and what cannot be rendered has none.
  words.tokenizer.chat_template = "{{ messages[-1]['content'] }}!"
  assert prompts.eos_token_ids(words, '') == (0,)
  words.tokenizer.chat_template = "{{ raise_exception('no') }}"
  assert prompts.eos_token_ids(words, '') == (0,)


def test_ends_are_those_of_a_gguf_file(monkeypatch):
  said = {'tokenizer.ggml.eos_token_id': 5, 'tokenizer.ggml.eot_token_id': 7}
  monkeypatch.setattr(prompts.gguf, 'metadata', lambda path: said)
  assert prompts.eos_token_ids(WORDS, '/some/m.gguf') == (1, 5, 7)


def test_an_answering_ends_where_it_is_told():
  model, variables = made('decoder')
  free = BatchGenerator(model, WORDS, 64, 5, 3)
  assert all(free.texts(variables, TEXTS))
  # At whatever comes first.
  ends = range(263)
  actual = BatchGenerator(model, WORDS, 64, 5, 3, eos_token_ids=ends)
  assert actual.texts(variables, TEXTS) == ['', '', '']


def test_ends_are_the_vocabularys_and_the_models(tmp_path):
  assert prompts.eos_token_ids(WORDS, str(tmp_path)) == (1,)
  for said, expected in ((7, (1, 7)), ([7, 1, 9], (1, 7, 9)), (None, (1,))):
    file = tmp_path / 'generation_config.json'
    file.write_text(json.dumps({'eos_token_id': said}))
    assert prompts.eos_token_ids(WORDS, str(tmp_path)) == expected


def talk(kind, sampling=None, stops=(), ask=None, **manner):
  how = sampling or Sampling()
  settings = dict(sampling=how, stop_strings=stops)
  ask = ask or (lambda turns: ids(kind, turns[-1:])[0])
  return ChatRepl(generation(kind, **settings), ask, ReplConfig(**manner))


@KINDS
def test_a_talk_prints_the_same_streamed_and_in_batches(kind, capsys):
  expected = generation(kind).generate_texts(ids(kind))
  for manner in ({}, {'stream': True}, {'batch_size': 2}):
    actual = talk(kind, **manner)
    actual.answer_all(TEXTS)
    assert capsys.readouterr().out.splitlines() == expected
    assert actual.speed.tokens == 33 and actual.speed.seconds > 0
  actual.answer_each(iter(TEXTS))
  assert capsys.readouterr().out.splitlines() == expected


def test_answers_to_a_prompt_differ_and_do_not_depend_on_others(capsys):
  # The five most probable are letters, none of them a line break.
  warm = Sampling(temperature=3.0, top_k=5)

  def said(texts, **manner):
    talk('decoder', warm, num=3, seed=5, **manner).answer_all(texts)
    return capsys.readouterr().out.splitlines()

  actual = said(TEXTS)
  # Two of three may end at once; all three never do here.
  assert all(len(set(actual[i : i + 3])) > 1 for i in (0, 3, 6))
  assert said(TEXTS[1:2]) == actual[3:6]
  assert said(TEXTS[:2], stream=True) == actual[:6]


def test_no_prompt_is_answered_where_one_cannot_be(capsys):
  with pytest.raises(ValueError, match='120 tokens and an answer up to 11'):
    talk('decoder', batch_size=1).answer_all(['a', 'b' * 120])
  assert capsys.readouterr().out == ''


def test_far_from_the_end_of_many_prompts_is_told_beside_the_answers(capsys):
  talk('decoder', batch_size=2).answer_all(TEXTS)
  output = capsys.readouterr()
  assert output.out.splitlines() == generation('decoder').generate_texts(
    ids('decoder')
  )
  assert 'answered 3/3' in output.err


def test_a_chat_asks_with_all_that_was_said_before(capsys):
  requests = []

  def ask(turns):
    requests.append(list(turns))
    return ids('decoder', turns[-1:])[0]

  talk('decoder', ask=ask, chat=True).answer_each(['a', 'b'])
  first, _ = capsys.readouterr().out.splitlines()
  assert requests == [['a'], ['a', first, 'b']]
  requests.clear()
  talk('decoder', ask=ask).answer_each(['a', 'b'])
  assert requests == [['a'], ['b']]


def chat_data(**changes):
  data = config_lib.default().data
  data.update(changes)
  return data


def templated_words(**options):
  words = HuggingFaceTokenizer.__new__(HuggingFaceTokenizer)
  words._tokenizer = chat_cases.tokenizer(**options)
  words._path = 'some/path'
  words.size = len(words._tokenizer)
  return words


def test_a_chat_is_asked_as_it_is_trained(tmp_path):
  words = templated_words()
  talk = prompts.to_conversation(['a', 'b', 'c'])
  assert [turn.role for turn in talk.turns] == ['user', 'assistant', 'user']
  # What training makes of it and an answer, up to that answer.
  answered = dataclasses.replace(
    talk, turns=(*talk.turns, Turn('assistant', 'd'))
  )
  own = tmp_path / 'own.jinja'
  shouted = chat_cases.CHATML.replace('assistant', 'ASSISTANT')
  own.write_text(shouted.replace("m['role']", "m['role'].upper()"))
  for system in ('', 'Be brief.'):
    for path in ('', str(own)):
      data = chat_data(chat_template=path, system_prompt=system)
      actual = prompts.load_chat_template(words, data)
      trained = actual.encode(answered)
      # 'd', the end of its turn and a line's end.
      assert actual.encode_prompt(talk) == trained.ids[:-3].tolist()
      said = words.tokenizer.decode(actual.encode_prompt(talk))
      assert (system in said) and ('Be brief.' in said) == bool(system)
      assert said.endswith('ASSISTANT\n' if path else 'assistant\n')
  data = chat_data(system_prompt='Be brief.')
  other = prompts.load_chat_template(words, data, 'Be long.')
  said = words.tokenizer.decode(other.encode_prompt(talk))
  assert 'Be long.' in said and 'Be brief.' not in said


def test_a_chat_without_a_template_is_refused():
  for words in (WORDS, templated_words(template=None)):
    with pytest.raises(ValueError, match='has no chat template; leave out'):
      prompts.load_chat_template(words, chat_data())
  refusing = templated_words(template="{{ raise_exception('no turns') }}")
  with pytest.raises(ValueError, match='cannot render the conversation'):
    prompts.load_chat_template(refusing, chat_data()).encode_prompt(
      prompts.to_conversation(['a'])
    )


def test_the_command_answers_from_a_model_and_from_the_terminal():
  done = commands.run(
    'moepeft.generate',
    '--model=package:t5_tiny',
    '--max_new_tokens=5',
    stdin='ab\n\ncd\n',
  )
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) >= 2
  assert 'tokens/s' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  'args, said',
  [
    ((), 'one of --workdir'),
    (('--model=package:none', '--prompt=a'), "ships no 'none'"),
    (('--model=/nowhere/x', '--prompt=a'), '/nowhere/x'),
    (('--model=x', '--temperature=-1'), '-1.0 is not a number in the range'),
    (
      ('--model=x', '--num_return_sequences=2'),
      'set --temperature',
    ),
    (('--model=x', '--beams=2'), '--beams is called --num_beams now'),
    (('--model=x', '--length', '3'), 'is called --max_new_tokens now'),
    (
      ('--model=x', '--temperature=1', '--top_p=1.5'),
      '1.5 is not a number in the range',
    ),
    (('--model=x', '--temperature=1', '--num_beams=2'), 'beams are searched'),
    (
      ('--model=x', '--num_beams=0'),
      '--num_beams=0: 0 is not an integer in the range',
    ),
    (('--model=x', '--length_penalty=2'), 'set --num_beams above 1, too'),
    (('--model=x', '--early_stopping=yes'), 'set --num_beams above 1, too'),
    (('--model=x', '--frequency_penalty=3'), '3.0 is not a number in the'),
    (('--model=x', '--logit_bias=a=1'), "--logit_bias='a=1' is not ID=BIAS"),
    (('--model=x', '--logit_bias=5=101'), 'logit_bias is from -100 to 100'),
    (
      ('--model=package:t5_tiny', '--prompt=a', '--logit_bias=99999=1'),
      'a token of logit_bias is from 0 to',
    ),
    (
      ('--model=x', '--presence_penalty=1', '--num_beams=2'),
      'beams are searched',
    ),
    (('--model=x', '--stop_strings='), 'a stop string is empty'),
    (('--model=x', '--checkpoint=3'), 'name it with --workdir'),
    (
      ('--model=x', '--batch_size=0'),
      '--batch_size=0: 0 is not an integer in the range',
    ),
    (
      ('--model=x', '--file=/nowhere/y'),
      'cannot be read (No such',
    ),
    (('--model=x', '--file=/'), "'/' cannot be read (Is a directory)"),
    (('--model=x', f'--file={sys.executable}'), 'it is not UTF-8'),
    (('--model=x', '--file=/dev/null'), 'it is a device'),
    (('--model=x', f'--file={EMPTY.name}'), 'holds no line of text'),
    (('--model=x', '--system=a'), 'add --chat'),
    (('--model=x', '--file=/nowhere/y', '--prompt=a'), 'leave one out'),
    (('--model=package:t5_tiny', '--prompt=a', '--chat'), 'no chat template'),
  ],
)
def test_bad_flags_are_one_sentence(args, said):
  done = commands.run('moepeft.generate', *args)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()[-1:]
  assert line.startswith('error: ') and said in line
  assert 'Traceback' not in done.stderr
