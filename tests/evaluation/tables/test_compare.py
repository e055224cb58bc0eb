# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.tables: what is printed, written and refused."""

import json
import math
import os
import pathlib

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from moepeft import tables
from moepeft.evaluation.step_cost import CompiledStep
from moepeft.evaluation.tables import compare, cost, forest_plot
from moepeft.evaluation.tables import render as table_render
from tests import ROOT

from ... import commands
from .. import runs

RESULTS = ROOT.parent / 'shared' / 'paper' / 'results.json'


def text(*given, **options):
  return table_render.markdown(
    compare.table([str(run) for run in given], **options)
  )


def body(printed):
  """{first cell: the others} of a Markdown table, cells without spaces."""
  actual = {}
  for line in printed.splitlines():
    if line.startswith('| ') and '---' not in line:
      first, *cells = (cell.strip() for cell in line.strip('|').split(' | '))
      assert first not in actual
      actual[first] = cells
  return actual


def two_runs(tmp_path):
  """LoRA with one task right in 1 of 2 and 3 of 4; (IA)^3 with 1 and 1."""
  lora = runs.make(
    tmp_path / 'lora',
    [
      ('cb', 'p', 'accuracy', runs.right(1, 2)),
      ('rte', 'p', 'accuracy', [1]),
    ],
  )
  ia3 = runs.make(
    tmp_path / 'ia3',
    [
      ('cb', 'p', 'accuracy', runs.right(2, 2)),
      ('rte', 'p', 'accuracy', [0]),
    ],
    {'method': 'ia3', 'parameters': 300},
  )
  return lora, ia3


TWO_RUNS = """\
**Two runs**

| method         | parameters | % of base | seeds |          cb |   rte |
| -------------- | ---------: | --------: | ----: | ----------: | ----: |
| majority       |          - |         - |     - |        50.0 |  50.0 |
| `lora(rank=4)` |     20,000 |         2 |     1 | 50.0 ± 50.0 | 100.0 |
| `ia3`          |        300 |      0.03 |     1 | 100.0 ± 0.0 |   0.0 |

- ± is half the width of the 95 % interval: the percentile bootstrap over examples.
- Accuracies are in %: the median over the prompts of a set; anli is the mean of its three rounds, the average that of the eight sets.
- Examples a prompt in 'eval': 1 to 2, of 2 tasks.
- No average: not all of the eight sets are there.
- Base t5_tiny, official semantics.
- Budget: 7 steps of 5 rows.
- Bold is a best figure whose difference from every other one has a 95 % interval (paired bootstrap) without 0; elsewhere there is none.
"""  # noqa: E501


def test_two_runs_as_markdown(tmp_path):
  # A resample of two examples, one right, is 0, 50 or 100: the interval of 95
  # % is all of that. Both right, or one example: no width, no interval.
  assert text(*two_runs(tmp_path), title='Two runs') == TWO_RUNS


def test_the_order_is_that_of_the_command_line(tmp_path):
  lora, ia3 = two_runs(tmp_path)
  assert list(body(text(ia3, lora + '/')))[2:] == ['`ia3`', '`lora(rank=4)`']


def seeds(tmp_path, method, rights, n, **changes):
  """A run for each seed, with so many of n right."""
  return [
    runs.make(
      tmp_path / f'{method}{seed}',
      [('cb', 'p', 'accuracy', runs.right(of, n))],
      {'seed': seed, 'method': method} | changes,
    )
    for seed, of in enumerate(rights)
  ]


def test_an_interval_of_two_seeds_is_of_what_can_be(tmp_path):
  # 40 and 60 % of 50: mean 50; Student's interval would be 12.706 * 10. Seeds
  # deviate by sqrt(200) / 2 = 7.1, examples by 7.1: 1.96 * 10 = 19.6.
  made = seeds(tmp_path, 'lora(rank=4)', (20, 30), 50)
  printed = text(*made)
  *cells, score = body(printed)['`lora(rank=4)`']
  assert cells == ['20,000', '2', '2']
  value, _, half = score.partition(' ± ')
  assert value == '50.0' and 17 < float(half) < 22
  assert 'bootstrap over seeds and examples' in printed
  assert 'Intervals of fewer than 5 seeds' in printed
  # All right: no interval reaches over 100 %.
  high = seeds(tmp_path, 'ia3', (49, 50), 50)
  table = compare.table([*made, *high])
  (*_, cell) = table.lines[-1].cells.values()
  cells = [c for line in table.lines for c in line.cells.values() if c.seeds]
  assert [c.seeds for c in cells] == [(40.0, 60.0), (98.0, 100.0)]
  assert all(0 <= c.low < c.value < c.high <= 100 for c in cells)


