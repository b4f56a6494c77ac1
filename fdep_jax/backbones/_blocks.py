"""Layers that several backbones share: convolutions, norms and blocks, with PyTorch defaults."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import _ops, _window

Init = Literal["torch", "kaiming"]


class NormParam(nnx.Param):
  """A norm's scale or bias: stays float32 when the rest computes in bfloat16."""


class Conv(nnx.Module):
  """Convolution with zero "same" padding as PyTorch pads: dilation·(k−1)/2 on every side.

  Args:
    in_channels, out_channels: channels.
    kernel_size: odd.
    stride, dilation: the same along both axes.
    bias: whether a bias is added.
    init: "torch": weight and bias uniform in ±1/√fan_in (PyTorch's default); "kaiming": weight
      normal with variance 2/fan_out, bias 0.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    bias: bool = True,
    init: Init = "torch",
    rngs: nnx.Rngs,
  ):
    shape = (kernel_size, kernel_size, in_channels, out_channels)
    bound = (in_channels * kernel_size**2) ** -0.5
    self.kernel = nnx.Param(_kernel(shape, bound, init, rngs))
    self.bias = nnx.data(None)
    if bias:
      self.bias = nnx.Param(_bias(out_channels, bound, init, rngs))
    self.stride = stride
    self.dilation = dilation

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...]
    if kernel.shape[:2] == (1, 1):  # a matrix product: a CPU runs 1×1 convolutions slowly
      if self.stride > 1:
        x = _ops.window(x, slice(None, None, self.stride), slice(None, None, self.stride))
      y = x @ kernel[0, 0]
    else:
      pad = self.dilation * (kernel.shape[0] - 1) // 2
      y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (self.stride, self.stride),
        [(pad, pad), (pad, pad)],
        rhs_dilation=(self.dilation, self.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    return y if self.bias is None else y + self.bias[...].reshape(1, 1, 1, -1)


class ConvTranspose(nnx.Module):
  """Transposed convolution, kernel 4, stride 2, padding 1, with bias: B×H×W → B×2H×2W.

  `kernel` is 4×4×in×out, indexed as PyTorch's (not flipped).
  """

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    # PyTorch takes out_channels·k² as the fan-in of a transposed convolution.
    bound = (out_channels * 16) ** -0.5
    self.kernel = nnx.Param(_kernel((4, 4, in_channels, out_channels), bound, "torch", rngs))
    self.bias = nnx.Param(_bias(out_channels, bound, "torch", rngs))

  def __call__(self, x: jax.Array) -> jax.Array:
    return _ops.conv_transpose(x, self.kernel[...]) + self.bias[...].reshape(1, 1, 1, -1)


def _kernel(shape, bound, init: Init, rngs: nnx.Rngs) -> jax.Array:
  if init == "torch":
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
  fan_out = shape[0] * shape[1] * shape[3]
  return jax.random.normal(rngs.params(), shape) * (2 / fan_out) ** 0.5


def _bias(channels, bound, init: Init, rngs: nnx.Rngs) -> jax.Array:
  if init == "torch":
    return jax.random.uniform(rngs.params(), (channels,), minval=-bound, maxval=bound)
  return jnp.zeros(channels)


class BatchNorm(nnx.Module):
  """BatchNorm over B, H and W; the running variance is the unbiased one, as PyTorch keeps it.

  flax's own BatchNorm keeps the biased variance, which differs by n/(n−1). Under `jit` with a
  sharded batch the statistics are those of the global batch.

  Args:
    channels: C.
    momentum: weight of the old running value (1 − PyTorch's momentum).
  """

  def __init__(self, channels: int, *, momentum: float = 0.9, epsilon: float = 1e-5):
    self.scale = NormParam(jnp.ones(channels))
    self.bias = NormParam(jnp.zeros(channels))
    self.mean = nnx.BatchStat(jnp.zeros(channels))
    self.var = nnx.BatchStat(jnp.ones(channels))
    self.momentum = momentum
    self.epsilon = epsilon
    self.use_running_average = False

  def __call__(self, x: jax.Array) -> jax.Array:
    scale, bias = self.scale[...], self.bias[...]
    if self.use_running_average:
      wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      factor = scale * jax.lax.rsqrt(self.var[...] + self.epsilon)
      return ((wide - _row(self.mean[...])) * _row(factor) + _row(bias)).astype(x.dtype)
    y, mean, var = batch_norm(x, scale, bias, self.mean[...], self.epsilon)
    count = x.size // x.shape[-1]
    unbiased = var * (count / max(count - 1, 1))
    for stat, new in ((self.mean, mean), (self.var, unbiased)):
      old = stat[...]
      new = jax.lax.stop_gradient(new).astype(old.dtype)
      # Not `stat[...] =`: it asks tracers for their sharding, 9/10 of the time to trace MSDA-Net.
      stat.set_value(self.momentum * old + (1 - self.momentum) * new)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_norm(x, scale, bias, near, epsilon):
  """Batch normalisation with the statistics of the batch, and those: normalised x, mean, variance.

  One reduction in each direction, so that a batch split over devices meets twice for every norm;
  differentiating the formula itself meets six times. No gradient flows into the statistics.

  Args:
    x: B×H×W×C.
    scale, bias: C.
    near: C, not differentiated: anything near the mean, such as the running mean. The variance is
      that of x − near, whose squares do not cancel as those of x would.
    epsilon: added to the variance.
  """
  return _batch_norm(x, scale, bias, near, epsilon)[0]


def _batch_norm(x, scale, bias, near, epsilon):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  shifted = wide - _row(near)
  offset, square = _sums(shifted, jnp.square(shifted)) / (x.size // x.shape[-1])
  var = jnp.maximum(square - jnp.square(offset), 0)
  mean, inverse = near + offset, jax.lax.rsqrt(var + epsilon)
  y = (wide - _row(mean)) * _row(scale * inverse) + _row(bias)
  return (y.astype(x.dtype), mean, var), (x, scale, mean, inverse)


def _batch_norm_backward(epsilon, residuals, cotangents):
  x, scale, mean, inverse = residuals
  wide = x.astype(mean.dtype)
  normed = (wide - _row(mean)) * _row(inverse)
  slope = cotangents[0].astype(mean.dtype)
  total, along = _sums(slope, slope * normed)
  count = x.size // x.shape[-1]
  dx = (slope - _row(total / count) - normed * _row(along / count)) * _row(scale * inverse)
  return dx.astype(x.dtype), along, total, jnp.zeros_like(mean)


def _sums(*maps):
  """Sums over B, H and W of B×H×W×C maps, one row each; over the batch together."""
  return jnp.stack([x.sum((1, 2)) for x in maps], 1).sum(0)


batch_norm.defvjp(_batch_norm, _batch_norm_backward)


class GroupNorm(nnx.Module):
  """GroupNorm with one group: each sample is normalised over H, W and C; affine per channel."""

  def __init__(self, channels: int, *, epsilon: float = 1e-5):
    self.scale = NormParam(jnp.ones(channels))
    self.bias = NormParam(jnp.zeros(channels))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = _mean(wide)
    var = _mean(jnp.square(wide - mean))
    normed = (wide - mean) * jax.lax.rsqrt(var + self.epsilon)
    return (normed * _row(self.scale[...]) + _row(self.bias[...])).astype(x.dtype)


def _mean(x: jax.Array) -> jax.Array:
  """B×1×1×1; of the whole frame where x is a window of it."""
  if _window.current(x) is None:
    return x.mean((1, 2, 3), keepdims=True)
  return _ops.spatial_mean(x).mean(-1, keepdims=True)


def _row(channels: jax.Array) -> jax.Array:
  return channels.reshape(1, 1, 1, -1)


class ConvNorm(nnx.Module):
  """Convolution and BatchNorm; `momentum` is the norm's, the other options are `Conv`'s."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    momentum: float = 0.9,
    rngs: nnx.Rngs,
    **options,
  ):
    self.conv = Conv(in_channels, out_channels, kernel_size, rngs=rngs, **options)
    self.norm = BatchNorm(out_channels, momentum=momentum)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(self.conv(x))


