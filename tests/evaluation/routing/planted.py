# SPDX-License-Identifier: Apache-2.0
"""A model whose router at one site is set by hand.

The letters of the task 'a' go to expert 0, those of the task 'b' to expert 2.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation.routing.collect import collect
from moepeft.evaluation.routing.rows import LabeledRow
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.tasks import Example

from ...contracts import small

# Bytes need 259 ids.
CONFIG = dataclasses.replace(small.GATED, vocab=263)
METHOD = "molora(experts=3, rank=2, targets='encoder/self/q')"
PATH = 'encoder/layers/self/q/molora'


def example(task, inputs, targets='y'):
  return Example(task, '', -1, inputs, targets, (), -1)


def rows():
  """Rows of unlike lengths, so that batches have padding."""
  return [
    LabeledRow(example('a', 'aaa'), 'a', 'en'),
    LabeledRow(example('b', 'bb'), 'b', 'zh'),
    LabeledRow(example('a', 'a' * 11), 'a'),
    LabeledRow(example('b', 'bbbbb'), 'b', 'zh'),
    LabeledRow(example('b', 'b'), 'b', 'en'),
  ]


@functools.cache
def model():
  """(model, variables): layer 0's router reads the norm of the embedding.

  'a' is e_0 and 'b' e_1, whose norms are sqrt(11) e_i. Weights ln 8 / sqrt(11)
  give the logits ln 8, 0, 0: shares of 0.8, 0.1, 0.1. All other tokens are 0,
  with even shares.
  """
  module, _ = small.make(METHOD, CONFIG)
  params = init_params(t5.T5(CONFIG), small.batch(), 0)['params']
  peft = init_params(module, small.batch(), 1, params)['peft']
  table = np.zeros((263, 11), np.float32)
  first, second = ByteTokenizer().encode('ab')
  table[first, 0] = table[second, 1] = 1
  peft = jax.tree.map(np.array, peft)
  kernel = peft['encoder']['layers']['self']['q']['molora']['router']['kernel']
  # Of layer 0, [d, e].
  kernel[0] = 0
  kernel[0, 0, 0] = kernel[0, 1, 2] = math.log(8) / math.sqrt(11)
  params = {**params, 'embed': {'embedding': table}}
  return module, {'params': params, 'peft': peft}


def collator():
  return Seq2SeqCollator(ByteTokenizer(), 48, 9)


@functools.cache
def collected():
  """The routing of the rows in batches of two; texts of the first two rows."""
  module, tree = model()
  return collect(module, tree, collator(), rows(), 2, shown=(0, 1))
