# SPDX-License-Identifier: Apache-2.0
"""The LangChain notebook runs on our server, and is one in two languages."""

import re
import zlib

import nbclient
import nbformat
import numpy as np
import pytest

pytest.importorskip('langchain_openai')
pytest.importorskip('langchain_text_splitters')
pytest.importorskip('llguidance')

from tests import ROOT  # noqa: E402
from tests.serve.fake_engine import FakeEngine  # noqa: E402
from tests.serve.real_server import real  # noqa: E402, F401
from tests.serve.small_server import (  # noqa: E402
  byte_tokenizer,
  constrained,
  running,
  service,
)

FOLDER = ROOT / 'examples' / 'langchain'
CONCEPTS = (
  *('prompts', 'parsers', 'runnables', 'messages', 'tools', 'memory'),
  *('multimodal', 'lcel', 'loaders', 'splitters', 'embeddings', 'retrievers'),
)


class WordEmbedder:
  """A vector of unit length of a text: how often it has each word."""

  name, dimensions = 'words', 256

  def encode(self, texts, truncate=False):
    vectors = np.zeros((len(texts), self.dimensions), np.float32)
    for vector, text in zip(vectors, texts, strict=True):
      for word in re.findall(r'\w+', text.lower()):
        vector[zlib.crc32(word.encode()) % self.dimensions] += 1
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors, sum(map(len, texts))


def read(name):
  return nbformat.read(FOLDER / name, as_version=4)


def execute(notebook, url, monkeypatch):
  monkeypatch.setenv('MOEPEFT_URL', f'{url}/v1')
  client = nbclient.NotebookClient(
    notebook,
    timeout=600,  # seconds a cell, for a busy machine
    kernel_name='python3',
    resources={'metadata': {'path': str(FOLDER)}},
  )
  client.execute()
  printed = [
    cell.id
    for cell in notebook.cells
    if any(output.output_type == 'stream' for output in cell.get('outputs', []))
  ]
  assert printed == ['settings', *CONCEPTS]


def test_the_notebook_runs_on_a_server_without_a_model(tmp_path, monkeypatch):
  tokenizer = byte_tokenizer(tmp_path)
  # Its tokens are bytes: prompts are long.
  engine = FakeEngine(places=8192)
  served = constrained(service(engine, tokenizer), tokenizer)
  served.embedder = WordEmbedder()
  with running(served) as client:
    execute(read('concepts.ipynb'), client.url, monkeypatch)


@pytest.mark.slow
def test_the_notebook_runs_on_smollm2(real, monkeypatch):  # noqa: F811
  execute(read('concepts.ipynb'), real.url, monkeypatch)


def test_the_chinese_notebook_has_the_same_cells_and_code():
  english, chinese = read('concepts.ipynb'), read('concepts.zh.ipynb')
  assert [(c.cell_type, c.id) for c in english.cells] == [
    (c.cell_type, c.id) for c in chinese.cells
  ]
  for cell, translation in zip(english.cells, chinese.cells, strict=True):
    if cell.cell_type == 'code':
      assert cell.source == translation.source
    else:
      assert re.search('[一-鿿]', translation.source), translation.id
      assert not re.search('[一-鿿]', cell.source), cell.id


@pytest.mark.parametrize('name', ('concepts.ipynb', 'concepts.zh.ipynb'))
def test_each_concept_has_a_cell_with_assertions_and_no_output(name):
  notebook = read(name)
  nbformat.validate(notebook)
  code = {c.id: c for c in notebook.cells if c.cell_type == 'code'}
  assert tuple(code) == ('settings', *CONCEPTS)
  assert all('assert' in code[concept].source for concept in CONCEPTS)
  assert all(not c.outputs and c.execution_count is None for c in code.values())
