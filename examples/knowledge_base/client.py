# SPDX-License-Identifier: Apache-2.0
"""Flags of the commands, and the server's models."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import openai

from examples.knowledge_base.search import (
  MODES,
  Embedder,
  KnowledgeBase,
  by_likelihood,
  by_sentences,
)
from examples.knowledge_base.stores import open_store
from moepeft.agent.chat_model import (
  ServerModel,
  choose_model,
  make_client,
)
from moepeft.agent.flags import command_parser
from moepeft.core import secrets, terminal

RERANKERS = ('none', 'sentences', 'likelihood')


def parser(name: str, description: str) -> argparse.ArgumentParser:
  """Makes a parser with the flags of the server."""
  arguments = command_parser(f'examples.{name}', description)
  add = arguments.add_argument
  add('--base_url', default='http://127.0.0.1:8000/v1', help='The server.')
  add('--model', default='', help="Default: the server's first model.")
  add('--embeddings', default='minilm', help='The model for embeddings.')
  return arguments


def add_search_flags(arguments: argparse.ArgumentParser) -> None:
  add = arguments.add_argument
  add('--documents', help='A folder of .md, .txt, .html and .pdf files.')
  add(
    '--store',
    default=':memory:',
    help='A file, faiss:FILE, milvus:FILE or postgresql://...',
  )
  add('--size', type=int, default=100, help='Tokens of a passage, about.')
  add('--overlap', type=int, default=20, help='Tokens that passages share.')
  add('--search', choices=MODES, default='hybrid')
  add('--rerank', choices=RERANKERS, default='sentences')
  add('--k', type=int, default=5, help='Passages that are returned.')


def connect(flags: argparse.Namespace) -> openai.OpenAI:
  """The client of --base_url; its key is in OPENAI_API_KEY."""
  return make_client(flags.base_url, os.environ.get('OPENAI_API_KEY', ''))


def chat_model(flags: argparse.Namespace, client: openai.OpenAI) -> ServerModel:
  """The model of --model.

  Raises:
    ReplyError: the server does not answer, or has no model.
  """
  return choose_model(client, flags.model)


def open_knowledge_base(
  flags: argparse.Namespace, client: openai.OpenAI
) -> KnowledgeBase:
  """Opens the store of the flags.

  Raises:
    ValueError: a flag is wrong.
  """
  if flags.k < 1:
    raise ValueError(f'--k={flags.k}: expected 1 or more')
  embed, rerank = Embedder(client, flags.embeddings), None
  if flags.rerank == 'sentences':
    rerank = by_sentences(embed)
  elif flags.rerank == 'likelihood':
    rerank = by_likelihood(client, chat_model(flags, client).name)
  store = open_store(flags.store, flags.embeddings)
  return KnowledgeBase(store, embed, flags.search, rerank)


def run(main: Callable[[Sequence[str] | None], None]) -> None:
  """Runs a command; prints errors of users and of the server as one line."""
  try:
    main(None)
  except (ValueError, OSError) as error:
    terminal.show(f'error: {secrets.redact(str(error))}', file=sys.stderr)
    sys.exit(2)
