"""Intervals cover what they should as often as they say, in simulations whose truth is known."""

import numpy as np
import pytest

from fdep_jax.metrics import bootstrap, hse, per_image

TRIALS, IMAGES = 200, 60
METRICS = ("iou", "niou", "pd", "hse")


def allowed(level, trials):
  """Three standard errors of a share of `trials`, around `level`."""
  error = 3 * np.sqrt(level * (1 - level) / trials)
  return level - error, level + error


def detector(noise, seed=0, count=400, size=12):
  """Accumulates a population of images, whose targets are found with a probability of their own.

  The images are the same for every detector; `noise` makes it worse.
  """
  scenes, own = np.random.default_rng(0), np.random.default_rng(seed)
  total = hse.Accumulator()
  for _ in range(count):
    mask = np.zeros((size, size), bool)
    ease = scenes.beta(1.5, 1)  # of the image, for all detectors
    for row, column in ((1, 1), (7, 1), (1, 7))[: scenes.integers(1, 4)]:
      mask[row : row + 2, column : column + 2] = True
    clutter = scenes.random((size, size)) ** 12 * (1.2 - ease)
    score = np.where(mask, 0.15 + ease, clutter) + noise * own.normal(size=mask.shape)
    total.update(np.clip(score, 0, 1).astype(np.float32), mask)
  return total


def subset(total, places):
  """A test set of some images of the population."""
  counts = total.counts()
  drawn = hse.Accumulator()
  drawn.update_counts(
    hse.Counts(**{name: value[places] for name, value in vars(counts).items()}),
    [total.positives[i] for i in places],
    [total.negatives[i] for i in places],
  )
  return drawn


def truth(total):
  found = bootstrap.samples(total, np.ones((1, len(total))))
  return {name: value[0] for name, value in found.items()}


@pytest.fixture(scope="module", autouse=True)
def coarse_curves():
  """Curves of fewer points, which take a tenth of the time and change the truth in the same way."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(per_image, "POINTS", 64)
    yield


@pytest.fixture(scope="module")
def populations(coarse_curves):
  return detector(0.12, seed=1), detector(0.16, seed=2)


@pytest.fixture(scope="module")
def trials(populations):
  """Test sets drawn from the population: the same images of both detectors."""
  rng = np.random.default_rng(5)
  drawn = [rng.integers(0, len(populations[0]), IMAGES) for _ in range(TRIALS)]
  return [tuple(subset(total, places) for total in populations) for places in drawn]


def share_covered(trials, value, level):
  inside = dict.fromkeys(METRICS, 0)
  for i, (ours, _) in enumerate(trials):
    found = bootstrap.intervals(ours, resamples=200, level=level, seed=i)
    for name in METRICS:
      inside[name] += found[name][0] <= value[name] <= found[name][1]
  return {name: count / len(trials) for name, count in inside.items()}


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say(populations, trials):
  value = truth(populations[0])
  low, high = allowed(0.95, TRIALS)
  for name, share in share_covered(trials, value, 0.95).items():
    assert low <= share <= high, (name, share)
  for name, share in share_covered(trials[:100], value, 0.68).items():
    assert share < allowed(0.95, 100)[0], (name, share)


def test_the_default_interval_is_the_one_of_95_percent(trials):
  ours = trials[0][0]
  assert bootstrap.intervals(ours) == bootstrap.intervals(ours, 1000, 0.95, 0)
  ends = bootstrap.samples(ours, bootstrap.draw(IMAGES, 1000, 0))["iou"]
  expected = np.quantile(ends, [0.025, 0.975])
  np.testing.assert_allclose(bootstrap.intervals(ours)["iou"], expected, rtol=1e-12)


def test_paired_intervals_cover_the_difference_and_independent_ones_are_too_wide(
  populations, trials
):
  a, b = map(truth, populations)
  count = 120
  inside, widths = dict.fromkeys(METRICS, 0), []
  for i, (ours, theirs) in enumerate(trials[:count]):
    found = bootstrap.compare(ours, theirs, resamples=200, seed=i)
    for name in METRICS:
      inside[name] += found[name]["low"] <= a[name] - b[name] <= found[name]["high"]
    if i < 20:
      left = bootstrap.samples(ours, bootstrap.draw(IMAGES, 200, 1000 + i))
      right = bootstrap.samples(theirs, bootstrap.draw(IMAGES, 200, 2000 + i))
      for name in METRICS:
        ends = np.quantile(left[name] - right[name], [0.025, 0.975])
        widths.append((found[name]["high"] - found[name]["low"]) / (ends[1] - ends[0]))
  assert np.mean(widths) < 0.8
  low, high = allowed(0.95, count)
  for name in METRICS:
    assert low <= inside[name] / count <= high, (name, inside[name])


def test_every_image_is_drawn_equally_often_and_seeds_differ():
  weights = bootstrap.draw(20, 2000, seed=3)
  assert (weights.sum(1) == 20).all() and weights.min() == 0
  # With replacement: the count of an image has the variance 1 − 1/20.
  np.testing.assert_allclose(weights.mean(0), 1, atol=4 * np.sqrt(0.95 / 2000))
  assert weights.var() == pytest.approx(0.95, abs=0.03)
  np.testing.assert_array_equal(weights, bootstrap.draw(20, 2000, seed=3))
  assert (weights != bootstrap.draw(20, 2000, seed=4)).any()


def test_t_intervals_of_a_few_seeds_cover_the_mean_and_normal_ones_do_not():
  rng = np.random.default_rng(0)
  covered, normal = 0, 0
  for _ in range(2000):
    values = rng.normal(7.0, 2.0, 3)
    low, high = bootstrap.t_interval(values.tolist())
    covered += low <= 7 <= high
    reach = 1.96 * values.std(ddof=1) / np.sqrt(3)
    normal += abs(values.mean() - 7) <= reach
  error = 3 * np.sqrt(0.95 * 0.05 / 2000)
  assert abs(covered / 2000 - 0.95) < error
  assert normal / 2000 < 0.95 - 5 * error


def test_a_t_interval_is_that_of_a_printed_table():
  # t of 2 degrees of freedom at 97.5 %: 4.303; of 1: 12.706.
  assert bootstrap.t_interval([1.0, 2.0, 3.0]) == pytest.approx(
    (2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3
  )
  low, high = bootstrap.t_interval([0.0, 2.0])
  assert (low, high) == pytest.approx((1 - 12.706, 1 + 12.706), abs=1e-3)
  assert np.isnan(bootstrap.t_interval([1.0])).all()
