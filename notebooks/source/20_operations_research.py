# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Operations research by several agents
#
# A problem in words goes in, an optimal value comes out, and its user has to be
# able to trust it. A language model is poor at computing an optimum and good at
# writing one down as a program. So several agents share the work: one lists the
# components, one formulates, several write programs, a solver runs them, errors
# go back for repair, and the programs vote. This notebook writes that pipeline
# by hand, compares it with `examples/or_agents`, checks generated problems
# against solvers, and computes when a vote helps and when it does not.
#
# The model is **scripted**: its replies, with their errors, are written in the
# notebook. What is real are the solver, the pipeline, the checks and the
# arithmetic of the vote.
#
# ## What you will understand
#
# - what components, a formulation and a program of a linear problem are, and
#   why rounding is not integer programming;
# - how errors of programs are found, described to the model and repaired;
# - what can be verified without trusting the model: feasibility, a bound, a
#   second solver, an enumeration;
# - for which accuracies and which kinds of errors a vote of $n$ programs is
#   better than one program;
# - why agents that make the same mistake cannot outvote it.
#
# About 70 minutes. Before it: notebook 19 (agents). It needs
# `pip install 'moepeft[agent,or]'` and a checkout of the repository for
# `examples`.
# %% [markdown] lang="zh"
# # 多个 agent 做运筹学
#
# 输入一道文字题，输出一个最优值，而且使用者必须能够信任它。
# 语言模型不擅长算出最优值，却擅长把问题写成程序。
# 于是几个 agent 分工：一个列出要素，一个建立数学模型，
# 几个写程序，求解器运行它们，错误退回去修补，最后程序投票。
# 本 notebook 手写这条流水线，与 `examples/or_agents` 比较，
# 用求解器检查生成的题目，并计算投票什么时候有用、什么时候没用。
#
# 模型是**脚本**：它的回答连同其中的错误，都写在 notebook 里。真实的是求解器、
# 流水线、检查和投票的数学。
#
# ## 你将理解什么
#
# - 线性问题的要素、数学模型和程序各是什么，为什么取整不是整数规划；
# - 程序的错误怎样发现、怎样告诉模型、怎样修补；
# - 不信任模型也能验证什么：可行性、界、第二个求解器、穷举；
# - 在怎样的准确率、怎样的错误之下，$n$ 个程序投票好于一个程序；
# - 为什么犯同样错误的 agent 无法靠投票纠正它。
#
# 大约 70 分钟。先修：notebook 19（agent）。需要
# `pip install 'moepeft[agent,or]'`，以及仓库的一份检出（用到 `examples`）。
# %%
import collections
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

import moepeft
from moepeft.agent.chat_model import ChatReply

sys.path.insert(0, str(Path(moepeft.__file__).parents[1]))
from examples.or_agents import languages, pipeline  # noqa: E402
from examples.or_agents import problem as problem_lib  # noqa: E402
from examples.or_agents.families import Scale  # noqa: E402
from examples.or_agents.generate import samples  # noqa: E402
from examples.or_agents.vote import agree, vote  # noqa: E402

# %% [markdown] lang="en"
# ## From words to a formulation
#
# The text is `TEXT` in the next cell. **Variables**: pots of noodles $x_1$ and
# of rice $x_2$, whole numbers. **Objective**: the largest profit.
# **Constraints**: hours of the stove, hours of the cooks, the order.
#
# $$
# \max\ 90 x_1 + 120 x_2 \quad \text{s.t.} \quad
# 2 x_1 + 3 x_2 \le 25,\quad 3 x_1 + 2 x_2 \le 21,\quad x_2 \ge 2,\quad
# x \in \mathbb Z_{\ge 0}^2
# $$
#
# A short JSON form of it holds the same and is easy to check: `s` the sense
# (`max` or `min`), `v` a letter for each variable (`i` integer, `c` continuous,
# `b` binary), `o` the coefficients of the objective, `c` the constraints (a row
# has the coefficients, the relation and the right side), `l` and `u` the bounds
# of the variables (0 and none if left out; 0 and 1 of a binary one).
# %% [markdown] lang="zh"
# ## 从文字到数学模型
#
# 题目是下一个单元中的 `TEXT`。**变量**：面条 $x_1$ 锅、米饭 $x_2$ 锅，
# 都是整数。**目标**：利润最大。**约束**：灶台小时、厨师小时、订单。
#
# $$
# \max\ 90 x_1 + 120 x_2 \quad \text{s.t.} \quad
# 2 x_1 + 3 x_2 \le 25,\quad 3 x_1 + 2 x_2 \le 21,\quad x_2 \ge 2,\quad
# x \in \mathbb Z_{\ge 0}^2
# $$
#
# 一个简短的 JSON 形式含有同样的内容，也容易检查：`s` 是方向（`max` 或 `min`），
# `v` 每个变量一个字母（`i` 整数，`c` 连续，`b` 二元），`o` 是目标的系数，
# `c` 是约束（一行有系数、关系符和右端项），`l` 和 `u` 是变量的下界和上界
# （省略时为 0 和无上界，二元变量为 0 和 1）。
# %%
TEXT = (
  'A canteen cooks noodles and rice in whole pots. A pot of noodles earns 90 '
  'and takes 2 hours of the stove and 3 hours of a cook. A pot of rice earns '
  '120 and takes 3 hours of the stove and 2 hours of a cook. Each day there '
  'are 25 hours of the stove and 21 hours of cooks, and at least 2 pots of '
  'rice are ordered. How many pots of each earn the most?'
)
RIGHT = {
  's': 'max',
  'v': 'ii',
  'o': [90, 120],
  'c': [[2, 3, '<=', 25], [3, 2, '<=', 21], [0, 1, '>=', 2]],
}


