# SPDX-License-Identifier: Apache-2.0
"""The methods. A new one is one new file and one line in METHODS."""

from moepeft.peft.methods import (
  dora,
  full,
  ia3,
  lora,
  molora,
  mov,
  prompt_tuning,
  tokens,
)

METHODS = {
  'full': full.METHOD,
  'lora': lora.METHOD,
  'dora': dora.METHOD,
  'ia3': ia3.METHOD,
  'mov': mov.METHOD,
  'molora': molora.METHOD,
  'tokens': tokens.METHOD,
  'prompt': prompt_tuning.METHOD,
}
