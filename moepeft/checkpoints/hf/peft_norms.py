# SPDX-License-Identifier: Apache-2.0
"""Reads and writes LN tuning of `peft`: scales and biases of norms.

peft's arrays are those of the base's norms, as the base stores them.
"""

from collections.abc import Collection
from typing import Any

from moepeft.checkpoints.adapter import site_patterns, sites_in
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf.peft_names import PREFIX
from moepeft.config.method_string import Spec
from moepeft.models.weight_mapping import CheckpointError, Rule, Tree

PEFT_TYPE = 'LN_TUNING'


def describe(
  config: Any, tree: Tree, spec: Spec
) -> tuple[dict[str, Any], list[Rule], dict[str, int]]:
  """(fields of adapter_config.json, rules, sizes of no letters).

  Raises:
    CheckpointError: a site is no norm.
  """
  sites = sites_in(tree, spec.name)
  return {'peft_type': PEFT_TYPE}, _rules(config, sites), {}


def _rules(config: Any, sites: Collection[str]) -> list[Rule]:
  norms = _norm_rules(config)
  if unknown := sorted(set(sites) - set(norms)):
    raise CheckpointError(f'{", ".join(unknown)} is no norm of the model')
  return [rule for site in sites for rule in norms[site]]


def read(config: Any, stored_names: Collection[str]) -> tuple[str, list[Rule]]:
  """(method, rules) of the arrays of an adapter."""
  norms = _norm_rules(config)
  depths = hf.family_of(config).depths(config)
  layers = range(max(depths.values()))
  sites = [
    site
    for site, (rule, *_) in norms.items()
    if any(
      rule.stored_name.replace('{l}', str(layer)) in stored_names
      for layer in layers
    )
  ]
  inside = [site for site in norms if site.count('/') > 1]
  outside = [site for site in sites if site not in inside]
  patterns = [
    site_patterns([s for s in sites if s in inside], inside),
    *outside,
  ]
  targets = '|'.join(filter(None, patterns))
  method = str(Spec('ln_tuning', (('targets', targets),)))
  return method, _rules(config, sites)


def _norm_rules(config: Any) -> dict[str, list[Rule]]:
  """{site of a norm: the rules of its arrays}."""
  family = hf.family_of(config)
  roles = family.sites(config)
  by_site: dict[str, list[Rule]] = {}
  for rule in family.hf.rules(config):
    path, _, leaf = rule.name.rpartition('/')
    site = path.replace('/layers/{l}', '')
    if roles.get(site) == 'norm':
      module, _, suffix = rule.stored_name.rpartition('.')
      name = f'{PREFIX}{module}.ln_tuning_layers.{suffix}'
      by_site.setdefault(site, []).append(
        Rule(f'{path}/ln_tuning/{leaf}', name, rule.axes, rule.stored_axes)
      )
  return by_site
