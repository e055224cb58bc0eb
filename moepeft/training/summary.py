# SPDX-License-Identifier: Apache-2.0
"""The summary that a run prints at its start."""

import types
from collections.abc import Mapping
from typing import Any

import jax

from moepeft.checkpoints import quantize
from moepeft.checkpoints.count_parameters import count_trained
from moepeft.core.types import State
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.peft import Built
from moepeft.peft.method_text import expanded_text


def print_summary(
  base: Any,
  method: Built,
  state: State,
  tokenizer: Any,
  workdir: str,
  more: Mapping[str, str] = types.MappingProxyType({}),
  padded: Mapping[str, PaddedAxis] = types.MappingProxyType({}),
) -> None:
  """Prints the method, the base, the parameter counts and the devices.

  Args:
    more: {name: text} of further lines such as 'data'; empty ones are left out.
    padded: {path of a trained array: its padded axis}.
  """
  trained, padding = count_trained(state.trainable, method, padded)
  frozen = sum(a.size for a in jax.tree.leaves(state.frozen))
  total, quantized = (trained if method.trainable == 'params' else frozen), ''
  if base.quantise:
    total = quantize.parameters(state.frozen, base.config)
    megabytes = quantize.size(state.frozen) / 1e6
    quantized = f', projections in {base.quantise}: {megabytes:.4g} MB in all'
  lines = {
    'method': f'{method.method} ({method.semantics} semantics)',
    'in full': expanded_text(method.method, method.semantics),
    'base': f'{base.path or "random weights"}, {total:,} parameters{quantized}',
    'trained': f'{trained:,} parameters ({100 * trained / total:.2f} %)'
    + (padding and f' and {padding:,} zeros of padding' or ''),
    'tokens': tokenizer,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    **more,
    'workdir': workdir,
  }
  width = max(map(len, lines))
  for name, line in lines.items():
    if line:
      print(f'{name:{width}}  {line}', flush=True)
