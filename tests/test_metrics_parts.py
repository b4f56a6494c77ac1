"""The parts of the metric against plain loops: components, matching, pixel counts, summaries."""

import numpy as np
import pytest
from skimage import measure

from fdep_jax.metrics import components, pixels


def random_map(rng, height=40, width=50):
  return (np.round(rng.random((height, width)) ** 3 * 20) / 20).astype(np.float32)


def found_in(maps, thresholds, connectivity=8):
  thresholds = np.asarray(thresholds, np.float32)
  index = [components.active_pixels(m, thresholds[0]) for m in maps]
  level = [np.searchsorted(thresholds, m.ravel()[i]) for m, i in zip(maps, index, strict=True)]
  return components.find(index, level, [m.shape for m in maps], len(thresholds), connectivity)


@pytest.mark.parametrize("dense", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("connectivity", [8, 4])
def test_components_are_skimages_in_its_order_on_both_routes(monkeypatch, dense, connectivity):
  monkeypatch.setattr(components, "DENSE", dense)
  rng = np.random.default_rng(0)
  maps = [random_map(rng), np.zeros((30, 30), np.float32), random_map(rng, 17, 64)]
  thresholds = [0.05, 0.3, 0.6, 0.9]
  for tau, found in zip(thresholds, found_in(maps, thresholds, connectivity), strict=True):
    expected = [
      (i, region.area, *region.centroid)
      for i, m in enumerate(maps)
      for region in measure.regionprops(
        measure.label(m > np.float32(tau), connectivity=connectivity // 4)
      )
    ]
    got = list(zip(found.image, found.area, found.row, found.col, strict=True))
    assert got == expected  # to the last bit: a centroid may lie exactly 3 pixels away


def test_near_gives_every_pair_of_one_image_that_is_near_enough():
  rng = np.random.default_rng(1)
  maps = [random_map(rng) for _ in range(3)]
  found, targets = (
    found_in(maps, [0.6])[0],
    found_in([m.T.reshape(m.shape) for m in maps], [0.7])[0],
  )
  target, component, distance = components.near(targets, found, 3.0)
  expected = [
    (t, c)
    for t in range(len(targets))
    for c in range(len(found))
    if targets.image[t] == found.image[c]
    and np.hypot(targets.row[t] - found.row[c], targets.col[t] - found.col[c]) < 3
  ]
  assert len(expected) > 50
  assert list(zip(target, component, strict=True)) == expected
  assert (distance < 3).all()


def test_counts_of_pixels_that_reach_each_edge_are_those_of_a_plain_comparison():
  rng = np.random.default_rng(2)
  maps = [rng.random((300, 500), dtype=np.float32) ** power for power in (1, 8, 30)]
  positives = np.concatenate(
    [rng.random(50, dtype=np.float32), maps[0][:2, :9].ravel(), maps[2][3]]
  )
  _, _, cuts = pixels.edges_of(pixels.bits(positives))
  got = pixels.reached(cuts, [pixels.bits(m) for m in maps])
  everything = np.concatenate([pixels.bits(m) for m in maps])
  assert got.tolist() == [int((everything >= cut).sum()) for cut in cuts]


def test_the_result_does_not_depend_on_how_maps_are_grouped(monkeypatch):
  rng = np.random.default_rng(3)
  maps = [pixels.bits(rng.random(n, dtype=np.float32)) for n in (1, 700, 30, 5000)]
  edges = pixels.edges_of(maps[1])[2]
  whole = pixels.reached(edges, maps)
  monkeypatch.setattr(pixels, "_GROUP", 16)
  assert (pixels.reached(edges, maps) == whole).all()


@pytest.mark.parametrize("number", [0, 1, 5000, 30_000, 1 << 18])
def test_a_summary_has_few_groups_and_brackets_every_count(number):
  rng = np.random.default_rng(number)
  values = np.sort(pixels.bits(rng.random(number, dtype=np.float32)))
  summary = pixels.summarise(values)
  assert len(summary.count) <= 2 * pixels.EXACT and summary.total == number
  edges = np.unique(pixels.bits(rng.random(400, dtype=np.float32)))
  low, high = (pixels.counts_of(edges, [summary], end) for end in ("low", "high"))
  true = pixels.reached(edges, [values]) if number else np.zeros(len(edges))
  assert (low <= true).all() and (true <= high).all()
  assert (high - low <= 1 + (true / pixels.EXACT + 1) ** 2).all()


def test_a_summary_of_few_distinct_scores_is_exact():
  rng = np.random.default_rng(4)
  values = np.sort(pixels.bits(rng.integers(0, 256, 1 << 17).astype(np.float32) / 255))
  summary = pixels.summarise(values)
  assert (summary.low == summary.high).all() and len(summary.count) == 256
