"""Every rewritten operation against its definition in float64: values and gradients to 1e-12."""

import inspect
import itertools
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdep_jax.layers import basic, ops


def normal(*shape) -> np.ndarray:
  return np.random.default_rng(sum(shape)).standard_normal(shape)


def assert_same(ours, plain, *arguments):
  """Same value, and same gradient of a random weighting of it, for float64 `arguments`."""
  with jax.enable_x64(True):
    arguments = [jnp.asarray(argument, jnp.float64) for argument in arguments]
    weights = jnp.asarray(normal(*jax.eval_shape(plain, *arguments).shape))

    def value_and_gradients(function):
      def run(arguments, weights):
        value, pull_back = jax.vjp(function, *arguments)
        return value, *pull_back(weights)

      return jax.jit(run)(arguments, weights)

    results, expected = value_and_gradients(ours), value_and_gradients(plain)
    for result, reference in zip(results, expected, strict=True):
      assert result.dtype == reference.dtype == jnp.float64
      np.testing.assert_allclose(result, reference, rtol=1e-12, atol=1e-12, strict=True)


@pytest.mark.parametrize(
  "rows, columns",
  [
    (slice(None), slice(1, -1)),
    (slice(0, None, 2), slice(1, None, 2)),
    (slice(2, 5), slice(0, -2, 3)),
  ],
)
def test_a_window_is_what_indexing_gives(rows, columns):
  assert_same(
    lambda x: ops.window(x, rows, columns), lambda x: x[:, rows, columns], normal(2, 6, 7, 3)
  )


def max_window(x, size, stride, padding):
  window, strides = (1, size, size, 1), (1, stride, stride, 1)
  return jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, window, strides, [(0, 0), *padding, (0, 0)]
  )


def interpolate(x, size, align_corners):
  """Linear interpolation of rows, then of columns, at the positions that PyTorch documents."""
  for axis, new in ((1, size[0]), (2, size[1])):
    old = x.shape[axis]
    if align_corners:  # first and last samples coincide
      positions = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    else:  # half-pixel centres; np.interp repeats the edge
      positions = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.stack([np.interp(positions, np.arange(old), row) for row in np.eye(old)], 1)
    x = jnp.moveaxis(jnp.tensordot(weights, x, (1, axis)), 0, axis)
  return x


@pytest.mark.parametrize("height, width", [(6, 8), (5, 8), (6, 7), (5, 3), (1, 1)])
def test_max_pool2_is_the_window_maximum_also_of_odd_sizes(height, width):
  # Distinct values: where a window holds its maximum twice, the two forms split the gradient
  # differently.
  padding = [(0, height % 2), (0, width % 2)]
  assert_same(ops.max_pool2, lambda x: max_window(x, 2, 2, padding), normal(2, height, width, 3))


def test_max_pool3_stride2_is_the_window_maximum():
  padding = [(1, 1), (1, 1)]
  assert_same(ops.max_pool3_stride2, lambda x: max_window(x, 3, 2, padding), normal(2, 6, 8, 3))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
  "size, new_size",
  [
    ((5, 6), (10, 12)),  # doubling: shifted sums
    ((1, 3), (2, 6)),
    ((8, 6), (4, 3)),  # halving: neighbours of even rows with align_corners
    ((2, 2), (1, 1)),
    ((5, 7), (20, 9)),  # matrices
    ((5, 7), (3, 7)),
    ((1, 4), (5, 1)),
    ((4, 5), (4, 5)),
  ],
)
def test_resize_is_linear_interpolation(size, new_size, align_corners):
  assert_same(
    lambda x: ops.resize(x, new_size, align_corners=align_corners),
    lambda x: interpolate(x, new_size, align_corners),
    normal(2, *size, 3),
  )


@pytest.mark.parametrize("size, new_size", [((5, 6), (10, 12)), ((3, 7), (12, 9))])
def test_resize_without_aligned_corners_enlarges_like_jax_image(size, new_size):
  assert_same(
    lambda x: ops.resize(x, new_size, align_corners=False),
    lambda x: jax.image.resize(x, (2, *new_size, 3), "bilinear"),
    normal(2, *size, 3),
  )


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsample2_doubles_both_axes(align_corners):
  assert_same(
    lambda x: ops.upsample2(x, align_corners=align_corners),
    lambda x: interpolate(x, (6, 10), align_corners),
    normal(2, 3, 5, 4),
  )


