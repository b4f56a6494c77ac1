"""Training: one compiled step for all branches, and the loop around it (paper §3.3, §4.2)."""

import contextlib
import json
import logging
import math
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from fdep_jax import (
  ablations,
  bank,
  checkpoint,
  data,
  evaluate,
  losses,
  mesh,
  pseudo,
  run,
  settings,
)
from fdep_jax.backbones._blocks import NormParam

# What the backward pass keeps of the forward one, by `train.remat`; the rest it computes again.
REMAT = {
  "none": None,
  # Results of convolutions and matrix products; norms, activations and resizes are cheap.
  "products": jax.checkpoint_policies.dots_saveable,
}


class Preempted(BaseException):
  """The run was told to end; everything that can be continued is saved.

  Like KeyboardInterrupt it passes by whoever catches every Exception.
  """


def total_steps(config: ConfigDict, num_images: int) -> int:
  """Length of the run; an epoch is every train image once."""
  if config.train.steps > 0:
    return config.train.steps
  return math.ceil(config.train.epochs * num_images / config.train.batch_size)


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  """The optax schedule that the config names."""
  words = {"learning_rate": config.train.learning_rate, "steps": steps}
  arguments = {k: words.get(v, v) if isinstance(v, str) else v
               for k, v in config.train.schedule_args.items()}  # fmt: skip
  maker = getattr(optax.schedules, config.train.schedule, None)
  if not callable(maker):
    known = [n for n in dir(optax.schedules) if n.endswith(("schedule", "decay", "interpolate"))]
    raise ValueError(f"train.schedule is {config.train.schedule!r}; optax has {', '.join(known)}.")
  try:
    return maker(**arguments)
  except TypeError as error:
    raise ValueError(f"train.schedule_args do not fit {config.train.schedule}: {error}") from None


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """AdamW with PyTorch's defaults; decay on all parameters, norms and biases included."""
  return optax.adamw(
    make_schedule(config, steps), b1=0.9, b2=0.999, eps=1e-8, weight_decay=config.train.weight_decay
  )


def _crop_bank(config: ConfigDict, samples: list[data.Sample]) -> data.CropBank:
  per_epoch = len(samples) / config.train.batch_size  # steps
  return data.CropBank(
    samples,
    per_image=config.dino.bank,
    size=config.data.crop,
    seed=config.seed,
    augment=config.data.augment,
    target_crop_prob=config.data.target_crop_prob,
    crop_margin=config.data.crop_margin,
    refresh_steps=round(config.dino.bank_refresh_epochs * per_epoch),
  )


def init_state(model, optimizer: optax.GradientTransformation) -> dict:
  """Everything that a step changes: params, stats, rng (dropout), opt, step, and skipped.

  `skipped` counts the steps that were not finite, and has the number of the first (0: none).
  """
  _, params, stats, rng = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  return {
    "params": params,
    "stats": stats,
    "rng": rng,
    "opt": optimizer.init(params),
    "step": jnp.zeros((), jnp.int32),
    "skipped": {"count": jnp.zeros((), jnp.int32), "first": jnp.zeros((), jnp.int32)},
  }


def make_loss(config: ConfigDict, model) -> Callable:
  """(params, stats, rng, image, levels, mask) → loss, (new stats, new rng, loss of each branch).

  `image` is normalised, B×H×W×3; `levels` the frozen prior's; `mask` B×H×W bool.
  """
  model = nnx.clone(model)
  model.train()
  graphdef, _ = nnx.split(model)
  weight = {"main": 1.0, "light": config.loss.light_weight if config.mode == "fdep" else 1.0}
  weight["distill"] = config.loss.distill_weight
  compute = jnp.dtype(config.train.dtype)

  def loss(params, stats, rng, image, levels, mask):
    if compute != jnp.float32:
      params = cast(params, compute)
      image = image.astype(compute)
    model = nnx.merge(graphdef, params, stats, rng, copy=True)
    logits = run.branches(model, config.mode, image, levels)
    parts = {n: losses.eedm(x.heads, mask, config.loss.edge_mode) for n, x in logits.items()}
    if config.loss.distill_weight:
      parts["distill"] = ablations.distillation(logits["main"], logits["light"])
    stats, rng = nnx.state(model, nnx.BatchStat), nnx.state(model, nnx.RngState)
    return sum(weight[name] * part for name, part in parts.items()), (stats, rng, parts)

  policy = REMAT[config.train.remat]
  return jax.checkpoint(loss, policy=policy) if policy else loss


