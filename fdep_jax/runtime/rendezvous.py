"""Lets the processes of a run find each other, and says every few seconds who is missing.

JAX waits for them, too, but in silence, and it ends the program if one does not come. So they meet
here first: process 0 listens at the address that JAX will use, and sends everybody on at once.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Sequence

PATIENCE = 300.0  # seconds after which a process gives up
EVERY = 5.0  # seconds between two messages
_STEP = 0.2  # seconds between two looks
_GREETING = "fdep_jax"


class Missing(TimeoutError):
  """A process has not come in time."""


class _Teller:
  """Logs what a process waits for: at once, then every `EVERY` seconds; gives up in the end."""

  def __init__(self):
    self._start, self._next = time.monotonic(), 0.0

  def tell(self, text: str) -> None:
    """Logs if it is time.

    Raises:
      Missing: `PATIENCE` is over.
    """
    now = time.monotonic()
    if now - self._start > PATIENCE:
      raise Missing(
        f"After {PATIENCE:.0f} s still waiting for {text}. Start every process with the same "
        "command, with its own index in distributed=HOST:PORT,COUNT,INDEX; HOST is the machine of "
        "process 0, which the others must reach."
      )
    if now >= self._next:
      logging.warning("waiting for %s (%d s)", text, now - self._start)
      self._next = now + EVERY


def meet(address: str, count: int, index: int) -> None:
  """Returns once all processes have called this.

  Args:
    address: HOST:PORT of process 0.
    count: number of processes.
    index: of this one.

  Raises:
    Missing: a process has not come in time.
    ValueError: the address cannot be used, or the processes disagree about count and indices.
  """
  if count == 1:
    return
  host, _, port = address.rpartition(":")
  (_receive if index == 0 else _arrive)(host, int(port), count, index)


@contextlib.contextmanager
def telling(text: str):
  """Says every few seconds that the block waits for `text`."""
  done = threading.Event()

  def tell():
    start = time.monotonic()
    while not done.wait(EVERY):
      logging.warning("waiting for %s (%d s)", text, time.monotonic() - start)

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _names(indices: Sequence[int], count: int) -> str:
  listed = ", ".join(map(str, indices[:20])) + (", …" if len(indices) > 20 else "")
  return f"process{'es' * (len(indices) > 1)} {listed} of 0 to {count - 1}"


def _receive(host: str, port: int, count: int, index: int) -> None:
  """Waits for all others; the part of process 0."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
  except OSError as error:
    raise ValueError(
      f"Process 0 cannot listen at port {port} ({error.strerror}). Choose a different one in "
      "distributed=HOST:PORT,COUNT,INDEX, the same for all processes."
    ) from None
  here: dict[int, socket.socket] = {}
  teller = _Teller()
  try:
    with listener:
      listener.settimeout(_STEP)
      while len(here) < count - 1:
        missing = [i for i in range(1, count) if i not in here]
        teller.tell(f"{_names(missing, count)}, which must reach {host}:{port}")
        with contextlib.suppress(TimeoutError):
          _greet(listener.accept()[0], here, count)
        _forget_the_dead(here)
        _send(here.values(), "wait " + " ".join(map(str, missing)))
    # The listener is closed: the port is free for JAX.
    _send(here.values(), "go")
  finally:
    for connection in here.values():
      with contextlib.suppress(OSError):  # lets the others close first, which frees the port
        connection.settimeout(2)
        while connection.recv(64):
          pass
      connection.close()


def _greet(connection: socket.socket, here: dict[int, socket.socket], count: int) -> None:
  """Adds a process that has come to `here`, or tells it why not."""
  try:
    connection.settimeout(2)
    words = connection.makefile("r", encoding="utf-8", errors="replace").readline(100).split()
    if len(words) != 3 or words[0] != _GREETING:
      connection.close()  # a stranger
      return
    theirs, index = int(words[1]), int(words[2])
  except (OSError, ValueError):
    connection.close()
    return
  reason = ""
  if theirs != count:
    reason = f"process 0 was started for {count} processes, process {index} for {theirs}"
  elif not 0 < index < count:
    reason = f"there is no index {index} among {count} processes"
  elif index in here:
    reason = f"two processes have the index {index}"
  if reason:
    _send([connection], f"refused {reason}")
    connection.close()
    logging.warning("refused a process: %s", reason)
    return
  here[index] = connection


def _forget_the_dead(here: dict[int, socket.socket]) -> None:
  for index, connection in list(here.items()):
    connection.setblocking(False)
    try:
      gone = connection.recv(64) == b""
    except BlockingIOError:
      gone = False
    except OSError:
      gone = True
    if gone:
      here.pop(index).close()
      logging.warning("process %d came and ended; waiting for it again", index)


def _send(connections, line: str) -> None:
  for connection in connections:
    with contextlib.suppress(OSError):
      connection.sendall(f"{line}\n".encode())


def _arrive(host: str, port: int, count: int, index: int) -> None:
  """Reports to process 0 and waits until it sends everybody on."""
  teller = _Teller()
  while True:
    text = f"process 0 at {host}:{port}"
    try:
      with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(f"{_GREETING} {count} {index}\n".encode())
        connection.settimeout(_STEP)
        if _listen(connection, teller, text, count):
          return
    except socket.gaierror as error:
      raise ValueError(
        f"distributed names the host {host!r}, which is not known here ({error.strerror})."
      ) from None
    except Missing:
      raise
    except OSError:
      pass  # process 0 has not started, or has just ended
    teller.tell(text)
    time.sleep(_STEP)


def _listen(connection: socket.socket, teller: _Teller, text: str, count: int) -> bool:
  """Reads what process 0 says; true if it says to go on, false if it ended."""
  heard = b""
  while True:
    try:
      piece = connection.recv(4096)
      if not piece:
        return False
      heard += piece
    except TimeoutError:
      pass
    *lines, heard = heard.split(b"\n")
    for line in lines:
      word, _, rest = line.decode("utf-8", "replace").partition(" ")
      if word == "go":
        return True
      if word == "refused":
        raise ValueError(f"The processes do not fit together: {rest}.")
      if word == "wait":
        text = _names([int(i) for i in rest.split()], count)
    teller.tell(text)