def arrays(form):
  """(costs to minimize, matrix, lower and upper sides, bounds)."""
  n, inf = len(form['v']), math.inf
  rows = np.array([row[:n] for row in form['c']], float).reshape(-1, n)
  low = [-inf if row[n] == '<=' else row[n + 1] for row in form['c']]
  high = [inf if row[n] == '>=' else row[n + 1] for row in form['c']]
  lower = form.get('l') or [0] * n
  upper = form.get('u') or [1 if k == 'b' else None for k in form['v']]
  bounds = Bounds(
    [-inf if v is None else v for v in lower],
    [inf if v is None else v for v in upper],
  )
  sign = -1 if form['s'] == 'max' else 1
  return sign * np.array(form['o'], float), rows, low, high, bounds


STATUS = {0: 'optimal', 2: 'infeasible', 3: 'unbounded'}


def solve(form):
  """(status, value, point) by scipy, whose solver is HiGHS."""
  cost, rows, low, high, bounds = arrays(form)
  result = milp(
    cost,
    integrality=[kind != 'c' for kind in form['v']],
    bounds=bounds,
    constraints=[LinearConstraint(rows, low, high)] if len(rows) else (),
    options={'mip_rel_gap': 0},
  )
  status = STATUS.get(result.status, 'error')
  if status != 'optimal':
    return status, None, ()
  value = float(np.dot(form['o'], result.x))
  return status, value, tuple(float(v) for v in result.x)


relaxed = {**RIGHT, 'v': 'cc'}
print('integer ', solve(RIGHT))
print('relaxed ', solve(relaxed))


# %% [markdown] lang="en"
# ## Rounding is not integer programming
#
# With two variables one can draw it. The relaxed problem (without $\mathbb Z$)
# has its optimum at a corner. Rounding that corner to the nearest whole point
# leaves the feasible set, and rounding down gives a worse plan than the best.
# The optimum of the relaxation is an upper *bound* of the integer one, and a
# solver closes the gap between bound and best plan by branching (split on a
# fractional variable, solve both halves, drop halves whose bound is not
# better).
#
# An enumeration of all whole points is an independent check of the solver.
# %% [markdown] lang="zh"
# ## 取整不是整数规划
#
# 两个变量可以画出来看。松弛问题（去掉 $\mathbb Z$）的最优解在顶点。
# 把顶点取整到最近的整点就离开了可行域，向下取整得到的方案又不如最好的。
# 松弛问题的最优值是整数问题的*上界*；求解器通过分支来缩小界与最好方案之间的差距
# （在取分数的变量上一分为二，分别求解，丢掉界不更好的一半）。
#
# 穷举所有整点，是对求解器的独立检验。
# %%
def is_feasible(form, point, tolerance=1e-9):
  _, rows, low, high, bounds = arrays(form)
  left = rows @ np.array(point)
  return bool(
    (left >= np.array(low) - tolerance).all()
    and (left <= np.array(high) + tolerance).all()
    and (point >= bounds.lb - tolerance).all()
    and (point <= bounds.ub + tolerance).all()
  )