class ConvNormRelu(ConvNorm):
  """Convolution, BatchNorm, ReLU."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(super().__call__(x))


class ResidualBlock(nnx.Module):
  """conv3, BN, ReLU, conv3, BN, + input, ReLU; Kaiming initialisation (MLCL, ALCL, GGL, MSDA)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv1 = ConvNormRelu(channels, channels, init="kaiming", rngs=rngs)
    self.conv2 = ConvNorm(channels, channels, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(x + self.conv2(self.conv1(x)))


class DownBlock(nnx.Module):
  """Residual block that halves the size (MLCL, ALCL, GGL, MSDA).

  Main path: conv3 at full size, BN, ReLU, 2×2 max-pool, conv3, BN. Shortcut: conv3 of stride 2,
  BN, ReLU. Sum, ReLU. Kaiming initialisation.
  """

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.conv1 = ConvNormRelu(in_channels, out_channels, init="kaiming", rngs=rngs)
    self.conv2 = ConvNorm(out_channels, out_channels, init="kaiming", rngs=rngs)
    self.shortcut = ConvNormRelu(in_channels, out_channels, stride=2, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    main = self.conv2(_ops.max_pool2(self.conv1(x)))
    return nnx.relu(main + self.shortcut(x))


class Stem(nnx.Module):
  """Two conv3-BN-ReLU layers to 16 channels at full size (MLCL, ALCL, GGL, MSDA)."""

  def __init__(self, in_channels: int, channels: int, *, init: Init, rngs: nnx.Rngs):
    self.conv1 = ConvNormRelu(in_channels, channels, init=init, rngs=rngs)
    self.conv2 = ConvNormRelu(channels, channels, init=init, rngs=rngs)

  def __call__(self, image: jax.Array) -> jax.Array:
    return self.conv2(self.conv1(image))


class SqueezeExcitation(nnx.Module):
  """Channel gate: global mean, C → C/4, ReLU, → C, sigmoid; no biases."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.reduce = Conv(channels, channels // 4, 1, bias=False, rngs=rngs)
    self.expand = Conv(channels // 4, channels, 1, bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate = self.expand(nnx.relu(self.reduce(_ops.spatial_mean(x))))
    return x * nnx.sigmoid(gate)


class Head(nnx.Module):
  """conv1 C→C, ReLU, conv1 C→1: the logits at full size (ALCL, GGL, MSDA with Kaiming; MLCL)."""

  def __init__(self, channels: int, *, init: Init, rngs: nnx.Rngs):
    self.conv1 = Conv(channels, channels, 1, init=init, rngs=rngs)
    self.conv2 = Conv(channels, 1, 1, init=init, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv2(nnx.relu(self.conv1(x)))


class LocalContrast(nnx.Module):
  """conv1, ReLU, conv3, ReLU, C→C; Kaiming initialisation (ALCL, GGL)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv1 = Conv(channels, channels, 1, init="kaiming", rngs=rngs)
    self.conv2 = Conv(channels, channels, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(self.conv2(nnx.relu(self.conv1(x))))


class UpConvNormRelu(ConvNormRelu):
  """Bilinear ×2 with aligned corners, conv1, BN, ReLU; Kaiming initialisation (ALCL, GGL).

  The convolution runs first: a 1×1 convolution and an interpolation whose weights sum to 1 commute,
  and it is a quarter of the work. The BatchNorm does not commute: its statistics are those of the
  doubled feature.
  """

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    super().__init__(in_channels, out_channels, 1, init="kaiming", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(self.norm(_ops.upsample2(self.conv(x), align_corners=True)))


# Weight of the old value in most BatchNorms of ACM and ALCNet. Their MXNet original keeps 0.9 of
# it; the published PyTorch port hands the same 0.9 to PyTorch, where it weighs the new value.
_PORTED_MOMENTUM = 0.1

FusionNorm = Literal["group", "batch"]


class BasicBlock(nnx.Module):
  """ResNet's basic block: conv3, BN, ReLU, conv3, BN, + shortcut, ReLU (ACM, ALCNet)."""

  def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, rngs: nnx.Rngs):
    options = {"bias": False, "rngs": rngs}
    self.conv1 = ConvNormRelu(in_channels, out_channels, stride=stride, **options)
    self.conv2 = ConvNorm(out_channels, out_channels, **options)
    self.shortcut = nnx.data(None)
    if stride != 1:
      self.shortcut = ConvNorm(
        in_channels, out_channels, 1, stride=stride, momentum=_PORTED_MOMENTUM, **options
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    shortcut = x if self.shortcut is None else self.shortcut(x)
    return nnx.relu(shortcut + self.conv2(self.conv1(x)))


class ResNetEncoder(nnx.Module):
  """A stem to 1/4 of the size and three stages of basic blocks (ACM, ALCNet).

  Image B×H×W×in_channels, not necessarily normalised (it passes a BatchNorm first) -> features
  B×H/4×W/4×16, B×H/8×W/8×32 and B×H/16×W/16×64.
  """

  def __init__(self, in_channels: int, blocks: int, *, rngs: nnx.Rngs):
    options = {"momentum": _PORTED_MOMENTUM, "bias": False, "rngs": rngs}
    self.norm = BatchNorm(in_channels, momentum=_PORTED_MOMENTUM)
    self.stem = nnx.List(
      [
        ConvNormRelu(in_channels, 8, stride=2, **options),
        ConvNormRelu(8, 8, **options),
        ConvNormRelu(8, 16, **options),
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
    x = _ops.max_pool3_stride2(x)
    features = []
    for stage in self.stages:
      for block in stage:
        x = block(x)
      features.append(x)
    return tuple(features)


class BottleneckGate(nnx.Module):
  """C → C/4 → C by 1×1 convolutions with norms; sigmoid."""

  def __init__(self, channels: int, norm: FusionNorm, *, rngs: nnx.Rngs):
    self.conv1 = Conv(channels, channels // 4, 1, rngs=rngs)
    self.norm1 = _fusion_norm(norm, channels // 4)
    self.conv2 = Conv(channels // 4, channels, 1, rngs=rngs)
    self.norm2 = _fusion_norm(norm, channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm1(self.conv1(x)))
    return nnx.sigmoid(self.norm2(self.conv2(x)))


class AsymmetricFusion(nnx.Module):
  """Asymmetric contextual modulation of a deep and a shallow feature of one size (ACM, ALCNet).

  The deep one gates the shallow one's channels (from its global mean), the shallow one gates the
  deep one's pixels. The second gate, `bottomup(low)`, does not depend on the deep feature, so
  `encode` computes it.

  Args:
    channels: C of both features and of the result.
    norm: "group" (PAL, one group) or "batch" (BasicIRSTD, LESPS).
  """

  def __init__(self, channels: int, norm: FusionNorm, *, rngs: nnx.Rngs):
    if norm not in ("group", "batch"):
      raise ValueError(f'fusion_norm is {norm!r}; it must be "group" or "batch".')
    self.topdown = BottleneckGate(channels, norm, rngs=rngs)
    self.bottomup = BottleneckGate(channels, norm, rngs=rngs)
    self.post = Conv(channels, channels, rngs=rngs)
    self.post_norm = _fusion_norm(norm, channels)

  def __call__(self, high: jax.Array, low: jax.Array, high_gate: jax.Array) -> jax.Array:
    low_gate = self.topdown(_ops.spatial_mean(high))  # B×1×1×C
    fused = 2 * (low * low_gate + high * high_gate)
    return nnx.relu(self.post_norm(self.post(fused)))


def _fusion_norm(norm: FusionNorm, channels: int) -> GroupNorm | BatchNorm:
  if norm == "group":
    return GroupNorm(channels)
  return BatchNorm(channels, momentum=_PORTED_MOMENTUM)


class DropoutHead(nnx.Module):
  """conv3 C→C/4, BN, ReLU, dropout 0.1, conv1 →1 (ACM, ALCNet)."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv1 = ConvNormRelu(
      channels, channels // 4, bias=False, momentum=_PORTED_MOMENTUM, rngs=rngs
    )
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.conv2 = Conv(channels // 4, 1, 1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv2(self.dropout(self.conv1(x)))


class ChannelAttention(nnx.Module):
  """Channel gate B×1×1×C in (0, 1): C → C/reduction, ReLU, → C on the mean and on the maximum.

  The two results are summed before the sigmoid; no biases (DNA-Net, GGL-Net).
  """

  def __init__(self, channels: int, reduction: int, *, rngs: nnx.Rngs):
    self.reduce = Conv(channels, channels // reduction, 1, bias=False, rngs=rngs)
    self.expand = Conv(channels // reduction, channels, 1, bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    mean, maximum = _ops.spatial_mean(x), _ops.spatial_max(x)
    return nnx.sigmoid(
      self.expand(nnx.relu(self.reduce(mean))) + self.expand(nnx.relu(self.reduce(maximum)))
    )
