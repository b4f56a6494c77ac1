"""Parameter-free operations of the backbones, NHWC, in forms that are fast on CPU, GPU and TPU.

Every rewritten form equals the plain operation exactly up to rounding (tests/test_ops.py, float64)
and costs no more multiply-adds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fdep_jax.backbones import _window

WAVELETS = ("ll", "lh", "hl", "hh")


def max_pool2(x: jax.Array) -> jax.Array:
  """2×2 max-pool, stride 2; an odd last row or column is pooled alone (PyTorch's ceil_mode)."""
  pad = [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)]
  if any(after for _, after in pad):
    x = jnp.pad(x, pad, constant_values=-jnp.inf)
  # Slices rather than reduce_window: its gradient is slow on CPUs.
  return jnp.maximum(
    jnp.maximum(x[:, 0::2, 0::2], x[:, 0::2, 1::2]),
    jnp.maximum(x[:, 1::2, 0::2], x[:, 1::2, 1::2]),
  )


def max_pool3_stride2(x: jax.Array) -> jax.Array:
  """3×3 max-pool, stride 2, padded with −∞ by 1; H and W even."""
  x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-jnp.inf)
  rows = jnp.maximum(jnp.maximum(x[:, 0:-2:2], x[:, 1:-1:2]), x[:, 2::2])
  return jnp.maximum(jnp.maximum(rows[:, :, 0:-2:2], rows[:, :, 1:-1:2]), rows[:, :, 2::2])


