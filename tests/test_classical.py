"""Methods without training: the goldens, the definitions by brute force, and their use."""

import json
import pathlib

import numpy as np
import pytest
from helpers import command
from PIL import Image
from scipy import ndimage

from configs import base, tables
from fdep_jax import classical, predict, score, settings, untrained
from fdep_jax.classical.fkrw import parts
from fdep_jax.classical.mpcm import contrast
from fdep_jax.classical.nipps import separate
from fdep_jax.tables import experiments, sweep, table
from fdep_jax.tables.experiments import Table

fkrw, mpcm, nipps = (classical.method(name) for name in ("fkrw", "mpcm", "nipps"))
SUBSET = (
  (43, 57),
  (0.232215, 0.445381, 0.740413),
)  # hits, targets; IoU, HSE-P, HSE-T of the first 40 images


def scene(height=60, width=70, seed=0, side=4):
  """A cloudy background with one square target around (20.5, 30.5), whole grey levels."""
  rng = np.random.default_rng(seed)
  image = (
    90
    + 40 * ndimage.gaussian_filter(rng.normal(size=(height, width)), 6)
    + rng.normal(size=(height, width))
  )
  half = side // 2
  image[21 - half : 21 + half, 31 - half : 31 + half] += 60
  return np.rint(image)


def test_methods_are_found_by_file_name():
  assert classical.names() == ["fkrw", "mpcm", "nipps"]
  with pytest.raises(
    ValueError, match="No method is called 'top_hat'; there are fkrw, mpcm, nipps"
  ):
    classical.method("top_hat")


def test_options_follow_the_name():
  assert classical.parse("mpcm") == ("mpcm", {})
  assert classical.parse("fkrw:published") == ("fkrw", {"published": True})
  assert classical.parse("nipps:weight=1,ratio=0.02") == ("nipps", {"weight": 1.0, "ratio": 0.02})
  with pytest.raises(ValueError, match="nipps has no option 'sizes'; it has weight, ratio"):
    classical.parse("nipps:sizes=3")
  with pytest.raises(ValueError, match="mpcm has no option 'sizes'; it has bright_only[.]"):
    classical.parse("mpcm:sizes=3")  # a sequence, which a number cannot be
  with pytest.raises(ValueError, match="option ratio of nipps is 'low'; give a number"):
    classical.parse("nipps:ratio=low")


def test_every_method_equals_its_goldens(shared):
  """On real images. The definitions are tested without them, below."""

  def load(name):
    return np.load(shared / "golden" / "classical" / f"{name}.npz")

  for name in ("nuaa_Misc_338", "nuaa_Misc_412", "nudt_000011"):
    data = load(name)
    image = data["image"]
    found = {
      "mpcm": mpcm(image),
      "mpcm_357": mpcm(image, (3, 5, 7)),
      **{f"pcm{size}": contrast(image, size) for size in (3, 9)},
      "fkrw": fkrw(image),
      "fkrw_quirk": fkrw(image, published=True),
      **{
        f"fkrw_{part}": value
        for part, value in zip(("smooth", "response", "cp", "hg"), parts(image), strict=True)
      },
      "nipps": nipps(image),
      "nipps_L1": nipps(image, weight=1),
    }
    for key, ours in found.items():
      bound = 1e-6 if key.startswith("nipps") else 1e-9
      assert np.abs(ours - data[key]).max() < bound, (name, key)
  # The published FKRW loses a saturated target.
  data = load("nuaa_Misc_416_saturated")
  assert np.abs(mpcm(data["image"]) - data["mpcm"]).max() < 1e-9
  assert np.abs(fkrw(data["image"]) - data["fkrw"]).max() < 1e-9
  assert data["fkrw"].max() > 0.9
  assert not fkrw(data["image"], published=True).any()


def test_mpcm_is_its_definition():
  image, size = scene(14, 17), 5
  reach = size + size // 2
  padded = np.pad(image, reach, "edge")
  ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]

  def mean(row, col):
    row, col = row + reach - size // 2, col + reach - size // 2
    return padded[row : row + size, col : col + size].mean()

  for row, col in np.ndindex(image.shape):
    d = [mean(row, col) - mean(row + size * r, col + size * c) for r, c in ring]
    expected = min(d[i] * d[i + 4] for i in range(4))
    assert abs(contrast(image, size)[row, col] - expected) < 1e-9
    assert mpcm(image, (size,))[row, col] == pytest.approx(max(expected, 0), abs=1e-9)


