"""HSE against sklearn + skimage, and by hand."""

import math
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import hse as benchmark
from fdep_jax.metrics import hse


def drawn(text):
  """A bool mask from rows of # and . separated by blanks."""
  return np.array([[c == "#" for c in row] for row in text.split()])


def assert_equal_to_straightforward(probs, masks, tolerance=1e-6):
  ours = hse.score(probs, masks)
  theirs = benchmark.straightforward(probs, masks)
  for name, value in theirs.items():
    assert getattr(ours, name) == pytest.approx(value, abs=tolerance, nan_ok=True), name
  assert ours.hse == pytest.approx(theirs["hse_p"] * theirs["hse_t"], abs=tolerance)
  streamed = hse.Accumulator()
  for prob, mask in zip(probs, masks, strict=True):
    streamed.update(prob, mask)
  assert streamed.result().as_dict() == ours.as_dict()  # below EXACT pixels nothing is lost
  return ours


@st.composite
def pair(draw):
  """A map with blobs, diagonal contacts, ties on thresholds and plateaus, and its mask."""
  seed, height, width = draw(st.tuples(st.integers(0, 2**32 - 1), *[st.integers(1, 24)] * 2))
  kind = draw(st.sampled_from(["noise", "blobs", "steps", "sparse"]))
  rng = np.random.default_rng(seed)
  mask = rng.random((height, width)) < draw(st.sampled_from([0.01, 0.05, 0.3]))
  prob = rng.random((height, width), dtype=np.float32)
  if kind != "noise":
    # Bright spots near the targets, of other sizes and places, with valleys between them.
    prob *= np.float32(0.3)
    spots = np.argwhere(mask) + rng.integers(-3, 4, (mask.sum(), 2))
    for row, col in spots:
      r, c = np.ogrid[:height, :width]
      peak = rng.random() * np.exp(-((r - row) ** 2 + (c - col) ** 2) / rng.integers(1, 8))
      prob = np.maximum(prob, peak.astype(np.float32))
  if kind == "sparse":
    prob[prob < 0.3] = 0
  if kind == "steps":  # scores that lie exactly on thresholds
    prob = (np.round(prob * 20) / 20).astype(np.float32)
  return prob, mask


@settings(max_examples=100, deadline=None)
@given(st.lists(pair(), min_size=3, max_size=3))
def test_equals_sklearn_and_skimage_on_random_maps_of_mixed_sizes(pairs):
  probs, masks = (list(x) for x in zip(*pairs, strict=True))
  masks[0] = masks[0].copy()
  masks[0].flat[0] = True  # at least one target, on the border
  assert_equal_to_straightforward(probs, masks)


CORNER = drawn("##..... ##..... ....... ....... .....#. ......#")


@pytest.mark.parametrize(
  "prob",
  [
    np.zeros((6, 7), np.float32),
    np.ones((6, 7), np.float32),
    CORNER.astype(np.float32),
    1 - CORNER.astype(np.float32),
    np.full((6, 7), 0.5, np.float32),
    np.full((6, 7), 0.15, np.float32),
  ],
  ids=["empty", "everything", "perfect", "inverted", "on 0.5", "on 0.15"],
)
def test_equals_sklearn_and_skimage_on_constant_and_perfect_maps(prob):
  assert_equal_to_straightforward([prob, prob], [CORNER, np.zeros_like(CORNER)])


def test_equals_sklearn_and_skimage_on_one_pixel():
  for value in (0, 0.3, 1):
    assert_equal_to_straightforward([np.full((1, 1), value, np.float32)], [np.ones((1, 1), bool)])


def test_equals_sklearn_and_skimage_on_200_components_that_merge_and_split():
  r, c = np.mgrid[:140, :210]
  ripple = 0.5 + 0.5 * np.cos(r * math.pi / 7) * np.cos(c * math.pi / 7)
  slope = 0.3 + 0.7 * c / 210
  prob = (ripple * slope).astype(np.float32)
  mask = np.zeros((140, 210), bool)
  mask[::14, ::14] = True
  score = assert_equal_to_straightforward([prob], [mask])
  assert score.targets >= 150 and len(set(score.curves["threshold_predicted"])) > 5


def test_equals_sklearn_and_skimage_on_an_untrained_networks_dense_map():
  rng = np.random.default_rng(0)
  prob = (0.5 + 0.05 * rng.standard_normal((64, 96))).astype(np.float32).clip(0, 1)
  assert_equal_to_straightforward([prob], [rng.random((64, 96)) < 0.01])


