# SPDX-License-Identifier: Apache-2.0
"""Measures drafts and improved translations by BLEU on parallel rows.

  python -m examples.translation.evaluate ROWS.jsonl --source=English \
    --target=Chinese --base_url=http://127.0.0.1:8000/v1 --model=smollm2

A row is {"source": ..., "target": ...}.
"""

import argparse
import dataclasses
import json

from examples.translation import chunks as text_chunks
from examples.translation import translate
from moepeft.agent.flags import read_input, run_command
from moepeft.core import terminal
from moepeft.metrics import bleu

# sacrebleu's tokenizers of languages without spaces between words.
_TOKENIZERS = {
  'zh': ('chinese', '中文', '汉语', '简体中文'),
  'char': ('japanese', 'korean', 'thai', '日语', '韩语', '泰语'),
}


def tokenizer_of(language: str) -> str:
  """The name of sacrebleu's tokenizer for a language."""
  for tokenizer, names in _TOKENIZERS.items():
    if language.lower() in names:
      return tokenizer
  return bleu.TOKENIZE


def read_rows(path: str) -> list[dict[str, str]]:
  """Reads parallel rows.

  Raises:
    ValueError: the file cannot be read or is empty, or a line is no row.
  """
  rows, text = [], read_input(path, 'rows of source and target')
  for i, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      row = None
    texts = row if isinstance(row, dict) else {}
    pair = [texts.get(name) for name in ('source', 'target')]
    if not all(isinstance(text, str) and text.strip() for text in pair):
      raise ValueError(
        f'{path}, line {i}: expected {{"source": TEXT, "target": TEXT}}'
      )
    rows.append({'source': pair[0], 'target': pair[1]})
  return rows


def significance(
  drafts: list[str], improved: list[str], targets: list[str], tokenize: str
) -> float:
  """The p-value of the difference in BLEU, by the paired bootstrap test."""
  from sacrebleu.metrics import BLEU
  from sacrebleu.significance import PairedTest

  systems = [('draft', drafts), ('improved', improved)]
  metric = {'BLEU': BLEU(tokenize=tokenize, references=[targets])}
  _, scores = PairedTest(systems, metric, references=None, test_type='bs')()
  return scores['BLEU'][1].p_value


def main(flags: argparse.Namespace) -> None:
  """Translates the rows and prints the scores.

  Raises:
    ValueError, OSError: an error with a message for the user.
  """
  rows = read_rows(flags.rows)
  translate.check_new('output', flags.output)
  tokenize = flags.bleu_tokenize or tokenizer_of(flags.target)
  try:
    signature = bleu.signature(tokenize)
  except ImportError as e:
    raise ValueError(f"BLEU needs pip install 'moepeft[eval]' ({e})") from None
  translator = translate.make_translator(flags)
  drafts, improved, cut = [], [], 0
  for i, row in enumerate(rows, 1):
    chunks = text_chunks.split(row['source'], flags.chunk_chars)
    try:
      steps = list(translator.translate_chunks(chunks, flags.context_chars))
    except ValueError as e:
      raise ValueError(f'row {i} of {len(rows)}: {e}') from None
    drafts.append(text_chunks.join(chunks, [step.draft for step in steps]))
    improved.append(text_chunks.join(chunks, [step.text for step in steps]))
    cut += any(step.cut for step in steps)
    translate.append_row(
      flags.output,
      row
      | {'draft': drafts[-1], 'improved': improved[-1]}
      | {'steps': [dataclasses.asdict(step) for step in steps]},
    )
  targets = [row['target'] for row in rows]
  scores = [bleu.bleu(texts, targets, tokenize) for texts in (drafts, improved)]
  p_value = 'none, as there is none'
  # sacrebleu's p of two equal scores is its smallest one.
  if scores[0] != scores[1]:
    p_value = f'{significance(drafts, improved, targets, tokenize):.3f}'
  changed = sum(a != b for a, b in zip(drafts, improved, strict=True))
  terminal.show(
    f'{flags.source} to {flags.target}, {translator.model.name}, '
    f'{len(rows)} rows, --rounds={flags.rounds}\n'
    f'BLEU of the drafts:   {scores[0]:.2f}\n'
    f'BLEU of the improved: {scores[1]:.2f}\n'
    f'p of the difference:  {p_value}\n'
    f'changed by the improvement: {changed} of {len(rows)} rows\n'
    f'with an answer that was cut: {cut} of {len(rows)} rows\n{signature}'
  )


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m examples.translation.evaluate',
    description='Measures translations by BLEU, drafts beside improved ones.',
  )
  parser.add_argument('rows', help='JSONL rows with source and target.')
  translate.add_flags(parser)
  parser.add_argument('--output', help='A new JSONL file with all steps.')
  parser.add_argument('--bleu_tokenize', help="One of sacrebleu's, such as zh.")
  return parser


if __name__ == '__main__':
  run_command(make_parser(), main)