def cast(params: nnx.State, dtype) -> nnx.State:
  """Parameters for computing in `dtype`; norms stay float32. Gradients arrive in float32."""

  def one(variable):
    if isinstance(variable, NormParam):
      return variable
    return variable.replace(variable[...].astype(dtype))

  return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_step(
  config: ConfigDict,
  model,
  prior: run.Prior | None,
  optimizer: optax.GradientTransformation,
  mean: float,
  std: float,
) -> Callable:
  """The compiled (state, vit_state, batch) → (state, metrics); `state` is donated.

  `batch` holds uint8 images, bool masks and, where they come from a prior bank, the levels, split
  over the mesh's data axis; batch statistics and hard mining are those of the global batch. The
  frozen prior is outside the gradient, and not in the program where the batch has its levels.

  A step whose loss, gradients, statistics or update are not finite leaves params, stats and opt as
  they were and counts, on the device: no state that is not finite can reach a checkpoint, though
  the loop looks at few losses.
  """
  loss = make_loss(config, model)
  vit_graphdef = nnx.split(prior.vit)[0] if prior else None

  def step(state, vit_state, batch):
    levels = batch.get("levels", [])
    if prior and not levels:
      levels = run.frozen_levels(prior, vit_state, vit_graphdef, batch["image"])
    image = run.normalise(batch["image"], mean, std)
    (value, (stats, rng, parts)), grads = jax.value_and_grad(loss, has_aux=True)(
      state["params"], state["stats"], state["rng"], image, levels, batch["mask"]
    )
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    grad_norm = optax.tree.norm(grads)
    # A sum is not finite where an addend is not. Reduced from one vector: a chain of additions
    # would be copied into the choice of every parameter below, and 8 CPU devices compiled it
    # without end.
    sums = [jnp.sum(leaf) for leaf in jax.tree.leaves((stats, updates))]
    finite = jnp.isfinite(jnp.stack([value, grad_norm, *sums])).all()
    moved = {
      "params": optax.apply_updates(state["params"], updates),
      "stats": stats,
      "opt": opt,
    }
    kept = {name: state[name] for name in moved}
    moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
    number = state["step"] + 1
    count, first = state["skipped"]["count"], state["skipped"]["first"]
    skipped = {
      "count": count + ~finite,
      "first": jnp.where(finite | (count > 0), first, number),
    }
    new = {**moved, "rng": rng, "step": number, "skipped": skipped}
    parts = {f"loss_{name}": part for name, part in parts.items()}
    return new, {"loss": value, **parts, "grad_norm": grad_norm}

  return jax.jit(step, donate_argnums=0)


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict:
  """Trains as the config says, from the newest checkpoint if there is one, then evaluates.

  Returns:
    The final metrics, as `evaluate.evaluate`.

  Raises:
    ValueError, FileNotFoundError: the config, the data, the weights or the folder do not fit, or
      another process trains in it.
    FloatingPointError: a step is not finite (train.nonfinite="stop").
    OSError: something cannot be written; the checkpoints before it are whole.
    Preempted: SIGTERM or SIGINT came; the state is saved.
  """
  workdir = run.run_folder(workdir)
  settings.check(config)
  run.check_inputs(config)
  make_schedule(config, 10**6)  # refuses its arguments now, before anything is read
  the_mesh = mesh.make(config.host_devices, config.train.batch_size)
  with Signals() as signals:
    images = run.load_images(config)
    if config.train.labels != "true":
      images = images._replace(train=pseudo.relabel(config, images.train, the_mesh))
    prior = run.load_prior(config)
    crops = _crop_bank(config, images.train) if config.dino.bank else None
    levels = None
    if crops and prior:
      folder = pathlib.Path(config.dino.bank_folder or workdir / "bank")
      levels = bank.Bank(folder, crops, prior, keep_old=bool(config.dino.bank_folder))
    with settings.locked(workdir) if mesh.writes() else contextlib.nullcontext():
      if mesh.writes():
        settings.claim_workdir(workdir, config)
      _describe(config, images, prior)
      model = run.create_model(config, prior)
      _train(config, workdir, the_mesh, images, prior, crops, levels, model, signals)
      signals.check()
      return evaluate.evaluate(workdir, config, (images, prior, model))


