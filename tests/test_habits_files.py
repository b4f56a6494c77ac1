"""Files as people have them (masks, maps, splits, videos) are read, or refused with advice."""

import io
import logging
import re
import shutil
import subprocess
import types

import numpy as np
import pytest
from helpers import ROOT, Bright, deep_set, detector, make_folder, toy_config
from PIL import Image

from configs import nuaa_cpu
from fdep_jax import build, data, evaluate, predict, score, settings
from fdep_jax.data import check, frames, samples
from fdep_jax.metrics import hse, masks

TRUTH = np.zeros((20, 24), bool)
TRUTH[5:8, 9:12] = True
GREY = np.uint8(255 * TRUTH)


def encoded(picture, kind="PNG", **options) -> bytes:
  content = io.BytesIO()
  picture.save(content, kind, **options)
  return content.getvalue()


def coloured(colour) -> np.ndarray:
  return np.where(TRUTH[..., None], np.uint8(colour), np.uint8(0))


def palette(array, colours) -> Image.Image:
  picture = Image.fromarray(array, "L").convert("P")
  picture.putdata(array.ravel().tolist())
  picture.putpalette(colours)
  return picture


def oriented(array, orientation, kind) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"quality": 100} if kind == "JPEG" else {}
  return encoded(Image.fromarray(array), kind, exif=exif, **options)


def both(content, tmp_path, suffix=".png"):
  """The mask, or the refusal, as training and as scoring read it."""
  path = tmp_path / f"mask{suffix}"
  path.write_bytes(content)
  found = []
  for read in (lambda: samples.decode_mask(content)[0], lambda: score.read_mask(path)):
    try:
      found.append(read())
    except ValueError as error:
      found.append(str(error))
  return found


