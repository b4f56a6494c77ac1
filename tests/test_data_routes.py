"""The ways of input: crops made by numpy or on the devices, samples in memory or decoded lazily."""

import itertools
import logging
import os
import subprocess
import sys
import weakref

import jax
import numpy as np
import optax
import pytest
from helpers import ROOT, make_folder, parameters, toy_config
from PIL import Image

from fdep_jax import data, settings, train
from fdep_jax import step as step_lib
from fdep_jax.data import resident
from fdep_jax.runtime import mesh


def mixed_samples(count=12, coloured=True):
  """Textured frames of many sizes, every third one coloured; some are smaller than a crop."""
  rng = np.random.default_rng(0)
  samples = []
  for i in range(count):
    height, width = rng.integers(40, 110, 2)
    channels = 3 if coloured and i % 3 == 0 else 1
    image = rng.integers(0, 256, (height, width, channels)).astype(np.uint8)
    image = np.ascontiguousarray(np.broadcast_to(image, (height, width, 3)))
    samples.append(data.Sample(f"frame_{i}", image, rng.random((height, width)) < 0.1))
  return samples


def both_routes(samples, devices=2, **changes):
  """Yields the batches of numpy, and of the devices."""
  options = {"crop": 64, "batch_size": 8, "seed": 3} | changes
  the_mesh = mesh.make(devices)
  memory = resident.Resident(samples, options["crop"], the_mesh)
  drawn = data.train_iterator(samples, **options, on_device=True, prefetch=0)
  for expected in data.train_iterator(samples, **options, prefetch=0):
    choices = next(drawn)
    assert choices.keys() - {"choice"} == expected.keys() - {"image", "mask"}
    yield expected, memory.batch(mesh.put_batch(choices["choice"], the_mesh))


def assert_equal_batches(pairs, count):
  for expected, found in itertools.islice(pairs, count):
    assert found["image"].dtype == np.uint8 and found["mask"].dtype == bool
    for name in found:
      np.testing.assert_array_equal(expected[name], found[name], name)


@pytest.mark.parametrize("coloured", [True, False])
@pytest.mark.parametrize("augment", ["recipe", "dihedral", "none"])
def test_both_routes_give_the_same_bits(augment, coloured):
  options = {"augment": augment, "target_crop_prob": 0.3, "crop_margin": 8}
  assert_equal_batches(both_routes(mixed_samples(coloured=coloured), **options), 12)


def test_both_routes_give_the_same_bits_of_a_banks_crops():
  samples = mixed_samples()
  bank = data.CropBank(samples, per_image=2, size=64, seed=0, refresh_steps=4)
  assert_equal_batches(both_routes(samples, bank=bank), 8)


