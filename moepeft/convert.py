# SPDX-License-Identifier: Apache-2.0
"""Converts base models and adapters between forms.

  python -m moepeft.convert --input=PATH --output=DIR --to=hf|t5x|peft|moepeft
  python -m moepeft.convert --workdir=DIR --output=DIR

The form of the input is found out: a Hugging Face model (a directory, or a
name on the hub), a T5X checkpoint, an adapter of Hugging Face's peft, or one
of moepeft's own.

  input          --to=hf          --to=t5x             --to=peft, moepeft
  hf             rewritten        checkpoint_0         no adapter: refused
  t5x            the base         checkpoint_0         the adapter
  t5x + adapter  base/, adapter/  both, released names base/, adapter/
  peft, moepeft  refused          with --base: both    the adapter

base/ is the model in the hf form; adapter/ is in the form that --to names, or
moepeft's own with --to=hf. --workdir exports the adapter of a training run in
moepeft's form.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from moepeft import interop
from moepeft.interop import adapter as own
from moepeft.interop import files, hf, peft, t5x
from moepeft.interop.adapter import Adapter
from moepeft.models import t5_names
from moepeft.models.names import CheckpointError

_SEMANTICS = 'official'  # what T5X's names and peft's methods mean here


def define_flags() -> flags.FlagValues:
  """The command's flags, apart from those of other commands."""
  values = flags.FlagValues()
  options = {'flag_values': values}
  text, switch = flags.DEFINE_string, flags.DEFINE_boolean
  text('input', None, 'Model or adapter to convert.', **options)
  text('output', None, 'Directory to write.', **options)
  forms = list(interop.FORMS)
  flags.DEFINE_enum('to', None, forms, 'Form to write.', **options)
  text('workdir', None, 'Training run to export the adapter of.', **options)
  text(
    'base',
    None,
    'Base model (hf or t5x) of an adapter; by default the one that the '
    'adapter names.',
    **options,
  )
  text(
    'dtype',
    None,
    "Cast base models to it, e.g. float32, bfloat16; by default the input's.",
    **options,
  )
  flags.DEFINE_integer(
    'top_k',
    None,
    'Experts a token uses, for adapters in T5X checkpoints, which do not say; '
    'by default all.',
    lower_bound=1,
    **options,
  )
  switch('overwrite', False, 'Replace an earlier output.', **options)
  switch('help', False, 'Show this help.', short_name='h', **options)
  return values


def main(argv: Sequence[str]) -> int:
  """Runs the command; 0, or 2 with one sentence where the input is bad."""
  values = define_flags()
  try:
    extra = values(argv)[1:]
    if values.help:
      print(__doc__)
      print(values.get_help())
      return 0
    if extra:
      raise CheckpointError(f'unexpected argument {extra[0]!r}: use --input=')
    convert(values)
  except (CheckpointError, flags.Error, OSError) as error:
    print(f'moepeft.convert: {error}', file=sys.stderr)
    return 2
  return 0
