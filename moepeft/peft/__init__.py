# SPDX-License-Identifier: Apache-2.0
"""The methods. A new one is one new file and one line in METHODS."""

from moepeft.peft import dora, full, ia3, lora, molora, mov, prompt, tokens
from moepeft.peft.build import Built as Built
from moepeft.peft.build import build as build

METHODS = {
  'full': full.METHOD,
  'lora': lora.METHOD,
  'dora': dora.METHOD,
  'ia3': ia3.METHOD,
  'mov': mov.METHOD,
  'molora': molora.METHOD,
  'tokens': tokens.METHOD,
  'prompt': prompt.METHOD,
}
