"""One compiled training step for all branches: optimiser, loss, update (paper §3.3, §4.2)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import ablations, forward, losses
from fdep_jax.backbones import network_class
from fdep_jax.layers.basic import NormParam

# What the backward pass keeps of the forward one, by `train.remat`; the rest it computes again.
REMAT = {
  "none": None,
  # Results of convolutions and matrix products; norms, activations and resizes are cheap.
  "products": jax.checkpoint_policies.dots_saveable,
}


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
  network = network_class(config.model.backbone)

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
  """Parameters for computing in `dtype`; norms stay float32. Gradients arrive in float32."""

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
) -> Callable:
  """Makes the compiled (state, prior, batch) → (state, metrics); `state` is donated.

  `batch` holds uint8 images, bool masks and, where they come from a prior bank, the levels, split
  over the mesh's data axis; batch statistics and hard mining are those of the global batch. The
  frozen prior is outside the gradient, and not in the program where the batch has its levels.

  A step whose loss, gradients, statistics or update are not finite leaves params, stats and opt as
  they were and counts, on the device: no state that is not finite can reach a checkpoint, though
  the loop looks at few losses.
  """
  loss = make_loss(config, model)

  def step(state, prior, batch):
    levels = batch.get("levels", [])
    if prior is not None and not levels:
      levels = prior.levels(batch["image"])
    image = forward.normalise(batch["image"], mean, std)
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