ALPHA = Image.fromarray(np.dstack([np.full((20, 24, 3), 255, np.uint8), GREY]))
INSTANCES = np.uint8(3 * TRUTH + (np.arange(24) == 2))
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0]
READ = {
  "grey": (encoded(Image.fromarray(GREY)), ".png"),
  "one bit": (encoded(Image.fromarray(GREY).convert("1")), ".png"),
  "grey as RGB": (encoded(Image.fromarray(GREY).convert("RGB")), ".png"),
  "opaque alpha": (encoded(Image.fromarray(GREY).convert("RGBA")), ".png"),
  "grey palette": (encoded(palette(np.uint8(TRUTH), [0, 0, 0, 255, 255, 255])), ".png"),
  "16 bits, 65535": (encoded(Image.fromarray(np.uint16(TRUTH) * 65535)), ".png"),
  "16 bits, 255": (encoded(Image.fromarray(np.uint16(TRUTH) * 255)), ".png"),
  "16-bit TIFF": (encoded(Image.fromarray(np.uint16(TRUTH) * 65535), "TIFF"), ".tif"),
  "JPEG": (encoded(Image.fromarray(GREY), "JPEG", quality=95), ".jpg"),
  "JPEG in colour": (encoded(Image.fromarray(GREY).convert("RGB"), "JPEG", quality=95), ".jpg"),
  "floats of one": (encoded(Image.fromarray(np.float32(TRUTH)), "TIFF"), ".tif"),
  "soft floats": (encoded(Image.fromarray(np.float32(0.9 * TRUTH)), "TIFF"), ".tif"),
}  # fmt: skip
REFUSED = {
  "inverted": (encoded(Image.fromarray(255 - GREY)), "fill 98 % of the mask, so it looks inverted"),
  "target in alpha": (encoded(ALPHA), "transparent pixels.*getchannel"),
  "red": (encoded(Image.fromarray(coloured((255, 0, 0)))), "colour picture.*max"),
  "dark blue": (encoded(Image.fromarray(coloured((0, 0, 90)))), "colour picture.*max"),
  "VOC palette": (encoded(palette(np.uint8(TRUTH), VOC)), "palette picture.* its 2 numbers"),
  "instances": (encoded(Image.fromarray(INSTANCES)), "3 numbers from 0 to 3"),
  "class 2": (encoded(Image.fromarray(np.uint8(2 * TRUTH))), "look like classes or instances"),
  "zero and one": (encoded(Image.fromarray(np.uint8(TRUTH))), "only 0 and 1; multiply it by 255"),
  "16-bit one": (encoded(Image.fromarray(np.uint16(TRUTH))), "only 0 and 1; multiply it by 255"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_a_mask_is_read_alike_in_training_and_in_scoring(kind, tmp_path):
  for found in both(READ[kind][0], tmp_path, READ[kind][1]):
    np.testing.assert_array_equal(found, TRUTH)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_that_would_be_read_wrongly_is_refused_with_a_way(kind, tmp_path):
  content, said = REFUSED[kind]
  for found in both(content, tmp_path):
    assert isinstance(found, str) and re.search(said, found), found


def test_the_conversions_that_refusals_name_give_the_mask(tmp_path):
  found = {name: Image.open(io.BytesIO(content)) for name, (content, _) in REFUSED.items()}
  masks_of = {
    "target in alpha": np.array(found["target in alpha"].convert("RGBA").getchannel("A")),
    "dark blue": np.uint8(255 * (np.array(found["dark blue"].convert("RGB")).max(-1) > 0)),
    "VOC palette": np.uint8(255 * (np.array(found["VOC palette"]) > 0)),
    "class 2": np.uint8(255 * (np.array(found["class 2"]) > 0)),
    "zero and one": 255 * np.array(found["zero and one"]),
    "inverted": 255 - np.array(found["inverted"]),
  }
  for name, array in masks_of.items():
    np.testing.assert_array_equal(masks.binary(array)[0], TRUTH, name)


def test_large_targets_are_warned_of_in_training_and_scoring(tmp_path, caplog):
  large = np.zeros((20, 24), np.uint8)
  large[:6] = 255
  root = make_folder(tmp_path / "data")
  Image.fromarray(np.repeat(np.repeat(large, 2, 0), 2, 1)).save(root / "masks/0.png")
  with caplog.at_level(logging.WARNING):
    data.validate(root)
    score.read_mask(root / "masks/0.png")
  assert caplog.text.count("targets fill 30 % of the mask") >= 2
  Image.fromarray(255 - np.array(Image.open(root / "masks/1.png"))).save(root / "masks/1.png")
  with pytest.raises(data.DataError, match="1.png: targets fill .* looks inverted"):
    data.validate(root)


# What each value of EXIF's orientation asks a viewer to do.
TURNS = {
  1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
  6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
  ("kind", "dtype"),
  [("JPEG", "u1"), ("PNG", "u1"), ("PNG", "u2"), ("TIFF", "u1"), ("TIFF", "u2"), ("TIFF", "f4")],
)
def test_pictures_are_turned_as_their_exif_data_say(kind, dtype, orientation, tmp_path):
  array = np.zeros((16, 24), dtype)
  array[:8, :4] = {"u1": 255, "u2": 65535, "f4": 1}[dtype]
  path = tmp_path / f"a.{kind.lower()}"
  path.write_bytes(oriented(array, orientation, kind))
  turned = TURNS[orientation](array > 0)
  (frame,) = frames.read(path)
  content = path.read_bytes()
  found = [frame > array.max() / 2, score.read_mask(path), samples.decode_mask(content)[0]]
  if kind != "JPEG":
    found.append(score.read_prob(path) > 0.5)
  if dtype == "u1":
    found.append(samples.decode_image(content)[..., 0] > 127)
  for mask in found:
    np.testing.assert_array_equal(mask, turned)


# Maps.


def saved(tmp_path, array, name="map.npy"):
  np.save(tmp_path / name, array)
  return tmp_path / name


def test_rounding_beyond_one_is_cut_and_more_is_shown_with_its_digits():
  prob = np.where(TRUTH, np.float32(1.0000001), np.float32(-1e-7))
  checked, _, problems = hse.check(prob, TRUTH)
  assert not problems and checked.min() == 0 and checked.max() == 1
  *_, problems = hse.check(np.where(TRUTH, np.float32(1.00002), np.float32(0)), TRUTH)
  assert "1.00002003" in problems[0]


@pytest.mark.parametrize(
  ("array", "said"),
  [
    (np.stack([1.0 - TRUTH, 1.0 * TRUTH], -1), r"prob\[..., 1\]"),
    (np.stack([1.0 - TRUTH, 1.0 * TRUTH]), r"prob\[1\] with channels first"),
    (np.float32(TRUTH)[:, :, None].view("V4"), "prob.float"),
    (np.zeros((3, 1, 20, 24), np.float32), r"shape \(3, 1, 20, 24\); save one H×W map per file"),
  ],
)
def test_a_map_of_another_form_is_refused_with_the_way_to_the_right_one(array, said, tmp_path):
  with pytest.raises(ValueError, match=said):
    score.read_prob(saved(tmp_path, array))


def test_a_batch_of_one_and_half_precision_are_read(tmp_path):
  prob = np.float32(0.75 * TRUTH)
  for array in (prob[None, None], prob[..., None], prob.astype(np.float16)):
    np.testing.assert_array_equal(score.read_prob(saved(tmp_path, array)), prob)


def test_bfloat16_maps_are_named(tmp_path):
  import ml_dtypes

  path = saved(tmp_path, TRUTH.astype(ml_dtypes.bfloat16))
  with pytest.raises(ValueError, match="2 raw bytes a value, as NumPy saves bfloat16"):
    score.read_prob(path)


def test_grey_levels_as_floats_get_the_division():
  *_, problems = hse.check(np.float32(GREY), TRUTH)
  assert "divide grey levels by 255" in problems[0]
  *_, problems = hse.check(np.float32(TRUTH) * 9 - 4, TRUTH)
  assert "apply the sigmoid" in problems[0] and "255" not in problems[0]


@pytest.mark.parametrize(("top", "advice"), [(1, "mask > 0.5"), (255, "mask > 127")])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_the_advice_for_a_mask_of_numbers_leads_to_the_mask(top, advice, dtype, tmp_path):
  mask = (top * TRUTH).astype(dtype)
  *_, problems = hse.check(np.float32(TRUTH), mask)
  assert advice in problems[0]
  np.testing.assert_array_equal(mask > float(advice.split()[-1]), TRUTH)
  np.testing.assert_array_equal(score.read_mask(saved(tmp_path, mask)), TRUTH)


# Splits and layouts.


def names(root, split="train"):
  return [sample.name for sample in data.read(root, split)]


def pairs(folder, image, mask, *stems, affix=""):
  for kind in (image, mask):
    (folder / kind).mkdir(parents=True, exist_ok=True)
  for stem in stems:
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(folder / image / f"{stem}.png")
    Image.fromarray(GREY).save(folder / mask / f"{stem}{affix}.png")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8", "utf-8-sig"])
def test_split_files_may_be_utf_16(tmp_path, encoding):
  root = make_folder(tmp_path / "data")
  (root / "splits/train.txt").write_bytes("0\r\n1\r\n".encode(encoding))
  assert names(root) == ["0", "1"]


@pytest.mark.parametrize(
  ("encoding", "text"),
  [("utf-16-le", "0\n1"), ("utf-16-be", "0\n1"), ("utf-32", "0\n1"), ("latin-1", "0\né")],
)
def test_split_files_of_another_encoding_are_refused_with_the_one_to_use(tmp_path, encoding, text):
  root = make_folder(tmp_path / "data")
  (root / "splits/train.txt").write_bytes(text.encode(encoding))
  with pytest.raises(data.DataError, match="splits/train.txt: not a text .*; save it as UTF-8"):
    names(root)


def test_names_in_splits_may_have_folders(tmp_path):
  for i in range(2):
    pairs(tmp_path, f"images/seq{i}", f"masks/seq{i}", "0001", "0002")
  (tmp_path / "train.txt").write_text("seq0/0001\nimages/seq0/0002.png\n./images/seq1/0001.png")
  (tmp_path / "test.txt").write_text("seq1\\0002")
  assert names(tmp_path) == ["seq0/0001", "seq0/0002", "seq1/0001"]
  assert names(tmp_path, "test") == ["seq1/0002"]


def test_trainval_is_the_train_split_if_there_is_no_train(tmp_path):
  root = make_folder(tmp_path / "data")
  (root / "splits/train.txt").rename(root / "splits/trainval.txt")
  assert names(root) == ["0", "1"]


def test_the_only_folder_with_both_split_files_is_taken(tmp_path):
  root = make_folder(tmp_path / "data")
  (root / "splits").rename(root / "50_50")
  assert names(root) == ["0", "1"] and names(root, "test") == ["2", "3"]
  (root / "80_20").mkdir()
  for split in ("train", "test"):
    (root / f"80_20/{split}.txt").write_bytes((root / f"50_50/{split}.txt").read_bytes())
  with pytest.raises(data.DataError, match="50_50/, 80_20/ each have train.txt and test.txt"):
    names(root)


@pytest.mark.parametrize(
  ("image", "mask"), [("images", "masks"), ("img", "label"), ("image", "gt"), ("images", "labels")]
)
def test_a_folder_per_split_is_read_with_the_common_names(tmp_path, image, mask, caplog):
  pairs(tmp_path / "train", image, mask, "a", "b")
  pairs(tmp_path / "test", image, mask, "c")
  assert names(tmp_path) == ["a", "b"] and names(tmp_path, "test") == ["c"]
  assert names(tmp_path, "val") == [] and not caplog.text
  pairs(tmp_path / "val", image, mask, "d")
  assert names(tmp_path, "all") == ["a", "b", "c"] and names(tmp_path, "val") == ["d"]


def test_a_validation_split_of_its_own_selects(tmp_path, toy):
  root = make_folder(tmp_path / "data")
  config = toy_config(**{"data.root": str(root), "data.val_fraction": 0.5, "mode": "original"})
  drawn = build.load_images(config)
  assert len(drawn.train) == len(drawn.val) == 1  # held out of train
  (root / "splits/train.txt").write_text("0\n")
  (root / "splits/val.txt").write_text("1\n")
  images = build.load_images(config)
  found = {split: [s.name for s in getattr(images, split)] for split in ("train", "val", "test")}
  assert found == {"train": ["0"], "val": ["1"], "test": ["2", "3"]}
  config.eval.select_on = "test"
  assert not build.load_images(config).val


def test_trainval_without_val_is_the_train_split(tmp_path):
  root = make_folder(tmp_path / "data")
  (root / "splits/train.txt").rename(root / "splits/trainval.txt")
  (root / "splits/val.txt").write_text("1\n")
  assert (names(root), names(root, "val")) == (["0"], ["1"])


def test_a_trainval_that_is_not_read_takes_no_name_from_train(tmp_path):
  root = make_folder(tmp_path / "data")
  (root / "img_idx").mkdir()
  (root / "splits/train.txt").rename(root / "img_idx/train_data.txt")
  (root / "splits/val.txt").write_text("1\n")
  (root / "splits/trainval.txt").write_text("0\n1\n")
  with pytest.raises(data.DataError, match="1 is in both train and val"):
    names(root)


def test_a_validation_split_shares_no_name_and_is_not_the_test_split(tmp_path, caplog):
  root = make_folder(tmp_path / "data")
  (root / "splits/val.txt").write_text("1\n")
  with pytest.raises(data.DataError, match="1 is in both train and val"):
    names(root)
  (root / "splits/val.txt").write_text((root / "splits/test.txt").read_text())
  assert names(root) == ["0", "1"] and names(root, "val") == []
  assert "the split val is the test split" in caplog.text


def test_a_union_uses_validation_splits_that_all_parts_have(tmp_path, caplog):
  for part in ("A", "B"):
    root = make_folder(tmp_path / "data" / part)
    (root / "splits/train.txt").write_text("0\n")
    (root / "splits/val.txt").write_text("1\n")
  assert names(tmp_path / "data", "val") == ["A_1", "B_1"]
  (root / "splits/val.txt").unlink()
  assert names(tmp_path / "data", "val") == [] and names(tmp_path / "data") == ["A_0", "B_0"]
  assert "the validation split of A is not read" in caplog.text


@pytest.mark.parametrize("affix", ["_mask", "_gt", "_label", "_pixels0"])
def test_names_of_masks_may_say_that_they_are_masks(tmp_path, affix):
  pairs(tmp_path / "train", "img", "mask", "a", "b", affix=affix)
  pairs(tmp_path / "val", "img", "mask", "c", affix=affix)
  assert names(tmp_path, "all") == ["a", "b", "c"]


def test_a_missing_split_file_says_what_was_found(tmp_path):
  root = make_folder(tmp_path / "data")
  (root / "splits").rename(root / "lists")
  (root / "lists/train.txt").rename(root / "lists/mine.txt")
  with pytest.raises(data.DataError, match="looked for .*; there are lists/mine.txt, lists/test"):
    names(root)


def test_a_folder_of_another_layout_says_what_was_found_and_what_is_sought(tmp_path):
  pairs(tmp_path / "train", "IR", "GT", "a")
  with pytest.raises(data.DataError, match="no dataset, but train/, train/GT/, train/IR/. A datas"):
    names(tmp_path)
  pairs(tmp_path / "train", "img", "mask", "a")
  with pytest.raises(data.DataError, match="looked for test/img, .*; there are train/, train/GT/"):
    names(tmp_path, "test")
  (tmp_path / "files").mkdir()
  (tmp_path / "files/a.png").touch()
  with pytest.raises(data.DataError, match="no dataset, but a.png. A dataset is images/"):
    names(tmp_path / "files")


def test_a_mask_folder_of_another_name_says_what_was_sought_and_what_is_there(tmp_path):
  pairs(tmp_path / "a/train", "images", "annotations", "a")
  pairs(tmp_path / "a/test", "images", "masks", "b")
  said = "train: there is no mask folder .mask or .* or gt.; there are annotations/, images/"
  with pytest.raises(FileNotFoundError, match=said):
    names(tmp_path / "a")
  for path in (tmp_path / "a/test/masks").iterdir():
    path.unlink()
  with pytest.raises(FileNotFoundError, match="test/masks: no image files in this folder"):
    names(tmp_path / "a", "test")
  (make_folder(tmp_path / "b") / "masks").rename(tmp_path / "b/annotations")
  said = "no mask folder .masks or irstd1k_label.; there are annotations/, images/, splits/"
  with pytest.raises(FileNotFoundError, match=said):
    names(tmp_path / "b")


# Videos.


def test_a_video_gets_the_command_that_makes_frames(tmp_path, caplog):
  (tmp_path / "flight.MP4").write_bytes(b"\0\0\0\x18ftypmp42")
  with pytest.raises(ValueError, match="flight.MP4 is a video; .*ffmpeg -i .*flight.MP4"):
    predict._inputs(tmp_path / "flight.MP4", tmp_path / "out")
  with pytest.raises(frames.FrameError, match="ffmpeg"):
    list(frames.read(tmp_path / "flight.MP4"))
  with pytest.raises(ValueError, match="contains no pictures"):
    predict._inputs(tmp_path, tmp_path / "out")
  assert "ffmpeg" in caplog.text


# --mode validate.


def test_validate_prints_the_counts_and_draws_the_first_pairs(tmp_path, capsys):
  root = make_folder(tmp_path / "data")
  check.command(types.SimpleNamespace(range=None, data=[str(root)], out=str(tmp_path / "out")))
  out = capsys.readouterr().out
  assert f"{root}: no problems" in out
  assert "train 2 images, 0 without a target, 2 targets, 9 pixels in the median target" in out
  with Image.open(tmp_path / "out" / "data.png") as sheet:
    assert sheet.size == (480, 500)
    colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**20)}
  assert (255, 176, 0) in colours


