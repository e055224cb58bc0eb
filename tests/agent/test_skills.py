# SPDX-License-Identifier: Apache-2.0
"""Skills: what is valid, the three steps of loading, and what is refused."""

import os

import pytest

pytest.importorskip('openai')

from moepeft.agent import config_file, skills
from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.sandbox import bubblewrap  # noqa: E402
from moepeft.agent.sandbox.process import ResourceLimits  # noqa: E402
from tests.agent.scripted import serving, text_reply, wants  # noqa: E402

HEAD = '---\nname: dig\ndescription: Digs holes. Use for holes.\n---\n'


@pytest.fixture
def folder(tmp_path):
  """A directory with the skill `dig`, and a secret beside it."""
  # As root, the sandbox's user is another: pytest's directories are private.
  tmp_path.chmod(0o755)
  skill_set = tmp_path / 'skills' / 'dig'
  (skill_set / 'scripts').mkdir(parents=True)
  (skill_set / 'references').mkdir()
  (skill_set / 'SKILL.md').write_text(f'{HEAD}\n# Dig\n\nUse a spade.\n')
  (skill_set / 'references' / 'soil.md').write_text('Clay is hard.')
  (skill_set / 'scripts' / 'dig.py').write_text(
    'import os, sys\nprint("dug", sys.argv[1:], os.environ.get("MY_API_KEY"))\n'
  )
  (skill_set / 'scripts' / 'loop.sh').write_text('while :; do :; done\n')
  (skill_set / 'scripts' / 'bad.sh').write_text('echo oops >&2; exit 3\n')
  (tmp_path / 'secret.txt').write_text('the secret')
  os.symlink(tmp_path / 'secret.txt', skill_set / 'references' / 'link.txt')
  os.symlink(tmp_path, skill_set / 'up')
  return tmp_path / 'skills'


needs_sandbox = pytest.mark.skipif(
  bool(bubblewrap.unavailable_reason()),
  reason=f'no sandbox here: {bubblewrap.unavailable_reason()}',
)