def test_perfect_maps_score_one_and_maps_without_any_hit_score_zero_recall():
  perfect = hse.score([CORNER.astype(np.float32)], [CORNER])
  assert (perfect.hse, perfect.hse_p, perfect.hse_t) == (1, 1, 1)
  assert (perfect.iou, perfect.niou, perfect.pd, perfect.fa) == (1, 1, 1, 0)
  nothing = hse.score([np.zeros((6, 7))], [CORNER])
  assert (nothing.hse_t, nothing.pd, nothing.fa, nothing.iou) == (0, 0, 0, 0)


def test_the_target_curve_is_the_hand_computed_one():
  # Two targets. The map has one at 0.9, the other at 0.42, and a false alarm at 0.62:
  # τ < 0.42: 2 of 2 found, 3 predicted; τ < 0.62: 1 of 2 found, 2 predicted;
  # τ < 0.9: 1 of 2 found, 1 predicted; above: none, 0 predicted, precision 1.
  mask = drawn("#........# .......... .......... .......... ..........")
  prob = np.zeros((5, 10), np.float32)
  prob[0, 0], prob[0, 9], prob[4, 5] = 0.9, 0.42, 0.62
  score = hse.score([prob], [mask])
  # Sorted: (0, 1), (0.5, 1), (0.5, 1/2), (1, 2/3)
  assert score.hse_t == pytest.approx(0.5 * 1 + 0.5 * (1 / 2 + 2 / 3) / 2)
  # Pixels: scores 0.9 (+), 0.62 (−), 0.42 (+): precision 1 up to recall 1/2, then 1/2 to 2/3.
  assert score.hse_p == pytest.approx(0.5 * 1 + 0.5 * (1 / 2 + 2 / 3) / 2)
  assert (score.pd, score.fa, score.hits, score.false_alarms) == (0.5, 1 / 50, 1, 1)
  step = hse.score([prob], [mask], area="step")
  assert step.hse_t == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_a_centroid_exactly_3_pixels_away_is_a_miss():
  mask = drawn("#...... ....... .......")
  for col, hits in ((2, 1), (3, 0)):
    prob = np.zeros((3, 7), np.float32)
    prob[0, col] = 1
    assert hse.score([prob], [mask]).hits == hits
  assert hse.score([prob], [mask], max_distance=3.5).hits == 1


def test_the_first_component_in_raster_order_is_claimed_though_a_nearer_one_follows():
  mask = drawn("........ ........ ...#.... ........")
  prob = np.zeros((4, 8), np.float32)
  prob[0, 3], prob[2, 3], prob[2, 4] = 0.9, 0.9, 0.9  # 2 px away, and half a pixel away
  assert hse.score([prob], [mask]).fa == 2 / 32
  assert hse.score([prob], [mask], matching="nearest").fa == 1 / 32


def test_optimal_matching_finds_both_targets_where_the_first_rule_finds_one():
  # The left target would take the middle component, which alone is near the right target.
  mask = drawn("..#...#.. ......... ......... .........")
  prob = np.zeros((4, 9), np.float32)
  prob[0, 4], prob[2, 2] = 0.9, 0.9
  found = {m: hse.score([prob], [mask], matching=m).hits for m in ("first", "nearest", "optimal")}
  assert found == {"first": 1, "nearest": 1, "optimal": 2}


def test_false_alarm_of_the_same_area_as_a_hit_counts_unless_dnanets_rule_is_asked_for():
  mask = drawn("##........ .......... .......... .......... ..........")
  prob = drawn("##........ .......... .......... .......... ........##").astype(np.float32)
  assert hse.score([prob], [mask]).fa == 2 / 50
  assert hse.score([prob], [mask], false_alarm="area").fa == 0


def test_diagonal_neighbours_are_one_component_unless_connectivity_is_4():
  mask = drawn("#.... .#... ..... .....")
  score = hse.score([mask.astype(np.float32)], [mask])
  assert (score.targets, score.false_alarms) == (1, 0)
  assert hse.score([mask.astype(np.float32)], [mask], connectivity=4).targets == 2


def test_options_in_one_object_are_refused_with_the_way_to_give_them():
  options, prob = hse.Options(connectivity=4), CORNER.astype(np.float32)
  for call in (lambda: hse.score([prob], [CORNER], options), lambda: hse.Accumulator(options)):
    with pytest.raises(ValueError, match=r"by name: .*\*\*vars\(options\)"):
      call()
  assert hse.score([prob], [CORNER], **vars(options)).hse == 1