def test_validate_lists_the_problems_of_a_bad_set(tmp_path):
  root = make_folder(tmp_path / "data")
  (root / "masks/0.png").unlink()
  with pytest.raises(FileNotFoundError, match="0 has no mask"):
    check.command(types.SimpleNamespace(range=None, data=[str(root)], out=str(tmp_path / "out")))
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["split files", "folders"])
def test_validate_takes_a_set_without_a_train_split_but_not_with_a_bad_one(
  tmp_path, capsys, layout
):
  root = make_folder(tmp_path / "data")
  if layout == "split files":
    train = root / "splits/train.txt"
    train.unlink()
  else:
    (root / "test").mkdir()
    for half in ("images", "masks"):
      (root / half).rename(root / "test" / half)
    train = root / "train/pictures"
  flags = types.SimpleNamespace(range=None, data=[str(root)], out=str(tmp_path / "out"))
  check.command(flags)
  said = capsys.readouterr().out
  assert "test  " in said and "train none: the set can be evaluated, but not trained on" in said
  assert (tmp_path / "out/data.png").is_file()
  if layout == "split files":
    train.write_text("")
  else:
    train.mkdir(parents=True)
  with pytest.raises(data.DataError, match="lists no names|no folder for split 'train'"):
    check.command(flags)


@pytest.mark.parametrize(("alone", "test"), [(False, 2), (True, 1)])
def test_the_documented_commands_write_splits(tmp_path, alone, test):
  text = (ROOT / "docs/data.md").read_text()
  lines = re.search(r"```\n( *mkdir -p data/mine/splits\n.*?)```", text, re.DOTALL)[1]
  if alone:
    ways = iter(re.findall(r"`(awk '[^`]+')`", text))
    lines = re.sub(r"grep .*?'\S+'", lambda _: next(ways), lines)
  root = make_folder(tmp_path / "data/mine", 6)
  for kind in ("images", "masks"):
    for path in list((root / kind).iterdir()):
      path.rename(path.with_name(f"flight_0{6 + (int(path.stem) > 3)}_{path.name}"))
  shutil.rmtree(root / "splits")
  with pytest.raises(FileNotFoundError, match="docs/data.md has commands that write it"):
    data.validate(root)
  subprocess.run(lines, shell=True, check=True, cwd=tmp_path)
  assert data.validate(root) == {"train": 6 - test, "test": test}
  if not alone:
    assert all("flight_07" in sample.name for sample in data.read(root, "test"))


