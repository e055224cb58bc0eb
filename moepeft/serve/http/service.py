# SPDX-License-Identifier: Apache-2.0
"""What the routes work with, and what others give them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from moepeft.serve import protocol
from moepeft.serve.http.keys import Keys
from moepeft.serve.http.limits import Limits
from moepeft.serve.http.metrics import Metrics
from moepeft.serve.http.models import Models
from moepeft.serve.http.words import Words


class Compiler(Protocol):
  """Makes constraints; each is used by one request and no other.

  Every method raises ValueError for what cannot be, or is too large.
  """

  def json_schema(self, schema: dict[str, Any]) -> protocol.Constraint: ...

  def regex(self, text: str) -> protocol.Constraint: ...

  def grammar(self, text: str) -> protocol.Constraint: ...

  def choice(self, texts: Sequence[str]) -> protocol.Constraint: ...


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
  """

  engine: protocol.Engine
  words: Words
  models: Models
  metrics: Metrics
  limits: Limits = Limits()
  keys: Keys = Keys()
  compiler: Compiler | None = None
  embedder: Embedder | None = None
  hosts: tuple[str, ...] = ()
  origins: tuple[str, ...] = ()
  page: Page | None = None
  draining: bool = False
