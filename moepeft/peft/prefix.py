# SPDX-License-Identifier: Apache-2.0
"""Ids of the vectors that adapters put before every text.

An adapter module that does so, such as a soft prompt, has the attribute
`prefix_length`; its ids follow those of the vocabulary.
"""

from typing import Any

from moepeft.nn.adapter_hook import AdapterMap


def placeholder_ids(adapter_map: AdapterMap, vocab: int) -> tuple[int, ...]:
  """The ids that stand before every text; () without such an adapter.

  Args:
    vocab: v of the model.
  """
  modules = (module for _, module in adapter_map.entries)
  length = sum(getattr(module, 'prefix_length', 0) for module in modules)
  return tuple(range(vocab, vocab + length))


def model_prefix_ids(model: Any) -> tuple[int, ...]:
  """The ids that stand before every text of a model."""
  return placeholder_ids(model.adapter_map, model.config.vocab)
