# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: vectors in front of texts, wherever texts become ids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import config as config_lib
from moepeft.answering import Answering
from moepeft.data import text
from moepeft.data.answers import form_of
from moepeft.data.causal import Sample, Samples, sample
from moepeft.data.forms import Pairs, form
from moepeft.data.vocabulary import Bytes
from moepeft.decoding import How, greedy, start
from moepeft.generation import Generation, Settings
from moepeft.likelihood import Likelihood
from moepeft.models import decoder, t5
from moepeft.models.decoder import Decoder
from moepeft.nn.start import fresh
from moepeft.objectives.loss import mean
from moepeft.objectives.seq2seq import objective
from moepeft.peft import build
from moepeft.peft.prompt import before, placeholders
from moepeft.ranking import Ranker
from moepeft.sampling import Sampling
from moepeft.tasks import Example

from .contracts import small, small_decoders

METHOD = 'prompt(length=3)'
FRONT = (37, 38, 39)
# float32 sums of other order over a few layers.
CLOSE = dict(rtol=2e-5, atol=2e-5)
CONFIGS = {
  't5': small.GATED,
  # Its head is the table.
  't5 1.0': small.RELU,
  'llama': small_decoders.CONFIGS['llama'],
  # Vectors are scaled as tokens are, and given learned positions.
  'gemma': small_decoders.CONFIGS['gemma'],
  'gpt2': small_decoders.CONFIGS['gpt2'],
}
every = pytest.mark.parametrize('kind', CONFIGS)


def module(config):
  return t5 if isinstance(config, t5.T5Config) else decoder


def model_of(config, method=METHOD):
  own = module(config)
  return own.MODULE(config, build(method, own.sites(config)).advice)


@functools.cache
def made(config, method=METHOD, noise=0.3):
  """(model, variables), the prompt off the rows that it starts from."""
  if module(config) is t5:
    return small.make(method, config)[0], small.variables(method, config, noise)
  return small_decoders.make(config, method, noise)


@functools.cache
def applied(model):
  return jax.jit(model.apply)


def batch_of(config, front=FRONT):
  """A batch of the config's, with ids in front of its texts."""
  if module(config) is t5:
    found = small.batch()
  else:
    found = small_decoders.batch()
  b = len(found['inputs'])
  ids = jnp.broadcast_to(jnp.array(front, jnp.int32), (b, len(front)))
  real = jnp.ones((b, len(front)), bool)
  return found | {
    'inputs': jnp.concatenate([ids, found['inputs']], axis=1),
    'inputs_mask': jnp.concatenate([real, found['inputs_mask']], axis=1),
  }


def longer(params, vectors):
  """A base whose table has rows more: the vectors."""
  table = params['embed']['embedding']
  rows = jnp.concatenate([table, vectors])
  found = {**params, 'embed': {'embedding': rows}}
  if 'kernel' in params.get('head', {}):
    more = ((0, 0), (0, len(vectors)))
    found['head'] = {'kernel': jnp.pad(params['head']['kernel'], more)}
  return found


@every
def test_a_prompt_is_rows_more_of_the_table(kind):
  config = CONFIGS[kind]
  model, variables = made(config)
  batch = batch_of(config)
  found = applied(model)(variables, batch)
  vectors = variables['peft']['embed']['prompt']['vectors']
  wide = dataclasses.replace(config, vocab=config.vocab + 3)
  base = {'params': longer(variables['params'], vectors)}
  expected = applied(model_of(wide, 'full'))(base, batch)
  real = batch['targets_mask' if module(config) is t5 else 'inputs_mask']
  np.testing.assert_allclose(
    found[real], expected[real][:, : config.vocab], **CLOSE
  )
  # Else it would show nothing.
  plain = applied(model)(variables, batch_of(config, (5, 6, 7)))
  assert np.abs(plain - found)[real].max() > 0.01


@every
def test_a_row_without_placeholders_is_the_bases_bit_for_bit(kind):
  config = CONFIGS[kind]
  model, variables = made(config)
  batch = batch_of(config, ())
  np.testing.assert_array_equal(
    applied(model)(variables, batch),
    applied(model_of(config, 'full'))({'params': variables['params']}, batch),
  )