def bold(printed):
  return [line for line, cells in body(printed).items() if '**' in str(cells)]


def test_what_is_best_within_its_interval_is_not_bold(tmp_path):
  # 25 and 22 of 50, on the same examples: the difference of 6 % is always at
  # least 0, and 0 where none of three examples is drawn, (47 / 50)^50 = 4.5 %.
  one, _ = seeds(tmp_path, 'lora(rank=4)', (25, 0), 50)
  near, far = seeds(tmp_path, 'ia3', (22, 10), 50)
  assert bold(text(one, near)) == []
  # 30 %: more than any resample makes up.
  assert bold(text(one, far)) == ['`lora(rank=4)`']
  latex = table_render.latex(compare.table([one, far]))
  assert latex.count('textbf') == 1


def test_two_seeds_that_disagree_make_no_bold_best(tmp_path):
  # One method is better by 40 % with seed 0 and worse by 20 % with seed 1.
  one = seeds(tmp_path, 'lora(rank=4)', (40, 20), 50)
  other = seeds(tmp_path, 'ia3', (20, 30), 50)
  assert bold(text(*one, *other)) == []
  # Better by 40 % with both.
  clear = seeds(tmp_path / 'x', 'ia3', (20, 0), 50)
  assert bold(text(*one, *clear)) == ['`lora(rank=4)`']


def test_figures_without_intervals_are_not_called_best(tmp_path):
  after = {'step': 7, 'validation_loss': 2.5, 'means': {'B held_out': 0.25}}
  one = runs.make(tmp_path / 'a', after=after)
  worse = after | {'validation_loss': 2.6}
  other = runs.make(tmp_path / 'b', changes={'method': 'ia3'}, after=worse)
  assert bold(text(one, other)) == []
  # The paper's table is printed as the paper has it.
  assert bold(text(paper='t5_xl')) != []


def test_axes_of_the_picture_end_at_the_metrics_bounds(tmp_path):
  made = seeds(tmp_path, 'lora(rank=4)', (49, 50), 50)
  made += seeds(tmp_path, 'ia3', (0, 2), 50)
  table = compare.table(made)
  column = next(c for c in table.columns if c.kind == 'score')
  lines = [line for line in table.lines if line.kind == 'run']
  low, high = forest_plot._limits(table, lines, column)
  assert low == 0 and high == 100
  # Fitted to what is there: about 90 to 100 % alone.
  table = compare.table(made[:2])
  lines = [line for line in table.lines if line.kind == 'run']
  low, high = forest_plot._limits(table, lines, column)
  assert 40 < low < 50 and high == 100  # the majority's 50 is drawn, too
  figure = Figure()
  axes = figure.subplots()
  forest_plot._draw_panel(axes, table, lines, column)
  drawn = [set(line.get_xdata()) for line in axes.lines]
  assert {98.0, 100.0} in drawn


def test_best_checkpoints_of_seeds_are_one_row_and_their_steps_are_said(
  tmp_path,
):
  made = [
    runs.make(
      tmp_path / str(seed),
      [('cb', 'p', 'accuracy', runs.right(of, 5))],
      {'seed': seed, 'step': step, 'checkpoint': 'best'},
      config={'steps': 13},
    )
    for seed, step, of in ((0, 7, 2), (1, 11, 3))
  ]
  printed = text(*made)
  assert body(printed)['`lora(rank=4)`'][:3] == ['20,000', '2', '2']
  assert 'by the validation loss: `lora(rank=4)` step 7, 11.' in printed
  assert 'Budget: 13 steps of 5 rows.' in printed


