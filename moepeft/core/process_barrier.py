# SPDX-License-Identifier: Apache-2.0
"""Processes of one run wait for each other at an address, and say so.

JAX's own waiting is silent and ends in `abort`. Before it begins, process 0
listens at the address that JAX will use; the others connect, send a line with
their number, and wait for the line that all have come.
"""

import socket
import sys
import time
from collections.abc import Callable

_MAGIC = 'moepeft'
_GO = b'go\n'
# Seconds between two lines that tell of waiting, and of a connection's silence.
_TELL_S, _LINE_S = 10.0, 2.0


def wait_for_all(address: str, count: int, number: int, timeout: float) -> None:
  """Returns when all processes of a run have come.

  Args:
    address: HOST:PORT of process 0.
    count: of processes; number: of this one.
    timeout: in seconds.

  Raises:
    ValueError: they did not come in time, the address cannot be used, or two
      are of one number or of other counts.
  """
  if count == 1:
    return
  host, _, port = address.rpartition(':')
  host = host.strip('[]')
  deadline = time.monotonic() + timeout
  if number == 0:
    _listen(address, int(port), count, timeout, deadline)
  else:
    _call(address, (host, int(port)), count, number, timeout, deadline)


def _listen(
  address: str, port: int, count: int, timeout: float, deadline: float
) -> None:
  connections: dict[int, socket.socket] = {}
  print_status = _StatusPrinter()
  try:
    server = _server(port)
  except OSError as e:
    raise ValueError(
      f'process 0 cannot listen at {address} ({e.strerror}); name another port '
      'with --distributed'
    ) from None
  with server:
    try:
      while len(connections) < count - 1:
        absent = [n for n in range(1, count) if n not in connections]
        names = ', '.join(map(str, absent[:8])) + ', ...' * (len(absent) > 8)
        words = (
          f'{len(absent)} of {count} processes at {address} (number {names})'
        )
        print_status(f'waiting for {words}, for {timeout:g} s at most')
        if time.monotonic() > deadline:
          raise ValueError(
            f'{words} did not come in {timeout:g} s (--distributed_timeout); '
            'start all of them again'
          )
        server.settimeout(0.5)
        try:
          connection, _ = server.accept()
        except TimeoutError:
          continue
        number = _greeted(connection, count)
        if number is None:
          connection.close()
        elif number in connections:
          raise ValueError(
            f'two processes at {address} are number {number} of {count}; give '
            'each its own with --distributed'
          )
        else:
          connections[number] = connection
      for connection in connections.values():
        connection.sendall(_GO)
      for connection in connections.values():
        # They close first: a port that closes first stays in use for a while.
        connection.settimeout(_LINE_S)
        _until(connection.recv, 1)
    finally:
      for connection in connections.values():
        connection.close()


def _server(port: int) -> socket.socket:
  # As JAX, which listens on all interfaces.
  if socket.has_dualstack_ipv6():
    family = {'family': socket.AF_INET6, 'dualstack_ipv6': True}
    return socket.create_server(('', port), **family)
  return socket.create_server(('', port))


def _greeted(connection: socket.socket, count: int) -> int | None:
  """The number of who has connected; None for somebody else."""
  connection.settimeout(_LINE_S)
  words = (_until(connection.recv, 64) or b'').decode('ascii', 'replace')
  match words.split():
    case [magic, others, number] if magic == _MAGIC and number.isdecimal():
      if others == str(count) and 0 < int(number) < count:
        return int(number)
  return None


def _until(read: Callable[[int], bytes], size: int) -> bytes | None:
  try:
    return read(size)
  except OSError:
    return None


def _call(
  address: str,
  place: tuple[str, int],
  count: int,
  number: int,
  timeout: float,
  deadline: float,
) -> None:
  print_status = _StatusPrinter()
  line = f'{_MAGIC} {count} {number}\n'.encode()
  while (left := deadline - time.monotonic()) > 0:
    print_status(
      f'process {number} of {count} is waiting for the others at {address}, '
      f'for {timeout:g} s at most'
    )
    try:
      with socket.create_connection(place, timeout=min(left, _TELL_S)) as peer:
        peer.sendall(line)
        peer.settimeout(left)
        if peer.recv(len(_GO)) == _GO:
          return
    except OSError:
      pass
    time.sleep(min(0.5, max(left, 0)))
  raise ValueError(
    f'process 0 of {count} did not let process {number} begin at {address} in '
    f'{timeout:g} s (--distributed_timeout); start all of them again, with the '
    'same address and number of processes'
  )


class _StatusPrinter:
  """Prints a line when it is new, and now and then again."""

  def __init__(self):
    self._last, self._at = '', 0.0

  def __call__(self, line: str) -> None:
    now = time.monotonic()
    if line != self._last or now - self._at > _TELL_S:
      print(line, file=sys.stderr, flush=True)
      self._last, self._at = line, now
