# SPDX-License-Identifier: Apache-2.0
"""Small random models whose every size differs, so that no axis can hide."""

import itertools

import numpy as np

from moepeft.interop import released
from moepeft.models import names, t5_names
from moepeft.models.t5 import T5Config


def _config(gated: bool, tied: bool) -> T5Config:
  return T5Config(
    vocab=29,
    d_model=11,
    heads=3,
    head_dim=5,
    ffn=13,
    encoder_layers=2,
    decoder_layers=4,
    gated=gated,
    activation='gelu' if gated else 'relu',
    tied=tied,
    scale_head=tied,
    buckets=6,
  )


CONFIGS = {
  f'{"gated" if gated else "plain"}-{"tied" if tied else "untied"}': _config(
    gated, tied
  )
  for gated, tied in itertools.product((True, False), repeat=2)
}


def random_tree(shapes, seed=0):
  """A nested dict of float32 arrays of {path: shape}.

  Not so large that attention saturates, where float32 would lose digits.
  """
  rng = np.random.default_rng(seed)
  return names.unflatten(
    {
      path: rng.normal(scale=0.5, size=shape).astype(np.float32)
      for path, shape in shapes.items()
    }
  )


def random_params(config, seed=0):
  """Random parameters of a T5."""
  rules = t5_names.hf_rules(config)
  sizes, depths = t5_names.sizes(config), t5_names.depths(config)
  shapes = names.stacked_shapes(names.entries(rules, sizes, depths))
  return random_tree(shapes, seed)


def adapter_tree(config, leaves, sites, seed=1):
  """A random 'peft' tree.

  Args:
    leaves: {'lora/a': '{in}r'}: axes, {in} and {out} standing for the site's.
    sites: of the model; e is 2 and r 7.
  """
  sizes = t5_names.sizes(config) | {'e': 2, 'r': 7}
  depths = t5_names.depths(config)
  known = t5_names.projections(config) | t5_names.taps()
  shapes = {}
  for site in sites:
    stack, rest = site.split('/', 1)
    inner, outer = known[site]
    for leaf, axes in leaves.items():
      axes = axes.replace('{in}', inner).replace('{out}', outer)
      shape = (depths[stack], *names.axes_shape(axes, sizes))
      shapes[f'{stack}/layers/{rest}/{leaf}'] = shape
  return random_tree(shapes, seed)


def assert_equal_trees(left, right):
  """Same paths, shapes, dtypes and bits."""
  left, right = names.flatten(left), names.flatten(right)
  assert left.keys() == right.keys()
  for path, leaf in left.items():
    assert leaf.dtype == right[path].dtype, path
    np.testing.assert_array_equal(leaf, right[path], err_msg=path)


def released_arrays(config, adapter=None):
  """Random parameters and an adapter's as `t5x.save` writes them, by name."""
  sizes, depths = t5_names.sizes(config), t5_names.depths(config)
  wanted = names.entries(t5_names.t5x_rules(config), sizes, depths)
  pairs = list(names.write(wanted, sizes, random_params(config)))
  if adapter is not None:
    pairs += released.write(config, adapter)
  return {entry.their_name: array for entry, array in pairs}
