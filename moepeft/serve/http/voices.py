# SPDX-License-Identifier: Apache-2.0
"""How a base and each adapter talk: their chat templates and system turns."""

import dataclasses
import json
import os
from typing import Any

from moepeft import runs
from moepeft.data import chat_template

# What Hugging Face calls a template beside a model or an adapter.
_FILE = 'chat_template.jinja'


@dataclasses.dataclass(frozen=True)
class Voice:
  """
  Attributes:
    template: Jinja; '' for the tokenizer's own.
    system: put before conversations without a system's turn; '' for none.
  """

  template: str = ''
  system: str = ''


def voice(source: str, base: Voice) -> Voice:
  """An adapter's own, or the base's where it brings none.

  Args:
    source: a run of moepeft.train, or a directory of an adapter.

  Raises:
    ValueError: the template that the run names is gone.
  """
  source = os.path.expanduser(source)
  data = _data(os.path.join(source, runs.CONFIG))
  if data:
    text = chat_template.read(data.get('chat_template') or '')
    return Voice(text or base.template, data.get('system') or base.system)
  path = os.path.join(source, _FILE)
  if os.path.isfile(path):
    return Voice(chat_template.read(path), base.system)
  return base


def _data(path: str) -> dict[str, Any]:
  """config.data of a run; {} of what is no run."""
  if not os.path.isfile(path):
    return {}
  try:
    with open(path, encoding='utf-8') as f:
      found = json.load(f).get('data')
  except (OSError, ValueError, AttributeError):
    return {}
  return found if isinstance(found, dict) else {}
