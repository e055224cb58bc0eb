# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps in the work directory."""

import gzip
import json

import pytest

from moepeft import train

from ..test_train import base, card  # noqa: F401


def traced_steps(workdir):
  """Numbers of the steps in the trace, read as Perfetto reads it."""
  # TensorBoard opens the other file of the folder.
  (trace,) = workdir.glob('profile/plugins/profile/*/*.trace.json.gz')
  assert list(trace.parent.glob('*.xplane.pb'))
  events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  return sorted(
    int(event['args']['step_num'])
    for event in events
    if event.get('name') == 'train'
  )


def test_a_trace_covers_the_steps_that_are_named(base, tmp_path, capsys):  # noqa: F811
  train.train(card(base, **{'profile.steps': '2:3'}), str(tmp_path))
  assert traced_steps(tmp_path) == [2, 3]
  assert f'profile of steps 2 to 3 in {tmp_path}/profile' in (
    capsys.readouterr().out
  )


@pytest.mark.slow
def test_a_run_that_goes_on_traces_the_steps_that_are_left(base, tmp_path):  # noqa: F811
  train.train(card(base, steps=2), str(tmp_path))
  train.train(card(base, **{'profile.steps': '1:3'}), str(tmp_path))
  assert traced_steps(tmp_path) == [3]


@pytest.mark.parametrize('steps', ['5', '0:3', '3:2', '2:5', 'a:b', '1:2:3'])
def test_steps_that_a_run_does_not_have_are_refused(tmp_path, steps):
  match = rf'config.profile.steps is FIRST:LAST, as in 5:8, .*got .{steps}'
  with pytest.raises(ValueError, match=match):
    train.train(
      card('package:t5_tiny', **{'profile.steps': steps}), str(tmp_path)
    )
