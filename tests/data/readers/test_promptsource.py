# SPDX-License-Identifier: Apache-2.0
"""Templates in promptsource's form say of raw rows what promptsource would."""

import collections

import pytest

from moepeft.data.example import BadRows
from moepeft.data.readers import promptsource
from moepeft.data.readers.promptsource import PromptTemplate

FILE = """
dataset: glue
subset: mrpc
templates:
  0d2b: !Template
    answer_choices: no ||| yes
    id: 0d2b
    jinja: "Is {{sentence1}} the same as {{sentence2}}?\\n|||\\n
      {{ answer_choices[label] }}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: same thing?
    reference: ''
  1c3a: !Template
    answer_choices: null
    id: 1c3a
    jinja: '{% if label == 1 %} Reword: {{ sentence1 }} ||| {{ sentence2 }}
      {% endif %}'
    metadata: !TemplateMetadata
      original_task: false
    name: generate
    reference: ''
"""
ROWS = [
  dict(sentence1='A cat', sentence2='a dog', label=0),
  dict(sentence1='Two', sentence2='2', label=1),
]


def write(path, text=FILE):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return str(path)


def say(jinja, row, choices='', place=0, seed=0, name='t'):
  template = PromptTemplate(name, jinja, choices)
  return promptsource.apply_template(template, 'd', seed, row, place)


def test_every_template_of_a_row_that_it_applies_to_gives_an_example(tmp_path):
  group = promptsource.read_templates(write(tmp_path / 'templates.yaml'))
  actual = promptsource.render_templates(group, ROWS, BadRows('error'))
  assert [tuple(vars(e).values()) for e in actual] == [
    # 'generate' has nothing to say of the first row.
    ('glue_mrpc', 'same_thing_', 0)
    + ('Is A cat the same as a dog?', 'no', ('no', 'yes'), 0, None),
    ('glue_mrpc', 'generate', 1, 'Reword: Two', '2', (), -1, None),
    ('glue_mrpc', 'same_thing_', 1)
    + ('Is Two the same as 2?', 'yes', ('no', 'yes'), 1, None),
  ]
  assert actual.inapplicable == 1
  assert actual.notes('rows') == [
    '1 pairs of row and template of rows are left out: the template renders '
    'nothing there'
  ]
  assert group.original == {('glue_mrpc', 'same_thing_')}


def test_plain_yaml_and_group_tags_are_read_alike(tmp_path):
  tagged = '!TemplateGroup' + FILE
  plain = FILE.replace('!TemplateMetadata', '').replace('!Template', '')
  one = promptsource.read_templates(
    write(tmp_path / 'a.yaml', tagged)
  ).templates
  assert (
    one
    == promptsource.read_templates(write(tmp_path / 'b.yaml', plain)).templates
  )
  assert (
    one == promptsource.read_templates(write(tmp_path / 'c.yaml')).templates
  )


def test_a_dataset_finds_its_file_among_promptsources(tmp_path):
  write(tmp_path / 'glue/mrpc/templates.yaml')
  other = FILE.replace('mrpc', 'qqp')
  write(tmp_path / 'glue/qqp/templates.yaml', other)
  for name in ('glue/mrpc', 'glue_mrpc'):
    assert promptsource.find_templates(str(tmp_path), name).task == 'glue_mrpc'
  write(tmp_path / 'flat/a.yaml')
  write(tmp_path / 'flat/b.yaml', other)
  assert (
    promptsource.find_templates(str(tmp_path / 'flat'), 'glue/qqp').task
    == 'glue_qqp'
  )
  single = str(tmp_path / 'glue' / 'qqp')
  assert promptsource.find_templates(single, 'mine').task == 'glue_qqp'
  said = '0 sets .* for .mine. .*glue_mrpc, glue_qqp'
  with pytest.raises(ValueError, match=said):
    promptsource.find_templates(str(tmp_path / 'flat'), 'mine')


def test_names_are_spelled_as_in_p3():
  assert promptsource.p3_name('…which C1, or C2?') == '_which_C1_or_C2_'
  assert promptsource.p3_name('cos_e v1.11') == 'cos_e_v1.11'


def test_choices_may_come_from_the_row():
  row = dict(options=['a b', 'c', 'd'], right=1)
  jinja = '{{ options | join(", ") }} ||| {{ answer_choices[right] }}'
  e = say(jinja, row, '{{ options | join("|||") }}')
  assert (e.choices, e.label, e.targets) == (('a b', 'c', 'd'), 1, 'c')
  # An answer in other words is no choice, and choices alike are none.
  assert say('x ||| y', row, 'n ||| m').choices == ()
  assert say('x ||| n', row, 'n ||| n').choices == ()


def test_separators_of_the_row_itself_separate_nothing():
  e = say('{{ x[0] }}? ||| {{ y }}', dict(x=['a|||b'], y='c ||| d'))
  assert (e.inputs, e.targets) == ('a|||b?', 'c ||| d')


def test_hyphens_in_columns_are_underscores():
  assert say('{{ a_b }} ||| c', {'a-b': 'x'}).inputs == 'x'


def test_long_values_are_cut_as_promptsource_cuts_them():
  # 2048 characters and 5 more are let be; else the last word that fits whole
  # into 2045 stays, and three dots follow.
  jinja = '{{ x }} ||| y'
  assert len(say(jinja, dict(x='a' * 2053)).inputs) == 2053
  long = say(jinja, dict(x='four ' * 1000)).inputs
  assert long == ('four ' * 409).strip() + '...'
  # Choices are not cut.
  e = say('q ||| {{ "b" }}', dict(x='a' * 3000), '{{ x }} ||| b')
  assert len(e.choices[0]) == 3000


