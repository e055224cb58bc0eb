# SPDX-License-Identifier: Apache-2.0
import json

from pyscipopt import Model, quicksum

profit = {'tables': 30, 'chairs': 20}
wood = {'tables': 4, 'chairs': 2}

model = Model()
model.hideOutput()
x = {i: model.addVar(i, vtype='I', lb=0) for i in profit}
model.setObjective(quicksum(profit[i] * x[i] for i in profit), 'maximize')
model.addCons(quicksum(wood[i] * x[i] for i in wood) <= 40)
model.addCons(quicksum(x.values()) <= 16)  # hours
model.optimize()

status = model.getStatus()
answer = {'status': status, 'objective': None}
if status == 'optimal':
  answer['objective'] = model.getObjVal()
  answer['variables'] = {i: model.getVal(x[i]) for i in x}
elif status == 'inforunbd':
  answer['status'] = 'infeasible'
print(json.dumps(answer))
