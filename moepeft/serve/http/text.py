# SPDX-License-Identifier: Apache-2.0
"""The server's tokenizer: encodes prompts and decodes answers.

Slow calls (encoding a prompt, rendering a chat template) run on a separate
thread. The event loop decodes single tokens itself.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from moepeft.core import untrusted
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat import render as chat_render
from moepeft.data.chat.formats import Conversation
from moepeft.data.chat.messages import Turn
from moepeft.data.preference.tokenize import plain_text
from moepeft.data.tokenizers.tokenizer import (
  HuggingFaceTokenizer,
  Tokenizer,
  skipped_special_tokens,
)
from moepeft.inference import prompts
from moepeft.inference.token_bytes import TokenBytes
from moepeft.serve.http.chat_templates import ChatSettings
from moepeft.serve.http.errors import invalid_request
from moepeft.serve.http.schemas import Message, ToolCall
from moepeft.serve.http.tool_calls import ToolPlan


def token_text(token: bytes) -> str:
  """A token's bytes as text; 'bytes:\\xe2\\x82' if they are not UTF-8.

  This is the notation of OpenAI's legacy completions.
  """
  try:
    return token.decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in token)


Result = TypeVar('Result')
# The maximum nesting of a call's arguments, which templates render recursively.
_MAX_DEPTH = 64


class ServedTokenizer:
  """The tokenizer of a served model.

  Attributes:
    decoder_only: whether the model is decoder-only.
    eos_token_ids: ids that end an answer and are not decoded.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    decoder_only: bool,
    eos_token_ids: Sequence[int],
  ):
    self._tokenizer, self.decoder_only = tokenizer, decoder_only
    self.eos_token_ids = tuple(eos_token_ids)
    self._token_bytes = TokenBytes(tokenizer)
    self._template_eos: dict[str, tuple[int, ...]] = {}
    self._executor = ThreadPoolExecutor(1, 'tokenizer')

  async def run_in_thread(
    self, call: Callable[..., Result], *args: Any
  ) -> Result:
    """Runs a call on the tokenizer thread."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._executor, call, *args)

  def close(self) -> None:
    self._executor.shutdown(wait=False, cancel_futures=True)

  def encode_prompt(self, text: str) -> list[int]:
    """Encodes a prompt.

    Raises:
      ApiError: the prompt is empty.
    """
    try:
      return prompts.encode_text(self._tokenizer, text, self.decoder_only)
    except ValueError as e:
      raise invalid_request(f'prompt: {e}', 'prompt') from None

  def encode_chat(
    self,
    messages: Sequence[Message],
    settings: ChatSettings,
    plan: ToolPlan | None = None,
  ) -> list[int]:
    """Encodes a conversation up to the assistant's turn.

    An encoder-decoder gets plain text as in its training: the text of a single
    turn, or several turns with their roles.

    Args:
      plan: the tools that may be called.

    Raises:
      ApiError: there is no chat template, or it cannot render the turns.
    """
    turns = [_to_turn(message, i) for i, message in enumerate(messages)]
    if settings.system and turns[0].role != 'system':
      turns.insert(0, Turn('system', settings.system))
    conversation = Conversation(tuple(turns))
    conversation = (
      conversation if plan is None else plan.with_tools(conversation)
    )
    if not self.decoder_only:
      return self._encode_as_text(conversation)
    try:
      text = chat_render.render_prompt(
        conversation, self._chat_tokenizer(settings), settings.template
      )
    except ValueError as e:
      raise invalid_request(f'messages: {e}', 'messages') from None
    return self._tokenizer.encode(text)

  def _encode_as_text(self, conversation: Conversation) -> list[int]:
    if conversation.tools or any(
      turn.calls or turn.thought for turn in conversation.turns
    ):
      raise invalid_request(
        'the model is an encoder-decoder, which reads turns as plain text, '
        'without tools or thoughts; leave them out',
        'messages',
      )
    return self.encode_prompt(plain_text(conversation))

  def chat_template(self, settings: ChatSettings) -> str:
    """The source of the chat template; '' without one."""
    if not isinstance(self._tokenizer, HuggingFaceTokenizer):
      return settings.template
    if not (settings.template or self._tokenizer.tokenizer.chat_template):
      return ''
    return chat_render.template_source(
      self._tokenizer.tokenizer, settings.template
    )

  def eos_token_ids_for(self, settings: ChatSettings) -> tuple[int, ...]:
    """The ids that end an answer, with those of the chat template."""
    text = settings.template
    if not (text and isinstance(self._tokenizer, HuggingFaceTokenizer)):
      return self.eos_token_ids
    if text not in self._template_eos:
      template_eos = chat_dataset.ChatTemplate(
        self._tokenizer.tokenizer, text
      ).eos_token_ids()
      self._template_eos[text] = tuple(
        dict.fromkeys((*self.eos_token_ids, *template_eos))
      )
    return self._template_eos[text]

  def _chat_tokenizer(self, settings: ChatSettings) -> Any:
    """Returns the Hugging Face tokenizer, and checks for a chat template."""
    tokenizer = (
      self._tokenizer.tokenizer
      if isinstance(self._tokenizer, HuggingFaceTokenizer)
      else None
    )
    if tokenizer is None or not (settings.template or tokenizer.chat_template):
      raise invalid_request(
        'the model has no chat template; use /v1/completions, or an adapter '
        'whose run has one',
        'model',
      )
    return tokenizer

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(list(ids))

  def special_tokens(self, text: str) -> dict[int, str]:
    """The special tokens in a text; see `skipped_special_tokens`."""
    return skipped_special_tokens(self._tokenizer, text)

  def token_bytes(self, i: int) -> bytes:
    """The bytes of a token."""
    return self._token_bytes[i]

  def token_text(self, i: int) -> str:
    """A token as text."""
    return token_text(self._token_bytes[i])


def _to_turn(message: Message, index: int) -> Turn:
  role = 'system' if message.role == 'developer' else message.role
  text = message.text or message.refusal or ''
  calls = [_to_call(call, index) for call in message.tool_calls or ()] or None
  return Turn(
    role,
    text,
    calls,
    thought=message.reasoning_content or '',
    name=message.name or '',
    call_id=(message.tool_call_id or '') if role == 'tool' else '',
  )


def _to_call(call: ToolCall, index: int) -> dict[str, Any]:
  param = f'messages[{index}].tool_calls'
  tool = call.function.name
  try:
    # The arguments are JSON inside a JSON string, so parsing the body has not
    # checked their nesting and surrogates.
    arguments = untrusted.parse_json(
      call.function.arguments or '{}', _MAX_DEPTH, allow_nan=False
    )
  except untrusted.Malformed as error:
    raise invalid_request(
      f'{param}: the arguments of {tool!r} are {error}', param
    ) from None
  if not isinstance(arguments, dict):
    raise invalid_request(
      f'{param}: the arguments of {tool!r} are not a JSON object', param
    )
  call_dict = {'name': tool, 'arguments': arguments}
  return call_dict | ({'id': call.id} if call.id else {})
