# SPDX-License-Identifier: Apache-2.0
"""Sites within a layer, below its path, and their roles."""

ATTENTION = {
  '': 'attention',
  '/norm': 'norm',
  '/q': 'query',
  '/k': 'key',
  '/v': 'value',
  '/core': 'core',
  '/o': 'output',
}


def feed_forward(gated: bool) -> dict[str, str]:
  """Of a feed-forward sublayer."""
  gate = {'/wi_0': 'gate', '/wi_1': 'up'} if gated else {'/wi': 'gate'}
  taps = {'/act': 'act', '/hidden': 'hidden', '/wo': 'down'}
  return {'': 'mlp', '/norm': 'norm'} | gate | taps