@pytest.mark.parametrize("align_corners", [True, False])
def test_a_program_of_any_size_resizes_as_those_of_known_sizes(align_corners):
  def resized(x):  # doubled, halved, and by two small matrices
    height, width = x.shape[1:3]
    sizes = [(2 * height, 2 * width), (height // 2, width // 2), (4 * height, width // 4)]
    return [ops.resize(x, size, align_corners=align_corners) for size in sizes]

  shape = (*jax.export.symbolic_shape("b, 8*h, 8*w"), 3)
  program = jax.export.export(jax.jit(resized))(jax.ShapeDtypeStruct(shape, jnp.float32))
  for size in ((8, 16), (40, 24)):
    x = jnp.asarray(normal(2, *size, 3), jnp.float32)
    for ours, plain in zip(program.call(x), resized(x), strict=True):
      np.testing.assert_allclose(ours, plain, atol=2e-6, strict=True)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size, new_size", [*itertools.product((1, 2, 5), (1, 3, 10))])
def test_rows_of_a_resize_matrix_are_weights_of_at_most_two_neighbours(
  size, new_size, align_corners
):
  matrix = ops.resize_matrix(size, new_size, align_corners)
  assert matrix.shape == (new_size, size)
  np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)
  assert (matrix >= 0).all() and ((matrix > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
  "band, kernel",
  [("ll", "++++"), ("lh", "++--"), ("hl", "+-+-"), ("hh", "+--+")],  # row by row
)
def test_a_haar_band_is_a_depthwise_convolution(band, kernel, stride):
  channels = 3
  kernel = np.array([0.5 if sign == "+" else -0.5 for sign in kernel]).reshape(2, 2, 1, 1)
  padding = [(1, 0), (1, 0)] if stride == 1 else [(0, 0), (0, 0)]

  def plain(x):
    return jax.lax.conv_general_dilated(
      x,
      jnp.asarray(np.tile(kernel, channels)),
      (stride, stride),
      padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=channels,
    )

  assert tuple(ops.haar(jnp.zeros((1, 2, 2, 1)), stride=stride)) == ops.WAVELETS
  assert_same(lambda x: ops.haar(x, stride=stride)[band], plain, normal(2, 6, 8, channels))


@pytest.mark.parametrize(
  "ours, plain",
  [
    (lambda x: ops.max_and_mean(x), lambda x: jnp.stack([x.max(3), x.sum(3) / 5], 3)),
    (lambda x: ops.mean_and_max(x), lambda x: jnp.stack([x.sum(3) / 5, x.max(3)], 3)),
    (lambda x: ops.spatial_mean(x), lambda x: x.sum((1, 2))[:, None, None] / 12),
    (lambda x: ops.spatial_max(x), lambda x: x.reshape(2, 12, 5).max(1)[:, None, None]),
  ],
  ids=["max_and_mean", "mean_and_max", "spatial_mean", "spatial_max"],
)
def test_a_pooled_value_is_what_its_name_says(ours, plain):
  assert_same(ours, plain, normal(2, 3, 4, 5))


def convolve(x, kernel, stride=1, groups=1, padding="SAME"):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


@pytest.mark.parametrize("rows, columns, group", [(3, 3, 1), (3, 3, 2), (1, 7, 1), (5, 1, 3)])
def test_a_grouped_convolution_is_the_plain_one(rows, columns, group):
  channels = 6
  assert_same(
    ops.grouped_conv,
    lambda x, kernel: convolve(x, kernel, groups=channels // group),
    normal(2, 4, 5, channels),
    normal(rows, columns, group, channels),
  )


@pytest.mark.parametrize("size", [3, 5])
def test_a_convolution_along_the_channels_is_one_of_a_row(size):
  assert_same(
    ops.channel_conv,
    lambda x, kernel: convolve(x.reshape(2, 1, 7, 1), kernel.reshape(1, size, 1, 1)).reshape(
      2, 1, 1, 7
    ),
    normal(2, 1, 1, 7),
    normal(size, 1, 1),
  )


def test_nearest_doubling_repeats_every_pixel():
  assert_same(
    ops.upsample_nearest2, lambda x: jnp.kron(x, jnp.ones((1, 2, 2, 1))), normal(2, 3, 5, 4)
  )


def test_patches_are_embedded_by_a_convolution_of_their_size():
  assert_same(
    ops.embed_patches,
    lambda x, kernel: convolve(x, kernel, stride=2, padding="VALID"),
    normal(2, 6, 4, 3),
    normal(2, 2, 3, 5),
  )


def test_phases_are_pixels_spread_over_the_whole_map():
  # A convolution whose taps lie H/p and W/p apart.
  def plain(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "VALID", rhs_dilation=(3, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert_same(ops.embed_phases, plain, normal(2, 6, 4, 3), normal(2, 2, 3, 5))


def test_positions_are_added_in_raster_order():
  assert_same(
    ops.add_positions,
    lambda x, table: jnp.stack(
      [jnp.stack([x[:, i, j] + table[3 * i + j][None] for j in range(3)], 1) for i in range(2)], 1
    ),
    normal(2, 2, 3, 4),
    normal(9, 4),
  )


@pytest.mark.parametrize("batch", [1, 2])
def test_pixels_attend_to_a_first_token_and_to_all_pixels(batch):
  def plain(query, key, value, first_key, first_value):
    def tokens(x, first):
      x = x.reshape(2, 6, 4)
      return jnp.concatenate([jnp.broadcast_to(first[:, 0], (2, 1, 4)), x], 1)

    weights = jnp.exp(query.reshape(2, 6, 4) @ tokens(key, first_key).transpose(0, 2, 1))
    weights = weights / weights.sum(-1, keepdims=True)
    return (weights @ tokens(value, first_value)).reshape(2, 2, 3, 4)

  x, y, z = normal(3, 2, 2, 3, 4)
  first, second = normal(2, batch, 1, 1, 4)
  assert_same(ops.pixel_attention, plain, x, y, z, first, second)


def test_channels_attend_by_normalised_cosines():
  levels = (1, 3)

  def plain(query, key, value):
    def maps(x):
      return x.reshape(2, 6, -1).transpose(0, 2, 1)  # B×C×pixels

    def unit(x):
      return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))

    logits = unit(maps(query)) @ unit(maps(key)).transpose(0, 2, 1) / 5**0.5
    parts = [logits[:, :1], logits[:, 1:]]
    parts = [(p - p.mean((1, 2), keepdims=True)) for p in parts]
    parts = [p / jnp.sqrt(jnp.square(p).mean((1, 2), keepdims=True) + 1e-5) for p in parts]
    weights = jnp.exp(jnp.concatenate(parts, 1))
    weights = weights / weights.sum(-1, keepdims=True)
    return (weights @ maps(value)).transpose(0, 2, 1).reshape(2, 2, 3, 4)

  assert_same(
    lambda *inputs: ops.channel_attention(*inputs, levels=levels),
    plain,
    normal(2, 2, 3, 4),
    normal(2, 2, 3, 5),
    normal(2, 3, 2, 5).reshape(2, 2, 3, 5),
  )


def test_channels_of_zeros_attend_evenly_and_have_a_gradient():
  x = jnp.asarray(normal(1, 2, 3, 4), jnp.float32).at[..., 0].set(0)
  y, pull_back = jax.vjp(lambda x: ops.channel_attention(x, x, x, levels=(4,)), x)
  assert jnp.isfinite(y).all() and jnp.isfinite(pull_back(jnp.ones_like(y))[0]).all()


def test_a_product_of_maps_is_a_mean_over_pixels():
  assert_same(
    ops.spatial_product,
    lambda x, y: (x[..., :, None] * y[..., None, :]).mean((1, 2)),
    normal(2, 3, 4, 5),
    normal(2, 3, 4, 2),
  )


@pytest.mark.parametrize("axes", [(-1,), (1, 2)])
def test_the_largest_has_jaxs_gradient_and_divides_by_no_zero(axes):
  x = jnp.round(normal(2, 3, 4, 5))  # with ties
  assert_same(lambda x: ops.largest(x, axes), lambda x: x.max(axes, keepdims=True), x)
  # As where it was computed with other rounding, nothing equals the maximum.
  gradient = jax.grad(lambda x: ops.largest(x, axes).sum())(x.at[0].set(jnp.nan))
  assert (gradient[0] == 0).all() and jnp.isfinite(gradient).all()


def test_every_operation_is_checked_here():
  public = [
    name
    for name, value in vars(ops).items()
    if inspect.isfunction(value) and value.__module__ == ops.__name__ and name[0] != "_"
  ]
  source = pathlib.Path(__file__).read_text()
  assert [name for name in public if f"ops.{name}" not in source] == []


def layer_with(make, x, kernel, bias):
  """Applies a layer of ours with the given weights."""
  layer = make(nnx.Rngs(0))
  layer.kernel.set_value(kernel)
  layer.bias.set_value(bias)
  return layer(x)


def test_the_transposed_convolution_adds_every_input_pixel_times_the_kernel():
  def reaches(size):  # output y, input i, kernel row k: stride 2, padding 1
    y, i, k = np.ogrid[: 2 * size, :size, :4]
    return jnp.asarray(y == 2 * i - 1 + k, jnp.float64)

  def plain(x, kernel):
    rows, columns = reaches(x.shape[1]), reaches(x.shape[2])
    return jnp.einsum("yik,xjl,bijc,klcd->byxd", rows, columns, x, kernel)

  assert_same(ops.conv_transpose, plain, normal(2, 3, 4, 3), normal(4, 4, 3, 2))


@pytest.mark.parametrize("size, stride, dilation", [(1, 1, 1), (1, 2, 1), (3, 2, 1), (5, 1, 3)])
def test_a_convolution_is_the_plain_one_padded_by_half_its_reach(size, stride, dilation):
  def ours(*arguments):
    options = {"stride": stride, "dilation": dilation}
    return layer_with(lambda rngs: basic.Conv(3, 2, size, **options, rngs=rngs), *arguments)

  def plain(x, kernel, bias):
    pad = dilation * (size // 2)
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      [(pad, pad), (pad, pad)],
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias.reshape(1, 1, 1, -1)

  assert_same(ours, plain, normal(2, 6, 8, 3), normal(size, size, 3, 2), normal(2))


@pytest.mark.parametrize("near", [0.0, 0.3, -5.0])
def test_batch_norm_is_its_formula(near):
  def plain(x, scale, bias):
    mean = x.mean((0, 1, 2), keepdims=True)
    var = jnp.square(x - mean).mean((0, 1, 2), keepdims=True)
    factor = scale.reshape(1, 1, 1, -1) * jax.lax.rsqrt(var + 1e-5)
    return (x - mean) * factor + bias.reshape(1, 1, 1, -1)

  def ours(x, scale, bias):
    return basic.batch_norm(x, scale, bias, jnp.full(3, near, x.dtype), 1e-5)[0]

  assert_same(ours, plain, normal(4, 5, 6, 3) + 0.3, normal(3), normal(3))


def test_batch_norm_keeps_its_digits_far_from_zero():
  x = (1000 + np.random.default_rng(0).standard_normal((4, 32, 32, 2))).astype(np.float32)
  near = x.mean((0, 1, 2)) + 0.1
  _, mean, var = basic.batch_norm(jnp.asarray(x), jnp.ones(2), jnp.zeros(2), near, 1e-5)
  wide = x.astype(np.float64)
  np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("images", [1, 4, 64])
@pytest.mark.parametrize("mean, deviation", [(0, 1), (100, 0.1), (-100.23, 0.1), (37.3, 0.0373)])
def test_batch_norm_has_the_variance_a_thousand_deviations_away(mean, deviation, images):
  """As in the first steps, when the running mean is 0: a plain sum of squares loses it."""
  x = normal(images, 8, 8, 3)
  x[: images // 2] += 0.5  # the images differ, too
  x = (mean + deviation * x).astype(np.float32)
  _, ours, var = basic.batch_norm(x, jnp.ones(3), jnp.zeros(3), jnp.zeros(3), 1e-5)
  wide = x.astype(np.float64)
  np.testing.assert_allclose(ours, wide.mean((0, 1, 2)), rtol=1e-6, atol=1e-6 * deviation)
  np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-3)
