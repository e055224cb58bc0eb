# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of bytes with special tokens, and templates of known kinds."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
