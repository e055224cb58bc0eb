# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and routing of tokens, in the forms that clients read."""

from collections.abc import Sequence
from typing import Any

from moepeft.inference.api import TokenLogprob
from moepeft.serve.http.completion_stream import Entry
from moepeft.serve.http.text import Words

# What stands for one that is -inf, which JSON cannot say.
_LEAST = -9999.0


def chat(
  words: Words, entries: Sequence[Entry], top: int
) -> dict[str, list[dict[str, Any]]]:
  """Chat's `logprobs`: what ends an answer is no token of its content.

  Args:
    top: alternatives of each.
  """
  content = [
    _named(words, entry.scored.id, entry.scored.logprob)
    | {
      'top_logprobs': [_named(words, *pair) for pair in entry.scored.top[:top]]
    }
    for entry in entries
    if not entry.end
  ]
  return {'content': content, 'refusal': None}


def _named(words: Words, i: int, logprob: float | None) -> dict[str, Any]:
  piece = words.piece(i)
  return {
    'token': piece.decode(errors='replace'),
    'logprob': _number(logprob),
    'bytes': list(piece),
  }


def legacy(words: Words, entries: Sequence[Entry], top: int) -> dict[str, list]:
  """Completions' `logprobs`, lists that are as long as there are tokens.

  Here the token that ends an answer is one of them.
  """
  scored = [entry.scored for entry in entries]
  return {
    'tokens': [words.name(one.id) for one in scored],
    'token_logprobs': [
      None if one.logprob is None else _number(one.logprob) for one in scored
    ],
    'top_logprobs': [_top(words, one, top) for one in scored],
    'text_offset': [entry.offset for entry in entries],
  }


def _top(
  words: Words, scored: TokenLogprob, top: int
) -> dict[str, float] | None:
  """{token: log-probability}: the best ones, and the token that was chosen.

  None of a text's first token, which comes after nothing.
  """
  if scored.logprob is None:
    return None
  found: dict[str, float] = {}
  for i, logprob in (*scored.top[:top], (scored.id, scored.logprob)):
    # Of two tokens with one text the better stays.
    found.setdefault(words.name(i), _number(logprob))
  return found


def _number(logprob: float | None) -> float:
  return max(float(logprob), _LEAST) if logprob is not None else 0.0


def routing(words: Words, entries: Sequence[Entry]) -> list[dict[str, Any]]:
  """[{'token': text, 'experts': {site: weights} or None}], one a token."""
  return [
    {
      'token': words.piece(entry.scored.id).decode(errors='replace'),
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
