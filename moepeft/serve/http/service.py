# SPDX-License-Identifier: Apache-2.0
"""What the routes work with, and what others give them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from moepeft.data.chat.formats import Conversation
from moepeft.inference import api
from moepeft.inference.engine.engine import Engine
from moepeft.serve.http.bounded import BoundedThread
from moepeft.serve.http.errors import wrong
from moepeft.serve.http.keys import Keys
from moepeft.serve.http.limits import Limits
from moepeft.serve.http.metrics import Metrics
from moepeft.serve.http.model_registry import Model, Models
from moepeft.serve.http.text import Words


class Compiler(Protocol):
  """Makes constraints; each is used by one request and no other.

  Every method raises ValueError for what cannot be, or is too large.
  """

  def json_schema(
    self, schema: dict[str, Any], strict: bool = True
  ) -> api.Constraint: ...

  def regex(self, text: str) -> api.Constraint: ...

  def grammar(self, text: str) -> api.Constraint: ...

  def choice(self, texts: Sequence[str]) -> api.Constraint: ...


class Reader(Protocol):
  """Reads calls of tools out of an answer's text.

  Attributes:
    called: whether there was one.
  """

  called: bool

  def feed(self, text: str) -> list[dict[str, Any]]:
    """What is certain by now, as OpenAI's deltas."""

  def finish(self) -> list[dict[str, Any]]: ...


class Plan(Protocol):
  """The tools of one request.

  Attributes:
    free: whether the answer may be text, without a call.
  """

  @property
  def free(self) -> bool: ...

  def offered(self, talk: Conversation) -> Conversation:
    """The conversation with the tools that may be called."""

  def constraint(self) -> api.Constraint | None:
    """What keeps calls to their form; None where nothing does."""

  def reader(self) -> Reader: ...


class Calling(Protocol):
  """What makes plans; see `calling`."""

  def plan(
    self, found: list, choice: Any, parallel: bool, template: str
  ) -> Plan | None: ...


class Embedder(Protocol):
  """Makes vectors of texts.

  Attributes:
    name: what requests call it.
    width: numbers of a vector.
  """

  name: str
  width: int

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """(unit vectors float32 [b, d], tokens that were read)."""


class Page(Protocol):
  """A file and the headers that it is served with."""

  body: bytes
  headers: dict[str, str]


@dataclasses.dataclass
class Service:
  """
  Attributes:
    draining: whether the server is going down.
    hosts: values of the header Host that are answered; () for any.
    origins: whose pages' scripts may ask (CORS); ('*',) for any.
    page: the chat page; None for none.
    vectors: where texts become vectors, so that long ones hold up no chat.
  """

  engine: Engine
  words: Words
  models: Models
  metrics: Metrics
  limits: Limits = Limits()
  keys: Keys = Keys()
  compiler: Compiler | None = None
  calling: Calling | None = None
  embedder: Embedder | None = None
  hosts: tuple[str, ...] = ()
  origins: tuple[str, ...] = ()
  page: Page | None = None
  draining: bool = False
  vectors: BoundedThread = dataclasses.field(
    default_factory=lambda: BoundedThread('vectors')
  )

  def find(self, name: str) -> Model:
    """A model that writes text.

    Raises:
      Problem: there is none of this name, or it makes embeddings alone.
    """
    if self.embedder is not None and name == self.embedder.name:
      raise wrong(
        f'the model {name!r} makes embeddings and writes no text; ask it at '
        f'/v1/embeddings, or name one of {", ".join(self.models.names())}',
        'model',
      )
    return self.models.find(name)