def test_validate_lists_the_problems_of_all_sets(tmp_path, capsys):
  roots = [str(make_folder(tmp_path / name)) for name in "abcd"]
  (tmp_path / "a/masks/0.png").unlink()
  (tmp_path / "c/masks/1.png").write_text("no picture")
  for name in "01":  # the train images of d
    Image.new("L", (48, 40), 90).save(tmp_path / f"d/images/{name}.png")
  with pytest.raises(data.DataError) as error:
    check.command(types.SimpleNamespace(range=None, data=roots, out=str(tmp_path / "out")))
  for said in ("0 has no mask", "1.png", "each of the 2 train images has one grey level only"):
    assert said in str(error.value)
  assert f"{roots[1]}: no problems" in capsys.readouterr().out


def test_every_set_that_is_validated_has_its_own_picture(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in "xy":
    make_folder(tmp_path / name / "set")
  out = tmp_path / "out"
  flags = types.SimpleNamespace(range=None, data=[f"{tmp_path}/x/set", "~/y/set"], out=str(out))
  check.command(flags)
  assert (out / "x/set.png").is_file() and (out / "y/set.png").is_file()
  monkeypatch.chdir(tmp_path / "x/set")
  (tmp_path / "linked").symlink_to(tmp_path / "y/set")
  for root, name in ((".", "set"), (f"{tmp_path}/linked", "linked")):
    flags.data = [root]
    check.command(flags)
    assert (out / f"{name}.png").is_file()
    assert list(evaluate._named([root])) == [name]  # of its results


@pytest.mark.parametrize("values", ["auto", "7000,9000"])
def test_a_range_for_images_of_tfds_is_refused(tmp_path, toy, values):
  flags = types.SimpleNamespace(range=values, data=["tfds:sirst3"], out=str(tmp_path / "out"))
  with pytest.raises(data.DataError, match="tfds:sirst3: images of TFDS have 8 bits, and --range"):
    check.command(flags)
  config = toy_config(**{"data.root": "tfds:sirst3", "data.range": values})
  with pytest.raises(data.DataError, match="have 8 bits, and --config.data.range is for more"):
    build.load_images(config)


def test_an_empty_name_of_a_dataset_is_not_the_current_folder(tmp_path, monkeypatch, toy):
  monkeypatch.chdir(make_folder(tmp_path / "data"))
  said = "The name of a dataset is empty. .*leave no comma"
  config = toy_config(**{"data.root": ""})
  for use in (
    lambda: check.command(types.SimpleNamespace(range=None, data=[""], out="out")),
    lambda: data.load("", "test"),
    lambda: data.read(" ", "test"),
    lambda: data.measure_range(""),
    lambda: build.check_inputs(config),
    lambda: build.load_test(config),
  ):
    with pytest.raises(data.DataError, match=said):
      use()


def test_the_config_for_own_frames_on_a_cpu_needs_no_prior(tmp_path):
  config = nuaa_cpu.get_config()
  config.data.root, config.data.range = str(make_folder(tmp_path / "data")), "7000,9000"
  config.prior.checkpoint = str(tmp_path / "absent.pth")
  build.check_inputs(config)
  settings.check(config)
  assert config.mode == "original" and config.data.crop == 128


# Cameras.


def test_sixteen_bit_images_are_refused_with_the_setting_that_reads_them(tmp_path):
  with pytest.raises(data.DataError, match="--config.data.range=LOW,HIGH"):
    data.read(deep_set(tmp_path / "data"), "train")


def test_one_range_turns_the_counts_of_a_camera_into_grey_levels(tmp_path):
  root = deep_set(tmp_path / "data")
  low, high = data.measure_range(root)
  assert 7000 <= low < 7010 and 8990 < high <= 9000
  raw = np.array(Image.open(root / "images/0.png")).astype(float)
  for values, wanted in (
    ((7000.0, 9000.0), (raw - 7000) / 2000 * 255),
    ("full", raw / 65535 * 255),
  ):
    image = data.read(root, "train", values)[0].image
    assert image.dtype == np.uint8 and image.shape == (40, 48, 3)
    assert np.abs(image[..., 0] - wanted).max() <= 0.5 + 1e-6


def test_the_range_of_a_run_is_fixed_stored_and_used_by_prediction(tmp_path, toy):
  config = toy_config(**{"data.root": str(deep_set(tmp_path / "data")), "data.range": "auto"})
  images = build.load_images(config)
  assert images.range == data.measure_range(tmp_path / "data")
  mine = detector(Bright())._replace(range=images.range)
  seen = []
  grey_levels = frames.grey_levels
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frames, "grey_levels", lambda f, v: seen.append(v) or grey_levels(f, v))
    for values in (None, (7000.0, 8000.0)):
      predict.run(tmp_path / "data/images", tmp_path / "out", mine, values=values, progress=False)
  assert set(seen) == {images.range, (7000.0, 8000.0)}


