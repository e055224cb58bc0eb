# SPDX-License-Identifier: Apache-2.0
"""Generated problems have their optimum, all their numbers, and their split."""

import itertools
import json
import re
import subprocess
import sys

import pytest

pytest.importorskip('highspy')

from examples.or_agents import (  # noqa: E402
  generate,
  languages,
  programs,
  rewards,
  training_rows,
  wording,
)
from examples.or_agents.domains import DOMAINS, HELD_OUT_DOMAINS  # noqa: E402
from examples.or_agents.families import (  # noqa: E402
  FAMILIES,
  PERIODS,
  Scale,
)
from examples.or_agents.problem import Problem, solve  # noqa: E402
from moepeft.tasks.stable_random import StableRandom  # noqa: E402
from tests import ROOT  # noqa: E402


def draw(count, seed=0, scale=Scale(), families=tuple(FAMILIES)):  # noqa: B008
  stream = generate.samples(seed, scale, families)
  return list(itertools.islice(stream, count))


@pytest.fixture(scope='module')
def drawn():
  return draw(120)


def masked_sentences(template, family):
  """Sentences of a template with numbers and nouns masked."""
  result = set()
  for index, domain in enumerate(DOMAINS[::5]):
    rng = StableRandom(0, 1, index)
    instance = FAMILIES[family](rng, domain, Scale(varied=index % 2 == 0))
    text = template.render(instance.fields, domain)
    nouns = {
      *(domain.actor, *domain.products, *domain.resources, *domain.sites),
      *(*domain.clients, *domain.workers, *domain.jobs),
    }
    for sentence in re.split(r'[.?]\s|\n|\s*$', text):
      words = re.sub(r'\d+(\.\d+)?', '#', sentence)
      words = re.sub(
        r'\b(' + '|'.join(map(re.escape, nouns)) + r')\b', '_', words
      )
      # Empty parts, and what is left of a row of numbers alone.
      if re.search(r'[a-z]', words):
        result.add(words.strip())
  return result


def test_domains_have_distinct_nouns():
  assert len(DOMAINS) == 18
  assert {d.name for d in DOMAINS} > set(HELD_OUT_DOMAINS)
  for domain in DOMAINS:
    sizes = [4, 4]
    assert [len(domain.resources), len(domain.sites)] == sizes, domain.name
    for names in (domain.products, domain.clients, domain.workers, domain.jobs):
      assert len(set(names)) == len(names) == 5, domain.name


def test_the_same_seed_gives_the_same_rows():
  first, second, third = draw(10, 3), draw(10, 3), draw(10, 4)
  assert [s.row for s in first] == [s.row for s in second]
  assert [s.row for s in first] != [s.row for s in third]


def test_rows_re_solve_in_two_solvers(drawn):
  pytest.importorskip('pyscipopt')
  assert [generate.faults(sample.row) for sample in drawn] == [[]] * len(drawn)


def test_the_optimum_is_a_feasible_point_with_its_value(drawn):
  # Rows are checked against the point by arithmetic, without a solver.
  for sample in drawn:
    problem = sample.problem
    point = solve(problem).point
    value = sum(c * x for c, x in zip(problem.objective, point, strict=True))
    assert value == pytest.approx(sample.row['value'], rel=1e-6)
    for row in problem.constraints:
      left = sum(c * x for c, x in zip(row.coefficients, point, strict=True))
      difference = left - row.right
      slack = {'<=': -difference, '>=': difference, '=': -abs(difference)}
      assert slack[row.relation] >= -1e-5
    for variable, x in zip(problem.variables, point, strict=True):
      assert variable.type == 'continuous' or x == pytest.approx(round(x))


def test_all_families_splits_and_domains_occur(drawn):
  rows = [sample.row for sample in drawn]
  assert {row['family'] for row in rows} == FAMILIES.keys()
  assert {row['split'] for row in rows} == set(generate.SPLITS)
  assert {row['domain'] for row in rows} == {d.name for d in DOMAINS}
  for row in rows:
    held_out = (
      row['template'].startswith('held_out/'),
      row['domain'] in HELD_OUT_DOMAINS,
    )
    assert generate.SPLITS[held_out[0] + 2 * held_out[1]] == row['split']


