# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and chat template that are read from a GGUF file."""

import json

import gguf
import pytest

from moepeft.checkpoints.gguf import tokenizer as gguf_tokenizer
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from moepeft.models.weight_mapping import CheckpointError

from ..gguf_files import CONFIGS, random_params

tokenizers = pytest.importorskip('tokenizers')

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
TEMPLATE = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
  '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
TEXT = (
  "It's 1984 and 12345678 words were said; they'LL say more. Once upon a time "
  'there was a house, and the house was old.\n\nÜber naïve café 数据 \t tabs '
)
TRICKY = (
  'the  house   1234 12a\n\n  indented\tcode(x) == 3.14',
  "I'm we'LL they've ünïcode 数据 e\u0301 !!!\r\n end ",
  '<|im_start|>user\nHi<|im_end|> <|im_end|>x',
)


def trained(split):
  """A tokenizer as its makers would build it, trained on a few words."""
  words = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}|"
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  pre = tokenizers.pre_tokenizers
  plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
  whole = pre.ByteLevel(add_prefix_space=False)

  def pattern(digits):
    return pre.Split(tokenizers.Regex(words % digits), 'isolated')

  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(ignore_merges=split == 'llama-bpe')
  )
  made.pre_tokenizer = {
    'gpt-2': lambda: whole,
    'smollm': lambda: pre.Sequence([pre.Digits(True), whole]),
    'llama-bpe': lambda: pre.Sequence([pattern(3), plain]),
    'qwen2': lambda: pre.Sequence([pattern(1), plain]),
  }[split]()
  if split == 'qwen2':
    made.normalizer = tokenizers.normalizers.NFC()
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=SPECIAL,
    initial_alphabet=pre.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator([TEXT] * 3, trainer)
  return made


def write(path, made, split, kind='gpt2'):
  """A GGUF file without tensors, with the tokenizer's pieces and merges."""
  model = json.loads(made.to_str())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_tokenizer_model(kind)
  writer.add_tokenizer_pre(split)
  writer.add_token_list(tokens)
  writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
  writer.add_token_merges([' '.join(pair) for pair in model['merges']])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_add_bos_token(False)
  writer.add_chat_template(TEMPLATE)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize('split', gguf_tokenizer.PRE_TOKENIZERS)
def test_texts_become_the_ids_that_they_were(split, tmp_path):
  made = trained(split)
  path = str(tmp_path / 'model.gguf')
  write(path, made, split)
  actual = HuggingFaceTokenizer(path)
  assert (actual.size, actual.eos) == (330, 2)
  for text in (TEXT, *TRICKY):
    assert actual.encode(text) == made.encode(text).ids
  plain = TRICKY[0]
  assert actual.decode(actual.encode(plain) + [2]) == plain
  # Digits one by one (qwen2, smollm) or in threes: 1234 is never one piece.
  assert len(actual.encode('1234')) > 1 or split == 'gpt-2'


def test_chat_templates_come_from_the_file(tmp_path):
  path = str(tmp_path / 'model.gguf')
  write(path, trained('smollm'), 'smollm')
  actual = gguf_tokenizer.read(path)
  turns = [{'role': 'user', 'content': 'Hi'}]
  text = actual.apply_chat_template(
    turns, tokenize=False, add_generation_prompt=True
  )
  assert text == '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
  # The marks are one token each and are left out of decoded text.
  ids = actual(text, add_special_tokens=False)['input_ids']
  assert ids[0] == 1 and ids.count(2) == 1
  assert actual.decode(ids, skip_special_tokens=True) == 'user\nHi\nassistant\n'


@pytest.mark.parametrize('kind, split', [('gpt2', 'tekken'), ('t5', 'default')])
def test_other_tokenizers_are_refused(kind, split, tmp_path):
  path = str(tmp_path / 'model.gguf')
  write(path, trained('gpt-2'), split, kind)
  with pytest.raises(CheckpointError, match='supported are') as error:
    gguf_tokenizer.read(path)
  assert '\n' not in str(error.value)


def test_a_directory_is_written_with_the_files_tokenizer(tmp_path):
  from transformers import AutoTokenizer

  from moepeft.checkpoints.hf import model as hf

  path = str(tmp_path / 'model.gguf')
  write(path, trained('llama-bpe'), 'llama-bpe')
  params = random_params(CONFIGS['llama'])
  hf.save(tmp_path / 'out', CONFIGS['llama'], params, tokenizer=path)
  again = AutoTokenizer.from_pretrained(tmp_path / 'out')
  actual = gguf_tokenizer.read(path)
  assert again.chat_template == TEMPLATE
  for text in (TEXT, *TRICKY):
    assert again(text)['input_ids'] == actual(text)['input_ids']
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert (fields['bos_token_id'], fields['eos_token_id']) == (1, 2)
