# SPDX-License-Identifier: Apache-2.0
"""What a conversation may hold, in OpenAI's form."""

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moepeft.serve.http.schemas import MOST_LOGPROBS, Asked, Strict


class Echoed(Strict):
  """Clients send answers back with fields of their own, empty in most."""

  @model_validator(mode='before')
  @classmethod
  def _without_empty(cls, value: Any) -> Any:
    if not isinstance(value, dict):
      return value
    return {
      name: field
      for name, field in value.items()
      if name in cls.model_fields or not _is_empty(field)
    }


def _is_empty(value: Any) -> bool:
  """Whether a value is null, or a text, a list or an object of nothing."""
  if isinstance(value, dict):
    return all(map(_is_empty, value.values()))
  if isinstance(value, list):
    return all(map(_is_empty, value))
  return value is None or value == ''


class Part(Echoed):
  type: Literal['text']
  text: str


class Called(Echoed):
  name: str
  arguments: str


class Call(Echoed):
  id: str | None = None
  type: Literal['function'] = 'function'
  function: Called
  # Of streams that were put together.
  index: int | None = None


class Message(Echoed):
  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: str | list[Part] | None = None
  name: str | None = None
  reasoning_content: str | None = None
  tool_call_id: str | None = None
  tool_calls: list[Call] | None = None
  # Of an answer that was sent back: where its text comes from.
  annotations: list | None = None
  refusal: str | None = None

  @property
  def text(self) -> str:
    if isinstance(self.content, list):
      return ''.join(part.text for part in self.content)
    return self.content or ''

  def model_post_init(self, context: Any) -> None:
    if self.content is None and not (
      self.role == 'assistant' and (self.tool_calls or self.refusal)
    ):
      raise PydanticCustomError(
        'value_error', "'content' is missing; send text, or parts of text"
      )
    if self.tool_calls and self.role != 'assistant':
      raise PydanticCustomError(
        'value_error',
        f"'tool_calls' are of the role 'assistant'; got {self.role!r}",
      )


class Chat(Asked):
  messages: list[Message] = Field(min_length=1)
  logprobs: bool | None = None
  top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
  max_tokens: int | None = Field(None, ge=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  parallel_tool_calls: bool | None = None
  # Looked at by `moepeft.inference.tools.tools`.
  tool_choice: Any = None
  tools: list[Any] | None = None
  audio: Any = None
  function_call: Any = None
  functions: Any = None
  modalities: Any = None
  prediction: Any = None
  reasoning_effort: Any = None
  verbosity: Any = None
  web_search_options: Any = None

  @property
  def length(self) -> int | None:
    """Tokens of the answer at most, by either name."""
    return self.max_completion_tokens or self.max_tokens


class Tokenize(Strict):
  model: str
  prompt: str | None = None
  messages: list[Message] | None = Field(None, min_length=1)
  tools: list[Any] | None = None

  def model_post_init(self, context: Any) -> None:
    if (self.prompt is None) == (self.messages is None):
      raise PydanticCustomError(
        'value_error', "send one of 'prompt' and 'messages'"
      )
