"""Folder layouts are read the same, and bad folders are refused in one message."""

import logging
import shutil

import numpy as np
import pytest
from helpers import deep_tiff
from PIL import Image
from scipy import ndimage

from fdep_jax import data
from fdep_jax.data import folders, samples


def save(path, array, mode=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  picture = Image.fromarray(array)
  (picture.convert(mode) if mode else picture).save(path)


def write_pair(root, name, seed, image="images", mask="masks", suffix=""):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (20 + seed, 30, 3)).astype(np.uint8)
  truth = np.zeros(pixels.shape[:2], np.uint8)
  truth[3:6, 4:6] = 255
  save(root / image / f"{name}.png", pixels)
  save(root / mask / f"{name}{suffix}.png", truth)
  return pixels, truth > 0


def write_dataset(root, names=("Misc_2", "Misc_10", "Misc_1"), suffix=""):
  """Three pairs; the last one is the test set."""
  for i, name in enumerate(names):
    write_pair(root, name, i, suffix=suffix)
  (root / "splits").mkdir()
  (root / "splits" / "train.txt").write_text("\n".join(names[:-1]) + "\n")
  (root / "splits" / "test.txt").write_text(names[-1])
  return root


def names_of(root, split):
  return [s.name for s in data.read(root, split)]


def refusal(root, split="train"):
  with pytest.raises(data.DataError) as caught:
    data.read(root, split)
  return str(caught.value)


def test_a_pair_comes_back_as_it_was_written(tmp_path):
  root = write_dataset(tmp_path / "set")
  pixels, truth = write_pair(root, "Misc_2", 0)
  sample = data.read(root, "train")[0]
  assert sample.name == "Misc_2"
  assert sample.image.dtype == np.uint8 and sample.mask.dtype == bool
  np.testing.assert_array_equal(sample.image, pixels)
  np.testing.assert_array_equal(sample.mask, truth)


def test_all_is_train_then_test_in_the_order_of_the_split_files(tmp_path):
  root = write_dataset(tmp_path / "set")
  assert names_of(root, "all") == ["Misc_2", "Misc_10", "Misc_1"]
  assert names_of(root, "test") == ["Misc_1"]
  assert data.validate(root) == {"train": 2, "test": 1}


@pytest.mark.parametrize(
  "text",
  ["Misc_2\r\nMisc_10\r\n", "Misc_2.png\nMisc_10.png", "\ufeffMisc_2\n\n images/Misc_10.PNG "],
)
def test_split_files_may_have_extensions_crlf_and_no_last_newline(tmp_path, text):
  root = write_dataset(tmp_path / "set")
  (root / "splits" / "train.txt").write_bytes(text.encode())
  assert names_of(root, "train") == ["Misc_2", "Misc_10"]


def test_img_idx_layout_is_found_by_the_folder_name_or_if_it_is_the_only_one(tmp_path):
  root = write_dataset(tmp_path / "NUDT-SIRST")
  (root / "img_idx").mkdir()
  for split in ("train", "test"):
    (root / "splits" / f"{split}.txt").rename(root / "img_idx" / f"{split}_NUDT-SIRST.txt")
  assert names_of(root, "train") == ["Misc_2", "Misc_10"]
  renamed = root.rename(tmp_path / "renamed")
  assert names_of(renamed, "train") == ["Misc_2", "Misc_10"]
  (renamed / "img_idx" / "train_SIRST3.txt").write_text("Misc_2")
  assert "rename the right one to" in refusal(renamed)


def test_irstd1k_folder_names_and_pixels0_masks_are_understood(tmp_path):
  root = write_dataset(tmp_path / "set", suffix="_pixels0")
  (root / "images").rename(root / "IRSTD1k_Img")
  (root / "masks").rename(root / "IRSTD1k_Label")
  assert len(data.read(root, "all")) == 3


