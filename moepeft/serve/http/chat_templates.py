# SPDX-License-Identifier: Apache-2.0
"""Chat templates and system prompts of the base and of each adapter."""

import dataclasses
import os

from moepeft.core import files, untrusted
from moepeft.data.chat import template as chat_template
from moepeft.runs.run import Run

# What Hugging Face calls a template beside a model or an adapter.
_FILE = 'chat_template.jinja'


@dataclasses.dataclass(frozen=True)
class ChatSettings:
  """
  Attributes:
    template: Jinja; '' for the tokenizer's own.
    system: put before conversations without a system's turn; '' for none.
  """

  template: str = ''
  system: str = ''


def chat_settings(source: str, base: ChatSettings) -> ChatSettings:
  """An adapter's own, or the base's where it brings none.

  Args:
    source: a run of moepeft.train, or a directory of an adapter.

  Raises:
    ValueError: the run's config is damaged, or the template that it names is
      gone.
    OSError: one of them is a pipe, a socket or a device.
  """
  source = os.path.expanduser(source)
  data = _data(Run(source).config_file)
  if data:
    text = chat_template.read(data['chat_template'])
    return ChatSettings(text or base.template, data['system'] or base.system)
  path = os.path.join(source, _FILE)
  files.check_file(path)
  if os.path.isfile(path):
    return ChatSettings(chat_template.read(path), base.system)
  return base


def _data(path: str) -> dict[str, str]:
  """The template and the system text that a run names; {} where none is."""
  files.check_file(path)
  if not os.path.isfile(path):
    return {}
  config = untrusted.read_json(path)
  try:
    data = untrusted.field(config, 'data', dict, {})
    return data and {
      key: untrusted.field(data, key, str, '')
      for key in ('chat_template', 'system')
    }
  except untrusted.Malformed as error:
    raise ValueError(f'{path}: {error}') from None
