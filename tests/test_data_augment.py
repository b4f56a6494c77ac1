"""The recipe's crop and augmentation: what is drawn, how often, and that masks follow images."""

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from fdep_jax.data import augment

GEOMETRIC = [
  augment.vertical_flip,
  augment.horizontal_flip,
  augment.transpose,
  augment.rotate90,
  augment.rotate,
  augment.shift,
  augment.scale,
]
PHOTOMETRIC = [augment.brightness, augment.contrast, augment.noise]


def blob(height=64, width=64, y=22, x=37):
  """A bright square on black, and its mask."""
  mask = np.zeros((height, width), bool)
  mask[y - 3 : y + 4, x - 3 : x + 4] = True
  return np.repeat(np.where(mask, 200, 0).astype(np.uint8)[..., None], 3, -1), mask


def transformed(transform, image, mask, rng):
  """Draws one transform, and applies it."""
  return augment.apply(image, mask, [transform(len(image), rng)])


def augmented(name, image, mask, rng):
  return augment.apply(image, mask, augment.AUGMENTATIONS[name](len(image), rng))


def warped(image, mask, matrix, shift=0):
  step = augment.about_centre(augment.WARP, matrix, shift, mask.shape)
  return augment.apply(image, mask, [step])


def random_crop(image, mask, size, rng, *options, **named):
  corner = augment.draw_corner(mask, size, rng, *options, **named)
  return augment.cut(image, mask, size, corner)


