"""Trains the unfinished runs of a table (`--mode sweep`).

Every run trains in its own process and its own folder below the work folder, and holds a lock there
that the system releases however the process ends. So any number of sweeps, on one machine or on
many with a shared folder, divide a table's rows among them. Each may be killed and started again.
"""

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

from fdep_jax import build, settings
from fdep_jax import step as step_lib
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
  teacher: pathlib.Path | None  # folder of the run that must finish first


class State(NamedTuple):
  """The state of a run.

  `word` is "missing", "waiting", "begun", "running", "failed", "finished" or "of a different
  config".
  """

  word: str
  detail: str = ""

  def __str__(self):
    return f"{self.word} {self.detail}".strip()


def command(flags) -> None:
  """Runs `--mode sweep`; exits with 1 if a run failed."""
  table, base = experiments.from_flags(flags)
  failed = sweep(table, base, flags.workdir, flags.task)
  if failed:
    print(f"{len(failed)} failed; reasons:", file=sys.stderr)
    print(*(f"  {run.folder / _FAILED}" for run in failed), sep="\n", file=sys.stderr)
    sys.exit(1)


def runs(table: Table, base: ConfigDict, workdir: str | os.PathLike) -> list[Run]:
  """Lists the run of every row and seed: stage by stage, in each ordered by seed.

  Raises:
    ValueError: settings of rows are wrong; one error lists all such rows.
  """
  problems = {}
  for row in table.rows:
    try:
      _check(experiments.resolve(base, row, table.seeds[0], workdir))
    except ValueError as error:
      problems.setdefault(str(error), []).append(row.name)
  if problems:
    raise ValueError("\n".join(f"{', '.join(rows)}: {text}" for text, rows in problems.items()))
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


def _check(config: ConfigDict) -> None:
  """Refuses a config that could not train, whatever its data and weights are."""
  settings.check(config)
  if config.mode != "classical":
    build.check_network(config)
    step_lib.make_schedule(config, config.train.steps or 10**6)


def part(everything: Sequence[Run], task: str | None) -> list[Run]:
  """Selects the runs of task "i/n", 0 ≤ i < n: every n-th, students with their teacher.

  Raises:
    ValueError: `task` has a different form.
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
  """Reads the state of a run from its folder."""
  metrics = results(run)
  if metrics is not None:
    value = deployed(metrics)["hse"]
    return State("finished", "" if value is None else f"HSE {100 * value:.2f}")
  holder = _holder(run)
  if holder:
    return State("running", f"{_progress(run)} ({holder})")
  failure = failed(run)
  if failure:
    return State("failed", failure["error"].splitlines()[0][:120])
  if (run.folder / "config.json").exists():
    other = _other_config(run)
    return State("of a different config", f"({other})") if other else State("begun", _progress(run))
  if run.teacher and _complete(run.teacher) is None:
    return State("waiting", f"for {run.teacher.name}")
  return State("missing")


def _holder(run: Run) -> str:
  return files.holder(run.folder, _LOCK) or files.holder(run.folder, "lock")


def finished(run: Run) -> bool:
  """Returns whether the folder has the results of exactly this config, at its full length."""
  return results(run) is not None


def results(run: Run) -> dict | None:
  """Reads the metrics of a run that is `finished`; None if it is not.

  A training that starts may remove the file between two looks, so it is read once.
  """
  metrics = _complete(run.folder)
  if metrics is None or _other_config(run):
    return None
  if run.config.mode == "classical":
    return metrics
  theirs = settings.load(run.folder).train
  alike = all(theirs[name] == run.config.train[name] for name in ("steps", "epochs"))
  return metrics if alike else None


def _complete(folder: pathlib.Path) -> dict | None:
  """Reads the metrics of a completed training; None if there is none."""
  try:
    metrics = json.loads((folder / "metrics.json").read_text())
    config = settings.load(folder)
  except (ValueError, FileNotFoundError):
    return None
  if config.mode == "classical":  # written when everything is done
    return metrics
  steps = config.train.steps
  planned = steps if steps > 0 else metrics.get("steps")  # older versions did not write "steps"
  return metrics if planned is not None and metrics["last"]["checkpoint"] >= planned else None


def _other_config(run: Run) -> str:
  """Returns the first setting in which the folder's run differs, "" if none does."""
  try:
    return next(iter(settings.differing(settings.load(run.folder), run.config)), "")
  except ValueError as error:  # from a different version
    return str(error).splitlines()[0]


