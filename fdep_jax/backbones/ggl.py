"""GGL-Net: gradient-guided learning (8.99 M parameters, top feature 256 @ 1/16).

Source: YuChuang1205/PAL model/GGL.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks, ops

_CHANNELS = (16, 32, 64, 128, 256)  # levels 1 to 5


class GGLNet(Backbone):
  """Five levels of gated residual blocks; the image's gradient magnitude is injected after each."""

  stride = 16
  top_stride = 16
  top_channels = 256
  paper_name = "GGL-Net"

  def __init__(self, *, rngs: nnx.Rngs):
    self.stem = blocks.Stem(3, 16, init="kaiming", rngs=rngs)
    self.enter = nnx.List(
      [
        blocks.ResidualBlock(16, rngs=rngs),
        *(blocks.DownBlock(c // 2, c, rngs=rngs) for c in _CHANNELS[1:]),
      ]
    )
    self.gated = nnx.List(
      [nnx.List([GatedBlock(c, rngs=rngs) for _ in range(2)]) for c in _CHANNELS]
    )
    self.inject = nnx.List([GradientBlock(3, c, rngs=rngs) for c in _CHANNELS])
    self.contrast = nnx.List([blocks.LocalContrast(c, rngs=rngs) for c in _CHANNELS])
    # PyTorch's default initialisation: the published code never calls the gates' own.
    self.position = nnx.List([basic.Conv(2, 1, 7, rngs=rngs) for _ in _CHANNELS[:4]])
    self.channel = nnx.List([blocks.ChannelAttention(c, 8, rngs=rngs) for c in _CHANNELS[:4]])
    self.up = nnx.List([blocks.UpConvNormRelu(2 * c, c, rngs=rngs) for c in _CHANNELS[:4]])
    self.head = blocks.Head(16, init="kaiming", rngs=rngs)

  def encode(self, image: jax.Array) -> tuple[tuple[tuple[jax.Array, jax.Array], ...], jax.Array]:
    """Returns the top and, for levels 1 to 4, the local contrast B×H×W×C and its gate B×H×W×1."""
    self.check_image(image)
    gradient = gradient_magnitude(image)
    x = self.stem(image)
    skips = []
    for i, (enter, level) in enumerate(zip(self.enter, self.gated, strict=True)):
      x = enter(x)
      for block in level:
        x = block(x)
      x = self.inject[i](x, gradient)
      if i < 4:
        gradient = ops.max_pool2(gradient)
        low = self.contrast[i](x)
        skips.append((low, nnx.sigmoid(self.position[i](ops.max_and_mean(low)))))
    return tuple(skips), x

  def decode(self, skips: tuple[tuple[jax.Array, jax.Array], ...], top: jax.Array) -> Logits:
    x = self.contrast[4](top)
    for i in reversed(range(4)):
      low, position = skips[i]
      high = self.up[i](x)
      x = low * self.channel[i](high) + high * position
    return Logits(self.head(x))


def gradient_magnitude(image: jax.Array) -> jax.Array:
  """Computes √(∂x² + ∂y²) of every channel by central differences, with zeros outside the image.

  The zeros give strong false edges at the border, as in the published network. Backpropagation
  stops here: the square root has no gradient at 0, and the image needs none.
  """
  padded = jnp.pad(jax.lax.stop_gradient(image), [(0, 0), (1, 1), (1, 1), (0, 0)])
  before, inside, after = slice(None, -2), slice(1, -1), slice(2, None)
  along_x = (ops.window(padded, inside, after) - ops.window(padded, inside, before)) / 2
  along_y = (ops.window(padded, after, inside) - ops.window(padded, before, inside)) / 2
  return jnp.sqrt(along_x**2 + along_y**2)


class GatedConvs(nnx.Module):
  """conv3, BN, ReLU, squeeze and excitation, conv3, BN."""

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.conv1 = basic.ConvNormRelu(in_channels, out_channels, init="kaiming", rngs=rngs)
    self.squeeze = blocks.SqueezeExcitation(out_channels, rngs=rngs)
    self.conv2 = basic.ConvNorm(out_channels, out_channels, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv2(self.squeeze(self.conv1(x)))


class GatedBlock(GatedConvs):
  """Gated convolutions with a residual, ReLU."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    super().__init__(channels, channels, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(x + super().__call__(x))


class GradientBlock(nnx.Module):
  """Adds to a level a residual computed from the level and the image's gradient."""

  def __init__(self, gradient_channels: int, channels: int, *, rngs: nnx.Rngs):
    self.gradient = GatedConvs(gradient_channels, channels, rngs=rngs)
    self.joint = GatedConvs(2 * channels, channels, rngs=rngs)

  def __call__(self, x: jax.Array, gradient: jax.Array) -> jax.Array:
    joint = jnp.concatenate([x, nnx.relu(self.gradient(gradient))], -1)
    return nnx.relu(x + self.joint(joint))
