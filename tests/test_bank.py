"""The prior bank: the levels of its crops, what it is made of, and training from it."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import threading
import types
from concurrent import futures

import jax
import numpy as np
import pytest
from helpers import lines, parameters, toy_config

from fdep_jax import build, data, train
from fdep_jax.priors import Prior, bank
from fdep_jax.runtime import mesh


def make_crops(count=3, **changes):
  options = {"per_image": 2, "size": 28, "seed": 0} | changes
  return data.CropBank(data.scenes(count, 64, seed=1), **options)


@pytest.fixture(scope="module")
def prior():
  return build.load_prior(toy_config())


def prepared(folder, crops, prior, devices=2, step=0):
  made = bank.Bank(folder, crops, prior)
  made.prepare(step, 4, mesh.make(devices), progress=False)
  return made


def test_levels_are_those_computed_on_the_fly_rounded_to_bfloat16(tmp_path, prior):
  crops = make_crops()
  made = prepared(tmp_path, crops, prior)
  image = np.stack([crops.crop(number)[0] for number in (5, 0, 3)])
  compute = jax.jit(lambda prior, image: prior.levels(image))
  for ours, theirs in zip(made.levels([5, 0, 3]), compute(prior, image), strict=True):
    assert ours.shape == (3, 2, 2, prior.width) and ours.dtype == "bfloat16"
    # Half a unit in the last of 8 bits, and the rounding of another batch size.
    np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=2**-8, atol=1e-5)


def test_a_crop_depends_on_its_number_alone_and_is_drawn_once_in_k_epochs():
  crops = make_crops()
  stream = data.train_iterator(crops.samples, crop=28, batch_size=3, seed=0, bank=crops, prefetch=0)
  batches = list(itertools.islice(stream, 4))  # 12 records: the 6 crops twice
  numbers = np.concatenate([batch["crop"] for batch in batches])
  assert sorted(numbers[:6]) == sorted(numbers[6:]) == list(range(6))
  for number in range(6):
    image, mask = crops.crop(number)
    assert image.shape == (28, 28, 3) and mask.dtype == bool
    np.testing.assert_array_equal(crops.crop(number)[0], image)
  for batch in batches:
    for number, mask in zip(batch["crop"], batch["mask"], strict=True):
      np.testing.assert_array_equal(mask, crops.crop(number)[1])
  assert len({crops.crop(number)[0].tobytes() for number in range(12)}) == 12


def test_only_the_detectors_input_is_jittered():
  crops = make_crops(count=40, per_image=1)
  stream = data.train_iterator(crops.samples, crop=28, batch_size=40, seed=0, bank=crops)
  batch = next(stream)
  stream.close()
  same = [
    (image == crops.crop(number)[0]).all()
    for number, image in zip(batch["crop"], batch["image"], strict=True)
  ]
  # None of three draws out of weights 0.6 of 4.3 is photometric, or nothing is drawn.
  assert 0.55 < np.mean(same) < 1.0  # 0.82 expected


def test_crops_are_drawn_anew_at_a_refresh(tmp_path, prior):
  crops = make_crops(refresh_steps=2)
  stream = data.train_iterator(crops.samples, crop=28, batch_size=3, seed=0, bank=crops)
  numbers = [next(stream)["crop"] for _ in range(6)]
  stream.close()
  assert [set(n // len(crops)) for n in numbers] == [{0}, {0}, {1}, {1}, {2}, {2}]
  made = bank.Bank(tmp_path, crops, prior)
  first = []
  for step in (1, 2):
    made.prepare(step, 4, mesh.make(1), progress=False)
    first.append(made.levels(numbers[step])[0])
  assert (first[0] != first[1]).any()
  assert [path.name for path in tmp_path.glob("generation_*")] == ["generation_1"]


def test_an_interrupted_bank_is_continued_not_begun_again(tmp_path, prior, monkeypatch):
  crops = make_crops(count=6)
  whole = prepared(tmp_path / "whole", crops, prior, devices=1)
  seen, levels_of = [], bank._levels_of

  def failing(*arguments):
    compute = levels_of(*arguments)

    def counted(prior, image):
      seen.append(len(image))
      if len(seen) == 3:
        raise KeyboardInterrupt
      return compute(prior, image)

    return counted

  monkeypatch.setattr(bank, "_levels_of", failing)
  with pytest.raises(KeyboardInterrupt):
    prepared(tmp_path / "part", crops, prior, devices=1)
  part = prepared(tmp_path / "part", crops, prior, devices=1)
  assert seen == [4, 4, 4, 4]  # 12 crops, the third batch twice
  prepared(tmp_path / "part", crops, prior, devices=1)
  assert len(seen) == 4
  for a, b in zip(part.levels(range(12)), whole.levels(range(12)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_bank_that_other_processes_began_is_begun_again(tmp_path, prior, monkeypatch):
  crops, me = make_crops(count=8, per_image=1), threading.local()
  numbers = {crops.crop(number)[0].tobytes(): number for number in range(8)}
  for name, stand_in in (("put_batch", lambda batch, _: batch), ("local_rows", np.asarray)):
    monkeypatch.setattr(mesh, name, stand_in)
  monkeypatch.setattr(Prior, "placed", lambda self, the_mesh: self)

  def fill(count, batches):
    """Threads stand in for processes that end after some batches; a level is a crop's number."""
    together, given = threading.Barrier(count, timeout=10), [0] * count

    def minimum(value):
      given[me.process] = value
      together.wait()
      least = min(given)
      together.wait()
      return least

    def compute(prior, image):
      me.batches += 1
      if me.batches > batches:
        raise KeyboardInterrupt
      shape = (2, 2, prior.width)
      levels = [np.full((len(prior.blocks), *shape), numbers[one.tobytes()]) for one in image]
      return np.stack(levels).astype("bfloat16")

    def process(index):
      me.process, me.batches = index, 0
      made = bank.Bank(tmp_path, crops, prior)
      with contextlib.suppress(KeyboardInterrupt):
        made.prepare(0, count, types.SimpleNamespace(devices=np.zeros(count)), progress=False)
        return [int(number) for number in made.levels(range(8))[0][:, 0, 0, 0]]

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: me.process)
    monkeypatch.setattr(mesh, "minimum", minimum)
    monkeypatch.setattr(bank, "_barrier", lambda name: together.wait())
    monkeypatch.setattr(bank, "_levels_of", lambda the_mesh: compute)
    with futures.ThreadPoolExecutor(count) as pool:
      return list(pool.map(process, range(count)))

  assert fill(count=4, batches=1) == [None] * 4  # each has written one of its two crops
  assert fill(count=2, batches=4) == [list(range(8))] * 2
  assert fill(count=4, batches=0) == [list(range(8))] * 4  # a whole bank is read by any number


