"""MSDA-Net: multi-scale direction-aware network (4.79 M parameters, top feature 64 @ 1/16).

Source: YuChuang1205/PAL model/MSDA (as in YuChuang1205/MSDA-Net, without the final sigmoid).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks, ops

_CHANNELS = (16, 32, 64, 64, 64)  # levels 1 to 5
_SUMMARY = 16  # channels that each of levels 1 to 4 adds to the top feature


class MSDANet(Backbone):
  """Five encoder levels of multi-scale direction blocks; Haar details injected at level 2."""

  stride = 16
  top_stride = 16
  top_channels = 64
  paper_name = "MSDA-Net"

  def __init__(self, *, rngs: nnx.Rngs):
    kaiming = {"init": "kaiming", "rngs": rngs}
    self.stem = blocks.Stem(3, 16, **kaiming)
    details = 9  # three Haar bands of three image channels
    self.enter = nnx.List(
      [
        blocks.ResidualBlock(16, rngs=rngs),
        blocks.DownBlock(16, 32 - details, rngs=rngs),
        blocks.DownBlock(32, 64, rngs=rngs),
        blocks.DownBlock(64, 64, rngs=rngs),
        blocks.DownBlock(64, 64, rngs=rngs),
      ]
    )
    self.direction = nnx.List(
      [nnx.List([DirectionBlock(c, rngs=rngs) for _ in range(2)]) for c in _CHANNELS]
    )
    self.summary = nnx.List([basic.Conv(c, _SUMMARY, 1, **kaiming) for c in _CHANNELS[:4]])
    self.aggregate1 = basic.Conv(64 + 4 * _SUMMARY, 128, 1, **kaiming)
    self.aggregate2 = basic.Conv(128, 64, 1, **kaiming)
    self.context = nnx.List([ContextBlock(c, rngs=rngs) for c in _CHANNELS])
    self.fuse = nnx.List(
      [Fusion(high, low, rngs=rngs) for high, low in ((32, 16), (64, 32), (64, 64), (64, 64))]
    )
    self.head = blocks.Head(16, **kaiming)

  def encode(self, image: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    self.check_image(image)
    bands = ops.haar(image, stride=2)
    details = jnp.concatenate([bands[band] for band in ("lh", "hl", "hh")], -1)

    x = self.stem(image)
    levels = []
    for i, (enter, level) in enumerate(zip(self.enter, self.direction, strict=True)):
      x = enter(x)
      if i == 1:
        x = jnp.concatenate([details, x], -1)
      for block in level:
        x = block(x)
      levels.append(x)

    summaries = []
    for i, (level, summary) in enumerate(zip(levels[:4], self.summary, strict=True)):
      for _ in range(4 - i):
        level = ops.max_pool2(level)
      summaries.append(nnx.relu(summary(level)))
    top = jnp.concatenate([x, *reversed(summaries)], -1)
    top = nnx.relu(self.aggregate2(nnx.relu(self.aggregate1(top))))
    skips = tuple(self.context[i](levels[i]) for i in range(4))
    return skips, top

  def decode(self, skips: tuple[jax.Array, ...], top: jax.Array) -> Logits:
    x = self.context[4](top)
    for i in reversed(range(4)):
      x = self.fuse[i](x, skips[i])
    return Logits(self.head(x))


class DirectionBlock(nnx.Module):
  """Four receptive fields, then attention over Haar bands and channels; residual."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    fields = ([(1, 1)], [(1, 1), (3, 1)], [(3, 1), (3, 3)], [(5, 1), (3, 5)])
    self.branches = _branches(channels, fields, rngs)
    self.merge = _conv(4 * channels, channels, 3, 1, rngs)
    self.frequency = FrequencyAttention(channels, rngs=rngs)
    self.squeeze = blocks.SqueezeExcitation(channels, rngs=rngs)
    self.out = _conv(channels, channels, 3, 1, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.squeeze(self.frequency(self.merge(_parallel(self.branches, x))))
    return nnx.relu(x + self.out(y))


class FrequencyAttention(nnx.Module):
  """Weights each position by spatial attention computed on every Haar band; residual."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.gate = nnx.Dict(
      {band: basic.Conv(2, 1, 7, init="kaiming", rngs=rngs) for band in ops.WAVELETS}
    )
    self.out = basic.ConvNorm(channels, channels, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    bands = ops.haar(x, stride=1)
    gates = [nnx.sigmoid(self.gate[b](ops.max_and_mean(bands[b]))) for b in ops.WAVELETS]
    # The sum of four products x·gate is one product with the sum of the gates.
    return nnx.relu(x + self.out(x * sum(gates)))


class ContextBlock(nnx.Module):
  """Three receptive fields, concatenated and merged (the decoder's local-contrast block)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    fields = ([(1, 1)], [(3, 1), (3, 3)], [(5, 1), (3, 5)])
    self.branches = _branches(channels, fields, rngs)
    self.merge = _conv(3 * channels, channels, 3, 1, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.merge(_parallel(self.branches, x))


class Fusion(nnx.Module):
  """Doubles the deeper feature's size and adds a residual computed from both to the skip."""

  def __init__(self, high_channels: int, low_channels: int, *, rngs: nnx.Rngs):
    options = {"init": "kaiming", "rngs": rngs}
    self.concat1 = basic.ConvNormRelu(high_channels + low_channels, high_channels, 1, **options)
    self.concat2 = basic.ConvNormRelu(high_channels, high_channels, 3, **options)
    self.out = basic.ConvNormRelu(high_channels, low_channels, 1, **options)

  def __call__(self, high: jax.Array, low: jax.Array) -> jax.Array:
    high = ops.upsample2(high, align_corners=True)
    joint = self.concat2(self.concat1(jnp.concatenate([high, low], -1)))
    return low + self.out(high + joint)


def _conv(in_channels, out_channels, size, dilation, rngs) -> basic.ConvNormRelu:
  return basic.ConvNormRelu(
    in_channels, out_channels, size, dilation=dilation, bias=False, rngs=rngs
  )


def _branches(channels: int, fields, rngs) -> nnx.List:
  """Makes chains of convolutions, each given by its layers' (kernel size, dilation)."""
  return nnx.List(
    [
      nnx.List([_conv(channels, channels, size, dilation, rngs) for size, dilation in layers])
      for layers in fields
    ]
  )


def _parallel(branches, x: jax.Array) -> jax.Array:
  """Applies every chain of layers to x and concatenates the results over channels."""
  outputs = []
  for branch in branches:
    y = x
    for layer in branch:
      y = layer(y)
    outputs.append(y)
  return jnp.concatenate(outputs, -1)
