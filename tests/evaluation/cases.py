# SPDX-License-Identifier: Apache-2.0
"""Rows of evaluations for tests."""

from moepeft.evaluation import scores

ABOUT = scores.About(
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


def row(task, prompt, each, idx=None, majority=0.5, **more):
  """Of accuracy where `more` names no other measure."""
  idx = range(len(each)) if idx is None else idx
  more = {'measure': 'accuracy'} | more
  return scores.measured(
    ABOUT, task, prompt, idx=idx, each=each, majority=majority, **more
  )


def right(of, n):
  """The figures of n examples of which the first `of` are right."""
  return [1] * of + [0] * (n - of)
