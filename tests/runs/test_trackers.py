# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases get what metrics.jsonl has, once."""

import math
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moepeft.runs.metrics_log import read
from moepeft.runs.run import Run
from moepeft.runs.trackers import TRACKERS, open_trackers, scalars
from moepeft.runs.trackers.tensorboard import TensorBoard
from moepeft.runs.trackers.wandb import WandB

from ..disks import full_disk  # noqa: F401


def row(step, loss=None):
  """As training gives it; routing every second step."""
  figures = {
    'step': step,
    'loss': 9.0 / step if loss is None else loss,
    'learning_rate': 1e-3,
    'padding_inputs': 0.25,
  }
  if step % 2 == 0:
    figures |= {'examples_per_s': 3.0, 'tokens_per_s': 70.0}
    figures['routing'] = {
      # Two layers, three experts.
      'encoder/layers/self/k/mov': {
        'weight': [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]],
        'entropy': [1.0, 0.5],
        'variation': [0.7, 0.8],
        'top': [0.5, 0.7],
      }
    }
  return figures


def events(folder):
  """All events of a folder's files, in the order that TensorBoard reads."""
  for path in sorted(folder.iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      # A record: its length in 8 bytes, 4 of check, the event, 4 of check.
      size = int.from_bytes(data[at : at + 8], 'little')
      yield Event.FromString(data[at + 12 : at + 12 + size])
      at += size + 16


def curves(folder):
  """{tag: {step: value}}, after what the protocol says of restarts."""
  scalars = {}
  for event in events(folder):
    if event.session_log.status == SessionLog.START:
      for tag, curve in scalars.items():
        scalars[tag] = {s: v for s, v in curve.items() if s < event.step}
    for value in event.summary.value:
      if value.HasField('simple_value'):
        curve = scalars.setdefault(value.tag, {})
        assert event.step not in curve, 'a point is drawn twice'
        curve[event.step] = value.simple_value
  return scalars


def test_scalars_are_the_numbers_and_means_over_layers():
  assert scalars(row(2)) == {
    'train/loss': 4.5,
    'train/learning_rate': 1e-3,
    'train/padding_inputs': 0.25,
    'speed/examples_per_s': 3.0,
    'speed/tokens_per_s': 70.0,
    # (1 + 0.5) / 2, and (0.5 + 0.7) / 2
    'entropy/encoder/self/k': 0.75,
    'max_weight/encoder/self/k': pytest.approx(0.6),
  }
  assert scalars({'step': 3, 'validation_loss': 2.0}) == {
    'validation/loss': 2.0
  }
  assert scalars({'step': 3, 'loss': math.nan, 'gradient_norm': None}) == {}


def opened(workdir, step, trackers, project='', **config):
  log = {'trackers': trackers, 'wandb_project': project}
  return open_trackers(Run(str(workdir)), step, {'log': log, **config})


def write(workdir, first, last, trackers='tensorboard'):
  opened_trackers = opened(workdir, first, trackers)
  for step in range(first + 1, last + 1):
    for writer in opened_trackers:
      writer.write(row(step))
      if step == 4:
        writer.write({'step': 4, 'validation_loss': 2.0})
  return opened_trackers


@pytest.mark.parametrize('killed', [False, True])
def test_tensorboard_has_the_rows_of_a_run_that_was_cut(tmp_path, killed):
  for writer in write(tmp_path, 0, 7):
    if not killed:
      writer.close()
  if killed:
    # A kill tears the last event.
    (file,) = (tmp_path / 'tensorboard').iterdir()
    whole = file.read_bytes()
  for writer in write(tmp_path, 5, 9):
    writer.close()
  logged = curves(tmp_path / 'tensorboard')
  rows = read(str(tmp_path / 'metrics.jsonl'))
  expected = {}
  for written_row in rows:
    for tag, value in scalars(written_row).items():
      expected.setdefault(tag, {})[written_row['step']] = pytest.approx(value)
  assert logged == expected
  assert list(logged['train/loss']) == list(range(1, 10))
  if killed:
    assert file.read_bytes() == whole  # an old file is left as it is


def test_tensorboard_itself_reads_the_same(tmp_path):
  module = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator'
  )
  write(tmp_path, 0, 7)
  for writer in write(tmp_path, 5, 9):
    writer.close()
  events = module.EventAccumulator(
    str(tmp_path / 'tensorboard'), size_guidance={'scalars': 0}
  ).Reload()
  scalars = {
    tag: {e.step: e.value for e in events.Scalars(tag)}
    for tag in events.Tags()['scalars']
  }
  assert scalars == curves(tmp_path / 'tensorboard')
  (load,) = events.Tags()['histograms']
  histogram = events.Histograms(load)[-1].histogram_value
  # The mean over layers: (0.5 + 0.1) / 2, (0.5 + 0.2) / 2, 0.7 / 2.
  assert histogram.bucket == pytest.approx([0.3, 0.35, 0.35])
  assert list(histogram.bucket_limit) == [0.5, 1.5, 2.5]