def test_answers_of_embedded_tasks_are_told_from_their_accuracy(tmp_path):
  # Both are columns of the group A.
  rows = [
    ('kind', 'seen', 'accuracy', runs.right(1, 2)),
    ('kind', '', 'exact_match', runs.right(2, 2)),
  ]
  changes, config = {'data': 'held_out'}, {'data.source': 'tasks'}
  made = runs.make(tmp_path / 'a', rows, changes, config=config)
  assert body(text(made))['method'][-2:] == ['A seen', 'A exact match']


def test_a_cell_that_one_seed_lacks_is_missing_and_said(tmp_path):
  one = runs.make(tmp_path / 'a', runs.grid(3, 5, ['cb', 'rte']))
  other = runs.make(tmp_path / 'b', runs.grid(3, 5, ['cb']), {'seed': 1})
  third = runs.make(
    tmp_path / 'c', runs.grid(1, 5, ['cb', 'rte']), {'method': 'ia3'}
  )
  printed = text(one, other, third)
  assert body(printed)['`lora(rank=4)`'][-1] == '-'
  assert body(printed)['`ia3`'][-1].startswith('20.0')
  assert f'not all of {one}, {other} have rte, which is missing.' in printed


def test_a_baseline_is_subtracted_pairwise(tmp_path):
  lora, ia3 = two_runs(tmp_path)
  by_method = text(lora, ia3, baseline='lora(rank=4, alpha=16.0)')
  rows = body(by_method)
  # 100 - 50 over resamples of two: 0, 50 or 100. One example: no interval.
  assert rows['less lora(rank=4)'][-2:] == ['+50.0 ± 50.0', '-100.0']
  assert 'is paired' in by_method
  assert text(lora, ia3, baseline=lora) == by_method
  for unknown in ('lora(rank=8)', 'nonsense', str(tmp_path / 'no')):
    with pytest.raises(ValueError, match='names 0 rows, expected one; the me'):
      compare.table([lora, ia3], baseline=unknown)


def test_other_seeds_of_embedded_tasks_are_not_paired(tmp_path):
  def made(name, **changes):
    rows = [('kind', 'seen', 'accuracy', runs.right(1, 3))]
    own = {'data': 'held_out'} | changes
    config = {'data.source': 'tasks'}
    return runs.make(tmp_path / name, rows, own, config=config)

  one, other = made('a'), made('b', method='ia3', seed=1)
  printed = text(one, other, baseline=one)
  assert body(printed)['less lora(rank=4)'][-1] == '+0.0'
  assert 'is paired' not in printed
  assert 'is paired' in text(one, made('c', method='ia3'), baseline=one)


def test_wrong_markers_are_seen_before_anything_is_written(tmp_path):
  document = tmp_path / 'results.md'
  document.write_text('no marker\n')
  out = tmp_path / 'x'
  done = commands.run(
    'moepeft.tables',
    '--paper=t5_xl',
    f'--output={out}',
    f'--into={document}',
    '--name=a',
  )
  assert done.returncode == 2 and 'found 0 such pairs' in done.stderr
  assert not out.with_suffix('.md').exists()


def test_the_base_stands_first_and_once(tmp_path):
  lora, ia3 = two_runs(tmp_path)
  for run in (lora, ia3):
    folder = pathlib.Path(run)
    own = runs.info(folder, method='none', parameters=0, step=0, data='eval')
    (folder / 'evaluation_eval.jsonl').rename(folder / 'evaluation_1.jsonl')
    runs.add(
      folder,
      own,
      [('cb', 'p', 'accuracy', [0, 0]), ('rte', 'p', 'accuracy', [0])],
    )
  rows = body(text(lora, ia3))
  assert list(rows)[1:] == [
    'majority',
    '`none` the base',
    '`lora(rank=4)`',
    '`ia3`',
  ]
  assert rows['`none` the base'] == ['-', '-', '-', '0.0 ± 0.0', '0.0']


