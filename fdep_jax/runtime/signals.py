"""Saves and ends a run on SIGTERM or SIGINT. Imports no jax."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator


class Preempted(BaseException):
  """The run received a signal to end; its state is saved.

  Not an `Exception`, so that code which catches every exception lets it pass.
  """


class Signals:
  """Turns SIGTERM and SIGINT into `Preempted`.

  Raises immediately, or at the next `check` inside `waiting`. A second signal ends the process at
  once. A thread listens for it, since Python calls no signal handlers during a compilation.
  Checkpoints stay whole, as after SIGKILL.

  Args:
    minimum: returns the smallest of all processes' values. Inside `waiting` every process calls it,
      so that all end if one received a signal.
    processes: number of processes of the run.
  """

  def __init__(self, minimum: Callable[[int], int] = int, processes: int = 1):
    self._minimum, self._processes = minimum, processes
    self._received: int | None = None
    self._waiting = False
    self._old = {}

  @property
  def name(self) -> str:
    return signal.Signals(self._received).name if self._received else "a signal"

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self  # the caller handles signals
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=self._listen, args=(self._reader,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error):
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if self._old:
      signal.set_wakeup_fd(self._old_fd)
      self._writer.close()  # ends the thread

  def _handle(self, number, frame):
    self._received = number
    if not self._waiting:
      self.check()

  def _came(self) -> bool:
    """Returns whether this process (inside `waiting`: any) received a signal."""
    came = self._received is not None
    return self._minimum(int(not came)) == 0 if self._waiting else came

  @staticmethod
  def _listen(reader: socket.socket) -> None:
    heard = 0
    while number := reader.recv(1):
      if number[0] not in (signal.SIGTERM, signal.SIGINT):
        continue
      heard += 1
      if heard == 1:
        text = "ending after the running step or compilation; a second signal ends at once"
        print(f"\n{signal.Signals(number[0]).name}: {text}", file=sys.stderr, flush=True)
      else:
        print("\nEnded at once. The newest checkpoint is whole.", file=sys.stderr, flush=True)
        os._exit(1)
    reader.close()

  def check(self) -> None:
    """Raises `Preempted` if a signal was received."""
    if self._came():
      raise Preempted(
        f"Ended by {self.name} outside the training loop; nothing is lost. The same command goes "
        "on from the newest checkpoint."
      )

  def passing(self, items: Iterable) -> Iterator:
    """Yields the items until a signal comes."""
    for item in items:
      if self._processes == 1:
        self.check()
      yield item

  @contextlib.contextmanager
  def waiting(self, waits: bool = True):
    """Delays `Preempted` to the next `check` within the block."""
    before, self._waiting = self._waiting, waits
    try:
      self.check()
      yield
    finally:
      self._waiting = before

  def at_once(self):
    """Raises immediately within `waiting`, if there is only one process."""
    return contextlib.nullcontext() if self._processes > 1 else self.waiting(False)
