# SPDX-License-Identifier: Apache-2.0
"""Converts base models and adapters between formats.

  python -m moepeft.convert --input=PATH --output=DIR --to=hf|t5x|peft|moepeft
  python -m moepeft.convert --workdir=RUN --output=DIR [--to=FORMAT]
  python -m moepeft.convert --method=MIXTURE --base=PATH --output=DIR
  python -m moepeft.convert --config=FILE:VALUES --output=DIR

The format of the input is detected: a Hugging Face model (a directory, or a
name on the hub), a GGUF file, a T5X checkpoint, or an adapter of peft or
moepeft.

  input           --to=hf          --to=t5x           --to=peft, moepeft
  hf, t5x         DIR              DIR/checkpoint_N   refused: no adapter
  gguf            DIR              refused            refused: no adapter
  t5x + adapter   base/, adapter/  both in one        base/, adapter/
  peft, moepeft   DIR, merged      both in one        DIR

N is the step of the input if that is a T5X checkpoint, else 1, as T5X ignores a
checkpoint of step 0.

"Merged" is a base model with the adapter merged into its weights, for methods
that do not depend on the token (LoRA, DoRA, (IA)^3). Its directory has the
run's or the base's tokenizer and chat template, so that transformers and
llama.cpp's convert_hf_to_gguf (and Ollama with it) read it. It has the base's
dtype; use --dtype=float32 to avoid rounding.

base/ is the model in the hf format; adapter/ has the format of --to, or with
--to=hf that of moepeft. "Both in one" is a T5X checkpoint of the base and the
adapter with the released code's names.

--workdir exports a training run: an adapter as moepeft (the default), peft, hf
(merged) or t5x (both in one), or a fully trained model as hf (the default) or
t5x. The step of its T5X checkpoint is config.optimizer.decay_initial_step plus
the run's steps, as in T5X. A chat template or system prompt of the run's config
is written as chat_template.jinja.

--method combines trained adapters in a mixture without trained parameters, such
as "arrow(from_adapters=['adapters/a', 'adapters/b'])". --config names such a
mixture and its base by a config, such as
configs/methods/arrow.py:model=PATH,adapters=A|B.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from moepeft.checkpoints import adapter as adapter_file
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import conversion, directory
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.base import resolve
from moepeft.checkpoints.directory import LoadedCheckpoint
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft, peft_config
from moepeft.checkpoints.run_metadata import describe_run
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.checkpoints.t5x import model as t5x
from moepeft.config import command_line, default, imports
from moepeft.core import terminal, untrusted
from moepeft.data.chat import template as chat_template
from moepeft.data.tokenizers.tokenizer import (
  HuggingFaceTokenizer,
  load_tokenizer,
)
from moepeft.models.weight_mapping import CheckpointError
from moepeft.moe import router_state
from moepeft.runs.run import Run

# The formats of --to; GGUF files are only read.
_OUTPUT_FORMATS = tuple(
  name for name in checkpoint_formats.FORMATS if name != 'gguf'
)


def define_flags(argv: Sequence[str] = ('',)) -> flags.FlagValues:
  """The command's flags, without the global flags of absl.

  Args:
    argv: the command line, whose --config.key=value change a config.
  """
  values = flags.FlagValues()
  options = {'flag_values': values}
  text, switch = flags.DEFINE_string, flags.DEFINE_boolean
  text('input', None, 'Model or adapter to convert.', **options)
  text('output', None, 'Directory to write.', **options)
  flags.DEFINE_enum('to', None, _OUTPUT_FORMATS, 'Format to write.', **options)
  text('workdir', None, 'Training run to export.', **options)
  text('method', None, 'Mixture of trained adapters to write.', **options)
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Config of such a mixture and its base.',
    sys_argv=[*argv],
    **options,
  )
  text(
    'base',
    None,
    'Base model (hf or t5x) of an adapter; default: the one that the adapter '
    'names.',
    **options,
  )
  flags.DEFINE_enum(
    'dtype',
    None,
    ['float32', 'bfloat16', 'float16'],
    "The dtype of base models; default: the input's.",
    **options,
  )
  flags.DEFINE_integer(
    'top_k',
    None,
    'Experts per token of adapters in T5X checkpoints, which do not store it; '
    'default: all.',
    lower_bound=1,
    upper_bound=65_536,
    **options,
  )
  text(
    'imports',
    '',
    'Modules to import first, my_module,other, with methods of an adapter.',
    **options,
  )
  switch('overwrite', False, 'Replace an earlier output.', **options)
  switch('help', False, 'Show this help.', short_name='h', **options)
  return values


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns 0, or 2 after an error message."""
  try:
    argv = [command_line.find_config_arg(arg) for arg in argv]
    values = define_flags(argv)
    unexpected = values(argv)[1:]
    if values.help:
      print(__doc__)
      print(values.get_help())
      return 0
    if unexpected:
      raise CheckpointError(
        f'unexpected argument {unexpected[0]!r}: use --input='
      )
    convert(values)
  except (ValueError, flags.Error, OSError) as error:
    terminal.show(f'error: {error}', file=sys.stderr)
    return 2
  except Exception as error:
    message = command_line.error_message(error)
    if message is None:
      raise
    terminal.show(f'error: {message}', file=sys.stderr)
    return 2
  return 0


