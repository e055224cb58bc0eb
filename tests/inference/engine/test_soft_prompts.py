# SPDX-License-Identifier: Apache-2.0
"""Soft prompts in the engine: beside other adapters, and of places their own.

What is expected is computed by the adapter's own model, as it is trained.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.api import LENGTH, PromptTooLong
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models.t5 import model as t5
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft.prefix import model_prefix_ids

from ...contracts import small, small_decoders
from .. import banked
from ..engines import ask, paused, prompt, running

# Float32 sums in another order, ranks padded: of values of some units.
CLOSE = 2e-5
PLACES = 31
LLAMA = dataclasses.replace(small_decoders.CONFIGS['llama'], length=PLACES)
METHODS = {
  'lora': "lora(rank=2, targets='*/q|*/wo')",
  'prompt': 'prompt(length=3)',
  # Of the same bank.
  'longer': 'prompt(length=5)',
  'both': "prompt(length=2) + lora(rank=2, targets='*/q|*/wo')",
}


@dataclasses.dataclass
class Served:
  engine: object
  base: object
  banks: AdapterPool
  made: dict

  def model(self, name):
    """(the adapter's own model, variables)."""
    if not name:
      return banked.model_of(self.base, AdapterMap()), {
        'params': self.base.params
      }
    _, built, tree = self.made[name]
    model = banked.model_of(self.base, built.adapter_map)
    return model, {'params': self.base.params, 'peft': tree}


def served(config, folder, **sizes):
  base = banked.base_of(config)
  made = {
    name: banked.save(folder / name, base, method, seed)
    for seed, (name, method) in enumerate(METHODS.items())
  }
  paths = {name: path for name, (path, _, _) in made.items()}
  banks = AdapterPool(base, paths, slots=4)
  settings = EngineConfig(
    slots=5, max_model_len=PLACES, cache_lens=(PLACES,), **sizes
  )
  model = banked.model_of(base, AdapterMap())
  return running(model, base.params, banks, settings), base, banks, made


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp('llama')
  engine, *rest = served(LLAMA, folder, chunk=4, min_chunk=4, batch_sizes=(5,))
  with engine as actual:
    yield Served(actual, *rest)


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('t5')
  engine, *rest = served(
    small.GATED, folder, chunk=8, min_chunk=8, batch_sizes=(5,)
  )
  with engine as actual:
    yield Served(actual, *rest)


@functools.cache
def applied(model):
  return jax.jit(model.apply)


def expected(found, name, ids, answer):
  """log-probabilities [t, v] of what follows, from the prompt's last on; of a
  decoder from the first of `ids` on."""
  model, variables = found.model(name)
  whole = [*model_prefix_ids(model), *ids]
  t = isinstance(found.base.config, t5.T5Config)
  rows = np.zeros((2, 1, 2 * PLACES), np.int32)
  text = whole if t else [*whole, *answer]
  rows[0, 0, : len(text)] = text
  batch = {
    'inputs': rows[0],
    'inputs_mask': np.arange(2 * PLACES)[None] < len(text),
  }
  if t:
    rows[1, 0, 1 : len(answer)] = answer[:-1]
    batch['decoder_inputs'] = rows[1]
  logits = np.asarray(applied(model)(variables, batch)[0])
  at = 0 if t else len(whole) - len(ids)
  logits = logits[at : at + (0 if t else len(ids)) + len(answer)]
  return np.asarray(jax.nn.log_softmax(logits))


def check(found, name, ids, answer):
  rows = expected(found, name, ids, answer.tokens)
  if not isinstance(found.base.config, t5.T5Config):
    rows = rows[len(ids) - 1 :]
  for row, token in zip(rows, answer.scored, strict=False):
    assert abs(token.logprob - row[token.id]) < CLOSE
    # The best, but for two that are equal nearly.
    assert row.max() - row[token.id] < CLOSE
  assert answer.end.reason == LENGTH and answer.end.answer == len(answer.tokens)
  # What was asked, whatever stands before it.
  assert answer.end.prompt == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['llama', 'encoder'])
def test_a_mixed_batch_says_what_each_adapters_own_model_says(kind, request):
  actual = request.getfixturevalue(kind)
  names = ('', *METHODS)
  with paused(actual.engine):
    # At once: five slots, prompts of several lengths.
    asked = [
      (name, ids, ask(actual.engine, ids, 6, adapter=name, logprobs=1))
      for i, name in enumerate(names)
      for ids in [prompt(7, 9 + i)]
    ]
  for name, ids, answer in asked:
    check(actual, name, ids, answer)
  said = [tuple(answer.tokens) for _, _, answer in asked]
  # Else it would show little.
  assert len(set(said)) > 2


