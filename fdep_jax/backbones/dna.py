"""DNA-Net: dense nested attention network (4.70 M parameters, top feature 256 @ 1/16).

Source: YuChuang1205/PAL model/DNA.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic, blocks, ops

_CHANNELS = (16, 32, 64, 128, 256)  # of row i, at 1/2^i of the image
_DEEPEST = 4


class DNANet(Backbone):
  """Triangle of nodes x(i, j), row i and column j; column 0 is the encoder, x(4, 0) the top.

  x(i, j) takes the earlier nodes of its row, x(i+1, j−1) doubled and x(i−1, j) halved. So it
  depends on the top only if i + j = 4; `encode` computes all earlier diagonals.

  Args:
    in_channels: 3 (PAL) or 1 (BasicIRSTD, LESPS).
  """

  stride = 16
  top_stride = 16
  top_channels = 256
  paper_name = "DNA-Net"

  def __init__(self, *, in_channels: int = 3, rngs: nnx.Rngs):
    self.in_channels = in_channels
    rows = range(_DEEPEST + 1)
    self.nodes = nnx.List(
      [nnx.List([_node(i, j, in_channels, rngs) for j in rows[: len(rows) - i]]) for i in rows]
    )
    # From rows 4 to 1 to the last node; `squeeze[i]` belongs to row i + 1.
    self.squeeze = nnx.List([basic.Conv(c, 16, 1, rngs=rngs) for c in _CHANNELS[1:]])
    self.merge = AttentionBlock(16 * 5, 16, rngs=rngs)
    self.heads = nnx.List([basic.Conv(16, 1, 1, rngs=rngs) for _ in range(4)])

  def encode(self, image: jax.Array) -> tuple[tuple, jax.Array]:
    self.check_image(image)
    rows, halved = (), ()
    x = self._run(0, 0, image)
    for diagonal in range(_DEEPEST):
      rows = self._add_diagonal(rows, halved, x)
      halved = tuple(_halve(row[-1]) for row in rows[:-1])
      x = self._run(diagonal + 1, 0, ops.max_pool2(x))
    side = tuple(head(x) for head, x in zip(self.heads, rows[0][1:], strict=False))
    return (rows, halved, side), x

  def decode(self, skips: tuple, top: jax.Array) -> Logits:
    rows, halved, side = skips
    rows = self._add_diagonal(rows, halved, top)
    height, width = rows[0][-1].shape[1:3]
    gathered = [
      ops.resize(self.squeeze[i - 1](rows[i][-1]), (height, width), align_corners=True)
      for i in range(_DEEPEST, 0, -1)
    ]
    x = self.merge(jnp.concatenate([*gathered, rows[0][-1]], -1))
    return Logits(self.heads[3](x), side)

  def _add_diagonal(self, rows: tuple, halved: tuple, deepest: jax.Array) -> tuple:
    """Extends the rows of nodes from i + j < d to i + j ≤ d.

    `halved` are the last nodes of rows 0 to d − 2 at the next row's size, `deepest` is x(d, 0).
    """
    rows = [*rows, (deepest,)]
    for i in reversed(range(len(rows) - 1)):
      inputs = [*rows[i], ops.upsample2(rows[i + 1][-1], align_corners=True)]
      if i > 0:
        inputs.append(halved[i - 1])
      rows[i] = (*rows[i], self._run(i, len(rows[i]), jnp.concatenate(inputs, -1)))
    return tuple(rows)

  def _run(self, i: int, j: int, x: jax.Array) -> jax.Array:
    for block in self.nodes[i][j]:
      x = block(x)
    return x


class AttentionBlock(nnx.Module):
  """Residual block with a channel gate, then a spatial gate, before the sum (Res-CBAM)."""

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.conv1 = basic.ConvNormRelu(in_channels, out_channels, rngs=rngs)
    self.conv2 = basic.ConvNorm(out_channels, out_channels, rngs=rngs)
    self.channel = blocks.ChannelAttention(out_channels, 16, rngs=rngs)
    self.spatial = basic.Conv(2, 1, 7, bias=False, rngs=rngs)
    self.shortcut = nnx.data(None)
    if in_channels != out_channels:
      self.shortcut = basic.ConvNorm(in_channels, out_channels, 1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.conv2(self.conv1(x))
    y = y * self.channel(y)
    y = y * nnx.sigmoid(self.spatial(ops.mean_and_max(y)))
    return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def _halve(x: jax.Array) -> jax.Array:
  return ops.resize(x, (x.shape[1] // 2, x.shape[2] // 2), align_corners=True)


def _node(i: int, j: int, image_channels: int, rngs: nnx.Rngs) -> nnx.List:
  """Makes a node: one block in row 0, two in the others."""
  if j == 0:
    in_channels = _CHANNELS[i - 1] if i else image_channels
  else:
    in_channels = _CHANNELS[i] * j + _CHANNELS[i + 1] + (_CHANNELS[i - 1] if i else 0)
  stages = [AttentionBlock(in_channels, _CHANNELS[i], rngs=rngs)]
  if i > 0:
    stages.append(AttentionBlock(_CHANNELS[i], _CHANNELS[i], rngs=rngs))
  return nnx.List(stages)
