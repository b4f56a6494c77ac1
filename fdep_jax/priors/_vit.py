"""Vision transformers whose block outputs are feature maps of one size and width."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdep_jax.layers import transformer
from fdep_jax.layers.transformer import Block, Frozen, LayerNorm, Linear
from fdep_jax.priors import Foundation, quarter_levels


class VisionTransformer(Foundation):
  """The parts that DINOv1, DINOv2 and DINOv3 share; a subclass adds tokens and positions.

  A converter loads weights. Random ones serve only as a small prior for tests and the quick start:
  normal with variance 1/fan_in. (OUR CHOICE: with the published deviation of 0.02, a small network
  passes its input on almost unchanged.)

  The blocks are one `Block` whose parameters have a leading axis. `scan` runs it, so one block is
  compiled instead of 12 to 40.

  Args:
    width: D, channels of a token.
    depth: blocks.
    heads: of the attention.
    registers: number of extra tokens without a position, after the class token.
    swiglu: gated MLP instead of GELU.
    hidden: width within the MLP; default 4·D; if gated 2/3 of that, rounded up to a multiple of 8.
    patch: pixels.
    grid: patches along each side of a learnt position table; 0: there is none.
    layer_scale, key_bias, epsilon: as for `Block`.
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
    patch: int,
    grid: int = 0,
    layer_scale: bool = True,
    key_bias: bool = True,
    epsilon: float = 1e-6,
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
    if grid:
      self.class_position = token(1, 1, width)
      self.position = token(grid, grid, width)
    self.blocks = Block(
      width, heads, hidden, swiglu=swiglu, layer_scale=layer_scale, key_bias=key_bias,
      epsilon=epsilon, stack=(depth,), dtype=dtype, **options,
    )  # fmt: skip
    self.norm = LayerNorm(width, epsilon=epsilon, variable=variable)

  @property
  def dtype(self) -> jnp.dtype:
    return self.patch_embed.kernel.dtype

  def levels(self, image: jax.Array, blocks: Sequence[int]) -> list[jax.Array]:
    """Returns the patch tokens after the given blocks, each through the final LayerNorm.

    Args:
      image: B×H×W×3, normalised (`prepare`); H and W multiples of the patch.
      blocks: 0-based, in any order. Blocks after the deepest of them are not run.

    Returns:
      For each level, in the order given, B×H/patch×W/patch×D float32.

    Raises:
      ValueError: the image or a block does not fit.
    """
    return [self.feature_map(tokens, image.shape) for tokens in self.tokens(image, blocks)]

  def tokens(self, image: jax.Array, levels: Sequence[int] | None = None) -> list[jax.Array]:
    """Returns all tokens after the given blocks, before the final LayerNorm.

    Args:
      image: as for `levels`.
      levels: 0-based blocks; default `quarter_levels(depth)`.

    Returns:
      For each level B×(1 + registers + patches)×D float32: class, registers, patches in rows.
    """
    levels = quarter_levels(self.depth) if levels is None else tuple(levels)
    self._check(image, levels)
    height, width = (side // self.patch for side in image.shape[1:3])
    tokens = self.embed(image)
    return transformer.levels_of_stack(self.blocks, tokens, levels, self.rope(height, width))

  def feature_map(self, tokens: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
    """Normalises the patches among a B×H×W×3 image's `tokens`: B×H/patch×W/patch×D float32."""
    batch, height, width = image_shape[0], *(side // self.patch for side in image_shape[1:3])
    level = self.norm(tokens[:, 1 + self.registers :]).reshape(batch, height, width, self.width)
    return jax.lax.stop_gradient(level) if self.frozen else level

  def embed(self, image: jax.Array) -> jax.Array:
    """Computes the tokens before the first block: class, registers, patches."""
    batch, height, width = image.shape[0], *(side // self.patch for side in image.shape[1:3])
    patches = self.patch_embed(transformer.cut_patches(image, self.patch)).astype(jnp.float32)
    first = jnp.broadcast_to(self.class_token[...], (batch, 1, self.width))
    tokens = jnp.concatenate([first, patches], 1)
    if self.grid:
      tokens = tokens + self.position_embedding(height, width)
    if self.registers:
      registers = jnp.broadcast_to(self.register_tokens[...], (batch, self.registers, self.width))
      tokens = jnp.concatenate([tokens[:, :1], registers, tokens[:, 1:]], 1)
    return tokens

  def position_embedding(self, height: int, width: int) -> jax.Array:
    """Computes the embedding of height×width positions, class token first: 1×(1 + h·w)×D float32.

    It equals the published PyTorch code. The stored square table is returned untouched at its own
    size; `resize_positions` interpolates it to others.
    """
    grid = self.position[...]
    if (height, width) != (self.grid, self.grid):
      grid = self.resize_positions(grid, height, width)
    return jnp.concatenate([self.class_position[...], grid.reshape(1, -1, self.width)], 1)

  def resize_positions(self, table: jax.Array, height: int, width: int) -> jax.Array:
    """Interpolates the n×n×D position table to height×width×D."""
    return transformer.resize_table(table, height, width)

  def rope(self, height: int, width: int) -> tuple[jax.Array, jax.Array] | None:
    """Computes the sines and cosines of rotary positions, if the model has any."""
    return None

  def macs(self, height: int, width: int, blocks: Sequence[int]) -> float:
    patches = height * width
    length = 1 + self.registers + patches
    block = length * self.blocks.macs_per_token + 2 * length**2 * self.width
    embed = patches * int(np.prod(self.patch_embed.kernel.shape))
    return embed + (max(blocks) + 1) * block

  def _check(self, image: jax.Array, levels: tuple[int, ...]) -> None:
    name, module = self.title, type(self).__module__.rsplit(".", 1)[-1]
    if image.ndim != 4 or image.shape[3] != 3 or not jnp.issubdtype(image.dtype, jnp.floating):
      raise ValueError(
        f"Image is {image.dtype}{image.shape}; {name} needs normalised floats of shape "
        f"(batch, height, width, 3). Its `prepare` ({module}) makes them from RGB in [0, 1]."
      )
    height, width = image.shape[1:3]
    if height % self.patch or width % self.patch or not height or not width:
      raise ValueError(
        f"Image is {height}×{width}; {name} needs multiples of {self.patch}. "
        f"Its `prepare` ({module}) resizes it to the next ones."
      )
    if not levels or not all(0 <= level < self.depth for level in levels):
      raise ValueError(
        f"Levels {levels}; {name} needs at least one block of 0 … {self.depth - 1}, counted from 0."
      )
