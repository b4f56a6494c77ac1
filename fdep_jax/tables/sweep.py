"""Runs what a table of experiments lacks (`--mode sweep`).

Every run trains in a process of its own, in a folder of its own below the work folder, and holds a
lock there that the system frees however the process ends. So any number of sweeps, on one machine
or on many with a shared folder, share a table's rows; each may be killed and started again.
"""

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from fdep_jax import settings
from fdep_jax.runtime import files, signals
from fdep_jax.tables import experiments
from fdep_jax.tables.experiments import Row, Table

_LOCK = "sweep.lock"
_FAILED = "failed.json"
_BUSY = 3  # exit code: another process trains in the folder
_PREEMPTED = 75
_PROCESSES = multiprocessing.get_context("spawn")


class Run(NamedTuple):
  """One row with one seed."""

  row: Row
  seed: int
  config: ConfigDict
  folder: pathlib.Path
  teacher: pathlib.Path | None  # the folder of the run that must be finished before


class State(NamedTuple):
  """How far a run is: missing, waiting, begun, running, failed, finished, or of another config."""

  word: str
  detail: str = ""

  def __str__(self):
    return f"{self.word} {self.detail}".strip()


def command(flags) -> None:
  """`--mode sweep`."""
  table, base = experiments.from_flags(flags)
  failed = sweep(table, base, flags.workdir, flags.task)
  if failed:
    print(f"{len(failed)} failed; why:", file=sys.stderr)
    print(*(f"  {run.folder / _FAILED}" for run in failed), sep="\n", file=sys.stderr)
    sys.exit(1)


def runs(table: Table, base: ConfigDict, workdir: str | os.PathLike) -> list[Run]:
  """Every row with each of its seeds: stage by stage, and in it all of the first seed first."""
  for row in table.rows:  # refuses what a run would, before any
    settings.check(experiments.resolve(base, row, table.seeds[0], workdir))
  return [
    Run(
      row,
      seed,
      experiments.resolve(base, row, seed, workdir),
      experiments.folder(workdir, row.name, seed),
      experiments.folder(workdir, row.teacher, seed) if row.teacher else None,
    )
    for stage in sorted({row.stage for row in table.rows})
    for seed in table.seeds
    for row in table.rows
    if row.stage == stage and (seed in row.seeds or not row.seeds)
  ]


def part(everything: Sequence[Run], task: str | None) -> list[Run]:
  """The runs of task "i/n", 0 ≤ i < n: every n-th, a teacher's students with it.

  Raises:
    ValueError: `task` is nothing like that.
  """
  if not task:
    return list(everything)
  found = re.fullmatch(r"(\d+)/([1-9]\d*)", task)
  if not found or int(found[1]) >= int(found[2]):
    raise ValueError(
      f"--task is {task!r}; it must be i/n with i from 0 to n − 1, as in a job array of n tasks: "
      "0/4, 1/4, 2/4, 3/4."
    )
  place = {run.folder: i for i, run in enumerate(everything)}
  mine, count = int(found[1]), int(found[2])
  return [run for run in everything if place[run.teacher or run.folder] % count == mine]


def state(run: Run) -> State:
  """How far the run is, from its folder."""
  if finished(run):
    value = deployed(json.loads((run.folder / "metrics.json").read_text()))["hse"]
    return State("finished", "" if value is None else f"HSE {100 * value:.2f}")
  holder = _holder(run)
  if holder:
    return State("running", f"{_progress(run)} ({holder})")
  failure = failed(run)
  if failure:
    return State("failed", failure["error"].splitlines()[0][:120])
  if (run.folder / "config.json").exists():
    other = _other_config(run)
    return State("of another config", f"({other})") if other else State("begun", _progress(run))
  if run.teacher and not _complete(run.teacher):
    return State("waiting", f"for {run.teacher.name}")
  return State("missing")


def _holder(run: Run) -> str:
  return files.holder(run.folder, _LOCK) or files.holder(run.folder, "lock")


def finished(run: Run) -> bool:
  """Whether the folder has the results of this very config, at its full length."""
  if not _complete(run.folder) or _other_config(run):
    return False
  theirs = settings.load(run.folder).train
  return all(theirs[name] == run.config.train[name] for name in ("steps", "epochs"))


def _complete(folder: pathlib.Path) -> bool:
  """Whether it has the results of a training that came to its end, not of one under way."""
  try:
    metrics = json.loads((folder / "metrics.json").read_text())
    steps = settings.load(folder).train.steps
  except (ValueError, FileNotFoundError):
    return False
  planned = steps if steps > 0 else metrics.get("steps")  # an older version did not write it
  return planned is not None and metrics["last"]["checkpoint"] >= planned


def _other_config(run: Run) -> str:
  """The first setting in which the run in the folder differs; training in it is refused."""
  try:
    return next(iter(settings.differing(settings.load(run.folder), run.config)), "")
  except ValueError as error:  # of another version
    return str(error).splitlines()[0]


def failed(run: Run) -> dict | None:
  """What the last attempt ended with, if it failed: "error", "traceback", "when", "host"."""
  path = run.folder / _FAILED
  return json.loads(path.read_text()) if path.exists() else None


def deployed(metrics: dict) -> dict:
  """The numbers of the deployed branch in the content of a metrics.json."""
  return metrics[metrics["deployed"]]