@pytest.mark.parametrize('family', FAMILIES)
def test_every_template_has_all_numbers(family):
  # Each template, with all scales, over domains.
  for held_out in (False, True):
    for index, template in enumerate(wording.templates(family, held_out)):
      domain = DOMAINS[index % len(DOMAINS)]
      rng = StableRandom(index, 2, 0)
      instance = FAMILIES[family](rng, domain, Scale(varied=index % 3 > 0))
      text = template.render(instance.fields, domain)
      generate.check_numbers(instance, text)
      assert not re.search(r'[ \t]$|  ', text, re.MULTILINE), text
      assert 'None' not in text and 'True' not in text, text


@pytest.mark.parametrize('family', FAMILIES)
def test_no_sentence_of_a_held_out_template_is_in_training(family):
  trained = set().union(
    *(masked_sentences(t, family) for t in wording.templates(family, False))
  )
  held_out = set().union(
    *(masked_sentences(t, family) for t in wording.templates(family, True))
  )
  assert trained and held_out
  assert trained & held_out == set()


def test_a_lost_number_is_an_error(drawn):
  sample = drawn[0]
  number = re.search(r'\d+(?:\.\d+)?', sample.row['text'])
  text = (
    sample.row['text'][: number.start()] + sample.row['text'][number.end() :]
  )
  with pytest.raises(ValueError, match='the text lacks'):
    generate.check_numbers(sample.instance, text)


def test_no_problem_is_in_two_rows():
  rows = draw(300, scale=Scale(2, 1, 9, False), families=('knapsack',))
  assert len({sample.row['problem'] for sample in rows}) == 300


def marked(value, names=None):
  """Yields (copy with one number marked, the names that it belongs to)."""
  if isinstance(value, dict):
    # Texts of the outermost mapping belong to the whole problem.
    texts = [v for v in value.values() if isinstance(v, str)]
    names = () if names is None else (*names, *texts)
    for key, part in value.items():
      # Mappings by name, as uses by resource, have the name as the key.
      inner = names if isinstance(part, (list, dict)) else (*names, key)
      for copy, belongs in marked(part, inner):
        yield value | {key: copy}, belongs
  elif isinstance(value, list):
    for i, part in enumerate(value):
      for copy, belongs in marked(part, names):
        yield [*value[:i], copy, *value[i + 1 :]], belongs
  elif isinstance(value, (int, float)) and not isinstance(value, bool):
    yield 98765, names


@pytest.mark.parametrize('family', FAMILIES)
def test_a_number_stands_beside_the_names_it_belongs_to(family):
  domain = DOMAINS[0]
  nouns = {
    *(*domain.products, *domain.resources, *domain.sites, *domain.clients),
    *(*domain.workers, *domain.jobs, *PERIODS),
  }
  instance = FAMILIES[family](StableRandom(1, 3, 0), domain, Scale())
  for held_out in (False, True):
    for template in wording.templates(family, held_out):
      for fields, names in marked(instance.fields):
        text = template.render(fields, domain)
        # A sentence, or a row of a table with the table's text before it.
        before, after = text.split('98765')
        start = 0 if '\n' in before else before.rfind('. ') + 1
        sentence = before[start:] + re.split(r'\. |\n', after)[0]
        missing = {n for n in names if n in nouns and n not in sentence}
        assert not missing, (missing, text)


@pytest.mark.slow
def test_programs_of_all_languages_have_the_value(sandbox):
  for sample in draw(1, 5):
    for name in ('pyomo', 'cvxpy', 'pyscipopt'):
      for package in languages.LANGUAGES[name].packages:
        pytest.importorskip(package)
      code = programs.program(sample.problem, name)
      verdict = rewards.judge(code, sample.row['value'], sandbox)
      assert verdict.reward == 1, (name, verdict, code)


