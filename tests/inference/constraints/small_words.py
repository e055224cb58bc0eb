# SPDX-License-Identifier: Apache-2.0
"""Small vocabularies that are learnt here from texts with JSON in them."""

from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from tests import chat_cases

TEXTS = [
  '{"name": "x y", "tags": ["a", "b"], "n": [1, 2, 30], "ok": true}\n',
  '{\n    "name": "f",\n    "arguments": {"city": "New York", "z": null}\n}',
  '<tool_call>{"name": "f", "arguments": {"a": {}}}</tool_call>\n\n',
  'hello world, yes or no: maybe the größe is 0.5 or 1e-5?  \\n \\" 2024-02-29',
] * 7


def saved(folder, kind, size=600):
  """A tokenizer of `chat_cases.learnt`, by way of its files."""
  made = chat_cases.learnt(kind, texts=TEXTS, size=size)
  made.save_pretrained(folder)
  return HuggingFaceTokenizer(str(folder))


def texts(words, size):
  """Bytes of each token, as the decoder says them after a letter."""
  special = set(words.tokenizer.all_special_ids)
  actual = []
  for i in range(size):
    known = i < len(words.tokenizer) and i not in special
    said = words.decode([i]) if known else ''
    actual.append(said.encode())
  return actual
