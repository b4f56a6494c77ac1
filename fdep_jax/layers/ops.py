"""Parameter-free operations of the backbones, NHWC, in forms that are fast on CPU, GPU and TPU.

Every rewritten form equals the plain operation up to rounding (tests/test_ops.py, float64) and
costs no more multiply-adds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fdep_jax.layers import windows

WAVELETS = ("ll", "lh", "hl", "hh")


def window(x: jax.Array, rows: slice, columns: slice) -> jax.Array:
  """Returns x[:, rows, columns]; unlike indexing, a plain slice for symbolic sizes, too."""
  starts, limits, strides = [0] * 4, list(x.shape), [1] * 4
  for axis, part in ((1, rows), (2, columns)):
    starts[axis], strides[axis] = part.start or 0, part.step or 1
    if part.stop is not None:
      limits[axis] = part.stop if part.stop >= 0 else x.shape[axis] + part.stop
  return jax.lax.slice(x, starts, limits, strides)


def max_pool2(x: jax.Array) -> jax.Array:
  """Applies a 2×2 max-pool, stride 2; an odd last row or column is pooled alone (ceil_mode)."""
  pad = [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)]
  if any(after for _, after in pad):
    x = jnp.pad(x, pad, constant_values=-jnp.inf)
  # Slices rather than reduce_window: its gradient is slow on CPUs.
  even, odd = slice(0, None, 2), slice(1, None, 2)
  return jnp.maximum(
    jnp.maximum(window(x, even, even), window(x, even, odd)),
    jnp.maximum(window(x, odd, even), window(x, odd, odd)),
  )


def max_pool3_stride2(x: jax.Array) -> jax.Array:
  """Applies a 3×3 max-pool, stride 2, padded with −∞ by 1; H and W must be even."""
  x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-jnp.inf)
  everything, thirds = slice(None), (slice(0, -2, 2), slice(1, -1, 2), slice(2, None, 2))
  first, second, third = (window(x, part, everything) for part in thirds)
  rows = jnp.maximum(jnp.maximum(first, second), third)
  first, second, third = (window(rows, everything, part) for part in thirds)
  return jnp.maximum(jnp.maximum(first, second), third)


def resize_matrix(size: int, new_size: int, align_corners: bool):
  """Returns the new_size×size weights of PyTorch's 1-D linear interpolation (not antialiased).

  A float64 numpy array; a float32 jax array if a size is symbolic (known only when an exported
  program runs). Positions are exact: ratios of integers.
  """
  xp = np if isinstance(size, int) and isinstance(new_size, int) else jnp
  row, column = xp.arange(new_size)[:, None], xp.arange(size)[None]
  if align_corners:
    numerator, denominator = row * (size - 1), max(new_size - 1, 1)
  else:
    numerator, denominator = xp.maximum((2 * row + 1) * size - new_size, 0), 2 * new_size
  low = numerator // denominator
  weight = (numerator % denominator) / denominator
  high = xp.minimum(low + 1, size - 1)
  return xp.where(column == low, 1 - weight, 0) + xp.where(column == high, weight, 0)


def resize(x: jax.Array, size: tuple[int, int], *, align_corners: bool) -> jax.Array:
  """Resizes B×H×W×C bilinearly to `size` (rows, columns), as PyTorch's `interpolate` does.

  Exact doubling and, with align_corners, halving are sums of shifted rows; other sizes are two
  small matrix products.
  """
  for axis, new_size in ((1, size[0]), (2, size[1])):
    x = _resize_axis(x, axis, new_size, align_corners)
  return x


def upsample2(x: jax.Array, *, align_corners: bool) -> jax.Array:
  """Doubles H and W bilinearly."""
  return resize(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=align_corners)


def _resize_axis(x: jax.Array, axis: int, new_size: int, align_corners: bool) -> jax.Array:
  size = x.shape[axis]
  if new_size == size:
    return x
  # With aligned corners, a window has the sampling points of its frame.
  length, offset = size, 0
  window = windows.current(x) if align_corners else None
  if window is not None:
    length, offset = window.place(x, axis)
  if new_size == 2 * size:
    return _double(x, axis, align_corners, length, offset)
  if align_corners and 2 * new_size == size and new_size > 1:
    # Output i samples 2i + i/(n−1), so only neighbours 2i and 2i+1 take part.
    weight = _along((offset // 2 + _arange(new_size)) / (length // 2 - 1), axis, x.dtype)
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
  """Returns `resize_matrix` with aligned corners for a window of a longer axis.

  Args:
    size, new_size: the window's size before and after.
    length, offset: the size of the whole axis before, and the window's first position in it.
  """
  # Output i samples i·(n−1)/(N−1), in integers: in large frames float32 would lose the fraction.
  whole = length * new_size // size - 1
  place = (offset * new_size // size + jnp.arange(new_size)) * (length - 1)
  low = (place // whole - offset).reshape(-1, 1)
  fraction = (place % whole / whole).reshape(-1, 1)
  column = jnp.arange(size).reshape(1, -1)
  return jnp.where(column == low, 1 - fraction, 0) + jnp.where(column == low + 1, fraction, 0)


def _double(x: jax.Array, axis: int, align_corners: bool, length, offset) -> jax.Array:
  size = x.shape[axis]
  index = offset + _arange(size)
  if align_corners:  # outputs 2k and 2k+1 sample k − k/(2n−1) and k + (n−1−k)/(2n−1)
    before, after = index / (2 * length - 1), (length - 1 - index) / (2 * length - 1)
  else:
    before = after = np.full(1, 0.25)
  before, after = _along(before, axis, x.dtype), _along(after, axis, x.dtype)
  first = jax.lax.slice_in_dim(x, 0, 1, 1, axis)
  last = jax.lax.slice_in_dim(x, size - 1, None, 1, axis)
  previous = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, size - 1, 1, axis)], axis)
  following = jnp.concatenate([jax.lax.slice_in_dim(x, 1, None, 1, axis), last], axis)
  even = x * (1 - before) + previous * before
  odd = x * (1 - after) + following * after
  doubled = jnp.stack([even, odd], axis + 1)
  return doubled.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _arange(size: int):
  """Returns 0 to size − 1; a numpy array if the size is known."""
  return np.arange(size) if isinstance(size, int) else jnp.arange(size)


def _along(weights: np.ndarray | jax.Array, axis: int, dtype) -> jax.Array:
  shape = [1, 1, 1, 1]
  shape[axis] = -1
  return jnp.asarray(weights.reshape(shape), dtype)


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Applies a transposed convolution, stride 2, padding 1: B×H×W×C → B×2H×2W×O.

  Every output parity is a 2×2 convolution of the input. So one 2×2 convolution to 4·O channels,
  interleaved, gives the same numbers for the same multiply-adds. On a CPU, XLA runs the usual
  dilated form an order of magnitude slower.

  Args:
    kernel: 4×4×C×O, indexed as PyTorch's (not flipped).
  """
  batch, height, width, _ = x.shape
  out_channels = kernel.shape[-1]
  # Output row 2k takes input rows k−1 and k with kernel rows 3 and 1; row 2k+1 takes k and k+1
  # with 2 and 0. Columns follow the same rule.
  taps = ((3, 1), (2, 0))
  parities = [kernel[jnp.array(r)][:, jnp.array(c)] for r in taps for c in taps]
  # A matrix product with the four neighbours side by side, because the weight gradient of a
  # convolution is slow on a CPU.
  x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  first, second = slice(None, -1), slice(1, None)
  corners = [window(x, rows, columns) for rows in (first, second) for columns in (first, second)]
  weights = jnp.concatenate(parities, -1).reshape(-1, 4 * out_channels)
  products = (jnp.concatenate(corners, -1) @ weights).reshape(
    batch, height + 1, width + 1, 2, 2, out_channels
  )
  rows = _interleave(products, 1, 3)  # B×H×2×(W+1)×2×O
  y = _interleave(rows, 3, 4)  # B×H×2×W×2×O
  return y.reshape(batch, 2 * height, 2 * width, out_channels)


