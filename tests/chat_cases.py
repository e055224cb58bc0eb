# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of bytes with special tokens, and templates of known kinds."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moepeft.data.chat import formats as chat_formats
from moepeft.data.example import BadRow, BadRows

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
# A last answer is rendered with something that later ones lose, as Qwen3 does.
REWRITING = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
  "{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
MARKED = (
  '{% for m in messages %}<|im_start|>'
  "{% if m['role'] == 'assistant' %}assistant\n{% generation %}"
  "{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
  "{% else %}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
  '{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def tokenizer(template=CHATML):
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  special = ['<pad>', '<|im_start|>', '<|im_end|>']
  ids = {piece: i for i, piece in enumerate([*special, *letters])}
  made = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  found = PreTrainedTokenizerFast(
    tokenizer_object=made,
    eos_token='<|im_end|>',
    pad_token='<pad>',
    additional_special_tokens=['<|im_start|>'],
  )
  found.chat_template = template
  return found


# As Qwen3's: answers before the last lose their thoughts.
FORGETTING = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{% set thought = m['reasoning_content'] %}"
  "{% if m['role'] == 'assistant' and not loop.last %}"
  "{{ m['content'].split('</think>')[-1].lstrip('\\n') }}"
  '{% else %}{% if thought %}<think>\n{{ thought }}\n</think>\n\n{% endif %}'
  "{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
# What comes before an answer ends with what a token may hold together with it.
PLAIN = (
  "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
  '{% if add_generation_prompt %}assistant:{% endif %}'
)

TEXTS = [
  'the cat sat on the mat\n\nand  x = 1 was :) it said\n\n',
  'a dog: ate the bone\n\n  again\n  and again ::) \n\n',
  'user:the cat</s>assistant:on the mat\n\n\n',
] * 11


def learnt(kind, bos=False, template=CHATML, size=400, texts=TEXTS):
  """A tokenizer trained here: 'bytes' with merges, as GPT-2's, 'lines', whose
  words may be blank lines and colons, or 'spaces', as SentencePiece's."""
  special = ['<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', '<unk>']
  made = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
  alphabet = []
  if kind == 'spaces':
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
    made.decoder = decoders.Metaspace(prepend_scheme='always')
    alphabet = sorted({letter for text in texts for letter in text})
  else:
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=kind == 'bytes'
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Offsets without blanks, as many models have them.
    made.post_processor = processors.ByteLevel(trim_offsets=True)
  made.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=size,
      special_tokens=special,
      initial_alphabet=alphabet,
      show_progress=False,
    ),
  )
  if bos:
    made.post_processor = processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', made.token_to_id('<s>'))]
    )
  found = PreTrainedTokenizerFast(
    tokenizer_object=made,
    bos_token='<s>',
    eos_token='</s>',
    pad_token='<pad>',
    unk_token='<unk>',
    additional_special_tokens=['<|im_start|>', '<|im_end|>'],
  )
  found.chat_template = template
  return found


def read_conversations(path, form=''):
  """All conversations under a path, each ending with an answer."""
  bad, parsed = BadRows('error'), []
  for _, where, row in chat_formats.read_rows(path, bad):
    try:
      conversation = chat_formats.parse_conversation(row, form, bad.unused)
      parsed.append(chat_formats.check_answered(conversation))
    except BadRow as e:
      bad(where, e)
  return parsed
