"""Layers of vision transformers: norm, attention, block, and rotary positions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Frozen(nnx.Variable):
  """A weight that is not trained: it is no `nnx.Param`, so no gradient or checkpoint has it."""


class Linear(nnx.Module):
  """Linear layer x·W + b, computed in the type of W."""

  def __init__(self, in_features, features, *, stack=(), dtype, variable, rngs):
    kernel = jax.random.normal(rngs.params(), (*stack, in_features, features)) * in_features**-0.5
    self.kernel = variable(kernel.astype(dtype))
    self.bias = variable(jnp.zeros((*stack, features), dtype))

  def __call__(self, x: jax.Array, mask: np.ndarray | None = None) -> jax.Array:
    """Computes the layer; `mask`, of features, is multiplied to the bias."""
    kernel, bias = self.kernel[...], self.bias[...]
    if mask is not None:
      bias = bias * mask.astype(bias.dtype)
    return x.astype(kernel.dtype) @ kernel + row(bias)


class LayerNorm(nnx.Module):
  """LayerNorm over the last axis, in float32."""

  def __init__(self, width, *, epsilon=1e-6, stack=(), variable):
    self.scale = variable(jnp.ones((*stack, width)))
    self.bias = variable(jnp.zeros((*stack, width)))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return x * row(self.scale[...]) + row(self.bias[...])


class Block(nnx.Module):
  """x + γ₁·attention(norm(x)), then x + γ₂·mlp(norm(x)).

  Args:
    width: D, channels of a token.
    heads: of the attention.
    hidden: width within the MLP.
    swiglu: gated MLP instead of exact GELU.
    layer_scale: whether there are γ₁ and γ₂.
    key_bias: whether the bias of the keys counts; without, it stays but is multiplied by 0.
    epsilon: of the norms.
    stack: leading axes of every parameter. With any, call only the slices that a scan takes.
    dtype: of matrices and their products.
    variable: type of the parameters.
    rngs: `params`.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    hidden: int,
    *,
    swiglu: bool = False,
    layer_scale: bool = True,
    key_bias: bool = True,
    epsilon: float = 1e-6,
    stack: tuple[int, ...] = (),
    dtype=jnp.float32,
    variable: type[nnx.Variable] = Frozen,
    rngs: nnx.Rngs,
  ):
    options = {"stack": stack, "variable": variable}
    linear = {**options, "dtype": dtype, "rngs": rngs}
    self.norm1 = LayerNorm(width, epsilon=epsilon, **options)
    self.qkv = Linear(width, 3 * width, **linear)
    self.project = Linear(width, width, **linear)
    self.scale1 = variable(jnp.ones((*stack, width))) if layer_scale else nnx.data(None)
    self.norm2 = LayerNorm(width, epsilon=epsilon, **options)
    self.expand = Linear(width, 2 * hidden if swiglu else hidden, **linear)
    self.reduce = Linear(hidden, width, **linear)
    self.scale2 = variable(jnp.ones((*stack, width))) if layer_scale else nnx.data(None)
    self.heads = heads
    self.swiglu = swiglu
    self.key_bias = key_bias

  def __call__(self, tokens: jax.Array, rope: tuple[jax.Array, jax.Array] | None = None):
    """Computes the block.

    Args:
      tokens: B×N×D.
      rope: sines and cosines for `rotate`, which turns the last tokens' queries and keys.

    Returns:
      B×N×D.
    """
    tokens = tokens + _scaled(self.scale1, self._attend(self.norm1(tokens), rope))
    return tokens + _scaled(self.scale2, self._mlp(self.norm2(tokens)))

  def _attend(self, x: jax.Array, rope) -> jax.Array:
    batch, length, width = x.shape
    mask = None if self.key_bias else np.repeat([1.0, 0.0, 1.0], width)
    qkv = self.qkv(x, mask).reshape(batch, length, 3, self.heads, width // self.heads)
    query, key, value = (qkv[:, :, i] for i in range(3))
    if rope is not None:
      query, key = rotate(query, *rope), rotate(key, *rope)
    return self.project(attention(query, key, value).reshape(batch, length, width))

  def _mlp(self, x: jax.Array) -> jax.Array:
    x = self.expand(x)
    if self.swiglu:
      gate, value = jnp.split(x, 2, -1)
      return self.reduce(nnx.silu(gate) * value)
    return self.reduce(nnx.gelu(x, approximate=False))

  @property
  def macs_per_token(self) -> int:
    """Multiply-accumulates of the four matrices for one token."""
    matrices = (self.qkv, self.project, self.expand, self.reduce)
    return sum(int(np.prod(matrix.kernel.shape[-2:])) for matrix in matrices)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Computes softmax attention of B×N×heads×d, with the softmax in float32."""
  # Heads first: a CPU runs these products a third faster than in the einsum's own order.
  query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
  query = query * query.shape[-1] ** -0.5
  score = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
  mixed = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(score).astype(value.dtype), value)
  return jnp.moveaxis(mixed, 1, 2)


def rope_table(height: int, width: int, periods: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes sines and cosines of axial rotary positions, in float32.

  The centres of height×width patches lie in [−1, 1] along each axis, whatever the image's shape.
  The angles are 2π times the row over every period, then the same of the column, both twice.

  Args:
    height, width: patches.
    periods: d/4.

  Returns:
    Sines and cosines, each (height·width)×d.
  """
  turns = [2 * np.pi * (2 * (np.arange(side) + 0.5) / side - 1) for side in (height, width)]
  row, column = np.meshgrid(*turns, indexing="ij")
  places = jnp.asarray(np.stack([row.ravel(), column.ravel()], 1), jnp.float32)[..., None]
  angles = (places / periods.astype(jnp.float32).reshape(1, 1, -1)).reshape(height * width, -1)
  angles = jnp.concatenate([angles, angles], 1)
  return jnp.sin(angles), jnp.cos(angles)


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Turns the halves [u, v] of the last tokens' heads: [u, v]·cos + [−v, u]·sin.

  Args:
    x: B×N×heads×d.
    sin, cos: M×d float32 of the last M tokens; those before them stay as they are.

  Returns:
    Of x's shape and type. The rotation is computed in float32: angles reach 2π, of which bfloat16
    tells 200 apart.
  """
  first = x.shape[1] - sin.shape[0]
  wide = x[:, first:].astype(jnp.float32)
  u, v = jnp.split(wide, 2, -1)
  sin, cos = (table[None, :, None, :] for table in (sin, cos))
  turned = wide * cos + jnp.concatenate([-v, u], -1) * sin
  return jnp.concatenate([x[:, :first], turned.astype(x.dtype)], 1)


def cut_patches(image: jax.Array, patch: int) -> jax.Array:
  """Cuts B×H×W×C into B×(H/patch · W/patch)×(patch·patch·C) patches, in rows."""
  batch, height, width, channels = image.shape
  rows, columns = height // patch, width // patch
  patches = image.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
  return patches.reshape(batch, rows * columns, -1)


def resize_table(table: jax.Array, height: int, width: int) -> jax.Array:
  """Resizes a square n×n×D position table to height×width×D as DINOv1 and plain DINOv2 do.

  Cubic convolution with a = −0.75, clamped at the border, as if the image were 0.1 patches larger.
  """
  rows, columns = (jnp.asarray(_cubic(size, table.shape[0])) for size in (height, width))
  return jnp.einsum("hi,ijd,wj->hwd", rows, table, columns, precision=jax.lax.Precision.HIGHEST)


def levels_of_stack(blocks: Block, tokens: jax.Array, levels: Sequence[int], rope=None):
  """Runs a stack of blocks up to the deepest level, compiling one block.

  Args:
    blocks: whose parameters have one leading axis.
    tokens: B×N×D.
    levels: 0-based blocks, in any order.
    rope: as for a block.

  Returns:
    The tokens after each of `levels`, in the order given.
  """
  order = sorted(set(levels))
  # Other blocks write into one extra slot that is thrown away. Keeping all outputs of the scan
  # would take 24 maps of ViT-L instead of four.
  slots = [order.index(i) if i in order else len(order) for i in range(order[-1] + 1)]
  graph, stacked = nnx.split(blocks)
  depth = jax.tree.leaves(stacked)[0].shape[0]
  if len(slots) < depth:
    stacked = jax.tree.map(lambda weight: weight[: len(slots)], stacked)

  def step(carry, layer):
    tokens, kept = carry
    weights, slot = layer
    tokens = nnx.merge(graph, weights)(tokens, rope)
    return (tokens, jax.lax.dynamic_update_index_in_dim(kept, tokens, slot, 0)), None

  kept = jnp.zeros((len(order) + 1, *tokens.shape), tokens.dtype)
  (_, kept), _ = jax.lax.scan(step, (tokens, kept), (stacked, jnp.array(slots)))
  return [kept[order.index(level)] for level in levels]


def row(features: jax.Array) -> jax.Array:
  """Gives features the rank of B×N×D."""
  return features.reshape(1, 1, -1)


def _scaled(scale: nnx.Variable | None, x: jax.Array) -> jax.Array:
  return x if scale is None else row(scale[...]) * x


def _cubic(size: int, grid: int) -> np.ndarray:
  """Returns cubic convolution weights (a = −0.75) from `grid` to `size` points, size×grid float32.

  The scale is (size + 0.1)/grid, as in the published code. Samples beyond the border equal those at
  the border.
  """
  a = -0.75
  place = (np.arange(size) + 0.5) * grid / (size + 0.1) - 0.5
  matrix = np.zeros((size, grid))
  for tap in range(-1, 3):
    index = np.floor(place).astype(int) + tap
    x = np.abs(place - index)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    np.add.at(matrix, (np.arange(size), index.clip(0, grid - 1)), np.where(x <= 1, near, far))
  return matrix.astype(np.float32)
