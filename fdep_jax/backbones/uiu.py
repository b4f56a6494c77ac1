"""UIU-Net: U-Net in U-Net (50.54 M parameters, top feature 512 @ 1/32).

Source: YuChuang1205/PAL model/UIU (GroupNorm in the fusion blocks, raw logits); with 1 input
channel and BatchNorm in the fusion blocks it is the UIU-Net of XinyiYing/BasicIRSTD.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks, ops

# (inside, out) channels of the encoder's levels 1 to 6 and of the decoder's levels 1 to 5, then the
# depth of the U-Net inside each level. Levels 5 and 6 dilate instead of pooling.
_ENCODER = ((32, 64), (32, 128), (64, 256), (128, 512), (256, 512), (256, 512))
_DECODER = ((16, 64), (32, 64), (64, 128), (128, 256), (256, 512))
_DEPTHS = (7, 6, 5, 4, 4, 4)
_POOLED = (True, True, True, True, False, False)


class UIUNet(Backbone):
  """U-Net of U-Nets with cross attention on four of its five skips; seven supervised heads.

  The published network also takes sizes that are not multiples of 32, because its poolings round
  up. This one refuses them, so that `top` has exactly 1/32 of the image's size.

  Args:
    in_channels: 3 (PAL) or 1 (BasicIRSTD).
    fusion_norm: "group" (PAL) or "batch" (BasicIRSTD).
  """

  stride = 32
  top_stride = 32
  top_channels = 512
  paper_name = "UIU-Net"

  def __init__(
    self,
    *,
    in_channels: int = 3,
    fusion_norm: blocks.FusionNorm = "group",
    rngs: nnx.Rngs,
  ):
    self.in_channels = in_channels
    down, up = [c for _, c in _ENCODER], [c for _, c in _DECODER]
    self.encoder = nnx.List(
      [
        ResidualU(before, inside, out, depth, pooled=pooled, rngs=rngs)
        for before, (inside, out), depth, pooled in zip(
          [in_channels, *down[:-1]], _ENCODER, _DEPTHS, _POOLED, strict=True
        )
      ]
    )
    self.decoder = nnx.List(
      [
        ResidualU(2 * skip, inside, out, depth, pooled=pooled, rngs=rngs)
        for skip, (inside, out), depth, pooled in zip(
          down[:5], _DECODER, _DEPTHS[:5], _POOLED[:5], strict=True
        )
      ]
    )
    self.fuse = nnx.List(  # levels 2 to 5
      [CrossAttention(c, fusion_norm, rngs=rngs) for c in down[1:5]]
    )
    self.side = nnx.List([basic.Conv(c, 1, rngs=rngs) for c in [*up, down[5]]])
    self.head = basic.Conv(6, 1, 1, rngs=rngs)

  def encode(self, image: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    self.check_image(image)
    levels = [self.encoder[0](image)]
    for block in self.encoder[1:]:
      levels.append(block(ops.max_pool2(levels[-1])))
    return tuple(levels[:-1]), levels[-1]

  def decode(self, skips: tuple[jax.Array, ...], top: jax.Array) -> Logits:
    decoded = [top]  # deepest first
    for i in reversed(range(5)):
      high = ops.upsample2(decoded[-1], align_corners=False)
      pair = (high, skips[i]) if i == 0 else self.fuse[i - 1](high, skips[i])
      decoded.append(self.decoder[i](jnp.concatenate(pair, -1)))
    size = decoded[-1].shape[1:3]
    side = tuple(
      ops.resize(conv(x), size, align_corners=False)
      for conv, x in zip(self.side, reversed(decoded), strict=True)
    )
    return Logits(self.head(jnp.concatenate(side, -1)), side)


class ResidualU(nnx.Module):
  """A small U-Net of `depth` levels, plus the result of its first convolution (RSU).

  Args:
    in_channels, inside, out_channels: channels; `inside` those of the inner levels.
    depth: levels of the inner U-Net.
    pooled: True: all inner levels but the last halve the size, and the last dilates by 2 (RSU-L).
      False: level i dilates by 2^i at full size (RSU-4F).
  """

  def __init__(
    self,
    in_channels: int,
    inside: int,
    out_channels: int,
    depth: int,
    *,
    pooled: bool,
    rngs: nnx.Rngs,
  ):
    dilations = [1] * (depth - 1) + [2] if pooled else [2**i for i in range(depth)]
    outside = [out_channels] + [inside] * (depth - 1)
    self.enter = basic.ConvNormRelu(in_channels, out_channels, rngs=rngs)
    self.down = nnx.List(
      [
        basic.ConvNormRelu(channels, inside, dilation=dilation, rngs=rngs)
        for channels, dilation in zip(outside, dilations, strict=True)
      ]
    )
    self.up = nnx.List(
      [
        basic.ConvNormRelu(2 * inside, channels, dilation=dilation, rngs=rngs)
        for channels, dilation in zip(outside[:-1], dilations[:-1], strict=True)
      ]
    )
    self.pooled = pooled

  def __call__(self, x: jax.Array) -> jax.Array:
    entered = self.enter(x)
    levels = []
    x = entered
    for i, unit in enumerate(self.down):
      if self.pooled and 0 < i < len(self.up):
        x = ops.max_pool2(x)
      x = unit(x)
      levels.append(x)
    for i in reversed(range(len(self.up))):
      x = ops.resize(x, levels[i].shape[1:3], align_corners=False)
      x = self.up[i](jnp.concatenate([x, levels[i]], -1))
    return entered + x


class CrossAttention(nnx.Module):
  """Gates the skip's channels by the deeper feature, and that feature's positions by the skip."""

  def __init__(self, channels: int, norm: blocks.FusionNorm, *, rngs: nnx.Rngs):
    self.high = FusionConv(channels, channels, 1, norm, rngs=rngs)
    self.channel1 = FusionConv(channels, channels // 4, 1, norm, rngs=rngs)
    self.channel2 = FusionConv(channels // 4, channels, 1, norm, rngs=rngs)
    self.spatial1 = FusionConv(channels, channels // 4, 1, norm, rngs=rngs)
    self.spatial2 = basic.Conv(2, 1, 3, bias=False, rngs=rngs)
    self.out = FusionConv(channels, channels, 3, norm, rngs=rngs)

  def __call__(self, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = nnx.relu(self.high(high))
    channels = nnx.relu(self.channel1(ops.spatial_mean(high)))
    low = low * nnx.sigmoid(self.channel2(channels))
    positions = ops.mean_and_max(nnx.relu(self.spatial1(low)))
    high = high * nnx.sigmoid(self.spatial2(positions))
    # Both share one set of weights.
    return nnx.relu(self.out(2 * low)), nnx.relu(self.out(2 * high))


class FusionConv(nnx.Module):
  """Convolution and the norm of the fusion blocks."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: blocks.FusionNorm,
    *,
    rngs: nnx.Rngs,
  ):
    self.conv = basic.Conv(in_channels, out_channels, kernel_size, rngs=rngs)
    self.norm = blocks.fusion_norm(norm, out_channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(self.conv(x))
