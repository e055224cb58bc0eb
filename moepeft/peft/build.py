# SPDX-License-Identifier: Apache-2.0
"""From a method's text to the table of advice that a model asks."""

import dataclasses
import fnmatch
from collections.abc import Mapping

from moepeft import spec as spec_lib
from moepeft.moe import ROUTERS
from moepeft.nn.site import Advice
from moepeft.peft.method import SEMANTICS, Method
from moepeft.spec import Spec
from moepeft.typing import State, Tree

# What `topk` does with the kept probabilities where it is not said.
_RENORMALIZE = {'official': False, 'paper': True}


@dataclasses.dataclass(frozen=True)
class Built:
  """A method made ready for one model.

  Attributes:
    method: its text, with every option that the semantics decides.
    semantics: 'official' or 'paper'.
    advice: the table that the model takes.
    trainable: the collection that training changes, 'peft' or 'params'.
  """

  method: str
  semantics: str
  advice: Advice
  trainable: str

  def variables(self, state: State) -> dict[str, Tree]:
    """{'params': ..., 'peft': ...} of a training state."""
    other = {'peft': 'params', 'params': 'peft'}[self.trainable]
    return {self.trainable: state.trainable, other: state.frozen}


def build(
  method: str,
  sites: Mapping[str, str],
  semantics: str = 'official',
  methods: Mapping[str, Method] | None = None,
) -> Built:
  """Resolves a method's names for a model.

  Args:
    method: 'molora(experts=10, rank=4)'; several joined by ' + ' nest, the
      first innermost. Every adapter takes the option `sites`: globs over site
      paths joined by '|', as in '*/self/q|*/wo'.
    sites: {path: role} of the model, from `models.<family>.sites`.
    semantics: decides what the text leaves open; DESIGN: official is the
      released code, paper the text.
    methods: the registry; `moepeft.peft.METHODS` by default.

  Raises:
    ValueError: a name, option or semantics does not exist, or a pattern
      matches no site.
  """
  if methods is None:
    from moepeft.peft import METHODS as methods
  if semantics not in SEMANTICS:
    raise ValueError(
      f'semantics is one of {", ".join(SEMANTICS)}; got {semantics!r}'
    )
  specs = [
    _resolve(spec, methods, semantics) for spec in spec_lib.parse_method(method)
  ]
  text = spec_lib.format_method(tuple(specs))
  if any(methods[spec.name].module is None for spec in specs):
    if len(specs) > 1:
      raise ValueError(f'{method!r}: full trains alone; drop the others')
    return Built(text, semantics, Advice(), 'params')
  entries, names = [], set()
  for spec in specs:
    name = _free_name(spec.name, names)
    adapter = _module(spec, methods[spec.name], name)
    entries += [
      (path, adapter)
      for path in _paths(spec, methods[spec.name], sites, semantics)
    ]
  return Built(text, semantics, Advice(tuple(entries)), 'peft')


def _resolve(spec: Spec, methods, semantics: str) -> Spec:
  """Checks names and options and adds what the semantics decides."""
  method = _find(spec.name, methods, 'method')
  given = dict(spec.options)
  decided = dict(method.defaults.get(semantics, {}))
  if method.module is not None and 'router' in _options(method.module):
    router = given.get('router', Spec('softmax'))
    router = Spec(router) if isinstance(router, str) else router
    module = _find(router.name, ROUTERS, 'router')
    _check(router, _options(module) - {'experts'})
    if router.name == 'topk' and router.get('renormalize') is None:
      router = router.replace(renormalize=_RENORMALIZE[semantics])
    decided['router'] = given['router'] = router
  known = set() if method.module is None else _options(method.module)
  _check(spec, known | ({'sites'} if known else set()))
  return Spec(spec.name, tuple((given | (decided | given)).items()))


def _module(spec: Spec, method: Method, name: str):
  options = {k: v for k, v in spec.options if k != 'sites'}
  if 'router' in options:
    router = options['router']
    experts = options.get('experts', method.module.experts)
    options['router'] = ROUTERS[router.name](
      experts=experts, **dict(router.options), parent=None
    )
  return method.module(name=name, parent=None, **options)


def _paths(spec, method, sites, semantics) -> list[str]:
  """The sites that a spec adapts, in the model's order."""
  patterns = spec.get('sites')
  if patterns is None:
    roles = method.roles[semantics]
    found = [path for path, role in sites.items() if role in roles]
    if not found:
      raise ValueError(f'{spec.name} finds no site; name some with `sites`')
    return found
  found = set()
  for pattern in patterns.split('|'):
    matched = fnmatch.filter(sites, pattern.strip())
    if not matched:
      raise ValueError(
        f'{spec.name}: the pattern {pattern!r} matches no site; the sites '
        f'are {", ".join(sites)}'
      )
    found |= set(matched)
  return [path for path in sites if path in found]


def _options(module) -> set[str]:
  fields = {field.name for field in dataclasses.fields(module)}
  return fields - {'parent', 'name'}


def _check(spec: Spec, known: set[str]) -> None:
  unknown = sorted(set(dict(spec.options)) - known)
  if unknown:
    raise ValueError(
      f'{spec.name} has no option {", ".join(unknown)}; it has '
      f'{", ".join(sorted(known)) or "none"}'
    )


def _find(name: str, registry, kind: str):
  if name not in registry:
    raise ValueError(
      f'there is no {kind} {name!r}; there are {", ".join(registry)}'
    )
  return registry[name]


def _free_name(name: str, taken: set[str]) -> str:
  """lora, lora_2, lora_3: adapters of one name stay apart."""
  free, i = name, 2
  while free in taken:
    free, i = f'{name}_{i}', i + 1
  taken.add(free)
  return free
