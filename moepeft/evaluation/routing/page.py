# SPDX-License-Identifier: Apache-2.0
"""The page of a run's routing: one HTML file without external parts."""

import base64
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moepeft.core import files, pages
from moepeft.evaluation.routing.site_routing import (
  CollectedRouting,
  RoutedText,
  SiteRouting,
)
from moepeft.evaluation.routing.token_text import Part, TokenText
from moepeft.runs.history import History

_FILE = pathlib.Path(__file__).parent / 'page.html'
# Tokens that are listed for an expert, among those that occur so often.
_MAX_TOKENS, _LEAST_COUNT = 12, 3
# Bytes of the shares of all shown texts.
_MAX_BYTES = 6_000_000
# Steps of the curves over training.
_MAX_STEPS = 60


def write(
  path: str,
  run: Mapping[str, Any],
  routing: CollectedRouting,
  similarity: Mapping[str, np.ndarray | None],
  history: History,
  tokenizer: Any,
) -> None:
  """Writes the page.

  Args:
    run: its 'path', 'method', 'base' and 'step', and the path of the 'data';
      '' for held-out rows.
    similarity: path of a site -> [l, e, e], see `similarity`.
    history: of the run's metrics.
  """
  paths = [site.path for site in routing.sites]
  token_text = TokenText(tokenizer)
  characters = token_text.characters(
    ids for text in routing.texts for ids in text.ids.values()
  )

  def show(i: int) -> str | Part:
    return token_text.of_token(i, characters.get(i, ''))

  data = {
    'run': dict(run),
    'tasks': routing.tasks,
    'languages': routing.languages,
    'rows': routing.rows,
    'tokens': dict(routing.tokens),
    'least_count': _LEAST_COUNT,
    'sites': [
      _site(site, similarity.get(site.path), show) for site in routing.sites
    ],
    'overlap': [
      {
        'sites': [paths.index(path) for path in overlap.paths],
        'values': _numbers(overlap.values),
      }
      for overlap in routing.overlap
    ],
    'texts': [
      _text(text, routing.sites, token_text) for text in _fitting(routing.texts)
    ],
    'training': _training(history),
  }
  # No text can end the element.
  text = json.dumps(data, ensure_ascii=False, allow_nan=False)
  text = text.replace('<', '\\u003c')
  page = pages.read(_FILE)
  files.write_text(path, page.replace('>DATA<', f'>{text}<', 1))


def _site(
  site: SiteRouting,
  similarity: np.ndarray | None,
  show: Callable[[int], str | Part],
) -> dict[str, Any]:
  return {
    'path': site.path,
    'name': site.name,
    'reads': site.reads,
    'counts': site.counts,
    'width': site.share.shape[1],
    'identity': site.identity_experts,
    'share': _numbers(site.share),
    'by_task': _numbers(site.by_task),
    'by_language': _numbers(site.by_language),
    'information': _numbers(site.task_information),
    'dead': [np.nonzero(layer)[0].tolist() for layer in site.dead],
    'words': liked_tokens(site, show),
    'similarity': None if similarity is None else _by_layer(similarity, site),
  }


def _by_layer(similarity: np.ndarray, site: SiteRouting) -> list:
  """The similarity of the experts that each layer has."""
  return [
    _numbers(layer[:count, :count])
    for layer, count in zip(similarity, site.counts, strict=True)
  ]


def liked_tokens(
  site: SiteRouting, show: Callable[[int], str | Part]
) -> list[list[list[tuple[str | Part, float]]]]:
  """[l][e] lists of (token, share), the tokens that an expert likes most.

  The share is the expert's mean share of the token's occurrences. Rare tokens
  are left out, and so are tokens that an expert likes no more than others.
  """
  frequent = site.token_counts >= _LEAST_COUNT
  ids, shares = site.token_ids[frequent], site.by_token[frequent]
  result = []
  for layer, count in enumerate(site.counts):
    by_expert = []
    for expert in range(count):
      column = shares[:, layer, expert]
      order = np.argsort(-column, kind='stable')[:_MAX_TOKENS]
      above = [i for i in order if column[i] > site.share[layer, expert]]
      by_expert.append(
        [(show(int(ids[i])), round(float(column[i]), 4)) for i in above]
      )
    result.append(by_expert)
  return result


def _fitting(texts: Sequence[RoutedText]) -> list[RoutedText]:
  """The first texts of every task, as many as fit into the page."""
  turns: dict[str, int] = {}
  ordered = []
  for text in texts:
    turns[text.task] = turns.get(text.task, -1) + 1
    ordered.append((turns[text.task], len(ordered), text))
  chosen, size = set(), 0
  for _, place, text in sorted(ordered, key=lambda entry: entry[:2]):
    size += sum(weights.size for weights in text.weights.values())
    if chosen and size > _MAX_BYTES:
      break
    chosen.add(place)
  return [text for place, text in enumerate(texts) if place in chosen]


def _text(
  text: RoutedText, sites: Sequence[SiteRouting], token_text: TokenText
) -> dict[str, Any]:
  """A text's tokens, and its sites' shares as bytes [t, sites * l * e]."""
  shares = {}
  for side, ids in text.ids.items():
    arrays = [
      text.weights[site.path].reshape(len(ids), -1)
      for site in sites
      if site.reads == side
    ]
    joined = np.concatenate(arrays or [np.zeros((len(ids), 0))], axis=1)
    quantized = np.round(255 * np.clip(joined, 0, 1)).astype(np.uint8)
    shares[side] = base64.b64encode(quantized.tobytes()).decode()
  return {
    'task': text.task,
    'language': text.language,
    'shares': shares,
    **{side: token_text.of_text(ids) for side, ids in text.ids.items()},
  }


def _training(history: History) -> dict[str, Any]:
  """Shares and entropies of each site over the steps of the run."""
  states = history.routing()
  stride = -(-len(states) // _MAX_STEPS) or 1
  # The last state is that of the end.
  states = states[::-1][::stride][::-1]
  paths = {
    path: kind
    for state in states
    for kind, by_site in state.shares.items()
    for path in by_site
  }
  return {
    'steps': [state.step for state in states],
    'sites': {
      path: {
        'shares': [_numbers(state.shares[kind][path]) for state in states],
        'entropy': [_numbers(state.entropies[path]) for state in states],
      }
      for path, kind in paths.items()
      if all(path in state.shares.get(kind, ()) for state in states)
    },
  }


def _numbers(array: np.ndarray) -> Any:
  """Nested lists of numbers with four digits; None in place of NaN."""
  rounded = np.round(np.asarray(array, np.float64), 4)
  return np.where(np.isnan(rounded), None, rounded).tolist()
