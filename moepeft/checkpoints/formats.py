# SPDX-License-Identifier: Apache-2.0
"""The forms in which models and adapters are kept. A new one is one new file
and one line in FORMS.

- hf: base models in Hugging Face directories (config.json, safetensors).
- gguf: base models in GGUF files (read only).
- t5x: T5X checkpoints (its own, Orbax's, single files), base and the released
  code's adapters together.
- peft: adapters of Hugging Face's `peft` (LoRA, DoRA, (IA)^3, prompts).
- moepeft: our own adapters (adapter.safetensors, adapter.json).
"""

from pathlib import Path

from moepeft.checkpoints import adapter
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.t5x import model as t5x
from moepeft.config.gin import checkpoint_path
from moepeft.models.weight_mapping import CheckpointError as CheckpointError

FORMS = {'hf': hf, 'gguf': gguf, 't5x': t5x, 'peft': peft, 'moepeft': adapter}

# The file that gives each form away, beside which the others may lie.
_MARKS = {
  'moepeft': adapter.METADATA_FILE,
  'peft': peft.CONFIG,
  'hf': 'config.json',
}


def detect(path: str) -> str:
  """The form of what lies at a path: a key of FORMS.

  A path that does not exist is 'hf' if it can be a name on the hub.

  Raises:
    CheckpointError: it is none of them.
  """
  folder = Path(path)
  if folder.suffix == gguf.SUFFIX:
    return 'gguf'
  for form, mark in _MARKS.items():
    if (folder / mark).is_file():
      return form
  if checkpoint_path.holds(path):
    return 't5x'
  if not folder.exists():
    hf.check_name(path)
    return 'hf'
  hf.check_foreign(folder)
  raise CheckpointError(
    f'{path} is none of the known forms: expected one of '
    f'{", ".join(_MARKS.values())} in it, or checkpoint_<step> of T5X'
  )