points = [
  p
  for p in itertools.product(range(13), repeat=2)
  if is_feasible(RIGHT, np.array(p))
]
profits = {p: float(np.dot(RIGHT['o'], p)) for p in points}
best = max(profits, key=profits.get)
_, value, point = solve(RIGHT)
_, bound, corner = solve(relaxed)
assert profits[best] == value and np.allclose(best, point), 'enumeration'
assert value < bound, 'the relaxation bounds the integer optimum from above'
nearest = np.round(corner)
down = tuple(int(v) for v in np.floor(corner))
assert not is_feasible(RIGHT, nearest) and profits[down] < value
print(
  f'{len(points)} plans; corner {corner} rounds to {nearest}: not feasible;'
  f' rounded down {profits[down]:.0f}; best {value:.0f}; bound {bound:.0f}'
)
# %%
fig, axis = plt.subplots(figsize=(5.5, 3), dpi=72)
x = np.linspace(0, 8, 200)
edge = np.minimum((25 - 2 * x) / 3, (21 - 3 * x) / 2)
axis.fill_between(x, 2, edge, where=edge >= 2, color='lightsteelblue')
axis.plot(*zip(*points, strict=True), 'k.', ms=4)
axis.plot(x, (value - 90 * x) / 120, 'g--', lw=1, label=f'profit {value:.0f}')
axis.plot(*corner, 'r^', label='corner of the relaxation')
axis.plot(*nearest, 'rx', label='rounded: not feasible')
axis.plot(*best, 'go', label='best whole plan')
axis.set(xlabel='pots of noodles', ylabel='pots of rice', ylim=(0, 9.5))
axis.legend(fontsize=7)
fig.tight_layout()


# %% [markdown] lang="en"
# ## The agents
#
# An agent is a prompt and a reply of a model. In order:
#
# 1. *components*: what are sets, numbers, variables, objective, constraints?
# 2. *verify_components*: compare with the text; `OK` or faults, which are
#    corrected once.
# 3. *formulation* and *verify_formulation*: the same for the mathematics.
# 4. *program*: here the JSON form, which is solved and not executed. Where a
#    model writes Python, the program has to run in a sandbox: it is untrusted
#    text.
# 5. *repair*: sees its own answer and the error, or the solver's verdict that
#    there is no optimum, and answers anew.
# 6. the *vote*, which is no model but code.
#
# Every agent sees the original text, so that an error of an early agent can
# still be noticed by a late one. The model here takes its replies from a list.
# %% [markdown] lang="zh"
# ## 各个 agent
#
# 一个 agent 就是一个 prompt 加模型的一个回答。依次是：
#
# 1. *components*：集合、数字、变量、目标、约束各是什么？
# 2. *verify_components*：与原文比较；回答 `OK` 或列出错误，错误改正一次。
# 3. *formulation* 与 *verify_formulation*：对数学模型做同样的事。
# 4. *program*：这里是 JSON 形式，只求解，不执行。如果模型写的是 Python，
#    程序必须在沙箱里运行：它是不可信的文本。
# 5. *repair*：看到自己的回答和错误，或求解器“没有最优解”的结论，重新回答。
# 6. *vote*，投票，不是模型，是代码。
#
# 每个 agent 都看到原文，这样早期 agent 的错误还有机会被后面的发现。
# 这里的模型从一个列表里取回答。
# %%
class ScriptedModel:
  """Gives the replies of a list; `asked` has the requests."""

  def __init__(self, replies):
    self.replies, self.asked = list(replies), []

  def __call__(self, messages):
    self.asked.append(messages)
    return self.replies.pop(0)


def user(text):
  return {'role': 'user', 'content': text}


def write_verified(model, task):
  """A draft, its check, and one correction if the check has faults."""
  question = user(f'{task}\nProblem: {TEXT}')
  draft = model([question])
  faults = model([user(f'Check this: {draft}\nProblem: {TEXT}')])
  if faults.strip().strip('.').upper() == 'OK':
    return draft
  answer = {'role': 'assistant', 'content': draft}
  return model([question, answer, user(f'Correct: {faults}')])


def run(text):
  """(status, value, output) of a reply that should be the JSON form."""
  try:
    form = json.loads(text)
    n = len(form['v'])
    sizes = {len(form['o']), *(len(row) - 2 for row in form['c'])}
    if sizes != {n}:
      return 'error', None, f'{n} variables, but rows of {sorted(sizes)}'
    status, value, _ = solve(form)
  except (ValueError, KeyError, TypeError) as error:
    return 'error', None, f'{type(error).__name__}: {error}'
  return status, value, f'the solver reports: {status}'


# %%
@dataclasses.dataclass
class Program:
  statuses: list
  value: float | None

  @property
  def repairs(self):
    return len(self.statuses) - 1


