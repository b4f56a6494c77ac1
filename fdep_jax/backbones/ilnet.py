"""ILNet: interior attention and low-level details (4.04 M parameters, top feature 128 @ 1/32).

Source: Li-Haoqing/ILNet, `ILNet_L`, and its smaller `ILNet_M` and `ILNet_S`.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import attention, basic, ops

Size = Literal["L", "M", "S"]


class _Widths(NamedTuple):
  """(inside, out) channels of levels 1 to 6, and of the decoder's levels 5 to 1."""

  encoder: tuple[tuple[int, int], ...]
  decoder: tuple[tuple[int, int], ...]


_SIZES = {
  "L": _Widths(
    ((16, 64), (16, 64), (32, 64), (32, 128), (32, 128), (64, 128)),
    ((64, 128), (32, 64), (32, 64), (16, 64), (16, 64)),
  ),
  "M": _Widths(((16, 64),) * 6, ((16, 64),) * 5),
  "S": _Widths(((4, 8),) * 6, ((4, 8),) * 5),
}
_DEPTHS = (7, 6, 5, 4, 4, 4)  # of the small U-Nets of levels 1 to 6; 5 and 6 dilate


class ILNet(Backbone):
  """A U-Net of U-Nets whose skips are fused by channels and positions; seven supervised heads.

  Args:
    size: "L" is the paper's. "M" and "S" have narrower levels and another tail: three maps are
      weighted by a mask of the shallow levels, and the side heads are not what is fused. The
      published code resizes that mask to 512×512, whatever the image is; here it gets the image's
      size, which is the same network at 512×512.
  """

  stride = 32
  top_stride = 32
  top_channels = 128
  paper_name = "ILNet"

  def __init__(self, *, size: Size = "L", rngs: nnx.Rngs):
    if size not in _SIZES:
      raise ValueError(f"size is {size!r}; it must be one of {', '.join(_SIZES)}.")
    encoder, decoder = _SIZES[size]
    self.top_channels = encoder[-1][1]
    down = [3, *(out for _, out in encoder)]  # channels before and after each level
    self.encoder = nnx.List(
      [
        ResidualU(before, inside, out, depth, pooled=i < 4, rngs=rngs)
        for i, (before, (inside, out), depth) in enumerate(
          zip(down[:-1], encoder, _DEPTHS, strict=True)
        )
      ]
    )
    skips = down[5:0:-1]  # of levels 5 to 1
    self.fuse = nnx.List([Fusion(channels, rngs=rngs) for channels in skips])
    self.decoder = nnx.List(
      [
        ResidualU(2 * channels, inside, out, depth, pooled=i > 0, rngs=rngs)
        for i, (channels, (inside, out), depth) in enumerate(
          zip(skips, decoder, _DEPTHS[4::-1], strict=True)
        )
      ]
    )
    decoded = [down[-1], *(out for _, out in decoder)]  # levels 6 to 1
    self.side = nnx.List([basic.Conv(c, 1, rngs=rngs) for c in decoded])
    self.masked = nnx.data(None)
    if size == "L":
      self.head = basic.Conv(6, 1, 1, rngs=rngs)
    else:
      self.masked = Masked(decoded, rngs=rngs)
      self.head = basic.Conv(32, 1, 1, rngs=rngs)
    self.out_norm = EvaluationNorm()

  def encode(self, image: jax.Array) -> tuple[tuple, jax.Array]:
    self.check_image(image)
    levels = [self.encoder[0](image)]
    for block in self.encoder[1:]:
      levels.append(block(ops.max_pool2(levels[-1])))
    *skips, top = levels
    return tuple(fuse.of_skip(skip) for fuse, skip in zip(self.fuse, skips[::-1], strict=True)), top

  def decode(self, skips: tuple, top: jax.Array) -> Logits:
    decoded = [top]  # levels 6 to 1
    for fuse, block, skip in zip(self.fuse, self.decoder, skips, strict=True):
      high = ops.upsample2(decoded[-1], align_corners=False)
      decoded.append(block(fuse(high, skip)))
    size = decoded[-1].shape[1:3]

    def full(x):
      return ops.resize(x, size, align_corners=False)

    side = [full(conv(x)) for conv, x in zip(self.side, decoded, strict=True)][::-1]
    fused = side if self.masked is None else self.masked(decoded, full)
    return Logits(self.out_norm(self.head(jnp.concatenate(fused, -1))), tuple(side))


class EvaluationNorm(nnx.Module):
  """BatchNorm of the logits, in evaluation only; the published network's `bn`.

  Training never runs it, so that its values stay at (1, 0, 0, 1) for ever: a factor of 0.999995.
  They are kept with the running statistics (saved, exported, converted), not with the parameters:
  weight decay would shrink the scale.
  """

  def __init__(self):
    self.scale, self.bias = nnx.BatchStat(jnp.ones(1)), nnx.BatchStat(jnp.zeros(1))
    self.mean, self.var = nnx.BatchStat(jnp.zeros(1)), nnx.BatchStat(jnp.ones(1))
    self.use_running_average = False

  def __call__(self, x: jax.Array) -> jax.Array:
    if not self.use_running_average:
      return x
    shift, bias = (v[...].reshape(1, 1, 1, 1) for v in (self.mean, self.bias))
    factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return ((wide - shift) * factor.reshape(1, 1, 1, 1) + bias).astype(x.dtype)


