# SPDX-License-Identifier: Apache-2.0
"""Directories of runs as moepeft.train writes them, without training."""

import json
import math
import pathlib

from moepeft import config as config_lib

SITES = ('encoder/layers/self/q/molora', 'decoder/layers/mlp/wo/molora')


def row(step: int, **values) -> dict:
  """A row of metrics.jsonl: the loss is 3 / step, two steps take a second."""
  return {
    'step': step,
    'loss': 3 / step,
    'learning_rate': 0.001,
    'steps_per_s': 2.0,
    **values,
  }


def routing(share: float) -> dict:
  """Two layers of three experts; in the second the last one is dead."""
  layers = [[share, 1 - share - 0.2, 0.2], [0.5, 0.5, 0.0]]
  site = {'weight': layers, 'entropy': [math.log(3), math.log(3) / 2]}
  return dict.fromkeys(SITES, site)


def make_run(
  folder: pathlib.Path, steps: int = 8, last: int = 5, **changes
) -> pathlib.Path:
  """Writes a run that stands at the step `last`."""
  config = config_lib.default()
  config.steps, config.method = steps, 'molora(experts=3, rank=2)'
  config.update_from_flattened_dict(changes)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(config.to_json())
  rows = [row(n, routing=routing(0.4 + n / 50)) for n in range(1, last + 1)]
  rows.append({'step': last, 'validation_loss': 1.25})
  lines = [json.dumps(values) + '\n' for values in rows]
  (folder / 'metrics.jsonl').write_text(''.join(lines))
  return folder
