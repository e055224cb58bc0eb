# SPDX-License-Identifier: Apache-2.0
"""Redaction of keys, tokens and passwords in messages."""

import os
import re

_MASK = '***'
# Names of variables whose values are secret.
_SECRET_NAMES = re.compile('KEY|TOKEN|SECRET|PASSW|CREDENTIAL', re.IGNORECASE)
# A shorter value may be a word in the message.
_MIN_LENGTH = 8
# user:password@ in a URL; its signatures; keys of Hugging Face, OpenAI, GitHub
# and Amazon.
_PATTERNS = (
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
    if len(value) >= _MIN_LENGTH and _SECRET_NAMES.search(name):
      text = text.replace(value, _MASK)
  for pattern, mask in _PATTERNS:
    text = pattern.sub(mask, text)
  return text