def write_program(model, formulation, max_repairs=6):
  """A program, repaired until it has an optimum or repeats itself."""
  question = user(
    f'Write the JSON form.\nProblem: {TEXT}\nFormulation: {formulation}'
  )
  messages, statuses, previous = [question], [], None
  while True:
    text = model(messages)
    if statuses and statuses[-1] != 'error' and text == previous:
      return Program(statuses, None)  # it confirms that there is no optimum
    status, value, output = run(text)
    statuses.append(status)
    if status == 'optimal' or len(statuses) > max_repairs:
      return Program(statuses, value)
    previous, answer = text, {'role': 'assistant', 'content': text}
    messages = [question, answer, user(f'{output}. Write it again.')]


def pipeline_by_hand(model, programmers=1):
  write_verified(model, 'List the components.')
  formulation = write_verified(model, 'Formulate it in LaTeX.')
  return [write_program(model, formulation) for _ in range(programmers)]


# %% [markdown] lang="en"
# ## Errors, repairs and a vote
#
# The script has the errors that real models make most often. The first analyst
# forgets the order of rice, and the verifier says so. The first programmer
# writes a row that is too short (an error), then takes the order for 20 pots
# (infeasible), then it is right. The second is right at once. The third forgets
# that pots are whole: its program runs and *has* an optimum, but that of
# another problem. No error message shows this; the vote removes it.
# %% [markdown] lang="zh"
# ## 错误、修补与投票
#
# 脚本里放的是真实模型最常犯的错误。第一位分析师漏掉米饭的订单，校验者指出来。
# 第一位程序员先写了一行缺项（error），接着把订单看成 20 锅（infeasible），
# 然后才对。第二位一次就对。第三位忘了锅数是整数：程序能运行，也*有*最优值，
# 但那是另一个问题的最优值。没有任何错误信息指出这一点，投票可以把它排除。
# %%
short = json.dumps({**RIGHT, 'c': [[2, 3, '<=', 25], [3, '<=', 21]]})
twenty = json.dumps({**RIGHT, 'c': [*RIGHT['c'][:2], [0, 1, '>=', 20]]})
right, whole_forgotten = json.dumps(RIGHT), json.dumps(relaxed)
TALK = [
  'Variables: x1, x2 whole. Stove 25 h, cooks 21 h.',
  'The order of 2 pots of rice is missing.',
  'Variables: x1, x2 whole. Stove 25 h, cooks 21 h, x2 at least 2.',
  r'\max 90 x_1 + 120 x_2 ...',
  'OK.',
]
PROGRAMS = [short, twenty, right, right, whole_forgotten]
model = ScriptedModel(TALK + PROGRAMS)
programs = pipeline_by_hand(model, programmers=3)
for program in programs:
  print(program.statuses, program.value, f'{program.repairs} repairs')
winner, group = vote([p.value for p in programs], [p.repairs for p in programs])
print(
  f'the vote: {winner:.0f} by programs {group}; {len(model.asked)} requests'
)
assert not model.replies and winner == value == 1020
assert group == (0, 1) and agree(programs[2].value, bound)


# %% [markdown] lang="en"
# ## Equal to the example's pipeline
#
# `examples/or_agents` has the same stages with longer prompts (files in
# `prompts/`, in English and Chinese) and other modeling languages. Given the
# same replies it has to come to the same statuses, repairs, value and number of
# requests.
# %% [markdown] lang="zh"
# ## 与示例的流水线相等
#
# `examples/or_agents` 有同样的阶段，prompt 更长（在 `prompts/` 里，有中英文），
# 还支持其他建模语言。给它同样的回答，它必须得到同样的状态、修补次数、
# 值和请求数。
# %%
def chat_model_of(script):
  """The script as the package's ChatModel."""

  def call(request, on_text, seconds):
    text = script(request['messages'])
    return ChatReply({'role': 'assistant', 'content': text})

  return call