def test_the_papers_row_and_the_difference_stand_below_ours(tmp_path):
  made = runs.make(
    tmp_path / 'a',
    runs.grid(3, 5),
    {'method': 'molora(experts=10, rank=4, router=softmax)'},
  )
  other = runs.make(tmp_path / 'b', runs.grid(3, 5), {'method': 'lora(rank=3)'})
  printed = text(made, other, paper='t5_xl')
  rows = body(printed)
  order = list(rows)
  at = order.index('`molora(experts=10, rank=4, router=softmax)`')
  assert order[at + 1 : at + 3] == ['paper', 'less the paper']
  assert rows['paper'] == [
    '-', '3.18', '-', '38.50', '78.57', '78.16', '63.46', '50.86', '86.50',
    '55.41', '26.72', '59.77',
  ]  # fmt: skip
  # 60 less each of them.
  less = [cell.partition(' ')[0] for cell in rows['less the paper']]
  assert less == [
    '-', '-', '-', '+21.50', '-18.57', '-18.16', '-3.46', '+9.14', '-26.50',
    '+4.59', '+33.28', '+0.23',
  ]  # fmt: skip
  assert '`lora(rank=3)` (not in the paper)' in rows
  assert 'arXiv:2309.05444' in printed


def test_full_finds_the_authors_own_t0(tmp_path):
  made = runs.make(tmp_path / 'a', runs.grid(3, 5), {'method': 'full'})
  rows = body(text(made, paper='t5_xxl'))
  assert rows['paper: T0-11B (authors)'][-1] == '65.03'


def test_a_row_whose_scores_are_unknown_has_no_difference(tmp_path):
  made = runs.make(tmp_path / 'a', runs.grid(3, 5), {'method': 'ia3'})
  printed = text(made, paper='t5_large')
  rows = body(printed)
  assert rows['paper'] == ['-', '0.036'] + ['-'] * 10
  assert rows['less the paper'] == ['-'] * 12
  assert "The paper's ia3: scores not recovered." in printed


def test_a_missing_set_of_ours_is_no_difference(tmp_path):
  made = runs.make(tmp_path / 'a', runs.grid(3, 5, ['cb']), {'method': 'ia3'})
  rows = body(text(made, paper='t5_xl'))
  # The paper's other cells and its average are not shown beside nothing.
  assert rows['paper'] == ['-', '0.018', '-', '50.00']
  assert rows['less the paper'][-1].startswith('+10.00')


@pytest.mark.skipif(not RESULTS.exists(), reason='needs ../shared/paper')
@pytest.mark.parametrize('size', ['t5_large', 't5_xl', 't5_xxl'])
def test_the_papers_table_is_reproduced_from_its_numbers(size):
  source = json.loads(RESULTS.read_text())['tables'][size]
  rows = body(text(paper=size))
  head, names = rows.pop('method'), list(rows)
  assert head == ['% of base', *runs.EIGHT, 'average']
  assert len(names) == len(source)
  for name, row in zip(names, source, strict=True):
    assert row['name'] in name
    percent = row['paper_params_percent']
    expected = ['-' if percent is None else f'{percent:g}']
    scores = row['scores'] or {}
    for key in runs.EIGHT:
      expected.append(f'{scores[key]:.2f}' if key in scores else '-')
    average = row['average']
    expected.append('-' if average is None else f'{average:.2f}')
    assert [cell.strip('*') for cell in rows[name]] == expected
    # Footnotes stand where the source has a note.
    assert ('[' in name) == ('note' in row)


def test_the_papers_table_as_text():
  printed = text(paper='t5_xl', title='Three billion')
  lines = printed.splitlines()
  assert lines[0] == '**Three billion**'
  assert lines[2] == (
    '| method                       | % of base |      anli |        cb |'
    '       rte |       wsc |       wic |      copa | winogrande | hellaswag |'
    '   average |'
  )
  assert lines[-3 - 1 - 1] == (
    '| `molora(experts=10, rank=4)` |      3.18 |     38.50 |     78.57 |'
    '     78.16 |     63.46 |     50.86 |     86.50 |      55.41 |     26.72 |'
    '     59.77 |'
  )
  assert lines[-1] == (
    '- [1] lora(rank=4): the cells do not sum to the average; only the average '
    'is corroborated; their mean is 57.765, the printed average 57.51.'
  )


