# SPDX-License-Identifier: Apache-2.0
"""Translates a text file: a draft, notes on its faults, an improvement.

  python -m examples.translation.translate FILE --source=English \
    --target=Chinese --base_url=http://127.0.0.1:8000/v1 --model=smollm2

Each step is a request of its own, with a prompt from prompts/en or prompts/zh.
A long text is translated in chunks, each with the text around it as context.
Ideas: Self-Refine (arXiv:2303.17651); A. Ng's translation agent.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import string
import sys
from collections.abc import Iterator

from examples.translation import chunks as text_chunks
from moepeft.agent import chat_model
from moepeft.agent.flags import read_input, run_command
from moepeft.core import files, terminal

PROMPTS = pathlib.Path(__file__).parent / 'prompts'
STEPS = ('translate', 'reflect', 'improve')


@dataclasses.dataclass
class Translation:
  """The translation of a chunk, and each step to it.

  Attributes:
    source: the chunk.
    draft: the first translation.
    notes: faults of the draft, of the first improvement, and so on.
    improvements: a translation for each entry of `notes`, but for a last one
      that says OK.
    cut: steps whose answers ended at the limit of tokens.
  """

  source: str
  draft: str
  notes: list[str] = dataclasses.field(default_factory=list)
  improvements: list[str] = dataclasses.field(default_factory=list)
  cut: list[str] = dataclasses.field(default_factory=list)

  @property
  def text(self) -> str:
    """The last translation."""
    return self.improvements[-1] if self.improvements else self.draft


@dataclasses.dataclass(frozen=True)
class Translator:
  """Translates chunks by the requests of the three steps.

  Attributes:
    model: answers a request.
    source, target: names of the languages, as the prompts have them.
    rounds: how often the translation is reflected on and improved; 0 for the
      draft alone.
    prompts: {step: template}.
    options: more fields of each request, such as temperature.
  """

  model: chat_model.ChatModel
  source: str
  target: str
  rounds: int
  prompts: dict[str, string.Template]
  options: dict[str, object]

  def translate(self, text: str, before='', after='') -> Translation:
    """Translates a text without whitespace around it.

    Args:
      before, after: the text around it, as context.

    Raises:
      ValueError: the server or the model gives no text.
    """
    cut: list[str] = []

    def ask(step: str, **values: str) -> str:
      prompt = self.prompts[step].substitute(
        source=self.source,
        target=self.target,
        text=text,
        before=before,
        after=after,
        **values,
      )
      request = {'messages': [{'role': 'user', 'content': prompt}]}
      reply = self.model({**request, **self.options}, lambda piece: None)
      if reply.reason == 'length':
        cut.append(step)
      answer = (reply.message['content'] or '').strip()
      if not answer:
        raise ValueError(f'the model gave no text in the step {step!r}')
      return answer

    result = Translation(text, ask('translate'), cut=cut)
    for _ in range(self.rounds):
      result.notes.append(ask('reflect', draft=result.text))
      if result.notes[-1].strip('."\'*').lower() == 'ok':
        break
      answer = ask('improve', draft=result.text, notes=result.notes[-1])
      result.improvements.append(answer)
    return result

  def translate_chunks(
    self, chunks: list[str], context_chars: int
  ) -> Iterator[Translation]:
    """Translates the chunks of a text in their order.

    Args:
      context_chars: characters before and after a chunk that the model sees.
    """
    text, start = ''.join(chunks), 0
    for i, chunk in enumerate(chunks, 1):
      end = start + len(chunk)
      before = text[max(0, start - context_chars) : start]
      after = text[end : end + context_chars]
      start = end
      if not chunk.strip():
        yield Translation(chunk, '')
        continue
      try:
        yield self.translate(chunk.strip(), before, after)
      except ValueError as e:
        raise ValueError(f'chunk {i} of {len(chunks)}: {e}') from None


def read_prompts(language: str) -> dict[str, string.Template]:
  """Reads the prompts of a language, 'en' or 'zh'."""
  folder = PROMPTS / language
  return {
    step: string.Template((folder / f'{step}.txt').read_text('utf-8'))
    for step in STEPS
  }


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the model and the translator."""
  add = parser.add_argument
  add('--source', required=True, help='The language of the text: English.')
  add('--target', required=True, help='The language to translate into.')
  add(
    '--base_url',
    default='http://127.0.0.1:8000/v1',
    help='The server; its key is in OPENAI_API_KEY.',
  )
  add('--model', default='', help='Its model; by default its first one.')
  add('--rounds', type=int, default=1, help='Reflections; 0 for a draft alone.')
  add('--prompts', choices=('en', 'zh'), default='en', help='Their language.')
  add('--chunk_chars', type=int, default=1000, help='Characters of a chunk.')
  add('--context_chars', type=int, default=300, help='Characters around it.')
  add('--temperature', type=float, default=0.0)
  add('--max_tokens', type=int, help="An answer's; by default the server's.")


