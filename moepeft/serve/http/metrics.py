# SPDX-License-Identifier: Apache-2.0
"""The Prometheus metrics of the server."""

from collections.abc import Iterator

import prometheus_client as prometheus
from prometheus_client.core import (
  CounterMetricFamily,
  GaugeMetricFamily,
  Metric,
)

from moepeft.inference.engine.engine import Engine
from moepeft.serve.http.request_stats import RequestStats

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES = {
  'running': 'Running requests.',
  'waiting': 'Waiting requests.',
  'slots': 'Requests that can run at once.',
  'adapters': 'Loaded adapters.',
  'adapter_bytes': 'Device memory of the adapter pool, empty slots included.',
}
_COUNTERS = {
  'prompt_tokens': 'Prompt tokens.',
  'cached_tokens': 'Prompt tokens taken from the cache.',
  'answer_tokens': 'Answer tokens.',
  'proposed_tokens': 'Tokens that were proposed by prompt lookup.',
  'accepted_tokens': 'Proposed tokens that became part of an answer.',
  'compiled': 'Compiled programs.',
}


class Metrics:
  """A Prometheus registry for one server."""

  def __init__(self, engine: Engine):
    self._registry = prometheus.CollectorRegistry()
    self._registry.register(_EngineCollector(engine))
    self._requests = prometheus.Counter(
      'moepeft_requests',
      'HTTP requests.',
      ('route', 'status'),
      registry=self._registry,
    )
    self._request_seconds = self._histogram(
      'request_seconds', 'Time of a request.'
    )
    self._first_token_seconds = self._histogram(
      'time_to_first_token_seconds', 'Time from a request to its first token.'
    )
    self._token_seconds = self._histogram(
      'time_per_token_seconds', 'Mean time between the tokens of a request.'
    )

  def record(
    self, route: str, status: int, seconds: float, stats: RequestStats
  ) -> None:
    """Records a finished request."""
    self._requests.labels(route, str(status)).inc()
    self._request_seconds.labels(route).observe(seconds)
    if stats.time_to_first_token is not None:
      self._first_token_seconds.labels(route).observe(stats.time_to_first_token)
    if stats.time_per_token is not None:
      self._token_seconds.labels(route).observe(stats.time_per_token)

  def text(self) -> bytes:
    return prometheus.generate_latest(self._registry)

  def _histogram(self, name: str, help_text: str) -> prometheus.Histogram:
    return prometheus.Histogram(
      f'moepeft_{name}',
      help_text,
      ('route',),
      buckets=_BUCKETS,
      registry=self._registry,
    )


class _EngineCollector:
  """Collects the engine's stats when the metrics are read."""

  def __init__(self, engine: Engine):
    self._engine = engine

  def collect(self) -> Iterator[Metric]:
    stats = self._engine.stats()
    for name, help_text in _GAUGES.items():
      yield GaugeMetricFamily(
        f'moepeft_{name}', help_text, getattr(stats, name)
      )
    for name, help_text in _COUNTERS.items():
      yield CounterMetricFamily(
        f'moepeft_{name}', help_text, getattr(stats, name)
      )
    finished = CounterMetricFamily(
      'moepeft_finished',
      'Requests by finish reason.',
      labels=['reason'],
    )
    for reason, count in sorted(stats.finished.items()):
      finished.add_metric([reason], count)
    yield finished
