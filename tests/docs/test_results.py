# SPDX-License-Identifier: Apache-2.0
"""Tables and figures in docs/ are those of the rows that are kept."""

import re
import shlex

import numpy as np
import pytest
from scipy.optimize import brentq

from moepeft.evaluation.tables import compare
from moepeft.evaluation.tables import render as table_render
from moepeft.runs import metrics_log
from tests import ROOT

DOCUMENTS = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (ROOT / 'docs').glob('*.md')
  if '<!-- table: ' in path.read_text()
)


def commands(text):
  """{name of the table: arguments of its command} of a document."""
  arguments = {}
  for block in re.findall(r'^```sh\n(.*?)^```$', text, re.S | re.M):
    words = shlex.split(block.replace('\\\n', ' '))
    if 'moepeft.tables' in words and any(w.startswith('--into') for w in words):
      name = next(w for w in words if w.startswith('--name=')).split('=')[1]
      arguments[name] = words[words.index('moepeft.tables') + 1 :]
  return arguments


def rendered(words):
  """The Markdown that a command writes into its document."""
  runs, flags = [], {}
  for word in words:
    if word.startswith('--'):
      key, _, value = word[2:].partition('=')
      flags[key] = value
    else:
      # As a shell would: the paths of a command are from the top.
      runs += sorted(str(path) for path in ROOT.glob(word))
  return table_render.markdown(
    compare.table(
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
    assert tables[name] == rendered(words)


def most_weight(nats, experts):
  """The most mean weight of one expert that a mean entropy leaves.

  With p of the weight on one expert the entropy is largest where the others
  share the rest evenly. That is concave in p, so it holds for means over
  tokens as well (Jensen).
  """

  def excess_nats(p):
    rest = 1 - p
    shared = rest * np.log(rest / (experts - 1)) if rest else 0.0
    return -p * np.log(p) - shared - nats

  return (
    brentq(excess_nats, 1 / experts, 1 - 1e-9)
    if excess_nats(1 / experts) > 0
    else 0.25
  )


def test_the_chat_mixtures_routers_are_as_even_as_the_results_say():
  log = ROOT / 'docs' / 'runs' / 'smollm2' / 'molora' / 'metrics.jsonl'
  *_, last = (row for row in metrics_log.stream(str(log)) if row.get('routing'))
  routers = [
    (site.split('/')[-2], layer, max(shares), nats)
    for site, values in last['routing'].items()
    for layer, (shares, nats) in enumerate(
      zip(values['load'], values['entropy'], strict=True)
    )
  ]
  evenness = [nats / np.log(4) for *_, nats in routers]
  assert last['step'] == 150 and len(routers) == 180
  assert np.mean(evenness) == pytest.approx(0.973, abs=5e-4)
  assert np.mean(np.exp(np.log(4) * np.array(evenness))) > 3.85
  ahead = [r for r in routers if r[2] > 0.9]
  even = [r for r in ahead if r[3] > 0.952 * np.log(4)]
  assert (len(ahead), len(even)) == (19, 18)
  of_qkv = [r for r in routers if r[0] in ('q', 'k', 'v')]
  for router in (*even, *of_qkv):
    assert most_weight(router[3], 4) < 0.42
  sure = [r for r in routers if r[3] < 0.75 * np.log(4)]
  assert {r[:2] for r in sure} == {
    ('o', 24), ('o', 29), ('wo', 28), ('wo', 29)
  }  # fmt: skip
  most = sorted(most_weight(r[3], 4) for r in sure)
  assert most[0] == pytest.approx(0.65, abs=5e-3)
  assert most[-1] == pytest.approx(0.85, abs=5e-3)
