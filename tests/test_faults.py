"""Faults: kills at any moment, damaged checkpoints, full disks, numbers that are not finite."""

import logging
import math
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TOYS, batch, lines, parameters, parts, toy_config

from fdep_jax import evaluate, losses, settings, train
from fdep_jax import step as step_lib
from fdep_jax.runtime import checkpoint, files, log, mesh, signals

# Processes are forked from one that has imported everything but has not started jax.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
  ["pytest", "orbax.checkpoint", "grain", "tensorboardX", "fdep_jax.train", "fdep_jax.report"]
)


def small(**changes):
  """The detector alone, scored at every second step."""
  return toy_config(
    **{
      "mode": "original",
      "data.synthetic_train": 10,  # 8 train, 2 held out
      "data.val_fraction": 0.2,
      "checkpoint.every_steps": 2,
      "eval.every_epochs": 1.0,  # two steps
      "log.every_steps": 1,
      **changes,
    }
  )


def best_parameters(workdir) -> dict[str, np.ndarray]:
  config = settings.load(workdir)
  _, _, _, state = parts(config)
  like = {name: state[name] for name in ("params", "stats", "rng")}
  state, _ = checkpoint.Checkpoints(workdir).restore(like, best=True)
  return {k: np.asarray(v) for k, v in checkpoint.flatten(state).items()}


def assert_same_run(workdir, undisturbed):
  """Parameters, optimiser, best checkpoint and log are those of the other run, to the bit."""
  config = settings.load(workdir)
  ours, theirs = (checkpoint.Checkpoints(w) for w in (workdir, undisturbed))
  assert ours.steps()[-1] == theirs.steps()[-1] and ours.best_step() == theirs.best_step()
  for read in (lambda w: parameters(w, config), best_parameters):
    a, b = read(workdir), read(undisturbed)
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], name)
  timeless = [
    [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(w)]
    for w in (workdir, undisturbed)
  ]
  assert timeless[0] == timeless[1]


# Killed processes


def life(config, workdir, compiled, messages, tell_at, stop_at, pace):
  """A training process that tells when it has come to a step, and waits for its end at another."""
  sys.stderr = open(f"{workdir}.log", "w", buffering=1)
  logging.basicConfig(level=logging.INFO, format="%(message)s", force=True, stream=sys.stderr)
  from fdep_jax import backbones

  backbones.__path__.append(str(TOYS))
  jax.config.update("jax_compilation_cache_dir", compiled)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  make_step = step_lib.make_step

  def counting_make_step(*arguments):
    compiled_step = make_step(*arguments)

    def counted(state, placed, batch):
      step = int(state["step"]) + 1
      if step == tell_at:
        messages.send(step)
      if step > stop_at:
        time.sleep(600)  # is killed here at the latest
      time.sleep(pace)
      return compiled_step(state, placed, batch)

    return counted

  step_lib.make_step = counting_make_step
  train.train(config, workdir)
  messages.send("done")


class Lives:
  """One run by a row of processes that get killed."""

  def __init__(self, config, workdir, compiled):
    self.config, self.workdir, self.compiled = config, workdir, compiled
    self.said = ""

  def start(self, tell_at=0, stop_at=10**9, pace=0.0):
    ours, theirs = PROCESSES.Pipe()
    arguments = (self.config, self.workdir, self.compiled, theirs, tell_at, stop_at, pace)
    process = PROCESSES.Process(target=life, args=arguments, daemon=True)
    process.start()
    theirs.close()
    return process, ours

  def hear(self, messages):
    assert messages.poll(300), pathlib.Path(f"{self.workdir}.log").read_text()[-2000:]
    try:
      return messages.recv()
    except EOFError:
      raise AssertionError(pathlib.Path(f"{self.workdir}.log").read_text()[-2000:]) from None

  def kill(self, rng: random.Random, begin: int, stop_at: int) -> None:
    """Kills a living process that has come to a step after `begin`, a moment later."""
    tell_at = rng.randint(begin + 1, stop_at)
    process, messages = self.start(tell_at, stop_at, pace=0.01)
    assert self.hear(messages) == tell_at
    time.sleep(rng.random() * 0.1)
    assert process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    self.said = pathlib.Path(f"{self.workdir}.log").read_text()
    newest = max(checkpoint.Checkpoints(self.workdir).steps(), default=0)
    # The interval, and the one while whose steps the last checkpoint was being written.
    assert newest >= tell_at - 1 - 2 * self.config.checkpoint.every_steps
    assert (f"continuing at step {begin} of" in self.said) == (begin > 0)

  def finish(self):
    process, messages = self.start()
    assert self.hear(messages) == "done"
    process.join()
    self.said = pathlib.Path(f"{self.workdir}.log").read_text()