def convert(values: flags.FlagValues) -> None:
  """Converts as the flags say.

  Raises:
    CheckpointError: a flag is missing, the input is damaged or unsupported, or
      the output format cannot represent it.
  """
  for name in ('input', 'output', 'workdir', 'base'):
    if values[name].value is not None:
      values[name].value = os.path.expanduser(values[name].value)
  sources = ('workdir', 'input', 'method', 'config')
  source_flags = [n for n in sources if values[n].value is not None]
  if len(source_flags) > 1:
    names = ' and '.join(f'--{name}' for name in source_flags)
    raise CheckpointError(f'{names} are given; keep one')
  _require(values, 'output')
  directory.check_output(Path(values.output), values.overwrite)
  imports.import_modules(values.imports, search_current=True)
  if values.workdir is not None:
    config = Run(values.workdir).read_config()
    imports.import_modules(config.get('imports', ''))
    _convert_run(values)
  elif values.method is not None or values.config is not None:
    _mix_adapters(values)
  else:
    _require(values, 'input')
    _require(values, 'to')
    input_format = checkpoint_formats.detect(resolve(values.input))
    print(f'reading {values.input} as {input_format}')
    if input_format in ('hf', 'gguf', 't5x'):
      _convert_base(values)
    elif input_format == 'peft':
      _convert_peft(values)
    else:
      _convert_moepeft(values)
  print(f'wrote {values.output}')


def _convert_run(values: flags.FlagValues) -> None:
  """Exports a run's adapter, or its base after full fine-tuning."""
  # Imported here, as it imports Orbax, which the other branches do not need.
  from moepeft.checkpoints.restore import restore_trained

  tree, metadata = restore_trained(values.workdir)
  is_full = metadata['trainable'] == 'params'
  values.to = values.to or ('hf' if is_full else 'moepeft')
  template = '' if values.to == 't5x' else _template(values, metadata)
  if is_full:
    _write_trained_base(values, tree, metadata)
  else:
    step = _t5x_step(values, metadata) if values.to == 't5x' else 1
    trained = AdapterWeights(metadata['method'], tree)
    method, tree = adapter_file.folded(trained)
    _write_adapter(values, tree, {**metadata, 'method': method}, step)
  if template:
    file = Path(values.output) / 'chat_template.jinja'
    file.write_text(template, encoding='utf-8')


def _mix_adapters(values: flags.FlagValues) -> None:
  """Writes the mixture of adapters that --method or --config names."""
  values.to = values.to or 'moepeft'
  config = values.config
  if config is None:
    _require(values, 'base')
    config = default()
    config.method = values.method
  config.model.path = values.base or config.model.path
  config = with_explicit_method(config)
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  fresh = base_lib.initialise(base, model, config.seed)
  variables, experts = base_lib.with_experts(fresh, model, built, base)
  trained, _ = router_state.split(variables['peft'], built.frozen_arrays)
  if not experts or jax.tree.leaves(trained):
    raise CheckpointError(
      f'{built.method} has parameters that are trained; train it with python '
      '-m moepeft.train, or name a mixture like '
      "arrow(from_adapters=['a', 'b'])"
    )
  metadata = describe_run(base, built, config.seed, experts)
  _write_adapter(values, variables['peft'], metadata)


