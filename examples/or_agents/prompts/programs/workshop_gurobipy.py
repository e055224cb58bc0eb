# SPDX-License-Identifier: Apache-2.0
import json

import gurobipy as gp

profit = {'tables': 30, 'chairs': 20}
wood = {'tables': 4, 'chairs': 2}

model = gp.Model(env=gp.Env(params={'OutputFlag': 0}))
x = model.addVars(list(profit), vtype=gp.GRB.INTEGER, lb=0)
model.setObjective(x.prod(profit), gp.GRB.MAXIMIZE)
model.addConstr(x.prod(wood) <= 40)
model.addConstr(x.sum() <= 16)  # hours
model.optimize()

statuses = {
  gp.GRB.OPTIMAL: 'optimal',
  gp.GRB.INFEASIBLE: 'infeasible',
  gp.GRB.INF_OR_UNBD: 'infeasible',
  gp.GRB.UNBOUNDED: 'unbounded',
}
answer = {'status': statuses[model.Status], 'objective': None}
if model.Status == gp.GRB.OPTIMAL:
  answer['objective'] = model.ObjVal
  answer['variables'] = {i: x[i].X for i in x}
print(json.dumps(answer))
