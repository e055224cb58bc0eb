# SPDX-License-Identifier: Apache-2.0
"""Rank classification equals that of transformers in torch.

There, one choice of one input at a time, with no padding and no batch.
"""

import dataclasses
import json

import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.data import load_tokenizer
from moepeft.data.readers import jsonl_rows
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation import eval_sets
from moepeft.evaluation.rank_classification import Ranker
from moepeft.models.t5.model import T5
from moepeft.tasks import Example
from tests import ROOT

from ..checkpoints.cases import CONFIGS, random_params

SHARED = ROOT.parent / 'shared'
BASE, DATA = SHARED / 'models/flan-t5-small-int8', SHARED / 'data/p3/eval'
# What float32 may lose in a score, by its size, from sums in another order.
# The 2 and 4 layers of the random weights below came to 9.5e-8 at most, the 16
# layers of the slow test to more, hence the room.
TOLERANCE = 2e-5
# A choice that is all but certain scores near 0, as the difference of a logit
# and a log-partition of 16 and more, which float32 spaces by 1.9e-6 each: such
# scores came to 3.1e-4 of their size.
LEAST = 2e-6


class Reference:
  """The T5 of a Hugging Face directory, in torch."""

  def __init__(self, path):
    self._torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    self._model = transformers.T5ForConditionalGeneration.from_pretrained(
      path, dtype=self._torch.float32
    ).eval()
    # Version 5 means to tie the head, whatever the config says, unless it
    # finds two in the checkpoint; told not to, it unties the embeddings too.
    model = self._model
    both = (model.lm_head.weight, model.shared.weight)
    tied = json.loads((path / 'config.json').read_text())['tie_word_embeddings']
    assert self._torch.equal(*both) == tied
    for stack in (model.encoder, model.decoder):
      assert stack.embed_tokens.weight is model.shared.weight
    assert self._model.config.decoder_start_token_id == 0

  def score(self, inputs, choice):
    """log p of a choice's ids, EOS included."""
    torch = self._torch
    labels = torch.tensor([choice])
    with torch.no_grad():
      logits = self._model(
        input_ids=torch.tensor([inputs]),
        decoder_input_ids=torch.tensor([[0, *choice[:-1]]]),
      ).logits
    log_p = torch.log_softmax(logits.double(), dim=-1)
    return log_p.gather(-1, labels[..., None]).sum().item()


def compare(path, encode, words, rows, lengths, batch_size):
  """Holds our scores of rows against theirs; returns the largest difference.

  Args:
    encode: text -> ids with EOS, for theirs.
    lengths: of inputs and targets, for ours.
  """
  reference = Reference(path)
  loaded = hf.load(str(path))
  ranker = Ranker(T5(loaded.config), words, *lengths, batch_size)
  prepared = ranker.prepare(rows)
  assert not any(ids.cut or ids.has_equal_choices for ids in prepared)
  variables = {'params': loaded.params}
  candidate = ranker.scores(variables, prepared)
  predicted = [np.argmax(own) for own in candidate]
  most = 0.0
  for row, actual, best in zip(rows, candidate, predicted, strict=True):
    source = encode(row.inputs)
    expected = np.array(
      [reference.score(source, encode(c)) for c in row.choices]
    )
    where = f'{row.task}, {row.template!r}, idx {row.idx}'
    np.testing.assert_allclose(
      actual, expected, rtol=TOLERANCE, atol=LEAST, err_msg=where
    )
    second, first = np.sort(expected)[-2:]
    if first - second > 2 * TOLERANCE * np.abs(expected).max():
      assert best == np.argmax(expected), where
    most = max(most, np.max(np.abs(actual - expected) / np.abs(expected)))
  return most


def test_random_weights_rank_as_in_torch(tmp_path):
  # Heads times head size (15) unlike d_model (11), and an untied head.
  config = dataclasses.replace(
    CONFIGS['gated-untied'], vocab=ByteTokenizer().size
  )
  hf.save(tmp_path, config, random_params(config))
  # Prompts of 2, 3 and 5 choices and of many lengths.
  texts = [
    ('a', ['yes', 'no']),
    ('b ' * 37, ['yes', 'no']),
    ('c' * 150, ['always', 'sometimes', 'never at all']),
    ('d?', ['sometimes', 'a', 'never']),
    ('e', ['one', 'two', 'three', 'the fourth of them', 'five']),
  ]
  rows = [
    Example('t', str(i), i, inputs, choices[0], tuple(choices), 0)
    for i, (inputs, choices) in enumerate(texts)
  ]

  def encode(text):
    return [byte + 3 for byte in text.encode()] + [1]

  most = compare(tmp_path, encode, ByteTokenizer(), rows, (160, 20), 2)
  print(f'{len(rows)} examples, {most:.1e} at most')


@pytest.mark.slow
@pytest.mark.skipif(
  not (BASE.exists() and DATA.exists()),
  reason='needs ../shared/models/flan-t5-small-int8 and ../shared/data/p3/eval',
)
def test_every_prompt_of_the_eight_sets_ranks_as_in_torch():
  transformers = pytest.importorskip('transformers')
  tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)

  def encode(text):
    return [*tokenizer(text, add_special_tokens=False)['input_ids'], 1]

  prompts = eval_sets.prompts(
    'evaluation', jsonl_rows.read(str(DATA), ranked=True), 2
  )
  assert len(prompts) == 110
  rows = [example for prompt in prompts for example in prompt.examples]
  words = load_tokenizer('', str(BASE))
  most = compare(BASE, encode, words, rows, (1024, 256), 8)
  print(f'{len(prompts)} prompts, {len(rows)} examples, {most:.1e} at most')
