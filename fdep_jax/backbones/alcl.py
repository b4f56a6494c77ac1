"""ALCL-Net: attention-based local contrast learning (5.67 M parameters, top feature 256 @ 1/16).

Source: YuChuang1205/PAL model/ALCL.
"""

import jax
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks

_CHANNELS = (16, 32, 64, 128, 256)  # levels 1 to 5
_BLOCKS = 3  # residual blocks a level


class ALCLNet(Backbone):
  """Five residual levels with local contrast on each; the skips gate the deeper features."""

  stride = 16
  top_stride = 16
  top_channels = 256
  paper_name = "ALCL-Net"

  def __init__(self, *, rngs: nnx.Rngs):
    kaiming = {"init": "kaiming", "rngs": rngs}
    self.stem = blocks.Stem(3, 16, **kaiming)
    self.levels = nnx.List([_level(i, rngs) for i in range(5)])
    self.contrast = nnx.List([blocks.LocalContrast(c, rngs=rngs) for c in _CHANNELS])
    self.gate = nnx.List([basic.ConvNorm(c, c, 1, **kaiming) for c in _CHANNELS[:4]])
    self.up = nnx.List([blocks.UpConvNormRelu(2 * c, c, rngs=rngs) for c in _CHANNELS[:4]])
    self.head = blocks.Head(16, **kaiming)

  def encode(self, image: jax.Array) -> tuple[tuple[tuple[jax.Array, jax.Array], ...], jax.Array]:
    """Returns the top and, for levels 1 to 4, the local contrast and its gate, both B×H×W×C."""
    self.check_image(image)
    x = self.stem(image)
    skips = []
    for i, level in enumerate(self.levels):
      for block in level:
        x = block(x)
      if i < 4:
        low = self.contrast[i](x)
        skips.append((low, nnx.sigmoid(self.gate[i](low))))
    return tuple(skips), x

  def decode(self, skips: tuple[tuple[jax.Array, jax.Array], ...], top: jax.Array) -> Logits:
    x = self.contrast[4](top)
    for i in reversed(range(4)):
      low, gate = skips[i]
      x = low + self.up[i](x) * gate
    return Logits(self.head(x))


def _level(i: int, rngs: nnx.Rngs) -> nnx.List:
  channels = _CHANNELS[i]
  first = (
    blocks.DownBlock(_CHANNELS[i - 1], channels, rngs=rngs)
    if i
    else blocks.ResidualBlock(channels, rngs=rngs)
  )
  return nnx.List([first, *(blocks.ResidualBlock(channels, rngs=rngs) for _ in range(_BLOCKS - 1))])
