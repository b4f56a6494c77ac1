"""Writes files whole or not at all, and locks folders."""

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence

# Of every file, whoever writes it: safetensors makes its own readable by the owner alone.
_UMASK = os.umask(0)
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK
_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.partial")
_ABANDONED = 3600.0  # seconds without a write, after which a temporary file has no writer any more
_PATIENCE = 1.0  # seconds; a look at a lock (`holder`) holds it for far less


class InUse(ValueError):
  """The folder is locked by another process."""


def expand(path: str | os.PathLike) -> pathlib.Path:
  """Resolves a leading ~; leaves ~NAME as it is if there is no such user."""
  return pathlib.Path(os.path.expanduser(path))


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path beside `path` that replaces it if the block succeeds.

  The temporary file is removed if the block fails. So `path` is old, new or absent, never partial.
  Of several writers the last one wins.
  """
  path = pathlib.Path(path)
  partial = _temporary(path)
  try:
    yield partial
    _put(partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def replacing_all(paths: Sequence[pathlib.Path]) -> Iterator[list[pathlib.Path]]:
  """Yields a temporary path for each of `paths`; all replace them if the block succeeds.

  A path whose temporary file was not written is removed, so that no older file remains.
  """
  partial = [_temporary(path) for path in paths]
  try:
    yield partial
    for path, new in zip(paths, partial, strict=True):
      if new.exists():
        _put(new, path)
      else:
        path.unlink(missing_ok=True)
  finally:
    for new in partial:
      new.unlink(missing_ok=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
  """Makes a path beside `path` that no other writer has, on whatever machine it is."""
  _remove_abandoned(path.parent)
  return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


@functools.cache  # once a process: a folder may have thousands of files
def _remove_abandoned(folder: pathlib.Path) -> None:
  """Removes the temporary files of killed processes."""
  with contextlib.suppress(OSError):
    for path in folder.iterdir():
      if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED:
        path.unlink(missing_ok=True)


def _put(new: pathlib.Path, path: pathlib.Path) -> None:
  with contextlib.suppress(OSError):  # some file systems have no modes
    new.chmod(_MODE)
  os.replace(new, path)


def write(path: str | os.PathLike, content: bytes | str) -> None:
  """Writes a file whole or not at all; text as UTF-8."""
  if isinstance(content, str):
    # Text may contain file names that are not UTF-8; writes their original bytes.
    content = content.encode("utf-8", "surrogateescape")
  with replacing(path) as partial:
    partial.write_bytes(content)


def write_json(path: str | os.PathLike, value) -> None:
  """Writes a value as indented JSON, whole or not at all.

  Raises:
    ValueError: it holds NaN or infinity, which JSON lacks (`finite` replaces them).
  """
  write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def finite(value):
  """Replaces numbers that JSON lacks (NaN, infinity) by None."""
  if isinstance(value, dict):
    return {key: finite(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [finite(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def locked(workdir: pathlib.Path, name: str = "lock", wait: bool = False):
  """Holds the lock of a run's folder; creates the folder if absent.

  The system releases the lock however the process ends. Somebody who looks whether the lock is held
  holds it for a moment, so it is tried for a second.

  Args:
    workdir: folder of the run.
    name: file name of the lock.
    wait: wait for the holder instead of raising.

  Raises:
    InUse: another process holds the lock.
    ValueError: the folder cannot be written.
  """
  import fcntl

  path = workdir / name
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")
  except OSError as error:
    raise ValueError(
      f"{workdir} cannot be written ({error.strerror}). Choose a different folder."
    ) from None
  with file:
    try:
      if wait:
        fcntl.flock(file, fcntl.LOCK_EX)
      else:
        _lock(file, time.monotonic() + _PATIENCE)
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip() or "another process"
      raise InUse(
        f"{workdir} is in use: {holder} trains in it. Wait for it, end it, or choose a "
        "different --workdir."
      ) from None
    except OSError as error:
      logging.warning(
        "%s cannot be locked (%s): start only one training there", path, error.strerror
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def _lock(file, deadline: float) -> None:
  """Locks an open file; raises BlockingIOError if others hold it until the deadline."""
  import fcntl

  while True:
    try:
      return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if time.monotonic() > deadline:
        raise
    time.sleep(0.02)


def holder(workdir: pathlib.Path, name: str) -> str:
  """Returns the process that holds the lock of this name, "" if none does."""
  import fcntl

  try:
    file = open(workdir / name)
  except OSError:
    return ""
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return file.read().strip() or "another process"
    except OSError:
      return ""
  return ""
