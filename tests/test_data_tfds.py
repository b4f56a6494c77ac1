"""TFDS builders give what the folder reader gives, without TensorFlow."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from fdep_jax import data

pytest.importorskip("tensorflow_datasets")


def write_dataset(root, count, start=0):
  for folder in ("images", "masks", "splits"):
    (root / folder).mkdir(parents=True)
  names = [f"{n:03d}" for n in np.random.default_rng(0).permutation(count) + start]
  for i, name in enumerate(names):
    pixels = np.random.default_rng(i).integers(0, 256, (16 + i, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if i % 2 else pixels).save(root / "images" / f"{name}.png")
    Image.fromarray(np.where(pixels[..., 1] > 250, 255, 90).astype(np.uint8)).save(
      root / "masks" / f"{name}.png"
    )
  (root / "splits" / "train.txt").write_text("\n".join(names[:-2]))
  (root / "splits" / "test.txt").write_text("\n".join(names[-2:]))


def assert_equal(given, expected):
  assert [s.name for s in given] == [s.name for s in expected]
  for a, b in zip(given, expected, strict=True):
    assert a.image.dtype == np.uint8 and a.mask.dtype == bool
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.mask, b.mask)


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_tfds_gives_the_same_arrays_in_the_same_order_as_the_folder(tmp_path, split):
  write_dataset(tmp_path / "manual" / "irstd_1k", 9)
  given = data.load("tfds:irstd1k", split, tmp_path / "tfds", tmp_path / "manual")
  assert_equal(given, data.load(tmp_path / "manual" / "irstd_1k", split))
  assert "tensorflow" not in sys.modules


def test_sirst3_may_be_a_union_and_is_prepared_only_once(tmp_path):
  root = tmp_path / "manual" / "SIRST3"
  write_dataset(root / "NUDT-SIRST", 4)
  write_dataset(root / "NUAA-SIRST", 5, start=2)
  expected = data.read(root, "all")
  arguments = ("sirst3", "all", tmp_path / "tfds")
  assert_equal(data.read_tfds(*arguments, tmp_path / "manual"), expected)
  shutil.rmtree(root)
  assert_equal(data.read_tfds(*arguments), expected)


def test_a_bad_folder_is_refused_and_leaves_nothing_prepared(tmp_path):
  write_dataset(tmp_path / "manual" / "NUDT-SIRST", 4)
  path = next((tmp_path / "manual" / "NUDT-SIRST" / "masks").iterdir())
  Image.fromarray(np.zeros((3, 3), np.uint8)).save(path)
  for _ in range(2):
    with pytest.raises(data.DataError, match="they must be equal"):
      data.read_tfds("nudt_sirst", "train", tmp_path / "tfds", tmp_path / "manual")


def test_missing_folders_and_unknown_names_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no folder NUAA-SIRST here"):
    data.load("tfds:nuaa_sirst", "train", tmp_path / "tfds", tmp_path)
  with pytest.raises(ValueError, match="known: nuaa_sirst, nudt_sirst, irstd1k, sirst3"):
    data.load("tfds:cifar10", "train", tmp_path)
  with pytest.raises(ValueError, match="must be 'train', 'test' or 'all'"):
    data.load("tfds:nuaa_sirst", "val", tmp_path)


@pytest.mark.slow
def test_real_images_are_the_same_through_tfds(shared, tmp_path):
  source, root = shared / "data" / "NUAA-SIRST", tmp_path / "NUAA-SIRST"
  # One grey, one palette, one RGBA that is not exactly grey, one RGB, of different sizes.
  names = ["Misc_140", "Misc_31", "Misc_1", "Misc_23"]
  for folder in ("images", "masks"):
    (root / folder).mkdir(parents=True)
    for name in names:
      shutil.copy(source / folder / f"{name}.png", root / folder)
  (root / "splits").mkdir()
  (root / "splits" / "train.txt").write_text("\n".join(names[:2]))
  (root / "splits" / "test.txt").write_text("\n".join(names[2:]))
  given = data.load("tfds:nuaa_sirst", "all", tmp_path / "tfds", tmp_path)
  assert_equal(given, data.read(root, "all"))
