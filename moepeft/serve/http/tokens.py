# SPDX-License-Identifier: Apache-2.0
"""POST /tokenize and /detokenize, as in vLLM."""

from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.serve.http import requests
from moepeft.serve.http.body import read_body
from moepeft.serve.http.chat import make_tool_plan
from moepeft.serve.http.schemas import Detokenize, Tokenize
from moepeft.serve.http.service import Service


async def tokenize(service: Service, request: Request) -> JSONResponse:
  """{model, prompt} or {model, messages, tools} -> {tokens, count}."""
  body = await read_body(request, Tokenize, service.limits.body)
  model, tokenizer = service.find(body.model), service.tokenizer
  if body.messages is None:
    ids = await tokenizer.run_in_thread(tokenizer.encode_prompt, body.prompt)
  else:
    plan = make_tool_plan(service, model, body.tools, None, True)
    ids = await tokenizer.run_in_thread(
      tokenizer.encode_chat, body.messages, model.chat_settings, plan
    )
  response = {
    'tokens': list(ids),
    'count': len(ids),
    'max_model_len': service.engine.max_model_len - model.soft_prompt_length,
  }
  return JSONResponse(response)


async def detokenize(service: Service, request: Request) -> JSONResponse:
  """{model, tokens} -> {prompt}."""
  body = await read_body(request, Detokenize, service.limits.body)
  service.find(body.model)
  requests.check_ids(body.tokens, service.engine.vocab, 'tokens')
  tokenizer = service.tokenizer
  text = await tokenizer.run_in_thread(tokenizer.decode, body.tokens)
  return JSONResponse({'prompt': text})
