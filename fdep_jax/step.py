"""Builds the compiled training step of all branches: loss, optimiser (paper §3.3, §4.2)."""

import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fdep_jax import ablations, forward, losses
from fdep_jax.layers.basic import NormParam
from fdep_jax.runtime import mesh

# Values of the forward pass to keep for the backward one, by `train.remat`; others are recomputed.
REMAT = {
  "none": None,
  # Results of convolutions and matrix products; norms, activations and resizes are cheap.
  "products": jax.checkpoint_policies.dots_saveable,
}


def total_steps(config: ConfigDict, num_images: int) -> int:
  """Returns the number of steps; an epoch is every train image once."""
  if config.train.steps > 0:
    return config.train.steps
  return math.ceil(config.train.epochs * num_images / config.train.batch_size)


def schedule_arguments(config: ConfigDict, steps: int) -> dict:
  """Returns the arguments of the optax schedule, for a run of this many steps.

  A trial run of a few steps need not set the warm-up, too: one that fills the run is shortened.
  """
  words = {"learning_rate": config.train.learning_rate, "steps": steps}
  arguments = {k: words.get(v, v) if isinstance(v, str) else v
               for k, v in config.train.schedule_args.items()}  # fmt: skip
  if arguments.get("decay_steps", math.inf) <= arguments.get("warmup_steps", 0):
    arguments["warmup_steps"] = arguments["decay_steps"] // 2
  return arguments


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
  """Makes the optax schedule that the config names.

  Raises:
    ValueError: optax has no such schedule, or it refuses the arguments.
  """
  maker = getattr(optax.schedules, config.train.schedule, None)
  if not callable(maker):
    known = [n for n in dir(optax.schedules) if n.endswith(("schedule", "decay", "interpolate"))]
    raise ValueError(f"train.schedule is {config.train.schedule!r}; optax has {', '.join(known)}.")
  try:
    return maker(**schedule_arguments(config, steps))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"train.schedule_args do not fit {config.train.schedule} in a run of {steps} steps: {error}. "
      "A schedule is set together with its arguments, in a config file: docs/training.md."
    ) from None


def check_schedule(config: ConfigDict, steps: int) -> None:
  """Refuses a schedule that cannot be computed, and says if its warm-up is shortened.

  Raises:
    ValueError: as `make_schedule`, or a learning rate is not a finite number.
  """
  schedule = make_schedule(config, steps)
  for step in (0, steps - 1):
    try:
      rate = float(schedule(step))
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"train.schedule_args do not fit {config.train.schedule}: at step {step + 1}, {error}"
      ) from None
    if not math.isfinite(rate):
      raise ValueError(
        f"The learning rate of step {step + 1} is {rate}: train.schedule_args do not fit "
        f"{config.train.schedule} in a run of {steps} steps."
      )
  wanted = config.train.schedule_args.get("warmup_steps", 0)
  used = schedule_arguments(config, steps).get("warmup_steps", 0)
  if used != wanted and not isinstance(wanted, str):
    logging.warning(
      "train.schedule_args.warmup_steps is %s, but the run has %d steps: the warm-up takes %d",
      wanted, steps, used,
    )  # fmt: skip


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """Makes AdamW with PyTorch's defaults; decays all parameters, norms and biases included."""
  return optax.adamw(
    make_schedule(config, steps), b1=0.9, b2=0.999, eps=1e-8, weight_decay=config.train.weight_decay
  )


