# SPDX-License-Identifier: Apache-2.0
"""Counts and times for Prometheus."""

from collections.abc import Iterator

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily as Counted
from prometheus_client.core import GaugeMetricFamily as Gauged
from prometheus_client.core import Metric

from moepeft.inference.engine.engine import Engine
from moepeft.serve.http.request_stats import RequestStats

CONTENT = prometheus.CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES = {
  'running': 'Requests that are being answered.',
  'waiting': 'Requests in the queue.',
  'slots': 'Requests that can be answered at once.',
  'adapters': 'Adapters that are loaded.',
  'adapter_bytes': 'Device memory of all banks, empty slots too.',
}
_COUNTERS = {
  'prompt_tokens': 'Tokens of prompts.',
  'cached_tokens': 'Tokens of prompts that were not computed anew.',
  'answer_tokens': 'Tokens of answers.',
  'compiled': 'Programs that were compiled.',
}


class Metrics:
  """A registry of its own: two servers in a process do not mix."""

  def __init__(self, engine: Engine):
    self._registry = prometheus.CollectorRegistry()
    self._registry.register(_Stats(engine))
    self._requests = prometheus.Counter(
      'moepeft_requests',
      'HTTP requests.',
      ('route', 'status'),
      registry=self._registry,
    )
    self._whole = self._histogram('request_seconds', 'A whole request.')
    self._first = self._histogram(
      'time_to_first_token_seconds', 'From a request to its first token.'
    )
    self._each = self._histogram(
      'time_per_token_seconds', 'From token to token, of a request the mean.'
    )

  def note(
    self, route: str, status: int, seconds: float, stats: RequestStats
  ) -> None:
    """Counts a request that is over."""
    self._requests.labels(route, str(status)).inc()
    self._whole.labels(route).observe(seconds)
    if stats.to_first is not None:
      self._first.labels(route).observe(stats.to_first)
    if stats.per_token is not None:
      self._each.labels(route).observe(stats.per_token)

  def text(self) -> bytes:
    return prometheus.generate_latest(self._registry)

  def _histogram(self, name: str, about: str) -> prometheus.Histogram:
    return prometheus.Histogram(
      f'moepeft_{name}',
      about,
      ('route',),
      buckets=_SECONDS,
      registry=self._registry,
    )


class _Stats:
  """The engine's own counts, asked for when they are read."""

  def __init__(self, engine: Engine):
    self._engine = engine

  def collect(self) -> Iterator[Metric]:
    stats = self._engine.stats()
    for name, about in _GAUGES.items():
      yield Gauged(f'moepeft_{name}', about, getattr(stats, name))
    for name, about in _COUNTERS.items():
      yield Counted(f'moepeft_{name}', about, getattr(stats, name))
    finished = Counted('moepeft_finished', 'Answers by end.', labels=['reason'])
    for reason, count in sorted(stats.finished.items()):
      finished.add_metric([reason], count)
    yield finished
