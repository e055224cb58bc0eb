# SPDX-License-Identifier: Apache-2.0
"""An agent that decides when and what to search."""

import re

from examples.knowledge_base.answer import NOT_IN_DOCUMENTS, Answer, support
from examples.knowledge_base.search import Hit, KnowledgeBase
from moepeft.agent.agent import Agent
from moepeft.agent.chat_model import ChatModel
from moepeft.agent.tools import make_tool

_SYSTEM = (
  'You answer questions on documents that you can search. Search again with '
  'other words, or for a name that a passage mentions, if something is '
  'missing. Put the number of each passage that you used in brackets after '
  f'the answer, as in [12]. If the documents do not say it, answer: '
  f'{NOT_IN_DOCUMENTS}. Do not search for greetings and thanks.'
)


class AgenticSearch:
  """Answers questions of one conversation.

  Attributes:
    agent: its memory has the conversation.
    hits: {id: hit} of the last question's searches.
  """

  def __init__(
    self,
    base: KnowledgeBase,
    model: ChatModel,
    k: int = 5,
    min_support: float = 0.7,
    form: str = 'native',
  ):
    """
    Args:
      min_support: the smallest support of an answer by its citations.
      form: the form of tool calls, of the `Agent`.
    """
    self.hits: dict[int, Hit] = {}
    self._min_support = min_support

    def search(query: str) -> str:
      """Searches the documents.

      Args:
        query: a question or words of it.
      """
      hits = base.search(query, k)
      self.hits |= {hit.id: hit for hit in hits}
      texts = [f'[{hit.id}] {hit.passage.indexed}' for hit in hits]
      return '\n\n'.join(texts) or 'no passage'

    tool = make_tool(search)
    self.agent = Agent(model, [tool], _SYSTEM, form=form)

  def ask(self, question: str) -> Answer:
    """The agent's answer; without citations if it did not search.

    Raises:
      ValueError: the agent did not come to an answer.
    """
    self.hits = {}
    outcome = self.agent.ask(question)
    if outcome.state != 'answered':
      raise ValueError(f'there is no answer ({outcome.state}): {outcome.why}')
    text = outcome.text.strip()
    if not self.hits:
      return Answer(text, draft=text)
    numbers = dict.fromkeys(int(n) for n in re.findall(r'\[(\d+)\]', text))
    cited = tuple(self.hits[n].passage for n in numbers if n in self.hits)
    plain = re.sub(r'\s*\[\d+\]', '', text)
    score = support(plain, question, cited)
    if NOT_IN_DOCUMENTS in plain.lower() or score < self._min_support:
      return Answer(NOT_IN_DOCUMENTS, (), score, text)
    return Answer(plain, cited, score, text)