@pytest.mark.slow
def test_a_row_of_the_base_is_the_same_beside_prompts(llama):
  ids = prompt(3, 7)
  alone = ask(llama.engine, ids, 6, logprobs=1).wait()
  with paused(llama.engine):
    asked = [
      ask(llama.engine, ids, 6, adapter=name, logprobs=1)
      for name in ('', 'prompt', 'both', 'longer')
    ]
  assert [t.logprob for t in asked[0].scored] == [
    t.logprob for t in alone.scored
  ]


def test_echo_tells_of_the_users_tokens_alone(llama):
  ids = prompt(5, 11)
  for name in ('', 'prompt', 'longer', 'both'):
    answer = ask(llama.engine, ids, 0, adapter=name, prompt_logprobs=2)
    rows = expected(llama, name, ids, ())
    told = answer.prompt
    assert [token.id for token in told] == list(ids)
    # As without a prompt the first has none.
    assert told[0].logprob is None
    for row, token in zip(rows, told[1:], strict=False):
      assert abs(token.logprob - row[token.id]) < CLOSE
      best = np.sort(row)[::-1][:2]
      np.testing.assert_allclose([p for _, p in token.top], best, atol=CLOSE)


def test_texts_are_found_again_by_the_adapter_and_counted_without_it(llama):
  ids = prompt(8, 12)
  first = ask(llama.engine, ids, 3, adapter='prompt')
  assert first.end.cached == 0
  again = ask(llama.engine, ids, 3, adapter='prompt')
  # All but the last, which the first step takes.
  assert again.end.cached == 11 and again.tokens == first.tokens
  # Of another text only the prompt is the same.
  other = ask(llama.engine, prompt(9, 12)[:5], 3, adapter='prompt')
  assert other.end.cached <= 4
  assert ask(llama.engine, ids, 3, adapter='longer').end.cached == 0


@pytest.mark.slow
def test_an_encoders_inputs_are_found_again_by_the_adapter(encoder):
  ids = prompt(8, 12)
  assert ask(encoder.engine, ids, 3, adapter='prompt').end.cached == 0
  assert ask(encoder.engine, ids, 3, adapter='prompt').end.cached == 12
  assert ask(encoder.engine, ids, 3, adapter='longer').end.cached == 0


@pytest.mark.slow
def test_a_prompt_takes_places(llama, encoder):
  # 31 places: 20 asked, 6 answered, 5 of the prompt.
  answer = ask(llama.engine, prompt(1, 20), 6, adapter='longer', logprobs=1)
  check(llama, 'longer', prompt(1, 20), answer)
  with pytest.raises(PromptTooLong, match='21 tokens, its soft prompt 5'):
    ask(llama.engine, prompt(1, 21), 6, adapter='longer')
  ask(llama.engine, prompt(1, 21), 6, adapter='lora').wait()
  answer = ask(encoder.engine, prompt(1, 26), 3, adapter='longer', logprobs=1)
  check(encoder, 'longer', prompt(1, 26), answer)
  with pytest.raises(PromptTooLong, match='its soft prompt 5'):
    ask(encoder.engine, prompt(1, 27), 3, adapter='longer')


def test_what_is_loaded_tells_how_long_its_prompt_is(llama):
  told = {one.name: one.soft_prompt_length for one in llama.engine.adapters()}
  assert told == {'lora': 0, 'prompt': 3, 'longer': 5, 'both': 2}


def test_a_prompt_that_is_loaded_meanwhile_and_does_not_fit_ends_the_request(
  llama,
):
  _, path, rest = 'it', llama.made['prompt'][0], llama.made['longer'][0]
  llama.engine.load('it', path)
  ids = prompt(1, 22)
  with paused(llama.engine):
    # 22 and 6 and 3 of the prompt are 31; the other has 5.
    answer = ask(llama.engine, ids, 6, adapter='it')
    llama.banks.load('it', rest)
  assert answer.end.reason == 'failed'
  assert answer.end.message.startswith(
    'the prompt has 22 tokens, its soft prompt 5'
  )
  llama.engine.unload('it')
  fine = ask(llama.engine, ids, 6, adapter='prompt', logprobs=1)
  check(llama, 'prompt', ids, fine)


def test_prompts_of_several_lengths_are_of_one_bank(llama):
  (form,) = [f for f in llama.banks.buckets if f.name == 'prompt']
  # 5 is rounded up to a power of two.
  assert form.method == 'prompt(length=8)'
  assert sorted(f.name for f in llama.banks.buckets) == [
    'lora',
    'prompt',
    'prompt_lora',
  ]