replies = TALK + PROGRAMS[:3]
ours, theirs = ScriptedModel(replies), ScriptedModel(replies)
(program,) = pipeline_by_hand(ours)
report = pipeline.solve_text(
  TEXT,
  chat_model_of(theirs),
  languages.choose_languages(['json']),
  None,
  pipeline.Settings(),
)
(their_program,) = report.programs
assert [e.status for e in their_program.executions] == program.statuses
assert their_program.repairs == program.repairs == 2
assert agree(report.value, program.value)
assert len(theirs.asked) == len(ours.asked) and not theirs.replies
assert all(TEXT in m[0]['content'] for m in theirs.asked), 'all see the text'
print(
  report.status, report.value, report.agreeing, f'{len(theirs.asked)} requests'
)
# %% [markdown] lang="en"
# ## Problems whose answer is known
#
# To measure such agents (or to train a model for them) one needs problems with
# optima that are known. The generator of the example goes the other way round:
# it draws a problem of one of ten families, solves it, and puts it into words,
# each number exactly once. So no one has to find the answer from the words, and
# it can be checked again. The next cell draws 60 problems and solves their JSON
# form with the function of this notebook. Both use HiGHS, so this checks how
# the form is read, not the solver and not the words; enumeration checks the
# solver where all variables are binary and few.
# %% [markdown] lang="zh"
# ## 答案已知的题目
#
# 要衡量这样的 agent（或为它们训练模型），需要最优值已知的题目。
# 示例的生成器反过来做：先抽取十类问题之一的一个实例，求解，再写成文字，
# 每个数字恰好出现一次。所以答案不必从文字中求出，而且可以复查。
# 下一个单元抽 60 道题，用本 notebook 的函数求解它们的 JSON 形式。
# 两边都用 HiGHS，所以检查的是对 JSON 形式的读取，不是求解器，也不是文字；
# 变量都是二元且不多时，用穷举检查求解器。
# %%
drawn = list(itertools.islice(samples(0, Scale()), 60))
counts, enumerated = collections.Counter(), 0
for sample in drawn:
  form = json.loads(sample.row['problem'])
  status, solver_value, point = solve(form)
  assert status == 'optimal' and agree(solver_value, sample.row['value'])
  assert is_feasible(form, np.array(point), 1e-6)
  theirs = problem_lib.solve(
    problem_lib.Problem.from_json(sample.row['problem'])
  )
  assert agree(theirs.value, solver_value)
  if set(form['v']) == {'b'} and len(form['v']) <= 9:
    values = [
      float(np.dot(form['o'], p))
      for p in itertools.product((0, 1), repeat=len(form['v']))
      if is_feasible(form, np.array(p))
    ]
    best_value = max(values) if form['s'] == 'max' else min(values)
    assert agree(best_value, sample.row['value'])
    enumerated += 1
  counts[sample.row['family']] += 1
print(dict(counts))
print(f'60 of 60 agree; {enumerated} of them were enumerated')
print(drawn[0].row['text'], '->', drawn[0].row['value'])
assert enumerated >= 3