@pytest.mark.parametrize("values", [(7003.0, 8001.0), "full"])
def test_prediction_sees_the_levels_of_the_training_bit_for_bit(tmp_path, toy, values):
  root = deep_set(tmp_path / "data")
  text = values if isinstance(values, str) else "{:g},{:g}".format(*values)
  images = build.load_images(toy_config(**{"data.root": str(root), "data.range": text}))
  assert images.range == values
  mine = detector(Bright())._replace(range=values)
  predictor, seen = predict.Predictor(mine), []
  stream = predict.Predictor.stream
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      predict.Predictor,
      "stream",
      lambda self, items: stream(self, (seen.append(item[1]) or item for item in items)),
    )
    predict.run(root / "images", tmp_path / "out", mine, progress=False)
    predictor(np.array(Image.open(root / "images/0.png")))  # by default with the same range
  trained = [*images.train, *images.val, *images.test]
  trained = {sample.name: sample.image for sample in trained}
  for name, levels in zip("01230", seen, strict=True):
    np.testing.assert_array_equal(np.repeat(levels[..., None], 3, -1), trained[name])


def validate(root, out, values=None):
  check.command(types.SimpleNamespace(range=values, data=[str(root)], out=str(out)))


def eight_bit(path):
  Image.fromarray(np.random.default_rng(1).integers(0, 200, (40, 48), np.uint8)).save(path)


