"""Blocks that several networks share."""

from typing import Literal

import jax
from flax import nnx

from fdep_jax.layers import basic, ops


class ResidualBlock(nnx.Module):
  """conv3, BN, ReLU, conv3, BN, + input, ReLU; Kaiming initialisation (MLCL, ALCL, GGL, MSDA)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv1 = basic.ConvNormRelu(channels, channels, init="kaiming", rngs=rngs)
    self.conv2 = basic.ConvNorm(channels, channels, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(x + self.conv2(self.conv1(x)))


class DownBlock(nnx.Module):
  """Residual block that halves the size (MLCL, ALCL, GGL, MSDA).

  Main path: conv3 at full size, BN, ReLU, 2×2 max-pool, conv3, BN. Shortcut: conv3 of stride 2,
  BN, ReLU. Sum, ReLU. Kaiming initialisation.
  """

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.conv1 = basic.ConvNormRelu(in_channels, out_channels, init="kaiming", rngs=rngs)
    self.conv2 = basic.ConvNorm(out_channels, out_channels, init="kaiming", rngs=rngs)
    self.shortcut = basic.ConvNormRelu(
      in_channels, out_channels, stride=2, init="kaiming", rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    main = self.conv2(ops.max_pool2(self.conv1(x)))
    return nnx.relu(main + self.shortcut(x))


class Stem(nnx.Module):
  """Two conv3-BN-ReLU layers to 16 channels at full size (MLCL, ALCL, GGL, MSDA)."""

  def __init__(self, in_channels: int, channels: int, *, init: basic.Init, rngs: nnx.Rngs):
    self.conv1 = basic.ConvNormRelu(in_channels, channels, init=init, rngs=rngs)
    self.conv2 = basic.ConvNormRelu(channels, channels, init=init, rngs=rngs)

  def __call__(self, image: jax.Array) -> jax.Array:
    return self.conv2(self.conv1(image))


class SqueezeExcitation(nnx.Module):
  """Channel gate: global mean, C → C/4, ReLU, → C, sigmoid; no biases."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.reduce = basic.Conv(channels, channels // 4, 1, bias=False, rngs=rngs)
    self.expand = basic.Conv(channels // 4, channels, 1, bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate = self.expand(nnx.relu(self.reduce(ops.spatial_mean(x))))
    return x * nnx.sigmoid(gate)


class Head(nnx.Module):
  """conv1 C→C, ReLU, conv1 C→1: the logits at full size (ALCL, GGL, MSDA with Kaiming; MLCL)."""

  def __init__(self, channels: int, *, init: basic.Init, rngs: nnx.Rngs):
    self.conv1 = basic.Conv(channels, channels, 1, init=init, rngs=rngs)
    self.conv2 = basic.Conv(channels, 1, 1, init=init, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv2(nnx.relu(self.conv1(x)))


class LocalContrast(nnx.Module):
  """conv1, ReLU, conv3, ReLU, C→C; Kaiming initialisation (ALCL, GGL)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv1 = basic.Conv(channels, channels, 1, init="kaiming", rngs=rngs)
    self.conv2 = basic.Conv(channels, channels, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(self.conv2(nnx.relu(self.conv1(x))))


class UpConvNormRelu(basic.ConvNormRelu):
  """Bilinear ×2 with aligned corners, conv1, BN, ReLU; Kaiming initialisation (ALCL, GGL).

  The convolution runs before the interpolation, at a quarter of the work: the two commute, because
  the kernel is 1×1 and the interpolation's weights sum to 1. The BatchNorm runs after it, because
  its statistics are those of the doubled feature.
  """

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    super().__init__(in_channels, out_channels, 1, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(self.norm(ops.upsample2(self.conv(x), align_corners=True)))


# Weight of the old value in most BatchNorms of ACM and ALCNet. It is 0.9 in their MXNet original;
# the published port passes the same 0.9 to PyTorch, where it is the weight of the new value.
_PORTED_MOMENTUM = 0.1

FusionNorm = Literal["group", "batch"]


class BasicBlock(nnx.Module):
  """ResNet's basic block: conv3, BN, ReLU, conv3, BN, + shortcut, ReLU (ACM, ALCNet)."""

  def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, rngs: nnx.Rngs):
    options = {"bias": False, "rngs": rngs}
    self.conv1 = basic.ConvNormRelu(in_channels, out_channels, stride=stride, **options)
    self.conv2 = basic.ConvNorm(out_channels, out_channels, **options)
    self.shortcut = nnx.data(None)
    if stride != 1:
      self.shortcut = basic.ConvNorm(
        in_channels, out_channels, 1, stride=stride, momentum=_PORTED_MOMENTUM, **options
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    shortcut = x if self.shortcut is None else self.shortcut(x)
    return nnx.relu(shortcut + self.conv2(self.conv1(x)))


class ResNetEncoder(nnx.Module):
  """Stem to 1/4 of the size and three stages of basic blocks (ACM, ALCNet).

  Image B×H×W×in_channels -> features B×H/4×W/4×16, B×H/8×W/8×32 and B×H/16×W/16×64. The image need
  not be normalised, because a BatchNorm comes first.
  """

  def __init__(self, in_channels: int, blocks: int, *, rngs: nnx.Rngs):
    options = {"momentum": _PORTED_MOMENTUM, "bias": False, "rngs": rngs}
    self.norm = basic.BatchNorm(in_channels, momentum=_PORTED_MOMENTUM)
    self.stem = nnx.List(
      [
        basic.ConvNormRelu(in_channels, 8, stride=2, **options),
        basic.ConvNormRelu(8, 8, **options),
        basic.ConvNormRelu(8, 16, **options),
      ]
    )
    self.stages = nnx.List(
      [
        nnx.List(
          [BasicBlock(i, o, stride=o // i, rngs=rngs)]
          + [BasicBlock(o, o, rngs=rngs) for _ in range(blocks - 1)]
        )
        for i, o in ((16, 16), (16, 32), (32, 64))
      ]
    )

  def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = self.norm(image)
    for layer in self.stem:
      x = layer(x)
    x = ops.max_pool3_stride2(x)
    features = []
    for stage in self.stages:
      for block in stage:
        x = block(x)
      features.append(x)
    return tuple(features)


class BottleneckGate(nnx.Module):
  """C → C/4 → C by 1×1 convolutions with norms; sigmoid."""

  def __init__(self, channels: int, norm: FusionNorm, *, rngs: nnx.Rngs):
    self.conv1 = basic.Conv(channels, channels // 4, 1, rngs=rngs)
    self.norm1 = fusion_norm(norm, channels // 4, _PORTED_MOMENTUM)
    self.conv2 = basic.Conv(channels // 4, channels, 1, rngs=rngs)
    self.norm2 = fusion_norm(norm, channels, _PORTED_MOMENTUM)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm1(self.conv1(x)))
    return nnx.sigmoid(self.norm2(self.conv2(x)))


class AsymmetricFusion(nnx.Module):
  """Asymmetric contextual modulation of a deep and a shallow feature of one size (ACM, ALCNet).

  The deep feature's global mean gates the channels of the shallow feature. The shallow feature
  gates the pixels of the deep one; this gate, `bottomup(low)`, does not depend on the deep feature,
  so `encode` computes it.

  Args:
    channels: C of both features and of the result.
    norm: "group" (PAL, one group) or "batch" (BasicIRSTD, LESPS).
  """

  def __init__(self, channels: int, norm: FusionNorm, *, rngs: nnx.Rngs):
    self.topdown = BottleneckGate(channels, norm, rngs=rngs)
    self.bottomup = BottleneckGate(channels, norm, rngs=rngs)
    self.post = basic.Conv(channels, channels, rngs=rngs)
    self.post_norm = fusion_norm(norm, channels, _PORTED_MOMENTUM)

  def __call__(self, high: jax.Array, low: jax.Array, high_gate: jax.Array) -> jax.Array:
    low_gate = self.topdown(ops.spatial_mean(high))  # B×1×1×C
    fused = 2 * (low * low_gate + high * high_gate)
    return nnx.relu(self.post_norm(self.post(fused)))


def fusion_norm(
  norm: FusionNorm, channels: int, momentum: float = 0.9
) -> basic.GroupNorm | basic.BatchNorm:
  """Makes the norm of a fusion block; raises ValueError if it is neither "group" nor "batch"."""
  if norm not in ("group", "batch"):
    raise ValueError(f'fusion_norm is {norm!r}; it must be "group" or "batch".')
  if norm == "group":
    return basic.GroupNorm(channels)
  return basic.BatchNorm(channels, momentum=momentum)


class DropoutHead(nnx.Module):
  """conv3 C→C/4, BN, ReLU, dropout 0.1, conv1 →1 (ACM, ALCNet)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv1 = basic.ConvNormRelu(
      channels, channels // 4, bias=False, momentum=_PORTED_MOMENTUM, rngs=rngs
    )
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.conv2 = basic.Conv(channels // 4, 1, 1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv2(self.dropout(self.conv1(x)))


class ChannelAttention(nnx.Module):
  """Channel gate B×1×1×C in (0, 1) from the mean and the maximum over space (DNA-Net, GGL-Net).

  Both pass the same layers, C → C/reduction, ReLU, → C, without biases. Their sum is the sigmoid's
  input.
  """

  def __init__(self, channels: int, reduction: int, *, rngs: nnx.Rngs):
    self.reduce = basic.Conv(channels, channels // reduction, 1, bias=False, rngs=rngs)
    self.expand = basic.Conv(channels // reduction, channels, 1, bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    mean, maximum = ops.spatial_mean(x), ops.spatial_max(x)
    return nnx.sigmoid(
      self.expand(nnx.relu(self.reduce(mean))) + self.expand(nnx.relu(self.reduce(maximum)))
    )
