# SPDX-License-Identifier: Apache-2.0
"""Runs commands of moepeft as processes that start in a tenth of a second.

Importing JAX and the other libraries takes three seconds. One process imports
them, and each command is a fork of it: it has its own arguments, directory and
files, and parses, prints and exits as `python -m` does.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping

from tests import ROOT

# Libraries, and what the commands are made of: none of these is a command.
_IMPORTED = (
  *('transformers', 'matplotlib.figure', 'scipy.stats', 'safetensors.numpy'),
  *(
    'moepeft.config.command_line',
    'moepeft.evaluation.evaluator',
    'moepeft.inference.prompts',
    'moepeft.training.metrics_logger',
  ),
)
# Packages of extras, where they are installed.
_OPTIONAL = ('openai',)
_SERVER: list[subprocess.Popen] = []


def run(
  module: str,
  *args: object,
  cwd: str | os.PathLike = ROOT,
  stdin: str = '',
  env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
  """Runs `python -m MODULE ARGS` on CPU and returns how it ended.

  `env` replaces the environment; XLA_FLAGS count, as no device is in use yet.
  """
  if not _SERVER or _SERVER[0].poll() is not None:
    _SERVER[:] = [
      subprocess.Popen(
        [sys.executable, '-m', 'tests.commands'],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # JAX warns of every fork.
        stderr=subprocess.DEVNULL,
        text=True,
      )
    ]
  (server,) = _SERVER
  command = [module, *map(str, args)]
  with tempfile.TemporaryDirectory() as folder:
    files = [os.path.join(folder, name) for name in ('in', 'out', 'err')]
    pathlib.Path(files[0]).write_text(stdin)
    request = {'command': command, 'cwd': str(cwd), 'files': files}
    request['env'] = env and dict(env)
    print(json.dumps(request), file=server.stdin, flush=True)
    code = json.loads(server.stdout.readline())
    out, err = (pathlib.Path(path).read_text() for path in files[1:])
  return subprocess.CompletedProcess(command, code, out, err)


def _serve() -> None:
  for name in _IMPORTED:
    importlib.import_module(name)
  for name in _OPTIONAL:
    with contextlib.suppress(ImportError):
      importlib.import_module(name)
  # A fork neither walks through what is imported here nor copies it.
  gc.freeze()
  for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
      _exit(_become(**request))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


def _become(
  command: list[str], cwd: str, files: list[str], env: dict[str, str] | None
) -> int:
  """Runs the command in this process; returns the code of its exit."""
  if env is not None:
    os.environ.clear()
    os.environ.update(env)
  os.chdir(cwd)
  for number, (path, mode) in enumerate(
    zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
  ):
    os.dup2(os.open(path, mode), number)
  sys.stdin = open(0)
  sys.path[0] = cwd
  sys.argv = command
  try:
    runpy.run_module(command[0], run_name='__main__', alter_sys=True)
  except SystemExit as error:
    if error.code is None or isinstance(error.code, int):
      return error.code or 0
    print(error.code, file=sys.stderr)
    return 1
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def _exit(code: int) -> None:
  """Ends as an interpreter does, but frees no object: that takes seconds."""
  threading._shutdown()
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


if __name__ == '__main__':
  _serve()
