"""Trains a config: prepares the inputs and repeats the compiled step (paper §4.2)."""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from fdep_jax import build, data, evaluate, forward, pseudo, settings, start
from fdep_jax import step as step_lib
from fdep_jax.data import resident
from fdep_jax.metrics import columns
from fdep_jax.priors import Prior, bank
from fdep_jax.runtime import checkpoint, files, mesh
from fdep_jax.runtime.log import Log, Minutes, Profile, check_profile
from fdep_jax.runtime.signals import Preempted, Signals


@dataclasses.dataclass
class Progress:
  """The progress of a run, saved with every checkpoint; `skipped` is saved in the state."""

  step: int = 0  # steps done
  best: float = -math.inf  # score of the deployed branch on the selection images
  best_step: int | None = None
  evaluated: int = 0  # last step whose selection images were scored
  skipped: int = 0  # steps that were not finite


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict:
  """Trains a config, from the newest checkpoint if there is one, then evaluates.

  Args:
    config: of the run.
    workdir: its folder, created if absent.

  Returns:
    The final metrics, as `evaluate.evaluate`.

  Raises:
    ValueError, FileNotFoundError: the config, data, weights or folder are wrong or missing,
      another process trains in the folder, or the processes of the run were started differently.
    FloatingPointError: a step is not finite (train.nonfinite="stop").
    OSError: a file cannot be written; earlier checkpoints are whole.
    Preempted: SIGTERM or SIGINT was received; the state is saved.
  """
  workdir = files.expand(workdir)
  settings.check(config)
  mesh.agree({**settings.shared(config), "workdir": str(workdir.absolute())})
  moved = bool(checkpoint.Checkpoints(workdir).steps())  # then `_restore` compares the contents
  settings.check_workdir(workdir, config, moved)
  build.check_inputs(config)
  source, weights = config.train.init_from, None
  if source and not moved:
    weights = start.read(source, config.model.backbone)
  # Refuses wrong arguments before reading data; the number of epochs' steps is not yet known.
  step_lib.check_schedule(config, config.train.steps or 10**6)
  check_profile(config, config.train.steps or 10**6)
  the_mesh = mesh.make(config.host_devices, config.train.batch_size)
  with Signals(mesh.minimum, jax.process_count()) as signals:
    images = build.load_images(config)
    identity = fingerprints(images)  # of the true masks: a teacher's may differ by rounding
    if config.train.labels != "true":
      identity["teacher"] = pseudo.fingerprint(config)
      images = images._replace(train=pseudo.relabel(config, images.train, the_mesh))
    if config.data.on_device:
      resident.check_room(images.train, the_mesh)
    prior = build.load_prior(config)
    mesh.agree({**identity, "prior": prior.sha256 if prior else None})
    crops = _crop_bank(config, images.train) if config.prior.bank else None
    levels = None
    if crops and prior:
      folder = files.expand(config.prior.bank_folder or workdir / "bank")
      levels = bank.Bank(folder, crops, prior, keep_old=bool(config.prior.bank_folder))
    with files.locked(workdir) if mesh.writes() else contextlib.nullcontext():
      settings.check_workdir(workdir, config, moved)  # again: now no other process can claim it
      _describe(config, images, prior)
      model = build.create_model(config, prior)
      if weights:
        start.fill(model, weights, source)
      loop = Loop(config, workdir, the_mesh, images, prior, crops, levels, model, signals, identity)
      loop.train()
      signals.check()
      return evaluate.evaluate(workdir, config, (images, prior, model))


def fingerprints(images: build.Images) -> dict[str, str]:
  """Returns a SHA-256 of the images and masks of each split."""
  return {split: data.fingerprint(getattr(images, split)) for split in ("train", "val", "test")}