def centroid(weights):
  y, x = np.indices(weights.shape)
  return np.array([(y * weights).sum(), (x * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("transform", [*GEOMETRIC, "dihedral"])
@pytest.mark.parametrize("seed", range(8))
def test_the_mask_goes_where_the_image_goes(transform, seed):
  apply = augmented if transform == "dihedral" else transformed
  image, mask = apply(transform, *blob(), np.random.default_rng(seed))
  assert image.dtype == np.uint8 and mask.dtype == bool
  assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
  # Nearest and bilinear sampling agree to half a pixel on the centre of a 7×7 square.
  np.testing.assert_allclose(centroid(image[..., 0] / 255), centroid(mask), atol=0.5)
  # Everything that is at least half bright is target, except on a rim of one pixel.
  assert abs(int((image[..., 0] > 100).sum()) - int(mask.sum())) <= 0.35 * mask.sum()


@pytest.mark.parametrize("transform", PHOTOMETRIC)
def test_photometric_transforms_leave_the_mask_alone(transform):
  image, mask = blob()
  changed, same = transformed(transform, image, mask, np.random.default_rng(1))
  assert same is mask
  assert changed.dtype == np.uint8 and (changed != image).any()


def test_draws_are_none_in_half_the_cases_else_three_by_weight():
  rng = np.random.default_rng(0)
  draws = [augment.draw(rng) for _ in range(20_000)]
  lengths = Counter(len(d) for d in draws)
  assert set(lengths) == {0, 3}
  assert lengths[0] / 20_000 == pytest.approx(0.5, abs=0.015)
  counts = Counter(t.__name__ for d in draws for t in d)
  share = {name: n / sum(counts.values()) for name, n in counts.items()}
  # The published list's weights 7×0.5 (one of them twice: doing nothing), 0.3, 3×0.2 of 4.9.
  expected = dict.fromkeys(
    ["vertical_flip", "horizontal_flip", "transpose", "rotate90", "shift", "scale"], 0.5 / 4.9
  )
  expected |= {"unchanged": 1.0 / 4.9, "rotate": 0.3 / 4.9}
  expected |= dict.fromkeys(["brightness", "contrast", "noise"], 0.2 / 4.9)
  assert share == pytest.approx(expected, abs=0.006)
  assert any(len(set(d)) < 3 for d in draws if d)  # with replacement


def test_the_amounts_are_the_recipes():
  rng = np.random.default_rng(0)

  def drawn(transform):
    """400 matrices, and the shifts of the centre, in pixels."""
    steps = np.array([transform(101, rng)[1:] for _ in range(400)]) / augment.UNIT
    matrices = steps[:, :4].reshape(-1, 2, 2)
    return matrices, steps[:, 4:] + matrices @ [50, 50] - 50

  matrices, shifts = drawn(augment.rotate)
  angles = np.rad2deg(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
  assert -45.1 <= angles.min() < -43 and 43 < angles.max() <= 45.1
  np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=2 / augment.UNIT)
  assert abs(shifts).max() < 1e-3
  matrices, shifts = drawn(augment.scale)
  factors = 1 / matrices[:, 0, 0]
  assert 0.799 <= factors.min() < 0.81 and 1.19 < factors.max() <= 1.201
  assert abs(shifts).max() < 1e-3 and not matrices[:, 0, 1].any()
  matrices, shifts = drawn(augment.shift)
  assert (abs(shifts) <= 10.1).all() and (abs(shifts).max(0) > 9.8).all()
  assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.15 and (matrices == np.eye(2)).all()


def test_brightness_contrast_and_noise_have_the_recipes_strength():
  rng = np.random.default_rng(0)
  image, mask = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), bool)
  bright = [int(transformed(augment.brightness, image, mask, rng)[0][0, 0, 0]) for _ in range(400)]
  assert 23 <= min(bright) < 26 and 174 < max(bright) <= 177  # 100 ± 76.5
  strong = [int(transformed(augment.contrast, image, mask, rng)[0][0, 0, 0]) for _ in range(400)]
  assert 70 <= min(strong) < 72 and 128 < max(strong) <= 130
  large = np.full((64, 64, 3), 100, np.uint8)
  noisy = [transformed(augment.noise, large, mask, rng)[0].astype(float) for _ in range(60)]
  variances = [n.var() for n in noisy]  # rounding adds 1/12
  assert 9 < min(variances) < 14 and 46 < max(variances) < 52
  channels = noisy[0].reshape(-1, 3).T
  assert abs(np.corrcoef(channels)[0, 1]) < 0.06


def test_brightness_clips_instead_of_wrapping_round():
  image = np.full((4, 4, 3), 250, np.uint8)
  results = [
    transformed(augment.brightness, image, image[..., 0] > 0, np.random.default_rng(s))[0]
    for s in range(20)
  ]
  assert max(r.max() for r in results) == 255
  assert min(r.min() for r in results) >= 250 - 77


def test_warp_is_exact_where_it_can_be_checked_by_hand():
  image = np.arange(25, dtype=np.uint8).reshape(5, 5)[..., None] * np.array([1, 2, 3], np.uint8)
  mask = image[..., 0] == 12
  same, same_mask = warped(image, mask, np.eye(2), np.zeros(2))
  np.testing.assert_array_equal(same, image)
  np.testing.assert_array_equal(same_mask, mask)
  # One pixel to the right: column 4 now reads column 5, which mirrors column 3 (reflect-101).
  moved, _ = warped(image, mask, np.eye(2), np.array([0.0, 1.0]))
  np.testing.assert_array_equal(moved[..., 0], image[:, [1, 2, 3, 4, 3], 0])
  # Half a pixel down: the mean of two rows, 5 grey levels apart.
  half, _ = warped(image, mask, np.eye(2), np.array([0.5, 0.0]))
  np.testing.assert_array_equal(half[0, :, 1], np.rint(image[0, :, 1] + 5.0))
  # A quarter turn about the centre.
  turn = np.array([[0.0, -1.0], [1.0, 0.0]])
  np.testing.assert_array_equal(warped(image, mask, turn, np.zeros(2))[0], np.rot90(image, -1))


def test_targets_near_the_border_are_mirrored_in_together_with_their_mask():
  image, mask = blob(y=32, x=5)
  image, mask = warped(image, mask, np.eye(2), np.array([0.0, -12.0]))
  np.testing.assert_array_equal(image[..., 0] > 100, mask)
  assert mask.sum() == 2 * 49  # the target moved right by 12, and its mirror image at x = 7


def test_grey_and_coloured_images_are_warped_alike():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (32, 40, 3)).astype(np.uint8)
  mask = image[..., 0] > 200
  matrix = np.array([[0.9, 0.2], [-0.2, 0.9]])
  coloured, _ = warped(image, mask, matrix, np.array([1.5, 2.0]))
  for c in range(3):
    grey = np.repeat(image[..., c : c + 1], 3, -1)
    channel, _ = warped(grey, mask, matrix, np.array([1.5, 2.0]))
    np.testing.assert_array_equal(channel[..., 0], coloured[..., c])


@pytest.mark.parametrize("transform", GEOMETRIC)
def test_a_warp_is_that_of_scipy_in_exact_numbers(transform):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (41, 41, 3)).astype(np.uint8)
  mask = rng.random((41, 41)) < 0.1
  for _ in range(5):
    kind, *numbers = transform(41, rng)
    ours, our_mask = augment.apply(image, mask, [(kind, *numbers)])
    matrix, offset = np.reshape(numbers[:4], (2, 2)) / 2048, np.array(numbers[4:]) / 2048
    # In float64 every product and sum is exact, as the places are multiples of 1/2048.
    for c in range(3):
      theirs = ndimage.affine_transform(
        image[..., c], matrix, offset, order=1, mode="mirror", output=np.float64
      )
      np.testing.assert_array_equal(ours[..., c], np.floor(theirs + 0.5))
    theirs = ndimage.affine_transform(np.uint8(mask), matrix, offset, order=0, mode="mirror")
    np.testing.assert_array_equal(our_mask, theirs > 0)


