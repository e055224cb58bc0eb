# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a model: by an engine, and by whole calls as reference."""

import functools

import jax
import numpy as np

from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import Request, RouterFields
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig


def make_engine(model, variables, max_model_len=32, slots=4):
  """An engine of a model as it is, without a thread."""
  config = EngineConfig(
    slots=slots,
    max_model_len=max_model_len,
    chunk=4,
    min_chunk=4,
    cache_lens=(max_model_len,),
    batch_sizes=(slots,),
    compile_ahead=False,
  )
  pool = FixedAdapter(model, variables.get('peft'))
  return Engine(model, variables['params'], pool, config)


def engine_answers(model, variables, prompts, count, fields=None, **options):
  """The engine's answers to prompts.

  Args:
    fields: `RouterFields` of each prompt; None where no router reads them.
    options: of the requests.
  """
  fields = fields or [RouterFields()] * len(prompts)
  longest = max(map(len, prompts)) + count
  engine = make_engine(model, variables, max(32, longest))
  return engine.generate(
    [
      Request(
        *(str(i), tuple(map(int, ids)), count), **of_row._asdict(), **options
      )
      for i, (ids, of_row) in enumerate(zip(prompts, fields, strict=True))
    ]
  )


def engine_greedy(model, variables, prompts, count, **options):
  """The tokens of `engine_answers`."""
  answers = engine_answers(model, variables, prompts, count, **options)
  return [answer.ids for answer in answers]


def real_rows(batch):
  """The prompts of a padded batch."""
  ids, mask = np.asarray(batch['inputs']), np.asarray(batch['inputs_mask'])
  return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


@functools.cache
def _whole_call(model):
  return jax.jit(model.apply)


def uncached_logits(
  model, variables, prompt, answer, length=32, task=0, embedding=()
):
  """Logits [t + 1, v] at an answer's tokens and after it, by one call.

  The call is one of training: its batch has the mask of trained targets.

  Args:
    task, embedding: the row's task id and its embedding.
  """
  decoder_only = hasattr(model, 'extend')
  ids = np.zeros((2, 1, length), np.int32)
  text = [*prompt, *answer] if decoder_only else prompt
  ids[0, 0, : len(text)] = text
  batch = {'inputs': ids[0], 'inputs_mask': np.arange(length)[None] < len(text)}
  first = len(prompt) - 1
  if not decoder_only:
    ids[1, 0, 1 : len(answer) + 1] = answer
    batch['decoder_inputs'], first = ids[1], 0
  batch['targets_mask'] = np.arange(length)[None] >= first
  if task:
    batch |= dict.fromkeys(
      ('inputs_tasks', 'targets_tasks'), np.full((1, length), task)
    )
  if embedding:
    batch['embeddings'] = np.array(embedding, np.float32)[None, None]
  # Sliced by NumPy: JAX would compile a program for each length.
  logits = np.array(_whole_call(model)(variables, batch))[0]
  return logits[first : first + len(answer) + 1]


def uncached_greedy(model, variables, prompt, count, penalty=1.0):
  """Greedy tokens by whole calls without a cache.

  Args:
    penalty: of the tokens of a decoder's prompt, of T5's padding and of the
      answer so far.
  """
  answer = []
  previous = list(prompt) if hasattr(model, 'extend') else [0]
  for _ in range(count):
    logits = uncached_logits(model, variables, prompt, answer)[-1]
    ids = [*previous, *answer]
    repeated = logits[ids]
    logits[ids] = np.where(repeated < 0, repeated * penalty, repeated / penalty)
    answer.append(int(np.argmax(logits)))
  return answer
