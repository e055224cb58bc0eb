# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from its first cell to its last on a short run."""

import nbclient
import nbformat
import pytest

from tests import ROOT

_PATH = ROOT / 'notebooks' / 'router.ipynb'


@pytest.fixture
def notebook():
  return nbformat.read(_PATH, as_version=4)


def test_notebook_is_kept_without_outputs(notebook):
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert cells
  assert all(not cell.outputs for cell in cells)
  assert all(cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_notebook_trains_opens_and_draws(notebook, tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('MOEPEFT_WORKDIR', '')
  monkeypatch.setenv('MOEPEFT_STEPS', '2')
  client = nbclient.NotebookClient(
    notebook,
    timeout=1800,  # seconds a cell, for a busy machine
    kernel_name='python3',
    resources={'metadata': {'path': str(tmp_path)}},
  )
  client.execute()
  # The figures: loads, entropies, and the weights of one prompt.
  assert [cell.id for cell in notebook.cells if _has_figure(cell)] == [
    'load',
    'entropy',
    'tokens',
  ]
  assert (tmp_path / 'workdirs' / 'notebook' / 'metrics.jsonl').is_file()


def _has_figure(cell) -> bool:
  outputs = cell.get('outputs', [])
  return any('image/png' in output.get('data', {}) for output in outputs)