def test_turns_are_those_of_numpy():
  image = np.arange(49, dtype=np.uint8).reshape(7, 7)[..., None].repeat(3, -1)
  expected = [
    (augment.vertical_flip, {image[::-1].tobytes()}),
    (augment.horizontal_flip, {image[:, ::-1].tobytes()}),
    (augment.transpose, {image.swapaxes(0, 1).tobytes()}),
    (augment.rotate90, {np.rot90(image, turns).tobytes() for turns in range(4)}),
  ]
  rng = np.random.default_rng(0)
  for transform, results in expected:
    pairs = [transformed(transform, image, image[..., 0] > 9, rng) for _ in range(30)]
    assert {found.tobytes() for found, _ in pairs} == results
    assert all(((found[..., 0] > 9) == mask).all() for found, mask in pairs)


def test_dihedral_reaches_all_eight_symmetries_and_changes_no_value():
  image = np.arange(16, dtype=np.uint8).reshape(4, 4)[..., None].repeat(3, -1)
  rng = np.random.default_rng(0)
  seen = {augmented("dihedral", image, image[..., 0] > 3, rng)[0].tobytes() for _ in range(200)}
  assert len(seen) == 8
  assert all(sorted(s) == sorted(image.tobytes()) for s in seen)


@pytest.mark.parametrize("name", list(augment.AUGMENTATIONS))
def test_the_same_generator_state_gives_the_same_pair(name):
  image = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
  mask = image[..., 0] > 220
  for seed in range(6):
    a, b = (augmented(name, image, mask, np.random.default_rng(seed)) for _ in range(2))
    assert a[0].shape == (48, 48, 3) and a[1].shape == (48, 48)
    assert a[0].dtype == np.uint8 and a[1].dtype == bool
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


def test_crop_reaches_every_position_and_pads_with_black_at_the_right_and_bottom():
  image = np.arange(1, 31, dtype=np.uint8).reshape(5, 6)[..., None].repeat(3, -1)
  rng = np.random.default_rng(0)
  corners = {int(random_crop(image, image[..., 0] > 9, 4, rng)[0][0, 0, 0]) for _ in range(200)}
  assert corners == {1, 2, 3, 7, 8, 9}
  padded, mask = random_crop(image, image[..., 0] > 9, 8, rng)
  assert padded.shape == (8, 8, 3) and mask.shape == (8, 8)
  np.testing.assert_array_equal(padded[:5, :6], image)
  assert padded.sum() == image.sum() and mask.sum() == 21


def test_target_crops_hold_a_target_pixel_and_plain_ones_need_not():
  image, mask = np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), bool)
  mask[0, 199] = mask[150, 20] = True
  rng = np.random.default_rng(0)
  aimed = [random_crop(image, mask, 32, rng, 1.0)[1] for _ in range(100)]
  assert all(m.any() for m in aimed)
  assert len({tuple(np.argwhere(m)[0]) for m in aimed}) > 30  # not always at the same place in it
  plain = [random_crop(image, mask, 32, rng)[1] for _ in range(100)]
  assert np.mean([m.any() for m in plain]) < 0.2
  half = [random_crop(image, mask, 32, rng, 0.5)[1] for _ in range(400)]
  assert 0.4 < np.mean([m.any() for m in half]) < 0.65
  empty = np.zeros_like(mask)
  assert random_crop(image, empty, 32, rng, 1.0)[1].shape == (32, 32)


def test_a_margin_lets_windows_reach_into_zeros_at_the_right_and_bottom_only():
  image, mask = np.full((40, 50, 3), 9, np.uint8), np.ones((40, 50), bool)
  seen = set()
  for seed in range(400):
    window, inside = random_crop(image, mask, 16, np.random.default_rng(seed), 0.0, margin=8)
    assert window.shape == (16, 16, 3)
    rows, columns = inside.any(1), inside.any(0)
    assert rows[:8].all() and columns[:8].all()  # zeros are at the end, 8 at the most
    assert (window[inside] == 9).all() and not window[~inside].any()
    seen |= {(int(rows.sum()), 0), (0, int(columns.sum()))}
  assert seen == {(n, 0) for n in range(8, 17)} | {(0, n) for n in range(8, 17)}