def resize_matrix(size: int, new_size: int, align_corners: bool) -> np.ndarray:
  """new_size×size float64 weights of a 1-D linear interpolation (PyTorch's, no antialiasing)."""
  if align_corners:
    position = np.arange(new_size) * ((size - 1) / max(new_size - 1, 1))
  else:
    position = np.maximum((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0.0)
  low = np.minimum(np.floor(position).astype(int), size - 1)
  high = np.minimum(low + 1, size - 1)
  matrix = np.zeros((new_size, size))
  rows = np.arange(new_size)
  np.add.at(matrix, (rows, low), 1.0 - (position - low))
  np.add.at(matrix, (rows, high), position - low)
  return matrix


def resize(x: jax.Array, size: tuple[int, int], *, align_corners: bool) -> jax.Array:
  """Bilinear resize of B×H×W×C to `size` (rows, columns), as PyTorch's `interpolate`.

  Exact doubling and, with align_corners, halving are sums of shifted rows; other sizes are two
  small matrix products.
  """
  for axis, new_size in ((1, size[0]), (2, size[1])):
    x = _resize_axis(x, axis, new_size, align_corners)
  return x


def upsample2(x: jax.Array, *, align_corners: bool) -> jax.Array:
  """Bilinear ×2."""
  return resize(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=align_corners)


def _resize_axis(x: jax.Array, axis: int, new_size: int, align_corners: bool) -> jax.Array:
  size = x.shape[axis]
  if new_size == size:
    return x
  # With aligned corners the sampling points of a window are its frame's.
  length, offset = size, 0
  window = _window.current(x) if align_corners else None
  if window is not None:
    length, offset = window.place(x, axis)
  if new_size == 2 * size:
    return _double(x, axis, align_corners, length, offset)
  if align_corners and 2 * new_size == size and new_size > 1:
    # Output i samples 2i + i/(n−1), so only neighbours 2i and 2i+1 take part.
    weight = _along((offset // 2 + np.arange(new_size)) / (length // 2 - 1), axis, x.dtype)
    even = jax.lax.slice_in_dim(x, 0, None, 2, axis)
    odd = jax.lax.slice_in_dim(x, 1, None, 2, axis)
    return even * (1 - weight) + odd * weight
  if window is None:
    matrix = jnp.asarray(resize_matrix(size, new_size, align_corners), x.dtype)
  else:
    matrix = _window_matrix(size, new_size, length, offset).astype(x.dtype)
  product = jnp.einsum(
    "yh,bhwc->bywc" if axis == 1 else "xw,bhwc->bhxc",
    matrix,
    x,
    precision=jax.lax.Precision.HIGHEST,
  )
  return product.astype(x.dtype)


def _window_matrix(size: int, new_size: int, length, offset) -> jax.Array:
  """`resize_matrix` with aligned corners for a window of a longer axis.

  Args:
    size, new_size: of the window before and after.
    length, offset: the whole axis before, and the window's place in it.
  """
  # Output i samples i·(n−1)/(N−1), in integers: float32 would lose its fraction in large frames.
  whole = length * new_size // size - 1
  place = (offset * new_size // size + jnp.arange(new_size)) * (length - 1)
  low = (place // whole - offset).reshape(-1, 1)
  fraction = (place % whole / whole).reshape(-1, 1)
  column = jnp.arange(size).reshape(1, -1)
  return jnp.where(column == low, 1 - fraction, 0) + jnp.where(column == low + 1, fraction, 0)


def _double(x: jax.Array, axis: int, align_corners: bool, length, offset) -> jax.Array:
  size = x.shape[axis]
  index = offset + np.arange(size)
  if align_corners:  # outputs 2k and 2k+1 sample k − k/(2n−1) and k + (n−1−k)/(2n−1)
    before, after = index / (2 * length - 1), (length - 1 - index) / (2 * length - 1)
  else:
    before = after = np.full(size, 0.25)
  before, after = _along(before, axis, x.dtype), _along(after, axis, x.dtype)
  first = jax.lax.slice_in_dim(x, 0, 1, 1, axis)
  last = jax.lax.slice_in_dim(x, size - 1, None, 1, axis)
  previous = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, size - 1, 1, axis)], axis)
  following = jnp.concatenate([jax.lax.slice_in_dim(x, 1, None, 1, axis), last], axis)
  even = x * (1 - before) + previous * before
  odd = x * (1 - after) + following * after
  doubled = jnp.stack([even, odd], axis + 1)
  return doubled.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _along(weights: np.ndarray | jax.Array, axis: int, dtype) -> jax.Array:
  shape = [1, 1, 1, 1]
  shape[axis] = -1
  return jnp.asarray(weights.reshape(shape), dtype)


def haar(x: jax.Array, *, stride: int) -> dict[str, jax.Array]:
  """The four 2×2 Haar bands of every channel.

  Args:
    x: B×H×W×C.
    stride: 1, undecimated and zero-padded by one row above and one column left (output B×H×W×C),
      or 2, decimated without padding (B×H/2×W/2×C).

  Returns:
    Bands by name: "lh" differs from row to row, "hl" from column to column, "hh" on the diagonal;
    every kernel has entries ±0.5.

  Source: YuChuang1205/PAL model/MSDA, `FrequencyAttention` and the stage's high-frequency branch.
  """
  if stride == 1:
    x = jnp.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)])
    first, second = slice(None, -1), slice(1, None)
  else:
    first, second = slice(0, None, 2), slice(1, None, 2)
  # Separable: sums and differences of rows, then of columns, instead of a grouped convolution.
  above, below = x[:, first], x[:, second]
  total, difference = 0.5 * (above + below), 0.5 * (above - below)
  sum_left, sum_right = total[:, :, first], total[:, :, second]
  difference_left, difference_right = difference[:, :, first], difference[:, :, second]
  return {
    "ll": sum_left + sum_right,
    "lh": difference_left + difference_right,
    "hl": sum_left - sum_right,
    "hh": difference_left - difference_right,
  }


def max_and_mean(x: jax.Array) -> jax.Array:
  """B×H×W×2: maximum, then mean over channels."""
  return jnp.concatenate([x.max(-1, keepdims=True), x.mean(-1, keepdims=True)], -1)


def spatial_mean(x: jax.Array) -> jax.Array:
  """B×1×1×C; of the whole frame where x is a window of it."""
  window = _window.current(x)
  return x.mean((1, 2), keepdims=True) if window is None else window.mean(x)


def spatial_max(x: jax.Array) -> jax.Array:
  """B×1×1×C; of the whole frame where x is a window of it."""
  window = _window.current(x)
  return x.max((1, 2), keepdims=True) if window is None else window.max(x)


def mean_and_max(x: jax.Array) -> jax.Array:
  """B×H×W×2: mean, then maximum over channels (DNA-Net, UIU-Net)."""
  return jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], -1)