def test_a_torn_event_hides_nothing_that_came_after(tmp_path):
  module = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator'
  )
  write(tmp_path, 0, 7)
  (file,) = (tmp_path / 'tensorboard').iterdir()
  file.write_bytes(file.read_bytes()[:-9])
  for writer in write(tmp_path, 5, 9):
    writer.close()
  events = module.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  steps = [event.step for event in events.Scalars('train/loss')]
  assert steps == list(range(1, 10))


def test_tensorboard_can_be_off(tmp_path):
  write(tmp_path, 0, 2, trackers='')
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_full_disk_is_an_error_not_a_wait(full_disk):  # noqa: F811
  writer = TensorBoard(str(full_disk.path / 'tensorboard'))
  full_disk.fill()
  with pytest.raises(OSError, match='No space left'):
    for step in range(2, 10_000, 2):
      writer.write(row(step))


class FakeWandb(types.ModuleType):
  """Keeps what it is told."""

  def __init__(self):
    super().__init__('wandb')
    self.begun, self.logged, self.finished = [], [], 0
    self.errors = types.SimpleNamespace(Error=type('Error', (Exception,), {}))

  def init(self, **settings):
    self.begun.append(settings)
    return self

  def log(self, data, step):
    self.logged.append((step, data))

  def finish(self):
    self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  return fake


def test_wandb_gets_the_rows_and_the_same_run_again(wandb, tmp_path):
  config = {'seed': 3, 'model': {'size': 'small'}}
  log = {'trackers': 'wandb', 'wandb_project': 'mine'}
  for first in (0, 2):
    opened_trackers = opened(tmp_path, first, 'wandb', 'mine', **config)
    for writer in opened_trackers:
      writer.write(row(first + 1))
      writer.close()
  first_run, second_run = wandb.begun
  assert (
    first_run
    == second_run
    == {
      'project': 'mine',
      'id': (tmp_path / 'wandb_id').read_text(),
      'resume': 'allow',
      'dir': str(tmp_path),
      'config': config | {'log': log},
    }
  )
  assert first_run['id'] and wandb.finished == 2
  assert wandb.logged == [(1, scalars(row(1))), (3, scalars(row(3)))]
  assert [r['step'] for r in read(str(tmp_path / 'metrics.jsonl'))] == [1, 3]


def test_two_runs_have_two_ids(wandb, tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    WandB(str(tmp_path / name), 'mine', {})
  assert wandb.begun[0]['id'] != wandb.begun[1]['id']


def test_wandb_that_is_missing_is_a_sentence(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'wandb', None)  # importing it fails
  with pytest.raises(ValueError, match='needs the package wandb; pip install'):
    opened(tmp_path, 0, 'tensorboard,wandb', 'mine')
  # And nothing has been begun; without it in the list nothing is imported.
  assert list(tmp_path.iterdir()) == []
  assert len(opened(tmp_path, 0, 'tensorboard', 'mine')) == 2


def test_wandb_without_a_project_is_a_sentence(wandb, tmp_path):
  with pytest.raises(ValueError, match='needs config.log.wandb_project; set'):
    opened(tmp_path, 0, 'wandb')
  assert wandb.begun == []


def test_an_unknown_tracker_is_refused_with_those_that_are_there(tmp_path):
  with pytest.raises(ValueError, match="no tracker 'tensorbord'; there are"):
    opened(tmp_path, 0, 'tensorbord')
  assert set(TRACKERS) >= {'tensorboard', 'wandb'}


def test_wandb_that_refuses_is_a_sentence(wandb, tmp_path):
  def refuse(**settings):
    raise wandb.errors.Error('api_key not configured\nand more')

  wandb.init = refuse
  with pytest.raises(ValueError, match=r'\(api_key not configured\); run'):
    WandB(str(tmp_path), 'mine', {})
