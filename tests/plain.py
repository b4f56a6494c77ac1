"""A network and a run that are small enough to compute by hand."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdep_jax import build, data, settings, train
from fdep_jax.backbones import Backbone, Logits
from fdep_jax.fdep import FDEP
from fdep_jax.layers import basic
from fdep_jax.runtime import mesh
from fdep_jax.runtime.signals import Signals

CHANNELS, WIDTH, LEVELS, SIZE, BATCH = 2, 3, 2, 8, 2


class Plain(Backbone):
  """A network without norms: 2×2 means, a 1×1 convolution, and two heads, one on a skip."""

  stride = top_stride = 2
  top_channels = CHANNELS

  def __init__(self, *, rngs):
    self.down = basic.Conv(3, CHANNELS, 1, rngs=rngs)
    self.up = basic.Conv(CHANNELS, 1, 1, rngs=rngs)
    self.side = basic.Conv(3, 1, 1, rngs=rngs)

  def encode(self, image):
    b, h, w, c = image.shape
    return (image,), self.down(image.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)))

  def decode(self, skips, top):
    up = self.up(top).repeat(2, 1).repeat(2, 2)
    side = self.side(skips[0])
    return Logits(up + side * side, (side,))


def randomise(module, seed=0):
  """Gives norms, biases and statistics values that are not 0 and 1."""
  rng = np.random.default_rng(seed)
  for path, value in nnx.iter_graph(module):
    if isinstance(value, nnx.Param | nnx.BatchStat):
      spread = 0.2 * rng.normal(size=value.shape)
      value.set_value(
        jnp.asarray(np.asarray(value[...]) + (abs(spread) if "var" in path else spread))
      )


def images(seed, count):
  rng = np.random.default_rng(seed)
  return [
    data.Sample(
      f"{seed}_{i}",
      np.repeat(rng.integers(0, 256, (SIZE, SIZE, 1), np.uint8), 3, 2),
      rng.random((SIZE, SIZE)) < 0.15,
    )
    for i in range(count)
  ]


def loop_of(config, workdir, prior=None):
  """A run's loop on the plain network; without a prior, levels come with the batches."""
  levels = 0 if config.mode == "original" else LEVELS
  model = FDEP(Plain(rngs=nnx.Rngs(1)), WIDTH, levels, bn_stats="shared", rngs=nnx.Rngs(2))
  randomise(model)
  found = build.Images(images(1, 4), images(2, 3), images(3, 5), 0.4, 0.2)
  settings.claim_workdir(workdir, config)
  return train.Loop(
    config, workdir, mesh.make(1), found, prior, None, None, model, Signals(mesh.minimum, 1)
  )
