# SPDX-License-Identifier: Apache-2.0
"""A barrier for the processes of one run, with messages.

JAX waits silently and then calls `abort`. So before JAX starts, process 0
listens at the address that JAX will use. The other processes connect, send a
line with their number, and wait for a line that says that all are present.
"""

import socket
import sys
import time

_MAGIC = 'moepeft'
_GO = b'go\n'
# Seconds between two status lines, and seconds to wait for a connection's line.
_STATUS_INTERVAL, _READ_TIMEOUT = 10.0, 2.0


def wait_for_all(address: str, count: int, number: int, timeout: float) -> None:
  """Returns when all processes of a run have connected.

  Args:
    address: HOST:PORT of process 0.
    count: the number of processes.
    number: the number of this process.
    timeout: in seconds.

  Raises:
    ValueError: a process did not connect in time, the address cannot be used,
      or two processes have the same number.
  """
  if count == 1:
    return
  host, _, port = address.rpartition(':')
  host = host.strip('[]')
  deadline = time.monotonic() + timeout
  if number == 0:
    _listen(address, int(port), count, timeout, deadline)
  else:
    _connect(address, (host, int(port)), count, number, timeout, deadline)


def _listen(
  address: str, port: int, count: int, timeout: float, deadline: float
) -> None:
  connections: dict[int, socket.socket] = {}
  print_status = _StatusPrinter()
  try:
    server = _create_server(port)
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
        text = (
          f'{len(absent)} of {count} processes at {address} (number {names})'
        )
        print_status(f'waiting for {text}, for at most {timeout:g} s')
        if time.monotonic() > deadline:
          raise ValueError(
            f'{text} did not connect within {timeout:g} s '
            '(--distributed_timeout); start all of them again'
          )
        server.settimeout(0.5)
        try:
          connection, _ = server.accept()
        except TimeoutError:
          continue
        number = _read_number(connection, count)
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
        # The peer closes first: the port of the side that closes first stays in
        # use for a while.
        connection.settimeout(_READ_TIMEOUT)
        _receive(connection, 1)
    finally:
      for connection in connections.values():
        connection.close()


def _create_server(port: int) -> socket.socket:
  # JAX listens on all interfaces too.
  if socket.has_dualstack_ipv6():
    family = {'family': socket.AF_INET6, 'dualstack_ipv6': True}
    return socket.create_server(('', port), **family)
  return socket.create_server(('', port))


def _read_number(connection: socket.socket, count: int) -> int | None:
  """The number of the process that connected; None for any other program."""
  connection.settimeout(_READ_TIMEOUT)
  match _receive(connection, 64).decode('ascii', 'replace').split():
    case [magic, peer_count, number] if magic == _MAGIC and number.isdecimal():
      if peer_count == str(count) and 0 < int(number) < count:
        return int(number)
  return None


def _receive(connection: socket.socket, size: int) -> bytes:
  try:
    return connection.recv(size)
  except OSError:
    return b''


def _connect(
  address: str,
  host_port: tuple[str, int],
  count: int,
  number: int,
  timeout: float,
  deadline: float,
) -> None:
  print_status = _StatusPrinter()
  line = f'{_MAGIC} {count} {number}\n'.encode()
  while (seconds_left := deadline - time.monotonic()) > 0:
    print_status(
      f'process {number} of {count} is waiting for the others at {address}, '
      f'for at most {timeout:g} s'
    )
    try:
      with socket.create_connection(
        host_port, timeout=min(seconds_left, _STATUS_INTERVAL)
      ) as peer:
        peer.sendall(line)
        peer.settimeout(seconds_left)
        if peer.recv(len(_GO)) == _GO:
          return
    except OSError:
      pass
    time.sleep(min(0.5, max(seconds_left, 0)))
  raise ValueError(
    f'process 0 of {count} did not answer process {number} at {address} within '
    f'{timeout:g} s (--distributed_timeout); start all of them again, with the '
    'same address and number of processes'
  )


class _StatusPrinter:
  """Prints a line when it changes, and again after an interval."""

  def __init__(self):
    self._last_line, self._last_time = '', 0.0

  def __call__(self, line: str) -> None:
    now = time.monotonic()
    if line != self._last_line or now - self._last_time > _STATUS_INTERVAL:
      print(line, file=sys.stderr, flush=True)
      self._last_line, self._last_time = line, now
