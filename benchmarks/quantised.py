# SPDX-License-Identifier: Apache-2.0
"""Megabytes and held-out perplexity of a base quantized to 8 and 4 bits.

python benchmarks/quantised.py --config=configs/molora_t5.py [--json=FILE]

The base of the config without an adapter, its projections as they are stored,
in int8 and in nf4, on the rows that config.data holds out. A line each: the
megabytes of all weights in memory, the mean
-log p of a real target token in nats, and its exponential.
"""

import json
import math

from absl import flags

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.config import command_line
from moepeft.data import load_tokenizer, open_data
from moepeft.data.batching.collators import make_model_collator, scoring_lengths
from moepeft.evaluation.eval_sets import validation_rows
from moepeft.evaluation.evaluator import Evaluator
from moepeft.nn.quantization import FORMATS
from moepeft.objectives import build_validation_objective

_JSON = flags.DEFINE_string('json', None, 'Where to write the figures.')


def measure(config) -> dict[str, dict[str, float]]:
  """{'' or a kind: its figures}."""
  config = config.copy_and_resolve_references()
  config.method = 'full'  # which here stands for no adapter
  _, shape = base_lib.shape(config.model)
  words = load_tokenizer(config.data.tokenizer, config.model.path)
  collator = make_model_collator(config.data, words, shape, config.seed)
  training_data = open_data(
    config.data, config.seed, (0, 1), shape.vocab, collator
  )
  pairs = validation_rows(config, training_data, collator)
  figures = {}
  for kind in ('', *FORMATS):
    config.model.quantize = kind
    base = base_lib.load(config.model)
    model, _ = base_lib.module(base, config)
    evaluator = Evaluator(
      model,
      words,
      scoring_lengths(config.data, model),
      config.evaluation.batch_size,
      validation=pairs,
      collator=collator,
      objective=build_validation_objective(config),
    )
    variables = {'params': base.params, 'peft': {}}
    loss = evaluator.validation(variables)['validation_loss']
    figures[kind] = {
      'megabytes': round(quantize.size(base.params) / 1e6, 3),
      'nats': round(loss, 5),
      'perplexity': round(math.exp(loss), 5),
    }
    print(line(kind, figures[kind], figures['']), flush=True)
  return figures


def line(kind: str, figures: dict[str, float], stored: dict[str, float]) -> str:
  """A line of the table; the last two columns are of what is stored."""
  return (
    f'{kind or "as stored":9}  {figures["megabytes"]:8.1f} MB  '
    f'{figures["nats"]:.4f} nats  perplexity {figures["perplexity"]:.3f}  '
    f'{figures["megabytes"] / stored["megabytes"]:.2f} of the memory  '
    f'{figures["nats"] - stored["nats"]:+.4f} nats'
  )


def main(argv) -> None:
  del argv
  figures = measure(_CONFIG.value)
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(figures, f)


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  command_line.run(main)
