# SPDX-License-Identifier: Apache-2.0
"""Three tasks of the agent layer against a server, and what came of them.

  python -m moepeft.serve --model=smollm2 --adapter=dpo=RUN --places=2048
  python scripts/agent_smollm2.py http://127.0.0.1:8000/v1 RUN [MODEL ...]

RUN is a work directory of moepeft.train, which the third task is about. Of each
model (all of the server's unless some are named) it prints what was asked, what
the model called and said, and whether the task was done, as Markdown. With
SmolLM2-135M a model takes 70 to 110 s on two cores, and fails much. A skill,
its tools and its instructions have 940 tokens: --places=2048 has room for more.
"""

import sys
import time
from typing import Literal

import openai
import pydantic

from moepeft.agent import skills
from moepeft.agent.agent import Agent
from moepeft.agent.chat_model import ServerModel
from moepeft.agent.loop import Budget
from moepeft.agent.structured_output import ask_structured
from moepeft.agent.tools import make_tool

_WIDE = 160
# A reply that never ends is broken off here.
OPTIONS = {'temperature': 0, 'max_tokens': 120}
FACTS = 'The run law-7 trained LoRA for 300 steps. It did not diverge.'


class Run(pydantic.BaseModel):
  """A record of a training run."""

  name: str
  method: Literal['lora', 'molora', 'mov']
  steps: int
  diverged: bool


def add(a: int, b: int) -> int:
  """Adds two numbers.

  Args:
    a: the first number.
    b: the second number.
  """
  return a + b


def multiply(a: int, b: int) -> int:
  """Multiplies two numbers.

  Args:
    a: the first number.
    b: the second number.
  """
  return a * b


def show(event) -> None:
  """A line for each call and result."""
  if event['event'] == 'called':
    for call in event['calls']:
      function = call['function']
      say(f'-> {function["name"]} {function["arguments"]}')
  if event['event'] == 'returned':
    say(f'<- {"error: " if event["failed"] else ""}{event["text"]}')


def say(text: str) -> None:
  """A line of the transcript, cut."""
  text = ' '.join(text.split())
  print('   ', text if len(text) <= _WIDE else f'{text[: _WIDE - 3]}...')


def ask(model: ServerModel, tools, question: str, wanted: str, **parts) -> None:
  """Asks, and says whether the answer has what is wanted in it."""
  options = {**OPTIONS, **parts.pop('options', {})}
  budget = Budget(steps=4)
  agent = Agent(model, tools, budget=budget, options=options, **parts)
  agent.on_event = show
  outcome = agent.ask(question)
  say(f'[{outcome.state}] {outcome.text or outcome.why}')
  done = outcome.state == 'answered' and wanted in outcome.text
  print(
    f'    {"done" if done else "NOT done"}: {outcome.steps} requests, '
    f'{outcome.calls} calls, {outcome.tokens:,} tokens'
  )


def forced(name: str) -> dict:
  """Options that force the first call."""
  choice = {'type': 'function', 'function': {'name': name}}
  return {'tool_choice': choice}


def calculate(model: ServerModel) -> None:
  """Task 1: 17 times 23 by a calculator, which is 391."""
  tools, question = (
    [make_tool(add), make_tool(multiply)],
    'What is 17 times 23?',
  )
  for what, parts in (
    ('tools offered', {}),
    ('a call required', {'options': {'tool_choice': 'required'}}),
    ('multiply forced', {'options': forced('multiply')}),
    ('ReAct', {'form': 'react'}),
  ):
    print(f'\n- {question} ({what})\n')
    ask(model, tools, question, '391', **parts)


def record(model: ServerModel) -> None:
  """Task 2: a sentence as an instance of a pydantic model."""
  print(f'\n- {FACTS} (as a record, by its JSON schema)\n')
  question = f'{FACTS}\nFill in the record of this run as JSON.'
  messages = [{'role': 'user', 'content': question}]
  try:
    run_record = ask_structured(model, Run, messages, options=OPTIONS)
  except ValueError as e:
    say(f'[no instance] {e}')
    return
  wanted = Run(name='law-7', method='lora', steps=300, diverged=False)
  wrong = [k for k, v in wanted if getattr(run_record, k) != v]
  say(repr(run_record))
  print(f'    {"NOT done: wrong " + ", ".join(wrong) if wrong else "done"}')


def read_run(model: ServerModel, run: str) -> None:
  """Task 3: the skill read-training-run on a real run."""
  shipped_skills = skills.find_skills(
    [skills.BUILTIN_SKILLS / 'read-training-run']
  )
  question = f'How did the training run in {run} go?'
  for what, options in (
    ('skill offered', {}),
    ('load_skill forced', forced('load_skill')),
    ('run_skill_script forced', forced('run_skill_script')),
  ):
    print(f'\n- {question} ({what})\n')
    tools, system = (
      skills.skill_tools(shipped_skills),
      skills.skills_prompt(shipped_skills),
    )
    # "The run went well, from a loss of 0.69 to 0.31" would have these.
    ask(model, tools, question, '0.3', options=options, system=system)


def main(url: str, run: str, *names: str) -> None:
  """The tasks with each model."""
  client = openai.OpenAI(base_url=url, api_key='none')
  for name in names or [model.id for model in client.models.list()]:
    begun = time.monotonic()
    print(f'\n### {name}')
    model = ServerModel(client, name, stream=False)
    calculate(model)
    record(model)
    read_run(model, run)
    print(f'\n{time.monotonic() - begun:.0f} s')


if __name__ == '__main__':
  if len(sys.argv) < 3:
    sys.exit(__doc__)
  main(*sys.argv[1:])
