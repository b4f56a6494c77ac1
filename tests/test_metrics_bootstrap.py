"""Bootstrap intervals against re-scoring the drawn images, and the paired comparison."""

import re

import numpy as np
import pytest
from helpers import ROOT

from fdep_jax.metrics import bootstrap, hse, per_image


def scenes(rng, number=12, quality=0.7, size=48):
  """Maps whose targets have scores around `quality`, with their masks."""
  probs, masks = [], []
  for _ in range(number):
    mask = np.zeros((size, size), bool)
    for _ in range(rng.integers(0, 4)):
      r, c = rng.integers(0, size - 3, 2)
      mask[r : r + 3, c : c + 2] = True
    prob = rng.random((size, size)) ** 40
    prob[mask] = np.clip(rng.normal(quality, 0.3, mask.sum()), 0, 1)
    probs.append(prob.astype(np.float32))
    masks.append(mask)
  return probs, masks


def accumulated(probs, masks, **options):
  total = hse.Accumulator(**options)
  for prob, mask in zip(probs, masks, strict=True):
    total.update(prob, mask)
  return total


@pytest.mark.parametrize(
  "options", [{}, {"empty_niou": None, "false_alarm": "area", "extend": False}]
)
def test_each_resample_is_the_score_of_the_drawn_images(options):
  probs, masks = scenes(np.random.default_rng(0))
  weights = bootstrap.draw(len(probs), 5, seed=3)
  values = bootstrap.samples(accumulated(probs, masks, **options), weights)
  for row, weight in enumerate(weights):
    drawn = np.repeat(np.arange(len(probs)), weight.astype(int))
    score = hse.score([probs[i] for i in drawn], [masks[i] for i in drawn], **options)
    for name, value in values.items():
      assert value[row] == pytest.approx(getattr(score, name), abs=1e-9), name


def test_thinning_the_pixel_curve_moves_it_by_far_less_than_an_interval(monkeypatch):
  probs, masks = scenes(np.random.default_rng(1), number=60)
  total = accumulated(probs, masks)
  assert len(np.unique(np.concatenate(total.positives))) > 300
  monkeypatch.setattr(per_image, "POINTS", 128)
  got = bootstrap.samples(total, np.ones((1, 60)))["hse_p"][0]
  assert 0 < abs(got - total.result().hse_p) < 1e-4


def test_intervals_cover_the_score_and_shrink_with_more_images():
  rng = np.random.default_rng(2)
  widths = []
  for number in (10, 160):
    total = accumulated(*scenes(rng, number))
    score = total.result()
    got = bootstrap.intervals(total, resamples=200)
    assert set(got) == set(bootstrap.METRICS)
    for name, (low, high) in got.items():
      assert low <= getattr(score, name) <= high, name
    widths.append(got["hse"][1] - got["hse"][0])
    assert got == bootstrap.intervals(total, resamples=200)
  assert widths[1] < widths[0] / 2


def test_the_better_detector_is_better_with_high_probability_and_no_detector_beats_itself():
  probs, masks = scenes(np.random.default_rng(3), number=40, quality=0.8)
  noisy = [np.clip(p + 0.2 * np.roll(p, 7), 0, 1) for p in probs]
  a, b = accumulated(probs, masks), accumulated(noisy, masks)
  result = bootstrap.compare(a, b, resamples=200)
  assert result["hse_p"]["a_is_better"] > 0.99 and result["hse_p"]["low"] > 0
  assert result["fa"]["difference"] < 0 and result["fa"]["a_is_better"] > 0.99
  back = bootstrap.compare(b, a, resamples=200)
  assert back["hse"]["a_is_better"] == pytest.approx(1 - result["hse"]["a_is_better"])
  assert all(r["a_is_better"] == 0.5 for r in bootstrap.compare(a, a, resamples=50).values())


def test_sets_of_different_images_or_options_are_not_compared():
  probs, masks = scenes(np.random.default_rng(4))
  total = accumulated(probs, masks)
  with pytest.raises(ValueError, match="12 and 11 images"):
    bootstrap.compare(total, accumulated(probs[:-1], masks[:-1]))
  with pytest.raises(ValueError, match="same images and options"):
    bootstrap.compare(total, accumulated(probs, masks, max_distance=2.0))


def test_without_targets_the_intervals_of_hse_are_nan():
  prob, mask = np.full((4, 4), 0.7, np.float32), np.zeros((4, 4), bool)
  got = bootstrap.intervals(accumulated([prob] * 3, [mask] * 3), resamples=10)
  assert np.isnan(got["hse"]).all() and got["fa"] == (1, 1)


def test_the_documented_example_runs(capsys):
  text = (ROOT / "docs/metric.md").read_text().partition("## Intervals")[2]
  probs, masks = scenes(np.random.default_rng(2))
  other_probs, _ = scenes(np.random.default_rng(2), quality=0.4)
  names = {"probs": probs, "other_probs": other_probs, "masks": masks}
  exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
  total = accumulated(probs, masks)
  low, high = bootstrap.intervals(total)["hse"]
  gap = total.result().hse - accumulated(other_probs, masks).result().hse
  first, second = capsys.readouterr().out.splitlines()
  assert first == f"HSE {total.result().hse:.4f}, 95 % interval {low:.4f} to {high:.4f}"
  assert second.startswith(f"difference {gap:.4f}, ")


def test_an_interval_of_one_point_is_said_to_be_no_certainty():
  headings = {"pd": "Pd", "hse": "HSE", "fa": "Fa"}
  assert bootstrap.note({"pd": (0.9, 1.0), "hse": (None, None)}, headings) == ""
  said = bootstrap.note({"pd": (1.0, 1.0), "fa": [0.0, 0.0], "hse": (np.nan, np.nan)}, headings)
  assert said.startswith("an interval of one point (Pd, Fa) says that all images agree")