def failed(run: Run) -> dict | None:
  """Reads how the last attempt failed, if it did: "error", "traceback", "when", "host"."""
  try:
    return json.loads((run.folder / _FAILED).read_text())
  except FileNotFoundError:  # none, or removed by the attempt that succeeds now
    return None


def deployed(metrics: dict) -> dict:
  """Returns the numbers of the deployed branch from the content of a metrics.json."""
  return metrics[metrics["deployed"]]


def sweep(
  table: Table, base: ConfigDict, workdir: str | os.PathLike, task: str | None = None
) -> list[Run]:
  """Trains and evaluates every run that is neither finished nor trained by another process.

  Retries once a run that failed earlier. Returns when it can start no more runs; other processes
  may still be training theirs.

  Returns:
    The failed runs.

  Raises:
    ValueError: a row's config or `task` is wrong.
    signals.Preempted: SIGTERM or SIGINT was received; the run in progress is saved.
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
      # _BUSY: another sweep took the run after we saw it free.
      if code not in (0, _BUSY) and (failed(run) or {"when": 0})["when"] < begin:
        # Ended without a record: killed by the system for lack of memory, or crashed.
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        _record(run.folder, f"The process ended by {end}; see {run.folder}/log.txt.")
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
  return _complete(run.teacher) is not None


def _train(run: Run, signals: "_Signals", view: "_View") -> int:
  """Trains a run in its own process; returns the exit code."""
  run.folder.mkdir(parents=True, exist_ok=True)
  arguments = (settings.as_dict(run.config), str(run.folder))
  daemon = run.config.mode != "classical"  # whose pool a daemon could not start
  process = _PROCESSES.Process(target=_life, args=arguments, daemon=daemon)
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
  """Trains and evaluates a run, or records why it failed; the main function of its process."""
  os.setsid()  # only the sweep receives Ctrl-C; it passes it on once
  threading.Thread(target=_end_with_parent, daemon=True).start()
  folder, config = pathlib.Path(folder), ConfigDict(config)
  log = open(folder / "log.txt", "a", buffering=1)
  os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
  logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
  config.log.progress = False
  try:
    with files.locked(folder, _LOCK):
      run = Run(None, config.seed, config, folder, None)
      if finished(run):
        return
      from fdep_jax import train, untrained
      from fdep_jax.runtime import mesh

      if config.mode == "classical":
        untrained.evaluate(folder, config)
        (folder / _FAILED).unlink(missing_ok=True)
        return
      mesh.start(config)
      try:
        train.train(config, folder)
      except signals.Preempted as error:
        print(error)
        sys.exit(_PREEMPTED)
      (folder / _FAILED).unlink(missing_ok=True)
  except files.InUse:
    sys.exit(_BUSY)
  except Exception as error:  # of any kind: other rows must go on
    traceback.print_exc()
    _record(folder, f"{type(error).__name__}: {error}", traceback.format_exc())
    sys.exit(1)


def _end_with_parent() -> None:
  """Ends this process, which then saves, if the sweep is killed."""
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os.kill(os.getpid(), signal.SIGTERM)


def _record(folder: pathlib.Path, error: str, trace: str = "") -> None:
  about = {"error": error, "when": time.time(), "host": socket.gethostname(), "traceback": trace}
  files.write_json(folder / _FAILED, about)


def _progress(run: Run) -> str:
  """Returns the progress, such as "step 40 of 100", from the end of metrics.jsonl."""
  try:
    with open(run.folder / "metrics.jsonl", "rb") as file:
      file.seek(max(0, os.path.getsize(file.name) - 4096))
      step = json.loads(file.read().rsplit(b"\n", 2)[-2])["step"]
  except (OSError, ValueError, KeyError, IndexError):
    return ""
  return f"step {step}" + (f" of {run.config.train.steps}" if run.config.train.steps else "")


class _View:
  """The status table: redrawn in place on a terminal, else printed when a run's state changes."""

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
  """Formats one line a run, then the number of runs in each state."""
  width = max((len(run.folder.name) for run in mine), default=0)
  lines = [f"{run.folder.name:<{width}}  {s}" for run, s in zip(mine, states, strict=True)]
  words = [s.word for s in states]
  counts = [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]
  return "\n".join([*lines, f"{time.strftime('%H:%M:%S')}  {', '.join(counts)}"])


class _Signals:
  """Passes the first SIGTERM or SIGINT on to the run in progress, which then saves."""

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
        f"Ended by {signal.Signals(self._received).name}; the run in progress is saved. The "
        "same command goes on from there."
      )
