# SPDX-License-Identifier: Apache-2.0
"""A decoder's arrays: their axes, and their names in checkpoint formats."""

import dataclasses
from collections.abc import Mapping

from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.hf_tensor_names import TensorNames
from moepeft.models.weight_mapping import CheckpointError, Rule, in_layers


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
  """The size of each axis letter."""
  return {
    'v': config.vocab,
    'd': config.d_model,
    'n': config.heads,
    'k': config.kv_heads,
    'h': config.head_dim,
    'f': config.ffn,
    'p': config.length,
  }


def depths(config: DecoderConfig) -> dict[str, int]:
  """Layers of each stack."""
  return {'decoder': config.layers}


def projections(config: DecoderConfig) -> dict[str, tuple[str, str]]:
  """Every projection's site and its (input, output) axes, in model order."""
  attention = {
    'q': ('d', 'nh'),
    'k': ('d', 'kh'),
    'v': ('d', 'kh'),
    'o': ('nh', 'd'),
  }
  gates = ('wi_0', 'wi_1') if config.gated else ('wi',)
  mlp = dict.fromkeys(gates, ('d', 'f')) | {'wo': ('f', 'd')}
  return {
    f'decoder/{sublayer}/{name}': axes
    for sublayer, sublayer_axes in (('self', attention), ('mlp', mlp))
    for name, axes in sublayer_axes.items()
  }


def biased(config: DecoderConfig) -> set[str]:
  """The projections that have a bias."""
  attention = 'qkv' if config.attention_bias else ''
  attention += 'o' if config.out_bias else ''
  mlp = {
    site
    for site in projections(config)
    if config.mlp_bias and site.startswith('decoder/mlp/')
  }
  return mlp | {f'decoder/self/{name}' for name in attention}


@dataclasses.dataclass(frozen=True)
class DecoderNames:
  """Names of a decoder's modules in a checkpoint format.

  A module's arrays are '<module>.weight' and '<module>.bias'.

  Attributes:
    layer: the start of the names in layer {l}, 'model.layers.{l}.'.
    modules: {site below 'decoder/': module in a layer}, of projections and of
      norms of queries and keys. Projections that share a module are parts of
      one array, of equal size.
    norms: the same of the norms before sublayers.
    post_norms: that of all norms where outputs of sublayers are normed too.
    embedding, positions, norm, head: modules outside of layers; `positions` is
      '' where the format has no table of them.
    kernel_axes: 'out in' or 'in out'.
    prefix, ignored: see `hf_tensor_names.TensorNames`.
  """

  layer: str
  modules: Mapping[str, str]
  norms: Mapping[str, str]
  embedding: str
  norm: str
  head: str
  positions: str = ''
  post_norms: Mapping[str, str] = dataclasses.field(default_factory=dict)
  kernel_axes: str = 'out in'
  prefix: str = ''
  ignored: str = TensorNames.ignored

  @property
  def tensor_names(self) -> TensorNames:
    return TensorNames(
      f'{self.head}.weight',
      f'{self.embedding}.weight',
      self.prefix,
      self.ignored,
    )

  def module(self, site: str) -> str:
    """'decoder/self/q' -> 'model.layers.{l}.self_attn.q_proj'.

    Raises:
      CheckpointError: the format has no name for it.
    """
    outside = {
      'embed': self.embedding,
      'positions': self.positions,
      'decoder/norm': self.norm,
      'head': self.head,
    }
    if name := outside.get(site):
      return name
    return self._in_layer(site.removeprefix('decoder/'), self.modules)

  def _in_layer(self, site: str, modules: Mapping[str, str]) -> str:
    if site not in modules:
      raise CheckpointError(
        f'the checkpoint format has no name for {site}: expected the options '
        "of the model's family; keep such a model as moepeft has it"
      )
    return self.layer + modules[site]

  def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
    """Rules for every array.

    Raises:
      CheckpointError: the format has no name for an array.
    """
    rules = [Rule('embed/embedding', f'{self.embedding}.weight', 'vd', 'vd')]
    if config.positions == 'learned':
      table = f'{self.module("positions")}.weight'
      rules.append(Rule('positions/embedding', table, 'pd', 'pd'))
    for site in projections(config):
      rules += self._projection(site, config)
    sites, modules = ('self/norm', 'mlp/norm'), self.norms
    if config.post_norms:
      sites, modules = POST_NORM_SITES, self.post_norms
    for site in sites:
      module = self._in_layer(site, modules)
      rules += _norm(in_layers(f'decoder/{site}'), module, config)
    for site in ('self/q_norm', 'self/k_norm') if config.qk_norm else ():
      path = in_layers(f'decoder/{site}')
      weight = f'{self.module(site)}.weight'
      rules.append(Rule(f'{path}/scale', weight, 'h', 'h'))
    rules += _norm('decoder/norm', self.norm, config)
    if not config.tied:
      rules.append(Rule('head/kernel', f'{self.head}.weight', 'dv', 'vd'))
    return tuple(rules)

  def _projection(self, site: str, config: DecoderConfig) -> list[Rule]:
    sites, module = projections(config), self.module(site)
    inner, outer = sites[site]
    shared = [path for path in sites if self.module(path) == module]
    name = in_layers(site)
    part, stored = (shared.index(site), len(shared)), f'({outer})'
    if len(shared) > 1:
      stored = f'(*{outer})'
    kernel = f'{stored}({inner})'
    if self.kernel_axes == 'in out':
      kernel = f'({inner}){stored}'
    rules = [
      Rule(f'{name}/kernel', f'{module}.weight', inner + outer, kernel, part)
    ]
    if site in biased(config):
      rules.append(Rule(f'{name}/bias', f'{module}.bias', outer, stored, part))
    return rules


POST_NORM_SITES = ('self/norm', 'self_post_norm', 'mlp/norm', 'mlp_post_norm')


def _norm(path: str, module: str, config: DecoderConfig) -> list[Rule]:
  rules = [Rule(f'{path}/scale', f'{module}.weight', 'd', 'd')]
  if config.centred:
    rules.append(Rule(f'{path}/bias', f'{module}.bias', 'd', 'd'))
  return rules
