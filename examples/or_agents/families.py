# SPDX-License-Identifier: Apache-2.0
"""Families of problems: each draws the fields of a text and their problem.

Fields are what a template puts into words: nested lists and mappings of names
and numbers. Every number of them stands in the text once. All other numbers
of the problem are 0, 1 and -1, which follow from the family.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from examples.or_agents.domains import Domain
from examples.or_agents.problem import (
  Constraint,
  Problem,
  Variable,
)
from moepeft.tasks.stable_random import StableRandom

PERIODS = ('morning', 'noon', 'afternoon', 'evening', 'night')


@dataclasses.dataclass(frozen=True)
class Scale:
  """The sizes of problems.

  Attributes:
    entities: the maximum number of products, sites, jobs, ...
    resources: the maximum number of resources or needs.
    largest: the maximum of a coefficient.
    varied: whether there are decimals, bounds and zero coefficients.
  """

  entities: int = 4
  resources: int = 4
  largest: int = 40
  varied: bool = True

  def __post_init__(self):
    if not 2 <= self.entities <= 4:
      raise ValueError(
        f'a problem has 2 to 4 entities of a kind; got {self.entities}'
      )
    if not 1 <= self.resources <= 4:
      raise ValueError(f'a problem has 1 to 4 resources; got {self.resources}')
    if not 9 <= self.largest <= 10_000:
      raise ValueError(
        f'the largest coefficient is from 9 to 10,000; got {self.largest}'
      )


@dataclasses.dataclass(frozen=True)
class Instance:
  """A problem and the fields that its text has.

  Attributes:
    fields: names and numbers by name, for a template.
    problem: its symbolic form.
    goal: the objective's meaning.
    variables, rows: the meaning of each variable and of each constraint.
  """

  fields: dict[str, Any]
  problem: Problem
  goal: str
  variables: Sequence[str]
  rows: Sequence[str]


Draw = Callable[[StableRandom, Domain, Scale], Instance]


def draw_production(
  rng: StableRandom, domain: Domain, scale: Scale
) -> Instance:
  """Product mix: profits, stocks of resources, bounds on sales."""
  items = rng.sample(domain.products, rng.randint(2, scale.entities))
  resources = rng.sample(domain.resources, _resource_count(rng, scale))
  uses = _sparse(rng, len(items), len(resources), scale)
  profits = [_number(rng, scale) for _ in items]
  limits = [rng.randint(3, 9) * scale.largest // 2 for _ in resources]
  lower = [rng.randint(1, 3) if _rarely(rng, scale) else 0 for _ in items]
  upper = [rng.randint(4, 30) if _rarely(rng, scale) else None for _ in items]
  whole = rng.random_bool()
  fields = {
    'items': [
      {
        'name': item,
        'profit': profits[i],
        'uses': _named(uses[i], resources),
        'lower': lower[i] or None,
        'upper': upper[i],
      }
      for i, item in enumerate(items)
    ],
    'resources': _entries(resources, limit=limits),
    'whole': whole,
  }
  kind = 'integer' if whole else 'continuous'
  variables = [
    Variable(f'x{i + 1}', kind, lower[i], upper[i]) for i in range(len(items))
  ]
  rows = [
    Constraint(tuple(column), '<=', limit)
    for column, limit in zip(zip(*uses, strict=True), limits, strict=True)
  ]
  return Instance(
    fields,
    Problem('max', tuple(variables), tuple(profits), tuple(rows)),
    'the profit',
    [f'the amount of {item}' for item in items],
    [f'the stock of {resource}' for resource in resources],
  )


def draw_covering(rng: StableRandom, domain: Domain, scale: Scale) -> Instance:
  """Packages of several contents that cover needs at the least cost."""
  sites = rng.sample(domain.sites, rng.randint(2, scale.entities))
  contents = rng.sample(domain.resources, _resource_count(rng, scale))
  amounts = _sparse(rng, len(sites), len(contents), scale)
  costs = [_number(rng, scale) for _ in sites]
  needs = [rng.randint(3, 9) * scale.largest // 2 for _ in contents]
  upper = [rng.randint(10, 60) if _rarely(rng, scale) else None for _ in sites]
  whole = rng.random_bool()
  fields = {
    'items': [
      {
        'name': site,
        'cost': costs[i],
        'holds': _named(amounts[i], contents),
        'upper': upper[i],
      }
      for i, site in enumerate(sites)
    ],
    'contents': _entries(contents, need=needs),
    'whole': whole,
  }
  kind = 'integer' if whole else 'continuous'
  variables = [
    Variable(f'x{i + 1}', kind, 0, upper[i]) for i in range(len(sites))
  ]
  rows = [
    Constraint(tuple(column), '>=', need)
    for column, need in zip(zip(*amounts, strict=True), needs, strict=True)
  ]
  return Instance(
    fields,
    Problem('min', tuple(variables), tuple(costs), tuple(rows)),
    'the cost',
    [f'packages from {site}' for site in sites],
    [f'the need of {content}' for content in contents],
  )


def draw_knapsack(rng: StableRandom, domain: Domain, scale: Scale) -> Instance:
  """Items of a value and a weight, and the weight that can be carried."""
  count = rng.randint(min(3, scale.entities), scale.entities + 1)
  items = rng.sample(domain.products, count)
  values = [_number(rng, scale) for _ in items]
  weights = [rng.randint(2, scale.largest) for _ in items]
  capacity = max(sum(weights) * rng.randint(40, 80) // 100, 1)
  fields = {
    'items': _entries(items, value=values, weight=weights),
    'capacity': capacity,
  }
  rows = [Constraint(tuple(weights), '<=', capacity)]
  return Instance(
    fields,
    Problem('max', _binaries(count), tuple(values), tuple(rows)),
    'the value',
    [f'whether the {item} is taken' for item in items],
    ['the weight of the load'],
  )


def draw_transport(rng: StableRandom, domain: Domain, scale: Scale) -> Instance:
  """Supplies at sites, demands of clients, and costs of each lane."""
  sites = rng.sample(domain.sites, rng.randint(2, min(3, scale.entities)))
  clients = rng.sample(domain.clients, rng.randint(2, scale.entities))
  supplies = [rng.randint(20, 90) for _ in sites]
  demands = [rng.randint(5, 50) for _ in clients]
  costs = [[_number(rng, scale) for _ in clients] for _ in sites]
  fields = {
    'sites': [
      {'name': site, 'supply': supplies[i], 'costs': _named(costs[i], clients)}
      for i, site in enumerate(sites)
    ],
    'clients': _entries(clients, demand=demands),
  }
  lanes = [(i, j) for i in range(len(sites)) for j in range(len(clients))]
  rows = [
    _indicator(lanes, lambda lane, i=i: lane[0] == i, '<=', supply)
    for i, supply in enumerate(supplies)
  ] + [
    _indicator(lanes, lambda lane, j=j: lane[1] == j, '>=', demand)
    for j, demand in enumerate(demands)
  ]
  variables = tuple(Variable(f'x{k + 1}') for k in range(len(lanes)))
  objective = tuple(costs[i][j] for i, j in lanes)
  return Instance(
    fields,
    Problem('min', variables, objective, tuple(rows)),
    'the cost of transport',
    [f'the amount from {sites[i]} to {clients[j]}' for i, j in lanes],
    [
      *(f'the supply of {site}' for site in sites),
      *(f'the demand of {client}' for client in clients),
    ],
  )


def draw_max_flow(rng: StableRandom, domain: Domain, scale: Scale) -> Instance:
  """A network with capacities, from one source to one sink."""
  middle = rng.sample(domain.clients, rng.randint(2, scale.entities))
  source, sink = rng.sample(domain.sites, 2)
  arcs = [(source, node) for node in middle if rng.randint(1, 4) > 1]
  arcs += [(node, sink) for node in middle if rng.randint(1, 4) > 1]
  arcs += [
    (a, b) for a in middle for b in middle if a != b and rng.randint(1, 4) == 1
  ]
  capacities = [rng.randint(2, scale.largest) for _ in arcs]
  if not any(a == source for a, _ in arcs):
    arcs, capacities = [(source, middle[0])], [rng.randint(2, scale.largest)]
  fields = {
    'source': source,
    'sink': sink,
    'arcs': [
      {'tail': tail, 'head': head, 'capacity': capacity}
      for (tail, head), capacity in zip(arcs, capacities, strict=True)
    ],
  }
  middle = [node for node in middle if any(node in arc for arc in arcs)]
  variables = tuple(
    Variable(f'x{k + 1}', 'continuous', 0, capacity)
    for k, capacity in enumerate(capacities)
  )
  rows = [
    Constraint(tuple((b == node) - (a == node) for a, b in arcs), '=', 0)
    for node in middle
  ]
  objective = tuple(int(tail == source) for tail, _ in arcs)
  return Instance(
    fields,
    Problem('max', variables, objective, tuple(rows)),
    'the flow out of the source',
    [f'the flow from {tail} to {head}' for tail, head in arcs],
    [f'what enters {node} and leaves it' for node in middle],
  )


def draw_assignment(
  rng: StableRandom, domain: Domain, scale: Scale
) -> Instance:
  """Each worker does one job; costs or scores of each pair."""
  count = rng.randint(2, scale.entities)
  workers = rng.sample(domain.workers, count)
  jobs = rng.sample(domain.jobs, count)
  costs = [[_number(rng, scale) for _ in jobs] for _ in workers]
  maximize = rng.random_bool()
  fields = {
    'workers': [
      {'name': worker, 'costs': _named(costs[i], jobs)}
      for i, worker in enumerate(workers)
    ],
    'jobs': jobs,
    'maximize': maximize,
  }
  pairs = [(i, j) for i in range(count) for j in range(count)]
  rows = [
    _indicator(pairs, lambda pair, i=i, axis=axis: pair[axis] == i, '=', 1)
    for axis in (0, 1)
    for i in range(count)
  ]
  sense = 'max' if maximize else 'min'
  objective = tuple(costs[i][j] for i, j in pairs)
  return Instance(
    fields,
    Problem(sense, _binaries(len(pairs)), objective, tuple(rows)),
    'the total score' if maximize else 'the total cost',
    [f'whether {workers[i]} does {jobs[j]}' for i, j in pairs],
    [
      *(f'the job of {worker}' for worker in workers),
      *(f'who does {job}' for job in jobs),
    ],
  )


def draw_scheduling(
  rng: StableRandom, domain: Domain, scale: Scale
) -> Instance:
  """Jobs on equally fast workers: the least time until all are done."""
  workers = rng.sample(domain.workers, 2)
  jobs = rng.sample(domain.jobs, rng.randint(3, scale.entities + 1))
  hours = [rng.randint(2, scale.largest) for _ in jobs]
  fields = {'workers': workers, 'jobs': _entries(jobs, hours=hours)}
  pairs = [(i, j) for i in range(len(jobs)) for j in range(len(workers))]
  # The last variable is the time at which the last worker is done.
  rows = [
    Constraint((*(int(i == job) for i, _ in pairs), 0), '=', 1)
    for job in range(len(jobs))
  ] + [
    Constraint(
      (*(hours[i] if j == worker else 0 for i, j in pairs), -1), '<=', 0
    )
    for worker in range(len(workers))
  ]
  variables = (*_binaries(len(pairs)), Variable(f'x{len(pairs) + 1}'))
  objective = (*[0] * len(pairs), 1)
  return Instance(
    fields,
    Problem('min', variables, objective, tuple(rows)),
    'the hour at which all jobs are done',
    [
      *(f'whether {workers[j]} does {jobs[i]}' for i, j in pairs),
      'the hour at which all jobs are done',
    ],
    [
      *(f'who does {job}' for job in jobs),
      *(f'the hours of {worker}' for worker in workers),
    ],
  )


def draw_shifts(rng: StableRandom, domain: Domain, scale: Scale) -> Instance:
  """Staff by shift, each of two periods in a row, that covers every period."""
  del domain
  periods = PERIODS[: rng.randint(3, scale.entities + 1)]
  needs = [rng.randint(1, scale.largest // 3) for _ in periods]
  spans = list(zip(periods, periods[1:], strict=False))
  wages = [rng.randint(20, 99) for _ in spans]
  fields = {
    'periods': _entries(periods, need=needs),
    'shifts': [
      {'first': first, 'second': second, 'wage': wage}
      for (first, second), wage in zip(spans, wages, strict=True)
    ],
  }
  rows = [
    _indicator(spans, lambda span, name=name: name in span, '>=', need)
    for name, need in zip(periods, needs, strict=True)
  ]
  variables = tuple(Variable(f'x{k + 1}', 'integer') for k in range(len(spans)))
  return Instance(
    fields,
    Problem('min', variables, tuple(wages), tuple(rows)),
    'the wages',
    [f'people in {first} and {second}' for first, second in spans],
    [f'the need of the {period}' for period in periods],
  )


def draw_bin_packing(
  rng: StableRandom, domain: Domain, scale: Scale
) -> Instance:
  """Items of a weight in as few containers as possible, one kind of them."""
  count = rng.randint(3, scale.entities + 1)
  items = rng.sample(domain.products, count)
  weights = [rng.randint(2, scale.largest) for _ in items]
  capacity = max(weights) + rng.randint(0, scale.largest)
  fields = {'items': _entries(items, weight=weights), 'capacity': capacity}
  # As many containers as items are enough: x[i, b], and then y[b].
  pairs = [(i, b) for i in range(count) for b in range(count)]
  rows = [
    Constraint((*(int(i == item) for i, _ in pairs), *[0] * count), '=', 1)
    for item in range(count)
  ] + [
    Constraint(
      (
        *(weights[i] if b == container else 0 for i, b in pairs),
        *(-capacity if b == container else 0 for b in range(count)),
      ),
      '<=',
      0,
    )
    for container in range(count)
  ]
  objective = (*[0] * len(pairs), *[1] * count)
  return Instance(
    fields,
    Problem('min', _binaries(len(pairs) + count), objective, tuple(rows)),
    'the number of containers',
    [
      *(f'whether {items[i]} is in container {b + 1}' for i, b in pairs),
      *(f'whether container {b + 1} is used' for b in range(count)),
    ],
    [
      *(f'the container of {item}' for item in items),
      *(f'the weight in container {b + 1}' for b in range(count)),
    ],
  )


def draw_set_cover(rng: StableRandom, domain: Domain, scale: Scale) -> Instance:
  """Sites that reach some clients each: the cheapest that reach them all."""
  sites = rng.sample(domain.sites, rng.randint(2, scale.entities))
  clients = rng.sample(domain.clients, rng.randint(2, scale.entities + 1))
  reach = [rng.sample(clients, rng.randint(1, len(clients))) for _ in sites]
  costs = [_number(rng, scale) for _ in sites]
  fields = {
    'sites': [
      {'name': site, 'cost': costs[i], 'reach': reach[i]}
      for i, site in enumerate(sites)
    ],
    'clients': clients,
  }
  rows = [
    _indicator(reach, lambda group, name=name: name in group, '>=', 1)
    for name in clients
  ]
  return Instance(
    fields,
    Problem('min', _binaries(len(sites)), tuple(costs), tuple(rows)),
    'the cost',
    [f'whether {site} is chosen' for site in sites],
    [f'the reach of {client}' for client in clients],
  )


FAMILIES: dict[str, Draw] = {
  'production': draw_production,
  'covering': draw_covering,
  'knapsack': draw_knapsack,
  'transport': draw_transport,
  'max_flow': draw_max_flow,
  'assignment': draw_assignment,
  'scheduling': draw_scheduling,
  'shifts': draw_shifts,
  'bin_packing': draw_bin_packing,
  'set_cover': draw_set_cover,
}


def _entries(names: Sequence[str], **columns: Sequence[float]) -> list[dict]:
  """One mapping for each name, with a number of each column."""
  return [
    {'name': name} | {key: column[i] for key, column in columns.items()}
    for i, name in enumerate(names)
  ]


def _named(numbers: Sequence[float], names: Sequence[str]) -> dict[str, float]:
  """The numbers that are not zero, by name."""
  return {
    name: number for name, number in zip(names, numbers, strict=True) if number
  }


def _binaries(count: int) -> tuple[Variable, ...]:
  return tuple(Variable(f'x{i + 1}', 'binary', 0, 1) for i in range(count))


def _indicator(
  columns: Sequence[Any],
  belongs: Callable[[Any], bool],
  relation: str,
  right: float,
) -> Constraint:
  """A sum of the variables whose column belongs."""
  return Constraint(
    tuple(int(belongs(column)) for column in columns), relation, right
  )


def _number(rng: StableRandom, scale: Scale) -> float:
  """A coefficient; with varied scales one in eight has a decimal."""
  number = rng.randint(2, scale.largest)
  if scale.varied and rng.randbelow(8) == 0:
    return number + rng.randint(1, 9) / 10
  return number


def _resource_count(rng: StableRandom, scale: Scale) -> int:
  return rng.randint(min(2, scale.resources), scale.resources)


def _rarely(rng: StableRandom, scale: Scale) -> bool:
  return scale.varied and rng.randbelow(4) == 0


def _sparse(
  rng: StableRandom, rows: int, columns: int, scale: Scale
) -> list[list[float]]:
  """A matrix; with varied scales a fourth is zero, but no row or column is."""
  matrix = [
    [rng.randint(1, scale.largest // 3) for _ in range(columns)]
    for _ in range(rows)
  ]
  for i in range(rows):
    for j in range(columns):
      column_rest = [matrix[k][j] for k in range(rows) if k != i]
      row_rest = [matrix[i][k] for k in range(columns) if k != j]
      if _rarely(rng, scale) and any(row_rest) and any(column_rest):
        matrix[i][j] = 0
  return matrix
