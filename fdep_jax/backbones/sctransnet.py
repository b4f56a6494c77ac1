"""SCTransNet: spatial-channel cross transformer network (11.20 M parameters, top 256 @ 1/16).

Source: YuChuang1205/PAL model/SCTransNet (as in xdFai/SCTransNet, without the final sigmoids).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import attention, basic, ops

_CHANNELS = (32, 64, 128, 256)  # of level i, at 1/2^i of the image
_ALL = sum(_CHANNELS)
_HIDDEN = tuple(int(2.66 * c) for c in _CHANNELS)
_LAYERS = 4
_DECODED = (32, 32, 64, 128)  # of level i in the decoder


class SCTransNet(Backbone):
  """A U-Net whose four skips are seen together, as channels of one map at 1/16, by a transformer.

  The transformer does not see the top feature, so `encode` runs all of it.

  Args:
    in_channels: 3 (PAL) or 1 (the authors' own).
  """

  stride = 16
  top_stride = 16
  top_channels = 256
  paper_name = "SCTransNet"

  def __init__(self, *, in_channels: int = 3, rngs: nnx.Rngs):
    self.in_channels = in_channels
    self.levels = nnx.List(
      [
        attention.LeakyBlock(a, b, rngs=rngs)
        for a, b in zip((in_channels, *_CHANNELS), (*_CHANNELS, 256), strict=True)
      ]
    )
    patches = [16 >> i for i in range(4)]
    self.embed = nnx.List(
      [attention.PatchEmbedding(c, p, rngs=rngs) for c, p in zip(_CHANNELS, patches, strict=True)]
    )
    self.layers = nnx.List([CrossLayer(rngs=rngs) for _ in range(_LAYERS)])
    self.norms = nnx.List([attention.LayerNorm(c) for c in _CHANNELS])
    self.reconstruct = nnx.List(
      [attention.Reconstruction(c, p, rngs=rngs) for c, p in zip(_CHANNELS, patches, strict=True)]
    )
    self.up = nnx.List(
      [UpBlock(c, d, rngs=rngs) for c, d in zip(_CHANNELS, _DECODED, strict=True)]
    )  # up[i]: to level i
    self.head = basic.Conv(32, 1, 1, rngs=rngs)
    # Heads of the top and of the decoder's levels 3, 2 and 1, and of these with the last.
    self.side_heads = nnx.List([basic.Conv(c, 1, 1, rngs=rngs) for c in (256, 128, 64, 32)])
    self.fused_head = basic.Conv(5, 1, 1, rngs=rngs)

  def encode(self, image: jax.Array) -> tuple[tuple, jax.Array]:
    self.check_image(image)
    features, x = [], image
    for i, block in enumerate(self.levels):
      x = block(x if i == 0 else ops.max_pool2(x))
      features.append(x)
    maps = [embed(x) for embed, x in zip(self.embed, features[:4], strict=True)]
    for layer in self.layers:
      maps = layer(maps)
    skips = []
    for i, (norm, reconstruct) in enumerate(zip(self.norms, self.reconstruct, strict=True)):
      # Twice: the published code adds the feature inside the transformer and again outside.
      skip = reconstruct(norm(maps[i])) + 2 * features[i]
      skips.append((skip, self.up[i].skip_gate(skip)))
    return tuple(skips), x

  def decode(self, skips: tuple, top: jax.Array) -> Logits:
    features = [top]
    for i in reversed(range(4)):
      features.append(self.up[i](*skips[i], features[-1]))
    size = skips[0][0].shape[1:3]
    sides = [
      ops.resize(head(x), size, align_corners=True)
      for head, x in zip(self.side_heads, features[:4], strict=True)
    ]
    final = self.head(features[4])
    fused = self.fused_head(jnp.concatenate([*reversed(sides), final], -1))
    return Logits(final, (*sides, fused))


class CrossLayer(nnx.Module):
  """One layer of the transformer on four maps of one size: channel attention, then feed-forward.

  What works on each level's channels alone runs on all levels side by side.
  """

  def __init__(self, *, rngs: nnx.Rngs):
    conv = {"bias": False, "rngs": rngs}
    self.norms = nnx.List([attention.LayerNorm(c) for c in _CHANNELS])
    self.norm_all = attention.LayerNorm(_ALL)
    self.query1 = nnx.List([basic.Conv(c, c, 1, **conv) for c in _CHANNELS])
    self.query3 = nnx.List([attention.GroupedConv(c, (3, 3), 2, rngs=rngs) for c in _CHANNELS])
    self.key1, self.value1 = (basic.Conv(_ALL, _ALL, 1, **conv) for _ in range(2))
    self.key3, self.value3 = (attention.GroupedConv(_ALL, (3, 3), rngs=rngs) for _ in range(2))
    self.out = nnx.List([basic.Conv(c, c, 1, **conv) for c in _CHANNELS])
    self.forward_norms = nnx.List([attention.LayerNorm(c) for c in _CHANNELS])
    pairs = list(zip(_CHANNELS, _HIDDEN, strict=True))
    self.expand = nnx.List([basic.Conv(c, 2 * h, 1, **conv) for c, h in pairs])
    self.depth3 = nnx.List([attention.GroupedConv(h, (3, 3), rngs=rngs) for h in _HIDDEN])
    self.depth5 = nnx.List([attention.GroupedConv(h, (5, 5), rngs=rngs) for h in _HIDDEN])
    self.reduce = nnx.List([basic.Conv(2 * h, c, 1, **conv) for c, h in pairs])
    self.gate = nnx.List([attention.ChannelConv(3, rngs=rngs) for _ in _CHANNELS])

  def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
    everything = self.norm_all(_join(maps))
    query = _join([q(n(x)) for q, n, x in zip(self.query1, self.norms, maps, strict=True)])
    query = ops.grouped_conv(query, _kernels(self.query3))
    key = self.key3(self.key1(everything))
    value = self.value3(self.value1(everything))
    attended = ops.channel_attention(query, key, value, levels=_CHANNELS)
    parts = _split(attended, _CHANNELS)
    maps = [x + out(y) for x, out, y in zip(maps, self.out, parts, strict=True)]
    return [x + y for x, y in zip(maps, self._feed_forward(maps), strict=True)]

  def _feed_forward(self, maps: list[jax.Array]) -> list[jax.Array]:
    hidden = [e(n(x)) for e, n, x in zip(self.expand, self.forward_norms, maps, strict=True)]
    halves = [_split(x, (h, h)) for x, h in zip(hidden, _HIDDEN, strict=True)]
    small, large = (
      nnx.relu(ops.grouped_conv(_join(half), _kernels(convs)))
      for half, convs in zip(zip(*halves, strict=True), (self.depth3, self.depth5), strict=True)
    )
    results = []
    parts = zip(_split(small, _HIDDEN), _split(large, _HIDDEN), strict=True)
    for i, (a, b) in enumerate(parts):
      y = self.reduce[i](_join([a, b]))
      results.append(y * nnx.sigmoid(self.gate[i](ops.spatial_mean(y))))
    return results


class UpBlock(nnx.Module):
  """Doubles the deeper feature, gates the skip's channels by both, two convolutions.

  Args:
    channels: C of the skip and of the deeper feature.
    out_channels: of the result.
  """

  def __init__(self, channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.from_skip, self.from_deep = (basic.Conv(channels, channels, 1, rngs=rngs) for _ in "ab")
    self.conv1 = basic.ConvNormRelu(2 * channels, out_channels, rngs=rngs)
    self.conv2 = basic.ConvNormRelu(out_channels, out_channels, rngs=rngs)

  def skip_gate(self, skip: jax.Array) -> jax.Array:
    """B×1×1×C: the skip's part of the gate, which does not depend on the top feature."""
    return self.from_skip(ops.spatial_mean(skip))

  def __call__(self, skip: jax.Array, gate: jax.Array, deep: jax.Array) -> jax.Array:
    # The mean of a doubled feature is that of the feature.
    gate = nnx.sigmoid((gate + self.from_deep(ops.spatial_mean(deep))) / 2)
    doubled = ops.upsample_nearest2(deep)
    return self.conv2(self.conv1(_join([nnx.relu(skip * gate), doubled])))


def _join(parts) -> jax.Array:
  return jnp.concatenate(list(parts), -1)


def _split(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
  ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
  return [
    jax.lax.slice_in_dim(x, end - size, end, 1, 3) for size, end in zip(sizes, ends, strict=True)
  ]


def _kernels(convs) -> jax.Array:
  """The kernels of all levels side by side."""
  return _join(conv.kernel[...] for conv in convs)
