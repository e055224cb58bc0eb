# SPDX-License-Identifier: Apache-2.0
"""The state that the routes share."""

import dataclasses

from moepeft.core.http_access import ApiKeys
from moepeft.inference.constraints.grammar import Compiler
from moepeft.inference.engine.engine import Engine
from moepeft.serve.embeddings.chooser import AdapterChooser
from moepeft.serve.embeddings.encoder import SentenceEmbedder
from moepeft.serve.http.bounded import BoundedThread
from moepeft.serve.http.errors import invalid_request
from moepeft.serve.http.limits import RequestLimits
from moepeft.serve.http.metrics import Metrics
from moepeft.serve.http.model_registry import ModelRegistry, RegisteredModel
from moepeft.serve.http.text import ServedTokenizer
from moepeft.serve.http.tool_calls import ToolPlanner
from moepeft.serve.page import Page

# The model of requests that go to an adapter by their content.
AUTO = 'auto'


@dataclasses.dataclass
class Service:
  """The state that the routes share.

  Attributes:
    draining: whether the server is shutting down.
    hosts: accepted values of the header Host; () for any.
    origins: origins that CORS allows; ('*',) for any.
    page: the chat page; None for none.
    chooser: what chooses an adapter for the model 'auto'; None for none.
    embedding_thread: the thread that computes embeddings.
  """

  engine: Engine
  tokenizer: ServedTokenizer
  models: ModelRegistry
  metrics: Metrics
  limits: RequestLimits = RequestLimits()
  keys: ApiKeys = ApiKeys()
  compiler: Compiler | None = None
  tool_planner: ToolPlanner | None = None
  embedder: SentenceEmbedder | None = None
  hosts: tuple[str, ...] = ()
  origins: tuple[str, ...] = ()
  page: Page | None = None
  draining: bool = False
  chooser: AdapterChooser | None = None
  embedding_thread: BoundedThread = dataclasses.field(
    default_factory=lambda: BoundedThread('vectors')
  )

  def find(self, name: str) -> RegisteredModel:
    """Finds a model that generates text.

    Raises:
      ApiError: no model has this name, or it only computes embeddings, or is
        chosen by the text of a request for an answer.
    """
    if self.chooser is not None and name == AUTO:
      raise invalid_request(
        f'the model {AUTO!r} is chosen by the text of a chat or a completion; '
        f'here, name one of {", ".join(self.models.names())}',
        'model',
      )
    if self.embedder is not None and name == self.embedder.name:
      raise invalid_request(
        f'the model {name!r} computes embeddings, not text; use it at '
        f'/v1/embeddings, or name one of {", ".join(self.models.names())}',
        'model',
      )
    return self.models.find(name)
