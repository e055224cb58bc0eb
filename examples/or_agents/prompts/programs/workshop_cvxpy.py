# SPDX-License-Identifier: Apache-2.0
import json

import cvxpy as cp

names = ['tables', 'chairs']
x = cp.Variable(2, integer=True)
constraints = [
  x >= 0,
  4 * x[0] + 2 * x[1] <= 40,  # wood
  cp.sum(x) <= 16,  # hours
]
problem = cp.Problem(cp.Maximize(30 * x[0] + 20 * x[1]), constraints)
problem.solve(solver=cp.HIGHS)

answer = {'status': problem.status, 'objective': None}
if problem.status == 'optimal':
  answer['objective'] = float(problem.value)
  answer['variables'] = dict(zip(names, map(float, x.value), strict=True))
elif problem.status == 'infeasible_or_unbounded':
  answer['status'] = 'infeasible'
print(json.dumps(answer))