@pytest.mark.parametrize("values", ["7000,9000", "full", "auto"])
@pytest.mark.parametrize("mixed", [True, False])
def test_eight_bit_images_in_a_set_with_a_range_are_refused_by_name(tmp_path, toy, values, mixed):
  root = deep_set(tmp_path / "data") if mixed else make_folder(tmp_path / "data")
  if mixed:
    eight_bit(root / "images/1.png")
  place = "problem.*\n  images/1.png" if mixed else "2 of 2 images, the first of them images/0.png"
  place = place.removeprefix("problem.*") if values == "auto" else place
  said = f"{place}: has 8 bits per channel, but a range is given. "
  with pytest.raises(data.DataError, match=f"{said}--range is for images of more than 8 bits"):
    validate(root, tmp_path / "out", values)
  config = toy_config(**{"data.root": str(root), "data.range": values})
  with pytest.raises(data.DataError, match=f"{said}--config.data.range is for images of more"):
    build.load_images(config)
  with pytest.raises(data.DataError, match="cannot be measured:\n  .*has 8 bits"):
    data.measure_range(root)


def test_eight_bit_images_of_the_test_split_are_refused_too(tmp_path):
  root = deep_set(tmp_path / "data")
  eight_bit(root / "images/3.png")
  config = toy_config(**{"data.root": str(root), "data.range": "auto"})
  with pytest.raises(data.DataError, match="split 'test'\n  images/3.png: has 8 bits"):
    build.load_test(config, (7000.0, 9000.0))
  with pytest.raises(data.DataError, match="split 'test'\n  images/3.png: has 8 bits"):
    build.load_images(config)


