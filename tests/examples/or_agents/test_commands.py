# SPDX-License-Identifier: Apache-2.0
"""The commands, with a server whose model is scripted."""

import json
import re

import pytest

pytest.importorskip('openai')
pytest.importorskip('highspy')

from examples.or_agents import evaluate, execution, solve  # noqa: E402
from moepeft.agent.flags import run_command  # noqa: E402
from tests.agent.scripted import (  # noqa: E402
  KEY,
  refuses,
  serving,
  text_reply,
)
from tests.examples.or_agents import cases  # noqa: E402

ACCEPTED = ('components', 'OK', 'formulation', 'OK')


def replies(*texts):
  return [text_reply(text) for text in texts]


def run_solve(script, tmp_path, *argv):
  problem = tmp_path / 'problem.txt'
  problem.write_text(cases.TEXT)
  flags = [f'--problem={problem}', f'--base_url={script.url}', *argv]
  with pytest.raises(SystemExit) as error:
    run_command(solve.make_solve_parser(), solve.main, flags)
  return error.value.code


def test_the_report_has_value_and_trace(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  output, trace = tmp_path / 'report.json', tmp_path / 'trace.jsonl'
  # The server repeats the key, which must not reach the trace file.
  texts = (f'components {KEY}', *ACCEPTED[1:], cases.FORMULATION)
  with serving(*replies(*texts)) as script:
    status = run_solve(
      script,
      tmp_path,
      '--languages=json',
      '--temperature=0',
      f'--output={output}',
      f'--trace={trace}',
    )
  assert status == 0
  printed = capsys.readouterr()
  assert printed.out == (
    'The optimal value is 360: 1 of 1 programs agree (json).\n'
    'Variables of json:\n  tables = 4\n  chairs = 12\n'
  )
  assert 'json: optimal 360' in printed.err
  assert script.requests[0]['temperature'] == 0
  assert script.requests[0]['model'] == 'scripted'
  saved = json.loads(output.read_text())
  assert (saved['value'], saved['agreeing']) == (360, ['json'])
  lines = trace.read_text().splitlines()
  assert len(lines) == len(saved['trace']) and KEY not in trace.read_text()


def test_real_programs_run_by_the_command(tmp_path, capsys, sandbox):
  pytest.importorskip('pyscipopt')
  texts = (*ACCEPTED, cases.fenced(cases.SCIP), cases.FORMULATION)
  with serving(*replies(*texts)) as script:
    flags = ('--languages=pyscipopt,json', '--lang=zh', '--timeout=60')
    assert run_solve(script, tmp_path, *flags) == 0
  assert '2 of 2 programs agree' in capsys.readouterr().out
  assert '问题：' in script.requests[0]['messages'][0]['content']


def test_total_failure_has_an_exit_status_of_one(tmp_path, capsys):
  with serving(*replies(*ACCEPTED, 'no')) as script:
    flags = ('--languages=json', '--max_rounds=2')
    assert run_solve(script, tmp_path, *flags) == 1
  assert len(script.requests) == 4 + 3
  assert capsys.readouterr().out == (
    'No program has an optimal value (failed): json ended as error (the '
    'formulation is not JSON: Expecting value: line 1 column 1 (char 0)) after '
    '2 repairs.\n'
  )


def test_wrong_input_is_one_sentence(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    execution.bubblewrap, 'unavailable_reason', lambda: 'bwrap is missing'
  )
  with serving(refuses(400, 'too long')) as script:
    for flags, sentence in (
      (['--languages=ampl'], "the languages are .*; got 'ampl'"),
      (['--direct', '--languages=json,json'], 'name each once'),
      (['--languages=json', '--problem=/nowhere'], 'No such file'),
      (['--languages=json', f'--problem={tmp_path}/empty'], 'is empty'),
      (['--languages=json', '--output=/nowhere/x'], 'is no folder to write to'),
      (['--languages=json'], r'HTTP 400\): too long'),
      (['--languages=json', '--api_key_file=/nowhere'], 'No such file'),
    ):
      (tmp_path / 'empty').write_text(' \n')
      assert run_solve(script, tmp_path, *flags) == 2
      error = capsys.readouterr().err.splitlines()[-1]
      assert error.startswith('error: ')
      assert re.search(sentence, error), error


def test_programs_are_refused_without_bubblewrap(tmp_path, capsys, monkeypatch):
  pytest.importorskip('pyscipopt')
  monkeypatch.setattr(
    execution.bubblewrap, 'unavailable_reason', lambda: 'bwrap is missing'
  )
  with serving(*replies('never')) as script:
    assert run_solve(script, tmp_path, '--languages=pyscipopt') == 2
    assert run_solve(script, tmp_path, '--languages=pyscipopt', '--direct') == 2
  first, second = capsys.readouterr().err.splitlines()
  assert 'bwrap is missing; install it, or use --languages=json' in first
  assert '--direct is for a model that answers with JSON' in second
  assert script.requests == []


def run_evaluate(script, data, *argv):
  flags = [f'--data={data}', f'--base_url={script.url}', *argv]
  with pytest.raises(SystemExit) as error:
    run_command(evaluate.make_parser(), evaluate.main, flags)
  return error.value.code


def test_evaluation_has_accuracy_with_intervals(tmp_path, capsys):
  data, output = tmp_path / 'rows.jsonl', tmp_path / 'results.json'
  rows = [
    {'en_question': cases.TEXT, 'en_answer': '360.0'},
    {'en_question': 'Another?', 'en_answer': '7'},
    {'en_question': 'None?', 'en_answer': 'No Best Solution'},
    {'en_question': 'Late?', 'en_answer': '1'},
    {'en_question': 'Beyond the limit', 'en_answer': '1'},
  ]
  data.write_text('\n'.join(map(json.dumps, rows)))
  infeasible = '{"s":"max","v":"c","o":[1],"c":[[1,"<=",-1]]}'
  texts = (cases.FORMULATION, 'no form', infeasible)
  with serving(*replies(*texts), refuses(400, 'too long')) as script:
    flags = ('--languages=json', '--direct', '--limit=4', f'--output={output}')
    assert run_evaluate(script, data, *flags) == 0
  saved = json.loads(output.read_text())
  vote, alone = saved['table']['vote'], saved['table']['json']
  # Two of four are right. Wilson's bounds for z = 1.959964, as z^2 = 3.841459:
  # (2 + z^2/2 -+ z sqrt(2 * 2 / 4 + z^2/4)) / (4 + z^2) = 0.150039, 0.849961.
  assert vote['accuracy'] == pytest.approx(
    {'share': 0.5, 'low': 0.150039, 'high': 0.849961}, abs=1e-6
  )
  assert alone['accuracy'] == vote['accuracy']
  assert alone['ran at once']['share'] == alone['ran']['share'] == 0.5
  assert [result['name'] for result in saved['results']] == [
    f'line {i}' for i in (1, 2, 3, 4)
  ]
  out = capsys.readouterr().out.splitlines()
  assert out[0] == '4 rows, 1 of them without a reply'
  assert out[2].split() == ['vote', '0.50', '0.15', 'to', '0.85']


@pytest.mark.parametrize('flags', [(), ('--direct',)])
def test_evaluation_without_any_reply_is_an_error(flags, tmp_path, capsys):
  data = tmp_path / 'rows.jsonl'
  data.write_text(json.dumps({'question': cases.TEXT, 'answer': 1}))
  with serving(refuses(400, 'too long')) as script:
    assert run_evaluate(script, data, '--languages=json', *flags) == 2
  assert 'no row has a reply of the model' in capsys.readouterr().err
