"""A plain U-Net of Flax's own layers, as a user would drop it in."""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits


class FlaxUNet(Backbone):
  """Two levels: max pooling on the way down, transposed convolution on the way up."""

  stride = 4
  top_stride = 4
  top_channels = 16
  paper_name = "Flax U-Net"

  def __init__(self, *, rngs: nnx.Rngs):
    self.first = Block(3, 4, rngs=rngs)
    self.second = Block(4, 8, rngs=rngs)
    self.third = Block(8, 16, rngs=rngs)
    self.widen = nnx.ConvTranspose(16, 8, (2, 2), (2, 2), rngs=rngs)
    self.fourth = Block(16, 8, rngs=rngs)
    self.widen_more = nnx.ConvTranspose(8, 4, (2, 2), (2, 2), rngs=rngs)
    self.fifth = Block(8, 4, rngs=rngs)
    self.head = nnx.Conv(4, 1, (1, 1), rngs=rngs)

  def encode(self, image):
    self.check_image(image)
    first = self.first(image)
    second = self.second(nnx.max_pool(first, (2, 2), (2, 2)))
    return (first, second), self.third(nnx.max_pool(second, (2, 2), (2, 2)))

  def decode(self, skips, top):
    first, second = skips
    y = self.fourth(jnp.concatenate([second, self.widen(top)], -1))
    y = self.fifth(jnp.concatenate([first, self.widen_more(y)], -1))
    return Logits(self.head(y))


class Block(nnx.Module):
  """Twice convolution, BatchNorm and ReLU."""

  def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs):
    self.convs = nnx.List([nnx.Conv(c, features, (3, 3), rngs=rngs) for c in (channels, features)])
    self.norms = nnx.List([nnx.BatchNorm(features, rngs=rngs) for _ in range(2)])

  def __call__(self, x: jax.Array) -> jax.Array:
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
    return x
