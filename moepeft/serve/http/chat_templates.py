# SPDX-License-Identifier: Apache-2.0
"""The chat template and system prompt of the base and of each adapter."""

import dataclasses
import os

from moepeft.core import files
from moepeft.data.chat import template as chat_template
from moepeft.runs.run import Run

# The name of a chat template file in transformers.
_FILE = 'chat_template.jinja'


@dataclasses.dataclass(frozen=True)
class ChatSettings:
  """The chat template and system prompt of a model.

  Attributes:
    template: a Jinja template; '' for that of the tokenizer.
    system: the system prompt of conversations without one; '' for none.
  """

  template: str = ''
  system: str = ''


def chat_settings(source: str, base: ChatSettings) -> ChatSettings:
  """Reads the chat settings of an adapter; the base's are the default.

  Args:
    source: a work directory of moepeft.train, or the directory of an adapter.

  Raises:
    ValueError: the run's config is damaged, or its chat template is missing.
    OSError: a file is a pipe, a socket or a device.
  """
  source = os.path.expanduser(source)
  run = Run(source)
  files.check_file(run.config_file)
  if os.path.isfile(run.config_file):
    data = run.read_config().get('data')
    if data:
      text = chat_template.read(data.get('chat_template', ''))
      return ChatSettings(
        text or base.template, data.get('system_prompt') or base.system
      )
  path = os.path.join(source, _FILE)
  files.check_file(path)
  if os.path.isfile(path):
    return ChatSettings(chat_template.read(path), base.system)
  return base
