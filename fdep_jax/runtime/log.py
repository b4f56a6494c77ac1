"""Logs a training: `metrics.jsonl`, TensorBoard scalars, and traces of chosen steps."""

import json
import logging
import math
import os
import pathlib
import time

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


class Minutes:
  """Logs a line a minute where no progress bar is shown: SLURM, nohup, a file.

  Args:
    steps: of the whole run.
    start: step that the run continues from.
    shown: whether a bar is shown; then nothing is logged.
    every: seconds between two lines.
  """

  def __init__(self, steps: int, start: int, shown: bool, every: float = 60):
    self._steps, self._start, self._shown, self._every = steps, start, shown, every
    self._begin = time.monotonic()
    self._next = self._begin

  def due(self) -> bool:
    """Returns whether it is time for a line."""
    return not self._shown and time.monotonic() >= self._next

  def tell(self, step: int, metrics: dict, score: str) -> None:
    """Logs if it is time.

    Args:
      step: steps done.
      metrics: has "loss", "loss_<branch>" and "images_per_second".
      score: the last held-out score, in words; "" if there is none.
    """
    now = time.monotonic()
    if self._shown or not (self.due() or step == self._steps):
      return
    self._next = now + self._every
    parts = [f"{k.removeprefix('loss_')} {v:.4f}" for k, v in metrics.items() if "loss_" in k]
    left = (now - self._begin) / max(step - self._start, 1) * (self._steps - step)
    words = [
      f"step {step} of {self._steps}",
      f"loss {metrics['loss']:.4f} ({', '.join(parts)})" if len(parts) > 1 else
      f"loss {metrics['loss']:.4f}",
      f"{metrics['images_per_second']:.1f} images/s",
      f"{_duration(left)} left",
      *([score] if score else []),
    ]  # fmt: skip
    logging.info("%s", ", ".join(words))


def _duration(seconds: float) -> str:
  minutes = round(seconds / 60)
  if minutes < 1:
    return f"{seconds:.0f} s"
  return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def check_profile(config: ConfigDict, steps: int) -> None:
  """Raises ValueError if `profile_steps` begin after the last step of a run of this many."""
  first, _ = _profile_steps(config)
  if first > steps:
    raise ValueError(
      f"profile_steps is {config.profile_steps}, but the run has {steps} steps. Name steps that it "
      "takes, or leave profile_steps out."
    )


def _profile_steps(config: ConfigDict) -> tuple[int, int]:
  """Returns the first and the last step to trace; (0, 0) if there is none."""
  first, last = map(int, config.profile_steps.split("-")) if config.profile_steps else (0, 0)
  return first, last


class Profile:
  """Traces the steps `profile_steps` into workdir/profile, for TensorBoard and Perfetto.

  A run that goes on within these steps traces the rest of them. Leaving the context writes the
  trace of a run that ends before the last one.
  """

  def __init__(self, workdir: pathlib.Path, config: ConfigDict):
    self._first, self._last = _profile_steps(config)
    self._folder = workdir / "profile"
    self._running = False

  def __enter__(self):
    return self

  def before(self, steps: range) -> None:
    if not self._running and steps[0] <= self._last and steps[-1] >= self._first:
      jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
      self._running = True

  def after(self, steps: range, metrics: dict) -> None:
    if self._running and self._last <= steps[-1]:
      jax.block_until_ready(metrics)
      self._stop()

  def __exit__(self, *error):
    if self._running:
      self._stop()

  def _stop(self) -> None:
    self._running = False
    jax.profiler.stop_trace()
    logging.info("wrote a trace to %s", self._folder)


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
