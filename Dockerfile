# SPDX-License-Identifier: Apache-2.0
# The server in a small image:
#
#   docker build --tag=moepeft .
#   docker run --publish=127.0.0.1:8000:8000 \
#     --volume="$PWD/models:/models:ro" --volume="$PWD/keys:/keys:ro" \
#     moepeft --model=/models/NAME --api_key_file=/keys/users
#
# Inside of a container the server listens on all addresses, so it asks for
# keys; --allow_no_key does without.
FROM python:3.12-slim AS built

WORKDIR /source
COPY . .
RUN pip install --no-cache-dir --prefix=/installed '.[serve]'

FROM python:3.12-slim

RUN useradd --create-home --uid=10001 moepeft
COPY --from=built /installed /usr/local
USER moepeft
WORKDIR /home/moepeft
# A volume there takes over whose it is.
RUN mkdir -p .cache/jax
EXPOSE 8000
# Programs are compiled once where this is a volume.
ENV JAX_COMPILATION_CACHE_DIR=/home/moepeft/.cache/jax \
  PYTHONUNBUFFERED=1
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
  "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# As the process itself, so that SIGTERM reaches it and it drains.
ENTRYPOINT ["python", "-m", "moepeft.serve", "--host=0.0.0.0"]
