"""Prediction: reading frames, windows of large ones, what is written, and files that are broken."""

import csv
import dataclasses
import json
import shutil
import struct
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
  ROOT,
  Bright,
  deep_tiff,
  detector,
  make_folder,
  scene,
  toy_backbone,
  toy_config,
)
from PIL import Image

from fdep_jax import build, evaluate, predict, settings, train
from fdep_jax.backbones import Backbone, Logits
from fdep_jax.data import check, frames
from fdep_jax.layers import basic, blocks, ops, windows
from fdep_jax.predict import tiling


class Everything(Backbone):
  """Every kind of layer that depends on more than a neighbourhood, with a small receptive field."""

  stride = top_stride = 8
  top_channels = 8
  paper_name = "Everything"

  def __init__(self, *, rngs: nnx.Rngs):
    self.stem = basic.Conv(3, 8, rngs=rngs)
    self.gate = blocks.ChannelAttention(8, 2, rngs=rngs)
    self.norm = basic.GroupNorm(8)
    self.squeeze = blocks.SqueezeExcitation(8, rngs=rngs)
    self.head = basic.Conv(8, 1, rngs=rngs)

  def encode(self, image):
    x = nnx.relu(self.stem(image))
    x = x * self.gate(x)
    x = x + ops.channel_attention(x, x, x, levels=(3, 5))
    halved = ops.resize(x, (x.shape[1] // 2, x.shape[2] // 2), align_corners=True)
    return (x, halved), ops.max_pool2(ops.max_pool2(halved))

  def decode(self, skips, top):
    x, halved = skips
    size = x.shape[1:3]
    y = ops.upsample2(self.norm(halved), align_corners=True)
    y = y + ops.resize(self.squeeze(top), size, align_corners=True)  # by 8
    y = self.norm(y) + ops.resize(top, size, align_corners=False)
    return Logits(self.head(x + y))


@pytest.fixture(scope="module")
def bright():
  return predict.Predictor(detector(Bright()))


# Windows of large frames.


@pytest.mark.parametrize("length", [32, 96, 128, 160, 192, 992, 4096])
def test_windows_cover_an_axis_once_and_overlap_by_twice_the_halo(length):
  cuts = tiling._cut(length, 96, 32)
  assert cuts[0].start == 0 and cuts[-1].start + min(96, length) == length
  cores = [edge for cut in cuts for edge in cut.core]
  assert cores[0] == 0 and cores[-1] == length and cores[1:-1:2] == cores[2:-1:2]
  assert all(a < b for a, b in (cut.core for cut in cuts))
  total = np.zeros(length)
  for cut in cuts:
    assert cut.start % 32 == 0 and all(edge % 32 == 0 for edge in cut.core)
    total[cut.start : cut.start + 96] += cut.weight
    assert cut.core[0] == 0 or cut.core[0] - cut.start >= 32
    assert cut.core[1] == length or cut.start + 96 - cut.core[1] >= 32
  np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("before, after", [(48, 96), (96, 48), (24, 96), (12, 96)])
def test_a_window_of_a_resized_axis_is_the_resized_window(before, after):
  # Frame of 320 rows, window of 96 from row 128, both at the larger of the two scales.
  frame, size, offset = 320, 96, 128
  scale = 96 // before
  x = jax.random.normal(jax.random.key(0), (1, frame // scale, 1, 2))
  whole = ops.resize(x, (frame * after // 96, 1), align_corners=True)
  places = jnp.array([frame, 1]), jnp.array([offset, 0]), jnp.zeros((2, 2), jnp.int32)
  with windows.active(windows.Window((size, 1), *places)):
    part = ops.resize(x[:, offset // scale :][:, :before], (after, 1), align_corners=True)
  expected = whole[:, offset * after // 96 :][:, :after]
  inner = slice(after // before + 1, -after // before - 1)  # beyond these lie other windows' rows
  np.testing.assert_allclose(part[:, inner], expected[:, inner], atol=2e-6)


@pytest.mark.parametrize("shape", [(180, 250), (70, 300, 3)])
def test_a_tiled_frame_equals_the_untiled_one_everywhere(shape):
  levels = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
  levels[100:] /= 4  # so that every window has statistics of its own
  predictor = predict.Predictor(detector(Everything(rngs=nnx.Rngs(0)), 0.4, 0.2))
  [(_, untiled)] = predictor._batch([(None, levels)])
  tiled = predictor.tiled(levels, window=96, halo=32)
  assert tiled.shape == shape[:2] and untiled.std() > 0.01
  # Measured 4e-7. The field of 8·2 + a few pixels is within the halo.
  np.testing.assert_allclose(tiled, untiled, atol=2e-6)
  # Windows as frames of their own are something else.
  [(_, alone)] = predictor._batch([(None, levels[:96, :96])])
  assert np.abs(alone - untiled[:96, :96])[:64, :64].max() > 1e-3


def test_a_target_on_a_seam_is_found_once(bright):
  seams = [cut.core[1] for cut in tiling._cut(1600, tiling.WINDOW, tiling.HALO)[:-1]]
  spots = [(seams[0] - 1, seams[1] - 2), (seams[1] - 2, 300), (777, seams[0] - 1)]
  found = predict.targets(bright(scene(1600, 1600, spots=spots)))
  assert sorted((t.row - 1, t.col - 1) for t in found) == sorted(spots)
  assert {t.area for t in found} == {9}


# Frames.


def png(path, array: np.ndarray, kind: int, exif: bytes = b"") -> None:
  """A 16-bit PNG of colour type `kind`, its rows filtered by the difference to the left."""
  rows = array.astype(">u2").reshape(array.shape[0], -1).view(np.uint8).astype(np.int16)
  pixel = rows.shape[1] // array.shape[1]
  shifted = np.pad(rows, ((0, 0), (pixel, 0)))[:, :-pixel]
  data = np.pad((rows - shifted).astype(np.uint8), ((0, 0), (1, 0)), constant_values=1)
  head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
  content = b"\x89PNG\r\n\x1a\n"
  chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(data.tobytes())), (b"IEND", b"")]
  if exif:
    chunks.insert(1, (b"eXIf", exif))
  for name, body in chunks:
    content += struct.pack(">I", len(body)) + name + body
    content += struct.pack(">I", zlib.crc32(name + body))
  path.write_bytes(content)


@pytest.mark.parametrize("kind, channels", [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_every_bit_of_a_16_bit_png_is_read(tmp_path, kind, channels):
  array = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), np.uint16)
  png(tmp_path / "a.png", array, kind)
  [frame] = frames.read(tmp_path / "a.png")
  assert frame.dtype == np.uint16
  np.testing.assert_array_equal(frame, array[..., 0] if channels < 3 else array[..., :3])
  turned = Image.Exif()
  turned[0x0112] = 6  # shown after a turn by 90° clockwise
  png(tmp_path / "a.png", array, kind, turned.tobytes().removeprefix(b"Exif\0\0"))
  [shown] = frames.read(tmp_path / "a.png")
  np.testing.assert_array_equal(shown, np.rot90(frame, -1))


def test_16_bit_colours_of_a_tiff_are_read_whole_or_refused(tmp_path):
  array = np.random.default_rng(0).integers(0, 65536, (5, 7, 4), np.uint16)
  path = tmp_path / "a.tif"
  path.write_bytes(deep_tiff(array[..., :3]))
  np.testing.assert_array_equal(next(frames.read(path)), array[..., :3])
  for content, kind in (
    (deep_tiff(array[..., :3], planes=True), "planes"),
    (deep_tiff(array), "CMYK"),
  ):
    path.write_bytes(content)
    with pytest.raises(frames.FrameError, match=f"more than 8 bits per channel as {kind}"):
      next(frames.read(path))


def test_a_bmp_of_16_bits_a_pixel_has_8_bits_a_channel(tmp_path):
  head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
  head += struct.pack("<III", 0xF800, 0x7E0, 0x1F)  # 5 bits of red, 6 of green, 5 of blue
  content = b"BM" + struct.pack("<III", 14 + len(head) + 4, 0, 14 + len(head)) + head
  (tmp_path / "a.bmp").write_bytes(content + struct.pack("<HH", 0xF800, 0x1F))
  [frame] = frames.read(tmp_path / "a.bmp")
  np.testing.assert_array_equal(frame, [[[255, 0, 0], [0, 0, 255]]])


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_eight_bit_pictures_are_read_as_for_training(tmp_path, suffix, mode):
  if (suffix, mode) in (("bmp", "LA"), ("bmp", "RGBA")):
    pytest.skip("Pillow writes no such BMP")
  from fdep_jax.data.samples import decode_image

  colours = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
  Image.fromarray(colours).convert(mode).save(tmp_path / f"a.{suffix}")
  [frame] = frames.read(tmp_path / f"a.{suffix}")
  expected = decode_image((tmp_path / f"a.{suffix}").read_bytes())
  frame = frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, -1)
  np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_every_page_of_a_16_bit_tiff_is_a_frame(tmp_path, compression):
  pages = np.random.default_rng(0).integers(0, 16384, (3, 5, 7), np.uint16)
  first, *others = map(Image.fromarray, pages)
  first.save(tmp_path / "a.tif", save_all=True, append_images=others, compression=compression)
  np.testing.assert_array_equal(list(frames.read(tmp_path / "a.tif")), pages)


@pytest.mark.parametrize(
  "shape, dtype, number, each",
  [
    ((4, 5), ">u2", 1, (4, 5)),
    ((4, 5, 3), np.float64, 1, (4, 5, 3)),
    ((4, 5, 4), np.uint8, 1, (4, 5, 3)),
    ((4, 5, 1), np.int32, 1, (4, 5)),
    ((6, 4, 5), np.float16, 6, (4, 5)),
    ((2, 4, 5, 3), bool, 2, (4, 5, 3)),
  ],
)
def test_arrays_are_frames_or_stacks_of_them(tmp_path, shape, dtype, number, each):
  array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
  np.save(tmp_path / "a.npy", np.asfortranarray(array))
  found = list(frames.read(tmp_path / "a.npy"))
  assert len(found) == number and all(frame.shape == each for frame in found)
  first = array if number == 1 else array[0]
  first = first[..., :3].reshape(each) if first.ndim == 3 else first
  np.testing.assert_array_equal(found[0], first * np.uint8(255) if dtype is bool else first)


@pytest.mark.parametrize(
  "array, message",
  [
    (np.zeros((0, 5)), "0×5"),
    (np.zeros(5), "shape 5"),
    (np.zeros((4, 5, 3), complex), "complex128"),
    (np.full((4, 5), np.nan), "20 values not finite"),
    (np.array([["a"]]), "<U1"),
    (np.array([[{}]]), "Python objects"),
    (np.zeros((4, 5), [("a", "f4")]), "holds"),
    (np.zeros((0, 4, 5)), "no frames"),
  ],
)
def test_arrays_that_are_no_frames_are_refused(tmp_path, array, message):
  np.save(tmp_path / "a.npy", array, allow_pickle=True)
  with pytest.raises(frames.FrameError, match=message):
    list(frames.read(tmp_path / "a.npy"))


@pytest.mark.parametrize("suffix", ["npy", "png", "tif"])
def test_frames_that_are_too_large_are_refused(tmp_path, monkeypatch, suffix):
  path = tmp_path / f"a.{suffix}"
  np.save(path, scene()) if suffix == "npy" else Image.fromarray(scene()).save(path)
  monkeypatch.setattr(frames, "MAX_PIXELS", 48 * 40 - 1)
  with pytest.raises(frames.FrameError, match="48×40 pixels; at most 1919"):
    list(frames.read(path))


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
  np.save(tmp_path / "a.npy", np.zeros((40, 50)))
  content = (tmp_path / "a.npy").read_bytes().replace(b"(40, 50), ", b"(4000000000000, 50), ", 1)
  (tmp_path / "a.npy").write_bytes(content)
  with pytest.raises(frames.FrameError, match="cannot be decoded"):
    list(frames.read(tmp_path / "a.npy"))


def test_values_become_grey_levels():
  byte = np.arange(256, dtype=np.uint8).reshape(16, 16)
  np.testing.assert_array_equal(frames.grey_levels(byte), byte)
  np.testing.assert_array_equal(frames.grey_levels(byte.astype(np.uint16) * 257), byte)
  np.testing.assert_allclose(frames.grey_levels(byte / 255.0), byte, rtol=1e-6)
  # 14 bits of a thermal camera: its own range becomes black to white.
  counts = byte.astype(np.uint16) * 2 + 7000
  np.testing.assert_allclose(frames.grey_levels(counts), byte, rtol=1e-6)
  np.testing.assert_allclose(frames.grey_levels(counts * 0.01 + 200), byte, atol=1e-3)
  assert frames.grey_levels(counts, "full").max() == 29  # 7510 / 65535 · 255 = 29.2
  # 7000, 7002, 7004: 0, 5.1, 10.2, of which training keeps 8 bits.
  np.testing.assert_array_equal(frames.grey_levels(counts, (7000, 7100))[0, :3], [0, 5, 10])
  assert frames.grey_levels(counts, (7000, 7100)).max() == 255
  assert not frames.grey_levels(np.full((4, 4), 7000, np.uint16)).any()
  lonely = np.full((64, 64), 7000, np.uint16)
  lonely[3, 4] = 7100  # fewer pixels than the percentiles leave out
  assert frames.grey_levels(lonely)[3, 4] == 255


def test_a_dead_pixel_does_not_set_the_range():
  frame = np.random.default_rng(0).integers(7000, 7100, (200, 200), np.uint16)
  frame[50:53, 60:63], frame[9, 9] = 7200, 65535
  levels = frames.grey_levels(frame)
  assert levels[51, 61] == levels[9, 9] == 255 and levels.mean() > 60


@pytest.mark.parametrize("text", ["", "1", "2,1", "a,b", "nan,1", "1,2,3", "Auto"])
def test_a_malformed_range_is_refused(text):
  with pytest.raises(ValueError, match="LOW,HIGH"):
    frames.parse_range(text)


# A folder.


def test_a_folder_with_every_kind_of_file_is_predicted(tmp_path):
  source, out = tmp_path / "in", tmp_path / "in" / "found"
  (source / "sub").mkdir(parents=True)
  Image.fromarray(scene()).save(source / "a.png")
  Image.fromarray(scene(50, 64, spots=())).save(source / "a.bmp")
  np.save(source / "sub" / "a.npy", scene(dtype=np.float32, spots=((5, 5), (20, 30))) / 255)
  pages = [Image.fromarray(scene(spots=s)) for s in ((), ((30, 4),))]
  pages[0].save(source / "seq.tif", save_all=True, append_images=pages[1:])
  (source / "cut.png").write_bytes((source / "a.png").read_bytes()[:300])
  (source / "notes.txt").write_text("no picture")
  for _ in range(2):  # the second time among its own results
    result = predict.run(source, out, detector(Bright()), progress=False)
  assert list(result.unreadable) == ["cut.png"] and "truncated" in result.unreadable["cut.png"]
  assert "1 of 5 files" in result.complaint()
  written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
  stems = ["a.png", "a.bmp", "sub/a", "seq_page0000", "seq_page0001"]
  kinds = ("prob", "mask", "overlay")
  assert written == {"targets.csv", "targets.json"} | {f"{s}_{k}.png" for s in stems for k in kinds}
  with open(out / "targets.csv") as file:
    rows = list(csv.DictReader(file))
  assert [(r["file"], r["page"], r["row"], r["col"], r["area"]) for r in rows] == [
    ("a.png", "", "11.00", "21.00", "9"),
    ("seq.tif", "1", "31.00", "5.00", "9"),
    ("sub/a.npy", "", "6.00", "6.00", "9"),
    ("sub/a.npy", "", "21.00", "31.00", "9"),
  ]
  assert [rows[0][k] for k in ("top", "left", "bottom", "right")] == ["10", "20", "13", "23"]
  content = json.loads((out / "targets.json").read_text())
  assert content["unreadable"] == result.unreadable and content["threshold"] == 0.5
  assert [frame["file"] for frame in content["frames"]] == [
    "a.bmp", "a.png", "seq.tif", "seq.tif", "sub/a.npy",
  ]  # fmt: skip
  with Image.open(out / "a.png_prob.png") as image:
    prob = np.array(image)
  assert prob.dtype == np.uint16 and prob.shape == (40, 48)
  with Image.open(out / "a.png_mask.png") as image:
    np.testing.assert_array_equal(np.array(image), 255 * (scene() == 250))
  np.testing.assert_array_equal(prob > 32767, scene() == 250)


def test_pages_before_one_that_is_refused_keep_their_own_numbers(tmp_path):
  def read(*sides, range_=""):
    pages = [np.full((side, side), 7 + side, np.uint8) for side in sides]
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    unreadable, bar = {}, types.SimpleNamespace(update=lambda: None)
    inputs = {"a.tif": (tmp_path / "a.tif", "a")}
    found = predict._read(inputs, None, range_, unreadable, bar, at_most_40)
    return [
      (page, output, int(levels[0, 0]) - 7) for (_, page, output, levels), _ in found
    ], unreadable

  def at_most_40(size):
    if size[0] > 40:
      raise frames.FrameError("too large")

  one, two = (0, "a_page0000", 30), (1, "a_page0001", 31)
  assert read(30, 31, 50) == ([one, two], {"a.tif": "page 2: too large"})
  assert read(30, 50, 31) == ([one], {"a.tif": "page 1: too large"})
  assert read(30, 31) == ([one, two], {})
  assert read(30) == ([(None, "a", 30)], {})
  assert read(50) == ([], {"a.tif": "too large"})  # the only page has no number
  found, unreadable = read(30, range_="full")
  assert not found and unreadable["a.tif"].startswith("has 8 bits per channel")


def test_one_of_a_thing_is_not_written_as_several(tmp_path, capsys):
  Image.fromarray(scene()).save(tmp_path / "a.png")
  found = predict.run(tmp_path / "a.png", tmp_path / "out", detector(Bright()))
  assert str(found).startswith("1 target in 1 frame; see")
  (tmp_path / "b").mkdir()
  for name in "ab":
    Image.fromarray(scene()).save(tmp_path / f"b/{name}.png")
  found = predict.run(tmp_path / "b", tmp_path / "out", detector(Bright()))
  assert str(found).startswith("2 targets in 2 frames; see")
  check.validate(str(make_folder(tmp_path / "set", 2)), str(tmp_path / "out"))
  assert "1 image, 0 without a target, 1 target, 9 pixels" in capsys.readouterr().out


def test_targets_of_another_detector_or_source_are_not_replaced_without_a_word(tmp_path, caplog):
  for name in "ab":
    Image.fromarray(scene()).save(tmp_path / f"{name}.png")
  found, out = detector(Bright()), tmp_path / "out"
  for source, of, said in (
    ("a.png", found, False),
    ("a.png", found, False),
    ("b.png", found, True),
    ("b.png", found._replace(source="another run"), True),
    ("b.png", found._replace(source="another run"), False),
  ):
    caplog.clear()
    predict.run(tmp_path / source, out, of)
    assert ("targets.json are replaced" in caplog.text) == said


def test_a_file_as_the_folder_to_write_is_refused_before_a_detector_is_loaded(tmp_path):
  Image.fromarray(scene()).save(tmp_path / "a.png")
  flags = types.SimpleNamespace(
    range=None, out=str(tmp_path / "a.png"), workdir="never", input=str(tmp_path / "a.png")
  )
  with pytest.raises(ValueError, match="a.png is a file. Name a folder"):
    predict.command(flags)


def test_targets_are_described():
  prob = np.zeros((9, 9), np.float32)
  prob[1, 1:3], prob[2, 3], prob[6, 6] = (0.6, 0.8), 1, 0.5
  [target] = predict.targets(prob)
  assert target.row == pytest.approx(4 / 3) and target.col == pytest.approx(2)
  assert target.area == 3 and target.peak == 1 and target.box == (1, 1, 3, 4)
  top, left, bottom, right = target.box  # as the README says
  assert prob[top:bottom, left:right].sum() == prob[prob > 0.5].sum()
  assert (
    "the last two exclusive, as in `frame[top:bottom, left:right]`"
    in (ROOT / "README.md").read_text()
  )
  assert target.confidence == pytest.approx(0.8)
  assert len(predict.targets(prob, 0.4)) == 2 and predict.targets(prob * 0) == []


def test_the_overlay_leaves_the_target_to_be_seen():
  frame = scene().astype(np.float32)
  prob = (frame > 180).astype(np.float32)
  picture = np.array(predict.overlay(frame, predict.targets(prob)))
  scale = picture.shape[0] // 40
  assert scale > 1 and picture.shape == (40 * scale, 48 * scale, 3)
  inside = picture[10 * scale : 13 * scale, 20 * scale : 23 * scale]
  assert (inside == 255).all()  # grey, not painted over
  assert (picture.max(-1) != picture.min(-1)).any()  # and a coloured box somewhere


@pytest.mark.parametrize("what", ["missing", "empty", "no pictures", "itself", "threshold"])
def test_nothing_to_predict_is_refused_before_anything_is_written(tmp_path, what):
  source, out, threshold = tmp_path / "in", tmp_path / "out", 0.5
  if what != "missing":
    source.mkdir()
  if what == "no pictures":
    (source / "a.txt").write_text("")
  if what == "itself":
    out = source
  if what == "threshold":
    threshold = 1.5
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises((ValueError, FileNotFoundError)):
    predict.run(source, out, detector(Bright()), threshold=threshold)
  assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  Image.fromarray(scene()).save(tmp_path / "a.png")
  with pytest.raises(ValueError, match="cannot be written"):
    predict.run(tmp_path / "a.png", tmp_path / "a.png" / "out", detector(Bright()))


# A run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of two steps in mode fdep, and its test images as PNG files."""
  folder = tmp_path_factory.mktemp("trained")
  settings = {
    "data.val_fraction": 0.5,
    "data.synthetic_train": 8,
    "data.synthetic_test": 5,
    "train.batch_size": 2,
    "train.steps": 2,
    "eval.save_probs": True,
    "checkpoint.every_steps": 1,
  }
  config = toy_config(**settings)
  with toy_backbone():
    train.train(config, folder / "run")
    (folder / "frames").mkdir()
    for sample in build.load_images(config).test:
      Image.fromarray(sample.image).save(folder / "frames" / f"{sample.name}.png")
    yield folder


@pytest.mark.parametrize("branch", ["light", "main"])
def test_the_command_line_gives_the_maps_of_the_evaluation(trained, tmp_path, branch, capsys):
  from fdep_jax import cli

  flags = {"mode": "predict", "workdir": trained / "run", "input": trained / "frames"}
  flags |= {"out": tmp_path / "out", "branch": branch}
  cli.parse(["main.py", *(f"--{name}={value}" for name, value in flags.items())])
  cli.main([])
  assert "in 5 frames" in capsys.readouterr().out
  expected = sorted((trained / "run" / "probs" / branch).iterdir())
  assert len(expected) == 5
  predictor = predict.Predictor(predict.load(trained / "run", branch=branch))
  for path in expected:
    prob = np.load(path)
    with Image.open(tmp_path / "out" / f"{path.stem}_prob.png") as image:
      np.testing.assert_array_equal(np.array(image), np.rint(prob * 65535))
    with Image.open(trained / "frames" / f"{path.stem}.png") as image:
      np.testing.assert_allclose(predictor(np.array(image)), prob, rtol=0, atol=1e-6)


def test_every_way_to_name_a_checkpoint(trained):
  folder = trained / "run"
  best = predict.load(folder)
  assert best.branch == "light" and best.prior is None and not best.model.fusion
  for workdir, which in ((folder, "best"), (None, folder), (None, folder / "best")):
    assert predict.load(workdir, which).source == best.source
  for workdir, which in ((folder, "last"), (folder, 2), (None, folder / "checkpoints" / "2")):
    assert predict.load(workdir, which).source.endswith("step 2")
  assert predict.load(folder, 1).source.endswith("step 1")
  with pytest.raises(ValueError, match="no step 77; it has .*1, 2"):
    predict.load(folder, 77)
  with pytest.raises(ValueError, match="--workdir"):
    predict.load(None)
  for workdir, which in ((trained / "nowhere", None), (trained, None), (None, trained / "x")):
    with pytest.raises(FileNotFoundError):
      predict.load(workdir, which)
  assert not (trained / "nowhere").exists()


def test_a_branch_that_was_not_trained_is_refused(trained, tmp_path):
  shutil.copytree(trained / "run", tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  config = json.loads(path.read_text())
  for mode, branch in (("original", "main"), ("fdep_wo_coisd", "light")):
    path.write_text(json.dumps(config | {"mode": mode}))
    with pytest.raises(ValueError, match=f"mode {mode}, which has no {branch} branch"):
      predict.load(tmp_path / "run", branch=branch)
  config["prior"]["checkpoint"] = "nowhere/vit.pth"
  path.write_text(json.dumps(config))
  assert predict.load(tmp_path / "run").branch == "light"  # needs none
  with pytest.raises(FileNotFoundError, match="nowhere/vit.pth"):
    predict.load(tmp_path / "run", branch="main")


def test_the_priors_file_may_be_elsewhere_and_other_weights_are_refused(trained, monkeypatch):
  run = trained / "run"
  load = build.load_prior
  monkeypatch.setattr(build, "load_prior", lambda c: dataclasses.replace(load(c), sha256="other"))
  for use in (
    lambda: predict.load(run, branch="main"),
    lambda: evaluate.evaluate(run),
    lambda: train.train(settings.load(run), run),
  ):
    with pytest.raises(ValueError, match="different prior weights .*--config.prior.ch"):
      use()
