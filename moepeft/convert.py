# SPDX-License-Identifier: Apache-2.0
"""Converts base models and adapters between forms.

  python -m moepeft.convert --input=PATH --output=DIR --to=hf|t5x|peft|moepeft
  python -m moepeft.convert --workdir=RUN --output=DIR [--to=FORM]
  python -m moepeft.convert --method=MIXTURE --base=PATH --output=DIR

The N of checkpoint_N is the input's where that is a T5X checkpoint, else 1: T5X
takes 0 for none.

The form of the input is found out: a Hugging Face model (a directory, or a
name on the hub), a GGUF file, a T5X checkpoint, an adapter of Hugging Face's
peft, or one of moepeft's own.

  input           --to=hf          --to=t5x           --to=peft, moepeft
  hf, t5x         DIR              DIR/checkpoint_N   refused: no adapter
  gguf            DIR              refused            refused: no adapter
  t5x + adapter   base/, adapter/  both in one        base/, adapter/
  peft, moepeft   DIR, merged      both in one        DIR

"Merged" is a model that computes alone what base and adapter do together, for
methods whose change does not depend on the token (LoRA, DoRA, (IA)^3). Its
directory has the run's or the base's tokenizer and chat template, so that
transformers and llama.cpp's convert_hf_to_gguf (and Ollama with it) read it.
It has the base's dtype; --dtype=float32 keeps every digit.

base/ is the model in the hf form; adapter/ is in the form that --to names, or
moepeft's own with --to=hf. "Both in one" is a T5X checkpoint of the base and
the adapter under the released code's names.

--workdir takes what a training run trained: an adapter as moepeft (the
default), peft, hf (merged) or t5x, which is "both in one", or a whole model
as hf (the default) or t5x. There, the checkpoint's step is
config.optimizer.decay_initial_step plus the run's own steps, as T5X counts. A
chat template or system turn of the run's config is written as
chat_template.jinja.

--method makes a mixture of trained adapters that needs no training of its own,
like "arrow(from_adapters=['adapters/a', 'adapters/b'])".
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from moepeft.checkpoints import adapter as adapter_file
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import directory, quantize
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.base import resolve
from moepeft.checkpoints.directory import LoadedCheckpoint
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft, peft_config
from moepeft.checkpoints.run_metadata import describe_run
from moepeft.checkpoints.t5x import model as t5x
from moepeft.config import command_line, default, imports
from moepeft.core import terminal, untrusted
from moepeft.data.chat import template as chat_template
from moepeft.data.tokenizers.tokenizer import (
  HuggingFaceTokenizer,
  load_tokenizer,
)
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.weight_mapping import CheckpointError
from moepeft.moe import ROUTERS
from moepeft.peft import build
from moepeft.peft.merge import merge
from moepeft.runs.run import Run

# What --to names: GGUF files are read alone.
_WRITTEN = tuple(form for form in checkpoint_formats.FORMS if form != 'gguf')
_SEMANTICS = 'official'  # what T5X's names and peft's methods mean here


def define_flags() -> flags.FlagValues:
  """The command's flags, apart from those of other commands."""
  values = flags.FlagValues()
  options = {'flag_values': values}
  text, switch = flags.DEFINE_string, flags.DEFINE_boolean
  text('input', None, 'Model or adapter to convert.', **options)
  text('output', None, 'Directory to write.', **options)
  flags.DEFINE_enum('to', None, _WRITTEN, 'Form to write.', **options)
  text('workdir', None, 'Training run to export the adapter of.', **options)
  text('method', None, 'Mixture of trained adapters to make.', **options)
  text(
    'base',
    None,
    'Base model (hf or t5x) of an adapter; by default the one that the '
    'adapter names.',
    **options,
  )
  flags.DEFINE_enum(
    'dtype',
    None,
    ['float32', 'bfloat16', 'float16'],
    "Cast base models to it; by default the input's.",
    **options,
  )
  flags.DEFINE_integer(
    'top_k',
    None,
    'Experts a token uses, for adapters in T5X checkpoints, which do not say; '
    'by default all.',
    lower_bound=1,
    upper_bound=65_536,
    **options,
  )
  text(
    'imports',
    '',
    'Modules to import first, my_module,other, whose methods an adapter has.',
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
  """Does what the flags say.

  Raises:
    CheckpointError: a flag is missing, the input is not what it should be,
      or the form asked for cannot hold it.
  """
  for name in ('input', 'output', 'workdir', 'base'):
    if values[name].value is not None:
      values[name].value = os.path.expanduser(values[name].value)
  sources = ('workdir', 'input', 'method')
  given = [name for name in sources if values[name].value is not None]
  if len(given) > 1:
    raise CheckpointError(
      f'{" and ".join(f"--{name}" for name in given)} are given; keep one'
    )
  _require(values, 'output')
  directory.check_output(Path(values.output), values.overwrite)
  imports.import_modules(values.imports, search_current=True)
  if values.workdir is not None:
    config = Run(values.workdir).read_config()
    imports.import_modules(config.get('imports', ''))
    _convert_run(values)
  elif values.method is not None:
    _mix_adapters(values)
  else:
    _require(values, 'input')
    _require(values, 'to')
    form = checkpoint_formats.detect(resolve(values.input))
    print(f'reading {values.input} as {form}')
    if form in ('hf', 'gguf', 't5x'):
      _convert_base(values)
    elif form == 'peft':
      _convert_peft(values)
    else:
      _convert_own(values)
  print(f'wrote {values.output}')


def _convert_run(values: flags.FlagValues) -> None:
  """A run's adapter, or the base that a full run trained."""
  # Imported here: it brings Orbax, and only this branch needs it.
  from moepeft.checkpoints.restore import restore_trained

  tree, metadata = restore_trained(values.workdir)
  whole = metadata['trainable'] == 'params'
  values.to = values.to or ('hf' if whole else 'moepeft')
  template = '' if values.to == 't5x' else _template(values, metadata)
  if whole:
    _write_trained_base(values, tree, metadata)
  else:
    step = _t5x_step(values, metadata) if values.to == 't5x' else 1
    _write_own(values, tree, metadata, step)
  if template:
    file = Path(values.output) / 'chat_template.jinja'
    file.write_text(template, encoding='utf-8')


def _mix_adapters(values: flags.FlagValues) -> None:
  """The mixture of adapters that --method names, as moepeft's own form."""
  _require(values, 'base')
  values.to = values.to or 'moepeft'
  config = default()
  config.method, config.model.path = values.method, values.base
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  fresh = base_lib.initialise(base, model, config.seed)
  variables, experts = base_lib.with_experts(fresh, model, built, base)
  if not experts or any(map(_has_trained_router, built.adapter_map.entries)):
    raise CheckpointError(
      f'{built.method} has parameters that are trained; train it with python '
      '-m moepeft.train, or name a mixture like '
      "arrow(from_adapters=['a', 'b'])"
    )
  metadata = describe_run(base, built, config.seed, experts)
  _write_own(values, variables['peft'], metadata)


def _has_trained_router(entry) -> bool:
  _, adapter = entry
  router = getattr(adapter, 'router', None)
  if router is None or not adapter.from_adapters or adapter.train_experts:
    return True
  return next(r for r in ROUTERS.values() if r.module is type(router)).learned


def _template(values: flags.FlagValues, metadata) -> str:
  """The chat template that a run was trained by, '' for its tokenizer's own.

  Raises:
    ValueError: the file that its config names is gone.
  """
  data = Run(values.workdir).read_config().get('data', {})
  path, system = data.get('chat_template', ''), data.get('system_prompt', '')
  if not path and not system:
    return ''
  base = values.base or metadata['base']['path']
  words = load_tokenizer(untrusted.field(data, 'tokenizer', str, ''), base)
  chat_template.set_chat_template(words, path, system)
  template = (
    words.tokenizer.chat_template
    if isinstance(words, HuggingFaceTokenizer)
    else ''
  )
  return template if isinstance(template, str) else ''


def _write_trained_base(values: flags.FlagValues, tree, metadata) -> None:
  config, over = adapter_file.config_of(metadata), values.overwrite
  if values.to == 'hf':
    words = _tokenizer(values, metadata['base']['path'])
    hf.save(values.output, config, tree, values.dtype, words, overwrite=over)
  elif values.to == 't5x':
    if values.dtype is not None:
      raise CheckpointError(
        '--dtype casts what is written as hf: leave it out with --to=t5x'
      )
    step = _t5x_step(values, metadata)
    t5x.save(values.output, config, tree, step=step, overwrite=over)
  else:
    raise CheckpointError(
      f'{values.workdir} trained a whole model and --to={values.to} writes '
      'adapters: use --to=hf or --to=t5x'
    )


def _t5x_step(values: flags.FlagValues, metadata) -> int:
  """The run's step on T5X's clock, which counts from the pretraining's start.

  Adafactor's decay goes by it, so config.optimizer.decay_initial_step has it.
  """
  config = Run(values.workdir).read_config()
  before = int(config.get('optimizer', {}).get('decay_initial_step', 0))
  step = before + metadata['step']
  print(
    f'checkpoint_{step}: {before} steps before the run, '
    f'{metadata["step"]} of it'
  )
  return step


def _require(values: flags.FlagValues, name: str) -> None:
  if values[name].value is None:
    raise CheckpointError(f'--{name} is missing; see --help')


def _load_base(
  values: flags.FlagValues, path: str, dtype: str | None = None
) -> LoadedCheckpoint:
  """A base; `dtype` instead of the one that --dtype names."""
  dtype = dtype or values.dtype
  if not path:
    raise CheckpointError(
      f'{values.input or values.workdir} names no base model: give it with '
      '--base'
    )
  path = resolve(path)
  form = checkpoint_formats.detect(path)
  if form == 'hf':
    return hf.load(path, dtype)
  if form == 'gguf':
    return gguf.load(path, dtype)
  if form == 't5x':
    return t5x.load(path, dtype, values.top_k)
  raise CheckpointError(
    f'{path} is an adapter ({form}), expected a base model (hf, gguf or t5x)'
  )


def _convert_base(values: flags.FlagValues) -> None:
  loaded = _load_base(values, values.input)
  if loaded.path != values.input:
    print(f'reading {loaded.path}')
  adapter = getattr(loaded, 'adapter', None)
  if values.to == 't5x':
    _write_t5x(values, loaded, adapter, max(getattr(loaded, 'step', 0), 1))
  elif adapter is not None:
    _write_apart(values, loaded, adapter)
  elif values.to == 'hf':
    _write_hf(values, values.output, loaded)
  else:
    raise CheckpointError(
      f'{values.input} holds no adapter: --to={values.to} writes adapters, '
      '--to=hf and --to=t5x write base models'
    )


def _convert_peft(values: flags.FlagValues) -> None:
  fields = peft_config.read(values.input)
  path = values.base or fields.get('base_model_name_or_path') or ''
  base = _load_base(values, path, _wide(values))
  adapter = peft.load(values.input, base.config)
  if values.to == 'hf':
    _write_merged(values, base, adapter, _SEMANTICS)
  elif values.to == 't5x':
    _write_t5x(values, base, adapter)
  elif values.to == 'peft':
    over = values.overwrite
    peft.save(values.output, base.config, adapter, path, fields, over)
  elif values.to == 'moepeft':
    metadata = _describe(adapter, path, base.sha256, base.config)
    adapter_file.save(values.output, adapter.tree, metadata, values.overwrite)
  else:
    raise _unknown(values)


def _wide(values: flags.FlagValues) -> str | None:
  """The dtype in which a base is read to merge; --dtype casts the result.

  A cast before would quantise other weights than training did, and round the
  base twice.
  """
  return 'float32' if values.dtype and values.to == 'hf' else None


def _unknown(values: flags.FlagValues) -> CheckpointError:
  return CheckpointError(
    f'--to={values.to} is no form of an adapter: expected one of '
    f'{", ".join(_WRITTEN)}'
  )


def _convert_own(values: flags.FlagValues) -> None:
  _write_own(values, *adapter_file.load(values.input))


def _write_own(values: flags.FlagValues, tree, metadata, step: int = 1) -> None:
  """An adapter with its metadata, in the form that --to names."""
  adapter = AdapterWeights(metadata['method'], tree)
  path = values.base or metadata['base']['path']
  if values.to == 'moepeft':
    adapter_file.save(values.output, tree, metadata, values.overwrite)
  elif values.to == 'peft':
    config, over = adapter_file.config_of(metadata), values.overwrite
    peft.save(values.output, config, adapter, path, overwrite=over)
  elif values.to not in _WRITTEN:
    raise _unknown(values)
  else:
    base = _load_base(values, path, _wide(values))
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


def _write_merged(
  values, base, adapter: AdapterWeights, semantics: str, kind: str = ''
) -> None:
  """A base with an adapter merged into it, as hf.

  Args:
    kind: what the adapter was trained on the base in, so what it is merged
      into: only that gives the trained model's logits.
  """
  sites = FAMILIES[base.config.family].sites(base.config)
  built = build(adapter.method, sites, semantics)
  params = base.params
  if kind:
    print(f'merging into what the base decodes to from {kind}')
    packed = quantize.pack(params, base.config, kind)
    params = quantize.unpack(packed, base.config)
  try:
    merged = merge(built, {'params': params, 'peft': adapter.tree})
  except ValueError as error:
    forms = ' or '.join(f'--to={f}' for f in _kept_by(base.config, adapter))
    raise CheckpointError(
      f'{error}; {forms} keeps the adapter as it is'
    ) from None
  if values.dtype is None:
    merged = jax.tree.map(lambda a, b: a.astype(b.dtype), merged, base.params)
  words, over = _tokenizer(values, base.path), values.overwrite
  hf.save(
    values.output, base.config, merged, values.dtype, words, overwrite=over
  )


def _kept_by(config, adapter: AdapterWeights) -> list[str]:
  """The forms that an adapter can be written in without its base."""
  forms = ['moepeft']
  for name, check in (('peft', peft.check), ('t5x', t5x.check)):
    try:
      check(config, adapter)
      forms.append(name)
    except ValueError:
      continue
  return forms


def _tokenizer(values: flags.FlagValues, base: str) -> str | None:
  """The path of the tokenizer of a run, or else of its base.

  Args:
    base: where the base is, or ''.
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


def _write_t5x(
  values, base, adapter: AdapterWeights | None, step: int = 1
) -> None:
  over = values.overwrite
  t5x.save(values.output, base.config, base.params, adapter, step, over)


def _write_hf(values, path: str, base) -> None:
  over = values.overwrite
  # base.path, as the input may be a name on the hub.
  hf.save(path, base.config, base.params, tokenizer=base.path, overwrite=over)


def _write_apart(values, base: t5x.LoadedT5X, adapter: AdapterWeights) -> None:
  """base/ and adapter/, as one output: both or nothing."""
  # The hash is of what base/ holds, so of the cast weights if they were cast.
  cast = values.dtype is not None
  sha256 = weight_mapping.content_hash(base.params) if cast else base.sha256
  path = str(Path(values.output) / 'base')
  with directory.atomic_directory(values.output, values.overwrite) as staging:
    _write_hf(values, str(staging / 'base'), base)
    target = str(staging / 'adapter')
    if values.to == 'peft':
      peft.save(target, base.config, adapter, path)
    else:
      metadata = _describe(adapter, path, sha256, base.config)
      adapter_file.save(target, adapter.tree, metadata)


def _describe(adapter: AdapterWeights, path: str, sha256: str, config):
  family = config.family
  return adapter_file.describe(
    adapter.method, _SEMANTICS, path, sha256, family, config
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv))
