"""Broken files through whatever reads files: processed, or refused with a sentence; never more.

A case is a sound file with a few random edits, made from its number alone. 100 a kind in `make
test`, 2,000 in `make test-full`.
"""

import contextlib
import io
import os
import pickle
import signal
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import Bright, detector, make_folder, mapping, scene, whole, write_legacy, write_zip
from PIL import Image
from safetensors.numpy import save

import converters
from converters import foundation, rules
from fdep_jax import data, predict, priors, score
from fdep_jax.data import frames, samples

COUNTS = [100, pytest.param(2000, marks=pytest.mark.slow)]
SECONDS = 20  # of CPU for one file; measured: below one


@contextlib.contextmanager
def limited(case: int):
  """A file that hangs its reader fails the test."""

  def late(*_):
    raise AssertionError(f"case {case} took more than {SECONDS} s of CPU")

  old = signal.signal(signal.SIGPROF, late)
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, old)


def edited(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
  """A seed with one to four edits; most are small and near the beginning, where headers are."""
  content = bytearray(seeds[rng.integers(len(seeds))])
  for _ in range(rng.integers(1, 5)):
    size = max(len(content), 1)
    place = int(size * rng.random() ** 3)
    match rng.integers(7):
      case 0:
        content[place : place + 1] = bytes([rng.integers(256)])
      case 1:
        content[place : place + 1] = bytes(
          [(content[place] if content else 0) ^ 1 << rng.integers(8)]
        )
      case 2:
        number = int(rng.choice([0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
        content[place : place + 4] = number.to_bytes(4, rng.choice(["little", "big"]))
      case 3:
        del content[place:]
      case 4:
        content[place:place] = rng.bytes(rng.integers(1, 40))
      case 5:
        del content[place : place + int(rng.integers(1, 40))]
      case 6:
        other = seeds[rng.integers(len(seeds))]
        content[place:] = other[place:]
  return bytes(content)


class Bomb:
  """Unpickled, it would run a command."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def pictures(marker) -> list[bytes]:
  """Sound pictures and arrays of many kinds; some are sound and still no frames."""
  grey, colour = scene(20, 24), np.random.default_rng(1).integers(0, 256, (20, 24, 3), np.uint8)
  deep = Image.fromarray(scene(20, 24, np.uint16) * np.uint16(60))
  found = []

  def add(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    found.append(content.getvalue())

  for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
    add(Image.fromarray(colour).convert(mode), "PNG")
    add(Image.fromarray(colour).convert(mode), "TIFF")
  for mode in ("1", "L", "P", "RGB"):
    add(Image.fromarray(colour).convert(mode), "BMP")
  add(deep, "PNG")
  add(Image.fromarray(scene(20, 24, np.float32)), "TIFF")
  for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
    add(deep, "TIFF", compression=compression)
  add(deep, "TIFF", save_all=True, append_images=[deep, deep])
  add(Image.fromarray(grey), "JPEG")
  arrays = [grey, colour / 255, np.float16(grey), np.stack([grey, grey]), grey.astype(complex)]
  arrays += [np.full((4, 4), np.nan), np.zeros((0, 4)), np.array([[Bomb(marker)]])]
  for array in arrays:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    found.append(content.getvalue())
  return [*found, pickle.dumps(Bomb(marker)), b"", b"\x89PNG\r\n\x1a\n"]


@pytest.fixture
def marker(tmp_path):
  """The path of a file that only code out of a file would make."""
  yield tmp_path / "marker"
  assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("count", COUNTS)
def test_broken_pictures_are_predicted_or_listed(tmp_path, monkeypatch, marker, count):
  seeds = pictures(marker)
  monkeypatch.setattr(frames, "MAX_PIXELS", 2**16)  # every new shape compiles; large ones are slow
  source = tmp_path / "in"
  source.mkdir()
  sizes = set()
  for case in range(count):
    path = source / f"{case:04d}{frames.SUFFIXES[case % len(frames.SUFFIXES)]}"
    path.write_bytes(edited(np.random.default_rng(case), seeds))
    with limited(case):
      try:
        found = [frames.grey_levels(frame) for frame in frames.read(path)]
      except frames.FrameError as error:
        assert 5 < len(str(error)) < 400 and "Traceback" not in str(error)
        continue
    for levels in found:
      assert levels.dtype == np.float32 and 0 <= levels.min() <= levels.max() <= 255
    sizes |= {levels.shape[:2] for levels in found}
  result = predict.run(source, tmp_path / "out", detector(Bright()), progress=False)
  named = {frame.file for frame in result.frames} | result.unreadable.keys()
  assert named == {path.name for path in source.iterdir()}
  assert 0.1 * count < len(result.unreadable) < 0.9 * count  # the cases are neither all nor none
  for frame in result.frames:
    with Image.open(tmp_path / "out" / f"{frame.output}_prob.png") as image:
      assert image.size == (frame.width, frame.height)
  assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.parametrize("count", COUNTS)
def test_broken_maps_and_masks_are_scored_or_refused(tmp_path, marker, count):
  seeds = pictures(marker)
  archive = io.BytesIO()
  np.savez(archive, prob=scene() / 255)
  seeds += [archive.getvalue()] * 4
  for name in ("maps", "masks"):
    (tmp_path / name).mkdir()
  good = tmp_path / "masks" / "good.png"
  Image.fromarray(255 * np.uint8(scene(20, 24) == 250)).save(good)
  refused = 0
  for case in range(count):
    suffix = score.READABLE[case % len(score.READABLE)]
    path = tmp_path / "maps" / f"good{suffix}"
    path.write_bytes(edited(np.random.default_rng(case), seeds))
    with limited(case):
      try:
        score.run(tmp_path / "maps", tmp_path / "masks", resamples=0)
      except ValueError as error:
        refused += 1
        assert "good" in str(error) and len(str(error)) < 2000
      with contextlib.suppress(ValueError):
        assert score.read_mask(path).dtype == bool
    path.unlink()
  assert 0.1 * count < refused <= count


def encoded_masks(rng) -> list[bytes]:
  """Masks in the encodings that people use; some are sound and still refused."""
  mask = rng.random((20, 24)) < 0.02
  grey, found = np.uint8(255 * mask), []

  def add(array, kind="PNG", mode=None, **options):
    picture, content = Image.fromarray(array), io.BytesIO()
    (picture.convert(mode) if mode else picture).save(content, kind, **options)
    found.append(content.getvalue())

  for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
    add(grey, mode=mode)
    add(grey, "TIFF", mode)
  for array in (255 - grey, np.uint8(mask), np.uint8(mask * rng.integers(0, 9, mask.shape))):
    add(array)
    add(array, "BMP")
  add(np.uint16(mask) * 65535)
  add(np.uint16(mask) * 65535, "TIFF")
  add(np.float32(mask), "TIFF")
  add(grey, "JPEG", quality=90)
  add(np.dstack([grey, grey * 0, grey * 0]))
  add(np.dstack([grey * 0 + 255] * 3 + [grey]))
  return found


@pytest.mark.parametrize("count", COUNTS)
def test_masks_of_any_encoding_are_read_alike_or_refused(tmp_path, marker, count):
  seeds = encoded_masks(np.random.default_rng(0)) + pictures(marker)
  read = 0
  for case in range(count):
    rng = np.random.default_rng(case)
    content = edited(rng, seeds) if case % 2 else seeds[rng.integers(len(seeds))]
    path = tmp_path / "mask.png"
    path.write_bytes(content)
    found = []
    with limited(case):
      for decode in (
        lambda c=content: samples.decode_mask(c)[0],
        lambda p=path: score.read_mask(p),
      ):
        try:
          found.append(decode())
        except ValueError as error:
          assert 5 < len(str(error)) < 500 and "Traceback" not in str(error)
    for mask in found:
      assert mask.dtype == bool and mask.ndim == 2
    if len(found) == 2:
      np.testing.assert_array_equal(*found)
      read += 1
  assert 0.1 * count < read < 0.9 * count


@pytest.mark.parametrize("count", COUNTS)
def test_split_files_of_any_encoding_are_read_or_refused(tmp_path, count):
  root = make_folder(tmp_path / "data")
  texts = [
    "0\n1\n",
    "0.png\r\n1.png",
    "images/0\n\n./1.PNG ",
    "seq/0\n1",
    "2\n0",
    "é\n0",
    "0\t1\n0",
  ]
  encodings = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1")
  seeds = [text.encode(encoding) for text in texts for encoding in encodings]
  read = 0
  for case in range(count):
    rng = np.random.default_rng(case)
    content = edited(rng, seeds) if case % 2 else seeds[rng.integers(len(seeds))]
    (root / "splits/train.txt").write_bytes(content)
    with limited(case):
      try:
        found = data.read(root, "train")
      except data.DataError as error:
        assert str(root) in str(error) and len(str(error)) < 5000
      else:
        assert {sample.name for sample in found} <= {"0", "1"}
        read += 1
  assert 0.1 * count < read < 0.9 * count


@pytest.mark.parametrize("count", COUNTS)
def test_any_one_prefix_of_the_names_is_found(toy, monkeypatch, count):
  table = types.ModuleType("converters.toy")
  table.rules = toy_rules
  monkeypatch.setitem(sys.modules, "converters.toy", table)
  weights = converters.to_torch(toy.Toy(rngs=nnx.Rngs(0)))
  words = ["module", "model", "net", "_orig_mod", "ema", "state_dict", "0", "stem", "up", "ü"]
  for case in range(count):
    rng = np.random.default_rng(case)
    prefix = "".join(f"{rng.choice(words)}." for _ in range(rng.integers(0, 5)))
    state = {prefix + name: array for name, array in weights.items()}
    broken = case % 3 == 0
    if broken:
      kept = [name for name in state if "num_batches" not in name]  # counters may be absent
      state.pop(kept[rng.integers(len(kept))])
    with limited(case):
      try:
        converters.load_backbone("toy", state)
      except ValueError as error:
        assert broken and "missing" in str(error), (prefix, error)
      else:
        assert not broken


def toy_rules(net):
  """The toy's table; it stands for the eight, whose tables are longer and nothing else."""
  return [
    *(rule for name in ("stem", "down", "skip", "up") for rule in rules.conv_norm(name, name)),
    *((name, name, rules.CONV) for name in ("side", "head")),
  ]


def checkpoints(tmp_path, weights: dict[str, np.ndarray], marker) -> list[bytes]:
  entries = {name: (str(i), array) for i, (name, array) in enumerate(weights.items())}
  storages = {key: array for key, array in entries.values()}
  found = [save(weights), pickle.dumps({"state_dict": Bomb(marker)})]
  for legacy, write in ((False, write_zip), (True, write_legacy)):
    tensors = {n: whole(array, key, legacy=legacy) for n, (key, array) in entries.items()}
    program = mapping({"state_dict": mapping(tensors)})
    found.append(write(tmp_path / "seed.pth", program, storages).read_bytes())
  return found


@pytest.mark.parametrize("count", COUNTS)
def test_broken_checkpoints_are_converted_or_refused(tmp_path, marker, toy, monkeypatch, count):
  table = types.ModuleType("converters.toy")
  table.rules = toy_rules
  monkeypatch.setitem(sys.modules, "converters.toy", table)
  weights = converters.to_torch(toy.Toy(rngs=nnx.Rngs(0)))
  seeds = checkpoints(tmp_path, weights, marker)
  converted = 0
  for case in range(count):
    path = tmp_path / f"{case}.pth"
    path.write_bytes(edited(np.random.default_rng(case), seeds))
    with limited(case):
      try:
        net = converters.load_backbone("toy", path)
      except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 10_000
      else:
        converted += 1
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(net)))
    path.unlink()
  assert 0 < converted < count


def small_prior(kind):
  sizes = {"width": 16, "depth": 2, "heads": 1, "patch": 4}
  sizes |= {} if kind == "dinov3" else {"grid": 2}
  return foundation.state_dict(priors.model_class(kind)(**sizes, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", priors.names())
def test_broken_prior_files_are_loaded_or_refused(tmp_path, marker, kind, count):
  seeds = checkpoints(tmp_path, small_prior(kind), marker)
  loaded = 0
  for case in range(count // 3):
    path = tmp_path / f"{case}.pth"
    path.write_bytes(edited(np.random.default_rng(case), seeds))
    with limited(case):
      try:
        model = converters.load_prior(path, heads=1)
      except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 10_000
      else:
        loaded += 1
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    path.unlink()
  assert 0 < loaded < count // 3


def edited_arrays(rng: np.random.Generator, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A state_dict with one to three names, shapes or types changed."""
  state = dict(state)
  for _ in range(rng.integers(1, 4)):
    name = list(state)[rng.integers(len(state))]
    array, other = state[name], list(state)[rng.integers(len(state))]
    match rng.integers(9):
      case 0:
        del state[name]
      case 1:
        state[other] = array
      case 2:
        state[name.replace("1", "999")] = state.pop(name)
      case 3:
        state[f"teacher.{name}"] = state.pop(name)
      case 4:
        state[name] = array.reshape(-1)[: rng.integers(array.size + 1)]
      case 5:
        state[name] = array[None] if rng.random() < 0.5 else np.float32(0)
      case 6:
        state[name] = array.astype(rng.choice(["int8", "complex64", "bool", "float16", "U4"]))
      case 7:
        state[name] = np.moveaxis(array, 0, -1)
      case 8:
        state[rng.choice(["head.weight", "stages.0.0.gamma", "x" * 500, "", "blocks.7"])] = array
  return state


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", priors.names())
def test_edited_priors_are_loaded_or_refused(kind, count):
  sound, loaded = small_prior(kind), 0
  for case in range(count // 2):
    with limited(case):
      try:
        model = converters.load_prior(edited_arrays(np.random.default_rng(case), sound), heads=1)
      except ValueError as error:
        assert 20 < len(str(error)) < 30_000
      else:
        loaded += 1
        assert model.frozen and model.depth <= 2
  assert loaded < 0.8 * count // 2
