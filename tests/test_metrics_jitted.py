"""The jitted counts against the CPU's, bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest

from fdep_jax.metrics import hse, jitted, pixels

CANVAS = (64, 80)
SMALL = jitted.Budget(active=2048, components=256, target_pixels=256, targets=64)


def scene(rng, kind):
  """A map with its mask; sizes differ."""
  height, width = rng.integers(1, 64), rng.integers(1, 80)
  mask = rng.random((height, width)) < rng.choice([0, 0.002, 0.01])
  mask |= np.roll(mask, 1, axis=1) & (rng.random(mask.shape) < 0.5)
  prob = rng.random((height, width)) ** 30
  for row, col in np.argwhere(mask) + rng.integers(-3, 4, (mask.sum(), 2)):
    r, c = np.ogrid[:height, :width]
    spread = (r - row) ** 2 + (c - col) ** 2
    prob = np.maximum(prob, rng.random() * np.exp(-spread / rng.integers(1, 6)))
  if kind == "on thresholds":
    prob = np.round(prob * 20) / 20
  return prob.astype(np.float32), mask


def on_canvas(pairs, beyond=0.9):
  probs = np.full((len(pairs), *CANVAS), beyond, np.float32)
  masks = np.ones((len(pairs), *CANVAS), bool)
  sizes = np.array([m.shape for _, m in pairs], np.int32)
  for i, (prob, mask) in enumerate(pairs):
    probs[i, : mask.shape[0], : mask.shape[1]] = prob
    masks[i, : mask.shape[0], : mask.shape[1]] = mask
  return probs, masks, sizes


def assert_same(pairs, budget=SMALL, **options):
  """Asserts equality, and gives the number of images that took the CPU's route."""
  plain, device = hse.Accumulator(**options), hse.Accumulator(**options)
  for prob, mask in pairs:
    plain.update(prob, mask)
  slower = 0
  for i in range(0, len(pairs), 2):  # always two: one compile
    slower += jitted.add(device, *on_canvas(pairs[i : i + 2]), budget=budget)
  for field in dataclasses.fields(hse.Counts):
    ours, theirs = getattr(device.counts(), field.name), getattr(plain.counts(), field.name)
    np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
  for ours, theirs in zip(device.positives, plain.positives, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  for ours, theirs in zip(device.negatives, plain.negatives, strict=True):
    for field in ("high", "low", "count"):
      np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
  return slower


@pytest.mark.parametrize("kind", ["smooth", "on thresholds"])
def test_counts_equal_the_cpus_bit_for_bit(kind):
  rng = np.random.default_rng(0)
  pairs = [scene(rng, kind) for _ in range(48)]
  slower = assert_same(pairs)
  assert slower < 8  # or the test would compare the CPU's route with itself


@pytest.mark.parametrize(
  "options", [{"connectivity": 4}, {"max_distance": 2.5, "thresholds": [0, 0.1]}]
)
def test_counts_equal_the_cpus_with_other_options(options):
  rng = np.random.default_rng(1)
  assert assert_same([scene(rng, "smooth") for _ in range(12)], **options) < 6


def test_what_exceeds_any_budget_takes_the_slower_route_and_is_still_exact():
  budget = jitted.Budget(active=400, components=40, target_pixels=20, targets=6)
  empty = np.zeros((50, 60), np.float32)
  block, crumbs, target, specks = (empty.copy() for _ in range(4))
  block[10:30, 10:30] = 0.8  # 400 pixels
  crumbs[::10, ::8] = 0.8  # 5 × 8 = 40 components
  target[20:24, 20:25] = 1  # 20 pixels
  specks[5:35:5, 7] = 1  # 6 targets
  for prob, mask in ((block, specks), (crumbs, target), (empty, target), (crumbs, specks)):
    more_prob, more_mask = prob.copy(), mask.copy()
    (more_mask if prob is empty or mask is specks and prob is crumbs else more_prob)[44, 44] = 0.8
    assert assert_same([(prob, mask > 0), (more_prob, more_mask > 0)], budget) == 1


def test_a_long_winding_component_is_one():
  prob = np.zeros((63, 79), np.float32)
  prob[::2] = 1
  prob[1::4, -1] = 1
  prob[3::4, 0] = 1
  budget = jitted.Budget(active=4096, components=8, target_pixels=4096, targets=8)
  assert assert_same([(prob, prob > 0), (prob[::-1, ::-1], prob[::-1, ::-1] > 0)], budget) == 0


@pytest.mark.parametrize("gap, hits", [(2, 1), (3, 0)])
def test_a_distance_of_exactly_3_is_settled_in_integers(gap, hits):
  pairs = []
  for size in (1, 2):  # areas 1 and 4: float64 is exact there, too
    mask, prob = np.zeros((60, 70), bool), np.zeros((60, 70), np.float32)
    mask[41 : 41 + size, 50 : 50 + size] = True
    prob[41 : 41 + size, 50 + gap : 50 + gap + size] = 1
    pairs.append((prob, mask))
  assert assert_same(pairs) == 0
  total = hse.Accumulator()
  jitted.add(total, *on_canvas(pairs), budget=SMALL)
  assert total.result().hits == 2 * hits


def test_a_distance_of_3_between_centroids_that_float64_rounds_takes_the_slower_route():
  mask, prob = np.zeros((60, 70), bool), np.zeros((60, 70), np.float32)
  mask[5, 5], mask[6, 5:7] = True, True  # area 3
  prob[5, 8], prob[6, 8:10] = 1, 1
  assert assert_same([(prob, mask), (prob, np.roll(mask, 1))]) == 1


def test_invalid_maps_are_refused_as_on_the_cpu():
  for bad in (np.nan, -0.5, 1.5):
    prob = np.full((5, 5), bad, np.float32)
    with pytest.raises(ValueError, match="NaN|must be in"):
      jitted.add(hse.Accumulator(), *on_canvas([(prob, prob > 2)] * 2), budget=SMALL)
  with pytest.raises(ValueError, match="only 'first'"):
    jitted.add(hse.Accumulator(matching="optimal"), *on_canvas([]))


def test_summaries_beyond_the_exact_ranks_equal_the_cpus(monkeypatch):
  monkeypatch.setattr(pixels, "EXACT", 64)
  pixels.group_starts.cache_clear()
  jax.clear_caches()
  rng = np.random.default_rng(3)
  pairs = [scene(rng, kind) for kind in ("smooth", "on thresholds") * 3]
  try:
    assert assert_same(pairs) < 3
  finally:
    pixels.group_starts.cache_clear()
    jax.clear_caches()


def test_one_compile_serves_every_batch_and_other_thresholds():
  rng = np.random.default_rng(4)
  before = jitted.count_batch._cache_size()
  for options in ({}, {}, {"thresholds": np.arange(1, 20) / 20 + 1e-3 * (np.arange(1, 20) != 10)}):
    total = hse.Accumulator(**options)
    jitted.add(total, *on_canvas([scene(rng, "smooth") for _ in range(4)]), budget=SMALL)
  assert jitted.count_batch._cache_size() == before + 1
