# SPDX-License-Identifier: Apache-2.0
"""Reads runs for the page: their states, curves, routers and settings."""

import functools
import os
import shlex
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from moepeft.board import settings
from moepeft.board.folders import Folders
from moepeft.board.jobs import Jobs
from moepeft.core import files, untrusted
from moepeft.runs import before_after, diagnosis
from moepeft.runs.directory import is_locked
from moepeft.runs.history import PREFERENCE_METRICS, History, short_names
from moepeft.runs.metrics_log import is_number
from moepeft.runs.router_load_plot import dead_experts
from moepeft.runs.run import Run

_CURVES = (
  *('loss', 'validation_loss', 'learning_rate'),
  *PREFERENCE_METRICS,
  *(f'validation_{key}' for key in PREFERENCE_METRICS),
)
# Rows whose median is the speed of a run.
_SPEED_ROWS = 5
_DATA_START = '<script type="application/json" id="data">'


def states(folders: Folders, jobs: Jobs) -> list[dict[str, Any]]:
  """The state of each run, those that changed last first."""
  rows = [state(folders, jobs, name) for name in folders.names()]
  return sorted(rows, key=lambda row: -row['changed'])


def state(folders: Folders, jobs: Jobs, name: str) -> dict[str, Any]:
  """A run as a row of the table.

  'state' is 'running', 'finished', 'failed', 'stopped', or 'damaged', with a
  sentence in 'error'; 'eta' is in seconds, None where nothing is known.
  """
  run = folders.run(name)
  row = {
    'name': name,
    'path': folders.relative(run.path),
    'changed': _changed(run),
    'step': 0,
    'steps': None,
    'error': '',
  }
  job = jobs.state(name, 'train')
  is_running = bool(job and job['running']) or is_locked(run.path)
  try:
    row |= _settings(*_version(run.config_file)) if _exists(run) else {}
    row |= _last_values(*_version(run.metrics_file))
  except (OSError, ValueError) as e:
    return row | {'state': 'damaged', 'error': str(e)}
  row['board'] = bool(job)
  row['stopping'] = bool(is_running and job and job['stopping'])
  if is_running:
    row['state'] = 'running'
    left = (row['steps'] or 0) - row['step']
    row['eta'] = left / row['speed'] if row.get('speed') else None
    return row
  row['error'] = job.get('error', '')
  is_finished = os.path.exists(run.summary_file)
  row['state'] = 'finished' if is_finished else 'stopped'
  if row['error']:
    row['state'] = 'failed'
  return row


def details(folders: Folders, jobs: Jobs, name: str) -> dict[str, Any]:
  """A run's state, settings, logs, findings and evaluations."""
  run = folders.run(name)
  row = state(folders, jobs, name)
  config: dict[str, Any] = {}
  lines: list[str] = []
  error = row['error']
  try:
    if _exists(run):
      config = settings.differences(settings.stored_config(run))
    lines = before_after.describe_changes(run.before(), run.after())
  except ValueError as e:
    error = error or str(e)
  findings = _findings(run.path, *_version(run.metrics_file))
  return row | {
    'error': error,
    'config': settings.texts(config),
    'changes': lines,
    'findings': findings if row['state'] != 'running' else [],
    'checkpoint': run.latest_step(),
    'log': jobs.log(name, 'train'),
    'exports': _exports(run),
    'report': os.path.exists(report_file(run)),
    'jobs': {
      kind: jobs.state(name, kind) | {'log': jobs.log(name, kind)[-2000:]}
      for kind in ('export', 'routing')
    },
    'command': shlex.join(jobs.state(name, 'train').get('command', [])[1:]),
  }


def curves(folders: Folders, name: str) -> dict[str, Any]:
  """A run's curves, {metric: [steps, values]}, and its sites with a router."""
  run = folders.run(name)
  history = _history(*_version(run.metrics_file))
  result = {}
  for key in _CURVES:
    steps, values = history.curve(key)
    if len(steps):
      result[key] = [steps.astype(int).tolist(), numbers(values, 6)]
  states_of_routers = history.routing()
  sites = [
    {'path': path, 'kind': kind, 'name': label}
    for kind, shares in (
      states_of_routers[-1].shares if states_of_routers else {}
    ).items()
    for path, label in short_names(shares).items()
  ]
  return {'curves': result, 'sites': sites}


