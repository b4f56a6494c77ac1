"""Training: one compiled step for all branches, and the loop around it (paper §3.3, §4.2)."""

import contextlib
import json
import logging
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from fdep_jax import bank, checkpoint, data, evaluate, losses, mesh, run, settings
from fdep_jax.backbones._blocks import NormParam


class Preempted(Exception):
  """The run was told to end; everything is saved."""


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
  """Everything that a step changes: params, stats, rng (dropout), opt, step."""
  _, params, stats, rng = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  return {
    "params": params,
    "stats": stats,
    "rng": rng,
    "opt": optimizer.init(params),
    "step": jnp.zeros((), jnp.int32),
  }


def make_loss(config: ConfigDict, model) -> Callable:
  """(params, stats, rng, image, levels, mask) → loss, (new stats, new rng, loss of each branch).

  `image` is normalised, B×H×W×3; `levels` the frozen prior's; `mask` B×H×W bool.
  """
  model = nnx.clone(model)
  model.train()
  graphdef, _ = nnx.split(model)
  weight = {"main": 1.0, "light": config.loss.light_weight if config.mode == "fdep" else 1.0}
  compute = jnp.dtype(config.train.dtype)

  def loss(params, stats, rng, image, levels, mask):
    if compute != jnp.float32:
      params = cast(params, compute)
      image = image.astype(compute)
    model = nnx.merge(graphdef, params, stats, rng, copy=True)
    logits = run.branches(model, config.mode, image, levels)
    parts = {n: losses.eedm(x.heads, mask, config.loss.edge_mode) for n, x in logits.items()}
    stats, rng = nnx.state(model, nnx.BatchStat), nnx.state(model, nnx.RngState)
    return sum(weight[name] * part for name, part in parts.items()), (stats, rng, parts)

  return loss


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
    new = {
      "params": optax.apply_updates(state["params"], updates),
      "stats": stats,
      "rng": rng,
      "opt": opt,
      "step": state["step"] + 1,
    }
    parts = {f"loss_{name}": part for name, part in parts.items()}
    return new, {"loss": value, **parts, "grad_norm": optax.tree.norm(grads)}

  return jax.jit(step, donate_argnums=0)


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict:
  """Trains as the config says, from the newest checkpoint if there is one, then evaluates.

  Returns:
    The final metrics, as `evaluate.evaluate`.

  Raises:
    ValueError, FileNotFoundError: the config, the data, the weights or the folder do not fit.
    FloatingPointError: the loss is not finite.
    Preempted: SIGTERM or SIGINT came; the state is saved.
  """
  workdir = run.run_folder(workdir)
  settings.check(config)
  run.check_inputs(config)
  make_schedule(config, 10**6)  # refuses its arguments now, before anything is read
  the_mesh = mesh.make(config.host_devices, config.train.batch_size)
  images = run.load_images(config)
  prior = run.load_prior(config)
  steps = total_steps(config, len(images.train))
  crops = _crop_bank(config, images.train) if config.dino.bank else None
  levels = None
  if crops and prior:
    folder = pathlib.Path(config.dino.bank_folder or workdir / "bank")
    levels = bank.Bank(folder, crops, prior, keep_old=bool(config.dino.bank_folder))
  settings.claim_workdir(workdir, config)
  _describe(config, images, prior)

  model = run.create_model(config, prior)
  optimizer = make_optimizer(config, steps)
  meta = {
    "mean": images.mean,
    "std": images.std,
    "dino_sha256": prior.sha256 if prior else None,
    "dino_levels": list(prior.levels) if prior else None,
  }
  state = init_state(model, optimizer)
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  start, best = 0, -math.inf
  if checkpoints.steps():
    state, saved = checkpoints.restore(state)
    start, best = saved["step"], saved["best"] if saved["best"] is not None else -math.inf
    if saved["dino_sha256"] != meta["dino_sha256"]:
      raise ValueError(
        f"{workdir} was trained with other DINOv2 weights (SHA-256 {saved['dino_sha256']}) than "
        f"{config.dino.checkpoint} ({meta['dino_sha256']}). Name the file it was trained with."
      )
    logging.info("continuing at step %d of %d", start, steps)
  state = mesh.put_replicated(state, the_mesh)
  vit_state = mesh.put_replicated(nnx.split(prior.vit)[1], the_mesh) if prior else None
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

  def save(step: int, value: float | None = None) -> None:
    finite = best if math.isfinite(best) else None
    checkpoints.save(step, state, {**meta, "step": step, "best": finite})
    if value is not None:
      checkpoints.save(step, state, {**meta, "step": step, "best": value}, best=True)

  def select(step: int) -> dict:
    nonlocal best
    maps = evaluate.probabilities(
      forward, state, vit_state, selection, config.eval.batch_size, the_mesh, canvas
    )
    scores = evaluate.score(maps, selection)
    value = scores[evaluate.deployed_branch(config.mode)].hse
    value = -math.inf if math.isnan(value) else value
    if value > best or checkpoints.best_step() is None:
      best = value
      save(step, value if math.isfinite(value) else None)
    return evaluate.results(scores)

  hidden = None if config.log.progress and mesh.writes() else True
  with (
    Log(workdir, config, start) as log,
    _end_on_signal() as ending,
    tqdm(total=steps, initial=start, disable=hidden) as bar,
  ):
    clock, done = time.perf_counter(), start
    for index in range(start, steps):
      batch = next(iterator)
      numbers = batch.pop("crop", None)
      if levels:
        levels.prepare(index, config.train.batch_size, the_mesh, config.log.progress)
        batch["levels"] = levels.levels(numbers)
      state, metrics = step_fn(state, vit_state, mesh.put_batch(batch, the_mesh))
      step = index + 1
      bar.update()
      if step % config.log.every_steps == 0 or step in (start + 1, steps):
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(metrics["loss"]):
          checkpoints.wait()
          raise FloatingPointError(
            f"The loss is {metrics['loss']} at step {step}. The last good checkpoint is step "
            f"{(checkpoints.steps() or [0])[-1]} in {workdir}. Lower train.learning_rate."
          )
        now = time.perf_counter()
        metrics["images_per_second"] = (step - done) * config.train.batch_size / (now - clock)
        metrics["learning_rate"] = float(schedule(index))
        clock, done = now, step
        log.write(step, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", img_s=f"{metrics['images_per_second']:.1f}")
      if step % every_eval == 0 or step == steps:
        log.write(step, {"eval": select(step), "eval_split": config.eval.select_on})
        clock, done = time.perf_counter(), step
      if step % config.checkpoint.every_steps == 0 or step == steps or ending:
        save(step)
      if ending and step < steps:
        checkpoints.wait()
        checkpoints.close()
        iterator.close()
        raise Preempted(f"Ended by a signal at step {step} of {steps}; saved in {workdir}.")
  iterator.close()
  checkpoints.wait()
  checkpoints.close()
  return evaluate.evaluate(workdir, config, (images, prior, model))


class Log:
  """`metrics.jsonl`, one line a log step, and the same as TensorBoard scalars; by one process."""

  def __init__(self, workdir: pathlib.Path, config: ConfigDict, start: int):
    self._path = workdir / "metrics.jsonl"
    self._start = start
    self._board = None
    if config.log.tensorboard and mesh.writes():
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start or None)

  def __enter__(self):
    if not mesh.writes():
      self._file = open(os.devnull, "w")
      return self
    kept = []
    if self._path.exists():  # what was logged after the checkpoint will be logged again
      lines = self._path.read_text().splitlines(keepends=True)
      kept = [
        line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self._start
      ]
    self._file = open(self._path, "w")
    self._file.writelines(kept)
    self._file.flush()
    return self

  def write(self, step: int, values: dict) -> None:
    """One line; nested numbers become scalars named a/b."""
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    if self._board:
      for name, value in _scalars("", values):
        self._board.add_scalar(name, value, step)

  def __exit__(self, *error):
    self._file.close()
    if self._board:
      self._board.close()


def _scalars(prefix: str, values: dict):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _scalars(f"{prefix}{name}/", value)
    elif isinstance(value, int | float):
      yield f"{prefix}{name}", value


@contextlib.contextmanager
def _end_on_signal():
  """A list that SIGTERM and SIGINT put their number into, so that the loop saves before it ends."""
  received: list[int] = []
  try:
    old = {s: signal.signal(s, lambda number, _: received.append(number))
           for s in (signal.SIGTERM, signal.SIGINT)}  # fmt: skip
  except ValueError:  # not the main thread: the caller handles signals
    yield received
    return
  try:
    yield received
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


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
