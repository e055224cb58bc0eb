# SPDX-License-Identifier: Apache-2.0
"""The command's progress at start, and the banner of a ready server."""

import io

from moepeft.core.http_access import ApiKeys
from moepeft.inference.api import LoadedAdapter
from moepeft.serve import terminal_output


def test_a_file_gets_the_first_program_and_not_every_one():
  out = io.StringIO()
  shown = terminal_output.StartupProgress(out)
  for i in range(5):
    shown('prefill 16', i, 5)
  assert out.getvalue().count('\n') == 1
  assert 'compiling 1 of 5: prefill 16' in out.getvalue()


def test_a_terminal_gets_one_line_that_is_written_over():
  out = io.StringIO()
  out.isatty = lambda: True
  shown = terminal_output.StartupProgress(out)
  shown('prefill 16', 0, 2)
  shown('step 8', 1, 2)
  assert '\n' not in out.getvalue()
  assert out.getvalue().count('\r') == 2
  assert 'compiling 2 of 2: step 8' in out.getvalue()


def test_a_box_says_how_to_ask():
  law = LoadedAdapter('law', 'lora(rank=4)', 'sha', 7, 'runs/law')
  ia3 = LoadedAdapter('tone', 'ia3', 'sha', 7, 'runs/tone')
  keys = ApiKeys((b'a', b'b'), ())
  banner = terminal_output.banner_lines('http://x:1', 'base', [law, ia3], keys)
  out = io.StringIO()
  terminal_output.StartupProgress(out).done(banner)
  rows = out.getvalue().splitlines()
  # All rows of a box are as long.
  assert len({len(row) for row in rows}) == 1
  for text in (
    'http://x:1/v1',
    'base',
    'law: lora(rank=4)',
    'tone: ia3',
    'one of 2',
    'off (--admin_key_file)',
  ):
    assert any(text in row for row in rows), text
  # No key is ever shown.
  banner = terminal_output.banner_lines(
    'u', 'm', [], ApiKeys((b'secret',), (b'other',))
  )
  assert not any('secret' in line or 'other' in line for line in banner)
