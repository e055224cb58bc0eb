# SPDX-License-Identifier: Apache-2.0
"""Loads documents: Markdown, text, HTML and PDF files.

A new format is a function from a file to its pages, and a line in LOADERS.
"""

import dataclasses
import html.parser
import logging
import pathlib
from collections.abc import Iterator

from moepeft.core import files


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and its place.

  Attributes:
    source: the file's path in its folder; with '#page=2' for a page of a PDF.
    title: the first heading, or else the file's name.
    text: paragraphs separated by empty lines; headings begin with '#'.
  """

  source: str
  title: str
  text: str


class _HtmlText(html.parser.HTMLParser):
  """Collects the text of a page: a block is a paragraph."""

  _HIDDEN = ('script', 'style', 'head', 'nav', 'template')
  _BLOCKS = frozenset(
    'p div section article li ul ol table tr br pre blockquote h1 h2 h3 h4 h5 '
    'h6 dt dd body main header footer'.split()
  )

  def __init__(self):
    super().__init__()
    self.parts, self._hidden = [], 0

  def handle_starttag(self, tag, attrs):
    self._hidden += tag in self._HIDDEN
    if tag in self._BLOCKS:
      heading = tag[0] == 'h' and tag[1:].isdigit()
      self.parts.append(
        '\n\n' + '#' * int(tag[1:]) + ' ' if heading else '\n\n'
      )

  def handle_endtag(self, tag):
    self._hidden -= tag in self._HIDDEN and self._hidden > 0
    if tag in self._BLOCKS:
      self.parts.append('\n\n')

  def handle_data(self, data):
    if not self._hidden:
      # Line ends of a page's source are spaces of its text.
      self.parts.append(data.replace('\n', ' '))


def _text(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  try:
    yield '', files.read_text(path)
  except UnicodeDecodeError:
    raise ValueError(f'{path} is no text in UTF-8; convert it') from None


def _html(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  for place, text in _text(path):
    parser = _HtmlText()
    parser.feed(text)
    yield place, ''.join(parser.parts)


def _pdf(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  try:
    import pypdf

    # It would print its warnings on a damaged file beside the error.
    logging.getLogger('pypdf').setLevel(logging.CRITICAL)
  except ImportError:
    raise ValueError(f'{path} needs pypdf: pip install pypdf') from None
  files.check_file(path)
  try:
    for number, page in enumerate(pypdf.PdfReader(path).pages, 1):
      yield f'#page={number}', page.extract_text()
  except pypdf.errors.PyPdfError as error:
    raise ValueError(f'{path} is no PDF that can be read: {error}') from None


# {suffix: path -> (place in the file, text) of each page}.
LOADERS = {
  '.md': _text,
  '.txt': _text,
  '.html': _html,
  '.htm': _html,
  '.pdf': _pdf,
}


def load(folder: str) -> list[Document]:
  """Loads the documents of a folder and the folders in it, or of a file.

  Raises:
    ValueError: there is no such folder, no document, or a damaged one.
  """
  root = pathlib.Path(folder).expanduser()
  if not root.exists():
    raise ValueError(f'{folder} is no folder or file; name your documents')
  paths = sorted(root.rglob('*')) if root.is_dir() else [root]
  documents = []
  for path in paths:
    if path.is_file() and (loader := LOADERS.get(path.suffix.lower())):
      source = path.relative_to(root if root.is_dir() else root.parent)
      for place, text in loader(path):
        if text.strip():
          title = _title(text) or path.stem
          documents.append(Document(f'{source}{place}', title, text.strip()))
  if not documents:
    raise ValueError(f'{folder} has no text in {", ".join(LOADERS)} files')
  return documents


def _title(text: str) -> str:
  headings = (line for line in text.splitlines() if line.startswith('#'))
  return next(headings, '').strip('# ').strip()
