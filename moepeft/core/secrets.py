# SPDX-License-Identifier: Apache-2.0
"""Redaction of keys, tokens and passwords in messages."""

import os
import re

_MASK = '***'
# Names of variables whose values are secret.
_NAMES = re.compile('KEY|TOKEN|SECRET|PASSW|CREDENTIAL', re.IGNORECASE)
# A shorter value may be a word of the message.
_LEAST = 8
# user:password@ of a URL; what signs one; keys of Hugging Face, OpenAI, GitHub
# and Amazon.
_FORMS = (
  (re.compile(r'(?<=://)[^/\s@]+@'), f'{_MASK}@'),
  (
    re.compile(
      r'(?<=[?&])([\w-]*(?:key|token|signature|secret|password)[\w-]*)='
      r'[^&\s\'"]+',
      re.IGNORECASE,
    ),
    rf'\1={_MASK}',
  ),
  (re.compile(r'\b(?:hf_|sk-|gh[po]_|AKIA)[\w-]{12,}'), _MASK),
)


def redact(text: str) -> str:
  """Replaces the secrets in a text by '***'."""
  for name, value in os.environ.items():
    if len(value) >= _LEAST and _NAMES.search(name):
      text = text.replace(value, _MASK)
  for form, mask in _FORMS:
    text = form.sub(mask, text)
  return text