def _train(config, workdir, the_mesh, images, prior, crops, levels, model, signals) -> None:
  """The steps that are left to do."""
  steps = total_steps(config, len(images.train))
  optimizer = make_optimizer(config, steps)
  meta = {
    "steps": steps,
    "mean": images.mean,
    "std": images.std,
    "dino_sha256": prior.sha256 if prior else None,
    "dino_levels": list(prior.levels) if prior else None,
  }
  state = init_state(model, optimizer)
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  # Of the best checkpoint; `evaluated` is the last step whose held-out images were scored.
  start, best, best_step, evaluated = 0, -math.inf, None, 0
  if checkpoints.steps():
    state, saved = checkpoints.restore(state)
    if saved["dino_sha256"] != meta["dino_sha256"]:
      raise ValueError(
        f"{workdir} was trained with other DINOv2 weights (SHA-256 {saved['dino_sha256']}) than "
        f"{config.dino.checkpoint} ({meta['dino_sha256']}). Name the file it was trained with."
      )
    start, best_step, evaluated = saved["step"], saved["best_step"], saved["evaluated"]
    best = saved["best"] if saved["best"] is not None else -math.inf
    logging.info("continuing at step %d of %d", start, steps)
  if mesh.writes():
    checkpoints.rewind(start)
    if start < steps:  # of a shorter run, or of an evaluation on the way
      (workdir / "metrics.json").unlink(missing_ok=True)
  mesh.minimum(0)  # no process looks at the folder before
  skipped = int(state["skipped"]["count"])
  state = mesh.put_replicated(state, the_mesh)
  vit_state = run.place_prior(config, prior, the_mesh)
  step_fn = make_step(config, model, prior, optimizer, images.mean, images.std)
  forward = evaluate.make_forward(config, model, prior, images.mean, images.std)
  selection = images.val if config.eval.select_on == "val" else images.test
  canvas = data.canvas_size(selection, evaluate.PAD)
  every_eval = max(1, round(config.eval.every_epochs * len(images.train) / config.train.batch_size))
  schedule = make_schedule(config, steps)

  iterator = data.train_iterator(
    images.train,
    crop=config.data.crop,
    batch_size=config.train.batch_size,
    seed=config.seed,
    augment=config.data.augment,
    target_crop_prob=config.data.target_crop_prob,
    crop_margin=config.data.crop_margin,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    threads=config.data.threads,
    bank=crops,
  )
  iterator.set_state({"next_index": start})

  def save(step: int, to_best: bool = False) -> None:
    value = best if math.isfinite(best) else None
    about = {**meta, "step": step, "best": value, "best_step": best_step, "evaluated": evaluated}
    checkpoints.save(step, state, about, best=to_best)

  def select(step: int) -> dict:
    """Scores the held-out images; a new best is saved, first among the newest checkpoints."""
    nonlocal best, best_step, evaluated
    maps = evaluate.probabilities(
      forward, state, vit_state, selection, config.eval.batch_size, the_mesh, canvas
    )
    scores = evaluate.score(signals.passing(maps), selection)
    value = scores[evaluate.deployed_branch(config.mode)].hse
    value = -math.inf if math.isnan(value) else value
    evaluated = step
    if value > best:
      best, best_step = value, step
      save(step)
      save(step, to_best=True)
    return evaluate.results(scores)

  def check_finite() -> None:
    """Ends the run where a step was not finite, or tells of it."""
    nonlocal skipped
    counts = {name: int(value) for name, value in jax.device_get(state["skipped"]).items()}
    if counts["count"] == skipped:
      return
    if config.train.nonfinite == "stop":
      checkpoints.wait()
      kept = checkpoints.steps()
      raise FloatingPointError(
        f"The loss, a gradient or a statistic is not finite at step {counts['first']}. "
        + (f"The last good checkpoint is step {kept[-1]} in {workdir}. " if kept else "")
        + "Lower train.learning_rate (in another --workdir), or continue with "
        "--config.train.nonfinite=skip, which leaves such steps out and counts them."
      )
    logging.warning("%d steps so far were not finite and were left out", counts["count"])
    skipped = counts["count"]

  profile = Profile(workdir, config)
  hidden = None if config.log.progress and mesh.writes() else True
  with (
    signals.waiting(),
    checkpoints,
    contextlib.closing(iterator),
    Log(workdir, config, start) as log,
    tqdm(total=steps, initial=start, disable=hidden) as bar,
  ):
    if best_step == start and start and checkpoints.best_step() != start:
      save(start, to_best=True)  # the process was killed between the two
    clock, done = time.perf_counter(), start
    try:
      for step in range(start, steps + 1):
        if step > start:
          profile.before(step)
          batch = next(iterator)
          numbers = batch.pop("crop", None)
          if levels:
            with signals.at_once():  # what an interrupted bank has is kept
              levels.prepare(step - 1, config.train.batch_size, the_mesh, config.log.progress)
            batch["levels"] = levels.levels(numbers)
          state, metrics = step_fn(state, vit_state, mesh.put_batch(batch, the_mesh))
          profile.after(step, metrics)
          bar.update()
          if step % config.log.every_steps == 0 or step in (start + 1, steps):
            check_finite()
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            now = time.perf_counter()
            rate = (step - done) * config.train.batch_size / (now - clock)
            metrics |= {"images_per_second": rate, "learning_rate": float(schedule(step - 1))}
            if config.train.nonfinite == "skip":
              metrics["skipped"] = skipped
            clock, done = now, step
            log.write(step, metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", img_s=f"{rate:.1f}")
        # Also after a restart, where the evaluation of the checkpoint's step was cut short.
        if step and (step % every_eval == 0 or step == steps) and evaluated != step:
          check_finite()
          log.write(step, {"eval": select(step), "eval_split": config.eval.select_on})
          clock, done = time.perf_counter(), step
        if step > start and (step % config.checkpoint.every_steps == 0 or step == steps):
          check_finite()
          save(step)
        if step < steps and (jax.process_count() == 1 or step % config.log.every_steps == 0):
          signals.check()
    except Preempted:
      check_finite()
      step = int(state["step"])
      if step:
        save(step)
      checkpoints.wait()
      raise Preempted(
        f"Ended by {signals.name} at step {step} of {steps}, which is saved in {workdir}. The same "
        "command goes on from there."
      ) from None


class Log:
  """`metrics.jsonl`, one line a log step, and the same as TensorBoard scalars; by one process."""

  def __init__(self, workdir: pathlib.Path, config: ConfigDict, start: int):
    self._path = workdir / "metrics.jsonl"
    self._start = start
    self._board = None
    if config.log.tensorboard and mesh.writes():
      from tensorboardX import SummaryWriter

      # Hides what an earlier process wrote of the steps that follow.
      self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

  def __enter__(self):
    if not mesh.writes():
      self._file = open(os.devnull, "w")
      return self
    if self._path.exists():  # what was logged after the checkpoint will be logged again
      lines = self._path.read_text(errors="replace").splitlines(keepends=True)
      partial = self._path.with_suffix(".partial")
      partial.write_text("".join(line for line in lines if _logged_step(line) <= self._start))
      os.replace(partial, self._path)
    self._file = open(self._path, "a")
    return self

  def write(self, step: int, values: dict) -> None:
    """One line, null for what is not finite; nested numbers become scalars named a/b."""
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
  """A trace of the steps `profile_steps` in workdir/profile, for TensorBoard and Perfetto."""

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
  """Its step; infinity for a line that a killed process left unfinished."""
  try:
    return json.loads(line)["step"] if line.endswith("\n") else math.inf
  except (ValueError, TypeError, KeyError):
    return math.inf


class Signals:
  """SIGTERM and SIGINT end a run where nothing is lost: at once, but within `waiting` at `check`.

  A second signal ends the process at once, also within a compilation, in which Python itself does
  not hear signals: a thread does. Checkpoints outlive that as they do SIGKILL.
  """

  def __init__(self):
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
    """Whether a signal came; within `waiting` all processes call it and one of them is enough."""
    came = self._received is not None
    return mesh.minimum(int(not came)) == 0 if self._waiting else came

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
    """Raises Preempted if a signal came."""
    if self._came():
      raise Preempted(
        f"Ended by {self.name} outside the training loop; nothing is lost. The same command goes "
        "on from the newest checkpoint."
      )

  def passing(self, items: Iterable) -> Iterator:
    """The items, until a signal comes."""
    for item in items:
      if jax.process_count() == 1:
        self.check()
      yield item

  @contextlib.contextmanager
  def waiting(self, waits: bool = True):
    before, self._waiting = self._waiting, waits
    try:
      self.check()
      yield
    finally:
      self._waiting = before

  def at_once(self):
    """The opposite, within `waiting`; several processes have to wait for each other even so."""
    return contextlib.nullcontext() if jax.process_count() > 1 else self.waiting(False)


def _describe(config: ConfigDict, images: run.Images, prior: run.Prior | None) -> None:
  logging.info(
    "%s, mode %s: %d train, %d held-out, %d test images; grey mean %.6f, deviation %.6f",
    config.model.backbone, config.mode, len(images.train), len(images.val), len(images.test),
    images.mean, images.std,
  )  # fmt: skip
  logging.info("the best checkpoint is selected on %s", config.eval.select_on)
  if prior:
    source = "RANDOM weights" if prior.sha256 == "random" else config.dino.checkpoint
    logging.info("prior: ViT of width %d from %s, levels %s", prior.vit.width, source, prior.levels)