def test_runs_without_rows_have_what_after_json_says(tmp_path):
  after = {'step': 7, 'validation_loss': 2.5, 'means': {'B held_out': 0.25}}
  made = runs.make(tmp_path / 'a', after=after)
  printed = text(made)
  # package:t5_tiny, counted from its shapes.
  (cells,) = (v for k, v in body(printed).items() if k.startswith('`lora'))
  assert cells[2:] == ['1', '2.500', '25.0']
  assert body(printed)['method'][-2:] == ['held-out loss', 'B held-out']
  assert int(cells[0].replace(',', '')) > 0
  assert 'those of after.json' in printed


def test_a_run_without_held_out_rows_is_not_compared_by_after_json(tmp_path):
  after = {'step': 7, 'validation_loss': 2.5, 'means': {}}
  one = runs.make(
    tmp_path / 'a',
    [('t', 'p', 'loss', [1.0, 2.0], [1, 1])],
    {'data': 'held_out'},
    after=after,
  )
  other = runs.make(tmp_path / 'b', changes={'method': 'ia3'}, after=after)
  printed = text(one, other)
  assert body(printed)['`lora(rank=4)`'][-1].startswith('1.500')
  assert body(printed)['`ia3`'][-1] == '-'
  assert f'No held-out rows in {other}' in printed


def test_other_budgets_and_settings_are_said(tmp_path):
  rows = runs.grid(1, 3, ['cb'])
  one = runs.make(tmp_path / 'a', rows)
  other = runs.make(
    tmp_path / 'b',
    rows,
    {'method': 'full', 'step': 1000},
    config={'batch_size': 3, 'optimizer.learning_rate': 0.01},
  )
  printed = text(one, other)
  assert (
    '**Budgets differ**: 7 steps of 5 rows: `lora(rank=4)`; 1,000 steps of 3 '
    'rows: `full`.'
  ) in printed
  assert (
    'optimizer.learning_rate differs: 0.001 (`lora(rank=4)`); 0.01 (`full`).'
  ) in printed


def test_examples_that_only_a_later_run_has_cut_are_said(tmp_path):
  def made(name, cut, **changes):
    rows = [('cb', 'p', 'accuracy', runs.right(1, 3))]
    path = runs.make(tmp_path / name, rows, changes)
    file = tmp_path / name / 'evaluation_eval.jsonl'
    row = json.loads(file.read_text()) | {'cut': cut}
    file.write_text(json.dumps(row) + '\n')
    return path

  first, seed = made('a', 0), made('b', 1, seed=1)
  other = made('c', 2, method='ia3')
  plain = made('d', 0, method='mov(experts=3)')
  # Of both seeds' six; a row of which none is cut has no remark.
  lines = text(first, seed, other, plain).splitlines()
  assert [line for line in lines if 'cut' in line] == [
    f'- {who}: {cut} prompted examples were cut to the lengths of the run; 0 '
    'could not be ranked and are left out.'
    for who, cut in (('`lora(rank=4)`', '1 of 6'), ('`ia3`', '2 of 3'))
  ]
  # The same in all: once.
  same = made('e', 2, method='lora(rank=5)')
  assert '- 2 of 3 prompted examples were cut' in text(other, same)


def test_cut_and_unranked_examples_are_said(tmp_path):
  made = pathlib.Path(runs.make(tmp_path / 'a', runs.grid(1, 3, ['cb'])))
  file = made / 'evaluation_eval.jsonl'
  row = json.loads(file.read_text()) | {'cut': 2, 'left_out': 1}
  file.write_text(json.dumps(row) + '\n')
  assert '2 of 3 prompted examples were cut' in text(made)
  assert '1 could not be ranked' in text(made)