@pytest.mark.parametrize(
  "change", [{"size": 42}, {"seed": 1}, {"augment": "none"}, {"count": 4}, {"crop_margin": 8}]
)
def test_a_bank_of_other_crops_is_refused(tmp_path, prior, change):
  prepared(tmp_path, make_crops(), prior)
  with pytest.raises(ValueError, match="contains a different prior bank:\n.* there, .* here"):
    bank.Bank(tmp_path, make_crops(**change), prior)


def test_of_different_runs_that_begin_a_bank_together_the_second_is_refused(tmp_path, prior):
  first, second, third = (bank.Bank(tmp_path, make_crops(seed=seed), prior) for seed in range(3))
  first.prepare(0, 4, mesh.make(1), progress=False)
  with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
    second.prepare(0, 4, mesh.make(1), progress=False)
  (tmp_path / "generation_0" / "shard_0.done").write_text("4")  # the first was ended before
  with pytest.raises(ValueError, match="seed: 0 there, 2 here"):
    third.prepare(0, 4, mesh.make(1), progress=False)


def test_a_bank_of_other_weights_or_levels_is_refused(tmp_path, prior):
  prepared(tmp_path, make_crops(), prior)
  for other in ({"sha256": "0" * 64}, {"blocks": (0, 3)}):
    with pytest.raises(ValueError, match="dino_sha256: random|levels: "):
      bank.Bank(tmp_path, make_crops(), dataclasses.replace(prior, **other))


def test_a_bank_that_the_disk_cannot_hold_is_refused_before_anything_is_written(
  tmp_path, prior, monkeypatch
):
  crops = make_crops(per_image=5)
  one = 4 * 2 * 2 * prior.width * 2  # levels, tokens, width, bytes
  usage = shutil.disk_usage(tmp_path)._replace(free=3 * 3 * one + 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(ValueError, match=r"prior\.bank=5 needs 0\.0 GB .*prior\.bank=3 fits"):
    bank.Bank(tmp_path / "bank", crops, prior)
  assert not list(tmp_path.iterdir())


def test_training_from_a_bank_resumes_exactly_and_its_step_has_no_vit(toy, tmp_path):
  changes = {"prior.bank": 2, "prior.bank_refresh_epochs": 2.0, "log.every_steps": 1}
  config = toy_config(**changes)
  train.train(config, tmp_path / "a")
  train.train(toy_config(**changes, **{"train.steps": 5}), tmp_path / "b")
  shutil.rmtree(tmp_path / "b" / "bank")  # also when its levels have to be computed again
  train.train(config, tmp_path / "b")
  a, b = (parameters(tmp_path / name, config) for name in "ab")
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], key)
  assert len([line for line in lines(tmp_path / "b") if "loss" in line]) == 8
  described = json.loads(next((tmp_path / "a" / "bank").glob("*/bank.json")).read_text())
  assert described["dino_sha256"] == "random" and described["generation"] == 1