class Loop:
  """Takes the remaining steps of a run, with its evaluations, checkpoints and logs.

  Args:
    config: of the run.
    workdir: its folder.
    the_mesh: devices.
    images: of the run.
    prior: of the run, or None.
    crops: the crops of a prior bank, or None.
    levels: the bank of their levels, or None.
    model: newly initialised.
    signals: already entered.
    identity: SHA-256 of what the run's data are; default that of `images`.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: pathlib.Path,
    the_mesh,
    images: build.Images,
    prior: Prior | None,
    crops: data.CropBank | None,
    levels: bank.Bank | None,
    model,
    signals: Signals,
    identity: dict[str, str] | None = None,
  ):
    self.config, self.workdir, self.mesh, self.signals = config, workdir, the_mesh, signals
    self.images, self.crops, self.bank = images, crops, levels
    self.memory = None
    if config.data.on_device:
      self.memory = resident.Resident(images.train, config.data.crop, the_mesh)
    self.steps = step_lib.total_steps(config, len(images.train))
    step_lib.check_schedule(config, self.steps)
    check_profile(config, self.steps)
    self.claimed = False
    self.meta = {
      "steps": self.steps,
      "selected_by": config.eval.select_by,
      "mean": images.mean,
      "std": images.std,
      "range": images.range,
      "dino_sha256": prior.sha256 if prior else None,
      "dino_levels": list(prior.blocks) if prior else None,
      "data_sha256": identity or fingerprints(images),
    }
    optimizer = step_lib.make_optimizer(config, self.steps)
    state = step_lib.init_state(model, optimizer)
    self.checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    state, self.progress = self._restore(state)
    self.start = self.progress.step
    self.state = mesh.put_replicated(state, the_mesh)
    self.prior = prior.placed(the_mesh, config.prior.shard) if prior else None
    self.take_step = step_lib.make_step(config, model, optimizer, images.mean, images.std, the_mesh)
    self.take_steps = step_lib.make_steps(self.take_step, the_mesh)
    self.forward = forward.make_forward(config, model, images.mean, images.std)
    self.selection = images.val if config.eval.select_on == "val" else images.test
    per_epoch = len(images.train) / config.train.batch_size  # steps
    self.every_eval = max(config.eval.least_steps, round(config.eval.every_epochs * per_epoch))
    self.score = ""  # the last on the selection images, in words
    self.schedule = step_lib.make_schedule(config, self.steps)

  def _restore(self, state: dict) -> tuple[dict, Progress]:
    """Restores the newest checkpoint if there is one, and rewinds the folder to it."""
    progress = Progress()
    if self.checkpoints.steps():
      state, saved = self.checkpoints.restore(state)
      self._check_continues(saved)
      progress.step, progress.best_step = saved["step"], saved["best_step"]
      progress.evaluated = saved["evaluated"]
      progress.best = saved["best"] if saved["best"] is not None else -math.inf
      if progress.step == self.steps:
        logging.info("all %d steps are done; evaluating again", self.steps)
      else:
        logging.info("continuing at step %d of %d", progress.step, self.steps)
    if mesh.writes():
      self.checkpoints.rewind(progress.step)
    mesh.minimum(0)  # a barrier: no process reads the folder earlier
    progress.skipped = int(state["skipped"]["count"])
    return state, progress

  def _check_continues(self, saved: dict) -> None:
    """Raises ValueError if the checkpoint is of other weights or images, or of a longer run."""
    build.check_prior(self.meta["dino_sha256"], saved, self.workdir, self.config)
    if any(not math.isclose(saved[k], self.meta[k], rel_tol=1e-9) for k in ("mean", "std")):
      raise ValueError(
        f"{self.workdir} was trained on different images (grey mean {saved['mean']:.6f}, deviation "
        f"{saved['std']:.6f}) than those of {self.config.data.root} ({self.meta['mean']:.6f}, "
        f"{self.meta['std']:.6f}). Set data.root to the data it was trained on, or choose a "
        "different --workdir."
      )
    # Checkpoints of older versions have no fingerprint of the data.
    ours, theirs = self.meta["data_sha256"], saved.get("data_sha256", {})
    changed = [name for name, found in theirs.items() if found != ours.get(name)]
    if changed:
      texts = (
        "weights of its teacher" if n == "teacher" else f"{n} images or masks" for n in changed
      )
      raise ValueError(
        f"{self.workdir} was trained with different {' and '.join(texts)} than there are now. "
        "Put them back, or choose a different --workdir."
      )
    if saved["step"] > self.steps:
      raise ValueError(
        f"{self.workdir} has done {saved['step']} steps, and this config asks for {self.steps}. A "
        "run cannot be made shorter: choose a different --workdir. An earlier state can be scored: "
        "--mode eval --checkpoint STEP --out DIR."
      )

  def _claim(self) -> None:
    """Claims the folder, once nothing that can fail at once has failed."""
    if not self.claimed and mesh.writes():
      settings.claim_workdir(self.workdir, self.config, moved=bool(self.start))
      if self.start < self.steps:  # from when the run had fewer steps
        (self.workdir / "metrics.json").unlink(missing_ok=True)
    self.claimed = True

  def train(self) -> None:
    """Takes the remaining steps.

    Raises:
      Preempted, FloatingPointError, OSError: as `train`.
    """
    config, progress = self.config, self.progress
    iterator = self._batches()
    shown = config.log.progress and mesh.writes() and sys.stderr.isatty()
    self.minutes = Minutes(self.steps, self.start, shown or not mesh.writes())
    with (
      self.signals.waiting(),
      self.checkpoints,
      contextlib.closing(iterator),
      Log(self.workdir, config, self.start) as log,
      tqdm(total=self.steps, initial=self.start, disable=not shown) as bar,
      Profile(self.workdir, config) as profile,
    ):
      if progress.best_step == self.start and self.start:
        if self.checkpoints.best_step() != self.start:
          self.save(to_best=True)  # the process was killed between the two saves
      clock = Clock(self.start, config.train.batch_size)
      try:
        if self.start:  # the evaluation at this step may have been interrupted
          self._after(self.start, log, clock)
        else:
          self._check_signals(0)
        if self.start == self.steps:
          self._claim()
        for steps in self._dispatches():
          step = steps[-1]
          profile.before(steps)
          metrics = self._step([next(iterator) for _ in steps])
          profile.after(steps, metrics)
          bar.update(len(steps))
          first, last = self.start + 1 in steps, step == self.steps
          if step % config.log.every_steps == 0 or first or last:
            self._log(metrics, log, clock, bar)
          elif self.minutes.due():  # `log.every_steps` take longer than a minute
            self._tell(metrics, clock)
          self._after(step, log, clock)
      except Preempted:
        self._save_preempted()

  def _batches(self):
    config = self.config
    iterator = data.train_iterator(
      self.images.train,
      crop=config.data.crop,
      batch_size=config.train.batch_size,
      seed=config.seed,
      augment=config.data.augment,
      target_crop_prob=config.data.target_crop_prob,
      crop_margin=config.data.crop_margin,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      threads=config.data.threads,
      bank=self.crops,
      on_device=config.data.on_device,
    )
    iterator.set_state({"next_index": self.start})
    return iterator

  def _dispatches(self) -> Iterator[range]:
    """Yields the steps of every call: `train.steps_per_dispatch`, or one before something is due.

    They depend on the config and the steps done alone, so an interruption changes nothing.
    """
    config, step = self.config, self.start
    due = (self.every_eval, config.checkpoint.every_steps, config.log.every_steps)
    while step < self.steps:
      end = step + config.train.steps_per_dispatch
      if end > self.steps or any(step // every != (end - 1) // every for every in due):
        end = step + 1
      yield range(step + 1, end + 1)
      step = end

  def _step(self, batches: Sequence[dict]) -> dict:
    """Takes a step with each batch, in one call; returns the last one's metrics, on the device."""
    batches = [self._placed(batch, self.progress.step + i) for i, batch in enumerate(batches)]
    if len(batches) == 1:
      (batch,) = batches
      if self.memory:
        batch |= self.memory.batch(batch.pop("choice"))
      self.state, metrics = self.take_step(self.state, self.prior, batch)
    else:
      self.state, metrics = self.take_steps(self.state, self.prior, self.memory, batches)
    if not self.claimed:
      jax.block_until_ready(metrics)  # a step that needs too much memory fails here
      self._claim()
    self.progress.step += len(batches)
    return metrics

  def _placed(self, batch: dict, step: int) -> dict:
    """Puts a batch on the devices, with the bank's levels; `step` steps are done before it."""
    numbers = batch.pop("crop", None)
    if self.bank:
      config = self.config
      with self.signals.at_once():  # an interrupted bank is continued later
        self.bank.prepare(step, config.train.batch_size, self.mesh, config.log.progress)
      batch["levels"] = self.bank.levels(numbers)
    return mesh.put_batch(batch, self.mesh)

  def _log(self, metrics: dict, log: Log, clock: "Clock", bar) -> None:
    self._check_finite()
    step = self.progress.step
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    metrics["images_per_second"] = rate = clock.rate(step)
    # Of the last update. A step that is left out is none, so the schedule does not count it.
    metrics["learning_rate"] = float(self.schedule(max(step - self.progress.skipped - 1, 0)))
    if self.config.train.nonfinite == "skip":
      metrics["skipped"] = self.progress.skipped
    log.write(step, metrics)
    self.minutes.tell(step, metrics, self.score)
    bar.set_postfix(loss=f"{metrics['loss']:.4f}", img_s=f"{rate:.1f}")

  def _tell(self, metrics: dict, clock: "Clock") -> None:
    """Tells of the step without a line in metrics.jsonl, which depends on steps alone."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    values["images_per_second"] = clock.rate(self.progress.step)
    self.minutes.tell(self.progress.step, values, self.score)

  def _after(self, step: int, log: Log, clock: "Clock") -> None:
    """Evaluates, saves and checks for signals after a step, each if it is due."""
    config, last = self.config, step == self.steps
    if (step % self.every_eval == 0 or last) and self.progress.evaluated != step:
      self._check_finite()
      log.write(step, {"eval": self._select(), "eval_split": config.eval.select_on})
      if last and mesh.writes():  # the last line of the minutes is of an earlier score
        logging.info("%s; the best is step %s", self.score, self.progress.best_step)
      clock.restart(step)
    if step > self.start and (step % config.checkpoint.every_steps == 0 or last):
      self._check_finite()
      self.save()
    self._check_signals(step)

  def _check_signals(self, step: int) -> None:
    alone = jax.process_count() == 1
    if step < self.steps and (alone or step % self.config.log.every_steps == 0):
      self.signals.check()

  def _select(self) -> dict:
    """Scores the selection images; saves a new best, first as a newest checkpoint."""
    config, progress = self.config, self.progress
    maps = evaluate.probabilities(
      self.forward,
      self.state,
      self.prior,
      self.selection,
      config.eval.batch_size,
      self.mesh,
    )
    scores = evaluate.score(self.signals.passing(maps), self.selection)
    value = getattr(scores[forward.deployed_branch(config.mode)], config.eval.select_by)
    value = -math.inf if math.isnan(value) else value
    progress.evaluated = progress.step
    name = columns.METRICS[config.eval.select_by].heading
    self.score = f"{config.eval.select_on} {name} {100 * max(value, 0):.2f} at step {progress.step}"
    if value > progress.best:
      progress.best, progress.best_step = value, progress.step
      self.save()
      self.save(to_best=True)
    return evaluate.results(scores)

  def save(self, to_best: bool = False) -> None:
    """Saves a checkpoint of the present step, as a newest or as the best."""
    progress = self.progress
    about = {
      **self.meta,
      "step": progress.step,
      "best": progress.best if math.isfinite(progress.best) else None,
      "best_step": progress.best_step,
      "evaluated": progress.evaluated,
    }
    self.checkpoints.save(progress.step, self.state, about, best=to_best)

  def _check_finite(self) -> None:
    """Raises or warns if a step was not finite."""
    counts = {name: int(value) for name, value in jax.device_get(self.state["skipped"]).items()}
    if counts["count"] == self.progress.skipped:
      return
    if self.config.train.nonfinite == "stop":
      self.checkpoints.wait()
      kept = self.checkpoints.steps()
      raise FloatingPointError(
        f"The loss, a gradient or a statistic is not finite at step {counts['first']}. "
        + (f"The last good checkpoint is step {kept[-1]} in {self.workdir}. " if kept else "")
        + "Lower train.learning_rate (in a new --workdir), or continue with "
        "--config.train.nonfinite=skip, which leaves such steps out and counts them."
      )
    logging.warning("%d steps so far were not finite and were left out", counts["count"])
    self.progress.skipped = counts["count"]

  def _save_preempted(self) -> None:
    """Saves the state and raises `Preempted`, which names the saved step."""
    self._check_finite()
    self.progress.step = step = int(self.state["step"])
    if step:
      self.save()
    self.checkpoints.wait()
    raise Preempted(
      f"Ended by {self.signals.name} at step {step} of {self.steps}, which is saved in "
      f"{self.workdir}. The same command goes on from there."
    ) from None


class Clock:
  """Measures images per second since the last reading."""

  def __init__(self, step: int, batch_size: int):
    self._batch_size = batch_size
    self.restart(step)

  def restart(self, step: int) -> None:
    self._time, self._step = time.perf_counter(), step

  def rate(self, step: int) -> float:
    now = time.perf_counter()
    rate = (step - self._step) * self._batch_size / (now - self._time)
    self._time, self._step = now, step
    return rate


def _crop_bank(config: ConfigDict, samples: Sequence[data.Sample]) -> data.CropBank:
  per_epoch = len(samples) / config.train.batch_size  # steps
  return data.CropBank(
    samples,
    per_image=config.prior.bank,
    size=config.data.crop,
    seed=config.seed,
    augment=config.data.augment,
    target_crop_prob=config.data.target_crop_prob,
    crop_margin=config.data.crop_margin,
    refresh_steps=round(config.prior.bank_refresh_epochs * per_epoch),
  )


def _describe(config: ConfigDict, images: build.Images, prior: Prior | None) -> None:
  logging.info(
    "%s, mode %s: %d train, %d held-out, %d test images; grey mean %.6f, deviation %.6f",
    config.model.backbone, config.mode, len(images.train), len(images.val), len(images.test),
    images.mean, images.std,
  )  # fmt: skip
  logging.info("the best checkpoint is selected on %s", config.eval.select_on)
  if prior:
    source = "RANDOM weights" if prior.sha256 == "random" else config.prior.checkpoint
    logging.info("prior: ViT of width %d from %s, levels %s", prior.width, source, prior.blocks)