def test_pal_layout_reads_val_as_test_and_origin_if_train_is_absent(tmp_path):
  for half, names in (("train", ["Misc_10", "Misc_2"]), ("val", ["Misc_3"])):
    for i, name in enumerate(names):
      write_pair(tmp_path / half, name, i, "img", "mask")
  assert names_of(tmp_path, "all") == ["Misc_2", "Misc_10", "Misc_3"]
  (tmp_path / "train").rename(tmp_path / "origin")
  assert names_of(tmp_path, "train") == ["Misc_2", "Misc_10"]
  (tmp_path / "origin" / "mask" / "Misc_2.png").unlink()
  assert "Misc_2 has no mask" in refusal(tmp_path)


def test_a_folder_of_datasets_is_their_union_in_the_papers_order(tmp_path):
  root = tmp_path / "SIRST3"
  write_dataset(root / "irstd_1k", ["XDU1", "XDU2", "XDU3"])
  write_dataset(root / "NUDT-SIRST", ["1", "2", "3"])
  write_dataset(root / "NUAA-SIRST")
  write_dataset(root / "Extra", ["2", "5", "1"])
  assert names_of(root, "train") == (
    ["Misc_2", "Misc_10", "NUDT-SIRST_1", "NUDT-SIRST_2", "XDU1", "XDU2", "Extra_2", "5"]
  )
  assert names_of(root, "test") == ["Misc_1", "3", "XDU3", "Extra_1"]
  shutil.rmtree(root / "NUDT-SIRST" / "images")
  shutil.rmtree(root / "NUDT-SIRST" / "masks")
  assert "NUDT-SIRST: no dataset in this folder" in refusal(root)


def test_every_problem_is_in_one_message(tmp_path):
  root = write_dataset(tmp_path / "set", ["a", "b", "c", "d", "e", "f", "g", "h"])
  (root / "splits" / "train.txt").write_text("a\nb\nc\nd\ne\nf\ng\nnowhere\na\n")
  (root / "images" / "b.png").unlink()
  (root / "masks" / "c.png").unlink()
  save(root / "masks" / "d.png", np.full((40, 50), 255, np.uint8))
  (root / "images" / "e.png").write_bytes((root / "images" / "e.png").read_bytes()[:200])
  save(root / "masks" / "f.png", np.ones((25, 30), np.uint8))
  (root / "splits" / "test.txt").write_text("h\ng\n")
  message = refusal(root)
  for expected in (
    "8 problems",
    "train: a is listed 2 times",
    "b has no image",
    "c has no mask",
    "nowhere has no image and no mask",
    "g is in both train and test",
    "masks/d.png: mask is 50×40, its image d.png 30×23",
    "images/e.png: cannot be decoded",
    "masks/f.png: mask holds only 0 and 1; multiply it by 255",
  ):
    assert expected in message


def test_missing_things_are_also_file_not_found_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such folder"):
    data.read(tmp_path / "absent", "train")
  with pytest.raises(FileNotFoundError, match="is empty"):
    data.read(tmp_path, "train")
  root = write_dataset(tmp_path / "set")
  (root / "splits" / "test.txt").unlink()
  with pytest.raises(FileNotFoundError, match=r"img_idx/test_set.txt or splits/test.txt"):
    data.read(root, "test")
  assert len(data.read(root, "train")) == 2
  for path in (root / "images").iterdir():
    path.unlink()
  with pytest.raises(FileNotFoundError, match="no image files"):
    data.read(root, "train")


def test_a_wrong_size_is_not_a_file_not_found_error(tmp_path):
  root = write_dataset(tmp_path / "set")
  save(root / "masks" / "Misc_2.png", np.full((4, 4), 255, np.uint8))
  with pytest.raises(data.DataError) as caught:
    data.read(root, "train")
  assert not isinstance(caught.value, FileNotFoundError)


def test_single_empty_masks_are_legal_but_not_only_empty_ones(tmp_path):
  root = write_dataset(tmp_path / "set")
  save(root / "masks" / "Misc_2.png", np.zeros((20, 30), np.uint8))
  assert not data.read(root, "train")[0].mask.any()
  save(root / "masks" / "Misc_10.png", np.zeros((21, 30), np.uint8))
  assert "all 2 masks are empty" in refusal(root)


