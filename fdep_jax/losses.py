"""Computes the EEDM loss: edge-weighted cross-entropy on the hardest half of the pixels.

EEDM is edge-enhanced difficulty mining. Both branches use it.

Source: YuChuang1205/PAL loss/Edge_loss.py and components/edges.py; summed over branches in §3.3.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

EDGE_WEIGHT = 4.0
HARD_FRACTION = 0.5

EdgeMode = Literal["intended", "released"]


def eedm(
  heads: Sequence[jax.Array], mask: jax.Array, edge_mode: EdgeMode = "intended"
) -> jax.Array:
  """Computes the mean loss of the hardest half of the global batch's pixels, summed over heads.

  Args:
    heads: logits, B×H×W×1 each (`Logits.heads`).
    mask, edge_mode: as for `criterion`.

  Returns:
    A scalar of the logits' dtype, at least float32.

  Raises:
    ValueError: `heads` is an array, or a shape or type is a different one.
  """
  if not isinstance(heads, Sequence) or not heads:
    shape = f" of shape {heads.shape}" if hasattr(heads, "shape") else ""
    raise ValueError(
      f"heads is a {type(heads).__name__}{shape}; it must be a list of logits, B×H×W×1 each, as "
      "Logits.heads: [logits] for one."
    )
  return sum(map(criterion(mask, edge_mode), heads))


def criterion(
  mask: jax.Array, edge_mode: EdgeMode = "intended"
) -> Callable[[jax.Array], jax.Array]:
  """The loss of one head, for `Backbone.supervise`: logits B×H×W×1 -> scalar.

  Args:
    mask: B×H×W bool.
    edge_mode: OUR CHOICE: "intended" weights the two-pixel contour of the targets by 4.
      "released" is what the published code computes: an in-place edit there turns the weight into
      4 for every pixel, so there is no edge weighting.

  Raises:
    ValueError: the type or a shape is a different one; also when logits are given.
  """
  if mask.dtype != bool or mask.ndim != 3:
    raise ValueError(
      f"mask is {mask.dtype} of shape {mask.shape}; it must be bool, B×H×W: mask > 127, or > 0.5."
    )
  if edge_mode not in ("intended", "released"):
    raise ValueError(f"edge_mode is {edge_mode!r}; it must be intended or released.")
  weight = jnp.where(edges(mask) | (edge_mode == "released"), EDGE_WEIGHT, 1.0)

  def loss(logits: jax.Array) -> jax.Array:
    if logits.shape != (*mask.shape, 1):  # would broadcast
      raise ValueError(
        f"logits are of shape {logits.shape}, and mask of {mask.shape}; they must be "
        f"{(*mask.shape, 1)}."
      )
    return hard_mean(_cross_entropy(logits, mask) * weight)

  return loss


def edges(mask: jax.Array) -> jax.Array:
  """Marks the pixels with a 4-neighbour of the other class, on both sides of the contour.

  Returns B×H×W bool. The image's border alone is not an edge. OUR CHOICE: the published code
  intends the same, but clears row 1 instead of row 0.
  """
  rows = mask[:, 1:] != mask[:, :-1]
  columns = mask[:, :, 1:] != mask[:, :, :-1]
  vertical = jnp.pad(rows, ((0, 0), (1, 0), (0, 0))) | jnp.pad(rows, ((0, 0), (0, 1), (0, 0)))
  horizontal = jnp.pad(columns, ((0, 0), (0, 0), (1, 0))) | jnp.pad(
    columns, ((0, 0), (0, 0), (0, 1))
  )
  return vertical | horizontal


def hard_mean(losses: jax.Array) -> jax.Array:
  """Averages the losses that are at least element ⌊N/2⌋ of their ascending order, ties included.

  Args:
    losses: any shape, not negative; N elements.
  """
  hard = losses >= order_statistic(losses, int(HARD_FRACTION * losses.size))
  return jnp.sum(jnp.where(hard, losses, 0)) / jnp.sum(hard)


def order_statistic(values: jax.Array, k: int) -> jax.Array:
  """Returns element k (0-based) of the ascending order of `values`, exactly, without sorting.

  Non-negative floats sort like their bits read as integers. So the element is found bit by bit,
  from the highest, by counting. On a sharded batch a count is one small all-reduce; a sort would
  gather all losses on every device.

  Args:
    values: float32 or float64, not negative; receives no gradient.
    k: place in the order.
  """
  kind, bits = {4: (jnp.int32, 31), 8: (jnp.int64, 63)}[values.dtype.itemsize]
  ordered = jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(values)), kind)

  def try_bit(i, found):
    candidate = found | (jnp.ones((), kind) << (bits - 1 - i))
    return jnp.where(jnp.sum(ordered < candidate) <= k, candidate, found)

  found = jax.lax.fori_loop(0, bits, try_bit, jnp.zeros((), kind))
  return jax.lax.bitcast_convert_type(found, values.dtype)


def _cross_entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns B×H×W losses, float32 or wider."""
  logits = logits[..., 0].astype(jnp.promote_types(logits.dtype, jnp.float32))
  return optax.sigmoid_binary_cross_entropy(logits, mask.astype(logits.dtype))