def whole(workdir, step: int) -> bool:
  try:
    checkpoint._read(workdir / "checkpoints" / str(step))
    return True
  except checkpoint.Damaged:
    return False


def survive(tmp_path, kills: int, damages: int, config):
  """Trains once undisturbed, once with kills spread over the run, and compares."""
  compiled = str(tmp_path / "compiled")
  undisturbed = Lives(config, tmp_path / "undisturbed", compiled)
  undisturbed.finish()
  run, rng = Lives(config, tmp_path / "killed", compiled), random.Random(0)
  damage_at = sorted(rng.sample(range(kills // 3, kills - 2), damages))
  resumed = 0
  for number in range(3 * kills):
    # More kills if early ones came before the first checkpoint was whole.
    if number >= kills and not damage_at and resumed >= kills // 2:
      break
    begin = max(checkpoint.Checkpoints(run.workdir).steps(), default=0)
    # No process comes further than its share of the run, so that there is something left to kill.
    share = 1 + (number + 1) * (config.train.steps - 2) // max(kills, number + 1)
    stop_at = min(begin + rng.randint(1, 5), max(share, begin + 1), config.train.steps - 1)
    run.kill(rng, begin, stop_at)
    resumed += begin > 0
    steps = checkpoint.Checkpoints(run.workdir).steps()
    # Later if the second checkpoint is not whole: a kill may have interrupted its removal.
    if damage_at and number >= damage_at[0] and len(steps) > 1 and whole(run.workdir, steps[-2]):
      damage_at.pop(0)
      newest = run.workdir / "checkpoints" / str(steps[-1])
      damage(newest, rng.choice(list(DAMAGES)), rng)
      run.kill(rng, steps[-2], steps[-1])
      assert f"{newest} is damaged" in run.said
  run.finish()
  assert not damage_at and resumed >= kills // 2
  assert_same_run(run.workdir, undisturbed.workdir)
  return run


def test_two_kills_change_nothing(toy, tmp_path):
  config = small(**{"train.steps": 10})
  run = survive(tmp_path, 2, 0, config)
  # The folder was never anything but one run: what was half-written is gone.
  assert not list(run.workdir.rglob("*tmp*")) and not (run.workdir / "damaged").exists()


@pytest.mark.slow
def test_thirty_kills_over_sixty_steps_change_nothing(toy, tmp_path):
  survive(tmp_path, 30, 0, small(**{"train.steps": 60}))


@pytest.mark.slow
def test_five_damaged_newest_checkpoints_among_kills_change_nothing(toy, tmp_path):
  run = survive(tmp_path, 12, 5, small(**{"train.steps": 60}))
  assert (run.workdir / "damaged").is_dir()


def test_a_second_process_on_a_folder_is_refused_and_evaluation_of_it_works(toy, tmp_path):
  config = small(**{"train.steps": 50})
  run = Lives(config, tmp_path / "run", str(tmp_path / "compiled"))
  process, messages = run.start(tell_at=7, stop_at=6)
  assert run.hear(messages) == 7
  with pytest.raises(ValueError, match=rf"in use: process {process.pid} on \S+ trains in it"):
    train.train(config, run.workdir)
  while not checkpoint.Checkpoints(run.workdir).steps(best=True):
    time.sleep(0.1)
  metrics = evaluate.evaluate(run.workdir)
  assert 2 <= metrics["last"]["checkpoint"] <= 6
  assert process.is_alive()
  process.kill()
  process.join()
  with files.locked(run.workdir):  # the lock died with its holder
    pass


# Damaged checkpoints


def flip(path: pathlib.Path, rng: random.Random):
  content = bytearray(path.read_bytes())
  place = rng.randrange(len(content))
  content[place] ^= 1 << rng.randrange(8)
  path.write_bytes(content)
  return place


DAMAGES = {
  "flip": flip,
  "truncate": lambda path, rng: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  "zero": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
  "delete": lambda path, rng: path.unlink(),
}


def damage(folder: pathlib.Path, how: str, rng: random.Random):
  """The JSON object, or all data files (some are not read)."""
  data = [path for path in folder.glob("state/**/d/*") if path.is_file()]
  for path in rng.choice([[folder / "meta" / "metadata"], data]):
    DAMAGES[how](path, rng)


def tree(seed: int) -> dict:
  """Numbers as parameters have them: they do not compress, so a flipped bit stays a number."""
  values = np.random.default_rng(seed).normal(size=(3, 2000)).astype(np.float32)
  params = {f"w{i}": jnp.asarray(v) for i, v in enumerate(values)}
  return {"params": params, "step": jnp.int32(seed)}


def written(workdir, *steps):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    for step in steps:
      checkpoints.save(step, tree(step), {"step": step})
  return workdir


def test_every_damaged_file_is_noticed_or_does_not_matter(tmp_path, caplog):
  workdir, rng = written(tmp_path, 4, 8), random.Random(0)
  newest, copy = workdir / "checkpoints" / "8", tmp_path / "copy"
  shutil.copytree(newest, copy)
  files = sorted(p.relative_to(copy) for p in copy.rglob("*") if p.is_file())
  found = {4: 0, 8: 0}
  for file in files:
    for how in DAMAGES:
      shutil.rmtree(newest)
      shutil.copytree(copy, newest)
      DAMAGES[how](newest / file, rng)
      caplog.clear()
      state, meta = checkpoint.Checkpoints(workdir).restore(tree(0))
      found[meta["step"]] += 1
      for ours, theirs in zip(*map(jax.tree.leaves, (state, tree(meta["step"]))), strict=True):
        np.testing.assert_array_equal(ours, theirs)
      said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
      assert len(said) == (meta["step"] == 4) and all(f"{newest} is damaged" in s for s in said)
  assert found[4] >= 12 and found[8] > 0


@pytest.mark.parametrize("name", ["a#1", "50%", "a%20b", "a?b", "a:b", "a b|ä"])
def test_a_checkpoint_is_read_below_any_folder_name(name, tmp_path):
  workdir = written(tmp_path / name, 4)
  state, meta = checkpoint.Checkpoints(workdir).restore(tree(0))
  assert meta["step"] == 4
  for ours, theirs in zip(*map(jax.tree.leaves, (state, tree(4))), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_flipped_bits_of_values_are_noticed(tmp_path):
  workdir, rng = written(tmp_path, 4, 8), random.Random(1)
  newest = workdir / "checkpoints" / "8"
  largest = max(newest.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
  content = largest.read_bytes()
  for _ in range(40):
    place = flip(largest, rng)
    state, meta = checkpoint.Checkpoints(workdir).restore(tree(0))
    # The last fiftieth is the file's own index, which has bytes that nobody reads.
    assert meta["step"] == 4 or place > 0.98 * len(content)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, tree(meta["step"]))), strict=True):
      np.testing.assert_array_equal(ours, theirs)  # what is not noticed does not matter
    largest.write_bytes(content)
  assert checkpoint.Checkpoints(workdir).restore(tree(0))[1]["step"] == 8


def test_without_a_whole_checkpoint_a_run_says_what_to_do(toy, tmp_path):
  written(tmp_path, 4, 8)
  for step in (4, 8):
    damage(tmp_path / "checkpoints" / str(step), "zero", random.Random(0))
  with pytest.raises(ValueError, match=r"No checkpoint in .* is whole .* remove .* to train from"):
    train.train(small(), tmp_path)
  assert checkpoint.Checkpoints(tmp_path).steps() == [4, 8]  # nothing was touched


# The best checkpoint


@pytest.fixture
def no_final_evaluation(monkeypatch):
  monkeypatch.setattr(evaluate, "evaluate", lambda *arguments: {})


def test_best_and_newest_agree_whatever_was_lost(toy, tmp_path, no_final_evaluation, monkeypatch):
  # The held-out score is made to rise until step 6 and to fall then.
  heights = {2: 0.2, 4: 0.4, 6: 0.6, 8: 0.3, 10: 0.5}
  scored = score_by_step(monkeypatch, heights)
  config = small(**{"train.steps": 10})
  train.train(config, tmp_path / "undisturbed")
  assert checkpoint.Checkpoints(tmp_path / "undisturbed").best_step() == 6
  train.train(small(**{"train.steps": 6}), tmp_path / "half")
  half = checkpoint.Checkpoints(tmp_path / "half")
  assert half.steps() == [4, 6] and half.steps(best=True) == [2, 4, 6]

  def killed_before_the_best_was_written(w):
    shutil.rmtree(w / "best" / "6")

  def killed_before_the_newest_was_written(w):
    shutil.rmtree(w / "checkpoints" / "6")

  def newest_damaged(w):
    damage(w / "checkpoints" / "6", "flip", random.Random(0))

  def killed_while_old_ones_were_removed(w):
    shutil.rmtree(w / "checkpoints" / "4" / "state")
    shutil.rmtree(w / "best" / "2" / "meta")

  def killed_while_writing(w):
    for name in ("checkpoints", "best"):
      shutil.copytree(w / name / "6", w / name / "8.orbax-checkpoint-tmp")
      shutil.rmtree(w / name / "8.orbax-checkpoint-tmp" / "meta")
    with open(w / "metrics.jsonl", "a") as file:
      file.write('{"step": 7, "loss": 0.')
    (w / "config.partial").write_text('{"se')

  for fault, start in (
    (killed_before_the_best_was_written, 6),
    (killed_before_the_newest_was_written, 4),
    (newest_damaged, 4),
    (killed_while_old_ones_were_removed, 6),
    (killed_while_writing, 6),
  ):
    workdir = tmp_path / fault.__name__
    shutil.copytree(tmp_path / "half", workdir)
    fault(workdir)
    scored.clear()
    train.train(config, workdir)
    assert scored == [s for s in heights if s > start], fault
    assert_same_run(workdir, tmp_path / "undisturbed")


def score_by_step(monkeypatch, heights: dict[int, float]) -> list[int]:
  """The held-out score at each step; returns the list of steps at which it was asked for."""
  asked = []

  class Score:
    def __init__(self, hse):
      self.hse = hse

    def as_dict(self):
      return {"hse": self.hse}

  def probabilities(forward, state, *arguments):
    asked.append(int(state["step"]))
    yield 0, {}

  def score(maps, samples, save=None):
    assert len(list(maps)) == 1
    return {"light": Score(heights[asked[-1]])}

  monkeypatch.setattr(evaluate, "probabilities", probabilities)
  monkeypatch.setattr(evaluate, "score", score)
  return asked


def test_a_damaged_best_checkpoint_falls_back(toy, tmp_path, monkeypatch, caplog):
  with monkeypatch.context() as patch:
    score_by_step(patch, {2: 0.2, 4: 0.4})
    patch.setattr(evaluate, "evaluate", lambda *arguments: {})
    train.train(small(**{"train.steps": 4}), tmp_path)
  damage(tmp_path / "best" / "4", "truncate", random.Random(0))
  metrics = evaluate.evaluate(tmp_path)
  assert metrics["checkpoint"] == 2 and metrics["last"]["checkpoint"] == 4
  assert f"{tmp_path / 'best' / '4'} is damaged" in caplog.text
  damage(tmp_path / "best" / "2", "delete", random.Random(0))
  with pytest.raises(ValueError, match="Remove .*best to use the newest checkpoint"):
    evaluate.evaluate(tmp_path)


# Signals


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_during_an_evaluation_ends_it_and_it_is_repeated(
  toy, tmp_path, no_final_evaluation, monkeypatch, sent
):
  heights = {2: 0.2, 4: 0.4, 6: 0.3}
  config = small(**{"train.steps": 6, "checkpoint.every_steps": 3})
  scored = score_by_step(monkeypatch, heights)
  train.train(config, tmp_path / "undisturbed")
  whole = evaluate.probabilities

  def interrupted(*arguments):
    for item in whole(*arguments):
      yield item
      if scored[-1] == 4:
        os.kill(os.getpid(), sent)
        yield item

  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "probabilities", interrupted)
    with pytest.raises(signals.Preempted, match=f"by {sent.name} at step 4 of 6"):
      train.train(config, tmp_path / "run")
  assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  assert checkpoint.Checkpoints(tmp_path / "run").steps() == [3, 4]
  scored.clear()
  train.train(config, tmp_path / "run")
  assert scored == [4, 6]
  assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def deaf(messages):
  with signals.Signals() as ending, ending.waiting():
    messages.send("listening")
    while True:
      time.sleep(0.01)


def test_a_second_signal_ends_a_process_that_waits():
  ours, theirs = PROCESSES.Pipe()
  process = PROCESSES.Process(target=deaf, args=(theirs,), daemon=True)
  process.start()
  assert ours.poll(120)
  os.kill(process.pid, signal.SIGTERM)
  time.sleep(0.5)
  assert process.is_alive()
  os.kill(process.pid, signal.SIGTERM)
  process.join(60)
  assert process.exitcode == 1


def test_a_signal_outside_the_loop_ends_at_once():
  with pytest.raises(signals.Preempted, match="SIGINT outside the training loop"):
    with signals.Signals():
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(10)


# Disks


def test_two_writers_of_one_file_leave_the_whole_file_of_the_last(tmp_path):
  path = tmp_path / "metrics.json"
  with files.replacing(path) as last:
    last.write_text("last")
    with files.replacing(path) as first:
      first.write_text("first")
    assert path.read_text() == "first"
    with files.replacing_all([path]) as (all_of_another,):
      all_of_another.write_text("second")
    assert path.read_text() == "second"
  assert path.read_text() == "last" and list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_killed_processes_are_removed_those_of_running_ones_kept(tmp_path):
  killed, running = (tmp_path / f"x.{i}0a1b2c3.partial" for i in range(2))
  foreign = tmp_path / "x.iso.partial"  # as some browsers call theirs
  for path in (killed, running, foreign):
    path.write_text("{")
  for path in (killed, foreign):
    os.utime(path, (0, 0))
  files.write(tmp_path / "x", "new")
  assert {*tmp_path.iterdir()} == {running, foreign, tmp_path / "x"}


def test_a_write_that_fails_late_keeps_the_checkpoint_before(tmp_path):
  big = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=300_000))}}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(4, big, {"step": 4})
  checkpoints.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # as a full disk, without one
  try:
    checkpoints.save(8, big, {"step": 8})  # returns: the disk is asked later
    with pytest.raises(OSError, match=r"step 8 cannot be written .*; step 4 is kept. Make room"):
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  checkpoints.close()
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
  assert checkpoint.Checkpoints(tmp_path).restore(big)[1] == {"step": 4}
  checkpoints.save(8, big, {"step": 8})
  checkpoints.close()
  assert checkpoint.Checkpoints(tmp_path).steps() == [4, 8]


