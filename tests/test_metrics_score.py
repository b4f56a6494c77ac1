"""`--mode score`: reading anybody's files, refusing all bad ones at once, and the reports."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
from helpers import deep_tiff
from PIL import Image

from fdep_jax import score
from fdep_jax.data.folders import folder_names
from fdep_jax.metrics import hse
from fdep_jax.runtime import problems


def scene(rng, height, width):
  """A map with 16-bit levels and its mask."""
  mask = np.zeros((height, width), bool)
  mask[3:6, 4:6] = True
  mask[-3:-1, -4:-2] = True
  levels = rng.integers(0, 9000, (height, width)).astype(np.uint16)
  levels[mask] = rng.integers(20000, 65536, mask.sum())
  levels[10, 1] = 40000  # a false alarm
  return levels, mask


def save(array, path):
  path.parent.mkdir(exist_ok=True)
  Image.fromarray(array).save(path)


@pytest.fixture
def folders(tmp_path):
  """Three 16-bit PNG maps of different sizes and their masks: both folders and the arrays."""
  rng = np.random.default_rng(0)
  levels, masks = {}, {}
  for stem, size in (("a", (20, 30)), ("b", (25, 18)), ("Misc_3", (16, 16))):
    levels[stem], masks[stem] = scene(rng, *size)
    save(levels[stem], tmp_path / "maps" / f"{stem}.png")
    save(masks[stem].astype(np.uint8) * 255, tmp_path / "masks" / f"{stem}.png")
  return tmp_path / "maps", tmp_path / "masks", levels, masks


def test_sixteen_bit_png_scores_as_the_arrays_themselves_and_writes_every_report(
  folders, tmp_path, capsys
):
  maps, masks, levels, truth = folders
  out = tmp_path / "out"
  metrics = score.run(maps, masks, out=out, resamples=50)
  stems = sorted(levels)
  expected = hse.score([levels[s] / np.float32(65535) for s in stems], [truth[s] for s in stems])
  got = dict(metrics["predictions"])
  intervals = got.pop("intervals")
  assert got == expected.as_dict()
  assert intervals["hse"][0] <= expected.hse <= intervals["hse"][1]
  assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
  curves = np.load(out / "curves.npz")
  assert (
    curves["target_recall"].shape == (20,) and curves["pixel_true"][-1] == expected.target_pixels
  )
  assert Image.open(out / "pr.png").size == (1080, 480)
  rows = list(csv.DictReader(open(out / "images.csv")))
  assert [r["file"] for r in rows] == stems
  assert sum(int(r["hits"]) for r in rows) == expected.hits
  assert sum(int(r["false_alarms"]) for r in rows) == expected.false_alarms
  assert rows[1]["false_alarm_centroids"].split()[0] == "10.00,1.00"
  assert (int(rows[1]["height"]), int(rows[1]["width"])) == truth["a"].shape
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].split() == ["IoU", "nIoU", "Pd", "Fa·1e6", "HSE-P", "HSE-T", "HSE"]
  assert printed[1].split() == ["maps"] + [
    f"{getattr(expected, k) * (1e6 if k == 'fa' else 100):.2f}" for k in hse.PAPER
  ]


@pytest.mark.parametrize(
  "kind",
  ["npy", "npy float64", "npz", "npz prob", "tif", "tif 16 bit", "rgb png", "prob png", "H×W×1"],
)
def test_the_same_map_scores_the_same_in_every_format(folders, tmp_path, kind):
  maps, masks, levels, truth = folders
  other = tmp_path / "other"
  other.mkdir()
  for stem, level in levels.items():
    prob = level / np.float32(65535)
    if kind == "npy":
      np.save(other / f"{stem}.npy", prob)
    elif kind == "npy float64":
      np.save(other / f"{stem}.npy", prob.astype(np.float64))
    elif kind == "H×W×1":
      np.save(other / f"{stem}.npy", prob[None, :, :, None])
    elif kind == "npz":
      np.savez(other / f"{stem}.npz", prob)
    elif kind == "npz prob":
      np.savez(other / f"{stem}.npz", prob=prob, image=level)
    elif kind == "tif":
      save(prob, other / f"{stem}.tif")
    elif kind == "tif 16 bit":
      save(level, other / f"{stem}.tiff")
    elif kind == "prob png":  # what --mode predict writes
      save(level, other / f"{stem}_prob.png")
      save(truth[stem].astype(np.uint8) * 255, other / f"{stem}_mask.png")
    elif kind == "rgb png":  # 8 bit: compared with the same rounding
      eight = (level >> 8).astype(np.uint8)
      save(np.stack([eight] * 3, axis=-1), other / f"{stem}.png")
      save(eight, maps / f"{stem}.png")
  found = [score.run(folder, masks, resamples=0)["predictions"] for folder in (other, maps)]
  assert found[0] == found[1]


def test_masks_with_nuaas_suffix_are_found(folders):
  maps, masks, *_ = folders
  whole = score.run(maps, masks, resamples=0)
  (masks / "Misc_3.png").rename(masks / "Misc_3_pixels0.png")
  assert score.run(maps, masks, resamples=0) == whole


@pytest.mark.parametrize("value", [255, 1])
def test_a_binary_folder_has_no_hse_and_says_why_but_has_the_rest(folders, tmp_path, capsys, value):
  maps, masks, levels, truth = folders
  shutil.copytree(maps, tmp_path / "binary")
  score.run(tmp_path / "binary", masks, out=tmp_path / "out", resamples=0)
  assert (tmp_path / "out" / "pr.png").exists()
  for stem, level in levels.items():
    save((level > 32767).astype(np.uint8) * value, tmp_path / "binary" / f"{stem}.png")
  got = score.run(tmp_path / "binary", masks, out=tmp_path / "out", resamples=20)["predictions"]
  soft = score.run(maps, masks, resamples=0)["predictions"]
  for name in ("iou", "niou", "pd", "fa", "precision", "recall", "f1", "hits", "false_alarms"):
    assert got[name] == soft[name], name
  for name in ("hse", "hse_p", "hse_t", "roc_auc", "ap"):
    assert got[name] is None and name not in got["intervals"]
  assert (
    "thresholded already" in got["hse_refused"] and got["hse_refused"] in capsys.readouterr().out
  )
  assert not (tmp_path / "out" / "pr.png").exists()


def test_every_bad_file_is_listed_in_one_error(folders, tmp_path):
  maps, masks, *_ = folders
  good = np.zeros((5, 6), np.uint8)
  cases = {
    "alone": "no mask alone",
    "nan": "NaN",
    "high": "must be in [0, 1]",
    "size": "4×6 and the mask 5×6",
    "ints": "int64",
    "text": "cannot be read",
    "colour": "colour image",
    "sixteen": "several channels of more than 8 bits",
    "many": "holds the arrays a, b",
    "ones": "only 0 and 1; multiply it by 255",
    "twice": "has the same stem",
    "deep": "shape",
  }
  for stem in cases:
    if stem != "alone":
      save(good + (stem == "ones"), masks / f"{stem}.png")
  save(good, masks / "forgotten.png")
  np.save(maps / "alone.npy", np.zeros((5, 6)))
  np.save(maps / "nan.npy", np.full((5, 6), np.nan))
  np.save(maps / "high.npy", np.full((5, 6), 1.5))
  np.save(maps / "size.npy", np.zeros((4, 6)))
  np.save(maps / "ints.npy", np.zeros((5, 6), int))
  (maps / "text.png").write_text("not an image")
  save(np.arange(90, dtype=np.uint8).reshape(5, 6, 3), maps / "colour.png")
  (maps / "sixteen.tif").write_bytes(deep_tiff(np.zeros((5, 6, 3), np.uint16)))
  np.savez(maps / "many.npz", a=np.zeros((5, 6)), b=np.zeros((5, 6)))
  save(good, maps / "ones.png")
  save(good, maps / "twice.png")
  np.save(maps / "twice.npy", np.zeros((5, 6)))
  np.save(maps / "deep.npy", np.zeros((2, 5, 6)))
  with pytest.raises(ValueError) as error:
    score.run(maps, masks)
  message = str(error.value).splitlines()
  assert message[0] == f"{len(cases) + 1} problems with the files:"
  for stem, expected in {**cases, "forgotten": "no prediction forgotten"}.items():
    assert any(stem in line and expected in line for line in message), (stem, error.value)


def test_a_folder_that_does_not_exist_or_is_empty_is_named(folders, tmp_path):
  maps, masks, *_ = folders
  with pytest.raises(FileNotFoundError, match="nowhere"):
    score.run(tmp_path / "nowhere", masks)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="no file ends in"):
    score.run(tmp_path / "empty", masks)


def test_the_results_of_a_run_are_not_overwritten(folders, tmp_path):
  maps, masks, *_ = folders
  for name in ("config.json", "metrics.json"):
    (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match="is the folder of a run, with its own results"):
    score.run(maps, masks, out=tmp_path)
  assert (tmp_path / "metrics.json").read_text() == "{}"


def test_results_of_other_inputs_are_not_replaced(folders, tmp_path):
  maps, masks, *_ = folders
  out, copy = tmp_path / "out", tmp_path / "copy"
  shutil.copytree(maps, copy)
  first = score.run(maps, masks, out=out, resamples=0)
  before = (out / "metrics.json").read_text()
  for refused in (
    lambda: score.run(copy, masks, out=out, resamples=0),
    lambda: score.run(maps, masks, out=out, compare=copy, resamples=0),
    lambda: score.run(maps, masks, out=out, resamples=0, false_alarm="area"),
  ):
    with pytest.raises(ValueError, match="holds results of .*Name a different folder"):
      refused()
  with pytest.raises(ValueError, match=f"holds results of predictions {maps}, which these"):
    score.run(copy, masks, out=out)
  assert (out / "metrics.json").read_text() == before
  assert first["inputs"] == {"predictions": str(maps), "masks": str(masks), "split": None}
  (maps / "a.png").write_bytes((maps / "a.png").read_bytes() + b" ")  # new maps of the same inputs
  again = score.run(maps, masks, out=out, resamples=0)
  assert first["files"]["predictions"]["number"] == again["files"]["predictions"]["number"] == 3
  assert first["files"] != again["files"] and first["predictions"] == again["predictions"]
  (out / "metrics.json").write_text("{}")  # of an earlier version
  with pytest.raises(ValueError, match="holds results of other inputs"):
    score.run(maps, masks, out=out)


def test_results_are_of_one_scoring_whole_and_keep_names_that_are_not_utf8(folders, tmp_path):
  maps, masks, *_ = folders
  out, name = tmp_path / "out", "\udcff\udce4"  # as Python has the bytes ff e4 of a file name
  score.run(maps, masks, out=out, resamples=0)
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  for folder in (maps, masks):
    (folder / "a.png").rename(folder / f"{name}.png")
  with pytest.MonkeyPatch.context() as patch:  # a full disk, while the last file is written
    patch.setattr(score.files, "write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
      score.run(maps, masks, out=out, resamples=0)
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before
  score.run(maps, masks, out=out, resamples=0)
  assert b"\r\n\xff\xe4," in (out / "images.csv").read_bytes()
  assert {path.name for path in out.iterdir()} == before.keys()


def test_home_is_resolved_in_every_name_and_an_empty_name_is_refused(folders, monkeypatch):
  maps, masks, *_ = folders
  monkeypatch.setenv("HOME", str(maps.parent))
  monkeypatch.chdir(maps)
  flags = ["--mode", "score", "--masks=~/masks", "--out=~/out"]
  shutil.copytree(maps, maps.parent / "b")
  score.command(score.parse([*flags, f"--predictions={maps},~/b"]))
  inputs = json.loads((maps.parent / "out/metrics.json").read_text())["inputs"]
  assert inputs["compared"] == str(maps.parent / "b") and inputs["masks"] == str(masks)
  for flag in ("--predictions=~/maps,", "--masks=", "--out="):
    with pytest.raises(ValueError, match=f"{flag.partition('=')[0]} has an empty name. Name a"):
      score.command(score.parse([*flags, "--predictions=~/maps", flag]))


def test_a_place_that_cannot_hold_results_is_refused_before_a_map_is_read(folders, tmp_path):
  maps, masks, *_ = folders
  (maps / "a.png").write_text("no picture")
  for out, said in (
    (tmp_path / "maps/a.png", "a.png is a file. Name a folder"),
    (tmp_path / "maps/a.png/out", "a.png is a file. Name a folder"),
    (maps, "is a folder that is read"),
    (masks / "../masks", "is a folder that is read"),
  ):
    with pytest.raises(ValueError, match=said):
      score.run(maps, masks, out=out)
  with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
    score.run(maps, masks, compare=tmp_path / "nowhere")


def test_two_folders_are_compared_image_by_image(folders, tmp_path, capsys):
  maps, masks, levels, _ = folders
  for stem, level in levels.items():
    level = level.copy()
    level[10, 1] = 0
    save(level, tmp_path / "better" / f"{stem}.png")
  got = score.run(tmp_path / "better", masks, compare=maps, resamples=100, out=tmp_path / "out")
  assert got["comparison"]["fa"]["difference"] < 0
  assert got["comparison"]["fa"]["a_is_better"] == 1
  assert got["comparison"]["iou"]["difference"] == pytest.approx(
    got["predictions"]["iou"] - got["compared"]["iou"]
  )
  assert "first is better (share)" in capsys.readouterr().out


def test_both_detectors_are_in_every_file_and_can_be_told_apart(
  folders, tmp_path, capsys, monkeypatch
):
  maps, masks, levels, _ = folders
  (tmp_path / "b").mkdir()
  long = tmp_path / "b" / "maps"
  for stem, level in levels.items():
    save(level // 2, long / f"{stem}.png")
  legends = []
  keep = lambda figure, path, dpi: legends.extend(  # noqa: E731
    [text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes
  )
  monkeypatch.setattr(score.plots, "save", keep)
  out = tmp_path / "out"
  got = score.run(long, masks, compare=maps, out=out, resamples=0)
  of_pixels = [f"{name}: {100 * got[key]['hse_p']:.2f}"
               for name, key in (("b/maps", "predictions"), ("maps", "compared"))]  # fmt: skip
  assert legends[0] == of_pixels and len(legends[1]) == 2
  printed = capsys.readouterr().out
  shown = [line.split()[0] for line in printed.splitlines()[1:]]
  assert [n for n in shown if n not in ("Warning:", "wrote")] == ["b/maps", "maps"]
  assert folder_names([maps, maps / "maps"]) == ["maps", "maps/maps"]
  for name, ending in (("predictions", ""), ("compared", "_compared")):
    rows = list(csv.DictReader(open(out / f"images{ending}.csv")))
    assert [row["file"] for row in rows] == sorted(levels)
    assert sum(int(row["hits"]) for row in rows) == got[name]["hits"]
    curves = np.load(out / f"curves{ending}.npz")
    assert curves["pixel_score"].max() == max(
      np.float32(level.max() // (2 if name == "predictions" else 1)) / np.float32(65535)
      for level in levels.values()
    )
  with pytest.raises(ValueError, match="are the same folder. Name two to compare"):
    score.run(maps, masks, compare=masks / "../maps")


def test_long_names_are_shown_whole(folders, tmp_path, capsys):
  maps, masks, *_ = folders
  copies = [tmp_path / f"predictions_of_the_detector_{i}" for i in (1, 2)]
  for copy in copies:
    shutil.copytree(maps, copy)
  score.run(copies[0], masks, compare=copies[1], resamples=0)
  printed = capsys.readouterr().out
  assert all(f"\n{copy.name} " in printed for copy in copies)


def test_an_interval_of_one_point_is_noted(folders, capsys):
  maps, masks, *_ = folders
  score.run(maps, masks, resamples=50)
  printed = capsys.readouterr().out
  assert "100.00–100.00" in printed and "Note: maps: an interval of one point (" in printed
  score.run(maps, masks, resamples=0)
  assert "Note" not in capsys.readouterr().out


def test_mat_files_are_one_problem_with_the_way_to_convert_them(folders, tmp_path):
  maps, masks, levels, truth = folders
  for stem, level in levels.items():
    for kind, array in (("maps", level / np.float32(65535)), ("masks", truth[stem])):
      (tmp_path / "mat" / kind).mkdir(parents=True, exist_ok=True)
      scipy.io.savemat(tmp_path / "mat" / kind / f"{stem}.mat", {"x": array})
  for pair in ((tmp_path / "mat/maps", masks), (maps, tmp_path / "mat/masks")):
    with pytest.raises(ValueError) as error:
      score.run(*pair)
    title, line = str(error.value).splitlines()
    assert title.startswith("1 problem ") and "there are 3 .mat. Convert every .mat file" in line
  call = re.search(r"np.save\('a.npy', (scipy.io.loadmat\('a.mat'\)\[NAME\])\)", line)[1]
  for kind in ("maps", "masks"):
    for path in (tmp_path / "mat" / kind).glob("*.mat"):
      own = call.replace("'a.mat'", "path").replace("NAME", "'x'")
      np.save(path.with_suffix(".npy"), eval(own, {"scipy": scipy, "path": path}))
  converted = score.run(tmp_path / "mat/maps", tmp_path / "mat/masks", resamples=0)
  assert converted["predictions"] == score.run(maps, masks, resamples=0)["predictions"]


@pytest.mark.filterwarnings("error")
def test_masks_without_targets_are_said_in_a_sentence(folders, capsys):
  maps, masks, _, truth = folders
  for stem, mask in truth.items():
    save(np.uint8(0 * mask), masks / f"{stem}.png")
  got = score.run(maps, masks, resamples=20)["predictions"]
  assert got["hse"] is None and got["targets"] == 0
  said = "Warning: maps: no mask has a target, so Pd, HSE-P, HSE-T, HSE are undefined."
  assert said in capsys.readouterr().out


def test_options_reach_the_metric(folders):
  maps, masks, levels, truth = folders
  got = score.run(maps, masks, resamples=0, connectivity=4, thresholds=[0.25, 0.75])
  stems = sorted(levels)
  expected = hse.score(
    [levels[s] / np.float32(65535) for s in stems],
    [truth[s] for s in stems],
    connectivity=4,
    thresholds=[0.25, 0.75],
  )
  assert got["predictions"] == expected.as_dict()
  assert got["options"]["connectivity"] == 4


def test_scoring_starts_neither_jax_nor_anything_but_the_core_requirements(folders):
  maps, masks, *_ = folders
  code = (
    "import sys; from fdep_jax import score; "
    f"score.run({str(maps)!r}, {str(masks)!r}, resamples=5); "
    "unwanted = ('jax', 'flax', 'sklearn', 'skimage', 'torch', 'tifffile'); "
    "print([m for m in unwanted if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def union(tmp_path):
  """Two datasets of two test and one train image with equal names, and maps of the test images."""
  rng = np.random.default_rng(1)
  root, arrays = tmp_path / "Both", {}
  for part in ("One", "Two"):
    folder = root / part
    (folder / "splits").mkdir(parents=True)
    (folder / "splits/test.txt").write_text("a\nb\n")
    (folder / "splits/train.txt").write_text("c\n")
    for stem in "abc":
      levels, mask = scene(rng, 20, 30)
      save(mask.astype(np.uint8) * 255, folder / "masks" / f"{stem}.png")
      save(np.zeros((20, 30), np.uint8), folder / "images" / f"{stem}.png")
      arrays[f"{part}_{stem}"] = levels, mask
  for name, (levels, _) in arrays.items():
    if not name.endswith("c"):
      save(levels, tmp_path / "maps" / f"{name}.png")
  return root, tmp_path / "maps", arrays


def expected_of(arrays, names):
  maps = [arrays[name][0] / np.float32(65535) for name in names]
  return hse.score(maps, [arrays[name][1] for name in names]).as_dict()


def test_a_datasets_split_is_scored_with_its_parts(union, caplog, capsys):
  root, maps, arrays = union
  got = score.run(maps, root, resamples=0)["predictions"]
  parts = got.pop("parts")
  assert got == expected_of(arrays, ["One_a", "One_b", "Two_a", "Two_b"])
  for part in ("One", "Two"):
    assert parts[part] == expected_of(arrays, [f"{part}_a", f"{part}_b"]) | {"images": 2}
  lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
  assert [line for line in lines if line != "Warning:"] == ["maps", "One", "Two"]
  save(arrays["One_c"][0], maps / "One_c.png")  # of the train split
  assert score.run(maps, root, resamples=0, split="test")["predictions"] == got | {"parts": parts}
  assert "that are not of split test" in caplog.text and ": 1, left out" in caplog.text
  with pytest.raises(ValueError, match=r"no prediction Two_c\.\* in"):
    score.run(maps, root, split="train")
  save(arrays["One_c"][0], maps / "unknown.png")
  with pytest.raises(ValueError, match=r"no mask unknown\.\* in split test"):
    score.run(maps, root)


def test_only_the_split_that_is_scored_must_exist(union):
  root, maps, arrays = union
  for part in ("One", "Two"):
    (root / part / "splits/train.txt").unlink()
  got = score.run(maps, root, resamples=0, split="test")["predictions"]
  assert got["images"] == 4
  with pytest.raises(ValueError, match="no split file for 'train'"):
    score.run(maps, root, split="all")


def test_one_dataset_is_named_by_its_folder_or_by_its_masks(union):
  root, _, arrays = union
  maps = root.parent / "alone"
  for stem in "ab":
    save(arrays[f"One_{stem}"][0], maps / f"{stem}.png")
  expected = expected_of(arrays, ["One_a", "One_b"])
  assert score.run(maps, root / "One", resamples=0)["predictions"] == expected
  got = score.run(maps, root / "One/masks", resamples=0, split="test")
  assert got["predictions"] == expected
  for masks in (root / "One/masks", root / "One"):  # the split is found, and named alone
    wrong = {"split": "all"} if masks.name == "One" else {}
    with pytest.raises(ValueError) as error:
      score.run(maps, masks, **wrong)
    title, line = str(error.value).splitlines()
    assert line.strip() == (
      f"{maps} holds the maps of the split test. Write --masks {root / 'One'} --split test"
    )
  for path in list(maps.iterdir()):
    path.rename(path.with_name(f"{path.stem}_pred.png"))
  with pytest.raises(ValueError, match="holds the maps of the split test"):
    score.run(maps, root / "One/masks")
  (maps / "b_pred.png").unlink()
  (maps / "a_pred.png").rename(maps / "a.png")
  with pytest.raises(ValueError) as error:
    score.run(maps, root / "One/masks")
  _, first, *rest = str(error.value).splitlines()
  assert "is a dataset. If the maps are of one split, write --masks" in first and len(rest) == 2
  with pytest.raises(ValueError, match="--split test: .*alone is no dataset"):
    score.run(maps, maps, split="test")


@pytest.mark.parametrize(
  ("of_maps", "of_masks"),
  [("{}_pred", "{}"), ("{}", "{}_mask"), ("out-{}.sigmoid", "gt_{}_v2"), ("pred_{}", "{}_pixels0")],
)
@pytest.mark.parametrize("stems", [("Misc_1", "Misc_2", "Misc_13"), ("XDU0",)])
def test_what_all_names_share_is_dropped_if_they_agree_then(tmp_path, of_maps, of_masks, stems):
  rng = np.random.default_rng(2)
  arrays = {stem: scene(rng, 20, 30) for stem in stems}
  for stem, (levels, mask) in arrays.items():
    save(levels, tmp_path / "maps" / f"{of_maps.format(stem)}.png")
    save(mask.astype(np.uint8) * 255, tmp_path / "masks" / f"{of_masks.format(stem)}.png")
  got = score.run(tmp_path / "maps", tmp_path / "masks", resamples=0)["predictions"]
  assert got == expected_of(arrays, sorted(stems))


def test_an_ending_that_not_all_share_is_kept(folders):
  maps, masks, *_ = folders
  for path in list(maps.iterdir())[:2]:
    path.rename(path.with_name(f"{path.stem}_pred.png"))
  with pytest.raises(ValueError, match="no prediction"):
    score.run(maps, masks)


def test_a_background_above_a_threshold_is_warned_of(tmp_path, capsys):
  mask = np.zeros((20, 30), bool)
  mask[3:6, 4:6] = True
  save(np.uint8(255 * mask), tmp_path / "masks/a.png")
  (tmp_path / "maps").mkdir()
  for background, warned in ((0.06, True), (0.04, False)):
    prob = np.where(mask, 0.9, background).astype(np.float32)
    prob[0, 0] = 0.01  # a third value, as binary maps have no curve
    np.save(tmp_path / "maps/a.npy", prob)
    score.run(tmp_path / "maps", tmp_path / "masks", resamples=0)
    assert ("Warning: maps: at prob > 0.05 " in capsys.readouterr().out) == warned


def test_maps_that_are_lower_on_targets_are_warned_of(folders, tmp_path, capsys):
  maps, masks, levels, truth = folders
  score.run(maps, masks, resamples=0)
  assert "lower on targets" not in capsys.readouterr().out
  for stem, level in levels.items():
    save(65535 - level, tmp_path / "inverted" / f"{stem}.png")
    save(np.uint8(255 * ~truth[stem]), tmp_path / "binary" / f"{stem}.png")
  score.run(tmp_path / "inverted", masks, compare=maps, resamples=0)
  said = "the maps are lower on targets (mean "
  printed = capsys.readouterr().out
  assert f"Warning: inverted: {said}" in printed and f"Warning: maps: {said}" not in printed
  targets = [65535 - levels[stem][truth[stem]] for stem in levels]
  mean = np.concatenate(targets).mean() / 65535
  assert f"(mean {mean:.3g}) than elsewhere" in printed and "save 1 − map" in printed
  score.run(tmp_path / "binary", masks, resamples=0)
  assert f"binary: {said}0) than elsewhere (mean 1)" in capsys.readouterr().out


def test_names_of_letters_do_not_make_kinds():
  found = problems.shorten([f"train: {name} has no mask" for name in ("car", "ship", "tree")], 2)
  assert found == [
    "train: car has no mask", "train: ship has no mask", "… and 1 more of this kind",
  ]  # fmt: skip


def test_twenty_problems_of_one_kind_are_shown(tmp_path):
  (tmp_path / "maps").mkdir()
  np.save(tmp_path / "maps/other.npy", np.zeros((5, 6)))
  for i in range(30):
    save(np.zeros((5, 6), np.uint8), tmp_path / "masks" / f"{i}.png")
  with pytest.raises(ValueError) as error:
    score.run(tmp_path / "maps", tmp_path / "masks")
  lines = str(error.value).splitlines()
  assert lines[0] == "31 problems with the files:" and "no mask other.*" in lines[1]
  assert len(lines) == 1 + 1 + 20 + 1 and lines[-1].strip() == "… and 10 more of this kind"
