# SPDX-License-Identifier: Apache-2.0
"""POST /v1/embeddings, with the model of --embeddings."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.inference import api
from moepeft.serve.embeddings.encoder import SentenceEmbedder
from moepeft.serve.http.body import read_body
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

Result = TypeVar('Result')


async def embeddings(service: Service, request: Request) -> JSONResponse:
  """Vectors of texts."""
  body = await read_body(request, EmbeddingsBody, service.limits.body)
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
  texts, dimensions = (
    _check_texts(body, service),
    _check_dimensions(body, embedder),
  )
  try:
    vectors, stats.prompt = await run_encoder(
      service, request, embedder.encode, texts
    )
  except ValueError as e:
    raise invalid_request(f'input: {e}', 'input') from None
  return JSONResponse(
    {
      'object': 'list',
      'data': [
        {
          'object': 'embedding',
          'index': i,
          'embedding': _encode_vector(row, body.encoding_format),
        }
        for i, row in enumerate(_truncate(vectors, dimensions))
      ],
      'model': embedder.name,
      'usage': {'prompt_tokens': stats.prompt, 'total_tokens': stats.prompt},
    }
  )


async def run_encoder(
  service: Service, request: Request, call: Callable[..., Result], *args: Any
) -> Result:
  """Runs a call on the thread of the sentence encoder.

  Raises:
    ApiError: too many calls wait, or it took too long.
  """
  seconds = service.limits.seconds
  try:
    future = service.embedding_thread.submit(service.limits.queue, call, *args)
    return await cancel_on_disconnect(
      request.receive, asyncio.wait_for(asyncio.wrap_future(future), seconds)
    )
  except TimeoutError:
    raise unavailable(
      f'the embeddings took longer than {seconds:g} s; try again later, or '
      'send less',
      5,
      'timeout',
    ) from None
  except api.RequestRefused as e:
    raise refusal_error(e, 'input') from None


def _check_texts(body: EmbeddingsBody, service: Service) -> list[str]:
  texts = [body.input] if isinstance(body.input, str) else body.input
  if not isinstance(texts[0], str):
    raise invalid_request(
      'input holds token ids, which may be of another tokenizer; send text',
      'input',
    )
  if len(texts) > service.limits.inputs:
    raise invalid_request(
      f'input has {len(texts):,} texts; expected at most '
      f'{service.limits.inputs:,}',
      'input',
    )
  if '' in texts:
    raise invalid_request('input holds an empty text; leave it out', 'input')
  return texts


def _check_dimensions(body: EmbeddingsBody, embedder: SentenceEmbedder) -> int:
  dimensions = body.dimensions or embedder.dimensions
  if dimensions > embedder.dimensions:
    raise invalid_request(
      f'dimensions is at most {embedder.dimensions} of {embedder.name}; got '
      f'{dimensions}',
      'dimensions',
    )
  return dimensions


def _truncate(vectors: np.ndarray, dimensions: int) -> np.ndarray:
  """Truncates vectors, and scales them to length one again."""
  if dimensions == vectors.shape[-1]:
    return vectors
  vectors = vectors[:, :dimensions]
  norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return vectors / np.maximum(norms, 1e-12)


def _encode_vector(row: np.ndarray, encoding: str | None) -> Any:
  """A list of numbers, or the base64 of little-endian float32."""
  if encoding == 'base64':
    return base64.b64encode(row.astype('<f4').tobytes()).decode()
  return row.astype(float).tolist()
