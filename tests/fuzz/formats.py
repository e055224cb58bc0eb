# SPDX-License-Identifier: Apache-2.0
"""Damaged model and adapter files, read in a process with little memory.

  python -m tests.fuzz.formats SEED MUTATIONS

prints a JSON object: {target: {'read': n, 'refused': n, 'failed': [...]}}.
"""

import collections
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import flax.serialization
import numpy as np

from moepeft.checkpoints import adapter, base
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.gguf import tokenizer as gguf_tokenizer
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.t5x import model as t5x
from moepeft.inference import prompts

from ..checkpoints import cases, gguf_files

# Beyond what the process has when all is imported.
_MEMORY = 2**30
_SECONDS = 20
_ODD = (
  None, True, False, 0, -1, 1, 3.5, 1e308, float('nan'), 2**31, 2**40, 2**63,
  10**400, '', 'x', '\ud800', '../../x', [], {}, [None], [[]], {'a': 1}, 'NaN',
)  # fmt: skip
_CONFIG = cases.CONFIGS['gated-untied']
_LLAMA = cases.DECODERS['llama']


class _TooLong(Exception):
  pass


def mutate(raw: bytes, rng: random.Random, is_json: bool) -> bytes:
  """One to three changes: of a JSON value's nodes, or of bytes."""
  if is_json and rng.random() < 0.7:
    value = json.loads(raw)
    for _ in range(rng.randint(1, 3)):
      value = _change(value, rng)
    try:
      return json.dumps(value).encode()
    except RecursionError:  # nested by more than one change
      return raw
  raw = bytearray(raw)
  # Headers are where sizes are.
  most = len(raw) if rng.random() < 0.5 else min(len(raw), 400)
  for _ in range(rng.randint(1, 3)):
    i = rng.randrange(max(most, 1))
    kind = rng.randrange(5)
    if kind == 0 and raw:
      raw[min(i, len(raw) - 1)] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del raw[i:]
    elif kind == 2:
      raw[i : i + rng.randint(1, 9)] = rng.randbytes(rng.randint(0, 9))
    elif kind == 3:
      raw[i : i + 8] = b'\xff' * 8
    else:
      raw[i:i] = raw[: rng.randint(1, 50)]
  return bytes(raw)


def _change(value, rng: random.Random):
  """A JSON value with one node replaced, lost, renamed or nested deeply."""
  places = []
  stack = [(None, None, value)]
  while stack:
    parent, key, node = stack.pop()
    places.append((parent, key))
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    stack += [(node, k, child) for k, child in items]
  parent, key = rng.choice(places)
  if parent is None:
    return rng.choice(_ODD) if rng.random() < 0.05 else value
  kind = rng.randrange(6)
  if kind == 0 and isinstance(parent, dict):
    parent.pop(key)
  elif kind == 1 and isinstance(parent, dict):
    parent[f'{key}x'] = parent.pop(key)
  elif kind == 2:
    node = parent[key]
    for _ in range(rng.choice((3, 200))):
      node = [node]
    parent[key] = node
  else:
    parent[key] = rng.choice(_ODD)
  return value


def _targets(root: Path):
  """{name: (folder, file in it, what reads the folder)}."""
  params = cases.random_params(_CONFIG)
  hf.save(root / 't5', _CONFIG, params)
  hf.save(root / 'shards', _CONFIG, params, max_shard_bytes=9000)
  hf.save(root / 'llama', _LLAMA, cases.random_params(_LLAMA))
  t5x.save(root / 't5x', _CONFIG, params)
  target = cases.weight_mapping.unflatten(cases.released_arrays(_CONFIG))
  (root / 'single').mkdir()
  packed = flax.serialization.msgpack_serialize({'target': target})
  (root / 'single' / 'checkpoint_3').write_bytes(packed)
  leaves = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
  tree = cases.adapter_tree(_CONFIG, leaves, ['encoder/self/q'])
  lora = AdapterWeights(
    "lora(rank=7, alpha=16, targets='encoder/self/q')", tree
  )
  peft.save(root / 'peft', _CONFIG, lora)
  card = adapter.describe(lora.method, 'official', 'x', 'y', 't5', _CONFIG)
  adapter.save(root / 'own', tree, card)
  (root / 'ends').mkdir()
  (root / 'ends' / 'generation_config.json').write_text('{"eos_token_id": [1]}')
  _tokenizer(root / 'words')
  load = lambda folder: hf.load(str(folder))  # noqa: E731
  lora_of = lambda folder: base.load_adapter(str(folder), _CONFIG)  # noqa: E731
  words = importlib.import_module('moepeft.data.tokenizers.tokenizer')
  read_words = lambda folder: words.load_tokenizer('', str(folder))  # noqa: E731
  actual = {
    'hf config, T5': ('t5', 'config.json', load),
    'hf config, Llama': ('llama', 'config.json', load),
    'hf weights': ('t5', 'model.safetensors', load),
    'hf index': ('shards', 'model.safetensors.index.json', load),
    'peft config': ('peft', peft.CONFIG_FILE, lora_of),
    'peft weights': ('peft', peft.WEIGHTS_FILE, lora_of),
    'own card': ('own', adapter.METADATA_FILE, lora_of),
    'own weights': ('own', adapter.ARRAYS, lora_of),
    't5x index': (
      't5x/checkpoint_1',
      'checkpoint',
      lambda folder: t5x.load(str(folder)),
    ),
    't5x array': (
      't5x/checkpoint_1/target.token_embedder.embedding',
      '.zarray',
      lambda folder: t5x.load(str(folder.parent)),
    ),
    't5x chunk': (
      't5x/checkpoint_1/target.token_embedder.embedding',
      '0.0',
      lambda folder: t5x.load(str(folder.parent)),
    ),
    't5x single': (
      'single',
      'checkpoint_3',
      lambda folder: t5x.load(str(folder)),
    ),
    'tokenizer': ('words', 'tokenizer.json', read_words),
    'tokenizer config': ('words', 'tokenizer_config.json', read_words),
    'generation config': (
      'ends',
      'generation_config.json',
      lambda folder: prompts.eos_token_ids(words.ByteTokenizer(), str(folder)),
    ),
  }
  if importlib.util.find_spec('gguf'):
    (root / 'gguf').mkdir()
    file = root / 'gguf' / 'm.gguf'
    weights = gguf_files.random_params(gguf_files.CONFIGS['llama'])
    gguf_files.write(str(file), 'llama', weights, kind='Q8_0', more=_tokens)
    actual['gguf'] = ('gguf', file.name, _read_gguf)
  return actual


