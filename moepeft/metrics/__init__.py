# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated texts: pure functions of texts, one a file.

A new metric is a file with a `TextMetric` and a line in `METRICS`, or a module
of a user's that calls `METRICS.register`.
"""

from moepeft.core.registry import Registry
from moepeft.metrics.text_metric import MetricInfo as MetricInfo
from moepeft.metrics.text_metric import TextMetric as TextMetric

METRICS = Registry(
  'metric',
  'moepeft.metrics',
  {
    'exact_match': 'exact_match:METRIC',
    'rouge_l': 'rouge_l:METRIC',
    'bleu': 'bleu:METRIC',
  },
)
