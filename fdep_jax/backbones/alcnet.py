"""ALCNet as the paper's comparison runs it (0.43 M parameters, top feature 64 @ 1/16).

An FPN with ACM's encoder and fusion. Unlike the ALCNet publication, this code has no local
contrast. Source: YuChuang1205/PAL model/ALC; with 1 input channel and BatchNorm in the fusion
blocks it is the ALCNet of XinyiYing/BasicIRSTD and LESPS.
"""

import jax
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks, ops


class ALCNet(Backbone):
  """Two fusions of deconvolved features with the skips, and one more deconvolution.

  Args:
    in_channels: 3 (PAL) or 1 (BasicIRSTD, LESPS).
    fusion_norm: "group" (PAL) or "batch" (BasicIRSTD, LESPS).
  """

  stride = 16
  top_stride = 16
  top_channels = 64
  paper_name = "ALCNet"

  def __init__(
    self,
    *,
    in_channels: int = 3,
    fusion_norm: blocks.FusionNorm = "group",
    rngs: nnx.Rngs,
  ):
    self.in_channels = in_channels
    self.encoder = blocks.ResNetEncoder(in_channels, blocks=4, rngs=rngs)
    self.up = nnx.List([basic.ConvTranspose(2 * c, c, rngs=rngs) for c in (8, 16, 32)])
    self.fuse = nnx.List(
      [blocks.AsymmetricFusion(c, fusion_norm, rngs=rngs) for c in (16, 32)]  # at 1/4 and 1/8
    )
    self.head = blocks.DropoutHead(8, rngs=rngs)

  def encode(self, image: jax.Array) -> tuple[tuple[tuple[jax.Array, jax.Array], ...], jax.Array]:
    self.check_image(image)
    *skips, top = self.encoder(image)
    gated = [(skip, fuse.bottomup(skip)) for skip, fuse in zip(skips, self.fuse, strict=True)]
    return tuple(gated), top

  def decode(self, skips: tuple[tuple[jax.Array, jax.Array], ...], top: jax.Array) -> Logits:
    x = top
    for i in (1, 0):
      x = self.fuse[i](self.up[i + 1](x), *skips[i])
    x = self.head(self.up[0](x))  # B×H/2×W/2×1
    return Logits(ops.upsample2(x, align_corners=False))