def test_an_accelerator_computes_all_samples_at_once_and_the_same_bits(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert_equal_batches(both_routes(mixed_samples(), devices=1), 6)


def test_only_what_is_drawn_travels_to_the_devices():
  samples, the_mesh = mixed_samples(), mesh.make(2)
  memory = resident.Resident(samples, 64, the_mesh)
  choices = next(data.train_iterator(samples, crop=64, batch_size=8, seed=0, on_device=True))
  assert choices.keys() == {"choice"} and choices["choice"].nbytes == 8 * 96
  placed = mesh.put_batch(choices["choice"], the_mesh)
  program = memory.program(placed)
  for word in ("infeed", "outfeed", "send", "recv", "callback", "all-gather", "all-to-all"):
    assert f" {word}" not in program, word
  (entry,) = [line for line in program.splitlines() if line.startswith("ENTRY")]
  assert entry.count("param") == 3  # the memory, its table and the choices
  with jax.transfer_guard("disallow"):
    jax.block_until_ready(memory.batch(placed))


def test_grey_images_take_two_bytes_a_pixel_and_a_set_that_does_not_fit_is_refused(monkeypatch):
  samples = [data.Sample("a", np.zeros((100, 50, 3), np.uint8), np.zeros((100, 50), bool))] * 9
  sysconf = os.sysconf
  pages = -(-9 * 2 * 100 * 50 * 2 // 4096)  # for two devices

  def counts(name):
    return {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}.get(name) or sysconf(name)

  monkeypatch.setattr(os, "sysconf", counts)
  resident.check_room(samples, mesh.make(2))
  with pytest.raises(ValueError, match=r"data.on_device=True needs 0.00 GB .* free. Leave it out"):
    resident.check_room([*samples, samples[0]], mesh.make(2))


@pytest.mark.parametrize("bank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_continued_on_the_other_route_ends_with_the_same_bits(toy, tmp_path, bank):
  changes = {"prior.bank": bank, "mode": "fdep" if bank else "original"}
  changes |= {"host_devices": 2, "data.target_crop_prob": 0.3}
  config = toy_config(**changes)
  train.train(config, tmp_path / "numpy")
  train.train(toy_config(**changes, **{"train.steps": 4}), tmp_path / "both")
  train.train(toy_config(**changes, **{"data.on_device": True}), tmp_path / "both")
  a, b = (parameters(tmp_path / name, config) for name in ("numpy", "both"))
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], key)


@pytest.mark.parametrize(
  "changes",
  [
    {"mode": "original"},
    {"mode": "original", "data.on_device": True},
    pytest.param({"prior.bank": 2, "prior.bank_refresh_epochs": 2.0}, marks=pytest.mark.slow),
    pytest.param({"prior.bank": 2, "data.on_device": True}, marks=pytest.mark.slow),
  ],
)
def test_several_steps_of_a_dispatch_are_as_many_steps(toy, tmp_path, changes, monkeypatch):
  # AdamW would make steps of opposite directions of gradients that differ by rounding around 0.
  monkeypatch.setattr(step_lib, "make_optimizer", lambda *_: optax.sgd(0.1))
  sizes, step = [], train.Loop._step
  monkeypatch.setattr(
    train.Loop, "_step", lambda self, batches: sizes.append(len(batches)) or step(self, batches)
  )
  changes = {"host_devices": 2, "log.every_steps": 6, "eval.every_epochs": 4.0, **changes}
  single, several = (toy_config(**changes, **{"train.steps_per_dispatch": n}) for n in (1, 3))
  train.train(single, tmp_path / "single")
  sizes.clear()
  train.train(several, tmp_path / "several")
  assert sizes == [3, 1, 1, 1, 1, 1]  # checkpoints after steps 4 and 8, a log's line after step 6
  shorter = several.copy_and_resolve_references()
  shorter.train.steps = 4
  train.train(shorter, tmp_path / "continued")
  train.train(several, tmp_path / "continued")
  a, b, c = (parameters(tmp_path / name, single) for name in ("single", "several", "continued"))
  for key in a:
    np.testing.assert_allclose(b[key], a[key], rtol=1e-4, atol=1e-5, err_msg=key)
    np.testing.assert_array_equal(b[key], c[key], key)
  with pytest.raises(ValueError, match="steps_per_dispatch"):
    train.train(single, tmp_path / "several")


def test_contradictory_routes_are_refused():
  with pytest.raises(ValueError, match="data.lazy and data.on_device are both True"):
    settings.check(toy_config(**{"data.lazy": True, "data.on_device": True}))
  with pytest.raises(ValueError, match="train.labels is 'pseudo'.* Set data.lazy=False"):
    settings.check(
      toy_config(**{"data.lazy": True, "train.labels": "pseudo", "train.teacher": "x"})
    )


# Samples that are decoded lazily.


def assert_same_samples(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert a.name == b.name
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.mask, b.mask)


def test_lazy_samples_are_those_in_memory(tmp_path):
  root = make_folder(tmp_path / "set", 24)
  lazy, eager = (data.read(root, "train", lazy=choice) for choice in (True, False))
  assert isinstance(lazy, data.LazySamples) and isinstance(eager, list)
  assert_same_samples(lazy, eager)
  assert_same_samples(lazy[2:7:2], eager[2:7:2])
  assert_same_samples([lazy[-1]], [eager[-1]])
  assert data.sizes(lazy) == data.sizes(eager) == [(40, 48)] * 12
  assert data.statistics(lazy) == data.statistics(eager)
  assert data.fingerprint(lazy) == data.fingerprint(eager)
  for ours, theirs in zip(
    data.split_validation(lazy, 0.25, 0), data.split_validation(eager, 0.25, 0), strict=True
  ):
    assert isinstance(ours, data.LazySamples)
    assert_same_samples(ours, theirs)
    assert data.sizes(ours) == data.sizes(theirs)
  assert_same_samples(data.draw(lazy, 5, seed=2), data.draw(eager, 5, seed=2))
  for ours, theirs in zip(data.eval_batches(lazy), data.eval_batches(eager), strict=True):
    np.testing.assert_array_equal(ours["image"], theirs["image"])
    assert ours["indices"] == theirs["indices"] and ours["sizes"] == theirs["sizes"]


def test_lazy_reading_lists_the_same_problems_and_warns_once(tmp_path, caplog):
  root = make_folder(tmp_path / "set", 8)
  Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "masks/0.png")
  (root / "images/2.png").write_bytes(b"no picture")
  messages = []
  for lazy in (False, True):
    with pytest.raises(data.DataError) as caught:
      data.read(root, "train", lazy=lazy)
    messages.append(str(caught.value))
  assert messages[0] == messages[1] and "masks/0.png" in messages[0]
  large = np.zeros((40, 48), np.uint8)
  large[:20] = 255  # more than small targets cover
  root = make_folder(tmp_path / "large", 8)
  Image.fromarray(large).save(root / "masks/0.png")
  with caplog.at_level(logging.WARNING):
    samples = data.read(root, "train", lazy=True)
    list(samples), samples[0]
  assert len([r for r in caplog.records if "masks/0.png" in r.getMessage()]) == 1