def test_a_run_with_a_range_takes_no_frames_of_eight_bits_unless_a_range_is_named(tmp_path):
  mine = detector(Bright())._replace(range=(7000.0, 9000.0))
  images = deep_set(tmp_path / "data") / "images"
  eight_bit(images / "1.png")
  found = predict.run(images, tmp_path / "out", mine, progress=False)
  said = "has 8 bits per channel, but .* with the range 7000,9000. .* --range=auto takes 8 bits as"
  assert list(found.unreadable) == ["1.png"] and re.search(said, found.unreadable["1.png"])
  assert not predict.run(images, tmp_path / "out", mine, values="auto", progress=False).unreadable
  frame = np.array(Image.open(images / "1.png"))
  with pytest.raises(frames.FrameError, match=said):
    predict.Predictor(mine)(frame)
  assert not predict.run(images, tmp_path / "out", detector(Bright()), progress=False).unreadable


@pytest.mark.parametrize("values", ["0,255", "9100,9200", "0,7010"])
def test_a_range_that_blackens_or_whitens_the_images_is_refused(tmp_path, toy, values):
  root = deep_set(tmp_path / "data")
  said = "2 of 2 images, the first of them images/0.png: has values from 700. to 89.., of which "
  said += f"the range {values} makes (99|100) % black or white. "
  with pytest.raises(data.DataError, match=f"{said}.*: --range=LOW,HIGH"):
    validate(root, tmp_path / "out", values)
  config = toy_config(**{"data.root": str(root), "data.range": values})
  with pytest.raises(data.DataError, match=f"{said}.*: --config.data.range=LOW,HIGH"):
    build.load_images(config)
  config.data.lazy = True
  with pytest.raises(data.DataError, match=said):
    build.load_images(config)