def test_promptsources_own_words():
  row = dict(x=['b', 'a', 'b', 'a', 'c'], y=[1, 2])
  assert say('{{ x | most_frequent | join }} ||| y', row).inputs == 'ba'
  jinja = '{% for a, b in zip(x, y) %}{{ a }}{{ b }}{% endfor %} ||| y'
  assert say(jinja, row).inputs == 'b1a2'


def test_choice_depends_on_seed_template_and_row_alone():
  row = dict(x=list('abcdefghij'))
  jinja = '{{ x | choice }}{{ x | choice }} ||| y'

  def drawn(**changes):
    return [say(jinja, row, place=i, **changes).inputs for i in range(50)]

  first = drawn()
  assert first == drawn()
  assert first != drawn(seed=1) and first != drawn(name='u')
  # 100 draws of ten: that one never comes has a probability of 0.9^100 x 10,
  # below 3e-4 (and the seed is fixed).
  counts = collections.Counter(''.join(first))
  assert set(counts) == set('abcdefghij')


def test_a_rendering_does_not_change_the_row():
  row = dict(x=['a'], y={'z': ['b']})
  jinja = '{{ x.append("c") or y.z.append("d") or x | join }} ||| y'
  assert say(jinja, row).inputs == say(jinja, row).inputs == 'ac'
  assert row == dict(x=['a'], y={'z': ['b']})


@pytest.mark.parametrize(
  'jinja',
  [
    "{{ ''.__class__ }} ||| x",
    "{{ ''.__class__.__mro__[1].__subclasses__() }} ||| x",
    '{{ x.__init__ }} ||| x',
    '{{ zip.mro() }} ||| x',
    "{{ '{0.__class__}'.format(x) }} ||| x",
    '{{ self.__init__.__globals__ }} ||| x',
  ],
)
def test_an_unsafe_template_is_refused_whatever_becomes_of_bad_rows(jinja):
  group = promptsource.TemplateGroup(
    'd', (PromptTemplate('bad', jinja),), 'f.yaml'
  )
  table = [dict(x=['a'])] * 3
  with pytest.raises(ValueError, match="template 'bad' of d is unsafe: access"):
    promptsource.render_templates(group, table, BadRows('skip'))


@pytest.mark.parametrize(
  ('jinja', 'said'),
  [
    ('{{ nothere }} ||| y', "fails .'nothere' is undefined; columns: x"),
    ('{% if nothere %}a{% endif %} ||| y', "'nothere' is undefined"),
    ('{{ x[5] }} ||| y', 'fails .list object has no element 5'),
    ('{{ x + 1 }} ||| y', 'fails .can only concatenate list'),
    ('{{ [] | choice }} ||| y', 'fails'),
  ],
)
def test_a_row_on_which_a_template_fails_is_bad(jinja, said):
  good = PromptTemplate('good', '{{ x[0] }} ||| y')
  group = promptsource.TemplateGroup(
    'd', (PromptTemplate('odd', jinja), good), 'f.yaml'
  )
  table = [dict(x=['a'])] * 2
  with pytest.raises(ValueError, match=f"row 0: template 'odd' of d .*{said}"):
    promptsource.render_templates(group, table, BadRows('error'))
  # On all rows, it is the template.
  with pytest.raises(ValueError, match=f'no row of f.yaml is good.*{said}'):
    promptsource.render_templates(group, table, BadRows('skip'))
  # On some, they are skipped.
  remaining = PromptTemplate('some', '{{ x[1] }} ||| y')
  group = promptsource.TemplateGroup('d', (remaining, good), 'f.yaml')
  table = [dict(x=['a', 'b']), dict(x=['c'])]
  actual = promptsource.render_templates(group, table, BadRows('skip'))
  assert [e.inputs for e in actual] == ['b', 'a', 'c']
  assert actual.skipped[0].startswith("row 1: template 'some' of d fails")


def test_a_text_has_two_parts():
  with pytest.raises(ValueError, match="'t' of d renders 3 parts; expected in"):
    say('a ||| b ||| c', {})
  with pytest.raises(ValueError, match="'t' of d renders 1 part; expected in"):
    say('a {% if false %} ||| {% endif %}', {})
  assert say('{% if false %} a ||| b {% endif %}', {}) is None
  assert say('a ||| {{ "" }}', {}) is None


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('a: [', 'cannot be read as a templates.yaml'),
    ('x: !!python/object/apply:os.getcwd []', 'cannot be read .*python/obj'),
    ('[1]', "expected a mapping with 'dataset'"),
    ('dataset: d', "expected a mapping with 'dataset'"),
    (FILE.replace('dataset', 'data'), "expected a mapping with 'dataset'"),
    (FILE.replace('jinja:', 'ginger:'), "'same thing.'.*in 'jinja'; got None"),
    (FILE.replace('no ||| yes', '[no, yes]'), "expected text in 'answer_choi"),
    (FILE.replace('{{ sentence2 }}', '{{ sen'), "'generate': 'jinja' is not J"),
    (FILE.replace('{{ sentence1 }} |||', ''), "'generate': expected '...' bet"),
    (
      FILE.replace('generate', 'same thing!'),
      "2 templates have the name 'same_t",
    ),
  ],
)
def test_a_wrong_file_is_named_and_so_is_its_template(tmp_path, text, said):
  path = write(tmp_path / 'w.yaml', text)
  with pytest.raises(ValueError, match=f'w.yaml.*{said}') as e:
    promptsource.read_templates(path)
  assert '\n' not in str(e.value)


def test_an_absent_file_is_named(tmp_path):
  with pytest.raises(ValueError, match='has 0 sets of templates'):
    promptsource.find_templates(str(tmp_path / 'none.yaml'), 'd')
