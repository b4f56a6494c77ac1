"""The counts of every image: of any order, by either route, and kept in a file."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import samples_and_maps

from fdep_jax import evaluate
from fdep_jax.metrics import bootstrap, hse, jitted, per_image


@pytest.fixture(scope="module")
def scenes():
  """Images of ten sizes and the maps of two detectors."""
  samples, maps = samples_and_maps()
  noisy = [np.clip(p + np.float32(0.2) * np.roll(p, 7), 0, 1) for p in maps]
  return samples, [{"light": a, "main": b} for a, b in zip(maps, noisy, strict=True)]


def assert_same(ours: per_image.PerImage, theirs: per_image.PerImage):
  assert ours.options == theirs.options
  for field in dataclasses.fields(hse.Counts):
    ours_, theirs_ = (getattr(x.counts, field.name) for x in (ours, theirs))
    np.testing.assert_array_equal(ours_, theirs_, field.name)
  np.testing.assert_array_equal(ours.positives, theirs.positives)
  np.testing.assert_array_equal(ours.reached, theirs.reached)


def test_intervals_and_comparisons_from_the_file_are_those_of_the_maps(scenes, tmp_path):
  samples, maps = scenes
  totals = evaluate.accumulate(enumerate(maps), samples)
  path = tmp_path / per_image.FILE
  per_image.save(path, totals)
  assert path.stat().st_size < 40_000  # ten crowded images, two branches
  found = per_image.load(path)
  assert list(found) == ["light", "main"]
  for name, total in totals.items():
    assert_same(found[name], per_image.of(total))
    assert bootstrap.intervals(found[name], 50) == bootstrap.intervals(total, 50)
  pairs = [bootstrap.compare(x["light"], x["main"], 50) for x in (found, totals)]
  assert pairs[0] == pairs[1] and pairs[0]["hse_p"]["difference"] != 0
  again = tmp_path / "again.npz"
  per_image.save(again, found)
  assert again.read_bytes() == path.read_bytes()


def test_images_are_counted_in_the_order_of_the_samples_whatever_comes_first(scenes):
  samples, maps = scenes
  first = evaluate.accumulate(enumerate(maps), samples)
  back = evaluate.accumulate(list(enumerate(maps))[::-1], samples)
  for name, total in first.items():
    assert total.counts().pixels.tolist() == [s.mask.size for s in samples]
    assert_same(per_image.of(back[name]), per_image.of(total))


def test_a_selection_of_images_scores_as_if_they_were_alone(scenes):
  samples, maps = scenes
  total = evaluate.accumulate(enumerate(maps), samples)["main"]
  alone = hse.Accumulator()
  for i in (7, 2, 3):
    alone.update(maps[i]["main"], samples[i].mask)
  assert total.select([7, 2, 3]).result() == alone.result()


def test_the_jitted_counter_gives_the_counts_of_numpy(scenes, monkeypatch):
  samples, maps = scenes
  added = []
  add = jitted.add
  monkeypatch.setattr(jitted, "add", lambda *a: added.append(a[1].shape) or add(*a))
  found = []
  for route in (False, True):
    monkeypatch.setattr(evaluate, "COUNT_JITTED", route)
    found.append(evaluate.accumulate(enumerate(maps), samples))
  # Ten images a branch, eight at once, all on the one canvas that every image fits into.
  assert added == 4 * [(8, 96, 96)]
  for name, total in found[0].items():
    assert_same(per_image.of(found[1][name]), per_image.of(total))
    assert found[1][name].result() == total.result()


def test_the_jitted_counter_adds_no_image_that_was_not_given(scenes):
  samples, maps = scenes
  counter = jitted.Counter(hse.Accumulator(), (96, 96))
  for i in range(3):
    counter.update(maps[i]["light"], samples[i].mask)
  counter.flush()
  counter.flush()
  assert counter.total.counts().pixels.tolist() == [s.mask.size for s in samples[:3]]


def test_the_route_is_the_jitted_one_where_the_backend_is_no_cpu(scenes, monkeypatch):
  samples, _ = scenes
  for backend, kind in (("cpu", hse.Accumulator), ("gpu", jitted.Counter), ("tpu", jitted.Counter)):
    monkeypatch.setattr(evaluate.jax, "default_backend", lambda backend=backend: backend)
    assert isinstance(evaluate._counter(samples), kind)


def test_a_file_that_is_damaged_or_of_another_kind_is_refused(tmp_path):
  path = tmp_path / per_image.FILE
  for write in (
    lambda: path.write_bytes(b"PK\x03\x04 not an archive"),
    lambda: path.write_bytes(b""),
    lambda: np.savez(path, other=np.ones(3)),
    lambda: np.savez(path, **{"light.options": np.array(json.dumps({"area": "none"}))}),
  ):
    write()
    with pytest.raises(ValueError, match="damaged, or holds no counts of images"):
      per_image.load(path)


def test_without_any_target_the_file_still_has_its_counts(tmp_path):
  total = hse.Accumulator()
  for _ in range(3):
    total.update(np.full((300, 300), 0.7, np.float32), np.zeros((300, 300), bool))
  per_image.save(tmp_path / per_image.FILE, {"light": total})
  found = per_image.load(tmp_path / per_image.FILE)["light"]
  assert found.counts.predicted_pixels.tolist() == 3 * [90_000]  # more than 16 bits hold
  assert bootstrap.intervals(found, 10)["fa"] == (1, 1)