# Numbers that are not finite


@pytest.fixture
def poison(monkeypatch):
  """A batch whose masks are full gives a loss that is not a number."""
  criterion = losses.criterion

  def poisoned(mask, mode):
    plain = criterion(mask, mode)
    return lambda logits: plain(logits) * jnp.where(mask.all(), jnp.nan, 1.0)

  monkeypatch.setattr(losses, "criterion", poisoned)


def test_a_step_that_is_not_finite_is_left_out(toy, poison):
  config = small()
  prior, model, optimizer, state = parts(config)
  step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
  good = batch()
  bad = {**good, "mask": np.ones_like(good["mask"])}
  states = []
  for data in (good, bad, bad, good):
    state, metrics = step(state, None, data)
    states.append(jax.device_get({k: v for k, v in state.items() if k != "rng"}))
    assert math.isfinite(metrics["loss"]) == (data is good)
  kept = [jax.tree.leaves([s[k] for k in ("params", "stats", "opt")]) for s in states]
  for first, third in zip(kept[0], kept[2], strict=True):
    np.testing.assert_array_equal(first, third)
  assert any((a != b).any() for a, b in zip(kept[2], kept[3], strict=True))
  assert [int(s["step"]) for s in states] == [1, 2, 3, 4]
  assert [int(s["skipped"]["count"]) for s in states] == [0, 1, 2, 2]
  assert [int(s["skipped"]["first"]) for s in states] == [0, 2, 2, 2]


