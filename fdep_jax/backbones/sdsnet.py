"""SDSNet: shallow-deep synergism (2.50 M parameters executed, top feature 128 @ 1/8).

Source: YuChuang1205/PAL model/SDSNet; with 1 input channel it is PhysiLearn/SDS-Net's.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import attention, basic, blocks, ops

_CHANNELS = (32, 64, 128)  # of levels 1 to 3, at 1, 1/2, 1/4
_PATCHES = (16, 8, 4)  # of their tokens, which all lie at 1/16
_TOP, _TOP_PATCH = 128, 4  # of the top feature, at 1/8, whose tokens lie at 1/32
_LAYERS = 4
_TAPS = (7, 11, 21)  # lengths of the one-dimensional convolutions


class SDSNet(Backbone):
  """A U-Net whose skips and top feature are enriched by attention over channels, on patches.

  Args:
    in_channels: 3 (PAL) or 1 (the authors' own).
  """

  stride = 32
  top_stride = 8
  top_channels = _TOP
  paper_name = "SDSNet"
  whole_frame = (
    "convolutions of its patches reach over more than a thousand pixels, and its attention weights "
    "channels by products over the whole frame"
  )

  def __init__(self, *, in_channels: int = 3, rngs: nnx.Rngs):
    self.in_channels = in_channels
    down = (in_channels, *_CHANNELS)
    self.encoder = nnx.List(
      [attention.LeakyBlock(i, o, rngs=rngs) for i, o in zip(down, (*_CHANNELS, _TOP), strict=True)]
    )
    self.shallow = Shallow(rngs=rngs)
    self.deep = Deep(rngs=rngs)
    # Levels 3 to 1 of the decoder.
    self.fuse = nnx.List(
      [Fusion(c, taps, rngs=rngs) for c, taps in zip(_CHANNELS[::-1], (5, 3, 3), strict=True)]
    )
    decoded = (64, 32, 32)
    self.decoder = nnx.List(
      [DoubleConv(2 * c, o, rngs=rngs) for c, o in zip(_CHANNELS[::-1], decoded, strict=True)]
    )
    heads = (_TOP, *decoded)
    self.heads = nnx.List([basic.Conv(c, 1, 1, rngs=rngs) for c in heads])
    self.joint = basic.Conv(4, 1, 1, rngs=rngs)

  def encode(self, image: jax.Array) -> tuple[tuple, jax.Array]:
    self.check_image(image)
    levels = [self.encoder[0](image)]
    for block in self.encoder[1:]:
      levels.append(block(ops.max_pool2(levels[-1])))
    *skips, deepest = levels
    skips = self.shallow(skips)[::-1]  # levels 3 to 1
    skips = tuple(fuse.of_skip(skip) for fuse, skip in zip(self.fuse, skips, strict=True))
    return skips, deepest + self.deep(deepest)

  def decode(self, skips: tuple, top: jax.Array) -> Logits:
    features = [top]
    for fuse, block, skip in zip(self.fuse, self.decoder, skips, strict=True):
      high = ops.upsample2(features[-1], align_corners=True)
      features.append(block(fuse(high, skip)))
    size = features[-1].shape[1:3]
    third, second, first, final = (
      ops.resize(head(x), size, align_corners=True)
      for head, x in zip(self.heads, features, strict=True)
    )
    joint = self.joint(jnp.concatenate([first, second, third, final], -1))
    return Logits(final, (third, second, first, joint))

  @staticmethod
  def supervise(
    logits: Logits, image: jax.Array, criterion: Callable[[jax.Array], jax.Array]
  ) -> jax.Array:
    """The mean over the five heads, where the other networks' losses are summed."""
    return sum(map(criterion, logits.heads)) / len(logits.heads)


class DoubleConv(nnx.Module):
  """Two layers of conv3, BN, ReLU."""

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.layer1 = basic.ConvNormRelu(in_channels, out_channels, rngs=rngs)
    self.layer2 = basic.ConvNormRelu(out_channels, out_channels, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.layer2(self.layer1(x))


class Shallow(nnx.Module):
  """Levels 1 to 3, each with what attention to all three adds: 2x + the reconstructed tokens."""

  def __init__(self, *, rngs: nnx.Rngs):
    levels = tuple(zip(_CHANNELS, _PATCHES, strict=True))
    self.embed = nnx.List([attention.PatchEmbedding(c, patch, rngs=rngs) for c, patch in levels])
    self.layers = nnx.List([ShallowLayer(rngs=rngs) for _ in range(_LAYERS)])
    self.norms = nnx.List([attention.LayerNorm(c) for c in _CHANNELS])
    self.restore = nnx.List([attention.Reconstruction(c, patch, rngs=rngs) for c, patch in levels])

  def __call__(self, levels: list[jax.Array]) -> tuple[jax.Array, ...]:
    tokens = [embed(x) for embed, x in zip(self.embed, levels, strict=True)]
    for layer in self.layers:
      tokens = layer(tokens)
    return tuple(
      2 * x + restore(norm(t))
      for x, t, norm, restore in zip(levels, tokens, self.norms, self.restore, strict=True)
    )


class Deep(nnx.Module):
  """The same for the deepest feature alone, without its own addition of x."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.embed = attention.PatchEmbedding(_TOP, _TOP_PATCH, rngs=rngs)
    self.layers = nnx.List([DeepLayer(rngs=rngs) for _ in range(_LAYERS)])
    self.norm = attention.LayerNorm(_TOP)
    self.restore = attention.Reconstruction(_TOP, _TOP_PATCH, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    tokens = self.embed(x)
    for layer in self.layers:
      tokens = layer(tokens)
    return self.restore(self.norm(tokens))


class ShallowLayer(nnx.Module):
  """Every level's channels attend to those of all levels; then a gate of channels and places."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.queries = nnx.List([MultiScale(c, rngs=rngs) for c in _CHANNELS])
    self.keys = MultiScale(sum(_CHANNELS), rngs=rngs)
    self.values = MultiScale(sum(_CHANNELS), rngs=rngs)
    self.project = nnx.List([basic.Conv(c, c, 1, rngs=rngs) for c in _CHANNELS])
    self.norms = nnx.List([attention.LayerNorm(c) for c in _CHANNELS])
    self.gates = nnx.List([Gate(c, rngs=rngs) for c in _CHANNELS])

  def __call__(self, tokens: list[jax.Array]) -> list[jax.Array]:
    joint = jnp.concatenate(tokens, -1)
    keys, values = self.keys(joint), self.values(joint)
    queries = [query(x) for query, x in zip(self.queries, tokens, strict=True)]
    attended = ops.channel_attention(jnp.concatenate(queries, -1), keys, values, levels=_CHANNELS)
    ends = (0, *itertools.accumulate(_CHANNELS))
    result = []
    for i, x in enumerate(tokens):
      part = jax.lax.slice_in_dim(attended, ends[i], ends[i + 1], 1, 3)
      x = x + self.project[i](part)
      result.append(x + self.gates[i](self.norms[i](x)))
    return result


class DeepLayer(nnx.Module):
  """The same with the channels of one feature."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.query, self.keys, self.values = (MultiScale(_TOP, rngs=rngs) for _ in range(3))
    self.project = basic.Conv(_TOP, _TOP, 1, rngs=rngs)
    self.norm = attention.LayerNorm(_TOP)
    self.gate = Gate(_TOP, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    attended = ops.channel_attention(self.query(x), self.keys(x), self.values(x), levels=(_TOP,))
    x = x + self.project(attended)
    return x + self.gate(self.norm(x))


class MultiScale(nnx.Module):
  """LayerNorm, then the sum of depthwise convolutions of 7, 11 and 21 along rows and columns.

  They are linear, so those of one direction are one convolution with the sum of their kernels.
  """

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.norm = attention.LayerNorm(channels)
    options = {"bias": True, "rngs": rngs}
    self.horizontal, self.vertical = (
      nnx.List([attention.GroupedConv(channels, size, **options) for size in sizes])
      for sizes in ([(1, taps) for taps in _TAPS], [(taps, 1) for taps in _TAPS])
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.norm(x)
    total = 0
    for axis, layers in ((2, self.horizontal), (1, self.vertical)):
      longest = max(_TAPS)
      kernels = [layer.kernel[...].reshape(-1, x.shape[-1]) for layer in layers]
      pads = [(longest - len(kernel)) // 2 for kernel in kernels]
      kernel = sum(jnp.pad(k, ((pad, pad), (0, 0))) for k, pad in zip(kernels, pads, strict=True))
      bias = sum(layer.bias[...] for layer in layers).reshape(1, 1, 1, -1)
      total = total + convolve_axis(x, kernel, axis) + bias
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_axis(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
  """Depthwise convolution of B×H×W×C along an axis, zero padding; `kernel` is k×C, k odd.

  A sum of shifted products: as a grouped convolution it is 10 to 80 times slower on a CPU.
  """
  return sum(
    shifted * kernel[tap].reshape(1, 1, 1, -1) for tap, shifted in _shifts(x, len(kernel), axis)
  )


def _shifts(x: jax.Array, taps: int, axis: int):
  """(tap, x moved so that it is the tap's factor), of the taps that reach into the map."""
  size, half = x.shape[axis], taps // 2
  pads = [(0, 0)] * 4
  pads[axis] = (half, half)
  padded = jnp.pad(x, pads)
  for tap in range(taps):
    if not isinstance(size, int) or abs(tap - half) < size:
      yield tap, jax.lax.slice_in_dim(padded, tap, tap + size, 1, axis)


def _convolve_forward(x, kernel, axis):
  return convolve_axis(x, kernel, axis), (x, kernel)


def _convolve_backward(axis, residuals, cotangent):
  x, kernel = residuals
  rows = [jnp.zeros_like(kernel[0])] * len(kernel)
  for tap, shifted in _shifts(x, len(kernel), axis):
    rows[tap] = (shifted * cotangent).sum((0, 1, 2))
  return convolve_axis(cotangent, kernel[::-1], axis), jnp.stack(rows)


convolve_axis.defvjp(_convolve_forward, _convolve_backward)


class Gate(nnx.Module):
  """A channel gate, then a spatial gate (CBAM)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.channel = blocks.ChannelAttention(channels, 16, rngs=rngs)
    self.spatial = basic.Conv(2, 1, 7, bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x * self.channel(x)
    return x * nnx.sigmoid(self.spatial(ops.max_and_mean(x)))


class Fusion(nnx.Module):
  """Gates the skip's channels by both features' means, and puts it before the deeper one (ADSF)."""

  def __init__(self, channels: int, taps: int, *, rngs: nnx.Rngs):
    self.local = attention.ChannelConv(taps, rngs=rngs)  # serves twice
    self.dense = basic.Conv(channels, channels, 1, rngs=rngs)
    self.share = nnx.Param(jnp.full(1, -0.8))

  def of_skip(self, skip: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The skip B×H×W×C, and what of the gate depends on it alone."""
    low = self.dense(ops.spatial_mean(skip))
    return skip, low, low.sum(-1, keepdims=True)

  def __call__(self, high: jax.Array, skip: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    skip, low, low_sum = skip
    deep = self.local(ops.spatial_mean(high))
    # The row and column sums of the outer product of the two.
    first = nnx.sigmoid(low * deep.sum(-1, keepdims=True))
    second = nnx.sigmoid(deep * low_sum)
    share = nnx.sigmoid(self.share[...]).reshape(1, 1, 1, 1)
    mixed = share * first + (1 - share) * second
    gate = nnx.sigmoid(self.local(mixed))
    return jnp.concatenate([skip * gate, high], -1)