def test_mpcm_of_bright_spots_only():
  image = scene()
  image[40:42, 50:52] -= 60
  both, bright = mpcm(image), mpcm(image, bright_only=True)
  assert both[40, 50] > 500 and not bright[40, 50]
  assert bright[20, 30] == both[20, 30] > 500


@pytest.mark.parametrize("shape", [(60, 70), (70, 330)])
def test_nipps_is_its_definition(shape):
  image = scene(*shape)
  rows, cols = ([*range(0, n - 49, 10)] for n in shape)
  patches = [image[r : r + 50, c : c + 50].T.ravel() for c in cols for r in rows]
  matrix = np.stack(patches, 1)
  lam = 2 / np.sqrt(min(matrix.shape))
  values = np.linalg.svd(matrix, compute_uv=False)
  kept = max(int((values / values[0] >= 0.005).sum()), 1)
  multiplier = matrix / max(values[0], np.abs(matrix).max() / lam)
  low, penalty = np.zeros_like(matrix), 1.25 / values[0]
  for _ in range(1000):
    sparse = np.maximum(matrix - low + (multiplier - lam) / penalty, 0)
    u, s, v = np.linalg.svd(matrix - sparse + multiplier / penalty, full_matrices=False)
    s[kept:] = np.maximum(s[kept:] - 1 / penalty, 0)
    low = (u * s) @ v
    missing = matrix - low - sparse
    multiplier += penalty * missing
    penalty *= 1.5
    if np.linalg.norm(missing) < 1e-7 * np.linalg.norm(matrix):
      break
  found, n, _ = separate(matrix)
  assert n == kept
  assert np.abs(found - sparse).max() < 1e-6


def test_wide_matrices_are_separated_as_their_transposes():
  matrix = np.abs(np.random.default_rng(0).normal(size=(30, 80))) + 50
  matrix[3, 40] += 90
  assert np.abs(separate(matrix)[0] - separate(matrix.T)[0].T).max() < 1e-8


@pytest.mark.parametrize("name", ["fkrw", "fkrw:published", "mpcm", "nipps"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 3), (7, 40), (49, 53)])
def test_images_of_any_size_have_a_map(name, shape):
  name, options = classical.parse(name)
  image = np.random.default_rng(1).integers(0, 256, shape)
  values = classical.method(name)(image, **options)
  assert values.shape == shape and values.dtype == np.float64
  assert np.isfinite(values).all() and values.min() >= 0


@pytest.mark.parametrize("name", classical.names())
@pytest.mark.parametrize("level", [0, 0.1, 77, 255])
def test_a_constant_image_has_no_target(name, level):
  values = classical.method(name)(np.full((64, 80), level))
  assert not classical.probability(values).any()


@pytest.mark.parametrize("name, side", [("fkrw", 4), ("mpcm", 4), ("nipps", 2)])
def test_a_target_is_found_where_it_is(name, side):
  prob = classical.probability(classical.method(name)(scene(110, 120, side=side)))
  (target,) = predict.targets(prob)
  assert abs(target.row - 20.5) <= 1.5 and abs(target.col - 30.5) <= 1.5


@pytest.mark.parametrize("name", classical.names())
def test_what_is_no_image_is_refused(name):
  method = classical.method(name)
  with pytest.raises(ValueError, match=r"shape \(4, 4, 3\); give H×W grey levels, one channel"):
    method(np.zeros((4, 4, 3)))
  with pytest.raises(ValueError, match="NaN or infinite"):
    method(np.full((4, 4), np.nan))


def test_probabilities_are_parts_of_the_largest_value():
  values = np.array([[-3.0, 0.0, 1.0], [2.0, 3.0, 4.0]])
  exact = [[0, 0, 0.25], [0.5, 0.75, 1]]
  assert classical.probability(values, eight_bit=False).tolist() == exact
  assert classical.probability(values) == pytest.approx(np.rint(np.array(exact) * 255) / 255)
  assert not classical.probability(np.full((2, 2), -1.0)).any()


