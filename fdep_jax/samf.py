"""SAMF: fuses DINOv2 levels into a detector's top feature (paper §3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.layers import basic, ops


class SAMF(nnx.Module):
  """Fuses one DINOv2 level into the top feature.

  OUR CHOICE: the paper draws boxes without their contents. 1024·C + 11.5·C² + 7·C parameters
  reproduce the totals that the paper prints for all eight networks. The text read literally gives
  10.5·C², which matches none of them. We add the missing C² to the last box, as a 1×1 convolution
  before the 3×3, as these authors' other fusion blocks have. Scheme 1 of Tab. 3 is then this
  module without its modulation. The gate's sigmoid and the places of BatchNorm and ReLU are also
  inferred.

  Args:
    channels: C of the top feature, even.
    dino_width: D of a level.
  """

  def __init__(self, channels: int, dino_width: int, *, rngs: nnx.Rngs):
    half = channels // 2
    self.align = Alignment(channels, dino_width, rngs=rngs)
    self.gate = basic.Conv(channels, half, 1, rngs=rngs)
    self.shift = basic.Conv(channels, half, 1, rngs=rngs)
    self.gated = basic.Conv(half, half, 1, rngs=rngs)
    self.shifted = basic.Conv(half, half, 1, rngs=rngs)
    self.refine1 = basic.ConvNormRelu(channels, channels, 1, bias=False, rngs=rngs)
    self.refine2 = basic.ConvNormRelu(channels, channels, 3, bias=False, rngs=rngs)

  def __call__(self, top: jax.Array, level: jax.Array) -> jax.Array:
    """Fuses `level`, B×h×w×D, into `top`, B×H×W×C; returns B×H×W×C."""
    prior = self.align(level, top)  # eq. 1
    multiply, add = jnp.split(top, 2, -1)
    multiply = self.gated(multiply * nnx.sigmoid(self.gate(prior)))  # eq. 2, 4
    add = self.shifted(add + self.shift(prior))  # eq. 3, 5
    fused = jnp.concatenate([multiply, add], -1) + top
    return self.refine2(self.refine1(fused)).astype(top.dtype)  # eq. 6


class Add(nnx.Module):
  """Adds the aligned level to the top feature: Schemes 1 and 3 of Tab. 3, DINO without SAMF."""

  def __init__(self, channels: int, dino_width: int, *, rngs: nnx.Rngs):
    self.align = Alignment(channels, dino_width, rngs=rngs)

  def __call__(self, top: jax.Array, level: jax.Array) -> jax.Array:
    """Fuses `level`, B×h×w×D, into `top`, B×H×W×C; returns B×H×W×C."""
    return top + self.align(level, top)


class Alignment(nnx.Module):
  """Projects a level to the top feature's channels and size.

  The paper says upsampling, but at 448×448 the 32×32 tokens are reduced for seven of the eight
  networks. The 1×1 convolution comes first: it commutes with a bilinear resize, and resizing C
  channels is cheaper than D.
  """

  def __init__(self, channels: int, dino_width: int, *, rngs: nnx.Rngs):
    self.project = basic.Conv(dino_width, channels, 1, rngs=rngs)

  def __call__(self, level: jax.Array, top: jax.Array) -> jax.Array:
    return self.to_size(level.astype(top.dtype), top.shape[1:3])

  def to_size(self, level: jax.Array, size: tuple[int, int]) -> jax.Array:
    return ops.resize(self.project(level), size, align_corners=False)
