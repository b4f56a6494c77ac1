"""ACM: asymmetric contextual modulation, U-Net flavour (0.40 M parameters, top feature 64 @ 1/16).

Source: YuChuang1205/PAL model/ACM; with 1 input channel and BatchNorm in the fusion blocks it is
the ACM of XinyiYing/BasicIRSTD and LESPS.
"""

import jax
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks, ops


class ACM(Backbone):
  """Two fusions of deconvolved features with the skips, three basic blocks after each.

  Args:
    in_channels: 3 (PAL) or 1 (BasicIRSTD, LESPS).
    fusion_norm: "group" (PAL) or "batch" (BasicIRSTD, LESPS).
  """

  stride = 16
  top_stride = 16
  top_channels = 64
  paper_name = "ACM"

  def __init__(
    self,
    *,
    in_channels: int = 3,
    fusion_norm: blocks.FusionNorm = "group",
    rngs: nnx.Rngs,
  ):
    self.in_channels = in_channels
    self.encoder = blocks.ResNetEncoder(in_channels, blocks=3, rngs=rngs)
    channels = (16, 32)  # of the skips, at 1/4 and 1/8
    self.up = nnx.List([basic.ConvTranspose(2 * c, c, rngs=rngs) for c in channels])
    self.fuse = nnx.List([blocks.AsymmetricFusion(c, fusion_norm, rngs=rngs) for c in channels])
    self.refine = nnx.List(
      [nnx.List([blocks.BasicBlock(c, c, rngs=rngs) for _ in range(3)]) for c in channels]
    )
    self.head = blocks.DropoutHead(16, rngs=rngs)

  def encode(self, image: jax.Array) -> tuple[tuple[tuple[jax.Array, jax.Array], ...], jax.Array]:
    self.check_image(image)
    *skips, top = self.encoder(image)
    gated = [(skip, fuse.bottomup(skip)) for skip, fuse in zip(skips, self.fuse, strict=True)]
    return tuple(gated), top

  def decode(self, skips: tuple[tuple[jax.Array, jax.Array], ...], top: jax.Array) -> Logits:
    x = top
    for i in (1, 0):
      x = self.fuse[i](self.up[i](x), *skips[i])
      for block in self.refine[i]:
        x = block(x)
    x = self.head(x)  # B×H/4×W/4×1
    return Logits(ops.resize(x, (4 * x.shape[1], 4 * x.shape[2]), align_corners=False))