def test_statistics_that_are_not_finite_count_though_the_loss_is(toy):
  # A variance that overflows makes the layer's output 0: the loss does not show it.
  config = small()
  prior, model, optimizer, state = parts(config)
  state["params"]["backbone"]["stem"]["conv"]["kernel"].set_value(
    state["params"]["backbone"]["stem"]["conv"]["kernel"][...] * 3e18
  )
  step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
  state, metrics = step(state, None, batch())
  assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["stats"]))
  assert int(state["skipped"]["count"]) == 1


def test_a_run_stops_at_a_step_that_is_not_finite_and_goes_on_without_it(
  toy, poison, tmp_path, no_final_evaluation, monkeypatch
):
  put = mesh.put_batch
  seen = []

  def fifth_is_bad(data, the_mesh):
    if isinstance(data, dict):
      seen.append(1)
      if first + len(seen) == 5:
        data = {**data, "mask": np.ones_like(data["mask"])}
    return put(data, the_mesh)

  monkeypatch.setattr(mesh, "put_batch", fifth_is_bad)
  score_by_step(monkeypatch, {8: 0.1})
  changes = {"checkpoint.every_steps": 3, "log.every_steps": 100, "eval.every_epochs": 100.0}
  first, config = 0, small(**changes)
  config.train.schedule = "linear_schedule"
  config.train.schedule_args = {"init_value": 8e-4, "end_value": 0.0, "transition_steps": "steps"}
  with pytest.raises(FloatingPointError) as info:
    train.train(config, tmp_path)
  message = str(info.value)  # noticed before step 6 is saved, though nothing was logged
  assert "not finite at step 5" in message and "good checkpoint is step 3" in message
  assert checkpoint.Checkpoints(tmp_path).steps() == [3]
  first, config.train.nonfinite = 3, "skip"
  seen.clear()
  train.train(config, tmp_path)
  state = parameters(tmp_path, config)
  assert all(np.isfinite(value).all() for value in state.values())
  assert int(state["skipped/count"]) == 1 and int(state["skipped/first"]) == 5
  last = [line for line in lines(tmp_path) if "loss" in line][-1]
  assert last["step"] == 8 and last["skipped"] == 1
  assert last["learning_rate"] == pytest.approx(2e-4)  # of the seventh update
  assert {int(v) for k, v in state.items() if k.startswith("opt/") and k.endswith("count")} == {7}