def test_a_prompt_starts_as_tokens_that_differ():
  params = small.params()
  model = model_of(small.GATED, 'prompt(length=7)')
  found = fresh(model, small.batch(), 5, params)['peft']['embed']['prompt']
  table = np.asarray(params['embed']['embedding'])
  rows = [int(np.abs(table - row).sum(1).argmin()) for row in found['vectors']]
  assert len(set(rows)) == 7
  np.testing.assert_array_equal(found['vectors'], table[rows])
  again = fresh(model, small.batch(), 6, params)['peft']['embed']['prompt']
  assert (again['vectors'] != found['vectors']).any()


def test_a_prompt_may_be_longer_than_the_vocabulary():
  model = model_of(small.GATED, 'prompt(length=41)')
  found = fresh(model, small.batch(), 5, small.params())['peft']
  assert found['embed']['prompt']['vectors'].shape == (41, 11)


def test_prompts_stand_at_the_embedding_only():
  with pytest.raises(ValueError, match="acts at 'embed' only"):
    fresh(model_of(small.GATED, "prompt(sites='head')"), small.batch(), 0)


def test_placeholders_are_the_ids_after_the_vocabulary():
  assert before(model_of(small.GATED)) == FRONT
  assert before(model_of(small.GATED, f'lora + {METHOD}')) == FRONT
  assert placeholders(model_of(small.GATED, 'lora').advice, 37) == ()


@every
def test_training_a_prompt_lowers_the_loss_and_moves_nothing_else(kind):
  config = CONFIGS[kind]
  model, variables = made(config, METHOD, 0.0)
  batch = batch_of(config)
  if module(config) is decoder:
    targets = jnp.pad(batch['inputs'][:, 1:], ((0, 0), (0, 1)))
    real = batch['inputs_mask'] & (targets > 0) & (targets < config.vocab)
    batch |= {'targets': targets, 'targets_mask': real}
  optimizer = optax.adam(0.1)

  @jax.jit
  def update(peft, opt):
    def loss(peft):
      own = {**variables, 'peft': peft}
      return mean(*objective(model.apply, own, batch, None))

    value, gradient = jax.value_and_grad(loss)(peft)
    changes, opt = optimizer.update(gradient, opt)
    return optax.apply_updates(peft, changes), opt, value

  peft, opt = variables['peft'], optimizer.init(variables['peft'])
  assert [a.shape for a in jax.tree.leaves(peft)] == [(3, config.d_model)]
  losses = []
  for _ in range(20):
    peft, opt, value = update(peft, opt)
    losses.append(float(value))
  assert losses[-1] < 0.97 * losses[0]


WORDS = Bytes()
# Bytes need 259 ids.
T5 = dataclasses.replace(small.GATED, vocab=263)
LLAMA = dataclasses.replace(
  small_decoders.CONFIGS['llama'], vocab=263, length=127
)
BOTH = pytest.mark.parametrize('config', [T5, LLAMA], ids=['t5', 'llama'])
AHEAD = (263, 264, 265)


def example(inputs, targets, choices=()):
  return Example('t', 't', 0, inputs, targets, choices, 0 if choices else -1)


def test_placeholders_stand_before_a_decoders_text_and_nothing_of_it_changes():
  own = Samples(WORDS, 10, before=AHEAD)
  (found,) = own.encode([example('ab', 'c')])
  # Bytes plus 3: a 100, b 101, the line's end 13, c 102; EOS is 1.
  assert found.ids.tolist() == [*AHEAD, 100, 101, 13, 102, 1]
  np.testing.assert_array_equal(found.trained, [0, 0, 0, 0, 0, 0, 1, 1])
  # Of a text that is trained whole the first token follows a prompt, not a
  # text: it is not trained, as without a prompt.
  (whole,) = own.encode([Sample(np.array([5, 6]), np.ones(2, bool))])
  np.testing.assert_array_equal(whole.trained, [0, 0, 0, 0, 1])


