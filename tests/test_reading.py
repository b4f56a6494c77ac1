"""Readings of the metric: ours is the metric itself, and chance does not pass for evidence."""

import json

import numpy as np
import pytest

from benchmarks import corners, reading
from fdep_jax.metrics import hse


@pytest.fixture(scope="module")
def sets():
  """Small sets of 8-bit maps with targets, some found, and clutter."""
  rng, out = np.random.default_rng(0), {}
  for name in reading.tables.DATASETS:
    pairs = []
    for _ in range(4):
      prob, mask = np.zeros((40, 40)), np.zeros((40, 40), bool)
      for _ in range(6):
        row, col = rng.integers(2, 36, 2)
        kind = rng.integers(3)
        if kind < 2:
          mask[row : row + 2, col : col + 2] = True
        if kind:
          prob[row : row + 2, col : col + 3] = np.rint(255 * rng.random((2, 3))) / 255
      pairs.append((prob, mask))
    out[name] = pairs
  return out


def test_our_reading_is_the_metric(sets):
  curves = reading.curves_of(sets)
  joined = sum(sets.values(), [])
  for name, pairs in {**sets, "SIRST3": joined}.items():
    score = hse.score([np.float32(prob) for prob, _ in pairs], [mask for _, mask in pairs])
    assert reading.value(curves, reading.OURS, name) == pytest.approx(100 * score.hse_t, abs=1e-9)


def test_the_search_finds_a_reading_that_is_there_and_confirms_it_on_the_others(sets, monkeypatch):
  # Fewer readings, so that it is quick.
  few = {name: reading.grids()[name] for name in ("0.05 … 0.95 by 0.05", "0.1 … 0.9 by 0.1")}
  monkeypatch.setattr(reading, "grids", lambda: few)
  curves = reading.curves_of(sets)
  hidden = reading.OURS._replace(neighbours=4, average="both by image, none is 0", area="step")
  paper = reading.paper_numbers()
  for name in reading.SETS:
    paper[name]["hse_t"] = reading.value(curves, hidden, name)
  monkeypatch.setattr(reading, "paper_numbers", lambda: paper)
  result = reading.evaluate(sets)
  assert str(hidden) in result["exact_on_all_sets"]
  paper["IRSTD-1K"]["hse_t"] += 0.05  # and none, if a confirming set differs
  result = reading.evaluate(sets)
  assert result["near_on_searched_sets"] and not result["exact_on_all_sets"]
  assert f"{result['readings']:,}" in reading.page(result)["found"]


def test_the_page_shows_what_the_command_found():
  if not reading.RESULT.exists():
    pytest.skip("results/classical/reading.json is not there yet")
  text, result = reading.PAGE.read_text(), json.loads(reading.RESULT.read_text())
  assert reading.fill(text, reading.page(result)) == text
  text = " ".join(text.split())
  ours, paper = (result["scored"]["8 bits, rounded (ours)"]["SIRST3"], result["paper"]["SIRST3"])
  claim = (
    f"ours is {ours['fa_1e6']:.2f}, the paper's {paper['fa_1e6']:.2f}, and DNANet's rule gives"
  )
  assert f"{claim} {ours['fa_by_area']:.2f}." in text
  nipps = json.loads((reading.RESULT.parent / "runs/nipps-SIRST3/metrics.json").read_text())[
    "light"
  ]
  theirs = next(row for row in reading.tables.paper("tableS3") if row["method"] == "NIPPS")
  assert f"NIPPS has {1e6 * nipps['fa']:.2f} against {theirs['fa_1e6']:.2f}." in text
  off = [
    abs(row[name] - result["paper"][name]["hse_t"])
    for row in result["hse_t"][1:-1]
    for name in reading.SETS
  ]
  assert len(off) == 8 * 4 and round(max(off)) == 5
  assert "the eight readings that agree to 0.01 on the searched sets are off by up to five" in text
  best, ours = result["hse_t"][-1], result["hse_t"][0]
  worse = [abs(row[n] - result["paper"][n]["hse_t"]) for row in (best, ours) for n in reading.SETS]
  assert all(mine < default for mine, default in zip(worse[:4], worse[4:], strict=True))
  assert max(worse[:4]) == pytest.approx(result["least_worst_on_all_sets"])
  assert "The last row fits all four sets better than ours." in text
  assert best["reading"].endswith("mean precision · mean recall")  # no area


def test_our_corner_is_the_metric_and_the_others_differ(tmp_path):
  rng = np.random.default_rng(0)
  total = hse.Accumulator()
  for _ in range(6):
    mask = np.zeros((40, 40), bool)
    mask[5:8, 5:8] = mask[30:32, 20:23] = True
    total.update((0.5 * rng.random(mask.shape) + 0.4 * mask).astype(np.float32), mask)
  found = corners.readings({0.05: total})
  assert found[corners.OURS] == pytest.approx(100 * total.result().hse_t, abs=1e-9)
  assert found["no point at recall 0"] <= found[corners.OURS] <= found["precision 1 at recall 0"]
  # By hand: points (0, 0.5), (0.5, 0.5), (1, 1) and (1, 0.2); of equal recall the higher first.
  hits, predicted = np.array([2, 2, 1]), np.array([10, 2, 2])
  assert corners.area(hits, predicted, 2) == pytest.approx(100 * (0.25 + 0.375))
  assert corners.area(hits, predicted, 2, ties="lower") == pytest.approx(100 * (0.25 + 0.175))
  assert corners.area(hits, predicted, 2, start="none") == pytest.approx(37.5)
  assert corners.area(hits, predicted, 2, rule="step") == pytest.approx(75)