def test_colours_become_grey_as_in_pillow():
  colours = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
  expected = np.asarray(Image.fromarray(colours).convert("L"))
  assert (classical.grey(colours) == expected).all()
  assert np.abs(classical.grey(colours.astype(np.float32)) - expected).max() < 0.51


def test_a_pool_gives_what_one_process_gives():
  images = [(i, scene(20 + i, 30, seed=i)) for i in range(5)]
  alone = {found.key: found.values for found in classical.maps("mpcm", images, processes=1)}
  pooled = {found.key: found.values for found in classical.maps("mpcm", images, processes=2)}
  assert alone.keys() == pooled.keys() == {0, 1, 2, 3, 4}
  assert all((alone[key] == pooled[key]).all() for key in alone)


# Their use.


@pytest.fixture
def dataset(tmp_path):
  """Two scenes as a dataset; the second has a target that no method can find."""
  root = tmp_path / "TWO"
  for name in ("images", "masks", "splits"):
    (root / name).mkdir(parents=True)
  for i in range(2):
    mask = np.zeros((60, 70), np.uint8)
    mask[20:22, 30:32] = 255
    mask[50, 5] = 255 * i
    Image.fromarray(scene(seed=i).astype(np.uint8)).save(root / "images" / f"{i}.png")
    Image.fromarray(mask).save(root / "masks" / f"{i}.png")
  for split, name in (("train", 0), ("test", 1)):
    (root / "splits" / f"{split}.txt").write_text(f"{name}\n")
  return root


def config_of(root, method="mpcm"):
  config = untrained.config_of(method, str(root))
  config.log.progress = False
  return config


def test_an_evaluation_is_a_folder_like_a_runs(tmp_path, dataset):
  out = tmp_path / "out" / "mpcm-TWO"
  metrics = untrained.evaluate(out, config_of(dataset), processes=1)
  assert metrics == json.loads((out / "metrics.json").read_text())
  found = metrics[metrics["deployed"]]
  assert (found["hits"], found["targets"], found["pd"]) == (1, 2, 0.5)
  assert metrics["seconds_per_image"] > 0 and metrics["params"] is None
  assert settings.load(out).mode == "classical"
  assert "report.html" in [path.name for path in out.iterdir()]
  with pytest.raises(ValueError, match="model.backbone: mpcm there, fkrw here"):
    untrained.evaluate(out, config_of(dataset, "fkrw"), processes=1)


def test_maps_that_are_kept_are_not_computed_again(tmp_path, dataset, monkeypatch):
  first = untrained.evaluate(tmp_path / "out" / "a", config_of(dataset), processes=1)
  monkeypatch.setattr(classical, "maps", lambda method, images, processes: iter(list(images)))
  again = untrained.evaluate(tmp_path / "out" / "b", config_of(dataset), processes=1)
  assert again["light"]["iou"] == first["light"]["iou"]
  assert again["seconds_per_image"] == pytest.approx(first["seconds_per_image"], abs=1e-6)
  (kept,) = pathlib.Path(tmp_path, "out", "maps").glob("mpcm-*/*.png")
  kept.write_bytes(kept.read_bytes()[:50])  # a damaged one is
  with pytest.raises(ValueError):
    untrained.evaluate(tmp_path / "out" / "c", config_of(dataset), processes=1)


