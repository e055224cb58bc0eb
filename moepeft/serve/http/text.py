# SPDX-License-Identifier: Apache-2.0
"""The text side of the server: prompts to token ids, and back.

What takes long (reading a prompt, a chat template) runs on one thread of its
own, away from the event loop, on which single tokens become text.
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


def token_text(piece: bytes) -> str:
  """A token's bytes as text; 'bytes:\\xe2\\x82' where they are no characters,
  as OpenAI's legacy completions write it."""
  try:
    return piece.decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in piece)


Result = TypeVar('Result')
# Levels of a call's arguments; a template writes them by recursion.
_MAX_DEPTH = 64


class ServedTokenizer:
  """The tokenizer of a served model.

  Attributes:
    decoder_only: whether a prompt is part of the text.
    eos_token_ids: ids that end an answer and are no text.
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
    self._thread = ThreadPoolExecutor(1, 'tokenizer')

  async def run_in_thread(
    self, call: Callable[..., Result], *args: Any
  ) -> Result:
    """A call's result, from the thread of texts."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._thread, call, *args)

  def close(self) -> None:
    self._thread.shutdown(wait=False, cancel_futures=True)

  def encode_prompt(self, text: str) -> list[int]:
    """The ids of a prompt that the model continues.

    Raises:
      ApiError: it is empty.
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
    """The ids of a conversation up to the assistant's turn.

    An encoder-decoder reads what is said as plain text: a single turn as it
    is, several by their roles, as it was trained.

    Args:
      plan: of the tools that may be called.

    Raises:
      ApiError: there is no chat template, or it cannot write the turns.
    """
    turns = [_turn(message, i) for i, message in enumerate(messages)]
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
    """All that the chat template may say; '' where there is none."""
    if not isinstance(self._tokenizer, HuggingFaceTokenizer):
      return settings.template
    if not (settings.template or self._tokenizer.tokenizer.chat_template):
      return ''
    return chat_render.template_source(
      self._tokenizer.tokenizer, settings.template
    )

  def eos_token_ids_for(self, settings: ChatSettings) -> tuple[int, ...]:
    """Ids that end an answer; a chat template may have its own."""
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
    """Hugging Face's tokenizer, where there is a template to go by."""
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
    """The special tokens of a text, see `vocabulary.hidden`."""
    return skipped_special_tokens(self._tokenizer, text)

  def token_bytes(self, i: int) -> bytes:
    """The bytes of a token."""
    return self._token_bytes[i]

  def token_text(self, i: int) -> str:
    """A token as text."""
    return token_text(self._token_bytes[i])


def _turn(message: Message, place: int) -> Turn:
  role = 'system' if message.role == 'developer' else message.role
  text = message.text or message.refusal or ''
  calls = [_call(call, place) for call in message.tool_calls or ()] or None
  return Turn(
    role,
    text,
    calls,
    thought=message.reasoning_content or '',
    name=message.name or '',
    call_id=(message.tool_call_id or '') if role == 'tool' else '',
  )


def _call(call: ToolCall, place: int) -> dict[str, Any]:
  where = f'messages[{place}].tool_calls'
  tool = call.function.name
  try:
    # A JSON text within one: an escaped half of a surrogate pair is text to the
    # reader of the body, and so is its nesting.
    arguments = untrusted.parse_json(
      call.function.arguments or '{}', _MAX_DEPTH, allow_nan=False
    )
  except untrusted.Malformed as error:
    raise invalid_request(
      f'{where}: the arguments of {tool!r} are {error}', where
    ) from None
  if not isinstance(arguments, dict):
    raise invalid_request(
      f'{where}: the arguments of {tool!r} are JSON, but no object', where
    )
  written = {'name': tool, 'arguments': arguments}
  return written | ({'id': call.id} if call.id else {})
