"""A detector of a few layers that compiles in a second, dropped in as a user would."""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, ops


class Toy(Backbone):
  """Two levels, one fused skip, one side head that does not depend on the top feature."""

  stride = 4
  top_stride = 4
  top_channels = 8
  paper_name = "Toy"

  def __init__(self, *, rngs: nnx.Rngs):
    self.stem = basic.ConvNormRelu(3, 4, rngs=rngs)
    self.down = basic.ConvNormRelu(4, 8, rngs=rngs)
    self.skip = basic.ConvNormRelu(4, 4, rngs=rngs)
    self.up = basic.ConvNormRelu(8, 4, 1, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    self.side = basic.Conv(4, 1, 1, rngs=rngs)
    self.head = basic.Conv(4, 1, 1, rngs=rngs)

  def encode(self, image):
    self.check_image(image)
    level = self.stem(image)
    top = self.down(ops.max_pool2(ops.max_pool2(level)))
    skip = self.skip(level)
    return (skip, self.side(skip)), top

  def decode(self, skips, top):
    skip, side = skips
    up = self.drop(self.up(top))
    up = ops.resize(up, skip.shape[1:3], align_corners=True)
    return Logits(self.head(jnp.maximum(up, 0) + skip), (side,))


def image(batch: int = 2, size: int = 16) -> jax.Array:
  """A normal random image."""
  return jax.random.normal(jax.random.key(1), (batch, size, size, 3))
