# SPDX-License-Identifier: Apache-2.0
"""Messages without keys, tokens and passwords."""

import pytest

from moepeft.config import command_line
from moepeft.core import secrets


@pytest.mark.parametrize(
  ('text', 'shown'),
  [
    ('no hub at https://me:pass1@hub.org/x', 'no hub at https://***@hub.org/x'),
    (
      'GET s3.org/a?X-Amz-Signature=abc&v=1',
      'GET s3.org/a?X-Amz-Signature=***&v=1',
    ),
    ('token hf_abcdefghijklmnop is bad', 'token *** is bad'),
    ('sk-proj-abcdefghijklm', '***'),
    ('set config.data.path to a file', 'set config.data.path to a file'),
  ],
)
def test_keys_and_passwords_are_masked(text, shown):
  assert secrets.redact(text) == shown


def test_values_of_secret_variables_are_masked_in_every_error(
  monkeypatch, capsys
):
  monkeypatch.setenv('HF_TOKEN', 'moon-rain-leaf')
  monkeypatch.setenv('SOME_KEY', 'no')
  with pytest.raises(SystemExit):
    command_line._exit_with_error('no access with moon-rain-leaf')
  assert capsys.readouterr().err == 'error: no access with ***\n'
