"""Layers that the networks with attention share (MTU-Net, SCTransNet, SDSNet)."""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.layers import basic, ops


class LayerNorm(nnx.Module):
  """LayerNorm over the channels of every pixel, computed in float32."""

  def __init__(self, channels: int, *, epsilon: float = 1e-5):
    self.scale = basic.NormParam(jnp.ones(channels))
    self.bias = basic.NormParam(jnp.zeros(channels))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    var = jnp.square(centred).mean(-1, keepdims=True)
    scale, bias = (v[...].reshape(1, 1, 1, -1) for v in (self.scale, self.bias))
    return (centred * jax.lax.rsqrt(var + self.epsilon) * scale + bias).astype(x.dtype)


class LeakyBlock(nnx.Module):
  """Residual block with leaky ReLUs of slope 0.01; no stride.

  conv3, BN, LeakyReLU, conv3, BN, + input (by conv1 and BN where the channels change), LeakyReLU.
  """

  def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
    self.conv1 = basic.ConvNorm(in_channels, out_channels, rngs=rngs)
    self.conv2 = basic.ConvNorm(out_channels, out_channels, rngs=rngs)
    self.shortcut = nnx.data(None)
    if in_channels != out_channels:
      self.shortcut = basic.ConvNorm(in_channels, out_channels, 1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    shortcut = x if self.shortcut is None else self.shortcut(x)
    return leaky_relu(self.conv2(leaky_relu(self.conv1(x))) + shortcut)


def leaky_relu(x: jax.Array) -> jax.Array:
  """max(x, 0.01·x)."""
  return jnp.maximum(x, 0.01 * x)


class GroupedConv(nnx.Module):
  """Convolution in groups of `group` inputs and outputs; 1 for a depthwise convolution.

  Args:
    channels: C of input and output.
    kernel_size: rows and columns, odd.
  """

  def __init__(
    self,
    channels: int,
    kernel_size: tuple[int, int],
    group: int = 1,
    *,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    shape = (*kernel_size, group, channels)
    bound = (kernel_size[0] * kernel_size[1] * group) ** -0.5
    self.kernel = nnx.Param(uniform(rngs, shape, bound))
    self.bias = nnx.data(None)
    if bias:
      self.bias = nnx.Param(uniform(rngs, (channels,), bound))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = ops.grouped_conv(x, self.kernel[...])
    return y if self.bias is None else y + self.bias[...].reshape(1, 1, 1, -1)


class ChannelConv(nnx.Module):
  """One-dimensional convolution along the channels, without bias."""

  def __init__(self, size: int, *, rngs: nnx.Rngs):
    self.kernel = nnx.Param(uniform(rngs, (size, 1, 1), size**-0.5))

  def __call__(self, x: jax.Array) -> jax.Array:
    return ops.channel_conv(x, self.kernel[...])


class PatchEmbedding(nnx.Module):
  """Patches of p×p pixels to one pixel each, C→C."""

  def __init__(self, channels: int, patch: int, *, rngs: nnx.Rngs):
    bound = (channels * patch**2) ** -0.5
    self.kernel = nnx.Param(uniform(rngs, (patch, patch, channels, channels), bound))
    self.bias = nnx.Param(uniform(rngs, (channels,), bound))

  def __call__(self, x: jax.Array) -> jax.Array:
    return ops.embed_patches(x, self.kernel[...]) + self.bias[...].reshape(1, 1, 1, -1)


class Reconstruction(basic.ConvNormRelu):
  """Bilinear ×p with half-pixel centres, conv1, BN, ReLU.

  The convolution runs first, as in `blocks.UpConvNormRelu`; the BatchNorm's statistics are those
  of the enlarged feature.
  """

  def __init__(self, channels: int, patch: int, *, rngs: nnx.Rngs):
    super().__init__(channels, channels, 1, rngs=rngs)
    self.patch = patch

  def __call__(self, x: jax.Array) -> jax.Array:
    size = (x.shape[1] * self.patch, x.shape[2] * self.patch)
    return nnx.relu(self.norm(ops.resize(self.conv(x), size, align_corners=False)))


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> jax.Array:
  """PyTorch's default initial values: uniform in ±bound, where bound is 1/√fan_in."""
  return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


class Linear(nnx.Module):
  """Linear map of the last axis; PyTorch's default initial values."""

  def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True, rngs: nnx.Rngs):
    self.kernel = nnx.Param(uniform(rngs, (in_channels, out_channels), in_channels**-0.5))
    self.bias = nnx.data(None)
    if bias:
      self.bias = nnx.Param(uniform(rngs, (out_channels,), in_channels**-0.5))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x @ self.kernel[...]
    return y if self.bias is None else y + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))
