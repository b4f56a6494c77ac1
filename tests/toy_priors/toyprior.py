"""A foundation model of a few layers that is no vision transformer, dropped in as a user would."""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.layers.transformer import Frozen, Linear, cut_patches
from fdep_jax.priors import Foundation


class Toy(Foundation):
  """Patches through layers x + gelu(x·W + b)."""

  title = "Toy"
  sizes = {"tiny8": {"width": 16, "depth": 3}}
  small = {"width": 16, "depth": 3}
  normalisation = "satellite"

  def __init__(self, width, depth, *, patch=8, dtype=jnp.float32, variable=Frozen, rngs):
    self.width, self.depth, self.patch = width, depth, patch
    self.frozen = issubclass(variable, Frozen)
    options = {"dtype": dtype, "variable": variable, "rngs": rngs}
    self.embed = Linear(3 * patch**2, width, **options)
    self.layers = nnx.List([Linear(width, width, **options) for _ in range(depth)])

  @property
  def dtype(self):
    return self.embed.kernel.dtype

  @classmethod
  def size_of(cls, file):
    return cls.sizes["tiny8"] if "toyprior" in file else None

  def levels(self, image, blocks):
    batch, height, width = image.shape[0], *(side // self.patch for side in image.shape[1:3])
    x, found = self.embed(cut_patches(image, self.patch)).astype(jnp.float32), []
    for layer in self.layers:
      x = x + nnx.gelu(layer(x)).astype(jnp.float32)
      found.append(x.reshape(batch, height, width, self.width))
    levels = [found[block] for block in blocks]
    return [jax.lax.stop_gradient(level) for level in levels] if self.frozen else levels

  def macs(self, height, width, blocks):
    per_patch = 3 * self.patch**2 * self.width + (max(blocks) + 1) * self.width**2
    return height * width * per_patch