def run(folder, name, arguments, limits=skills.SCRIPT_LIMITS, **options):
  skill_set = skills.find_skills([folder])
  options.setdefault('unsafe_no_sandbox', bool(bubblewrap.unavailable_reason()))
  workspace = options.setdefault('workspace', folder)
  box = skills.script_sandbox(skill_set, limits=limits, **options)
  tools = skills.skill_tools(skill_set, box, workspace)
  (tool,) = [tool for tool in tools if tool.name == name]
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
    text_reply('A hole.'),
  ]
  skill_set = skills.find_skills([folder])
  with serving(*replies) as script:
    box = skills.script_sandbox(skill_set, folder, unsafe_no_sandbox=True)
    tools = skills.skill_tools(skill_set, box, folder)
    agent = Agent(script.model(), tools, skills.skills_prompt(skill_set))
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
  skill_set = skills.find_skills([folder])
  box = skills.script_sandbox(skill_set, folder, unsafe_no_sandbox=True)
  trusted = {
    tool.name: tool.trusted for tool in skills.skill_tools(skill_set, box)
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
  ended = run(
    folder, 'run_skill_script', text % 'loop.sh', ResourceLimits(seconds=0.3)
  )
  assert ended == '[killed after 0.3 s]'
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
  ('text', 'output'),
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
def test_a_skill_that_is_not_valid_is_one_clear_sentence(
  tmp_path, text, output
):
  skill_set = tmp_path / 'dig'
  skill_set.mkdir()
  if text is not None:
    (skill_set / 'SKILL.md').write_text(text)
  with pytest.raises(ValueError, match=output) as caught:
    skills.find_skills([tmp_path])
  assert '\n' not in str(caught.value)


def test_other_fields_and_other_line_ends_are_no_mistakes(tmp_path):
  skill_set = tmp_path / 'dig'
  skill_set.mkdir()
  more = (
    'license: MIT\ncompatibility: needs a spade\nallowed-tools: Read Bash\n'
    'metadata:\n  author: me\nunknown: kept by others\n'
  )
  # As written on Windows, with a byte order mark.
  text = '\ufeff' + wrong(more=more).replace('\n', '\r\n')
  (skill_set / 'SKILL.md').write_bytes(text.encode())
  skill = skills.find_skills([skill_set])['dig']
  assert (skill.name, skill.body) == ('dig', 'body')


def test_two_skills_of_one_name_and_missing_directories_are_refused(tmp_path):
  for place in ('a', 'b'):
    (tmp_path / place / 'dig').mkdir(parents=True)
    (tmp_path / place / 'dig' / 'SKILL.md').write_text(wrong())
  with pytest.raises(ValueError, match="two skills are named 'dig'"):
    skills.find_skills([tmp_path / 'a', tmp_path / 'b'])
  with pytest.raises(ValueError, match='does not exist'):
    skills.find_skills([tmp_path / 'c'])
  assert skills.skill_tools({}) == [] and skills.skills_prompt({}) == ''


def test_a_stray_file_and_a_link_to_a_skill_refuse_no_good_ones(tmp_path):
  (tmp_path / 'dig').mkdir()
  (tmp_path / 'dig' / 'SKILL.md').write_text(wrong())
  (tmp_path / 'again').symlink_to('dig')
  (tmp_path / 'SKILL.md').write_text('a template, left here')
  (tmp_path / 'pipe').mkdir()
  os.mkfifo(tmp_path / 'pipe' / 'SKILL.md')
  warnings = []
  assert set(
    skills.find_skills([tmp_path, tmp_path / 'dig'], warnings.append)
  ) == {'dig'}
  assert len(warnings) == 2
  assert 'has no front matter' in warnings[0] and 'a named pipe' in warnings[1]
  with pytest.raises(ValueError, match='is no directory'):
    skills.find_skills([tmp_path / 'SKILL.md'])


def script(folder, text):
  """A script of the skill `dig`, which is run by its path."""
  (folder / 'dig' / 'scripts' / 'mine.py').write_text(text)
  return '{"name": "dig", "path": "scripts/mine.py", "args": []}'


@needs_sandbox
def test_a_script_reads_the_workspace_and_writes_nothing(folder):
  arguments = script(
    folder,
    f"""
import os
print(open('dig/references/soil.md').read(), os.getcwd())
for path in ('x', 'dig/SKILL.md', 'dig/scripts/mine.py', '../x', '/etc/x'):
  try:
    open(path, 'a').write('x')
    print('WROTE', path)
  except OSError:
    pass
for path in ('../secret.txt', {str(folder.parent / 'secret.txt')!r},
             'dig/references/link.txt', 'dig/up/secret.txt', '/etc/passwd'):
  try:
    print('READ', open(path).read())
  except OSError:
    pass
open('/sandbox/x', 'w').write('scratch')
print(os.path.exists('/sandbox/x'), os.geteuid() != 0)
""",
  )
  text = run(folder, 'run_skill_script', arguments)
  assert text == f'Clay is hard. {folder}\nTrue True'
  assert not (folder / 'x').exists()


def test_arguments_that_no_program_can_have_are_said(folder):
  for args, reason in (
    ('["a\\u0000b"]', 'null byte'),
    ('["' + 'x' * 200_000 + '"]', 'too long'),
  ):
    arguments = f'{{"name": "dig", "path": "scripts/dig.py", "args": {args}}}'
    text = run(folder, 'run_skill_script', arguments)
    assert text.startswith('[it does not start: ') and reason in text


HAND_OVER = """
import os
with open(int(os.environ['MOEPEFT_OUTPUT']), 'wb', closefd=False) as file:
  file.write({!r})
print('done')
"""


def test_a_script_hands_over_a_card_and_nothing_else(folder):
  config = config_file.render_config('About.', {'steps': 7}).encode()
  arguments = script(folder, HAND_OVER.format(b'mine.py\n' + config))
  assert run(folder, 'run_skill_script', arguments) == 'done'
  assert (folder / 'mine.py').read_bytes() == config
  # The file is there now; a link of the name is not followed.
  with pytest.raises(ValueError, match='mine.py exists'):
    run(folder, 'run_skill_script', arguments)
  os.symlink(folder.parent / 'elsewhere.py', folder / 'link.py')
  for handed in (
    b'link.py\n' + config,
    b'../up.py\n' + config,
    b'/tmp/moepeft_up.py\n' + config,
    b'-c.py\n' + config,
    b'.hidden.py\n' + config,
    b'SKILL.md\n' + config,
    b'a\0b.py\n' + config,
    b'other.py\nimport os\n',
    b'other.py\n' + config + b'import os\n',
    b'other.py\n' + config.replace(b'= 7', b'= __import__("os")'),
    b'other.py\n' + b'(' * 60_000,
    b'\xff' * 10,
    b'x' * 100_000,
  ):
    with pytest.raises(ValueError):
      config_file.save_config(handed, folder)
  assert sorted(path.name for path in folder.iterdir()) == [
    'dig',
    'link.py',
    'mine.py',
  ]
  assert not (folder.parent / 'elsewhere.py').exists()


def test_without_a_sandbox_there_is_no_tool_for_scripts(folder, monkeypatch):
  monkeypatch.setattr(
    skills, 'unavailable_reason', lambda: 'bwrap is not installed'
  )
  skill_set = skills.find_skills([folder])
  with pytest.raises(ValueError, match='bwrap is not installed'):
    skills.script_sandbox(skill_set, folder)
  tools = {tool.name: tool for tool in skills.skill_tools(skill_set)}
  assert sorted(tools) == ['load_skill', 'read_skill_file']
  text = tools['load_skill'].run('{"name": "dig"}')
  assert 'Scripts cannot be run here: there is no sandbox' in text


@needs_sandbox
def test_a_workspace_that_holds_the_home_is_refused(folder, monkeypatch):
  monkeypatch.setenv('HOME', str(folder / 'dig'))
  for workspace in (folder, folder / 'dig', '/'):
    with pytest.raises(ValueError, match='contains the home directory'):
      skills.script_sandbox(skills.find_skills([folder]), workspace)


def test_bad_skills_are_left_out_and_named_and_good_ones_stay(folder):
  for name, text in (
    ('colon', wrong('colon', 'Use when: a thing happens.')),
    ('other', wrong('acme')),
    ('deep', f'---\nname: {"[" * 1000}\n---\n'),
    ('bomb', '---\na: &a [x, x]\n' + bomb() + 'name: bomb\n---\n'),
    ('keys', '---\n? [a, b]\n: 3\n1: 2\n---\n'),
    ('binary', '---\nname: \x00\n---\n'),
  ):
    (folder / name).mkdir()
    (folder / name / 'SKILL.md').write_text(text)
  (folder / 'docs').mkdir()
  (folder / 'docs' / 'README.md').write_text('notes')
  (folder / 'README.md').write_text('notes')
  (folder / 'pipe').mkdir()
  os.mkfifo(folder / 'pipe' / 'SKILL.md')
  faults = []
  assert list(skills.find_skills([folder], faults.append)) == ['dig']
  names = ['binary', 'bomb', 'colon', 'deep', 'docs', 'keys', 'other', 'pipe']
  assert len(faults) == len(names)
  for name, fault in zip(names, faults, strict=True):
    assert fault.startswith('a skill is left out: ') and '\n' not in fault
    assert f'/{name}' in fault, fault


def bomb() -> str:
  """Aliases that are ten million nodes in 300 bytes."""
  names = 'abcdefgh'
  return ''.join(
    f'{b}: &{b} [{", ".join([f"*{a}"] * 10)}]\n'
    for a, b in zip(names, names[1:], strict=False)
  )


def test_a_pipe_among_a_skills_files_is_none_of_them(folder):
  os.mkfifo(folder / 'dig' / 'references' / 'pipe.md')
  assert 'references/pipe.md' not in skills.find_skills([folder])['dig'].files()
