# SPDX-License-Identifier: Apache-2.0
"""Axes of a decoder's arrays, and their names in checkpoint formats."""

import dataclasses
from collections.abc import Mapping

from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.hf_tensor_names import TensorNames
from moepeft.models.weight_mapping import CheckpointError, Rule, path_in_layers


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


def sites_with_bias(config: DecoderConfig) -> set[str]:
  """The sites of the projections that have a bias."""
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
    layer: the prefix of names in layer {l}, 'model.layers.{l}.'.
    modules: {site below 'decoder/': module in a layer} of projections and of
      query and key norms. Projections with the same module are equal parts of
      a fused array.
    norms: {site: module} of the norms before sublayers.
    post_norms: {site: module} of all norms of models that also normalize the
      outputs of sublayers.
    embedding, positions, norm, head: modules outside of layers; `positions` is
      '' if the format has no position embedding.
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
      CheckpointError: the format has no name for the site.
    """
    top_modules = {
      'embed': self.embedding,
      'positions': self.positions,
      'decoder/norm': self.norm,
      'head': self.head,
    }
    if name := top_modules.get(site):
      return name
    return self._in_layer(site.removeprefix('decoder/'), self.modules)

  def _in_layer(self, site: str, modules: Mapping[str, str]) -> str:
    if site not in modules:
      raise CheckpointError(
        f'the checkpoint format has no name for {site}, which models of this '
        "family lack; use moepeft's own checkpoints"
      )
    return self.layer + modules[site]

  def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
    """The rules of all arrays.

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
      rules += _norm(path_in_layers(f'decoder/{site}'), module, config)
    for site in ('self/q_norm', 'self/k_norm') if config.qk_norm else ():
      path = path_in_layers(f'decoder/{site}')
      weight = f'{self.module(site)}.weight'
      rules.append(Rule(f'{path}/scale', weight, 'h', 'h'))
    rules += _norm('decoder/norm', self.norm, config)
    if not config.tied:
      rules.append(Rule('head/kernel', f'{self.head}.weight', 'dv', 'vd'))
    return tuple(rules)

  def _projection(self, site: str, config: DecoderConfig) -> list[Rule]:
    sites, module = projections(config), self.module(site)
    input_axes, output_axes = sites[site]
    fused_sites = [path for path in sites if self.module(path) == module]
    name = path_in_layers(site)
    part, stored_outputs = (
      (fused_sites.index(site), len(fused_sites)),
      f'({output_axes})',
    )
    if len(fused_sites) > 1:
      stored_outputs = f'(*{output_axes})'
    kernel = f'{stored_outputs}({input_axes})'
    if self.kernel_axes == 'in out':
      kernel = f'({input_axes}){stored_outputs}'
    rules = [
      Rule(
        f'{name}/kernel',
        f'{module}.weight',
        input_axes + output_axes,
        kernel,
        part,
      )
    ]
    if site in sites_with_bias(config):
      rules.append(
        Rule(
          f'{name}/bias', f'{module}.bias', output_axes, stored_outputs, part
        )
      )
    return rules


POST_NORM_SITES = ('self/norm', 'self_post_norm', 'mlp/norm', 'mlp_post_norm')


def _norm(path: str, module: str, config: DecoderConfig) -> list[Rule]:
  rules = [Rule(f'{path}/scale', f'{module}.weight', 'd', 'd')]
  if config.centred:
    rules.append(Rule(f'{path}/bias', f'{module}.bias', 'd', 'd'))
  return rules
