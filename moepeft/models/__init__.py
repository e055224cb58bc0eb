# SPDX-License-Identifier: Apache-2.0
"""The families of base models. A new one is one new file and one line; a
decoder's also one in `decoder_names`."""

from moepeft.models import gemma, gpt2, llama, mistral, qwen2, qwen3, t5

FAMILIES = {
  't5': t5,
  'llama': llama,
  'mistral': mistral,
  'qwen2': qwen2,
  'qwen3': qwen3,
  'gemma': gemma,
  'gpt2': gpt2,
}