def test_rewards():
  sample = draw(1)[0]
  problem, value = sample.problem, sample.row['value']
  assert rewards.judge(problem.to_json(), value).reward == 1
  assert rewards.judge(problem.to_json(), value + 1).reward == 0.1
  verdict = rewards.judge('{"s":', value)
  assert verdict.reward == 0
  assert 'not JSON' in verdict.fault


def test_wrong_variants_differ_in_their_outcome(drawn):
  counts = []
  for sample in drawn[:15]:
    value = sample.row['value']
    variants = training_rows.judged_variants(sample.problem, value)
    for _, variant, status in variants:
      verdict = rewards.judge(variant.to_json(), value)
      assert not verdict.is_right
      assert verdict.runs == (status != 'error')
    counts.append(len(variants))
  # Few problems have none, such as two jobs of one length.
  assert sum(count > 0 for count in counts) > 11


def test_training_rows_are_what_the_readers_take():
  from moepeft.data import example
  from moepeft.data.chat import formats
  from moepeft.data.preference import formats as preference_formats

  by_agent = training_rows.by_agent(draw(8))
  assert by_agent.keys() == {
    *('components', 'formulation', 'verify_components', 'verify_formulation'),
    *('json', 'pyomo', 'cvxpy', 'pyscipopt', 'repair_error'),
    *('repair_no_optimum', 'direct', 'pairs'),
  }
  for name, rows in by_agent.items():
    for row in rows:
      if name == 'direct':
        example.parse_example(row, name)
      elif name == 'pairs':
        pair = preference_formats.parse_row(row)
        assert pair.chosen != pair.rejected
      else:
        formats.check_answered(formats.parse_conversation(row))
  verdicts = {
    row['messages'][-1]['content'] for row in by_agent['verify_formulation']
  }
  assert 'OK' in verdicts and len(verdicts) > 1


def test_components_and_formulation_have_every_number():
  for sample in draw(40, 2):
    numbers = set(wording.numbers_of(sample.instance.fields))
    for text in (training_rows.components(sample.instance, sample.problem),):
      assert numbers <= set(wording.numbers_in(text)), text


def run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'examples.or_agents.generate', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_writes_and_checks(tmp_path):
  pytest.importorskip('pyscipopt')
  rows, training = tmp_path / 'rows.jsonl', tmp_path / 'training'
  result = run(
    '--rows=12', '--seed=7', f'--output={rows}', f'--training={training}'
  )
  assert result.returncode == 0, result.stderr
  # HiGHS would print its version.
  assert result.stdout.startswith(f'12 rows in {rows}\n')
  lines = [json.loads(line) for line in rows.read_text().splitlines()]
  assert [line['value'] for line in lines] == [
    sample.row['value'] for sample in draw(12, 7)
  ]
  assert (training / 'pairs.jsonl').is_file()
  checked = run(f'--check={rows}')
  assert checked.returncode == 0 and '12 of 12 rows' in checked.stdout
  lines[3]['value'] += 1
  rows.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  checked = run(f'--check={rows}')
  assert checked.returncode == 1 and 'line 4: highs: ' in checked.stdout


@pytest.mark.parametrize(
  ('args', 'reason'),
  (
    ((), 'name either --output'),
    (('--output=x', '--check=y'), 'name either --output'),
    (('--output=x', '--rows=0'), '--rows is from 1'),
    (('--output=x', '--families=diet'), "got 'diet'"),
    (('--output=x', '--entities=9'), '2 to 4 entities'),
    (('--check=/nowhere',), 'name a file with rows, which --output=FILE'),
    (('--check=/dev/null',), '/dev/null'),
  ),
)
def test_bad_input_is_one_sentence(args, reason, capsys):
  with pytest.raises(SystemExit) as e:
    generate.main(args)
  assert e.value.code == 2
  assert reason in capsys.readouterr().err


def test_a_problem_of_a_row_is_read_back(drawn):
  for sample in drawn:
    assert Problem.from_json(sample.row['problem']) == sample.problem
