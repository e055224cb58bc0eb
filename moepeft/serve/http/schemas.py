# SPDX-License-Identifier: Apache-2.0
"""Schemas of request bodies: OpenAI's fields, and a few extensions.

Types are strict ('5' is not a number), and unknown fields are errors. OpenAI's
fields that this server does not support are accepted only with a value that has
no effect.
"""

import re
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

from moepeft.inference.engine.limits import MAX_LOGPROBS
from moepeft.inference.sampling import MAX_BIAS, MAX_COUNT_PENALTY

_INT64 = 1 << 63
_TOKEN_KEY = re.compile(r'0|[1-9][0-9]{0,9}')
# Unsupported fields, with the values beside null that have no effect.
_UNSUPPORTED: dict[str, tuple] = {
  'audio': (),
  'background': (False,),
  'best_of': (1,),
  'conversation': (),
  'function_call': ('none',),
  'functions': ([],),
  'max_tool_calls': (),
  'modalities': (['text'],),
  'prediction': (),
  'reasoning': ({}, {'effort': 'none'}),
  'reasoning_effort': ('none',),
  'service_tier': ('auto', 'default'),
  'store': (False,),
  'suffix': ('',),
  'truncation': ('disabled',),
  'verbosity': ('medium',),
  'web_search_options': (),
}


class Strict(BaseModel):
  model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)


class StreamOptions(Strict):
  include_usage: bool = False
  # OpenAI's random padding of events against traffic analysis; without effect.
  include_obfuscation: bool = False


class JsonSchema(Strict):
  name: str = Field(min_length=1, max_length=64)
  schema_: dict[str, Any] = Field(default_factory=dict, alias='schema')
  description: str | None = None
  strict: bool | None = None


_CONSTRAINTS = ('json_object', 'json_schema', 'regex', 'grammar', 'choice')


class ResponseFormat(Strict):
  """OpenAI's response_format; regex, grammar and choice are extensions."""

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
    """Whether the format restricts the text."""
    return self.type in _CONSTRAINTS

  def model_post_init(self, context: Any) -> None:
    fields = self.__class__.model_fields
    if self.type in fields and getattr(self, self.type) is None:
      raise PydanticCustomError(
        'value_error', f'the type {self.type!r} needs the field {self.type!r}'
      )


_Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


class SamplingFields(Strict):
  """Fields of every request for text."""

  model: str
  stream: bool = False
  seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
  temperature: float | None = Field(None, ge=0, le=2)
  top_p: float | None = Field(None, ge=0, le=1)
  frequency_penalty: float | None = Field(
    None, ge=-MAX_COUNT_PENALTY, le=MAX_COUNT_PENALTY
  )
  presence_penalty: float | None = Field(
    None, ge=-MAX_COUNT_PENALTY, le=MAX_COUNT_PENALTY
  )
  logit_bias: dict[str, _Bias] | None = None
  user: str | None = None
  # Without effect here: names for the client's own accounting.
  metadata: dict[str, str] | None = None
  prompt_cache_key: str | None = None
  safety_identifier: str | None = None
  # Extensions.
  embedding: list[float] | None = None
  min_p: float | None = Field(None, ge=0, le=1)
  repetition_penalty: float | None = Field(None, gt=0, le=10)
  task: str | None = None
  top_k: int | None = Field(None, ge=1, lt=1 << 31)
  # Not supported.
  service_tier: Any = None
  store: Any = None

  @field_validator(*_UNSUPPORTED, mode='before', check_fields=False)
  @classmethod
  def _check_unsupported(cls, value: Any, info: Any) -> Any:
    if value is not None and value not in _UNSUPPORTED[info.field_name]:
      raise ValueError('this server does not support it; leave it out')
    return value

  @field_validator(
    'n', 'stream', 'routing', 'echo', mode='before', check_fields=False
  )
  @classmethod
  def _replace_null(cls, value: Any, info: Any) -> Any:
    # Clients send null for fields that they leave to the server.
    return cls.model_fields[info.field_name].default if value is None else value

  @field_validator('logit_bias')
  @classmethod
  def _check_bias(cls, value: dict | None) -> dict | None:
    for key in value or ():
      # int() would take '+5', ' 5', '05' and digits of other scripts.
      if not _TOKEN_KEY.fullmatch(key):
        raise ValueError(
          f'a key is the id of a token, such as "50"; got {key!r:.60}'
        )
    return value

  @property
  def token_bias(self) -> tuple[tuple[int, float], ...]:
    """Pairs (token id, bias)."""
    bias = self.logit_bias or {}
    return tuple((int(key), number) for key, number in bias.items())