def test_files_are_written_and_the_picture_is_one(tmp_path):
  table = compare.table(list(two_runs(tmp_path)))
  paths = tables.write(table, str(tmp_path / 'new' / 'table'))
  names = [os.path.basename(path) for path in paths]
  assert names == ['table.md', 'table.tex', 'table.png']
  assert pathlib.Path(paths[0]).read_text() == table_render.markdown(table)
  assert pathlib.Path(paths[1]).read_text() == table_render.latex(table)
  pixels = image.imread(paths[2])
  height, width, _ = pixels.shape
  # 120 dots an inch: two panels of 2.6 inches beside the labels.
  assert width > 2 * 2.6 * 120 and height > 120
  assert pixels[..., :3].std() > 0.05
  # The labels end inside the picture: its edges are blank.
  edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
  assert all((edge[..., :3] == 1).all() for edge in edges)
  assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == sorted(names)


DOCUMENT = """\
Before.
<!-- table: a -->
old
<!-- /table -->
Between.
<!-- table: b -->
<!-- /table -->
After.
"""


def test_a_table_is_put_between_its_markers_alone(tmp_path):
  path = tmp_path / 'results.md'
  path.write_text(DOCUMENT)
  # Backslashes are text, no references.
  tables.put_into(str(path), 'b', '| \\1 |\n')
  expected = DOCUMENT.replace('b -->\n', 'b -->\n| \\1 |\n')
  assert path.read_text() == expected
  tables.put_into(str(path), 'a', 'new\n')
  tables.put_into(str(path), 'a', 'new\n')
  assert path.read_text() == expected.replace('old', 'new')


@pytest.mark.parametrize(
  ('document', 'found'),
  [
    ('no marker\n', 0),
    ('<!-- table: a -->\nno end\n', 0),
    # The end is another table's.
    ('<!-- table: a -->\n<!-- table: b -->\n<!-- /table -->\n', 0),
    (DOCUMENT + DOCUMENT, 2),
  ],
)
def test_a_document_without_its_markers_is_left_alone(
  tmp_path, document, found
):
  path = tmp_path / 'results.md'
  path.write_text(document)
  with pytest.raises(ValueError, match=f'found {found} such pairs'):
    tables.put_into(str(path), 'a', 'new\n')
  assert path.read_text() == document
  with pytest.raises(ValueError, match='there is no such document'):
    tables.put_into(str(tmp_path / 'no.md'), 'a', 'new\n')


def test_what_cannot_be_a_table_is_one_sentence(tmp_path):
  lora, ia3 = two_runs(tmp_path)
  bare = runs.make(tmp_path / 'bare')
  damaged = pathlib.Path(runs.make(tmp_path / 'damaged', runs.grid(1, 2)))
  (damaged / 'evaluation_eval.jsonl').write_text('{"run": "x"}\n')
  broken = pathlib.Path(runs.make(tmp_path / 'broken', runs.grid(1, 2)))
  (broken / 'after.json').write_text('{"step"')
  twice = pathlib.Path(runs.make(tmp_path / 'twice', runs.grid(1, 2)))
  (twice / 'evaluation_copy.jsonl').write_bytes(
    (twice / 'evaluation_eval.jsonl').read_bytes()
  )
  wrong = [
    ([], {}, '--paper=t5_xl'),
    ([], {'paper': 't5_small'}, "t5_xxl; got 't5_small'"),
    ([tmp_path], {}, 'is no work directory of moepeft.train'),
    ([bare], {}, f'python -m moepeft.evaluate --workdir={bare}'),
    ([damaged], {}, 'line 1 of'),
    ([broken], {}, 'after.json is damaged'),
    ([twice], {}, 'and again in'),
    ([lora, lora], {}, 'given twice'),
    ([lora, ia3], {'baseline': 'mov'}, 'expected one'),
  ]
  for given, options, raised in wrong:
    with pytest.raises(ValueError) as error:
      text(*given, **options)
    assert raised in str(error.value)
    assert '\n' not in str(error.value)


def test_the_command_takes_runs_and_options_in_any_order(tmp_path):
  lora, ia3 = two_runs(tmp_path)
  document = tmp_path / 'results.md'
  document.write_text(DOCUMENT)
  done = commands.run('moepeft.tables',
    lora, '--baseline=ia3', ia3, f'--output={tmp_path / "x"}',
    f'--into={document}', '--name=a',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  expected = text(lora, ia3, baseline='ia3')
  assert done.stdout.startswith(expected)
  assert (tmp_path / 'x.png').stat().st_size > 0
  assert expected in document.read_text()


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ([], 'name the work directories of runs'),
    (['--paper=t5_xl', '--into=x.md'], 'go together'),
    (['--paper=t5_xl', '--output=new/'], '--output=new/ is a directory'),
  ],
)
def test_a_wrong_command_line_is_one_sentence_and_code_2(options, said):
  done = commands.run('moepeft.tables', *options)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and said in line