@pytest.mark.parametrize("backbone", ["alcl", "rpcanet"])  # the second needs no deviation
def test_images_of_one_grey_level_are_refused(tmp_path, backbone):
  root = deep_set(tmp_path / "deep")
  said = "each of the 2 train images has one grey level only .128 of 255., their deviation is 0, "
  config = toy_config(**{"data.root": str(root), "data.range": "-1e8,1e8"})
  config.mode, config.model.backbone = "original", backbone
  with pytest.raises(ValueError, match=f"{said}with the range .*--config.data.range=LOW,HIGH"):
    build.load_images(config)
  with pytest.raises(ValueError, match=f"{said}with the range .* --range=LOW,HIGH"):
    validate(root, tmp_path / "out", "-1e8,1e8")
  config.data.root, config.data.range = str(make_folder(tmp_path / "flat")), ""
  for path in (tmp_path / "flat/images").iterdir():
    Image.fromarray(np.full((40, 48), 128, np.uint8)).save(path)
  with pytest.raises(ValueError, match=f"{said}so they show nothing"):
    build.load_images(config)
  with pytest.raises(ValueError, match=f"{said}so they show nothing"):
    validate(tmp_path / "flat", tmp_path / "out")
  eight_bit(tmp_path / "flat/images/1.png")  # one that shows something is enough
  assert build.load_images(config).train


def test_images_that_need_a_range_are_one_line_with_the_option_of_the_mode(tmp_path):
  root = deep_set(tmp_path / "data")
  for i in range(4, 60):
    for kind in ("images", "masks"):
      (root / kind / f"{i}.png").write_bytes((root / kind / "0.png").read_bytes())
  (root / "splits/train.txt").write_text("\n".join(map(str, [0, *range(4, 60)])))
  eight_bit(root / "images/7.png")
  with pytest.raises(data.DataError) as told:
    validate(root, tmp_path / "out")
  lines = str(told.value).splitlines()
  assert lines[1:] == [
    "  56 of 57 images, the first of them images/0.png: holds more than 8 bits per channel (mode "
    "I;16). Name the range that becomes black to white: --range=LOW,HIGH in the sensor's counts, "
    "full, or auto"
  ]
  with pytest.raises(data.DataError, match=": --config.data.range=LOW,HIGH") as told:
    data.read(root, "train")
  assert len(str(told.value).splitlines()) == 2


def test_a_range_that_is_none_is_refused():
  with pytest.raises(ValueError, match="data.range is '7000'; it must be LOW,HIGH, full, auto"):
    settings.check(toy_config(**{"data.range": "7000"}))


def test_validation_says_in_words_whether_the_images_have_one_size():
  def sample(height, width):
    return data.Sample("a", np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool))

  alike = check.facts([sample(40, 48), sample(40, 48)])
  assert alike["pixels in every image"] == "48×40" and "different sizes" not in alike
  assert check.facts([sample(40, 48), sample(8, 8)])["different sizes"] == 2