def sweep(
  table: Table, base: ConfigDict, workdir: str | os.PathLike, task: str | None = None
) -> list[Run]:
  """Trains and evaluates every run that is not finished and that nobody else trains.

  A run that failed before is tried again, once. Returns when nothing is left that could be begun;
  other processes may still be at work.

  Returns:
    The runs that have failed.

  Raises:
    ValueError: a row's config cannot work, or `task` is wrong.
    signals.Preempted: SIGTERM or SIGINT came; what was running is saved.
  """
  mine = part(runs(table, base, workdir), task)
  begin = time.time()
  with _Signals() as signals:
    view = _View(mine)
    while True:
      view.show()
      run = next((run for run in mine if _can_begin(run, begin)), None)
      if run is None:
        break
      code = _train(run, signals, view)
      signals.check()
      # Where it is busy, another sweep took it between our look and our start.
      if code not in (0, _BUSY) and (failed(run) or {"when": 0})["when"] < begin:
        # Ended without a word: by the system for want of memory, or by a crash.
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        _record(run.folder, f"The process ended by {end}; {run.folder}/log.txt has what it said.")
    view.show(last=True)
  return [run for run in mine if state(run).word == "failed"]


def _can_begin(run: Run, begin: float) -> bool:
  if finished(run) or _holder(run):
    return False
  failure = failed(run)
  if failure and failure["when"] >= begin:
    return False
  if run.teacher is None:
    return True
  return _complete(run.teacher)


def _train(run: Run, signals: "_Signals", view: "_View") -> int:
  """The run in a process of its own; returns its exit code."""
  run.folder.mkdir(parents=True, exist_ok=True)
  arguments = (run.config.to_dict(), str(run.folder))
  process = _PROCESSES.Process(target=_life, args=arguments, daemon=True)
  process.start()
  signals.child = process
  try:
    while process.is_alive():
      process.join(2)
      view.show()
  finally:
    signals.child = None
  return process.exitcode


def _life(config: dict, folder: str) -> None:
  """What the process does: trains and evaluates, or leaves the reason why not."""
  os.setsid()  # Ctrl-C is the sweep's, which passes it on once
  threading.Thread(target=_end_with_parent, daemon=True).start()
  folder, config = pathlib.Path(folder), ConfigDict(config)
  log = open(folder / "log.txt", "a", buffering=1)
  os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
  logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
  config.log.progress = False
  try:
    with _locked(folder):
      run = Run(None, config.seed, config, folder, None)
      if finished(run):
        return
      from fdep_jax import train
      from fdep_jax.runtime import mesh

      mesh.start(config)
      try:
        train.train(config, folder)
      except signals.Preempted as error:
        print(error)
        sys.exit(_PREEMPTED)
      (folder / _FAILED).unlink(missing_ok=True)
  except files.InUse:
    sys.exit(_BUSY)
  except Exception as error:  # of any kind: it must not end the other rows
    traceback.print_exc()
    _record(folder, f"{type(error).__name__}: {error}", traceback.format_exc())
    sys.exit(1)


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  """The run's lock; not given up for the moment in which somebody looks whether it is held."""
  with contextlib.ExitStack() as stack:
    for attempt in reversed(range(5)):
      try:
        stack.enter_context(files.locked(folder, _LOCK))
        break
      except files.InUse:
        if not attempt:
          raise
        time.sleep(0.1)
    yield


def _end_with_parent() -> None:
  """Ends the process, which saves, when the sweep is killed."""
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os.kill(os.getpid(), signal.SIGTERM)


def _record(folder: pathlib.Path, error: str, trace: str = "") -> None:
  about = {"error": error, "when": time.time(), "host": socket.gethostname(), "traceback": trace}
  files.write_json(folder / _FAILED, about)


def _progress(run: Run) -> str:
  """ "step 40 of 100", from the end of metrics.jsonl."""
  try:
    with open(run.folder / "metrics.jsonl", "rb") as file:
      file.seek(max(0, os.path.getsize(file.name) - 4096))
      step = json.loads(file.read().rsplit(b"\n", 2)[-2])["step"]
  except (OSError, ValueError, KeyError, IndexError):
    return ""
  return f"step {step}" + (f" of {run.config.train.steps}" if run.config.train.steps else "")


class _View:
  """The status table: on a terminal redrawn in place, else printed when a run's state changes."""

  def __init__(self, mine: list[Run]):
    self._mine, self._shown, self._lines, self._time = mine, None, 0, 0.0

  def show(self, last: bool = False) -> None:
    live = sys.stdout.isatty()
    if not last and time.time() - self._time < 2:
      return
    self._time = time.time()
    states = [state(run) for run in self._mine]
    key = [s if live else s.word for s in states]
    if key == self._shown and not last:
      return
    self._shown = key
    if live and self._lines:
      print(f"\x1b[{self._lines}A\x1b[J", end="")
    text = status(self._mine, states)
    self._lines = text.count("\n") + 1
    print(text, flush=True)


def status(mine: Sequence[Run], states: Sequence[State]) -> str:
  """A line a run, and how many are in which state."""
  width = max((len(run.folder.name) for run in mine), default=0)
  lines = [f"{run.folder.name:<{width}}  {s}" for run, s in zip(mine, states, strict=True)]
  words = [s.word for s in states]
  counts = [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]
  return "\n".join([*lines, f"{time.strftime('%H:%M:%S')}  {', '.join(counts)}"])


class _Signals:
  """SIGTERM and SIGINT are passed on to the run that is under way, which saves, once."""

  def __init__(self):
    self.child, self._received, self._old = None, None, {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    first, self._received = self._received is None, number
    if self.child is None:
      self.check()
    elif first:
      self.child.terminate()

  def check(self) -> None:
    if self._received is not None:
      raise signals.Preempted(
        f"Ended by {signal.Signals(self._received).name}; the run that was under way is saved. The "
        "same command goes on from there."
      )