def _tokens(writer) -> None:
  letters = [chr(97 + i) for i in range(26)]
  tokens = ['<s>', '</s>', *letters, 'ab']
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('gpt-2')
  writer.add_token_list(tokens)
  writer.add_token_types([3, 3, *[1] * 27])
  writer.add_token_merges(['a b'])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)


def _read_gguf(folder: Path) -> None:
  path = str(folder / 'm.gguf')
  gguf.load(path)
  gguf_tokenizer.read(path)


def _tokenizer(folder: Path) -> None:
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  vocab = {'<unk>': 0, '</s>': 1, 'a': 2, 'b': 3, 'ab': 4}
  bpe = models.BPE(vocab=vocab, merges=[('a', 'b')], unk_token='<unk>')
  made = Tokenizer(bpe)
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  fast = PreTrainedTokenizerFast(
    tokenizer_object=made, eos_token='</s>', unk_token='<unk>'
  )
  fast.save_pretrained(folder)


def _hashed(raw: bytes) -> bytes:
  """A card with the hash that it should have, where it is JSON."""
  try:
    card = json.loads(raw)
    card['card_sha256'] = adapter._metadata_hash(card)
    return json.dumps(card).encode()
  except (ValueError, TypeError, KeyError, RecursionError):
    return raw


def _late(signum, frame):
  raise _TooLong


def run(seed: int, mutations: int) -> dict[str, dict]:
  """The figures; see above."""
  rng, figures = random.Random(seed), {}
  with tempfile.TemporaryDirectory() as temporary:
    root = Path(temporary)
    targets = _targets(root)
    for _, (folder, _, read) in targets.items():
      read(root / folder)
    _bound_memory()
    signal.signal(signal.SIGALRM, _late)
    for name, (folder, file, read) in targets.items():
      path = root / folder / file
      whole = path.read_bytes()
      is_json = file.endswith('.json') or file == '.zarray'
      counts, failed = collections.Counter(), []
      for _ in range(mutations):
        raw = mutate(whole, rng, is_json)
        if name == 'own card' and rng.random() < 0.8:
          raw = _hashed(raw)
        path.write_bytes(raw)
        signal.alarm(_SECONDS)
        try:
          read(root / folder)
          counts['read'] += 1
        except (ValueError, OSError) as error:
          counts['refused'] += 1
          head = str(error).partition(' (- expected')[0]
          if not head or '\n' in head:
            failed.append(f'no sentence: {head[:300]!r} of {raw[:300]!r}')
        except BaseException as error:
          place = error.__traceback__
          while place.tb_next:
            place = place.tb_next
          where = f'{place.tb_frame.f_code.co_filename}:{place.tb_lineno}'
          failed.append(f'{type(error).__name__} {error} at {where}'[:400])
        finally:
          signal.alarm(0)
      path.write_bytes(whole)
      figures[name] = {**counts, 'failed': failed}
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
  return figures


def _bound_memory() -> None:
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  size = pages * os.sysconf('SC_PAGE_SIZE')
  resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY,) * 2)


if __name__ == '__main__':
  np.seterr(all='ignore')
  print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
