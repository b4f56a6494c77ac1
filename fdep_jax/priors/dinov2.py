"""DINOv2 (ViT-S/B/L/g 14), the frozen foundation model whose levels SAMF fuses (paper §3.2)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# The published sizes; keyword arguments of `DINOv2`. Each exists with `registers` 0 and 4.
SIZES = {
  "vits14": {"width": 384, "depth": 12, "heads": 6},
  "vitb14": {"width": 768, "depth": 12, "heads": 12},
  "vitl14": {"width": 1024, "depth": 24, "heads": 16},
  "vitg14": {"width": 1536, "depth": 40, "heads": 24, "swiglu": True},
}
PATCH = 14  # pixels
GRID = 37  # patches along each side in pretraining, 518 / 14

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Frozen(nnx.Variable):
  """A weight that is not trained: it is no `nnx.Param`, so no gradient or checkpoint has it."""


def quarter_levels(depth: int, count: int = 4) -> tuple[int, ...]:
  """Returns the last block of each of `count` equal parts, 0-based; ViT-L: (5, 11, 17, 23)."""
  return tuple(-(-depth * (i + 1) // count) - 1 for i in range(count))


def prepare(image: jax.Array, patch: int = PATCH) -> jax.Array:
  """Resizes and normalises an image for DINOv2.

  The resize is bilinear, to the next multiples of `patch`.

  Args:
    image: B×H×W×3 RGB in [0, 1]; an infrared frame has three equal channels.
    patch: pixels.

  Returns:
    B×H'×W'×3 float32 with ImageNet's mean and deviation; H' and W' are H and W rounded up.
  """
  image = jnp.asarray(image, jnp.float32)
  batch, height, width, channels = image.shape
  size = tuple(-(-side // patch) * patch for side in (height, width))
  if size != (height, width):  # only ever enlarges, by less than a patch
    image = jax.image.resize(image, (batch, *size, channels), "bilinear", antialias=False)
  mean, std = (jnp.array(values).reshape(1, 1, 1, -1) for values in (IMAGENET_MEAN, IMAGENET_STD))
  return (image - mean) / std


class DINOv2(nnx.Module):
  """Vision transformer whose block outputs are feature maps of one size and width.

  `converters.load_dinov2` loads weights. Random ones serve only as a small prior for tests and the
  quick start: normal with variance 1/fan_in. (OUR CHOICE: with the published deviation of 0.02, a
  small network passes its input on almost unchanged.)

  The blocks are one `Block` whose parameters have a leading axis. `scan` runs it, so one block is
  compiled instead of 12 to 40.

  Args:
    width: D, channels of a token.
    depth: blocks.
    heads: of the attention.
    registers: number of extra tokens without a position. Models that have them interpolate their
      position embedding differently.
    swiglu: gated MLP (ViT-g) instead of GELU.
    hidden: width within the MLP; default 4·D; if gated 2/3 of that, rounded up to a multiple of 8.
    patch: pixels.
    grid: patches along each side of the stored position embedding.
    dtype: of matrices and their products; norms, softmax, residuals and the output are float32.
    variable: type of the parameters; `nnx.Param` trains them (Tab. 6).
    rngs: `params`.
  """

  def __init__(
    self,
    width: int,
    depth: int,
    heads: int,
    *,
    registers: int = 0,
    swiglu: bool = False,
    hidden: int | None = None,
    patch: int = PATCH,
    grid: int = GRID,
    dtype=jnp.float32,
    variable: type[nnx.Variable] = Frozen,
    rngs: nnx.Rngs,
  ):
    if width % heads:
      raise ValueError(f"A width of {width} cannot be split into {heads} heads of equal size.")
    hidden = hidden or (4 * width if not swiglu else -(-int(4 * width * 2 / 3) // 8) * 8)
    self.width, self.depth, self.registers = width, depth, registers
    self.patch, self.grid = patch, grid
    self.frozen = issubclass(variable, Frozen)
    options = {"variable": variable, "rngs": rngs}

    def token(*shape):
      return variable(jax.random.normal(rngs.params(), shape) * 0.02)

    self.patch_embed = Linear(3 * patch**2, width, dtype=dtype, **options)
    self.class_token = token(1, 1, width)
    self.register_tokens = token(1, registers, width) if registers else nnx.data(None)
    self.class_position = token(1, 1, width)
    self.position = token(grid, grid, width)
    self.blocks = Block(width, heads, hidden, swiglu=swiglu, stack=(depth,), dtype=dtype, **options)
    self.norm = LayerNorm(width, variable=variable)

  def __call__(self, image: jax.Array, levels: Sequence[int] | None = None) -> list[jax.Array]:
    """Returns the patch tokens after the given blocks, each through the final LayerNorm.

    Args:
      image: B×H×W×3, normalised (`prepare`); H and W multiples of 14.
      levels: 0-based blocks, in any order; default `quarter_levels(depth)`. Blocks after the
        deepest of them are not run.

    Returns:
      For each level, in the order given, B×H/14×W/14×D float32.

    Raises:
      ValueError: the image or a level does not fit.
    """
    return [self.feature_map(tokens, image.shape) for tokens in self.tokens(image, levels)]

  def tokens(self, image: jax.Array, levels: Sequence[int] | None = None) -> list[jax.Array]:
    """Returns all tokens after the given blocks, before the final LayerNorm.

    Args:
      image, levels: as for a call.

    Returns:
      For each level B×(1 + registers + H/14·W/14)×D float32: class, registers, patches in rows.
    """
    levels = quarter_levels(self.depth) if levels is None else tuple(levels)
    self._check(image, levels)
    order = sorted(set(levels))
    # Other blocks write into one extra slot that is thrown away. Keeping all outputs of the scan
    # would take 24 maps of ViT-L instead of four.
    slots = [order.index(i) if i in order else len(order) for i in range(order[-1] + 1)]
    graph, stacked = nnx.split(self.blocks)
    if len(slots) < self.depth:
      stacked = jax.tree.map(lambda weight: weight[: len(slots)], stacked)

    def step(carry, block_and_slot):
      tokens, kept = carry
      block, slot = block_and_slot
      tokens = nnx.merge(graph, block)(tokens)
      return (tokens, jax.lax.dynamic_update_index_in_dim(kept, tokens, slot, 0)), None

    tokens = self._embed(image)
    kept = jnp.zeros((len(order) + 1, *tokens.shape), tokens.dtype)
    (_, kept), _ = jax.lax.scan(step, (tokens, kept), (stacked, jnp.array(slots)))
    return [kept[order.index(level)] for level in levels]

  def feature_map(self, tokens: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
    """Normalises the patches among a B×H×W×3 image's `tokens`: B×H/14×W/14×D float32."""
    batch, height, width = image_shape[0], *(side // self.patch for side in image_shape[1:3])
    level = self.norm(tokens[:, 1 + self.registers :]).reshape(batch, height, width, self.width)
    return jax.lax.stop_gradient(level) if self.frozen else level

  def position_embedding(self, height: int, width: int) -> jax.Array:
    """Computes the embedding of height×width positions, class token first: 1×(1 + h·w)×D float32.

    It equals the published PyTorch code. Sizes other than the stored square one are interpolated by
    cubic convolution: in plain models with a = −0.75, clamped at the border, as if the image were
    0.1 patches larger; in models with registers with a = −0.5, antialiased.
    """
    grid = self.position[...]
    if (height, width) != (self.grid, self.grid):
      if self.registers:
        shape = (height, width, self.width)
        grid = jax.image.resize(grid, shape, "cubic", antialias=True)
      else:
        rows, columns = (jnp.asarray(_cubic(n, self.grid)) for n in (height, width))
        grid = jnp.einsum(
          "hi,ijd,wj->hwd", rows, grid, columns, precision=jax.lax.Precision.HIGHEST
        )
    return jnp.concatenate([self.class_position[...], grid.reshape(1, -1, self.width)], 1)

  def _embed(self, image: jax.Array) -> jax.Array:
    batch, height, width = image.shape[0], *(side // self.patch for side in image.shape[1:3])
    patches = image.reshape(batch, height, self.patch, width, self.patch, 3).swapaxes(2, 3)
    patches = self.patch_embed(patches.reshape(batch, height * width, -1)).astype(jnp.float32)
    first = jnp.broadcast_to(self.class_token[...], (batch, 1, self.width))
    tokens = jnp.concatenate([first, patches], 1) + self.position_embedding(height, width)
    if self.registers:
      registers = jnp.broadcast_to(self.register_tokens[...], (batch, self.registers, self.width))
      tokens = jnp.concatenate([tokens[:, :1], registers, tokens[:, 1:]], 1)
    return tokens

  def _check(self, image: jax.Array, levels: tuple[int, ...]) -> None:
    if image.ndim != 4 or image.shape[3] != 3 or not jnp.issubdtype(image.dtype, jnp.floating):
      raise ValueError(
        f"Image is {image.dtype}{image.shape}; DINOv2 needs normalised floats of shape "
        "(batch, height, width, 3). `dinov2.prepare` makes them from RGB in [0, 1]."
      )
    height, width = image.shape[1:3]
    if height % self.patch or width % self.patch or not height or not width:
      raise ValueError(
        f"Image is {height}×{width}; DINOv2 needs multiples of {self.patch}. "
        "`dinov2.prepare` resizes it to the next ones."
      )
    if not levels or not all(0 <= level < self.depth for level in levels):
      raise ValueError(
        f"Levels {levels}; DINOv2 needs at least one block of 0 … {self.depth - 1}, counted from 0."
      )


class Block(nnx.Module):
  """x + γ₁·attention(norm(x)), then x + γ₂·mlp(norm(x)).

  Args:
    width, heads, hidden, swiglu, dtype, variable: as for `DINOv2`.
    stack: leading axes of every parameter. With any, call only the slices that a scan takes.
  """

  def __init__(self, width, heads, hidden, *, swiglu, stack, dtype, variable, rngs):
    options = {"stack": stack, "variable": variable}
    linear = {**options, "dtype": dtype, "rngs": rngs}
    self.norm1 = LayerNorm(width, **options)
    self.qkv = Linear(width, 3 * width, **linear)
    self.project = Linear(width, width, **linear)
    self.scale1 = variable(jnp.ones((*stack, width)))
    self.norm2 = LayerNorm(width, **options)
    self.expand = Linear(width, 2 * hidden if swiglu else hidden, **linear)
    self.reduce = Linear(hidden, width, **linear)
    self.scale2 = variable(jnp.ones((*stack, width)))
    self.heads = heads
    self.swiglu = swiglu

  def __call__(self, tokens: jax.Array) -> jax.Array:
    tokens = tokens + _row(self.scale1[...]) * self._attend(self.norm1(tokens))
    return tokens + _row(self.scale2[...]) * self._mlp(self.norm2(tokens))

  def _attend(self, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
    y = _attention(*(qkv[:, :, i] for i in range(3)))
    return self.project(y.reshape(batch, length, width))

  def _mlp(self, x: jax.Array) -> jax.Array:
    x = self.expand(x)
    if self.swiglu:
      gate, value = jnp.split(x, 2, -1)
      return self.reduce(nnx.silu(gate) * value)
    return self.reduce(nnx.gelu(x, approximate=False))


def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Computes softmax attention of B×N×heads×d, with the softmax in float32."""
  # Heads first: a CPU runs these products a third faster than in the einsum's own order.
  query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
  query = query * query.shape[-1] ** -0.5
  score = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
  mixed = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(score).astype(value.dtype), value)
  return jnp.moveaxis(mixed, 1, 2)


class Linear(nnx.Module):
  """Linear layer x·W + b, computed in the type of W."""

  def __init__(self, in_features, features, *, stack=(), dtype, variable, rngs):
    kernel = jax.random.normal(rngs.params(), (*stack, in_features, features)) * in_features**-0.5
    self.kernel = variable(kernel.astype(dtype))
    self.bias = variable(jnp.zeros((*stack, features), dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...]
    return x.astype(kernel.dtype) @ kernel + _row(self.bias[...])


class LayerNorm(nnx.Module):
  """LayerNorm over the last axis, ε = 1e-6, in float32."""

  def __init__(self, width, *, stack=(), variable):
    self.scale = variable(jnp.ones((*stack, width)))
    self.bias = variable(jnp.zeros((*stack, width)))

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return x * _row(self.scale[...]) + _row(self.bias[...])


def _row(features: jax.Array) -> jax.Array:
  return features.reshape(1, 1, -1)


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
