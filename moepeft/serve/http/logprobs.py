# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and routing of tokens, in the forms that clients read."""

from collections.abc import Sequence
from typing import Any

from moepeft.inference.api import TokenLogprob
from moepeft.serve.http.completion_stream import TokenEntry
from moepeft.serve.http.text import ServedTokenizer

# What stands for one that is -inf, which JSON cannot say.
_LEAST = -9999.0


def chat(
  tokenizer: ServedTokenizer, entries: Sequence[TokenEntry], top: int
) -> dict[str, list[dict[str, Any]]]:
  """Chat's `logprobs`: what ends an answer is no token of its content.

  Args:
    top: alternatives of each.
  """
  content = [
    _named(tokenizer, entry.scored.id, entry.scored.logprob)
    | {
      'top_logprobs': [
        _named(tokenizer, *pair) for pair in entry.scored.top[:top]
      ]
    }
    for entry in entries
    if not entry.end
  ]
  return {'content': content, 'refusal': None}


def _named(
  tokenizer: ServedTokenizer, i: int, logprob: float | None
) -> dict[str, Any]:
  piece = tokenizer.token_bytes(i)
  return {
    'token': piece.decode(errors='replace'),
    'logprob': _number(logprob),
    'bytes': list(piece),
  }


def legacy(
  tokenizer: ServedTokenizer, entries: Sequence[TokenEntry], top: int
) -> dict[str, list]:
  """Completions' `logprobs`, lists that are as long as there are tokens.

  Here the token that ends an answer is one of them.
  """
  scored = [entry.scored for entry in entries]
  return {
    'tokens': [tokenizer.token_text(token.id) for token in scored],
    'token_logprobs': [
      None if token.logprob is None else _number(token.logprob)
      for token in scored
    ],
    'top_logprobs': [_top(tokenizer, token, top) for token in scored],
    'text_offset': [entry.offset for entry in entries],
  }


def _top(
  tokenizer: ServedTokenizer, scored: TokenLogprob, top: int
) -> dict[str, float] | None:
  """{token: log-probability}: the best ones, and the token that was chosen.

  None of a text's first token, which comes after nothing.
  """
  if scored.logprob is None:
    return None
  logprobs: dict[str, float] = {}
  for i, logprob in (*scored.top[:top], (scored.id, scored.logprob)):
    # Of two tokens with one text the better stays.
    logprobs.setdefault(tokenizer.token_text(i), _number(logprob))
  return logprobs


def _number(logprob: float | None) -> float:
  return max(float(logprob), _LEAST) if logprob is not None else 0.0


def routing(
  tokenizer: ServedTokenizer, entries: Sequence[TokenEntry]
) -> list[dict[str, Any]]:
  """[{'token': text, 'experts': {site: weights} or None}], one a token."""
  return [
    {
      'token': tokenizer.token_bytes(entry.scored.id).decode(errors='replace'),
      'experts': _experts(entry.scored),
    }
    for entry in entries
    if not entry.end
  ]


def _experts(scored: TokenLogprob) -> dict[str, list[float]] | None:
  if scored.experts is None:
    return None
  return {
    site: [round(float(weight), 5) for weight in weights]
    for site, weights in scored.experts.items()
  }
