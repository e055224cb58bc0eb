# SPDX-License-Identifier: Apache-2.0
import json

import pyomo.environ as pyo

profit = {'tables': 30, 'chairs': 20}
wood = {'tables': 4, 'chairs': 2}

model = pyo.ConcreteModel()
model.x = pyo.Var(list(profit), domain=pyo.NonNegativeIntegers)
model.profit = pyo.Objective(
  expr=sum(profit[i] * model.x[i] for i in profit), sense=pyo.maximize
)
model.wood = pyo.Constraint(expr=sum(wood[i] * model.x[i] for i in wood) <= 40)
model.hours = pyo.Constraint(expr=sum(model.x[i] for i in profit) <= 16)

results = pyo.SolverFactory('appsi_highs').solve(model, load_solutions=False)
status = str(results.solver.termination_condition)
answer = {'status': status, 'objective': None}
if status == 'optimal':
  model.solutions.load_from(results)
  answer['objective'] = pyo.value(model.profit)
  answer['variables'] = {i: pyo.value(model.x[i]) for i in profit}
elif status == 'infeasibleOrUnbounded':
  answer['status'] = 'infeasible'
print(json.dumps(answer))
