# SPDX-License-Identifier: Apache-2.0
"""File formats of models and adapters.

A new format is a file and a line in FORMATS:

- hf: base models in Hugging Face directories (config.json, safetensors).
- gguf: base models in GGUF files (read only).
- t5x: T5X checkpoints (T5X, Orbax or single files) of a base, with or without
  the released code's adapters.
- peft: adapters of Hugging Face's `peft` (LoRA, DoRA, (IA)^3, prompts).
- moepeft: moepeft's adapters (adapter.safetensors, adapter.json).
"""

from pathlib import Path

from moepeft.checkpoints import adapter
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.t5x import model as t5x
from moepeft.config.gin import checkpoint_path
from moepeft.models.weight_mapping import CheckpointError as CheckpointError

FORMATS = {'hf': hf, 'gguf': gguf, 't5x': t5x, 'peft': peft, 'moepeft': adapter}

# A file that identifies the format of a directory.
_MARKER_FILES = {
  'moepeft': adapter.METADATA_FILE,
  'peft': peft.CONFIG_FILE,
  'hf': 'config.json',
}


def detect(path: str) -> str:
  """Detects the format of a path: a key of FORMATS.

  A path that does not exist is 'hf' if it can be a name on the hub.

  Raises:
    CheckpointError: the format is unknown.
  """
  folder = Path(path)
  if folder.suffix == gguf.SUFFIX:
    return 'gguf'
  for name, marker in _MARKER_FILES.items():
    if (folder / marker).is_file():
      return name
  if checkpoint_path.holds(path):
    return 't5x'
  if not folder.exists():
    hf.check_name(path)
    return 'hf'
  hf.check_unsupported(folder)
  raise CheckpointError(
    f'{path} has none of the known formats: expected one of '
    f'{", ".join(_MARKER_FILES.values())} in it, or checkpoint_<step> of T5X'
  )
