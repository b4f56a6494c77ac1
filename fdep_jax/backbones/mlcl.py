"""MLCL-Net: multi-scale local contrast learning (0.66 M parameters, top feature 64 @ 1/4).

Source: YuChuang1205/PAL model/MLCL.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks, ops

_CHANNELS = (16, 32, 64)  # levels 1 to 3, at 1/1, 1/2 and 1/4


class MLCLNet(Backbone):
  """Three residual stages; local contrast at three dilations on each, summed from deep to shallow.

  Args:
    small: one residual block fewer in each stage (0.56 M parameters).
  """

  stride = 4
  top_stride = 4
  top_channels = 64
  paper_name = "MLCL-Net"

  def __init__(self, *, small: bool = False, rngs: nnx.Rngs):
    depth = 2 if small else 3
    self.stem = blocks.Stem(3, 16, init="torch", rngs=rngs)
    self.stages = nnx.List(
      [
        nnx.List([first] + [blocks.ResidualBlock(c, rngs=rngs) for _ in range(depth - 1)])
        for first, c in (
          (blocks.ResidualBlock(16, rngs=rngs), 16),
          (blocks.DownBlock(16, 32, rngs=rngs), 32),
          (blocks.DownBlock(32, 64, rngs=rngs), 64),
        )
      ]
    )
    self.contrast = nnx.List([LocalContrast(c, rngs=rngs) for c in _CHANNELS])
    self.widen = nnx.List([basic.Conv(c, 64, 1, rngs=rngs) for c in _CHANNELS])
    self.head = blocks.Head(64, init="torch", rngs=rngs)

  def encode(self, image: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    self.check_image(image)
    x = self.stem(image)
    levels = []
    for stage in self.stages:
      for block in stage:
        x = block(x)
      levels.append(x)
    return (self._widened(0, levels[0]), self._widened(1, levels[1])), levels[2]

  def decode(self, skips: tuple[jax.Array, jax.Array], top: jax.Array) -> Logits:
    x = self._widened(2, top)
    for skip in reversed(skips):
      x = ops.upsample2(x, align_corners=True) + skip
    return Logits(self.head(x))

  def _widened(self, level: int, x: jax.Array) -> jax.Array:
    """Computes the local contrast of one level, B×h×w×64."""
    return nnx.relu(self.widen[level](self.contrast[level](x)))


class LocalContrast(nnx.Module):
  """Three receptive fields, concatenated and merged (the decoder's MLCL module; no norms)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    options = {"init": "kaiming", "rngs": rngs}
    self.branches = nnx.List(
      [
        nnx.List(
          [
            basic.Conv(channels, channels, size, **options),
            basic.Conv(channels, channels, 3, dilation=size, **options),
          ]
        )
        for size in (1, 3, 5)
      ]
    )
    self.merge = basic.Conv(3 * channels, channels, 1, **options)

  def __call__(self, x: jax.Array) -> jax.Array:
    branches = [nnx.relu(second(nnx.relu(first(x)))) for first, second in self.branches]
    return self.merge(jnp.concatenate(branches, -1))
