"""Computes the forward pass: normalisation, the prior's levels, the branches (paper Fig. 2)."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax.backbones import Logits
from fdep_jax.data import Statistic
from fdep_jax.fdep import FDEP
from fdep_jax.priors import Prior

# For each branch, the mode that trains it alone.
ALONE = {"light": "original", "main": "fdep_wo_coisd"}
# XLA for CPUs (jax 0.10.2) hands float32 convolutions to YNNPACK, which computes those of a single
# image on one core. With this only matrix products go there.
_ALL_CORES = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def deployed_branch(mode: str) -> str:
  """Returns the branch that is deployed and that selects the best checkpoint."""
  return "main" if mode == "fdep_wo_coisd" else "light"


def normalise(image: jax.Array, mean: Statistic, std: Statistic) -> jax.Array:
  """Normalises B×H×W×3 grey levels in [0, 255].

  Args:
    image: of any type.
    mean, std: of grey levels / 255; one for all channels, as PAL has it, or one for each.
  """
  return standardise(image.astype(jnp.float32) / 255, mean, std)


def standardise(image: jax.Array, mean: Statistic, std: Statistic) -> jax.Array:
  """Takes the mean from B×H×W×C and divides by the deviation; both as for `normalise`."""
  return (image - _by_channel(mean)) / _by_channel(std)


def prepare(model: FDEP, image: jax.Array, mean: Statistic, std: Statistic) -> jax.Array:
  """Normalises as `normalise`; for a network of one channel, takes the mean of the three."""
  normal = normalise(image, mean, std)
  return normal.mean(-1, keepdims=True) if model.in_channels == 1 else normal


def _by_channel(value: Statistic) -> float | jax.Array:
  return value if np.ndim(value) == 0 else jnp.asarray(value, jnp.float32).reshape(1, 1, 1, -1)


def branches(
  model: FDEP, mode: str, image: jax.Array, levels: Sequence[jax.Array]
) -> dict[str, Logits]:
  """Runs the branches that `mode` trains: "light", "main" or both.

  Args:
    model: has the branches.
    mode: original | fdep_wo_coisd | fdep.
    image: B×H×W×3, normalised.
    levels: of the prior, B×h×w×D each; unused in mode original.
  """
  if mode == "original":
    return {"light": model.light(image)}
  if mode == "fdep_wo_coisd":
    return {"main": model.main(image, levels)}
  main, light = model(image, levels)
  return {"light": light, "main": main}


def logits(
  model: FDEP,
  mode: str,
  image: jax.Array,
  prior: Prior | None,
  mean: Statistic,
  std: Statistic,
) -> dict[str, Logits]:
  """Runs the branches of `mode` on B×H×W×3 grey levels in [0, 255], uint8 or float.

  `mean` and `std` are as for `normalise`.
  """
  levels = [] if prior is None else prior.levels(image)
  return branches(model, mode, prepare(model, image, mean, std), levels)


def probability(branch: Logits) -> jax.Array:
  """Returns B×H×W float32 probabilities of a branch's final head."""
  return jax.nn.sigmoid(branch.final[..., 0].astype(jnp.float32))


def jit(function: Callable) -> Callable:
  """Jits a forward pass, as `jax.jit`; on a CPU its convolutions use all cores.

  A train step needs no such option: its devices share the batch, one core each. Unlike `jax.jit`'s,
  the result cannot be called inside another traced function (its `eval_shape` can be used there).
  """
  return jax.jit(function, compiler_options=_options())


@functools.cache
def _options() -> dict[str, str] | None:
  """_ALL_CORES, or None if this is no CPU or its compiler has no such option."""
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda x: x, compiler_options=_ALL_CORES).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return _ALL_CORES


def make_forward(config: ConfigDict, model: FDEP, mean: Statistic, std: Statistic) -> Callable:
  """Makes the jitted (params, stats, rng, prior, image) → {branch: B×H×W float32 probabilities}.

  `image` is B×H×W×3 uint8. Everything is in evaluation mode. With eval.branches "deployed" the
  levels of the prior are computed for a deployed main branch only.
  """
  mode = config.mode
  if config.eval.branches == "deployed":
    mode = ALONE[deployed_branch(mode)]
  model = nnx.clone(model)
  model.eval()
  graphdef, _ = nnx.split(model)

  @jit
  def forward(params, stats, rng, prior, image):
    model = nnx.merge(graphdef, params, stats, rng)
    found = logits(model, mode, image, prior, mean, std)
    return {name: probability(branch) for name, branch in found.items()}

  return forward