def test_placeholders_count_in_a_decoders_row():
  own = Samples(WORDS, 7, before=AHEAD)
  # A row of 7 is fed, with one token more to predict: of 8, 3 are the prompt's.
  long = sample([9, 8, 7, 6], [5, 4])
  (found,) = own.encode([long])
  assert found.ids.tolist() == [*AHEAD, 8, 7, 6, 5, 4]
  assert own.cut([long]) == 1 and own.cut([sample([7, 6], [5, 4, 3])]) == 0
  rows = own.padded([found])
  assert rows['inputs'].tolist() == [[*AHEAD, 8, 7, 6, 5]]
  assert rows['targets_mask'].tolist() == [[False] * 5 + [True] * 2]


def test_placeholders_stand_before_the_inputs_of_pairs_and_count():
  own = Pairs(WORDS, 6, 4, before=AHEAD)
  found = own.encode(
    [example('a', 'b'), example('abcdef', 'b'), ([7, 8, 9, 6, 1], [5, 1])]
  )
  # Of six places the text has three, the last is EOS's.
  assert [list(map(int, x)) for x, _ in found] == [
    [*AHEAD, 100, 1],
    [*AHEAD, 100, 101, 1],
    [*AHEAD, 7, 8, 1],
  ]
  assert [list(map(int, y)) for _, y in found] == [[101, 1], [101, 1], [5, 1]]
  assert own.cut([example('abc', 'b')]) == 1
  assert own.cut([example('a', 'b')]) == 0


@pytest.mark.parametrize('predict', ['next', 'prefix', 'spans'])
def test_pieces_of_text_leave_room_for_the_prompt(predict):
  data = config_lib.default().data
  data.predict = predict
  # A piece has one token more than are fed; spans share a decoder's row.
  whole, behind = (
    text.maker(data, Samples(WORDS, n, before=front), 300)[0]
    for n, front in ((23, ()), (26, AHEAD))
  )
  assert whole == behind
  if predict == 'next':
    assert whole == 24
    return
  whole, behind = (
    text.maker(data, Pairs(WORDS, n, 9, before=front), 300)[0]
    for n, front in ((23, ()), (26, AHEAD))
  )
  assert whole == behind


def test_a_prompt_that_leaves_no_room_is_refused():
  with pytest.raises(ValueError, match='3 tokens leaves no room .*length=4'):
    Samples(WORDS, 4, before=AHEAD)
  with pytest.raises(ValueError, match='no room .*inputs_length=4'):
    Pairs(WORDS, 4, 4, before=AHEAD)


def test_answers_that_are_compared_have_no_prompt():
  data = config_lib.default().data
  data.source = 'preference'
  own = form(data, WORDS, LLAMA, 0, AHEAD)
  with pytest.raises(ValueError, match="'dpo' does not go with a soft prompt"):
    form_of(data, 'dpo', own)


EXAMPLES = [
  example('where', 'here'),
  example('a longer one', 'no'),
  example('x', 'yes it is'),
]


@BOTH
def test_packed_texts_have_a_prompt_each_and_are_as_alone(config):
  model, variables = made(config)
  if config is T5:
    own = Pairs(WORDS, 47, 29, before=AHEAD)
  else:
    own = Samples(WORDS, 64, before=AHEAD)
  encoded = own.encode(EXAMPLES)
  alone, packed = own.padded(encoded), own.laid(encoded, [[0, 1, 2]])
  assert len(packed['inputs']) == 1
  assert (packed['inputs'] >= 263).sum() == 9
  # Rows of one length have one program.
  logits = [applied(model)(variables, rows) for rows in (alone, packed)]
  found = np.asarray(logits[1][0][packed['targets_mask'][0]])
  np.testing.assert_allclose(
    found, np.asarray(logits[0])[alone['targets_mask']], **CLOSE
  )


def log_p(model, variables, config, text):
  """log p of each token of an example's targets, by hand."""
  x, y = text.inputs, text.targets
  y = [*WORDS.encode(y), WORDS.eos]
  if config is T5:
    x = [*AHEAD, *WORDS.encode(x), WORDS.eos]
    batch = {'inputs': [x], 'decoder_inputs': [[0, *y[:-1]]]}
  else:
    x = [*AHEAD, *WORDS.encode(x + '\n')]
    batch = {'inputs': [[*x, *y[:-1]]]}
  batch = {key: jnp.array(rows) for key, rows in batch.items()}
  logits = model.apply(variables, batch)[0, -len(y) :]
  return jax.nn.log_softmax(logits)[jnp.arange(len(y)), jnp.array(y)]