# %% [markdown] lang="en"
# ## When does a vote help?
#
# Let each of $n$ programs be right with probability $p$, independently. The
# value of the largest group wins.
#
# **Wrong programs all agree** (the worst case). Then a majority must be right:
#
# $$
# P_n = \sum_{k > n/2} \binom{n}{k} p^k (1 - p)^{n - k}
# $$
#
# For odd $n$ this is above $p$ if and only if $p > \tfrac12$ (Condorcet's jury
# theorem), and then it goes to 1 as $n$ grows. Below one half a vote is worse
# than one program.
#
# **Wrong programs are wrong in $m$ equally likely ways.** Optimal values are
# real numbers, and different mistakes mostly give different ones, so two right
# programs can beat many wrong ones. With $n = 3$, $q = 1 - p$, and ties decided
# for the first program:
#
# $$
# P_3 = p^3 + 3 p^2 q + p q^2 \Bigl(1 - \frac1m\Bigr)
# $$
#
# The first two terms are two or three right ones. In the last, one is right,
# the two wrong ones differ, and in one case of three the right one is first.
# The advantage over one program is $P_3 - p = p q \bigl(p - \tfrac{q}{m}\bigr)$
# (exercise 1), so the vote helps as soon as $p > \frac{1}{m + 1}$.
# %% [markdown] lang="zh"
# ## 投票什么时候有用？
#
# 设 $n$ 个程序各自独立地以概率 $p$ 正确，最大一组的值胜出。
#
# **错误的程序都一致**（最坏情况）。这时必须多数正确：
#
# $$
# P_n = \sum_{k > n/2} \binom{n}{k} p^k (1 - p)^{n - k}
# $$
#
# $n$ 为奇数时，它大于 $p$ 当且仅当 $p > \tfrac12$（孔多塞陪审团定理），
# 并且随 $n$ 增大趋于 1。$p$ 低于二分之一时，投票反而比单个程序更差。
#
# **错误有 $m$ 种，等可能。** 最优值是实数，不同的错误大多给出不同的值，
# 所以两个正确的程序可以胜过许多错误的。取 $n = 3$，$q = 1 - p$，
# 平局时取第一个程序：
#
# $$
# P_3 = p^3 + 3 p^2 q + p q^2 \Bigl(1 - \frac1m\Bigr)
# $$
#
# 前两项是两个或三个正确。最后一项是一个正确、两个错误的互不相同，
# 其中三分之一的情况正确的排第一。相对一个程序的优势是
# $P_3 - p = p q \bigl(p - \tfrac{q}{m}\bigr)$（练习 1），
# 所以只要 $p > \frac{1}{m + 1}$，投票就有用。
# %%
def majority(n, p):
  """The probability that more than half of n are right."""
  return sum(
    math.comb(n, k) * p**k * (1 - p) ** (n - k)
    for k in range(n // 2 + 1, n + 1)
  )


def simulate(n, p, ways, rng, trials=1500):
  """The share of votes that are right, by the example's `vote`.

  A right program has the value 0; wrong ones have 1 to `ways`.
  """
  wrong = rng.integers(1, ways + 1, (trials, n))
  values = np.where(rng.random((trials, n)) < p, 0, wrong).astype(float)
  return np.mean([vote(row.tolist(), [0] * n)[0] == 0 for row in values])


def three(p, ways):
  q = 1 - p
  return p**3 + 3 * p**2 * q + p * q**2 * (1 - 1 / ways)


rng = np.random.default_rng(0)
for p in (0.3, 0.5, 0.7):
  for ways in (1, 4):
    expected, measured = three(p, ways), simulate(3, p, ways, rng)
    # Four standard errors of 1,500 trials.
    assert abs(expected - measured) < 4 * (expected / 1500) ** 0.5
    print(
      f'p = {p}, {ways} ways: one {p:.3f}, vote of three {expected:.3f} '
      f'(simulated {measured:.3f})'
    )
  assert math.isclose(three(p, 1), majority(3, p))
assert majority(9, 0.6) > majority(3, 0.6) > 0.6
assert majority(9, 0.4) < majority(3, 0.4) < 0.4
# %% [markdown] lang="en"
# **Agents are not independent.** The same model with the same text makes the
# same mistake. Take a share $\rho$ of cases in which all $n$ programs are
# copies of one draw, and independent draws otherwise: the accuracy is
# $\rho p + (1 - \rho) P_n$, at most $1 - \rho (1 - p)$ for any number of
# voters. Different modeling languages, prompts, models and temperatures are
# ways to lower $\rho$; more samples of one prompt are not.
# %% [markdown] lang="zh"
# **agent 并不独立。** 同一个模型看同一段文字，会犯同样的错误。
# 设有比例 $\rho$ 的情形，$n$ 个程序都是同一次抽取的副本，其余情形独立：
# 准确率是 $\rho p + (1 - \rho) P_n$，无论多少人投票都不超过
# $1 - \rho (1 - p)$。换建模语言、换 prompt、换模型、调温度，
# 都是降低 $\rho$ 的办法；对同一个 prompt 多采样几次则不是。
# %%
fig, (left, right_axis) = plt.subplots(1, 2, figsize=(7, 2.7), dpi=72)
grid = np.linspace(0, 1, 101)
left.plot(grid, grid, 'k:', lw=1, label='one program')
for n in (3, 9):
  left.plot(grid, majority(n, grid), label=f'{n}, errors agree')
left.plot(grid, three(grid, 10), '--', label='3, ten kinds of errors')
left.set(xlabel='accuracy p of a program', ylabel='accuracy of the vote')
sizes = np.arange(1, 22, 2)
for rho in (0, 0.3, 0.6):
  accuracy = [rho * 0.7 + (1 - rho) * majority(n, 0.7) for n in sizes]
  right_axis.plot(sizes, accuracy, 'o-', ms=3, label=f'rho = {rho}')
  assert accuracy[-1] < 1 - rho * 0.3 + 1e-12
right_axis.set(
  xlabel='programs n', title='p = 0.7, errors agree', ylim=(0.6, 1)
)
for axis in (left, right_axis):
  axis.legend(fontsize=7)
fig.tight_layout()
# %% [markdown] lang="en"
# ## Exercises
#
# 1. Derive $P_3 - p = p q (p - q / m)$ on paper, then check it on a grid of $p$
#    and $m$. For which $m$ does a vote of three help at $p = 0.2$?
# 2. A certificate that needs no solver: write the three constraints of the
#    relaxed problem as $A x \le b$ (the order is $-x_2 \le -2$) and find prices
#    $y \ge 0$ of them such that the cost of each pot at these prices is at
#    least its profit: $A^\top y \ge (90, 120)$. Then $b \cdot y$ bounds *every*
#    plan from above (weak duality). The dual problem asks for the smallest such
#    bound. Solve it with `solve`, check the prices by hand-written
#    inequalities, and show that the bound equals the value of the relaxation.
# 3. Answer only if at least $k$ of $n = 5$ programs agree. For $p = 0.6$ and
#    wrong programs that all agree, compute for $k = 3, 4, 5$ the *coverage*
#    (how often there is an answer) and the *accuracy of answers*, by the
#    binomial distribution and by simulation. What does the higher accuracy
#    cost?
#
# ## Interview questions
#
# **Why let a model write a program and not the answer?**
#
# <details><summary>Answer</summary>
#
# Finding an optimum is a search with exact arithmetic, which decoding tokens
# does badly; a solver does it with a proof of optimality. Writing the
# formulation is translation, which models do well, and its result can be read,
# checked, run, repaired and compared. The division also separates two kinds of
# errors: of modeling (the program answers another question) and of computing
# (which practically vanish). What remains hard is exactly the first kind, and
# no solver notices it.
# </details>
#
# **Five samples of one model agree on a value. How sure are you?**
#
# <details><summary>Answer</summary>
#
# Less than independence suggests. With independent errors and real-valued
# answers an accidental agreement of wrong programs is very unlikely. But
# samples share the text, the prompt and the training: an ambiguous sentence or
# an unusual convention misleads all of them in the same way. Measure it: the
# accuracy of unanimous answers on problems with known optima, by the kind of
# problem. Raise independence (other languages, models, wordings), and check
# what can be checked without a model: units, feasibility of a known plan,
# bounds, limiting cases.
# </details>
#
# ## In the package
#
# - {{examples.or_agents.pipeline.solve_text}} is the pipeline,
#   {{examples.or_agents.vote.vote}} the vote: values agree within a relative
#   tolerance, and of equal groups the one with fewer repairs wins.
# - {{examples.or_agents.execution.run_program}} runs Python programs in a
#   sandbox without network, with limits of time and memory;
#   {{examples.or_agents.languages.choose_languages}} lists the modeling
#   languages.
# - {{examples.or_agents.problem.Problem}} is the JSON form with strict checks,
#   solved by HiGHS or SCIP; {{examples.or_agents.generate.samples}} generates;
#   {{examples.or_agents.rewards.judge}} turns a solver's verdict into a reward
#   for training.
# - `examples/or_agents/README.md` has the command line and what was measured
#   with a small model, which fails; no strong model has been measured there.
# - Papers: OptiTrust arXiv:2508.03117, self-consistency (the vote of sampled
#   answers) arXiv:2203.11171, OptiMUS (agents for MILP) arXiv:2402.10172.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. 在纸上推导 $P_3 - p = p q (p - q / m)$，再在 $p$ 和 $m$ 的网格上验证。
#    $p = 0.2$ 时，$m$ 为多少三个程序投票才有用？
# 2. 一个不需要求解器的证书：把松弛问题的三个约束写成 $A x \le b$（订单是
#    $-x_2 \le -2$），为它们找价格 $y \ge 0$，
#    使每锅按这些价格的成本不低于它的利润：$A^\top y \ge (90, 120)$。
#    那么 $b \cdot y$ 是*每一个*方案的上界（弱对偶）。
#    对偶问题就是求最小的这种上界。用 `solve` 求解它，用手写的不等式检查价格，
#    并证明这个界等于松弛问题的值。
# 3. 只有 $n = 5$ 个程序中至少 $k$ 个一致时才回答。设 $p = 0.6$，
#    错误的程序都一致，对 $k = 3, 4, 5$ 用二项分布和模拟计算*覆盖率*
#    （多少情况下有回答）和*回答的准确率*。更高的准确率付出了什么代价？
#
# ## 面试题
#
# **为什么让模型写程序，而不是直接给答案？**
#
# <details><summary>答案</summary>
#
# 求最优值是带精确算术的搜索，逐 token 解码做不好；求解器能做，
# 而且附带最优性的证明。写数学模型是翻译，模型擅长，而且结果可以阅读、检查、
# 运行、修补和比较。这种分工还把两类错误分开：
# 建模的错误（程序回答了另一个问题）和计算的错误（几乎消失）。
# 剩下的难点正是前一类，求解器察觉不到它。
# </details>
#
# **同一个模型的五个样本给出一致的值。你有多大把握？**
#
# <details><summary>答案</summary>
#
# 比独立假设下的要小。如果错误独立、答案是实数，错误的程序偶然一致的可能性很小。
# 但这些样本共用同一段文字、同一个 prompt、同一次训练：
# 一句含糊的话或一个少见的约定会以同样的方式误导所有样本。要去测量：
# 在最优值已知的题目上，按题目类别统计一致答案的准确率。提高独立性（换语言、
# 换模型、换措辞），并检查不靠模型也能检查的东西：单位、已知方案的可行性、界、
# 极限情形。
# </details>
#
# ## 在 moepeft 中
#
# - {{examples.or_agents.pipeline.solve_text}} 是流水线，
#   {{examples.or_agents.vote.vote}} 是投票：值在相对容差内算一致，
#   同样大的组里修补少的胜出。
# - {{examples.or_agents.execution.run_program}} 在没有网络、
#   限制时间和内存的沙箱里运行 Python 程序；
#   {{examples.or_agents.languages.choose_languages}} 列出建模语言。
# - {{examples.or_agents.problem.Problem}} 是带严格检查的 JSON 形式，
#   由 HiGHS 或 SCIP 求解；{{examples.or_agents.generate.samples}} 生成题目；
#   {{examples.or_agents.rewards.judge}} 把求解器的结论变成训练用的奖励。
# - `examples/or_agents/README.zh.md` 有命令行用法，
#   以及用小模型测量的结果（失败）；那里没有测量过强模型。
# - 论文：OptiTrust arXiv:2508.03117，self-consistency（对采样的回答投票）
#   arXiv:2203.11171，OptiMUS（做 MILP 的 agent）arXiv:2402.10172。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: operations research
#
# ## Exercise 1
#
# $P_3 - p = p\,(p^2 + 3pq + q^2 - q^2/m - 1)$, and
# $1 = (p + q)^2 = p^2 + 2pq + q^2$, so the bracket is
# $pq - q^2/m = q\,(p - q/m)$.
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：运筹学
#
# ## 练习 1
#
# $P_3 - p = p\,(p^2 + 3pq + q^2 - q^2/m - 1)$，
# 而 $1 = (p + q)^2 = p^2 + 2pq + q^2$，所以括号里是
# $pq - q^2/m = q\,(p - q/m)$。
# %% tags=["solution"]
for p in np.linspace(0.05, 0.95, 19):
  for ways in (1, 2, 5, 50):
    gain = p * (1 - p) * (p - (1 - p) / ways)
    assert math.isclose(three(p, ways) - p, gain, abs_tol=1e-12)
    assert (gain > 1e-12) == (p > 1 / (ways + 1) + 1e-12)
helpful = [m for m in range(1, 20) if three(0.2, m) > 0.2 + 1e-12]
print('at p = 0.2 a vote helps from', helpful[0], 'kinds of errors on')
assert helpful[0] == 5  # p > 1 / (m + 1) means m > 4
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# The dual has a price for each constraint, $\ge 0$ for those with $\le$. The
# order $x_2 \ge 2$ is $-x_2 \le -2$.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 对偶问题给每个约束一个价格，对 $\le$ 的约束价格 $\ge 0$。
# 订单 $x_2 \ge 2$ 写成 $-x_2 \le -2$。
# %% tags=["solution"]
dual = {
  's': 'min',
  'v': 'ccc',
  'o': [25, 21, -2],
  'c': [[2, 3, 0, '>=', 90], [3, 2, -1, '>=', 120]],
}
_, dual_value, y = solve(dual)
print('prices of a stove hour, a cook hour, the order:', np.round(y, 3))
assert min(y) >= 0
assert 2 * y[0] + 3 * y[1] >= 90 - 1e-9, 'noodles'
assert 3 * y[0] + 2 * y[1] - y[2] >= 120 - 1e-9, 'rice'
assert agree(25 * y[0] + 21 * y[1] - 2 * y[2], dual_value)
assert agree(dual_value, bound), 'strong duality'
assert all(profit <= dual_value + 1e-9 for profit in profits.values())
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
# %% tags=["solution"]
rng, p, n = np.random.default_rng(1), 0.6, 5
right_counts = rng.binomial(n, p, 20_000)
for k in (3, 4, 5):
  weights = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
  is_right, is_wrong = sum(weights[k:]), sum(weights[: n - k + 1])
  coverage = is_right + is_wrong
  answered = (right_counts >= k) | (right_counts <= n - k)
  measured = answered.mean(), (right_counts[answered] >= k).mean()
  print(f'k = {k}: coverage {coverage:.3f}, accuracy {is_right / coverage:.3f}')
  assert np.allclose(measured, (coverage, is_right / coverage), atol=0.03)
assert is_right / coverage > 0.85 and coverage < 0.1
# %% [markdown] lang="en" tags=["solution"]
# The cost is coverage: unanimous answers are rare here and much more often
# right.
# %% [markdown] lang="zh" tags=["solution"]
# 代价是覆盖率：全部一致的回答在这里很少，但正确的比例高得多。
