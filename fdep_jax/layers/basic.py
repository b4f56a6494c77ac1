"""Basic layers with PyTorch's defaults: convolutions and norms."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.layers import ops, windows

Init = Literal["torch", "kaiming", "xavier"]


class NormParam(nnx.Param):
  """A norm's scale or bias; stays float32 when the rest computes in bfloat16."""


class Conv(nnx.Module):
  """Convolution with PyTorch's zero "same" padding: dilation·(k−1)/2 on every side.

  Computes in the type of its kernel, whatever the input's: under bfloat16, Flax's own BatchNorm
  returns float32.

  Args:
    in_channels, out_channels: channels.
    kernel_size: odd.
    stride, dilation: the same along both axes.
    bias: whether a bias is added.
    init: "torch": weight and bias uniform in ±1/√fan_in (PyTorch's default); "kaiming": weight
      normal with variance 2/fan_out, bias 0; "xavier": weight normal with variance
      2/(fan_in + fan_out), bias as "torch".
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
    x = x.astype(kernel.dtype)
    if kernel.shape[:2] == (1, 1):  # a matrix product: a CPU runs 1×1 convolutions slowly
      if self.stride > 1:
        x = ops.window(x, slice(None, None, self.stride), slice(None, None, self.stride))
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
    kernel = self.kernel[...]
    return ops.conv_transpose(x.astype(kernel.dtype), kernel) + self.bias[...].reshape(1, 1, 1, -1)


def _kernel(shape, bound, init: Init, rngs: nnx.Rngs) -> jax.Array:
  if init == "torch":
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
  fan_in, fan_out = (shape[0] * shape[1] * channels for channels in shape[2:])
  variance = 2 / fan_out if init == "kaiming" else 2 / (fan_in + fan_out)
  return jax.random.normal(rngs.params(), shape) * variance**0.5


def _bias(channels, bound, init: Init, rngs: nnx.Rngs) -> jax.Array:
  if init == "kaiming":
    return jnp.zeros(channels)
  return jax.random.uniform(rngs.params(), (channels,), minval=-bound, maxval=bound)


class BatchNorm(nnx.Module):
  """BatchNorm over B, H and W; the running variance is the unbiased one, as in PyTorch.

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
      # `stat[...] =` would query the tracers' sharding: 9/10 of the time to trace MSDA-Net.
      stat.set_value(self.momentum * old + (1 - self.momentum) * new)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_norm(x, scale, bias, near, epsilon):
  """Normalises x by the statistics of its batch; returns normalised x, mean and variance.

  Each direction takes one reduction, so devices that share a batch exchange data twice per norm.
  Differentiating the formula itself would take six exchanges. The returned statistics pass no
  gradient back.

  Args:
    x: B×H×W×C.
    scale, bias: C.
    near: C, not differentiated: values near the mean, such as the running mean. The nearer, the
      more exact; a mean 1000 standard deviations away still gives the variance within 0.1 %.
    epsilon: added to the variance.
  """
  return _batch_norm(x, scale, bias, near, epsilon)[0]


def _batch_norm(x, scale, bias, near, epsilon):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean, var = _moments(wide, near)
  inverse = jax.lax.rsqrt(var + epsilon)
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


def _moments(x, near):
  """Computes mean and biased variance over B, H and W without large squares that cancel.

  Within an image, values are taken relative to its middle pixel. Between images, the images' means
  d (relative to `near`) may all be far from 0, and then float32 is too short for the sum of d². So
  d is split into a part of 8 bits, whose squares have an exact sum, and a small rest.
  """
  images, height, width, _ = x.shape
  pixel = x[:, height // 2, width // 2]
  shifted = x - pixel[:, None, None]
  offset, square = (s.sum((1, 2)) / (height * width) for s in (shifted, jnp.square(shifted)))
  means = pixel - near.reshape(1, -1) + offset  # B×C
  coarse = jax.lax.reduce_precision(means, exponent_bits=8, mantissa_bits=7)
  rest = means - coarse
  spread = square - jnp.square(offset) + jnp.square(rest)
  spread, coarse, square, rest, product = jnp.stack(
    [spread, coarse, jnp.square(coarse), rest, coarse * rest], 1
  ).sum(0)
  anchor = jax.lax.reduce_precision(coarse / images, exponent_bits=8, mantissa_bits=7)
  # Sums of (coarse − anchor)² and of twice (coarse − anchor)·rest; the first is exact.
  spread += square - 2 * anchor * coarse + images * jnp.square(anchor)
  spread += 2 * (product - anchor * rest)
  offset = (coarse - images * anchor + rest) / images
  return near + (anchor + offset), jnp.maximum(spread / images - jnp.square(offset), 0)


def _sums(*maps):
  """Sums B×H×W×C maps over B, H and W, one row each, in one reduction over the batch."""
  return jnp.stack([x.sum((1, 2)) for x in maps], 1).sum(0)


batch_norm.defvjp(_batch_norm, _batch_norm_backward)


class GroupNorm(nnx.Module):
  """GroupNorm with one group: normalises each sample over H, W and C; affine per channel."""

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
  """Returns the mean, B×1×1×1; of the whole frame if x is a window of it."""
  if windows.current(x) is None:
    return x.mean((1, 2, 3), keepdims=True)
  return ops.spatial_mean(x).mean(-1, keepdims=True)


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