class Masked(nnx.Module):
  """The tail of ILNet-M and -S: maps of levels 6 to 4, weighted by a mask of levels 3 to 1."""

  def __init__(self, decoded: list[int], *, rngs: nnx.Rngs):
    counts = (1, 1, 2, 4, 8, 16)  # maps of levels 6 to 1
    self.maps = nnx.List(
      [basic.Conv(c, n, rngs=rngs) for c, n in zip(decoded, counts, strict=True)]
    )
    self.mask = basic.Conv(decoded[-1], 1, rngs=rngs)  # one for three levels
    self.merge = basic.Conv(3, 1, 1, rngs=rngs)

  def __call__(self, decoded: list[jax.Array], full) -> list[jax.Array]:
    """Maps of levels 1 to 6 at full size, from features of levels 6 to 1."""
    votes = [full(self.mask(x)) for x in decoded[3:]]
    mask = nnx.sigmoid(self.merge(jnp.concatenate(votes, -1)))
    maps = [full(conv(x)) for conv, x in zip(self.maps, decoded, strict=True)]
    return [*maps[:2:-1], *(x * mask for x in maps[2::-1])]


class Fusion(nnx.Module):
  """Weights the skip's channels and the deeper feature's positions, each by the other (IPOF).

  Args:
    channels: of both, C; the result has 2C.
  """

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    inside = channels // 2
    self.place1 = _unit(channels, inside, 1, rngs)  # conv_1 of the published code
    self.place2 = _unit(inside, 1, 1, rngs)
    self.content = Pointwise(channels, inside, rngs=rngs)  # conv_2
    self.reduce = basic.Conv(inside, inside // 4, 1, rngs=rngs)  # conv_up
    self.reduce_norm = attention.LayerNorm(inside // 4)
    self.expand = basic.Conv(inside // 4, channels, 1, rngs=rngs)
    self.expand_norm = attention.LayerNorm(channels)
    self.choice = Pointwise(channels, inside, rngs=rngs)  # conv_3
    self.position = Pointwise(channels, inside, rngs=rngs)  # conv_4
    self.mix = ChannelMix(inside, rngs=rngs)
    self.out = basic.ConvNormRelu(channels, 2 * channels, rngs=rngs)

  def of_skip(self, low: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The skip B×H×W×C, and what of the fusion depends on it alone."""
    return low, self.content(low), self.position(low)

  def __call__(self, high: jax.Array, skip: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    low, content, position = skip
    context = _weighted_mean(self.place2(self.place1(high)), content).astype(low.dtype)
    context = nnx.relu(self.reduce_norm(self.reduce(self.mix(context))))
    low = low * nnx.sigmoid(self.expand_norm(self.expand(context)))

    channels = self.mix(ops.spatial_mean(self.choice(high)))
    wide = channels.astype(jnp.promote_types(channels.dtype, jnp.float32))
    place = (nnx.softmax(wide, -1) * position.astype(wide.dtype)).sum(-1, keepdims=True)
    high = high * nnx.sigmoid(_normalise_map(place)).astype(high.dtype)
    return self.out(low + high)


def _weighted_mean(logits: jax.Array, x: jax.Array) -> jax.Array:
  """B×1×1×C float32: the mean over positions by the softmax of B×H×W×1 logits.

  By means and maxima over the map, which are the frame's where x is a window of it.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  logits, x = logits.astype(wide), x.astype(wide)
  weight = jnp.exp(logits - jax.lax.stop_gradient(ops.spatial_max(logits)))
  return ops.spatial_mean(weight * x) / ops.spatial_mean(weight)


def _normalise_map(x: jax.Array) -> jax.Array:
  """B×H×W×1, normalised over H and W; of the frame where x is a window of it."""
  offset = x - ops.spatial_mean(x)
  return offset * jax.lax.rsqrt(ops.spatial_mean(jnp.square(offset)) + 1e-5)


class ChannelMix(nnx.Module):
  """Adds to B×1×1×C the sigmoid of its channels, mixed among neighbours several times (DODA).

  One kernel along the channels serves every time; how often and how wide follow from C.
  """

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    width = int(abs((math.log2(channels) + 1) / 2))
    width += width % 2 == 0
    self.times = 1 + math.ceil(1 + (math.log2(channels) - 2) / 4)
    self.local = attention.ChannelConv(width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    for _ in range(self.times):
      y = self.local(y)
    return x + nnx.sigmoid(y)


class Pointwise(nnx.Module):
  """Two layers of conv1, BN, ReLU."""

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.layer1 = _unit(in_channels, out_channels, 1, rngs)
    self.layer2 = _unit(out_channels, out_channels, 1, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.layer2(self.layer1(x))


class ResidualU(nnx.Module):
  """A small U-Net of `depth` levels, plus the result of its first convolution (RSU).

  Args:
    in_channels, inside, out_channels: channels; `inside` those of the inner levels.
    depth: levels of the inner U-Net.
    pooled: whether the inner levels but the last halve the size, the last dilating by 2; otherwise
      level i dilates by 2^i at full size (RSU4F).
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
    self.enter = _unit(in_channels, out_channels, 3, rngs)
    self.down = nnx.List(
      [
        _unit(channels, inside, 3, rngs, dilation)
        for channels, dilation in zip(outside, dilations, strict=True)
      ]
    )
    self.up = nnx.List(
      [
        _unit(2 * inside, channels, 3, rngs, dilation)
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


def _unit(in_channels, out_channels, size, rngs, dilation=1) -> basic.ConvNormRelu:
  return basic.ConvNormRelu(
    in_channels, out_channels, size, dilation=dilation, bias=False, rngs=rngs
  )