def test_a_file_that_is_damaged_later_is_named(tmp_path):
  root = make_folder(tmp_path / "set", 8)
  samples = data.read(root, "train", lazy=True)
  (root / "images/1.png").write_bytes(b"")
  with pytest.raises(data.DataError, match=r"images/1.png: .* when the program began"):
    list(samples)


def test_a_run_continued_with_lazy_samples_ends_with_the_same_bits(toy, tmp_path):
  changes = {"mode": "original", "data.root": str(make_folder(tmp_path / "set", 24))}
  changes |= {"prior.checkpoint": "none"}
  config = toy_config(**changes)
  train.train(config, tmp_path / "a")
  train.train(toy_config(**changes, **{"train.steps": 4}), tmp_path / "b")
  train.train(toy_config(**changes, **{"data.lazy": True}), tmp_path / "b")
  a, b = (parameters(tmp_path / name, config) for name in "ab")
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], key)
  scores = [train.evaluate.evaluate(tmp_path / name)["light"] for name in "ab"]
  assert scores[0] == scores[1]


def test_few_lazy_samples_are_in_memory_at_a_time():
  alive, most = weakref.WeakValueDictionary(), []

  class Frame(np.ndarray):
    """An array that can be counted."""

  def decode(place):
    image = np.full((32, 32, 3), place % 256, np.uint8).view(Frame)
    alive[len(most)] = image
    most.append(len(alive))
    return data.Sample(str(place), image, np.zeros((32, 32), bool))

  def uses(samples):
    yield data.statistics(samples)
    yield data.fingerprint(samples)
    for batch in data.eval_batches(samples, batch_size=8):
      yield len(batch["indices"])
    stream = data.train_iterator(samples, crop=32, batch_size=4, seed=0, threads=2)
    yield from itertools.islice(stream, 60)
    stream.close()

  samples = data.LazySamples(decode, [(32, 32)] * 300)
  assert len(most) == 0
  for _ in uses(samples):
    pass
  assert len(most) > 300 * 3 and max(most) < 60


MEASURED = """
import resource, sys
from helpers import toy_backbone, toy_config
from fdep_jax import train
with toy_backbone():
  config = toy_config(**{"mode": "original", "data.root": sys.argv[1], "data.lazy": True,
                         "prior.checkpoint": "none", "train.steps": 12, "eval.every_epochs": 1e6})
  train.train(config, sys.argv[2])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_20000_files_train_in_the_memory_of_500(tmp_path):
  peaks = {}
  for count in (500, 20_000):
    root = make_folder(tmp_path / str(count), 4)
    for kind in ("images", "masks"):
      for i in range(2):  # larger: in memory, 20,000 pairs would take 1.2 GiB
        with Image.open(root / kind / f"{i}.png") as picture:
          small = np.asarray(picture)
        Image.fromarray(np.pad(small, ((0, 88), (0, 80)))).save(root / kind / f"{i}.png")
      for i in range(4, count):
        os.link(root / kind / f"{i % 2}.png", root / kind / f"more{i}.png")
    names = ["0", "1", *(f"more{i}" for i in range(4, count))]
    (root / "splits/train.txt").write_text("\n".join(names))
    found = subprocess.run(
      [sys.executable, "-c", MEASURED, root, tmp_path / f"run{count}"],
      env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    peaks[count] = int(found.stdout.split()[-1]) / 2**20  # GiB
  assert peaks[20_000] - peaks[500] < 0.5, peaks  # 0.27 measured
