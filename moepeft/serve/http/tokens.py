# SPDX-License-Identifier: Apache-2.0
"""POST /tokenize and /detokenize: text to ids as a prompt's, and back."""

from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.serve.http import requests
from moepeft.serve.http.body import read
from moepeft.serve.http.chat import planned
from moepeft.serve.http.schemas import Detokenize, Tokenize
from moepeft.serve.http.service import Service


async def tokenize(service: Service, request: Request) -> JSONResponse:
  """{model, prompt} or {model, messages, tools} -> {tokens, count}."""
  asked = await read(request, Tokenize, service.limits.body)
  model, words = service.find(asked.model), service.words
  if asked.messages is None:
    ids = await words.away(words.plain, asked.prompt)
  else:
    plan = planned(service, model, asked.tools, None, True)
    ids = await words.away(words.chat, asked.messages, model.voice, plan)
  found = {
    'tokens': list(ids),
    'count': len(ids),
    'max_model_len': service.engine.max_model_len - model.before,
  }
  return JSONResponse(found)


async def detokenize(service: Service, request: Request) -> JSONResponse:
  """{model, tokens} -> {prompt}."""
  asked = await read(request, Detokenize, service.limits.body)
  service.find(asked.model)
  requests.check_ids(asked.tokens, service.engine.vocab, 'tokens')
  words = service.words
  text = await words.away(words.decode, asked.tokens)
  return JSONResponse({'prompt': text})
