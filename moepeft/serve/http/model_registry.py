# SPDX-License-Identifier: Apache-2.0
"""The registry of the served models: the base and its adapters."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moepeft.inference import api
from moepeft.inference.engine.engine import Engine
from moepeft.serve.http.chat_templates import ChatSettings, chat_settings
from moepeft.serve.http.errors import model_not_found

OWNER = 'moepeft'


@dataclasses.dataclass(frozen=True)
class RegisteredModel:
  """A model that requests may name.

  Attributes:
    name: the name that requests use.
    adapter: the name in the engine; '' for the base.
    fingerprint: hash of the base and the adapter.
    chat_settings: the chat template and system prompt.
    soft_prompt_length: the number of tokens of the adapter's soft prompt.
  """

  name: str
  adapter: str
  fingerprint: str
  chat_settings: ChatSettings
  soft_prompt_length: int = 0


class ModelRegistry:
  """The base and the loaded adapters, by name.

  Attributes:
    base: the name of the base.
  """

  def __init__(
    self,
    engine: Engine,
    base: str,
    sha256: str,
    chat_settings_: ChatSettings,
    reserved_names: Mapping[str, str] = MappingProxyType({}),
  ):
    """
    Args:
      sha256: hash of the base.
      chat_settings_: the chat settings of the base.
      reserved_names: {name that no model here may have: whose it is}.

    Raises:
      ValueError: two models have the same name, or an adapter's chat template
        cannot be read.
    """
    if base in reserved_names:
      raise ValueError(
        f'{base!r} is the name of {reserved_names[base]} too; give the base '
        'another with --name'
      )
    self._engine, self.base = engine, base
    self._reserved_names = dict(reserved_names)
    self._sha256, self._base_chat = sha256, chat_settings_
    self._created = {base: int(time.time())}
    self._chat_settings: dict[str, ChatSettings] = {}
    for loaded in engine.adapters():
      self._check_name(loaded.name)
      self._register(loaded.name, chat_settings(loaded.source, chat_settings_))

  def find(self, name: str) -> RegisteredModel:
    """Finds a model.

    Raises:
      ApiError: no model has this name.
    """
    if name == self.base:
      return RegisteredModel(
        name, '', fingerprint(self._sha256), self._base_chat
      )
    for loaded in self._engine.adapters():
      if loaded.name == name:
        model_fingerprint = fingerprint(self._sha256, loaded.sha256)
        settings = self._chat_settings.get(name, self._base_chat)
        return RegisteredModel(
          name, name, model_fingerprint, settings, loaded.soft_prompt_length
        )
    raise model_not_found(name, self.names())

  def names(self) -> list[str]:
    return [self.base, *(adapter.name for adapter in self._engine.adapters())]

  def load(self, name: str, path: str) -> api.LoadedAdapter:
    """Loads an adapter, or replaces the one of the same name.

    Raises:
      ValueError: the adapter cannot be loaded; the old one stays.
    """
    self._check_name(name)
    settings = chat_settings(path, self._base_chat)
    loaded = self._engine.load(name, path)
    self._register(name, settings)
    return loaded

  def unload(self, name: str) -> None:
    """Unloads an adapter.

    Raises:
      api.UnknownAdapter: no adapter has this name.
    """
    self._engine.unload(name)
    self._chat_settings.pop(name, None)
    self._created.pop(name, None)

  def model_objects(self) -> list[dict[str, Any]]:
    """OpenAI's model objects, with a few more fields."""
    base = self._model_object(self.base, self._sha256, parent=None)
    return [
      base,
      *(
        self._model_object(adapter.name, adapter.sha256, self.base)
        | {
          'method': adapter.method,
          'tasks': adapter.tasks,
          'embedding_size': adapter.embedding_size,
          'routing': adapter.routing and self._engine.routing,
        }
        for adapter in self._engine.adapters()
      ),
    ]

  def _model_object(
    self, name: str, sha256: str, parent: str | None
  ) -> dict[str, Any]:
    return {
      'id': name,
      'object': 'model',
      'created': self._created.get(name, self._created[self.base]),
      'owned_by': OWNER,
      'type': 'language',
      'parent': parent,
      'sha256': sha256,
    }

  def _check_name(self, name: str) -> None:
    if name == self.base:
      raise ValueError(
        f'{name!r} is the name of the base; give the adapter another name'
      )
    if name in self._reserved_names:
      raise ValueError(
        f'{name!r} is the name of {self._reserved_names[name]}; give the '
        'adapter another name'
      )

  def _register(self, name: str, settings: ChatSettings) -> None:
    self._chat_settings[name], self._created[name] = settings, int(time.time())


def fingerprint(base: str, adapter: str = '') -> str:
  """OpenAI's `system_fingerprint`, a hash of the weights."""
  return 'fp_' + hashlib.sha256(f'{base}/{adapter}'.encode()).hexdigest()[:16]