def routed(folder, *steps, kind='weight'):
  """Writes metrics.jsonl of (step, share of the first of two experts)."""
  with open(os.path.join(folder, 'metrics.jsonl'), 'w') as f:
    for step, share in steps:
      even = {kind: [[0.5, 0.5]], 'entropy': [math.log(2)]}
      site = {kind: [[share, 1 - share]], 'entropy': [0.0]}
      row = {'step': step, 'routing': {'encoder/q': even, 'head': site}}
      print(json.dumps(row), file=f)


def test_routing_is_the_last_of_each_run_and_the_mean_of_seeds(tmp_path):
  mixture = {'method': 'molora(experts=2, rank=1)'}
  rows = [('cb', 'p', 'accuracy', [1, 0])]
  one = runs.make(tmp_path / 'one', rows, mixture)
  two = runs.make(tmp_path / 'two', rows, mixture | {'seed': 1})
  lora = runs.make(tmp_path / 'lora', rows)
  # The rows are of step 7: what came after is of another state.
  routed(one, (3, 0.6), (7, 0.9), (8, 1.0))
  routed(two, (7, 0.7))
  table = compare.table([one, two, lora], routing=True)
  lines = body(table_render.markdown(table))
  # Entropies 1 and 0. Fullest 0.5 and 0.9, 0.5 and 0.7: means 0.7 and 0.6.
  mixed = ['0.5', '0', '0.65', '0.8']
  assert lines['`molora(experts=2, rank=1)`'][-4:] == mixed
  assert lines['`lora(rank=4)`'][-4:] == ['-', '-', '-', '-']
  assert '1 is even' in table_render.markdown(table)
  assert 'entropy' not in text(one, two, lora)


def test_mean_weights_and_token_shares_have_columns_of_their_own(tmp_path):
  rows = [('cb', 'p', 'accuracy', [1, 0])]
  made = []
  for kind, router in (
    ('weight', 'softmax'),
    ('tokens', 'topk(k=1)'),
    # An older log.
    ('load', 'uniform'),
  ):
    method = {'method': f'molora(experts=2, rank=1, router={router})'}
    made.append(runs.make(tmp_path / kind, rows, method))
    routed(made[-1], (7, 0.9), kind=kind)
  printed = text(*made, routing=True)
  lines = body(printed)
  assert lines['method'][-8:] == [
    'router entropy', 'dead experts',
    'fullest expert, mean weight', 'mean weight, worst site',
    'fullest expert, token share', 'token share, worst site',
    'fullest expert, argmax share', 'argmax share, worst site',
  ]  # fmt: skip
  cells = ['0.7', '0.9']
  for i, line in enumerate(list(lines.values())[2:]):
    expected = ['-'] * 6
    expected[2 * i : 2 * i + 2] = cells
    assert line[-6:] == expected
    assert line[-7] == ('0' if i < 2 else '-')
  assert 'does not say how much weight the expert has' in printed
  assert 'Argmax' not in text(*made[:2], routing=True)


def test_token_shares_of_older_logs_are_not_called_argmax_shares(tmp_path):
  rows = [('cb', 'p', 'accuracy', [1, 0])]
  method = 'molora(experts=3, rank=1, router=topk(k=2)) + mov(experts=3)'
  made = runs.make(tmp_path / 'a', rows, {'method': method})
  # Each token goes to two of three experts, and counted half for each.
  site = {'load': [[0.5, 0.4, 0.1]], 'entropy': [0.0]}
  soft = {'load': [[0.9, 0.1, 0.0]], 'entropy': [math.log(3)]}
  routing = {'encoder/layers/self/q/molora': site, 'encoder/x/mov': soft}
  (tmp_path / 'a' / 'metrics.jsonl').write_text(
    json.dumps({'step': 7, 'routing': routing}) + '\n'
  )
  lines = body(text(made, routing=True))
  cells = dict(zip(lines['method'], [*lines.values()][-1], strict=True))
  assert cells['fullest expert, token share'] == '1'
  assert cells['fullest expert, argmax share'] == '0.9'


