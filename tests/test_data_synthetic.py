"""Synthetic scenes keep the promised limits on number, area and contrast of targets."""

import numpy as np
import pytest
from scipy import ndimage

from fdep_jax import data
from fdep_jax.data import synthetic


def targets(mask):
  labels, count = ndimage.label(mask, np.ones((3, 3)))
  return [labels == i + 1 for i in range(count)]


@pytest.fixture(scope="module")
def made():
  return [synthetic.scene(7, i, 96, 112) for i in range(40)]


def test_number_and_area_of_targets_keep_their_limits(made):
  counts = [len(targets(sample.mask)) for sample, _ in made]
  assert min(counts) >= 1 and max(counts) <= 5 and len(set(counts)) >= 4
  areas = [int(t.sum()) for sample, _ in made for t in targets(sample.mask)]
  assert min(areas) >= 2 and max(areas) <= 80
  assert sum(a <= 6 for a in areas) > 10 and sum(a >= 40 for a in areas) > 10


def test_contrast_is_2_to_8_times_the_local_noise(made):
  ratios = []
  for sample, background in made:
    signal = sample.image[..., 0] - background
    for target in targets(sample.mask):
      # The ring around the target, in the frame as it would be without any.
      near = ndimage.binary_dilation(target, np.ones((3, 3)), 2)
      ring = ndimage.binary_dilation(target, np.ones((3, 3)), 8) & ~near
      noise = background[ring].std()
      slack = 0.5 / noise  # grey levels are whole numbers
      ratios.append(signal[target].mean() / noise)
      assert 2 - slack <= signal[target].mean() / noise
      assert signal[target].max() / noise <= 8 + slack
  assert min(ratios) < 4 and max(ratios) > 6


def test_away_from_targets_the_scene_is_its_background(made):
  for sample, background in made:
    far = ~ndimage.binary_dilation(sample.mask, np.ones((3, 3)), 25)
    np.testing.assert_array_equal(sample.image[..., 0][far], np.rint(background)[far])


def test_targets_are_apart_and_inside(made):
  for sample, _ in made:
    parts = targets(sample.mask)
    grown = sum(ndimage.binary_dilation(t, np.ones((3, 3)), 2).astype(int) for t in parts)
    assert grown.max() == 1
    border = np.ones(sample.mask.shape, bool)
    border[4:-4, 4:-4] = False
    assert not (sample.mask & border).any()


def test_scenes_are_deterministic_and_a_longer_list_starts_with_the_shorter():
  short, long = data.scenes(3, 64, seed=1), data.scenes(5, 64, seed=1)
  for a, b in zip(short, long, strict=False):
    assert a.name == b.name
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.mask, b.mask)
  assert (data.scenes(1, 64, seed=2)[0].image != short[0].image).any()
  assert len({s.image.tobytes() for s in long}) == 5


def test_scenes_are_what_the_readers_give():
  sample = data.scenes(1, (64, 80), seed=0)[0]
  assert sample.image.shape == (64, 80, 3) and sample.image.dtype == np.uint8
  assert sample.mask.shape == (64, 80) and sample.mask.dtype == bool
  assert (sample.image == sample.image[..., :1]).all()
  with pytest.raises(ValueError, match="at least 64×64"):
    data.scenes(1, 32, seed=0)


def test_no_single_threshold_finds_the_targets(made):
  # A scene set that brightness alone solves would make the quick start's number worthless.
  grey = np.stack([sample.image[..., 0] for sample, _ in made])
  mask = np.stack([sample.mask for sample, _ in made])
  ious = [((grey > t) & mask).sum() / ((grey > t) | mask).sum() for t in range(0, 250, 5)]
  assert max(ious) < 0.2