def test_the_logged_learning_rate_is_that_of_the_last_update():
  loop, written = object.__new__(train.Loop), []
  loop.config, loop.schedule = small(**{"train.nonfinite": "skip"}), lambda count: 1 - count / 10
  loop.score, loop.minutes = "", log.Minutes(10, 0, shown=True)
  loop.progress = train.Progress()
  file = types.SimpleNamespace(write=lambda step, values: written.append(values["learning_rate"]))
  bar = types.SimpleNamespace(set_postfix=lambda **_: None)
  for step, skipped in enumerate((1, 1, 2, 3, 3), 1):  # updates are made at steps 2 and 5
    loop.progress.step, loop.state = step, {"skipped": {"count": skipped, "first": 1}}
    loop._log({"loss": 1.0}, file, train.Clock(0, 1), bar)
  assert written == [1, 1, 1, 1, 0.9]


# Devices and memory


def test_a_run_goes_on_with_a_different_number_of_devices(
  toy, tmp_path, no_final_evaluation, monkeypatch
):
  # Plain gradient descent: Adam turns the rounding in gradients that are zero into whole steps.
  monkeypatch.setattr(step_lib, "make_optimizer", lambda config, steps: optax.sgd(0.1))
  score_by_step(monkeypatch, {step: 0.5 for step in range(9)})
  train.train(small(**{"train.steps": 6}), tmp_path / "one")
  for devices, steps in ((2, 2), (1, 4), (4, 6)):
    train.train(small(**{"train.steps": steps, "host_devices": devices}), tmp_path / "many")
  one, many = (parameters(tmp_path / name, small()) for name in ("one", "many"))
  assert settings.load(tmp_path / "many").host_devices == 4
  for name in one:
    np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


def resident() -> int:
  """Bytes."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize()


def grow(config, workdir, messages):
  from fdep_jax import backbones

  backbones.__path__.append(str(TOYS))
  sizes, write = {}, log.Log.write

  def measure(log, step, values):
    write(log, step, values)
    sizes[step] = resident()

  log.Log.write = measure
  train.train(config, workdir)
  messages.send(sizes)


@pytest.mark.slow
def test_memory_does_not_grow_over_five_hundred_steps(tmp_path):
  config = toy_config(
    **{
      "train.steps": 800,
      "eval.every_epochs": 10.0,
      "checkpoint.every_steps": 25,
      "log.tensorboard": True,
    }
  )
  ours, theirs = PROCESSES.Pipe()
  process = PROCESSES.Process(target=grow, args=(config, tmp_path, theirs), daemon=True)
  process.start()
  assert ours.poll(1800)
  sizes = ours.recv()
  process.join()
  before = np.median([size for step, size in sizes.items() if 250 < step <= 300])
  after = np.median([size for step, size in sizes.items() if 750 < step <= 800])
  assert after <= 1.01 * before, f"{before / 2**20:.0f} MiB, 500 steps later {after / 2**20:.0f}"