def test_predicted_maps_score_as_the_evaluation_does(tmp_path, dataset):
  metrics = untrained.evaluate(tmp_path / "out" / "a", config_of(dataset, "fkrw"), processes=1)
  frames = tmp_path / "frames"
  frames.mkdir()
  (frames / "1.png").write_bytes((dataset / "images" / "1.png").read_bytes())
  predict.run(frames, tmp_path / "maps", untrained.Detector("fkrw"), progress=False)
  masks = tmp_path / "masks"
  masks.mkdir()
  (masks / "1.png").write_bytes((dataset / "masks" / "1.png").read_bytes())
  scored = score.run(tmp_path / "maps", masks, resamples=0)["predictions"]
  for name in ("iou", "niou", "pd", "fa", "hse_p", "hse_t", "hse"):
    assert scored[name] == metrics["light"][name]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--mode", "eval", "--method", "mpcm"], "--mode eval needs --data and --out."),
    (
      ["--mode", "eval", "--method", "tophat", "--data", "x", "--out", "y"],
      "No method is called 'tophat'",
    ),
    (["--mode", "eval", "--method", "mpcm", "--data", "a/x,b/x", "--out", "y"], "names x twice"),
    (
      ["--mode", "predict", "--method", "mpcm", "--input", "docs", "--branch", "main"],
      "leave out --branch",
    ),
    (
      ["--mode", "train", "--config", "configs/base.py", "--workdir", "y"]
      + ["--config.mode=classical", "--config.model.backbone=mpcm"],
      "mpcm has nothing to train. Use --mode eval --method mpcm",
    ),
  ],
)
def test_command_lines_that_cannot_work_end_in_a_sentence(arguments, message):
  done = command(*arguments)
  assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_line_evaluates_several_datasets(tmp_path, dataset):
  other = dataset.with_name("OTHER")
  dataset.joinpath("splits/test.txt").write_text("1\n")
  import shutil

  shutil.copytree(dataset, other)
  done = command(
    "--mode", "eval", "--method", "mpcm", "--data", f"{dataset},{other}", "--out", tmp_path / "out"
  )
  assert done.returncode == 0, done.stderr
  assert "TWO" in done.stdout and "OTHER" in done.stdout
  assert (tmp_path / "out/mpcm-OTHER/metrics.json").exists()
  done = command("--mode", "eval", "--workdir", tmp_path / "out/mpcm-OTHER")
  assert done.returncode == 0 and "mpcm-OTHER" in done.stdout, done.stderr


def test_rows_run_in_the_sweep_and_land_in_the_table(tmp_path, dataset):
  label = ("MPCM", "No training")
  changes = {"mode": "classical", "model.backbone": "mpcm", "data.root": str(dataset)}
  rows = (experiments.Row("mpcm", label, changes, {"iou": 18.54, "hse": 4.24}),)
  rows += (rows[0]._replace(name="broken", changes=changes | {"data.root": "absent"}),)
  of = Table("T", ("Method", "Scheme"), ("iou", "hse"), rows)
  workdir = tmp_path / "runs"
  failed = sweep.sweep(of, base.get_config(), workdir)
  assert [run.row.name for run in failed] == ["broken"]
  results = table.collect(of, base.get_config(), workdir)
  cells = results[0].cells
  expected = json.loads((workdir / "mpcm_seed0" / "metrics.json").read_text())["light"]["iou"]
  assert cells["iou"].paper == 18.54 and cells["iou"].mean == pytest.approx(100 * expected)
  assert cells["params_m"].mean is None and cells["time_s"].mean > 0
  assert "| MPCM |" in table.markdown(of, results)


def test_tables_s3_and_s4_have_the_methods_on_every_part():
  found = {}
  for name in ("tableS3", "tableS4"):
    rows = experiments.load(f"configs/tables/{name}.py").rows
    found[name] = [row for row in rows if row.changes["mode"] == "classical"]
    for row in found[name]:
      settings.check(experiments.resolve(base.get_config(), row, 0, "runs"))
  assert [row.label[0] for row in found["tableS3"]] == ["FKRW", "MPCM", "NIPPS"]
  sides = [(row.label[0], row.side) for row in found["tableS4"]]
  assert sides == [(m, side) for m in ("FKRW", "MPCM", "NIPPS") for side in tables.DATASETS]
  assert found["tableS4"][0].paper["pd"] == 77.19 and found["tableS3"][2].paper["hse"] == 10.37


@pytest.mark.slow
def test_published_fkrw_on_a_fixed_subset(shared):
  # The first 40 test images of NUAA-SIRST; the whole sets: python -m benchmarks.reading.
  from fdep_jax import data
  from fdep_jax.metrics import hse

  samples = data.load(shared / "data" / "NUAA-SIRST", "test")[:40]
  images = ((i, sample.image) for i, sample in enumerate(samples))
  total = hse.Accumulator()
  for found in classical.maps("fkrw:published", images, processes=1):
    total.update(classical.probability(found.values), samples[found.key].mask)
  result = total.result()
  assert (result.hits, result.targets) == SUBSET[0]
  assert (result.iou, result.hse_p, result.hse_t) == pytest.approx(SUBSET[1], abs=5e-4)