def test_a_mask_that_is_emptied_by_the_cut_is_warned_of(tmp_path, caplog):
  root = write_dataset(tmp_path / "set")
  save(root / "masks" / "Misc_2.png", np.full((20, 30), 90, np.uint8))
  with caplog.at_level(logging.WARNING):
    assert not data.read(root, "train")[0].mask.any()
  assert "Misc_2.png: no pixel is > 127 (largest: 90)" in caplog.text


def test_grey_masks_are_cut_above_127(tmp_path):
  root = write_dataset(tmp_path / "set")
  grey = np.full((20, 30), 127, np.uint8)
  grey[5, 5:8] = 128
  save(root / "masks" / "Misc_2.png", grey)
  assert data.read(root, "train")[0].mask.sum() == 3


def test_two_split_files_that_differ_are_refused(tmp_path):
  root = write_dataset(tmp_path / "set")
  (root / "train.txt").write_text("Misc_10\nMisc_2")
  assert names_of(root, "train") == ["Misc_2", "Misc_10"]
  (root / "train.txt").write_text("Misc_10")
  assert "list different names" in refusal(root)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
  grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
  if mode == "1":
    grey = np.where(grey > 100, 255, 0).astype(np.uint8)
  save(tmp_path / "a.png", grey, mode)
  content = (tmp_path / "a.png").read_bytes()
  np.testing.assert_array_equal(samples.decode_image(content), np.repeat(grey[..., None], 3, -1))
  grey = np.where(np.arange(64).reshape(8, 8) < 5, 255, 0).astype(np.uint8)
  save(tmp_path / "b.png", grey, mode)
  mask, _ = samples.decode_mask((tmp_path / "b.png").read_bytes())
  np.testing.assert_array_equal(mask, grey > 127)


def png_16_bit_rgb():
  import struct
  import zlib

  def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
  header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )


def test_16_bit_images_are_refused_never_mangled(tmp_path):
  save(tmp_path / "grey.png", np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000)
  save(tmp_path / "float.tif", np.ones((4, 4), np.float32))
  contents = [(tmp_path / n).read_bytes() for n in ("grey.png", "float.tif")] + [png_16_bit_rgb()]
  deep = np.full((4, 4, 4), 300, np.uint16)  # the high byte alone is 1
  contents += [deep_tiff(deep[..., :3]), deep_tiff(deep), deep_tiff(deep[..., :3], planes=True)]
  for content in contents:
    with pytest.raises(ValueError, match="more than 8 bits"):
      samples.decode_image(content)


