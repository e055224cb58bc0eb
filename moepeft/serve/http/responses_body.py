# SPDX-License-Identifier: Apache-2.0
"""The body of /v1/responses, and its translation to a chat.

A response is a chat in other words: `input` and `instructions` are messages,
`text.format` is a response format, and a function is a tool without the key
`function`. Responses are not stored, so a request has the whole conversation.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from moepeft.inference.engine.limits import MAX_LOGPROBS
from moepeft.serve.http.errors import ApiError
from moepeft.serve.http.schemas import (
  Chat,
  EchoedMessage,
  FunctionCall,
  JsonSchema,
  Message,
  ResponseFormat,
  SamplingFields,
  Strict,
  ToolCall,
)

_LOGPROBS = 'message.output_text.logprobs'
_SYSTEM = ('system', 'developer')
# The model has no reasoning items, so asking for them has no effect.
_INCLUDABLE = (_LOGPROBS, 'reasoning.encrypted_content')


class InputText(EchoedMessage):
  """A part of a message; `output_text` is of an answer that comes back."""

  type: Literal['input_text', 'output_text']
  text: str
  annotations: list | None = None
  logprobs: list | None = None


class InputMessage(EchoedMessage):
  type: Literal['message'] = 'message'
  role: Literal['system', 'developer', 'user', 'assistant']
  content: str | list[InputText]
  # In an answer that comes back.
  id: str | None = None
  status: str | None = None
  phase: str | None = None

  @property
  def text(self) -> str:
    return _text(self.content)


class CallItem(EchoedMessage):
  type: Literal['function_call']
  call_id: str
  name: str
  arguments: str
  id: str | None = None
  status: str | None = None


class CallOutputItem(EchoedMessage):
  type: Literal['function_call_output']
  call_id: str
  output: str | list[InputText]
  id: str | None = None
  status: str | None = None

  @property
  def text(self) -> str:
    return _text(self.output)


def _text(content: str | list[InputText]) -> str:
  if isinstance(content, str):
    return content
  return ''.join(part.text for part in content)


def _item_tag(item: Any) -> str | None:
  # Brackets take the tag out of the path in an error; see `errors`.
  return f'[{item.get("type", "message")}]' if isinstance(item, dict) else None


Item = Annotated[
  Annotated[InputMessage, Tag('[message]')]
  | Annotated[CallItem, Tag('[function_call]')]
  | Annotated[CallOutputItem, Tag('[function_call_output]')],
  Discriminator(
    _item_tag,
    custom_error_type='item_type',
    custom_error_message=(
      "the type of an item is 'message', 'function_call' or "
      "'function_call_output' here"
    ),
  ),
]


class TextFormat(Strict):
  type: Literal['text', 'json_object', 'json_schema']
  # Of the type 'json_schema'.
  name: str | None = Field(None, min_length=1, max_length=64)
  schema_: dict[str, Any] | None = Field(None, alias='schema')
  description: str | None = None
  strict: bool | None = None

  def model_post_init(self, context: Any) -> None:
    if self.type == 'json_schema' and None in (self.name, self.schema_):
      raise PydanticCustomError(
        'value_error', "the type 'json_schema' needs 'name' and 'schema'"
      )

  def response_format(self) -> ResponseFormat:
    """The same format in a chat."""
    fields = self.model_dump(by_alias=True, exclude_unset=True)
    kind = fields.pop('type')
    if kind != 'json_schema':
      return ResponseFormat(type=kind)
    return ResponseFormat(
      type=kind, json_schema=JsonSchema.model_validate(fields)
    )


class TextConfig(Strict):
  format: TextFormat | None = None
  verbosity: Literal['medium'] | None = None


class FunctionTool(EchoedMessage):
  """A function; further fields are allowed where they are empty."""

  type: Literal['function']
  # Checked by `moepeft.inference.tools.tools`.
  name: Any
  description: Any = None
  parameters: Any = None
  strict: Any = None

  def chat_tool(self) -> dict[str, Any]:
    """The same tool in a chat."""
    function = self.model_dump(exclude={'type'}, exclude_unset=True)
    return {'type': 'function', 'function': function}


class StreamFields(Strict):
  # OpenAI's random padding of events against traffic analysis; without effect.
  include_obfuscation: bool = False


class ResponsesBody(SamplingFields):
  input: str | list[Item]
  instructions: str | None = None
  max_output_tokens: int | None = Field(None, ge=1)
  text: TextConfig | None = None
  tools: list[FunctionTool] | None = None
  tool_choice: Any = None
  parallel_tool_calls: bool | None = None
  top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
  include: list[str] | None = None
  stream_options: StreamFields | None = None
  previous_response_id: str | None = None
  # Not supported.
  background: Any = None
  conversation: Any = None
  max_tool_calls: Any = None
  prompt: Any = None
  reasoning: Any = None
  truncation: Any = None

  @field_validator('input')
  @classmethod
  def _check_input(cls, value: str | list) -> str | list:
    if not value:
      raise ValueError('expected a text or at least 1 item; got none')
    return value

  @field_validator('previous_response_id')
  @classmethod
  def _check_previous(cls, value: str | None) -> str | None:
    if value is not None:
      raise ValueError(
        'this server stores no responses; send the earlier items in input'
      )
    return value

  @field_validator('include')
  @classmethod
  def _check_include(cls, value: list[str] | None) -> list[str] | None:
    for name in value or ():
      if name not in _INCLUDABLE:
        raise ValueError(
          f'expected {" or ".join(_INCLUDABLE)}; got {name!r:.60}'
        )
    return value

  @property
  def format(self) -> TextFormat:
    text_format = self.text.format if self.text else None
    return text_format or TextFormat(type='text')

  @property
  def reports_logprobs(self) -> bool:
    return _LOGPROBS in (self.include or ()) or self.top_logprobs is not None

  def to_chat(self) -> Chat:
    """The chat that gives the response."""
    fields = {
      name: getattr(self, name)
      for name in SamplingFields.model_fields
      if name in self.model_fields_set
    }
    tools = [tool.chat_tool() for tool in self.tools or ()]
    return Chat(
      **fields,
      messages=_messages(self),
      max_completion_tokens=self.max_output_tokens,
      response_format=self.format.response_format(),
      tools=tools or None,
      tool_choice=self.tool_choice,
      parallel_tool_calls=self.parallel_tool_calls,
      logprobs=self.reports_logprobs,
      top_logprobs=self.top_logprobs,
    )


def _messages(body: ResponsesBody) -> list[Message]:
  items: Sequence = body.input
  if isinstance(items, str):
    items = [InputMessage(role='user', content=items)]
  turns: list[dict[str, Any]] = []
  if body.instructions:
    turns.append({'role': 'system', 'content': body.instructions})
  for item in items:
    last = turns[-1] if turns else {'role': ''}
    if isinstance(item, CallItem):
      # Text and calls of one answer are one turn.
      if last['role'] != 'assistant':
        last = {'role': 'assistant'}
        turns.append(last)
      function = FunctionCall(name=item.name, arguments=item.arguments)
      call = ToolCall(id=item.call_id, function=function)
      last.setdefault('tool_calls', []).append(call)
    elif isinstance(item, CallOutputItem):
      turns.append(
        {'role': 'tool', 'tool_call_id': item.call_id, 'content': item.text}
      )
    elif item.role in _SYSTEM and len(turns) == 1 and last['role'] in _SYSTEM:
      # Templates take one system turn, at the start.
      last['content'] += f'\n\n{item.text}'
    else:
      turns.append({'role': item.role, 'content': item.text})
  return [Message(**turn) for turn in turns]


# The fields of a chat that have another name here.
_NAMES = {
  'messages': 'input',
  'max_tokens': 'max_output_tokens',
  'response_format': 'text.format',
}


def rename_fields(error: ApiError) -> ApiError:
  """The error of a chat, with the names that fields have in /v1/responses."""
  for name, new_name in _NAMES.items():
    if error.param == name or str(error.param).startswith(f'{name}['):
      return ApiError(
        error.status,
        error.message.replace(name, new_name),
        new_name,
        error.code,
        error.kind,
        error.headers,
      )
  return error
