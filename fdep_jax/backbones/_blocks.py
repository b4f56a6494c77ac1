"""Layers that several backbones share: convolutions, norms and blocks with PyTorch's conventions."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import _ops

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
        x = x[:, :: self.stride, :: self.stride]
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

  Every output parity is a 2×2 convolution of the input, so one 2×2 convolution to 4·C channels
  and an interleave give the same numbers for the same multiply-adds; XLA runs the dilated form an
  order of magnitude slower on a CPU. `kernel` is 4×4×in×out, indexed as PyTorch's (not flipped).
  """

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    # PyTorch takes out_channels·k² as the fan-in of a transposed convolution.
    bound = (out_channels * 16) ** -0.5
    self.kernel = nnx.Param(_kernel((4, 4, in_channels, out_channels), bound, "torch", rngs))
    self.bias = nnx.Param(_bias(out_channels, bound, "torch", rngs))

  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, _ = x.shape
    kernel = self.kernel[...]
    out_channels = kernel.shape[-1]
    # Output row 2k takes input rows k−1 and k with kernel rows 3 and 1; row 2k+1 takes k and k+1
    # with 2 and 0. Columns alike.
    taps = ((3, 1), (2, 0))
    parities = [kernel[jnp.array(r)][:, jnp.array(c)] for r in taps for c in taps]
    windows = jax.lax.conv_general_dilated(
      x,
      jnp.concatenate(parities, -1),
      (1, 1),
      [(1, 1), (1, 1)],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(batch, height + 1, width + 1, 2, 2, out_channels)
    rows = jnp.stack([windows[:, :-1, :, 0], windows[:, 1:, :, 1]], 2)  # B×H×2×(W+1)×2×C
    y = jnp.stack([rows[:, :, :, :-1, 0], rows[:, :, :, 1:, 1]], 4)  # B×H×2×W×2×C
    y = y.reshape(batch, 2 * height, 2 * width, out_channels)
    return y + self.bias[...].reshape(1, 1, 1, -1)


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
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.use_running_average:
      mean, var = self.mean[...], self.var[...]
    else:
      mean = wide.mean((0, 1, 2))
      var = jnp.square(wide - _row(mean)).mean((0, 1, 2))
      count = x.size // x.shape[-1]
      unbiased = var * (count / max(count - 1, 1))
      for stat, new in ((self.mean, mean), (self.var, unbiased)):
        old = stat[...]
        new = jax.lax.stop_gradient(new).astype(old.dtype)
        stat[...] = self.momentum * old + (1 - self.momentum) * new
    factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
    return ((wide - _row(mean)) * _row(factor) + _row(self.bias[...])).astype(x.dtype)


class GroupNorm(nnx.Module):
  """GroupNorm with one group: each sample is normalised over H, W and C; affine per channel."""

  def __init__(self, channels: int, *, epsilon: float = 1e-5):
    self.scale = NormParam(jnp.ones(channels))
    self.bias = NormParam(jnp.zeros(channels))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((1, 2, 3), keepdims=True)
    var = jnp.square(wide - mean).mean((1, 2, 3), keepdims=True)
    normed = (wide - mean) * jax.lax.rsqrt(var + self.epsilon)
    return (normed * _row(self.scale[...]) + _row(self.bias[...])).astype(x.dtype)


def _row(channels: jax.Array) -> jax.Array:
  return channels.reshape(1, 1, 1, -1)


class ConvNorm(nnx.Module):
  """Convolution and BatchNorm."""

  def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *, rngs, **options):
    self.conv = Conv(in_channels, out_channels, kernel_size, rngs=rngs, **options)
    self.norm = BatchNorm(out_channels)

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