def test_an_empty_image_counts_0_1_or_not_at_all_in_niou():
  empty = np.zeros_like(CORNER)
  maps = [CORNER.astype(np.float32), empty.astype(np.float32)]
  niou = [hse.score(maps, [CORNER, empty], empty_niou=e).niou for e in (0.0, 1.0, None)]
  assert niou == [0.5, 1.0, 1.0]


def test_without_extension_the_curve_starts_at_its_lowest_recall():
  mask, prob = drawn("#.."), np.array([[1, 0, 0]], np.float32)
  assert hse.score([prob], [mask]).hse_t == 1
  assert hse.score([prob], [mask], extend=False).hse_t == 0


def test_a_score_on_a_threshold_is_not_above_it_also_in_float64():
  mask = drawn("#..")
  for k in range(1, 20):
    for dtype in (np.float32, np.float64):
      prob = np.array([[k / 20, 0, 0]], dtype)
      assert list(hse.score([prob], [mask]).curves["threshold_hits"]) == [1] * (k - 1) + [0] * (
        20 - k
      )


def test_a_set_without_targets_warns_and_has_no_hse_but_a_false_alarm_rate():
  with pytest.warns(RuntimeWarning, match="No mask of 2 images has a target"):
    score = hse.score(
      [np.ones((4, 5)), np.zeros((2, 2))], [np.zeros((4, 5), bool), np.zeros((2, 2), bool)]
    )
  for name in ("hse", "hse_p", "hse_t", "pd", "recall", "f1", "roc_auc", "ap"):
    assert math.isnan(getattr(score, name)), name
    assert score.as_dict()[name] is None
  assert score.fa == 20 / 24 and score.iou == 0 and score.niou == 0


def test_merging_in_any_order_gives_the_result_of_one_pass():
  rng = np.random.default_rng(1)
  maps = [rng.random((int(h), 30), dtype=np.float32) for h in rng.integers(5, 60, 9)]
  masks = [rng.random(m.shape) < 0.03 for m in maps]
  whole, left, right = hse.Accumulator(), hse.Accumulator(), hse.Accumulator()
  for i, (prob, mask) in enumerate(zip(maps, masks, strict=True)):
    whole.update(prob, mask)
    (left if i % 2 else right).update(prob, mask)
  right.merge(left)
  assert right.result().as_dict() == whole.result().as_dict() == hse.score(maps, masks).as_dict()
  assert len(right) == 9
  empty = hse.Accumulator()  # a host without images, before and after
  empty.merge(hse.Accumulator())
  empty.merge(right)
  empty.merge(hse.Accumulator())
  assert empty.result().as_dict() == whole.result().as_dict()


def test_an_accumulator_stays_small_and_near_on_maps_larger_than_its_summary():
  rng = np.random.default_rng(2)
  total, maps, masks = hse.Accumulator(), [], []
  for _ in range(4):
    mask = np.zeros((256, 256), bool)
    mask[100:106, 100:105] = True
    prob = rng.random((256, 256), dtype=np.float32) ** 4
    prob[mask] = rng.random(30, dtype=np.float32) ** 0.5
    total.update(prob, mask)
    maps.append(prob), masks.append(mask)
  got, exact = total.result(), hse.score(maps, masks)
  assert 0 < got.hse_p_error
  assert abs(got.hse_p - exact.hse_p) <= got.hse_p_error < 1e-6
  kept = sum(n.high.nbytes + n.low.nbytes + n.count.nbytes for n in total.negatives)
  assert kept <= 4 * 2 * hse.pixels.EXACT * 12 < sum(m.nbytes for m in maps) / 2


def test_accumulators_of_different_options_do_not_merge():
  with pytest.raises(ValueError, match="different options"):
    hse.Accumulator().merge(hse.Accumulator(max_distance=2.0))


def test_every_bad_pair_is_listed_in_one_error():
  good, mask = np.zeros((3, 4), np.float32), np.zeros((3, 4), bool)
  bad = [
    (good * np.nan, mask, "image 0: .*NaN"),
    (good + 2, mask, r"image 1: .*\[2, 2\].*sigmoid"),
    (good[:2], mask, "image 2: .*2×4.*3×4"),
    (good, mask.astype(np.uint8), "image 3: .*uint8.*bool"),
    ((good * 255).astype(np.uint8), mask, "image 4: .*uint8.*floats"),
    (good - 0.1, mask, "image 5: .*must be in"),
  ]
  with pytest.raises(ValueError) as error:
    hse.score([b[0] for b in bad] + [good], [b[1] for b in bad] + [mask])
  for _, _, pattern in bad:
    assert re.search(pattern, str(error.value)), pattern
  assert "image 6" not in str(error.value) and "6 problems" in str(error.value)
  with pytest.raises(ValueError, match="2 probability maps and 1 mask were"):
    hse.score([good, good], [mask])
  with pytest.raises(ValueError, match="0 probability maps"):
    hse.score([], [])
  with pytest.raises(ValueError, match="No image"):
    hse.Accumulator().result()


