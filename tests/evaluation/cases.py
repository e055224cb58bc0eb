# SPDX-License-Identifier: Apache-2.0
"""Rows of evaluations for tests."""

from moepeft.evaluation.results import EvalInfo, make_result, measurement

INFO = EvalInfo(
  run='runs/a',
  method='lora(rank=4)',
  semantics='official',
  base='t5_tiny',
  base_parameters=11,
  parameters=7,
  seed=0,
  step=5,
  data='eval',
)


def row(task, prompt, each, idx=None, majority=0.5, metric='accuracy', **more):
  """A result with these scores of its examples."""
  idx = range(len(each)) if idx is None else idx
  measured = measurement(
    task, prompt, metric, idx, each, majority=majority, **more
  )
  return make_result(INFO, measured)


def right(of, n):
  """The figures of n examples of which the first `of` are right."""
  return [1] * of + [0] * (n - of)