def init_state(model, optimizer: optax.GradientTransformation) -> dict:
  """Makes the state that a step changes: params, stats, rng (dropout), opt, step and skipped.

  `skipped` has the count of steps that were not finite and the number of the first (0: none).
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
  """Makes (params, stats, rng, image, levels, mask) → loss, (stats, rng, loss of each branch).

  `image` is B×H×W×in_channels, normalised; `levels` are the frozen prior's; `mask` is B×H×W bool.
  """
  model = nnx.clone(model)
  model.train()
  graphdef, _ = nnx.split(model)
  weight = {"main": 1.0, "light": config.loss.light_weight if config.mode == "fdep" else 1.0}
  weight["distill"] = config.loss.distill_weight
  compute = jnp.dtype(config.train.dtype)
  network = model.network

  def loss(params, stats, rng, image, levels, mask):
    if compute != jnp.float32:
      params = cast(params, compute)
      if network.standardised:  # bfloat16 holds about half of 256 grey levels between 0 and 1
        image = image.astype(compute)
    model = nnx.merge(graphdef, params, stats, rng, copy=True)
    logits = forward.branches(model, config.mode, image, levels)
    criterion = losses.criterion(mask, config.loss.edge_mode)
    parts = {name: network.supervise(branch, image, criterion) for name, branch in logits.items()}
    if config.loss.distill_weight:
      parts["distill"] = ablations.distillation(logits["main"], logits["light"], network.supervise)
    stats, rng = nnx.state(model, nnx.BatchStat), nnx.state(model, nnx.RngState)
    return sum(weight[name] * part for name, part in parts.items()), (stats, rng, parts)

  policy = REMAT[config.train.remat]
  return jax.checkpoint(loss, policy=policy) if policy else loss


def cast(params: nnx.State, dtype) -> nnx.State:
  """Casts parameters to `dtype`, except norms; gradients are still float32."""

  def one(variable):
    if isinstance(variable, NormParam):
      return variable
    return variable.replace(variable[...].astype(dtype))

  return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_step(
  config: ConfigDict,
  model,
  optimizer: optax.GradientTransformation,
  mean: float,
  std: float,
  the_mesh: Mesh | None = None,
) -> Callable:
  """Makes the compiled (state, prior, batch) → (state, metrics); `state` is donated.

  With `the_mesh` the new state is whole on each of its devices, as checkpoints need it. Without it
  the compiler chooses, and splits some of the state if the prior is split.

  `batch` has uint8 images, bool masks and, with a prior bank, the levels, all split over the mesh's
  data axis. Batch statistics and hard mining are those of the global batch. The frozen prior is
  outside the gradient; it is not computed if the batch has its levels.

  A step whose loss, gradients, statistics or update are not finite leaves params, stats and opt
  unchanged and is counted as skipped. This happens on the device, so a state that is not finite
  never reaches a checkpoint, although the loop reads few losses.
  """
  loss = make_loss(config, model)

  def step(state, prior, batch):
    levels = batch.get("levels", [])
    if prior is not None and not levels:
      levels = prior.levels(batch["image"])
    image = forward.prepare(model, batch["image"], mean, std)
    (value, (stats, rng, parts)), grads = jax.value_and_grad(loss, has_aux=True)(
      state["params"], state["stats"], state["rng"], image, levels, batch["mask"]
    )
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    grad_norm = optax.tree.norm(grads)
    # A sum is not finite if an addend is not. The sums are one vector: XLA would copy a chain of
    # additions into the selection of every parameter below, which 8 CPU devices never finished
    # compiling.
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

  return jax.jit(step, donate_argnums=0, out_shardings=_whole(the_mesh))


def _whole(the_mesh: Mesh | None):
  return mesh.replicated(the_mesh) if the_mesh else None


def make_steps(step: Callable, the_mesh: Mesh | None = None) -> Callable:
  """Makes the compiled (state, prior, memory, batches) → (state, metrics) of several steps.

  One dispatch computes `step` for each batch in turn (`lax.scan`); metrics are those of the last.
  `memory` is the data in device memory from which the batches are cut, or None. `state` is donated.
  """

  def steps(state, prior, memory, batches):
    def one(state, batch):
      if memory is not None:
        batch = {**batch, **memory.batch(batch["choice"])}
      return step(state, prior, batch)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    state, metrics = jax.lax.scan(one, state, stacked)
    return state, jax.tree.map(lambda values: values[-1], metrics)

  return jax.jit(steps, donate_argnums=0, out_shardings=_whole(the_mesh))
