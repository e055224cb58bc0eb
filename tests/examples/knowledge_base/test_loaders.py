# SPDX-License-Identifier: Apache-2.0
"""Markdown, text, HTML and PDF files become documents with a title."""

import pytest

from examples.knowledge_base import loaders


def test_each_format_gives_its_text_and_title(tmp_path):
  (tmp_path / 'a.md').write_text('# Guide\n\nBolts are tight.\n')
  (tmp_path / 'b.txt').write_text('Bolts are loose.')
  folder = tmp_path / 'sub'
  folder.mkdir()
  (folder / 'c.html').write_text(
    '<html><head><title>x</title><style>p {}</style></head><body>'
    '<h2>Bolts</h2><p>They are <b>round</b> &amp;\nlong.</p>'
    '<script>f()</script></body></html>'
  )
  (tmp_path / 'image.png').write_bytes(b'\x89PNG')
  a, b, c = loaders.load(str(tmp_path))
  assert (a.source, a.title) == ('a.md', 'Guide')
  assert (b.title, b.text) == ('b', 'Bolts are loose.')
  assert (c.source, c.title) == ('sub/c.html', 'Bolts')
  assert ' '.join(c.text.split()) == '## Bolts They are round & long.'


def test_a_page_of_a_pdf_is_a_document(tmp_path):
  pytest.importorskip('pypdf')
  from matplotlib import rc_context
  from matplotlib.backends.backend_pdf import PdfPages
  from matplotlib.figure import Figure

  path = tmp_path / 'leaflet.pdf'
  with rc_context({'pdf.fonttype': 42}), PdfPages(path) as pages:
    for text in ('Take one tablet a day.', 'Keep it dry.'):
      figure = Figure()
      figure.text(0.1, 0.5, text)
      pages.savefig(figure)
  first, second = loaders.load(str(path))
  assert (first.source, first.title) == ('leaflet.pdf#page=1', 'leaflet')
  assert first.text == 'Take one tablet a day.'
  assert (second.source, second.text) == ('leaflet.pdf#page=2', 'Keep it dry.')


def test_a_damaged_pdf_is_a_sentence(tmp_path):
  pytest.importorskip('pypdf')
  (tmp_path / 'a.pdf').write_text('no pdf')
  with pytest.raises(ValueError, match='a.pdf is no PDF that can be read'):
    loaders.load(str(tmp_path))


@pytest.mark.parametrize(
  ('name', 'data', 'message'),
  [
    ('a.txt', b'\xff\xfe\x00', 'is no text in UTF-8'),
    ('a.csv', b'x', 'has no text in .md, .txt'),
  ],
)
def test_what_cannot_be_loaded_is_a_sentence(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message):
    loaders.load(str(tmp_path))
  with pytest.raises(ValueError, match='is no folder or file'):
    loaders.load(str(tmp_path / 'none'))