@BOTH
def test_likelihoods_and_rankings_are_of_texts_behind_the_prompt(config):
  model, variables = made(config)
  text = EXAMPLES[0]
  expected = float(log_p(model, variables, config, text).sum())
  likelihood = Likelihood(model, WORDS, 32, 16, 1)
  (found,), (tokens,) = likelihood.sums(variables, [text])
  assert tokens == 5 and found == pytest.approx(-expected, rel=1e-4)
  other = dataclasses.replace(text, targets='gone')
  ranker = Ranker(model, WORDS, 32, 16, 1)
  rows = ranker.prepare([dataclasses.replace(text, choices=('here', 'gone'))])
  (scores,) = ranker.scores(variables, rows)
  np.testing.assert_allclose(
    scores,
    [expected, float(log_p(model, variables, config, other).sum())],
    rtol=1e-4,
  )


@BOTH
def test_cached_answers_are_those_of_whole_texts_behind_the_prompt(config):
  model, variables = made(config)
  ids = [9, 8, 7]
  settings = Settings(6, (1000,))
  prompts = [ids, [5, 5, 5, 5, 5, 6]]
  found = Generation(model, WORDS, settings).tokens(variables, prompts)
  for own, answer in zip(prompts, found, strict=True):
    said = [0] if config is T5 else [*AHEAD, *own]
    begin = len(said)
    for _ in range(6):
      batch = {'inputs': jnp.array([said])}
      if config is T5:
        batch = {
          'inputs': jnp.array([[*AHEAD, *own]]),
          'decoder_inputs': jnp.array([said]),
        }
      padded = padded_to(batch, 16)
      logits = applied(model)(variables, padded)[0, len(said) - 1]
      said.append(int(jnp.argmax(logits)))
    assert answer == said[begin:]
  # Without the prompt it says something else.
  plain = {'inputs': jnp.array([ids])}
  assert greedy(model, variables, plain, 6, eos=1000)[0].tolist() != found[0]


def padded_to(batch, length):
  """So that all lengths are one program."""
  found = {}
  for name, ids in batch.items():
    more = ((0, 0), (0, length - ids.shape[1]))
    side = {'inputs': 'inputs_mask', 'decoder_inputs': 'targets_mask'}[name]
    found[name] = jnp.pad(ids, more)
    found[side] = jnp.arange(length)[None] < ids.shape[1]
  return found


@BOTH
def test_answers_of_examples_are_behind_the_prompt(config):
  model, variables = made(config)
  text = EXAMPLES[0]
  answering = Answering(model, WORDS, 40, 5, 1, ends=(1000,))
  # Of 40 places the prompt has three, and an end or a line's end one.
  longest = example('a' * 36, '')
  generation = Generation(model, WORDS, Settings(5, (1000,)))
  end = WORDS.eos if config is T5 else 13
  for one in (text, longest):
    ids = [*WORDS.encode(one.inputs), end]
    expected = generation.texts(variables, [ids])
    assert answering.answers(variables, [one]) == expected
  assert not answering.cut([longest]).any()
  assert answering.cut([example('a' * 37, '')]).all()


def test_a_decoders_places_count_the_prompt():
  generation = Generation(model_of(LLAMA), WORDS, Settings(7, (1,)))
  # 127 places, 3 of the prompt, 7 of the answer.
  generation.check([[5] * 117])
  with pytest.raises(ValueError, match='has 121 tokens'):
    generation.check([[5] * 118])


def test_a_repetition_penalty_knows_nothing_of_placeholders():
  model, variables = made(LLAMA)
  how = How(Sampling(repetition_penalty=jnp.float32(1.5)), jnp.array([1000]))
  batch = {'inputs': jnp.array([[*AHEAD, 9, 8]])}
  rows = start(model, variables, batch, how, 4)
  # The prompt, and the first token of the answer.
  assert set(np.flatnonzero(rows.seen[0])) == {9, 8, int(rows.tokens[0, 0])}


def test_a_model_without_a_prompt_has_nothing_before_its_texts():
  model = Decoder(LLAMA)
  assert before(model) == ()
  own = Samples(WORDS, 7)
  given = sample([9], [8])
  assert own.encode([given])[0] is given
