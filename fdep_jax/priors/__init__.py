"""Frozen foundation models: the prior that SAMF fuses into a detector during training."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.runtime import mesh

# Marks the prior's operations in a compiled module (plan.py reports their FLOPs separately).
SCOPE = "frozen_prior"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prior:
  """A foundation model with its weights, and the blocks whose outputs are fused.

  A pytree whose leaves are the weights, so a compiled function takes it as an argument.

  A trained prior (`unfreeze`) is part of the trained model. Then `placed` drops the weights here,
  and `levels` returns only the prepared image, from which the model computes the levels.
  """

  weights: nnx.State | None
  graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
  blocks: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # 0-based
  width: int = dataclasses.field(metadata={"static": True})  # channels of a level
  depth: int = dataclasses.field(metadata={"static": True})  # blocks of the model
  patch: int = dataclasses.field(metadata={"static": True})  # pixels
  frozen: bool = dataclasses.field(metadata={"static": True})
  # B×H×W×3 in [0, 1] → the model's input
  prepare: Callable[[jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})
  sha256: str = dataclasses.field(metadata={"static": True})  # of the weight file, or "random"

  @property
  def model(self) -> nnx.Module:
    """The module with its weights."""
    return nnx.merge(self.graphdef, self.weights)

  def placed(self, the_mesh, shard: bool = False) -> "Prior":
    """Puts frozen weights on the devices: a copy on each, or (`shard`) a part on each."""
    if not self.frozen:
      return dataclasses.replace(self, weights=None)
    return dataclasses.replace(self, weights=mesh.put_frozen(self.weights, the_mesh, shard))

  def levels(self, image: jax.Array) -> list[jax.Array]:
    """Computes the levels to be fused, without gradients.

    Args:
      image: B×H×W×3 grey levels in [0, 255], uint8 or float.

    Returns:
      B×h×w×width float32 for each of `blocks`; only the prepared image if the prior is trained.
    """
    image = image.astype(jnp.float32) / 255
    if not self.frozen:
      return [self.prepare(image)]
    with jax.named_scope(SCOPE):
      levels = self.model(self.prepare(image), self.blocks)
      return [jax.lax.stop_gradient(level) for level in levels]


def from_module(
  model: nnx.Module, blocks: tuple[int, ...], prepare: Callable, sha256: str
) -> Prior:
  """Makes a prior from a loaded module, which has `width`, `depth`, `patch` and `frozen`."""
  graphdef, weights = nnx.split(model)
  return Prior(
    weights, graphdef, blocks, model.width, model.depth, model.patch, model.frozen, prepare, sha256
  )
