# SPDX-License-Identifier: Apache-2.0
"""Requests for a budget or a scale, before they are solved.

config.budget and config.scale, or the options `budget`, `budget_option` and
`scale` of an adapter in the method string, ask for a method of another rank,
number of experts or alpha. `moepeft.checkpoints.solve_method` solves them; a
solved config has the explicit method, and the request in `solved_from`.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from moepeft.config import method_string
from moepeft.config.defaults import default
from moepeft.config.method_string import Spec
from moepeft.core.ranges import short_repr

# {unit of a budget: its name in messages}
UNITS = {'params': 'parameters', 'flops': 'FLOPs a token'}
BASELINE = 'lora(rank=4)'
_KEYS = ('budget', 'budget_option', 'budget_tolerance', 'scale')
# Options of an adapter in the method string.
_IN_METHOD = ('budget', 'budget_option', 'scale')
_MATCHED = 'matched'


@dataclasses.dataclass(frozen=True)
class BudgetRequest:
  """A budget: one of `amount`, `percent` and `method`.

  Attributes:
    unit: 'params', the trained parameters, or 'flops', the FLOPs of a token's
      forward and backward pass through base and adapters.
    amount: the number of them.
    percent: of those of the base, trained in full.
    method: a method that has as many; '' for none.
  """

  unit: str
  amount: float | None = None
  percent: float | None = None
  method: str = ''


def parse_budget(text: str) -> BudgetRequest:
  """Parses 'params:4976640', 'params:0.5%' or 'flops:lora(rank=8)'.

  Raises:
    ValueError: the text is no budget.
  """
  unit, _, size = text.partition(':') if isinstance(text, str) else ('', '', '')
  unit, size = unit.strip(), size.strip()
  error = ValueError(
    "a budget is written like 'params:4976640', 'params:0.5%' of the base or "
    "'params:lora(rank=8)', and with flops for the FLOPs of a token; got "
    f'{short_repr(text)}'
  )
  if unit not in UNITS or not size:
    raise error
  try:
    number = float(size.removesuffix('%'))
  except ValueError:
    if not size[0].isalpha():
      raise error from None
    return BudgetRequest(unit, method=size)
  if not 0 < number < math.inf:
    raise error
  return BudgetRequest(unit, **{'percent' if '%' in size else 'amount': number})


def parse_scale(text: str) -> str:
  """The baseline of a scale: 'matched' or 'matched:lora(rank=8)'.

  Raises:
    ValueError: the text is no scale.
  """
  matched, colon, baseline = text.partition(':')
  if matched.strip() != _MATCHED or (colon and not baseline.strip()):
    raise ValueError(
      "a scale is 'matched', alpha / r of lora(rank=4), or that of another "
      f"method, 'matched:lora(rank=8)'; got {short_repr(text)}"
    )
  return baseline.strip() or BASELINE


def without_request(spec: Spec) -> tuple[Spec, dict[str, str]]:
  """(spec without its request, {'budget', 'budget_option', 'scale': text}).

  A number is the scale of a bottleneck, and stays.
  """
  options = dict(spec.options)
  request = {key: options.pop(key, '') for key in _IN_METHOD}
  if not isinstance(request['scale'], str):
    options['scale'], request['scale'] = request['scale'], ''
  return Spec(spec.name, tuple(options.items())), request


def request(config: ConfigDict) -> str:
  """The config's request as a text; '' if its method is explicit.

  Raises:
    ValueError: the method string has another syntax.
  """
  specs = method_string.parse_method(config.method)
  in_method = any(any(without_request(spec)[1].values()) for spec in specs)
  if not (config.budget or config.scale or in_method):
    return ''
  usual = default()
  changed = [key for key in _KEYS if config[key] != usual[key]]
  parts = [f'{key}={config[key]}' for key in changed]
  return '; '.join((config.method, *parts))


def solved(config: ConfigDict, method: str) -> ConfigDict:
  """A config with the method that its request was solved with."""
  text = request(config)
  config = config.copy_and_resolve_references()
  config.update({key: default()[key] for key in _KEYS})
  config.method, config.solved_from = method, text
  return config
