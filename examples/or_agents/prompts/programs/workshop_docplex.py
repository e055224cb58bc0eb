# SPDX-License-Identifier: Apache-2.0
import json

from docplex.mp.model import Model

profit = {'tables': 30, 'chairs': 20}
wood = {'tables': 4, 'chairs': 2}

model = Model()
x = model.integer_var_dict(list(profit), lb=0)
model.maximize(model.sum(profit[i] * x[i] for i in profit))
model.add_constraint(model.sum(wood[i] * x[i] for i in wood) <= 40)
model.add_constraint(model.sum(x.values()) <= 16)  # hours
solution = model.solve()

status = model.solve_details.status  # such as 'integer optimal solution'
answer = {'status': status, 'objective': None}
if solution:
  answer['status'] = 'optimal'
  answer['objective'] = solution.objective_value
  answer['variables'] = {i: solution[x[i]] for i in x}
elif 'infeasible' in status:
  answer['status'] = 'infeasible'
elif 'unbounded' in status:
  answer['status'] = 'unbounded'
print(json.dumps(answer))
