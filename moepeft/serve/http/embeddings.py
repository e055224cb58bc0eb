# SPDX-License-Identifier: Apache-2.0
"""POST /v1/embeddings, where the server was started with a model for it."""

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.inference import api
from moepeft.serve.http.body import read
from moepeft.serve.http.errors import Problem, later, no_model, refused, wrong
from moepeft.serve.http.event_bridge import unless_gone
from moepeft.serve.http.schemas import Embedding
from moepeft.serve.http.service import Embedder, Service


async def embeddings(service: Service, request: Request) -> JSONResponse:
  asked = await read(request, Embedding, service.limits.body)
  embedder = service.embedder
  if embedder is None:
    raise Problem(
      404,
      'this server has no model for embeddings; start it with '
      '--embeddings=minilm',
      'model',
      'model_not_found',
    )
  if asked.model != embedder.name:
    if asked.model in service.models.names():
      raise wrong(
        f'the model {asked.model!r} makes no embeddings; name '
        f'{embedder.name!r}',
        'model',
      )
    raise no_model(asked.model, [embedder.name])
  tally = request.scope['tally']
  tally.model = embedder.name
  texts, width = _texts(asked, service), _width(asked, embedder)
  seconds = service.limits.seconds
  try:
    work = service.vectors.submit(service.limits.queue, embedder.encode, texts)
    vectors, tally.prompt = await unless_gone(
      request.receive, asyncio.wait_for(asyncio.wrap_future(work), seconds)
    )
  except TimeoutError:
    raise later(
      f'the vectors were not there within {seconds:g} s; try again later, or '
      'send less',
      5,
      'timeout',
    ) from None
  except api.RequestRefused as e:
    raise refused(e, 'input') from None
  except ValueError as e:
    raise wrong(f'input: {e}', 'input') from None
  return JSONResponse(
    {
      'object': 'list',
      'data': [
        {
          'object': 'embedding',
          'index': i,
          'embedding': _written(row, asked.encoding_format),
        }
        for i, row in enumerate(_cut(vectors, width))
      ],
      'model': embedder.name,
      'usage': {'prompt_tokens': tally.prompt, 'total_tokens': tally.prompt},
    }
  )


def _texts(asked: Embedding, service: Service) -> list[str]:
  texts = [asked.input] if isinstance(asked.input, str) else asked.input
  if not isinstance(texts[0], str):
    raise wrong(
      'input holds token ids, which are of another tokenizer; send text',
      'input',
    )
  if len(texts) > service.limits.inputs:
    raise wrong(
      f'input has {len(texts):,} texts; at most {service.limits.inputs:,} are '
      'taken at once',
      'input',
    )
  if '' in texts:
    raise wrong('input holds an empty text; leave it out', 'input')
  return texts


def _width(asked: Embedding, embedder: Embedder) -> int:
  width = asked.dimensions or embedder.width
  if width > embedder.width:
    raise wrong(
      f'dimensions is at most {embedder.width} of {embedder.name}; got {width}',
      'dimensions',
    )
  return width


def _cut(vectors: np.ndarray, width: int) -> np.ndarray:
  """The first numbers of each vector, made a unit vector again."""
  if width == vectors.shape[-1]:
    return vectors
  vectors = vectors[:, :width]
  norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return vectors / np.maximum(norms, 1e-12)


def _written(row: np.ndarray, form: str | None) -> Any:
  """Numbers, or the base64 of float32 in little-endian order."""
  if form == 'base64':
    return base64.b64encode(row.astype('<f4').tobytes()).decode()
  return row.astype(float).tolist()
