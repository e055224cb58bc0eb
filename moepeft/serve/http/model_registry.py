# SPDX-License-Identifier: Apache-2.0
"""What `model` may name: the base and its adapters."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from moepeft.inference import api
from moepeft.inference.engine.engine import Engine
from moepeft.serve.http.chat_templates import Voice, voice
from moepeft.serve.http.errors import no_model

OWNER = 'moepeft'


@dataclasses.dataclass(frozen=True)
class Model:
  """
  Attributes:
    name: what requests call it.
    adapter: what the engine calls it, '' for the base.
    fingerprint: of the base's and the adapter's content.
    voice: how it talks.
    before: tokens of the adapter's soft prompt.
  """

  name: str
  adapter: str
  fingerprint: str
  voice: Voice
  before: int = 0


class Models:
  """The base and what the engine has loaded.

  Attributes:
    base: the base's name.
  """

  def __init__(
    self,
    engine: Engine,
    base: str,
    sha256: str,
    own: Voice,
    taken: Sequence[str] = (),
  ):
    """
    Args:
      sha256: of the base's content.
      own: the base's voice.
      taken: names of models that the engine has nothing to do with.

    Raises:
      ValueError: two models have one name, or an adapter's template is gone.
    """
    if base in taken:
      raise ValueError(
        f'{base!r} is the name of the model for embeddings too; give the base '
        'another with --name'
      )
    self._engine, self.base, self._taken = engine, base, tuple(taken)
    self._sha256, self._own = sha256, own
    self._created = {base: int(time.time())}
    self._voices: dict[str, Voice] = {}
    for loaded in engine.adapters():
      self._check(loaded.name)
      self._note(loaded.name, voice(loaded.source, own))

  def find(self, name: str) -> Model:
    """
    Raises:
      Problem: there is none of this name.
    """
    if name == self.base:
      return Model(name, '', fingerprint(self._sha256), self._own)
    for loaded in self._engine.adapters():
      if loaded.name == name:
        found = fingerprint(self._sha256, loaded.sha256)
        own = self._voices.get(name, self._own)
        return Model(name, name, found, own, loaded.soft_prompt_length)
    raise no_model(name, self.names())

  def names(self) -> list[str]:
    return [self.base, *(one.name for one in self._engine.adapters())]

  def load(self, name: str, path: str) -> api.LoadedAdapter:
    """Loads an adapter, or another one under its name.

    Raises:
      ValueError: it cannot be; what was there before stays.
    """
    self._check(name)
    own = voice(path, self._own)
    loaded = self._engine.load(name, path)
    self._note(name, own)
    return loaded

  def unload(self, name: str) -> None:
    """
    Raises:
      protocol.Unknown: there is none.
    """
    self._engine.unload(name)
    self._voices.pop(name, None)
    self._created.pop(name, None)

  def cards(self) -> list[dict[str, Any]]:
    """In OpenAI's form, with a few fields of ours."""
    base = self._card(self.base, self._sha256, parent=None)
    return [
      base,
      *(
        self._card(one.name, one.sha256, self.base) | {'method': one.method}
        for one in self._engine.adapters()
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
    if name in self._taken:
      raise ValueError(
        f'{name!r} is the name of the model for embeddings; call the adapter '
        'otherwise'
      )

  def _note(self, name: str, own: Voice) -> None:
    self._voices[name], self._created[name] = own, int(time.time())


def fingerprint(base: str, adapter: str = '') -> str:
  """What `system_fingerprint` is: another one where the weights are others."""
  return 'fp_' + hashlib.sha256(f'{base}/{adapter}'.encode()).hexdigest()[:16]