def test_bad_options_are_listed_in_one_error():
  with pytest.raises(ValueError) as error:
    hse.Options(thresholds=[0.5, 1.5], max_distance=0, area="simpson", connectivity=6, matching="x")
  for name in ("thresholds", "max_distance", "simpson", "connectivity", "matching", "5 problems"):
    assert name in str(error.value)


def test_minus_zero_is_zero():
  mask = drawn("#..")
  prob = np.array([[0.7, -0.0, 0.0]], np.float32)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert hse.score([prob], [mask]).as_dict() == hse.score([abs(prob)], [mask]).as_dict()


def test_agrees_with_pyirstdmetrics_on_iou_niou_pd_and_fa():
  theirs = pytest.importorskip("py_irstd_metrics")
  rng = np.random.default_rng(5)
  targets = theirs.ProbabilityDetectionAndFalseAlarmRate(num_bins=1, distance_threshold=3)
  handlers = {
    "iou": theirs.IoUHandler(with_dynamic=False, with_binary=True, sample_based=False),
    "niou": theirs.IoUHandler(with_dynamic=False, with_binary=True, sample_based=True),
  }
  plain = theirs.CMMetrics(num_bins=2, threshold=0.5, metric_handlers=handlers)
  probs, masks = [], []
  for _ in range(20):
    mask = rng.random((40, 50)) < rng.choice([0, 0.01])
    prob = np.maximum(rng.random((40, 50)) ** 9, np.roll(mask, 1, axis=0) * 0.8).astype(np.float32)
    probs.append(prob), masks.append(mask)
    targets.update(prob, mask), plain.update(prob, mask)
  score, found = hse.score(probs, masks), plain.get()
  assert 0.1 < score.pd < 1 and score.fa > 0
  assert score.pd == pytest.approx(targets.get()["probability_detection"][0], abs=1e-12)
  assert score.fa == pytest.approx(targets.get()["false_alarm"][0], abs=1e-12)
  for name in handlers:
    assert getattr(score, name) == pytest.approx(found[name]["binary"], abs=1e-12)


@pytest.mark.slow
def test_equals_sklearn_and_skimage_and_the_jitted_counts_on_a_trained_acms_maps(shared, tmp_path):
  checkpoint = shared / "weights" / "reference" / "acm_sirst3_1channel.pth.tar"
  benchmark.make_maps(shared / "data", checkpoint, tmp_path, limit=12)
  for name in ("NUAA-SIRST", "NUDT-SIRST"):
    probs, masks = benchmark.read(tmp_path / name, shared / "data" / name / "masks")
    ours, theirs = hse.score(probs, masks), benchmark.straightforward(probs, masks)
    for key, value in theirs.items():
      assert getattr(ours, key) == pytest.approx(value, abs=1e-6), key
    route = benchmark.jitted_route(probs, masks)
    assert route["counts_equal"] and route["score_equal"] and route["compiles"] == 1
    assert route["images_on_the_cpu_route"] < 4


def test_roc_prefers_the_worse_of_two_detectors_and_hse_does_not(tmp_path):
  from benchmarks import why_not_roc

  found = why_not_roc.figure(tmp_path / "figure.png")
  assert found["I"].roc_auc > found["II"].roc_auc + 0.01
  assert found["I"].hse < 0.1 < 0.9 < found["II"].hse
  assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_thresholds_that_merge_targets_are_said():
  hits = np.array([0, 3, 9, 10, 8, 5])
  np.testing.assert_array_equal(hse.merging(hits), [True, True, False, False, False, False])
  prob, mask = np.full((20, 20), 0.06, np.float32), np.zeros((20, 20), bool)
  mask[3:5, 3:5] = mask[14:16, 14:16] = True
  prob[mask] = 0.9
  score = hse.score(prob, mask)
  assert score.hse_t == 0.5  # perfect from 0.1 on; the point at 0.05 starts the curve
  warning = hse.warning_of_merging(score)
  assert warning.startswith("at prob > 0.05 ") and "0 of 2 targets" in warning
  prob[prob < 0.1] = 0.04
  assert hse.score(prob, mask).hse_t == 1 and not hse.warning_of_merging(hse.score(prob, mask))