def routing(folders: Folders, name: str, path: str) -> dict[str, Any]:
  """The router of a site over training.

  Args:
    path: of the site.

  Returns:
    'steps' [n], 'shares' [n][l][e], 'entropy' [n][l] over its maximum, and
    'dead' [l][e], the experts that are dead at the last step.

  Raises:
    ValueError: the run has no router there.
  """
  history = _history(*_version(folders.run(name).metrics_file))
  points = [
    (s.step, shares[path], s.entropies[path])
    for s in history.routing()
    for shares in s.shares.values()
    if path in shares
  ]
  if not points:
    raise ValueError(f'the run {name!r} has no log of a router at {path!r}')
  steps, shares, entropies = zip(*points, strict=True)
  return {
    'steps': list(steps),
    'shares': [numbers(share) for share in shares],
    'entropy': [numbers(entropy) for entropy in entropies],
    'dead': dead_experts(shares[-1]).tolist(),
    'dead_counts': [int(dead_experts(share).sum()) for share in shares],
  }


def report_file(run: Run) -> str:
  """The page that moepeft.routing writes for the board."""
  return os.path.join(run.path, 'routing', 'index.html')


def tasks(folders: Folders, name: str) -> dict[str, Any]:
  """The experts by task, from the page that moepeft.routing has written.

  Raises:
    ValueError: there is no such page yet, or it is damaged.
  """
  path = report_file(folders.run(name))
  if not os.path.exists(path):
    raise ValueError(f'the routing of the run {name!r} is not measured yet')
  text = files.read_text(path).partition(_DATA_START)[2]
  data = untrusted.parse_json(text.partition('</script>')[0].encode())
  untrusted.check_shape(
    data,
    {
      'run': {'step': int},
      'tasks': [str],
      'sites': [{'path': str, 'by_task': list}],
    },
  )
  keys = ('path', 'name', 'counts', 'by_task', 'information', 'dead')
  sites = [{key: site.get(key) for key in keys} for site in data['sites']]
  return {'tasks': data['tasks'], 'step': data['run']['step'], 'sites': sites}


def numbers(array: np.ndarray, digits: int = 4) -> list:
  """Nested lists of rounded numbers; None in place of NaN and infinities."""
  values = np.asarray(array, np.float64)
  return np.where(np.isfinite(values), np.round(values, digits), None).tolist()


def _version(path: str) -> tuple[str, int, int]:
  """(path, size, time of the last change), the key of what is read of it."""
  try:
    stat = os.stat(path)
  except OSError:
    return path, -1, 0
  return path, stat.st_size, stat.st_mtime_ns


def _exists(run: Run) -> bool:
  return os.path.exists(run.config_file)


def _changed(run: Run) -> float:
  """The time of the last change of a run, in seconds."""
  paths = (run.metrics_file, run.config_file, run.path)
  return max(_version(path)[2] for path in paths) / 1e9


@functools.lru_cache(4096)
def _settings(path: str, size: int, changed: int) -> dict[str, Any]:
  del size, changed
  config = Run(os.path.dirname(path)).read_config()
  model = config.get('model', {})
  return {
    'steps': config.get('steps'),
    'method': config.get('method', ''),
    'model': model.get('path') or model.get('size', ''),
    'objective': config.get('objective', ''),
  }


@functools.lru_cache(4096)
def _last_values(path: str, size: int, changed: int) -> dict[str, Any]:
  """The last step, loss, validation loss and speed in a metrics log."""
  del size, changed
  values: dict[str, Any] = {}
  speeds = []
  for line in reversed(files.read_tail(path).splitlines(keepends=True)[-400:]):
    if not line.endswith('\n'):
      continue
    try:
      row = untrusted.parse_json(line)
    except untrusted.Malformed:
      # The first line may be the end of one.
      break
    values.setdefault('step', row.get('step', 0))
    for key in ('loss', 'validation_loss'):
      if key in row:
        values.setdefault(key, row[key])
    if is_number(row.get('steps_per_s')) and len(speeds) < _SPEED_ROWS:
      speeds.append(row['steps_per_s'])
  if speeds:
    values['speed'] = statistics.median(speeds)
  return values


@functools.lru_cache(64)
def _history(path: str, size: int, changed: int) -> History:
  del size, changed
  return History(Run(os.path.dirname(path)).metrics())


@functools.lru_cache(64)
def _findings(folder: str, path: str, size: int, changed: int) -> list[str]:
  del path, size, changed
  return diagnosis.findings(Path(folder))


def _exports(run: Run) -> list[str]:
  try:
    return sorted(os.listdir(os.path.join(run.path, 'export')))
  except OSError:
    return []