def test_cost_is_of_compiled_steps_and_time_is_over_the_baseline(
  tmp_path, monkeypatch
):
  seconds = {'lora(rank=4)': 2.0, 'ia3': 1.0, 'full': 4.0}
  compiled = []

  def compile_step(config):
    compiled.append(config.method)
    return CompiledStep(config.method, 7_000_000 * int(seconds[config.method]))

  def time_ratio(step, reference, rounds):
    return seconds[step.run] / seconds[reference.run]

  monkeypatch.setattr(cost.step_cost, 'compile_step', compile_step)
  monkeypatch.setattr(cost.step_cost, 'time_ratio', time_ratio)
  flops = {'forward': 1234.4, 'backward': 2000.0}
  monkeypatch.setattr(cost, 'flops_per_token', lambda config: flops)
  rows = [('cb', 'p', 'accuracy', [1, 0])]
  lora = runs.make(tmp_path / 'lora', rows)
  ia3 = runs.make(tmp_path / 'ia3', rows, {'method': 'ia3'})
  full = runs.make(tmp_path / 'full', rows, {'method': 'full'})
  printed = text(ia3, lora, baseline='lora(rank=4)', cost=True)
  assert compiled == ['lora(rank=4)', 'ia3']
  lines = body(printed)
  assert lines['method'][-4:] == [
    *('FLOPs forward', 'FLOPs backward', 'step time', 'memory, MB'),
  ]
  assert lines['`lora(rank=4)`'][-4:] == ['1,234', '2,000', '1', '14']
  assert lines['`ia3`'][-4:] == ['1,234', '2,000', '0.5', '7']
  assert 'the time over that of `lora(rank=4)`' in printed
  # Without a baseline times are over those of the first run.
  lines = body(text(ia3, full, cost=True))
  assert lines['`full`'][-2:] == ['4', '28']
  assert 'FLOPs' not in text(ia3, lora)


def test_routing_without_runs_is_refused():
  done = commands.run('moepeft.tables', '--paper=t5_xl', '--routing')
  assert done.returncode == 2
  assert '--routing is for runs' in done.stderr


def test_rows_of_one_method_tell_their_router_losses(tmp_path):
  rows = [('cb', 'p', 'accuracy', [1, 0])]
  mixture = {'method': 'molora(experts=2, rank=1, router=topk(k=1))'}
  plain = runs.make(tmp_path / 'plain', rows, mixture)
  weighted = {'router_losses.load_balance': 0.01}
  even = runs.make(tmp_path / 'even', rows, mixture, config=weighted)
  lines = body(text(plain, even))
  name = f'`{mixture["method"]}` router_losses.load_balance'
  assert {f'{name}=0.0', f'{name}=0.01'} <= set(lines)


def test_rows_of_a_run_that_was_there_before_are_refused(tmp_path):
  # Trained anew with another method; the rows are of the old one.
  run = runs.make(tmp_path / 'a', runs.grid(1, 2), config={'method': 'ia3'})
  with pytest.raises(ValueError, match="rows of 'lora.rank=4.' .official."):
    text(run)
  # Another text of one method is no other method.
  same = {'method': 'lora(rank=4, alpha=16.0)'}
  assert 'lora(rank=4)' in text(
    runs.make(tmp_path / 'b', runs.grid(1, 2), config=same)
  )


def test_every_metric_that_is_shown_has_its_unit(tmp_path):
  rows = [
    ('one', 'p', 'accuracy', [1, 0]),
    ('one', 'p', 'exact_match', [1, 0]),
    ('one', 'p', 'rouge_l', [0.5, 0.25]),
  ]
  shown = text(runs.make(tmp_path / 'a', rows))
  assert 'Accuracies of other data are in %' in shown
  assert 'Exact match is in %: the mean over tasks' in shown
  assert 'ROUGE-L is in %: the mean over tasks' in shown