def _interleave(parts: jax.Array, axis: int, parity: int) -> jax.Array:
  """Stacks behind `axis` all but the last of parity 0 and all but the first of parity 1."""
  size = parts.shape[axis] - 1
  before = jax.lax.slice_in_dim(jax.lax.index_in_dim(parts, 0, parity, False), 0, size, 1, axis)
  after = jax.lax.slice_in_dim(jax.lax.index_in_dim(parts, 1, parity, False), 1, size + 1, 1, axis)
  return jnp.stack([before, after], axis + 1)


def haar(x: jax.Array, *, stride: int) -> dict[str, jax.Array]:
  """Computes the four 2×2 Haar bands of every channel.

  Args:
    x: B×H×W×C.
    stride: 1, undecimated and zero-padded by one row above and one column left (output B×H×W×C),
      or 2, decimated without padding (B×H/2×W/2×C).

  Returns:
    Bands by name: "ll" sums, "lh" differences of rows, "hl" of columns, "hh" of diagonals; every
    kernel has entries ±0.5.

  Source: YuChuang1205/PAL model/MSDA, `FrequencyAttention` and the stage's high-frequency branch.
  """
  if stride == 1:
    x = jnp.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)])
    first, second = slice(None, -1), slice(1, None)
  else:
    first, second = slice(0, None, 2), slice(1, None, 2)
  # Separable: sums and differences of rows, then of columns, instead of a grouped convolution.
  everything = slice(None)
  above, below = window(x, first, everything), window(x, second, everything)
  total, difference = 0.5 * (above + below), 0.5 * (above - below)
  sum_left, sum_right = (window(total, everything, part) for part in (first, second))
  difference_left, difference_right = (
    window(difference, everything, part) for part in (first, second)
  )
  return {
    "ll": sum_left + sum_right,
    "lh": difference_left + difference_right,
    "hl": sum_left - sum_right,
    "hh": difference_left - difference_right,
  }


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the maximum over axes, which are kept; equal maxima share the gradient equally.

  JAX's own gradient divides by the number of elements that equal the maximum. That number is 0 if
  the compiler computes `x` twice with different rounding; DNA-Net, compiled without optimisation,
  then gave NaN.
  """
  return x.max(axes, keepdims=True)


@largest.defjvp
def _(axes, primals, tangents):
  (x,), (change,) = primals, tangents
  top = x.max(axes, keepdims=True)
  equal = x >= top
  count = jnp.maximum(equal.sum(axes, keepdims=True), 1).astype(x.dtype)
  return top, jnp.where(equal, change, 0).sum(axes, keepdims=True) / count


def max_and_mean(x: jax.Array) -> jax.Array:
  """Returns B×H×W×2: maximum, then mean over channels."""
  return jnp.concatenate([largest(x, (-1,)), x.mean(-1, keepdims=True)], -1)


def spatial_mean(x: jax.Array) -> jax.Array:
  """Returns the mean over H and W, B×1×1×C; of the whole frame if x is a window of it."""
  window = windows.current(x)
  return x.mean((1, 2), keepdims=True) if window is None else window.mean(x)


def spatial_max(x: jax.Array) -> jax.Array:
  """Returns the maximum over H and W, B×1×1×C; of the whole frame if x is a window of it."""
  window = windows.current(x)
  return largest(x, (1, 2)) if window is None else window.max(x)


def mean_and_max(x: jax.Array) -> jax.Array:
  """Returns B×H×W×2: mean, then maximum over channels (DNA-Net, UIU-Net)."""
  return jnp.concatenate([x.mean(-1, keepdims=True), largest(x, (-1,))], -1)


def upsample_nearest2(x: jax.Array) -> jax.Array:
  """Every pixel four times: B×H×W×C → B×2H×2W×C."""
  batch, height, width, channels = x.shape
  x = jnp.broadcast_to(
    x.reshape(batch, height, 1, width, 1, channels), (batch, height, 2, width, 2, channels)
  )
  return x.reshape(batch, 2 * height, 2 * width, channels)


def grouped_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolution in groups of as many inputs as outputs, zero "same" padding, no bias.

  A sum of shifted products, since XLA runs grouped convolutions slowly on a CPU.

  Args:
    x: B×H×W×C.
    kernel: rows×columns×G×C, rows and columns odd; output c takes inputs G·(c // G) and on. G = 1
      is a depthwise convolution.
  """
  rows, columns, group, channels = kernel.shape
  batch, height, width, _ = x.shape
  inputs = [x]
  if group > 1:  # the j-th input of every group, for all outputs of the group
    grouped = x.reshape(batch, height, width, channels // group, group)
    inputs = [
      jnp.broadcast_to(jax.lax.slice_in_dim(grouped, j, j + 1, 1, 4), grouped.shape).reshape(
        x.shape
      )
      for j in range(group)
    ]
  pad = [(0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)]
  total = 0
  for j, part in enumerate(inputs):
    part = jnp.pad(part, pad)
    for row in range(rows):
      for column in range(columns):
        # Slices whose ends do not depend on the size are plain ones where sizes are symbolic.
        shifted = window(
          part,
          slice(row, row - rows + 1 if row < rows - 1 else None),
          slice(column, column - columns + 1 if column < columns - 1 else None),
        )
        total = total + shifted * kernel[row, column, j].reshape(1, 1, 1, -1)
  return total


def channel_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """One-dimensional convolution along the channels, zero "same" padding: B×H×W×C, kernel k×1×1."""
  size, channels = kernel.shape[0], x.shape[-1]
  x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (size // 2, size // 2)])
  return sum(
    jax.lax.slice_in_dim(x, tap, tap + channels, 1, 3) * kernel[tap, 0, 0] for tap in range(size)
  )


def embed_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolution of p×p with stride p, no padding: B×H×W×C, kernel p×p×C×O → B×H/p×W/p×O."""
  patch, _, channels, out_channels = kernel.shape
  batch, height, width, _ = x.shape
  # A matrix product: the weight gradient of such a convolution is slow on a CPU.
  x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, -1)
  return x @ kernel.reshape(-1, out_channels)


def embed_phases(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Linear map of p×p pixels that lie H/p and W/p apart, spread over the whole feature (MTU-Net).

  Args:
    x: B×H×W×C, H and W multiples of p.
    kernel: p×p×C×O.

  Returns:
    B×H/p×W/p×O: output (i, j) takes the pixels (i + u·H/p, j + v·W/p) for all u, v < p.
  """
  patch, _, channels, out_channels = kernel.shape
  batch, height, width, _ = x.shape
  x = x.reshape(batch, patch, height // patch, patch, width // patch, channels)
  x = x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, height // patch, width // patch, -1)
  return x @ kernel.reshape(-1, out_channels)


def add_positions(x: jax.Array, table: jax.Array) -> jax.Array:
  """x + the table's rows in raster order: B×H×W×C and at least H·W rows of C."""
  batch, height, width, channels = x.shape
  rows = jax.lax.slice_in_dim(table, 0, height * width)
  return x + rows.reshape(1, height, width, channels)


def pixel_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, first_key: jax.Array, first_value: jax.Array
) -> jax.Array:
  """Softmax attention of every pixel to one further token and to all pixels; float32 logits.

  Args:
    query, key, value: B×H×W×D; logits are query·key, without a scale.
    first_key, first_value: the further token's, B×1×1×D or 1×1×1×D.

  Returns:
    B×H×W×D in value's type.
  """
  batch, height, width, channels = query.shape
  wide = jnp.promote_types(query.dtype, jnp.float32)

  def tokens(x, first=None):
    x = x.reshape(batch, height * width, channels)
    if first is None:
      return x
    first = jnp.broadcast_to(first.reshape(-1, 1, channels), (batch, 1, channels))
    return jnp.concatenate([first.astype(x.dtype), x], 1)

  logits = jnp.einsum(
    "bnd,bmd->bnm",
    tokens(query).astype(wide),
    tokens(key, first_key).astype(wide),
    precision=jax.lax.Precision.HIGHEST,
  )
  weights = jax.nn.softmax(logits, -1).astype(value.dtype)
  y = jnp.einsum("bnm,bmd->bnd", weights, tokens(value, first_value))
  return y.reshape(batch, height, width, channels)


def channel_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, levels: tuple[int, ...]
) -> jax.Array:
  """Attention of channels to channels, by what they have in common over the whole map.

  The logits are cosines of the channels' maps divided by √C, normalised over all pairs of a level
  (no affine, epsilon 1e-5, which is not small beside their variance of about 1e-6). Float32. In a
  window of a frame the cosines are the frame's.

  Args:
    query: B×H×W×Q, the channels of all levels side by side.
    key, value: B×H×W×C.
    levels: number of channels of every level; they add up to Q.

  Returns:
    B×H×W×Q in value's type.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)
  query, key = query.astype(wide), key.astype(wide)
  inverse_query, inverse_key = _inverse_root_mean_square(query), _inverse_root_mean_square(key)
  cosine = spatial_product(query, key) * inverse_query[:, 0, 0, :, None] * inverse_key[:, 0]
  cosine = cosine / key.shape[-1] ** 0.5
  parts, start = [], 0
  for size in levels:
    part = jax.lax.slice_in_dim(cosine, start, start + size, 1, 1)
    centred = part - part.mean((1, 2), keepdims=True)
    part = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2), keepdims=True) + 1e-5)
    parts.append(part)
    start += size
  weights = jax.nn.softmax(jnp.concatenate(parts, 1), -1).astype(value.dtype)
  batch, height, width, channels = value.shape
  y = jnp.einsum("bnj,bij->bni", value.reshape(batch, height * width, channels), weights)
  return y.reshape(batch, height, width, -1)


def _inverse_root_mean_square(x: jax.Array) -> jax.Array:
  """B×1×1×C, over the pixels."""
  square = spatial_mean(jnp.square(x))
  tiny = square < 1e-30  # a map of zeros, for which PyTorch's `normalize` gives zeros, too
  return jnp.where(tiny, 0, jax.lax.rsqrt(jnp.where(tiny, 1, square)))


def spatial_product(x: jax.Array, y: jax.Array) -> jax.Array:
  """B×C×D: mean over the pixels of every channel of x times every one of y, B×H×W×C and B×H×W×D.

  Of the whole frame where x is a window of it.
  """
  window = windows.current(x)
  if window is not None:
    return window.product(x, y)
  x, y = (z.reshape(z.shape[0], z.shape[1] * z.shape[2], z.shape[3]) for z in (x, y))
  product = jnp.einsum("bnc,bnd->bcd", x, y, precision=jax.lax.Precision.HIGHEST)
  return product / x.shape[1]
