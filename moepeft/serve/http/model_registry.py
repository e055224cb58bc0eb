# SPDX-License-Identifier: Apache-2.0
"""Names of served models: the base and its adapters."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from moepeft.inference import api
from moepeft.inference.engine.engine import Engine
from moepeft.serve.http.chat_templates import ChatSettings, chat_settings
from moepeft.serve.http.errors import model_not_found

OWNER = 'moepeft'


@dataclasses.dataclass(frozen=True)
class RegisteredModel:
  """
  Attributes:
    name: what requests call it.
    adapter: what the engine calls it, '' for the base.
    fingerprint: of the base's and the adapter's content.
    chat_settings: its chat template and system prompt.
    before: tokens of the adapter's soft prompt.
  """

  name: str
  adapter: str
  fingerprint: str
  chat_settings: ChatSettings
  before: int = 0


class ModelRegistry:
  """The base and what the engine has loaded.

  Attributes:
    base: the base's name.
  """

  def __init__(
    self,
    engine: Engine,
    base: str,
    sha256: str,
    chat_settings_: ChatSettings,
    reserved_names: Sequence[str] = (),
  ):
    """
    Args:
      sha256: of the base's content.
      chat_settings_: the base's.
      reserved_names: names of models that are not the engine's.

    Raises:
      ValueError: two models have one name, or an adapter's template is gone.
    """
    if base in reserved_names:
      raise ValueError(
        f'{base!r} is the name of the model for embeddings too; give the base '
        'another with --name'
      )
    self._engine, self.base, self._reserved = (
      engine,
      base,
      tuple(reserved_names),
    )
    self._sha256, self._base_chat = sha256, chat_settings_
    self._created = {base: int(time.time())}
    self._chat_settings: dict[str, ChatSettings] = {}
    for loaded in engine.adapters():
      self._check(loaded.name)
      self._note(loaded.name, chat_settings(loaded.source, chat_settings_))

  def find(self, name: str) -> RegisteredModel:
    """
    Raises:
      ApiError: there is none of this name.
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
    """Loads an adapter, or another one under its name.

    Raises:
      ValueError: it cannot be; what was there before stays.
    """
    self._check(name)
    settings = chat_settings(path, self._base_chat)
    loaded = self._engine.load(name, path)
    self._note(name, settings)
    return loaded

  def unload(self, name: str) -> None:
    """
    Raises:
      api.UnknownAdapter: there is none.
    """
    self._engine.unload(name)
    self._chat_settings.pop(name, None)
    self._created.pop(name, None)

  def cards(self) -> list[dict[str, Any]]:
    """In OpenAI's form, with a few fields of ours."""
    base = self._card(self.base, self._sha256, parent=None)
    return [
      base,
      *(
        self._card(adapter.name, adapter.sha256, self.base)
        | {'method': adapter.method}
        for adapter in self._engine.adapters()
      ),
    ]

  def _card(self, name: str, sha256: str, parent: str | None) -> dict[str, Any]:
    return {
      'id': name,
      'object': 'model',
      'created': self._created.get(name, self._created[self.base]),
      'owned_by': OWNER,
      'type': 'language',
      'parent': parent,
      'sha256': sha256,
    }

  def _check(self, name: str) -> None:
    if name == self.base:
      raise ValueError(
        f'{name!r} is the name of the base; call the adapter otherwise'
      )
    if name in self._reserved:
      raise ValueError(
        f'{name!r} is the name of the model for embeddings; call the adapter '
        'otherwise'
      )

  def _note(self, name: str, settings: ChatSettings) -> None:
    self._chat_settings[name], self._created[name] = settings, int(time.time())


def fingerprint(base: str, adapter: str = '') -> str:
  """`system_fingerprint`: a hash of the weights' content."""
  return 'fp_' + hashlib.sha256(f'{base}/{adapter}'.encode()).hexdigest()[:16]
