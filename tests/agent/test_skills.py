# SPDX-License-Identifier: Apache-2.0
"""Skills: what is valid, the three steps of loading, and what is refused."""

import os

import pytest

pytest.importorskip('openai')

from moepeft.agent import skills  # noqa: E402
from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.programs import Bounds  # noqa: E402
from tests.agent.scripted import says, serving, wants  # noqa: E402

HEAD = '---\nname: dig\ndescription: Digs holes. Use for holes.\n---\n'


@pytest.fixture
def folder(tmp_path):
  """A directory with the skill `dig`, and a secret beside it."""
  own = tmp_path / 'skills' / 'dig'
  (own / 'scripts').mkdir(parents=True)
  (own / 'references').mkdir()
  (own / 'SKILL.md').write_text(f'{HEAD}\n# Dig\n\nUse a spade.\n')
  (own / 'references' / 'soil.md').write_text('Clay is hard.')
  (own / 'scripts' / 'dig.py').write_text(
    'import os, sys\nprint("dug", sys.argv[1:], os.environ.get("MY_API_KEY"))\n'
  )
  (own / 'scripts' / 'loop.sh').write_text('while :; do :; done\n')
  (own / 'scripts' / 'bad.sh').write_text('echo oops >&2; exit 3\n')
  (tmp_path / 'secret.txt').write_text('the secret')
  os.symlink(tmp_path / 'secret.txt', own / 'references' / 'link.txt')
  os.symlink(tmp_path, own / 'up')
  return tmp_path / 'skills'


def run(folder, name, arguments, bounds=None):
  made = skills.tools(skills.find([folder]), bounds)
  (tool,) = [tool for tool in made if tool.name == name]
  return tool.run(arguments)


def test_a_skill_is_loaded_in_three_steps(folder):
  replies = [
    wants(('load_skill', {'name': 'dig'})),
    wants(('read_skill_file', {'name': 'dig', 'path': 'references/soil.md'})),
    wants(
      (
        'run_skill_script',
        {'name': 'dig', 'path': 'scripts/dig.py', 'args': ['a b', ';ls']},
      )
    ),
    says('A hole.'),
  ]
  own = skills.find([folder])
  with serving(*replies) as script:
    agent = Agent(script.model(), skills.tools(own), skills.catalogue(own))
    assert agent.ask('I need a hole.').text == 'A hole.'
  first, second, third, fourth = (r['messages'] for r in script.requests)
  # At first the model knows a name and a description, and no more.
  assert '- dig: Digs holes. Use for holes.' in first[0]['content']
  assert 'spade' not in str(first)
  body = second[-1]['content']
  assert body.startswith('# Dig\n\nUse a spade.')
  assert '- references/soil.md\n- scripts/bad.sh\n- scripts/dig.py' in body
  # Links are not told of.
  assert 'link.txt' not in body and 'up/' not in body
  assert third[-1]['content'] == 'Clay is hard.'
  # Of a script only what it prints, and that is data.
  output = fourth[-1]['content']
  assert output == "<tool_output>\ndug ['a b', ';ls'] None\n</tool_output>"
  assert 'import os' not in str(fourth)


def test_a_skill_that_loads_is_followed_and_what_scripts_say_is_data(folder):
  trusted = {
    tool.name: tool.trusted for tool in skills.tools(skills.find([folder]))
  }
  assert trusted == {
    'load_skill': True,
    'read_skill_file': True,
    'run_skill_script': False,
  }


@pytest.mark.parametrize(
  'path',
  [
    '../../secret.txt',
    'references/../../../secret.txt',
    '/etc/hostname',
    'references/link.txt',
    'up/secret.txt',
    '',
    'references',
    'none.md',
    'references/soil.md\0',
  ],
)
@pytest.mark.parametrize('name', ['read_skill_file', 'run_skill_script'])
def test_nothing_outside_a_skill_is_read_or_run(folder, name, path):
  import json

  arguments = {'name': 'dig', 'path': path}
  if name == 'run_skill_script':
    arguments['args'] = []
  with pytest.raises(ValueError) as caught:
    run(folder, name, json.dumps(arguments))
  assert 'secret' not in str(caught.value).replace(path, '')