def test_a_png_cut_anywhere_in_its_pixels_is_refused(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
  save(tmp_path / "a.png", pixels)
  content = (tmp_path / "a.png").read_bytes()
  for length in range(0, len(content) - 24, 7):  # the last bytes are checksums and the end mark
    with pytest.raises(ValueError, match="cannot be decoded"):
      samples.decode_image(content[:length])


def test_counts_unlike_the_published_ones_are_warned_of(tmp_path, caplog):
  write_dataset(tmp_path / "NUAA-SIRST")
  write_dataset(tmp_path / "mine")
  with caplog.at_level(logging.WARNING):
    data.read(tmp_path / "NUAA-SIRST", "train")
  assert "2 train pairs, but NUAA-SIRST has 213" in caplog.text
  caplog.clear()
  data.read(tmp_path / "mine", "train")
  assert not caplog.text


def test_a_split_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(ValueError, match="'dev'; it must be 'train', 'test', 'val' or 'all'"):
    data.read(tmp_path, "dev")


def test_known_counts_of_sirst3_are_the_sum_of_its_parts():
  *parts, union = folders.KNOWN_COUNTS.values()
  assert union == tuple(map(sum, zip(*parts, strict=True)))


# Means and deviations of the train images by the rule of PAL's cal_mean_std.py, published with
# the datasets' split.
REAL = {"NUAA-SIRST": (213, 214, 0.434035, 0.115102), "NUDT-SIRST": (663, 664, 0.423619, 0.130252)}


def test_real_datasets_have_the_published_counts_statistics_targets_and_sizes(shared, caplog):
  for name, (train, test, *statistics) in REAL.items():
    with caplog.at_level(logging.WARNING):
      trained = data.read(shared / "data" / name, "train")
      assert data.validate(shared / "data" / name) == {"train": train, "test": test}
    assert not caplog.text
    assert len(trained) == train
    assert data.statistics(trained) == pytest.approx(statistics, abs=1e-6)
  splits = {split: data.read(shared / "data/NUAA-SIRST", split) for split in ("train", "test")}
  for split, expected in (("train", 270), ("test", 263)):  # 8-connected
    found = (ndimage.label(sample.mask, np.ones((3, 3)))[1] for sample in splits[split])
    assert sum(found) == expected
  batches = list(data.eval_batches(splits["test"], 32, 8))
  assert len({b["image"].shape for b in batches}) == 34
  assert sorted(i for b in batches for i in b["indices"]) == list(range(214))


def test_a_mask_of_the_size_of_misc_111s_published_one_is_refused_with_both_sizes(tmp_path):
  """NUAA-SIRST's own mask of Misc_111 is that of a larger picture."""
  root = tmp_path / "NUAA-SIRST"
  for folder, size in (("images", (325, 220)), ("masks", (592, 400))):
    (root / folder).mkdir(parents=True)
    Image.new("L", size).save(root / folder / "Misc_111.png")
  (root / "splits").mkdir()
  (root / "splits" / "train.txt").write_text("Misc_111")
  assert "mask is 592×400, its image Misc_111.png 325×220" in refusal(root)


def test_statistics_are_means_over_images_not_over_pixels():
  small = np.zeros((2, 2, 3), np.uint8)
  large = np.full((40, 40, 3), 255, np.uint8)
  large[:, :20] = 0
  pair = [data.Sample(n, i, i[..., 0] > 0) for n, i in (("small", small), ("large", large))]
  assert data.statistics(pair) == pytest.approx(((0 + 0.5) / 2, (0 + 0.5) / 2))


def test_validation_split_is_deterministic_and_disjoint_and_keeps_order():
  image = np.zeros((2, 2, 3), np.uint8)
  given = [data.Sample(str(i), image, image[..., 0] > 0) for i in range(20)]
  train, val = data.split_validation(given, 0.2, seed=3)
  assert [s.name for s in data.split_validation(given, 0.2, seed=3)[1]] == [s.name for s in val]
  assert [s.name for s in data.split_validation(given, 0.2, seed=4)[1]] != [s.name for s in val]
  assert len(val) == 4 and sorted(int(s.name) for s in train + val) == list(range(20))
  assert [int(s.name) for s in train] == sorted(int(s.name) for s in train)
  assert data.split_validation(given, 0, seed=3) == (given, [])
  assert len(data.split_validation(given, 0.001, seed=3)[1]) == 1
  with pytest.raises(ValueError, match=r"\[0, 1\)"):
    data.split_validation(given, 1.0, seed=3)
  with pytest.raises(ValueError, match="leaves none"):
    data.split_validation(given[:1], 0.5, seed=3)


def test_drawn_samples_are_nested_keep_order_and_differ_by_seed():
  image = np.zeros((2, 2, 3), np.uint8)
  given = [data.Sample(str(i), image, image[..., 0] > 0) for i in range(20)]
  names = lambda count, seed: [int(s.name) for s in data.draw(given, count, seed)]  # noqa: E731
  assert len(names(5, 3)) == 5 and names(5, 3) == sorted(names(5, 3))
  assert set(names(5, 3)) < set(names(9, 3)) and names(20, 3) == list(range(20))
  assert names(5, 3) != names(5, 4)
  with pytest.raises(ValueError, match="is 21, and the train split has 20 images. Set it to 20 or"):
    data.draw(given, 21, 3)
