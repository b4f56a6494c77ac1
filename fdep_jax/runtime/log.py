"""Logs a training: `metrics.jsonl`, TensorBoard scalars, and traces of chosen steps."""

import json
import logging
import math
import os
import pathlib

import jax
from ml_collections import ConfigDict

from fdep_jax.runtime import files, mesh


class Log:
  """Writes `metrics.jsonl`, one line a logged step, and the same values for TensorBoard.

  Only the process that writes the run's files logs.

  Args:
    workdir: folder of the run.
    config: of the run.
    start: step that the run continues from; later lines are dropped and logged again.
  """

  def __init__(self, workdir: pathlib.Path, config: ConfigDict, start: int):
    self._path = workdir / "metrics.jsonl"
    self._start = start
    self._board = None
    if config.log.tensorboard and mesh.writes():
      from tensorboardX import SummaryWriter

      # Drops an earlier process's events for later steps.
      self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

  def __enter__(self):
    if not mesh.writes():
      self._file = open(os.devnull, "w")
      return self
    if self._path.exists():
      lines = self._path.read_text(errors="replace").splitlines(keepends=True)
      files.write(self._path, "".join(line for line in lines if _logged_step(line) <= self._start))
    self._file = open(self._path, "a")
    return self

  def write(self, step: int, values: dict) -> None:
    """Writes one line; values that are not finite become null, nested numbers scalars a/b."""
    values = {
      name: None if isinstance(value, float) and not math.isfinite(value) else value
      for name, value in values.items()
    }
    try:
      self._file.write(json.dumps({"step": step, **values}) + "\n")
      self._file.flush()
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._path)) from None
    if self._board:
      for name, value in _scalars("", values):
        self._board.add_scalar(name, value, step)

  def __exit__(self, *error):
    self._file.close()
    if self._board:
      self._board.close()


class Profile:
  """Traces the steps `profile_steps` into workdir/profile, for TensorBoard and Perfetto."""

  def __init__(self, workdir: pathlib.Path, config: ConfigDict):
    steps = config.profile_steps
    self._first, self._last = map(int, steps.split("-")) if steps else (0, 0)
    self._folder = workdir / "profile"
    self._running = False

  def before(self, step: int) -> None:
    if step == self._first:
      jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
      self._running = True

  def after(self, step: int, metrics: dict) -> None:
    if self._running and step == self._last:
      jax.block_until_ready(metrics)
      jax.profiler.stop_trace()
      logging.info("wrote a trace of steps %d to %d to %s", self._first, step, self._folder)


def _scalars(prefix: str, values: dict):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _scalars(f"{prefix}{name}/", value)
    elif isinstance(value, int | float):
      yield f"{prefix}{name}", value


def _logged_step(line: str) -> float:
  """Returns the step of a line; infinity if a killed process left it unfinished."""
  try:
    return json.loads(line)["step"] if line.endswith("\n") else math.inf
  except (ValueError, TypeError, KeyError):
    return math.inf