class GenerationFields(SamplingFields):
  """Fields that completions and chat share."""

  n: int = Field(1, ge=1)
  stream_options: StreamOptions | None = None
  stop: str | list[str] | None = None
  # Extensions.
  response_format: ResponseFormat | None = None
  routing: bool | Literal['layers'] = False

  @field_validator('routing', mode='before')
  @classmethod
  def _check_routing(cls, value: Any) -> Any:
    if value is None or isinstance(value, bool) or value == 'layers':
      return value
    raise ValueError(f"expected true, false or 'layers'; got {value!r:.60}")

  @field_validator('stop')
  @classmethod
  def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
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
  def include_usage(self) -> bool:
    """Whether a stream ends with a usage chunk."""
    return bool(self.stream_options and self.stream_options.include_usage)


_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


def _check_input(value: Any) -> Any:
  # Checked by hand: for a union, pydantic reports every error of every member,
  # for each of a hundred thousand ids.
  if isinstance(value, str) or _is_list_of(value, str) or _is_token_ids(value):
    return value
  if isinstance(value, list) and value and all(map(_is_token_ids, value)):
    return value
  raise ValueError(
    'expected a text, a list of texts, a list of token ids, or a list of such '
    'lists, none of them empty'
  )


def _is_token_ids(value: Any) -> bool:
  return _is_list_of(value, int) and 0 <= min(value) and max(value) < 1 << 31


def _is_list_of(value: Any, kind: type) -> bool:
  # Not isinstance, because True is an int but not a token id.
  return (
    isinstance(value, list)
    and bool(value)
    and all(type(item) is kind for item in value)
  )


_Input = Annotated[Any, BeforeValidator(_check_input)]


class Completion(GenerationFields):
  prompt: _Input
  echo: bool = False
  logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
  max_tokens: int | None = Field(None, ge=0)
  best_of: Any = None
  suffix: Any = None

  @property
  def prompts(self) -> list[str] | list[list[int]]:
    """The prompts as a list, of texts or of lists of token ids."""
    if isinstance(self.prompt, str):
      return [self.prompt]
    if isinstance(self.prompt[0], int):
      return [self.prompt]
    return self.prompt


class EmbeddingsBody(Strict):
  model: str
  input: _Input
  dimensions: int | None = Field(None, ge=1)
  encoding_format: Literal['float', 'base64'] | None = None
  user: str | None = None


class LoadAdapter(Strict):
  name: str = Field(pattern=r'^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$')
  path: str = Field(min_length=1, max_length=4096)


class UnloadAdapter(Strict):
  name: str


class Detokenize(Strict):
  model: str
  tokens: list[_TokenId]


class EchoedMessage(Strict):
  """A message that a client sends back; unknown empty fields are ignored."""

  @model_validator(mode='before')
  @classmethod
  def _drop_empty_fields(cls, value: Any) -> Any:
    if not isinstance(value, dict):
      return value
    return {
      name: field
      for name, field in value.items()
      if name in cls.model_fields or not _is_empty(field)
    }


def _is_empty(value: Any) -> bool:
  """Whether a value is null, '', or a list or object of empty values."""
  if isinstance(value, dict):
    return all(map(_is_empty, value.values()))
  if isinstance(value, list):
    return all(map(_is_empty, value))
  return value is None or value == ''


class ContentPart(EchoedMessage):
  type: Literal['text']
  text: str


class FunctionCall(EchoedMessage):
  name: str
  arguments: str


class ToolCall(EchoedMessage):
  id: str | None = None
  type: Literal['function'] = 'function'
  function: FunctionCall
  # In calls that a client assembled from a stream.
  index: int | None = None


class Message(EchoedMessage):
  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: str | list[ContentPart] | None = None
  name: str | None = None
  reasoning_content: str | None = None
  tool_call_id: str | None = None
  tool_calls: list[ToolCall] | None = None
  # In an assistant's message that a client sends back.
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
        'value_error',
        "'content' is missing; send a text, or a list of text parts",
      )
    if self.tool_calls and self.role != 'assistant':
      raise PydanticCustomError(
        'value_error',
        f"'tool_calls' need the role 'assistant'; got {self.role!r}",
      )


class Chat(GenerationFields):
  messages: list[Message] = Field(min_length=1)
  logprobs: bool | None = None
  top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
  max_tokens: int | None = Field(None, ge=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  parallel_tool_calls: bool | None = None
  # Checked by `moepeft.inference.tools.tools`.
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
  def max_answer_tokens(self) -> int | None:
    """The maximum number of answer tokens, by its new or its old name."""
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
