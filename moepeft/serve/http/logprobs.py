# SPDX-License-Identifier: Apache-2.0
"""The response fields `logprobs` and `routing`."""

import base64
from collections.abc import Sequence
from typing import Any

from moepeft.inference.api import TokenLogprob
from moepeft.serve.http.completion_stream import TokenEntry
from moepeft.serve.http.text import ServedTokenizer

# The value in place of -inf, which JSON cannot represent.
_MIN_LOGPROB = -9999.0


def chat_logprobs(
  tokenizer: ServedTokenizer, entries: Sequence[TokenEntry], top: int
) -> dict[str, list[dict[str, Any]]]:
  """The field `logprobs` of a chat choice, without eos tokens.

  Args:
    top: the number of alternatives of each token.
  """
  content = [
    _token_logprob(tokenizer, entry.scored.id, entry.scored.logprob)
    | {
      'top_logprobs': [
        _token_logprob(tokenizer, *pair) for pair in entry.scored.top[:top]
      ]
    }
    for entry in entries
    if not entry.is_eos
  ]
  return {'content': content, 'refusal': None}


def _token_logprob(
  tokenizer: ServedTokenizer, i: int, logprob: float | None
) -> dict[str, Any]:
  token = tokenizer.token_bytes(i)
  return {
    'token': token.decode(errors='replace'),
    'logprob': _finite_logprob(logprob),
    'bytes': list(token),
  }


def completion_logprobs(
  tokenizer: ServedTokenizer, entries: Sequence[TokenEntry], top: int
) -> dict[str, list]:
  """The field `logprobs` of a completions choice, with eos tokens.

  Args:
    top: the number of alternatives of each token.
  """
  scored = [entry.scored for entry in entries]
  return {
    'tokens': [tokenizer.token_text(token.id) for token in scored],
    'token_logprobs': [
      None if token.logprob is None else _finite_logprob(token.logprob)
      for token in scored
    ],
    'top_logprobs': [_top_logprobs(tokenizer, token, top) for token in scored],
    'text_offset': [entry.offset for entry in entries],
  }


def _top_logprobs(
  tokenizer: ServedTokenizer, scored: TokenLogprob, top: int
) -> dict[str, float] | None:
  """{token: log-probability} of the best tokens and of the chosen one.

  None for the first token of a prompt.
  """
  if scored.logprob is None:
    return None
  logprobs: dict[str, float] = {}
  for i, logprob in (*scored.top[:top], (scored.id, scored.logprob)):
    # Of two tokens with the same text, the more probable one is reported.
    logprobs.setdefault(tokenizer.token_text(i), _finite_logprob(logprob))
  return logprobs


def _finite_logprob(logprob: float | None) -> float:
  return max(float(logprob), _MIN_LOGPROB) if logprob is not None else 0.0


def token_routing(
  tokenizer: ServedTokenizer, entries: Sequence[TokenEntry], layers: bool
) -> list[dict[str, Any]]:
  """[{'token': text, 'experts': {target module: weights} or None}].

  Args:
    layers: whether to add 'layers', {target module: base64} of the weights [l,
      e] as little-endian float16: a third of what they are as JSON numbers.
  """
  return [
    {
      'token': tokenizer.token_bytes(entry.scored.id).decode(errors='replace'),
      'experts': _experts(entry.scored),
    }
    | ({'layers': _layers(entry.scored)} if layers else {})
    for entry in entries
    if not entry.is_eos
  ]


def _layers(scored: TokenLogprob) -> dict[str, str] | None:
  if scored.layer_experts is None:
    return None
  return {
    site: base64.b64encode(weights.astype('<f2').tobytes()).decode()
    for site, weights in scored.layer_experts.items()
  }


def _experts(scored: TokenLogprob) -> dict[str, list[float]] | None:
  if scored.experts is None:
    return None
  return {
    site: [round(float(weight), 5) for weight in weights]
    for site, weights in scored.experts.items()
  }