def _template(values: flags.FlagValues, metadata) -> str:
  """The chat template of a run's config; '' for that of the tokenizer.

  Raises:
    ValueError: the file in the config does not exist.
  """
  data = Run(values.workdir).read_config().get('data', {})
  path, system = data.get('chat_template', ''), data.get('system_prompt', '')
  if not path and not system:
    return ''
  base = values.base or metadata['base']['path']
  tokenizer = load_tokenizer(untrusted.field(data, 'tokenizer', str, ''), base)
  chat_template.set_chat_template(tokenizer, path, system)
  template = (
    tokenizer.tokenizer.chat_template
    if isinstance(tokenizer, HuggingFaceTokenizer)
    else ''
  )
  return template if isinstance(template, str) else ''


def _write_trained_base(values: flags.FlagValues, tree, metadata) -> None:
  config, overwrite = adapter_file.config_of(metadata), values.overwrite
  if values.to == 'hf':
    tokenizer = _tokenizer(values, metadata['base']['path'])
    hf.save(
      values.output, config, tree, values.dtype, tokenizer, overwrite=overwrite
    )
  elif values.to == 't5x':
    if values.dtype is not None:
      raise CheckpointError(
        '--dtype is for --to=hf: leave it out with --to=t5x'
      )
    step = _t5x_step(values, metadata)
    t5x.save(values.output, config, tree, step=step, overwrite=overwrite)
  else:
    raise CheckpointError(
      f'{values.workdir} trained a whole model and --to={values.to} writes '
      'adapters: use --to=hf or --to=t5x'
    )


def _t5x_step(values: flags.FlagValues, metadata) -> int:
  """The run's step in T5X, which counts from the start of pretraining.

  Adafactor's decay depends on it; config.optimizer.decay_initial_step has it.
  """
  config = Run(values.workdir).read_config()
  initial_step = int(config.get('optimizer', {}).get('decay_initial_step', 0))
  step = initial_step + metadata['step']
  print(
    f'checkpoint_{step}: {initial_step} steps before the run, '
    f'{metadata["step"]} of it'
  )
  return step


def _require(values: flags.FlagValues, name: str) -> None:
  if values[name].value is None:
    raise CheckpointError(f'--{name} is missing; see --help')


def _load_base(
  values: flags.FlagValues, path: str, dtype: str | None = None
) -> LoadedCheckpoint:
  """Loads a base; `dtype` overrides --dtype."""
  dtype = dtype or values.dtype
  if not path:
    raise CheckpointError(
      f'{values.input or values.workdir} names no base model: set --base'
    )
  return conversion.load_base(resolve(path), dtype, values.top_k)


def _convert_base(values: flags.FlagValues) -> None:
  loaded = _load_base(values, values.input)
  if loaded.path != values.input:
    print(f'reading {loaded.path}')
  adapter = getattr(loaded, 'adapter', None)
  if values.to == 't5x':
    _write_t5x(values, loaded, adapter, max(getattr(loaded, 'step', 0), 1))
  elif adapter is not None:
    is_cast = values.dtype is not None
    conversion.write_base_and_adapter(
      values.output, values.to, loaded, adapter, is_cast, values.overwrite
    )
  elif values.to == 'hf':
    conversion.write_hf(values.output, loaded, values.overwrite)
  else:
    raise CheckpointError(
      f'{values.input} holds no adapter: --to={values.to} writes adapters, '
      '--to=hf and --to=t5x write base models'
    )


