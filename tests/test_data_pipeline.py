"""Training batches: exact resume, the same global batches on any number of processes."""

import itertools
import json

import numpy as np
import pytest

from fdep_jax import data


def make_samples(count, size=24):
  """Frames that carry their number as grey level, so that a batch tells what is in it."""
  samples = []
  for i in range(count):
    image = np.full((size + i % 3, size, 3), i + 1, np.uint8)
    mask = np.zeros(image.shape[:2], bool)
    mask[i % 5, i % 7] = True
    samples.append(data.Sample(f"frame_{i}", image, mask))
  return samples


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys() == {"image", "mask"}
    np.testing.assert_array_equal(x["image"], y["image"])
    np.testing.assert_array_equal(x["mask"], y["mask"])


def start(samples=None, **changes):
  options = {"crop": 32, "batch_size": 4, "seed": 0} | changes
  return data.train_iterator(samples or make_samples(10), **options)


def test_batches_have_the_promised_shapes_and_types():
  batch = next(start())
  assert batch["image"].shape == (4, 32, 32, 3) and batch["image"].dtype == np.uint8
  assert batch["mask"].shape == (4, 32, 32) and batch["mask"].dtype == bool


def test_every_image_occurs_once_per_epoch_and_epochs_differ_in_order():
  batches = take(start(augment="none", crop=24), 15)  # 60 records = 6 epochs of 10
  order = np.concatenate([b["image"][:, 0, 0, 0] for b in batches]).reshape(6, 10)
  for epoch in order:
    assert sorted(epoch) == list(range(1, 11))
  assert len({tuple(e) for e in order}) == 6


def test_a_run_does_not_repeat_the_next_seeds_order():
  orders = []
  for seed in (0, 1):
    batches = take(start(augment="none", crop=24, seed=seed, batch_size=10), 4)
    orders.append([tuple(b["image"][:, 0, 0, 0]) for b in batches])
  assert not set(orders[0]) & set(orders[1])


@pytest.mark.parametrize("augment", ["recipe", "dihedral"])
def test_same_seed_same_batches_whatever_the_threads(augment):
  expected = take(start(augment=augment, prefetch=0), 8)
  assert_same(take(start(augment=augment, prefetch=3, threads=2), 8), expected)
  other = take(start(augment=augment, prefetch=0, seed=1), 8)
  assert any((a["image"] != b["image"]).any() for a, b in zip(other, expected, strict=True))


def test_the_same_image_is_augmented_differently_in_each_epoch():
  textured = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
  one = [data.Sample("one", textured, textured[..., 0] > 250)]
  crops = take(start(one, augment="none", batch_size=1, crop=32), 10)
  assert len({b["image"].tobytes() for b in crops}) == 10


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_is_exact_and_its_state_is_a_small_json(prefetch):
  iterator = start(prefetch=prefetch)
  take(iterator, 7)
  state = json.loads(json.dumps(iterator.get_state()))
  assert state == {"next_index": 7}
  expected = take(iterator, 6)
  resumed = start(prefetch=prefetch)
  take(resumed, 2)
  resumed.set_state(state)
  assert_same(take(resumed, 6), expected)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch_in_order(count):
  whole = take(start(), 6)
  parts = [take(start(process_index=p, process_count=count), 6) for p in range(count)]
  joined = [
    {k: np.concatenate([p[step][k] for p in parts]) for k in ("image", "mask")} for step in range(6)
  ]
  assert_same(joined, whole)


def test_a_state_saved_by_one_process_continues_on_two():
  expected = take(start(), 9)[5:]
  parts = []
  for p in range(2):
    iterator = start(process_index=p, process_count=2)
    iterator.set_state({"next_index": 5})
    parts.append(take(iterator, 4))
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
  assert_same(joined, expected)


def test_target_crops_are_handed_on():
  image, mask = np.zeros((300, 300, 3), np.uint8), np.zeros((300, 300), bool)
  mask[7, 290] = True
  sample = [data.Sample("corner", image, mask)]
  batch = next(start(sample, augment="none", batch_size=16, target_crop_prob=1.0))
  assert batch["mask"].any((1, 2)).all()
  batch = next(start(sample, augment="none", batch_size=16))
  assert batch["mask"].any((1, 2)).sum() < 8


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"augment": "mixup"}, "'recipe', 'dihedral', 'none'"),
    ({"process_count": 3}, "3 processes cannot share"),
    ({"crop": 0}, "at least 1"),
    ({"target_crop_prob": 1.5}, r"\[0, 1\]"),
  ],
)
def test_impossible_settings_are_refused_before_any_batch(changes, message):
  with pytest.raises(ValueError, match=message):
    start(**changes)
  with pytest.raises(ValueError, match="no samples"):
    data.train_iterator([], crop=32, batch_size=4, seed=0)


def sized(*sizes):
  rng = np.random.default_rng(0)
  return [
    data.Sample(str(i), rng.integers(1, 256, (h, w, 3)).astype(np.uint8), np.zeros((h, w), bool))
    for i, (h, w) in enumerate(sizes)
  ]


def test_eval_pads_the_raw_image_at_the_right_and_bottom_and_groups_by_shape():
  samples = sized((30, 40), (33, 64), (32, 64), (1, 33), (64, 64))
  batches = list(data.eval_batches(samples, 32, 2))
  assert [b["image"].shape for b in batches] == [(2, 32, 64, 3), (2, 32, 64, 3), (2, 64, 64, 3)]
  assert [b["indices"] for b in batches] == [[0, 2], [3], [1, 4]]
  for batch in batches:
    assert batch["sizes"] == [samples[i].mask.shape for i in batch["indices"]]
    for image, i, (h, w) in zip(batch["image"], batch["indices"], batch["sizes"], strict=False):
      np.testing.assert_array_equal(image[:h, :w], samples[i].image)
      assert image.sum() == samples[i].image.sum()
  assert not batches[1]["image"][1].any()  # filled up, so that the shape compiles once


def test_eval_wastes_few_rows_and_fits_devices():
  samples = sized(*[(32, 32)] * 17)
  shapes = [b["image"].shape[0] for b in data.eval_batches(samples, 32, 16)]
  assert shapes == [9, 9]
  shapes = [b["image"].shape[0] for b in data.eval_batches(samples, 32, 16, row_multiple=8)]
  assert shapes == [16, 16]
  shapes = [b["image"].shape[0] for b in data.eval_batches(samples[:3], 32, 16, row_multiple=8)]
  assert shapes == [8]
  with pytest.raises(ValueError, match="multiple of row_multiple"):
    data.eval_batches(samples, 32, 12, row_multiple=8)
