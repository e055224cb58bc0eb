# SPDX-License-Identifier: Apache-2.0
"""Request bodies: OpenAI's fields, and a few extensions.

Types are strict ('5' is no number), an unknown field is an error, and so is a
field of OpenAI's that does something which this server does not; at a value
that does nothing it is taken.
"""

from typing import Annotated, Any, Literal

from pydantic import (
  BaseModel,
  BeforeValidator,
  ConfigDict,
  Field,
  field_validator,
  model_validator,
)
from pydantic_core import PydanticCustomError

# Alternatives that a token comes with at most, as in OpenAI's chat.
MOST_LOGPROBS = 20
_INT64 = 1 << 63
# Values at which a field that is not supported does nothing, beside null.
_NEUTRAL: dict[str, tuple] = {
  'audio': (),
  'best_of': (1,),
  'frequency_penalty': (0,),
  'function_call': ('none',),
  'functions': ([],),
  'logit_bias': ({},),
  'modalities': (['text'],),
  'prediction': (),
  'presence_penalty': (0,),
  'reasoning_effort': ('none',),
  'service_tier': ('auto', 'default'),
  'store': (False,),
  'suffix': ('',),
  'verbosity': ('medium',),
  'web_search_options': (),
}


class Strict(BaseModel):
  model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)


class StreamOptions(Strict):
  include_usage: bool = False
  # Random letters that hide lengths from who listens in; we add none.
  include_obfuscation: bool = False


class JsonSchema(Strict):
  name: str = Field(min_length=1, max_length=64)
  schema_: dict[str, Any] = Field(default_factory=dict, alias='schema')
  description: str | None = None
  strict: bool | None = None


_CONSTRAINTS = ('json_object', 'json_schema', 'regex', 'grammar', 'choice')


class ResponseFormat(Strict):
  """OpenAI's text, json_object and json_schema; ours are the other three."""

  type: Literal[
    'text', 'json_object', 'json_schema', 'regex', 'grammar', 'choice'
  ]
  json_schema: JsonSchema | None = None
  regex: str | None = None
  grammar: str | None = None
  choice: list[str] | None = None

  @field_validator('choice')
  @classmethod
  def _check_choice(cls, value: list[str] | None) -> list[str] | None:
    if value is not None and not all([value, *value]):
      raise ValueError('name at least one choice, and no empty one')
    return value

  @property
  def is_constraint(self) -> bool:
    """Whether not any text will do."""
    return self.type in _CONSTRAINTS

  def model_post_init(self, context: Any) -> None:
    fields = self.__class__.model_fields
    if self.type in fields and getattr(self, self.type) is None:
      raise PydanticCustomError(
        'value_error', f'the type {self.type!r} needs the field {self.type!r}'
      )


class GenerationFields(Strict):
  """Fields that completions and chat share."""

  model: str
  n: int = Field(1, ge=1)
  stream: bool = False
  stream_options: StreamOptions | None = None
  stop: str | list[str] | None = None
  seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
  temperature: float | None = Field(None, ge=0, le=2)
  top_p: float | None = Field(None, ge=0, le=1)
  user: str | None = None
  # Of no effect here: names for the caller's own books.
  metadata: dict[str, str] | None = None
  prompt_cache_key: str | None = None
  safety_identifier: str | None = None
  # Ours.
  min_p: float | None = Field(None, ge=0, le=1)
  repetition_penalty: float | None = Field(None, gt=0, le=10)
  response_format: ResponseFormat | None = None
  routing: bool = False
  top_k: int | None = Field(None, ge=1, lt=1 << 31)
  # Not supported.
  frequency_penalty: Any = None
  logit_bias: Any = None
  presence_penalty: Any = None
  service_tier: Any = None
  store: Any = None

  @field_validator(*_NEUTRAL, mode='before', check_fields=False)
  @classmethod
  def _neutral(cls, value: Any, info: Any) -> Any:
    if value is not None and value not in _NEUTRAL[info.field_name]:
      raise ValueError('this server does not have it; leave it out')
    return value

  @field_validator('n', 'stream', mode='before')
  @classmethod
  def _default(cls, value: Any, info: Any) -> Any:
    # Clients send null for what they leave to the server.
    return cls.model_fields[info.field_name].default if value is None else value

  @field_validator('routing', mode='before')
  @classmethod
  def _off(cls, value: Any) -> Any:
    return False if value is None else value

  @field_validator('stop')
  @classmethod
  def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
    stops = [value] if isinstance(value, str) else value or []
    if len(stops) > 16 or any(len(stop) > 256 for stop in stops):
      raise ValueError('at most 16 stop strings of 256 characters are taken')
    if isinstance(value, list) and '' in stops:
      raise ValueError('a stop string is empty; leave it out')
    return value

  @property
  def stops(self) -> tuple[str, ...]:
    stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
    return tuple(stop for stop in stops if stop)

  @property
  def usage(self) -> bool:
    """Whether a stream ends with its usage."""
    return bool(self.stream_options and self.stream_options.include_usage)


_Id = Annotated[int, Field(ge=0, lt=1 << 31)]


def _texts(value: Any) -> Any:
  # Looked at by hand: of a union pydantic would tell every member's every
  # error, of each of a hundred thousand ids.
  if isinstance(value, str) or _all(value, str) or _ids(value):
    return value
  if isinstance(value, list) and value and all(map(_ids, value)):
    return value
  raise ValueError(
    'expected a text, texts, token ids, or several lists of token ids, none '
    'of them empty'
  )


def _ids(value: Any) -> bool:
  return _all(value, int) and 0 <= min(value) and max(value) < 1 << 31


def _all(value: Any, kind: type) -> bool:
  # True is an int, but no token.
  return (
    isinstance(value, list)
    and bool(value)
    and all(type(item) is kind for item in value)
  )


_Texts = Annotated[Any, BeforeValidator(_texts)]


class Completion(GenerationFields):
  prompt: _Texts
  echo: bool = False
  logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
  max_tokens: int | None = Field(None, ge=0)
  best_of: Any = None
  suffix: Any = None

  @field_validator('echo', mode='before')
  @classmethod
  def _no_echo(cls, value: Any) -> Any:
    return False if value is None else value

  @property
  def prompts(self) -> list[str] | list[list[int]]:
    """The prompts as a list, in either form."""
    if isinstance(self.prompt, str):
      return [self.prompt]
    if isinstance(self.prompt[0], int):
      return [self.prompt]
    return self.prompt


class EmbeddingObject(Strict):
  model: str
  input: _Texts
  dimensions: int | None = Field(None, ge=1)
  encoding_format: Literal['float', 'base64'] | None = None
  user: str | None = None


class Load(Strict):
  name: str = Field(pattern=r'^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$')
  path: str = Field(min_length=1, max_length=4096)


class Unload(Strict):
  name: str


class Detokenize(Strict):
  model: str
  tokens: list[_Id]


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


class ContentPart(Echoed):
  type: Literal['text']
  text: str


class FunctionCall(Echoed):
  name: str
  arguments: str


class ToolCall(Echoed):
  id: str | None = None
  type: Literal['function'] = 'function'
  function: FunctionCall
  # Of streams that were put together.
  index: int | None = None


class Message(Echoed):
  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: str | list[ContentPart] | None = None
  name: str | None = None
  reasoning_content: str | None = None
  tool_call_id: str | None = None
  tool_calls: list[ToolCall] | None = None
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


class Chat(GenerationFields):
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