def test_what_a_script_may_do_is_bounded(folder):
  text = '{"name": "dig", "path": "scripts/%s", "args": []}'
  ended = run(folder, 'run_skill_script', text % 'loop.sh', Bounds(seconds=0.3))
  assert ended == '[ended after 0.3 s]'
  assert run(folder, 'run_skill_script', text % 'bad.sh') == (
    'oops\n[exit status 3]'
  )
  with pytest.raises(
    ValueError, match="path: Input should be 'scripts/bad.sh'"
  ):
    run(
      folder,
      'run_skill_script',
      '{"name": "dig", "path": "references/soil.md", "args": []}',
    )
  with pytest.raises(ValueError, match="name: Input should be 'dig'"):
    run(folder, 'load_skill', '{"name": "x"}')


def test_scripts_see_no_keys(folder, monkeypatch):
  monkeypatch.setenv('MY_API_KEY', 'sk-1')
  monkeypatch.setenv('PLAIN', 'x')
  text = '{"name": "dig", "path": "scripts/dig.py", "args": []}'
  assert run(folder, 'run_skill_script', text) == 'dug [] None'


def wrong(name='dig', description='Digs.', more=''):
  return f'---\nname: {name}\ndescription: {description}\n{more}---\nbody\n'


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    (None, 'has no SKILL.md; write one'),
    ('# Dig\n', 'has no front matter'),
    ('---\nname: dig\n', 'has no front matter'),
    ('---\nname: a: b\n---\n', 'is not YAML .*line 1'),
    ('---\n- dig\n---\n', 'is no list of name: value'),
    ('---\nname: dig\n---\n', 'description: Field required'),
    ('---\ndescription: x\n---\n', 'name: Field required'),
    (wrong(name='3'), 'name: Input should be a valid string'),
    (wrong(name='Dig'), 'name: .* should match pattern'),
    (wrong(name='dig--a'), 'name: .* should match pattern'),
    (wrong(name='dug'), "'dug' .* differs from its directory 'dig'"),
    (wrong(description='x' * 1025), 'description: .* at most 1024 characters'),
    (wrong(name='d' * 65), 'name: .* at most 64 characters'),
  ],
)
def test_a_skill_that_is_not_valid_is_one_clear_sentence(tmp_path, text, said):
  own = tmp_path / 'dig'
  own.mkdir()
  if text is not None:
    (own / 'SKILL.md').write_text(text)
  with pytest.raises(ValueError, match=said) as caught:
    skills.find([tmp_path])
  assert '\n' not in str(caught.value)


def test_other_fields_and_other_line_ends_are_no_mistakes(tmp_path):
  own = tmp_path / 'dig'
  own.mkdir()
  more = (
    'license: MIT\ncompatibility: needs a spade\nallowed-tools: Read Bash\n'
    'metadata:\n  author: me\nunknown: kept by others\n'
  )
  # As written on Windows, with a byte order mark.
  text = '\ufeff' + wrong(more=more).replace('\n', '\r\n')
  (own / 'SKILL.md').write_bytes(text.encode())
  skill = skills.find([own])['dig']
  assert (skill.name, skill.body) == ('dig', 'body')


def test_two_skills_of_one_name_and_missing_directories_are_refused(tmp_path):
  for place in ('a', 'b'):
    (tmp_path / place / 'dig').mkdir(parents=True)
    (tmp_path / place / 'dig' / 'SKILL.md').write_text(wrong())
  with pytest.raises(ValueError, match="two skills are named 'dig'"):
    skills.find([tmp_path / 'a', tmp_path / 'b'])
  with pytest.raises(ValueError, match='does not exist'):
    skills.find([tmp_path / 'c'])
  assert skills.tools({}) == [] and skills.catalogue({}) == ''
