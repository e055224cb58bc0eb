# SPDX-License-Identifier: Apache-2.0
"""POST /v1/embeddings, where the server was started with a model for it."""

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.inference import api
from moepeft.serve.embeddings.encoder import SentenceEmbedder
from moepeft.serve.http.body import read
from moepeft.serve.http.errors import (
  ApiError,
  invalid_request,
  model_not_found,
  refusal_error,
  unavailable,
)
from moepeft.serve.http.event_bridge import cancel_on_disconnect
from moepeft.serve.http.schemas import EmbeddingsBody
from moepeft.serve.http.service import Service


async def embeddings(service: Service, request: Request) -> JSONResponse:
  body = await read(request, EmbeddingsBody, service.limits.body)
  embedder = service.embedder
  if embedder is None:
    raise ApiError(
      404,
      'this server has no model for embeddings; start it with '
      '--embeddings=minilm',
      'model',
      'model_not_found',
    )
  if body.model != embedder.name:
    if body.model in service.models.names():
      raise invalid_request(
        f'the model {body.model!r} makes no embeddings; name {embedder.name!r}',
        'model',
      )
    raise model_not_found(body.model, [embedder.name])
  stats = request.scope['stats']
  stats.model = embedder.name
  texts, dimensions = _texts(body, service), _dimensions(body, embedder)
  seconds = service.limits.seconds
  try:
    work = service.vectors.submit(service.limits.queue, embedder.encode, texts)
    vectors, stats.prompt = await cancel_on_disconnect(
      request.receive, asyncio.wait_for(asyncio.wrap_future(work), seconds)
    )
  except TimeoutError:
    raise unavailable(
      f'the vectors were not there within {seconds:g} s; try again later, or '
      'send less',
      5,
      'timeout',
    ) from None
  except api.RequestRefused as e:
    raise refusal_error(e, 'input') from None
  except ValueError as e:
    raise invalid_request(f'input: {e}', 'input') from None
  return JSONResponse(
    {
      'object': 'list',
      'data': [
        {
          'object': 'embedding',
          'index': i,
          'embedding': _written(row, body.encoding_format),
        }
        for i, row in enumerate(_cut(vectors, dimensions))
      ],
      'model': embedder.name,
      'usage': {'prompt_tokens': stats.prompt, 'total_tokens': stats.prompt},
    }
  )


def _texts(body: EmbeddingsBody, service: Service) -> list[str]:
  texts = [body.input] if isinstance(body.input, str) else body.input
  if not isinstance(texts[0], str):
    raise invalid_request(
      'input holds token ids, which are of another tokenizer; send text',
      'input',
    )
  if len(texts) > service.limits.inputs:
    raise invalid_request(
      f'input has {len(texts):,} texts; at most {service.limits.inputs:,} are '
      'taken at once',
      'input',
    )
  if '' in texts:
    raise invalid_request('input holds an empty text; leave it out', 'input')
  return texts


def _dimensions(body: EmbeddingsBody, embedder: SentenceEmbedder) -> int:
  dimensions = body.dimensions or embedder.dimensions
  if dimensions > embedder.dimensions:
    raise invalid_request(
      f'dimensions is at most {embedder.dimensions} of {embedder.name}; got '
      f'{dimensions}',
      'dimensions',
    )
  return dimensions


def _cut(vectors: np.ndarray, dimensions: int) -> np.ndarray:
  """The first numbers of each vector, made a unit vector again."""
  if dimensions == vectors.shape[-1]:
    return vectors
  vectors = vectors[:, :dimensions]
  norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return vectors / np.maximum(norms, 1e-12)


def _written(row: np.ndarray, form: str | None) -> Any:
  """Numbers, or the base64 of float32 in little-endian order."""
  if form == 'base64':
    return base64.b64encode(row.astype('<f4').tobytes()).decode()
  return row.astype(float).tolist()
