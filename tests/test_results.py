# SPDX-License-Identifier: Apache-2.0
"""Tables in docs/ are what their commands make of the rows that are kept."""

import re
import shlex
from pathlib import Path

import pytest

from moepeft import compared
from moepeft.scoring import forms

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (ROOT / 'docs').glob('*.md')
  if '<!-- table: ' in path.read_text()
)


def commands(text):
  """{name of the table: words of its command} of a document."""
  found = {}
  for block in re.findall(r'^```sh\n(.*?)^```$', text, re.S | re.M):
    words = shlex.split(block.replace('\\\n', ' '))
    if 'moepeft.tables' in words and any(w.startswith('--into') for w in words):
      name = next(w for w in words if w.startswith('--name=')).split('=')[1]
      found[name] = words[words.index('moepeft.tables') + 1 :]
  return found


def made(words):
  """The Markdown that a command writes into its document."""
  runs, flags = [], {}
  for word in words:
    if word.startswith('--'):
      key, _, value = word[2:].partition('=')
      flags[key] = value
    else:
      # As a shell would: the paths of a command are from the top.
      runs += sorted(str(path) for path in ROOT.glob(word))
  return forms.markdown(
    compared.table(
      runs,
      flags.get('paper', ''),
      flags.get('baseline', ''),
      flags.get('title', ''),
      'routing' in flags,
    )
  )


@pytest.mark.parametrize('document', DOCUMENTS)
def test_a_documents_tables_are_those_of_the_rows_that_are_kept(document):
  text = (ROOT / document).read_text()
  tables = dict(
    re.findall(
      r'^<!-- table: (\w+) -->\n(.*?)^<!-- /table -->$', text, re.S | re.M
    )
  )
  assert tables and tables.keys() == commands(text).keys()
  for name, words in commands(text).items():
    assert f'--into={document}' in words
    assert tables[name] == made(words)
