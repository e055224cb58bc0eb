# SPDX-License-Identifier: Apache-2.0
"""The text side of the server: prompts to token ids, and back.

What takes long (reading a prompt, a chat template) runs on one thread of its
own, away from the event loop, on which single tokens become text.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

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
from moepeft.inference.constraints.token_bytes import alphabet
from moepeft.serve.http.chat_templates import Voice
from moepeft.serve.http.errors import wrong
from moepeft.serve.http.schemas import Call, Message

Piece = Callable[[int], bytes]
# How SentencePiece writes a byte, and a space.
_BYTE = re.compile(r'<0x([0-9A-Fa-f]{2})>')
_SPACE = '▁'


def pieces(words: Tokenizer) -> Piece:
  """id -> bytes; b'' of an id that stands for nothing."""
  if isinstance(words, HuggingFaceTokenizer):
    return _of(words.tokenizer)
  return lambda i: bytes([i - 3]) if 3 <= i < 259 else b''


def _of(tokenizer) -> Piece:
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  byte_level = '"ByteLevel"' in json.dumps(backend['decoder'])
  letters = alphabet() if byte_level else {}
  added = {item['id']: item['content'] for item in backend['added_tokens']}

  def piece(i: int) -> bytes:
    if i in added:
      return added[i].encode()
    # Ids beyond the tokenizer are the model's padding.
    text = tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None
    if text is None:
      return b''
    if letters and all(c in letters for c in text):
      return bytes(letters[c] for c in text)
    if byte := _BYTE.fullmatch(text):
      return bytes.fromhex(byte[1])
    return text.replace(_SPACE, ' ').encode()

  return piece


def name(piece: bytes) -> str:
  """A token's bytes as text; 'bytes:\\xe2\\x82' where they are no characters,
  as OpenAI's legacy completions write it."""
  try:
    return piece.decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in piece)


Found = TypeVar('Found')
# Levels of a call's arguments; a template writes them by recursion.
_MAX_DEPTH = 64


class Plan(Protocol):
  """The tools of a request, as `service.Plan` has them."""

  def offered(self, talk: Conversation) -> Conversation: ...


class Words:
  """A vocabulary, used for a model that is served.

  Attributes:
    decoder_only: whether a prompt is part of the text.
    ends: ids that end an answer and are no text.
  """

  def __init__(self, words: Tokenizer, decoder_only: bool, ends: Sequence[int]):
    self._words, self.decoder_only = words, decoder_only
    self.ends = tuple(ends)
    self._piece = pieces(words)
    self._ends_of: dict[str, tuple[int, ...]] = {}
    self._thread = ThreadPoolExecutor(1, 'words')

  async def away(self, call: Callable[..., Found], *args: Any) -> Found:
    """A call's result, from the thread of texts."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._thread, call, *args)

  def close(self) -> None:
    self._thread.shutdown(wait=False, cancel_futures=True)

  def plain(self, text: str) -> list[int]:
    """The ids of a text that is gone on from.

    Raises:
      Problem: it is empty.
    """
    try:
      return prompts.plain(self._words, text, self.decoder_only)
    except ValueError as e:
      raise wrong(f'prompt: {e}', 'prompt') from None

  def chat(
    self, messages: Sequence[Message], voice: Voice, plan: Plan | None = None
  ) -> list[int]:
    """The ids of a conversation up to where the assistant speaks.

    An encoder-decoder reads what is said as plain text: a single turn as it
    is, several by their roles, as it was trained.

    Args:
      plan: of the tools that may be called.

    Raises:
      Problem: there is no chat template, or it cannot write the turns.
    """
    turns = [_turn(message, i) for i, message in enumerate(messages)]
    if voice.system and turns[0].role != 'system':
      turns.insert(0, Turn('system', voice.system))
    talk = Conversation(tuple(turns))
    talk = talk if plan is None else plan.offered(talk)
    if not self.decoder_only:
      return self._spoken(talk)
    try:
      text = chat_render.render_prompt(
        talk, self._templated(voice), voice.template
      )
    except ValueError as e:
      raise wrong(f'messages: {e}', 'messages') from None
    return self._words.encode(text)

  def _spoken(self, talk: Conversation) -> list[int]:
    if talk.tools or any(turn.calls or turn.thought for turn in talk.turns):
      raise wrong(
        'the model is an encoder-decoder, which reads turns as plain text, '
        'without tools or thoughts; leave them out',
        'messages',
      )
    return self.plain(plain_text(talk))

  def template(self, voice: Voice) -> str:
    """All that the chat template may say; '' where there is none."""
    if not isinstance(self._words, HuggingFaceTokenizer):
      return voice.template
    if not (voice.template or self._words.tokenizer.chat_template):
      return ''
    return chat_render.template_source(self._words.tokenizer, voice.template)

  def ends_of(self, voice: Voice) -> tuple[int, ...]:
    """Ids that end an answer in a voice: its template may have its own."""
    text = voice.template
    if not (text and isinstance(self._words, HuggingFaceTokenizer)):
      return self.ends
    if text not in self._ends_of:
      own = chat_dataset.ChatTemplate(self._words.tokenizer, text).ends()
      self._ends_of[text] = tuple(dict.fromkeys((*self.ends, *own)))
    return self._ends_of[text]

  def _templated(self, voice: Voice) -> Any:
    """Hugging Face's tokenizer, where there is a template to go by."""
    own = (
      self._words.tokenizer
      if isinstance(self._words, HuggingFaceTokenizer)
      else None
    )
    if own is None or not (voice.template or own.chat_template):
      raise wrong(
        'the model has no chat template; use /v1/completions, or an adapter '
        'whose run has one',
        'model',
      )
    return own

  def decode(self, ids: Sequence[int]) -> str:
    return self._words.decode(list(ids))

  def hidden(self, text: str) -> dict[int, str]:
    """The special tokens of a text, see `vocabulary.hidden`."""
    return skipped_special_tokens(self._words, text)

  def piece(self, i: int) -> bytes:
    """The bytes of a token."""
    return self._piece(i)

  def name(self, i: int) -> str:
    """A token as text."""
    return name(self._piece(i))


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


def _call(call: Call, place: int) -> dict[str, Any]:
  where = f'messages[{place}].tool_calls'
  tool = call.function.name
  try:
    # A JSON text within one: an escaped half of a surrogate pair is text to the
    # reader of the body, and so is its nesting.
    arguments = untrusted.parse_json(
      call.function.arguments or '{}', _MAX_DEPTH, allow_nan=False
    )
  except untrusted.Malformed as error:
    raise wrong(
      f'{where}: the arguments of {tool!r} are {error}', where
    ) from None
  if not isinstance(arguments, dict):
    raise wrong(
      f'{where}: the arguments of {tool!r} are JSON, but no object', where
    )
  written = {'name': tool, 'arguments': arguments}
  return written | ({'id': call.id} if call.id else {})