def make_translator(flags: argparse.Namespace) -> Translator:
  """Makes the translator of the flags.

  Raises:
    ValueError: a flag is out of range, or the server gives no model.
  """
  lowest = {'rounds': 0, 'chunk_chars': 1, 'context_chars': 0, 'max_tokens': 1}
  for name, low in lowest.items():
    value = getattr(flags, name)
    if value is not None and value < low:
      raise ValueError(f'--{name} is at least {low}; got {value}')
  key = os.environ.get('OPENAI_API_KEY', '')
  client = chat_model.make_client(flags.base_url, key)
  options = {'temperature': flags.temperature, 'max_tokens': flags.max_tokens}
  return Translator(
    chat_model.choose_model(client, flags.model),
    flags.source,
    flags.target,
    flags.rounds,
    read_prompts(flags.prompts),
    {name: value for name, value in options.items() if value is not None},
  )


def check_new(name: str, path: str | None) -> None:
  """Checks that a file can be made, before minutes of work for it.

  Raises:
    ValueError: the file exists, or its folder does not.
  """
  if path and os.path.lexists(path):
    raise ValueError(f'--{name}={path} exists; choose another name')
  if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
    raise ValueError(f'--{name}={path}: make its folder first')


def append_row(path: str | None, row: dict) -> None:
  """Appends a row to a JSONL file, if there is a path."""
  if path:
    with open(path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(row, ensure_ascii=False) + '\n')


def main(flags: argparse.Namespace) -> None:
  """Translates the file of the flags.

  Raises:
    ValueError, OSError: an error with a message for the user.
  """
  text = read_input(flags.file, 'the text to translate')
  check_new('output', flags.output)
  check_new('log', flags.log)
  translator = make_translator(flags)
  chunks = text_chunks.split(text, flags.chunk_chars)
  translations: list[Translation] = []
  for result in translator.translate_chunks(chunks, flags.context_chars):
    translations.append(result)
    append_row(flags.log, dataclasses.asdict(result))
    note = f'chunk {len(translations)} of {len(chunks)}'
    if result.cut:
      note += f'; cut at the limit of tokens: {", ".join(result.cut)}'
    terminal.show(note, file=sys.stderr)
  translated = text_chunks.join(chunks, [t.text for t in translations])
  if flags.output:
    files.write_text(flags.output, translated)
  else:
    terminal.show(translated, end='' if translated.endswith('\n') else '\n')
  if cut := sum(bool(t.cut) for t in translations):
    terminal.show(
      f'{cut} of {len(chunks)} chunks have an answer that was cut; lower '
      '--chunk_chars or raise --max_tokens',
      file=sys.stderr,
    )


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m examples.translation.translate',
    description='Translates a text file.',
  )
  parser.add_argument('file', help='A UTF-8 text.')
  add_flags(parser)
  parser.add_argument('--output', help='A new file for the translation.')
  parser.add_argument('--log', help='A new JSONL file, with all steps.')
  return parser


if __name__ == '__main__':
  run_command(make_parser(), main)