def _convert_peft(values: flags.FlagValues) -> None:
  fields = peft_config.read(values.input)
  path = values.base or fields.get('base_model_name_or_path') or ''
  base = _load_base(values, path, _merge_dtype(values))
  adapter = peft.load(values.input, base.config)
  if values.to == 'hf':
    _write_merged(values, base, adapter, conversion.SEMANTICS)
  elif values.to == 't5x':
    _write_t5x(values, base, adapter)
  elif values.to == 'peft':
    overwrite = values.overwrite
    peft.save(values.output, base.config, adapter, path, fields, overwrite)
  elif values.to == 'moepeft':
    metadata = conversion.describe(adapter, path, base.sha256, base.config)
    adapter_file.save(values.output, adapter.tree, metadata, values.overwrite)
  else:
    raise _unknown_format(values)


def _merge_dtype(values: flags.FlagValues) -> str | None:
  """The dtype of a base before merging; --dtype casts the result.

  An earlier cast would quantize other weights than in training, and round the
  base twice.
  """
  return 'float32' if values.dtype and values.to == 'hf' else None


def _unknown_format(values: flags.FlagValues) -> CheckpointError:
  return CheckpointError(
    f'--to={values.to} is not a format of adapters: expected one of '
    f'{", ".join(_OUTPUT_FORMATS)}'
  )


def _convert_moepeft(values: flags.FlagValues) -> None:
  _write_adapter(values, *adapter_file.load(values.input))


def _write_adapter(
  values: flags.FlagValues, tree, metadata, step: int = 1
) -> None:
  """Writes an adapter in the format of --to."""
  adapter = AdapterWeights(metadata['method'], tree)
  path = values.base or metadata['base']['path']
  if values.to == 'moepeft':
    adapter_file.save(values.output, tree, metadata, values.overwrite)
  elif values.to == 'peft':
    config, overwrite = adapter_file.config_of(metadata), values.overwrite
    peft.save(values.output, config, adapter, path, overwrite=overwrite)
  elif values.to not in _OUTPUT_FORMATS:
    raise _unknown_format(values)
  else:
    base = _load_base(values, path, _merge_dtype(values))
    if base.sha256 != metadata['base']['sha256']:
      raise CheckpointError(
        f'{path} is not the base that the adapter was trained on (content '
        f'hash {base.sha256[:12]}, expected '
        f'{metadata["base"]["sha256"][:12]}): give the right one with --base'
      )
    if values.to == 't5x':
      _write_t5x(values, base, adapter, step)
    else:
      kind = metadata['base'].get('quantise', '')
      _write_merged(values, base, adapter, metadata['semantics'], kind)


def _tokenizer(values: flags.FlagValues, base: str) -> str | None:
  """The path of the tokenizer of a run, or else of its base.

  Args:
    base: the path of the base, or ''.
  """
  path = base
  if values.workdir is not None:
    config = Run(values.workdir).read_config()
    path = config.get('data', {}).get('tokenizer') or base
  if path in ('', 'bytes') or path.startswith('package:'):
    return None
  try:
    path = resolve(os.path.expanduser(path))
    return path if Path(path).is_file() else str(hf.find(path))
  except CheckpointError as error:
    print(f'without a tokenizer: {error}')
    return None


def _write_merged(
  values: flags.FlagValues,
  base: LoadedCheckpoint,
  adapter: AdapterWeights,
  semantics: str,
  kind: str = '',
) -> None:
  """Writes a base with a merged adapter as hf.

  Args:
    kind: the quantization of the base in training.
  """
  if kind:
    print(f'merging into the base dequantized from {kind}')
  params = conversion.merged(base, adapter, semantics, kind)
  if values.dtype is None:
    params = jax.tree.map(lambda a, b: a.astype(b.dtype), params, base.params)
  tokenizer, overwrite = _tokenizer(values, base.path), values.overwrite
  hf.save(
    values.output,
    base.config,
    params,
    values.dtype,
    tokenizer,
    overwrite=overwrite,
  )


def _write_t5x(
  values: flags.FlagValues,
  base: LoadedCheckpoint,
  adapter: AdapterWeights | None,
  step: int = 1,
) -> None:
  overwrite = values.overwrite
  t5x.save(values.output, base.config, base.params, adapter, step, overwrite)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
