"""Draws figures of a table's runs: training curves, precision-recall curves, detections."""

import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import FrozenConfigDict

from fdep_jax import build, data, forward
from fdep_jax.data import Sample, frames
from fdep_jax.metrics import hse, per_image
from fdep_jax.report import plots
from fdep_jax.runtime import checkpoint
from fdep_jax.tables import experiments
from fdep_jax.tables.sweep import Run

IMAGES = 5  # rows of a grid
_MARKS = {"hit": "lime", "miss": "yellow", "false alarm": "red"}


def write(results, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes `training.png`, `pr.png` and `found_<baseline>.png` of the finished runs.

  All but the first need the runs' probability maps (eval.save_probs).

  Args:
    results: `table.Result` of every row.
    out: folder to write.

  Returns:
    The paths written.
  """
  finished = [result for result in results if result.runs]
  written = []
  if finished:
    written.append(training(out / "training.png", finished))
  mapped = [r for r in finished if totals(r.runs[0]) is not None]
  if mapped:
    written.append(precision_recall(out / "pr.png", mapped))
  baselines = experiments.baselines([r.row for r in results])
  for baseline in dict.fromkeys(baselines[r.row.name] for r in mapped):
    alike = [r for r in mapped if baselines[r.row.name] == baseline]
    written.append(grid(out / f"found_{baseline.replace('/', '_')}.png", alike))
  return [path for path in written if path is not None]


def training(path: pathlib.Path, results) -> pathlib.Path:
  """Draws loss and HSE of the deployed branch on the selection images; one line a seed.

  A point of the loss is the mean of a fiftieth of the logged steps: single ones differ too much.
  """
  figure, (left, right) = plots.figure(1, 2, (10, 4))
  for number, result in enumerate(results):
    for i, run in enumerate(result.runs):
      lines = _log(run)
      style = {"color": f"C{number % 10}", "alpha": 0.8, "lw": 1}
      style |= {"label": result.row.name} if not i else {}
      branch = forward.deployed_branch(run.config.mode)
      losses = ((line["step"], line.get(f"loss_{branch}", line.get("loss"))) for line in lines)
      left.plot(*_means(*_pairs(losses)), **style)
      scores = ((line["step"], line.get("eval", {}).get(branch, {}).get("hse")) for line in lines)
      right.plot(*_pairs(scores), **style, marker=".")
  left.set(xlabel="step", ylabel="loss of the deployed branch", yscale="log")
  right.set(xlabel="step", ylabel="HSE on the selection images, fraction", ylim=(0, 1))
  right.legend(fontsize=7)
  return plots.save(figure, path)


def precision_recall(path: pathlib.Path, results) -> pathlib.Path:
  """Draws the pixel and target curves of the first seed of every row."""
  figure, axes = plots.figure(1, 2, (10, 4.5))
  for result in results:
    score = totals(result.runs[0]).result()
    name = f"{result.row.name}, seed {result.runs[0].seed}"
    plots.precision_recall(axes, score, name)
  return plots.save(figure, path)


def grid(path: pathlib.Path, results) -> pathlib.Path | None:
  """Draws image, truth and each row's probabilities side by side, as the paper's Fig. 3.

  Circles mark hits in green, missed targets in yellow and false alarms in red, at 0.5.

  Returns:
    `path`; None if no test image has a target, and so nothing is drawn.
  """
  runs = [result.runs[0] for result in results]
  samples = test_images(runs[0])
  places = [i for i, sample in enumerate(samples) if sample.mask.any()]
  if not places:
    return None
  places = places[:: max(len(places) // IMAGES, 1)][:IMAGES]
  titles = ["image", "truth", *(r.row.name for r in results)]
  figure, axes = plots.figure(
    len(places), len(titles), (2.2 * len(titles), 2.2 * len(places) + 0.5)
  )
  axes = axes.reshape(len(places), len(titles))
  for row, place in zip(axes, places, strict=True):
    sample = samples[place]
    row[0].imshow(sample.image)
    row[1].imshow(sample.mask, cmap="gray", vmin=0, vmax=1)
    for axis, run in zip(row[2:], runs, strict=True):
      prob = _map(run, sample)
      axis.imshow(prob, cmap="gray", vmin=0, vmax=1)
      for kind, centre in found(prob, sample.mask):
        axis.plot(*centre[::-1], "o", ms=11, mfc="none", mec=_MARKS[kind], mew=1.2)
      axis.set(xlim=(-0.5, prob.shape[1] - 0.5), ylim=(prob.shape[0] - 0.5, -0.5))
  for axis, title in zip(axes[0], titles, strict=True):
    axis.set_title(title, fontsize=8)
  for axis in axes.flat:
    axis.set_xticks([]), axis.set_yticks([])
  figure.supxlabel("green: hit, yellow: missed, red: false alarm, at probability > 0.5", fontsize=8)
  return plots.save(figure, path)


def found(prob: np.ndarray, mask: np.ndarray) -> list[tuple[str, tuple[float, float]]]:
  """Lists hits, misses and false alarms of one image as (kind, (row, column) of the centroid)."""
  targets, components, claimed = hse.detections(prob, mask, hse.Options())
  marks = [
    ("hit" if claim >= 0 else "miss", (float(row), float(column)))
    for row, column, claim in zip(targets.row, targets.col, claimed, strict=True)
  ]
  free = np.ones(len(components), bool)
  free[claimed[claimed >= 0]] = False
  marks += [
    ("false alarm", (float(row), float(column)))
    for row, column in zip(components.row[free], components.col[free], strict=True)
  ]
  return marks


def totals(run: Run, branch: str = "") -> hse.Accumulator | None:
  """Accumulates the counts of a run's test images; None if it saved no maps (eval.save_probs).

  Args:
    run: a finished run.
    branch: "light" or "main"; by default the deployed one.
  """
  return _totals(run.folder, branch, _images_of(run))


def counts(run: Run, branch: str = "") -> per_image.PerImage | None:
  """Reads the counts of a run's test images, from `counts.npz` or else from its saved maps.

  Args:
    run: a finished run.
    branch: "light" or "main"; by default the deployed one.

  Returns:
    The counts, in the order of the test split; None if the run has neither, or was evaluated
    without this branch (eval.branches).

  Raises:
    ValueError: the file is damaged, or of another evaluation than metrics.json.
  """
  path = run.folder / per_image.FILE
  metrics = json.loads((run.folder / "metrics.json").read_text())
  branch = branch or metrics["deployed"]
  if not path.exists():
    total = totals(run, branch) if branch in metrics else None
    return total and per_image.of(total)
  found = per_image.load(path).get(branch)
  if found is None and branch not in metrics:
    return None
  known = {name: metrics.get(branch, {}).get(name) for name in ("images", "targets", "hits")}
  if found is not None:
    half = found.options.of_grid()[1]
    sums = (len(found), found.counts.targets.sum(), found.counts.hits[:, half].sum())
  if found is None or tuple(known.values()) != sums:
    raise ValueError(
      f"{path} is of another evaluation than metrics.json beside it. Evaluate the run again "
      "(--mode eval)."
    )
  return found


@functools.lru_cache(maxsize=64)
def _totals(folder: pathlib.Path, branch: str, config: FrozenConfigDict) -> hse.Accumulator | None:
  maps = _maps_folder(folder, branch)
  if maps is None:
    return None
  total, images = hse.Accumulator(), _test_images(config, _range(folder, config))
  # Of the images that were evaluated; older versions did not write it.
  known = json.loads((folder / "metrics.json").read_text()).get("test_sha256")
  if known is not None and known != data.fingerprint(images):
    raise ValueError(
      f"{folder} was evaluated on different test images or masks than {config.data.root} has "
      "now. Put the data back, or evaluate the run again (--mode eval)."
    )
  for sample in images:
    total.update(np.load(maps / _file(sample)), sample.mask)
  return total


def _maps_folder(folder: pathlib.Path, branch: str = "") -> pathlib.Path | None:
  """Returns the folder of a branch's maps (default: the deployed one), None if there is none."""
  branch = branch or json.loads((folder / "metrics.json").read_text())["deployed"]
  maps = folder / "probs" / branch
  return maps if maps.is_dir() else None


def _map(run: Run, sample: Sample) -> np.ndarray:
  return np.load(_maps_folder(run.folder) / _file(sample))


def _file(sample: Sample) -> str:
  return f"{sample.name.replace('/', '_')}.npy"


def test_images(run: Run) -> Sequence[Sample]:
  """Loads a run's test images, with the grey levels of its evaluation."""
  config = _images_of(run)
  return _test_images(config, _range(run.folder, config))


def _images_of(run: Run) -> FrozenConfigDict:
  """Returns the settings that choose a run's test images, as a key of caches."""
  names = ("root", "range", "lazy", "synthetic_test", "synthetic_size")
  return FrozenConfigDict({"data": {name: run.config.data[name] for name in names}})


def _range(folder: pathlib.Path, config: FrozenConfigDict) -> frames.Range:
  """Returns the range of a run's grey levels; what "auto" measured is in its checkpoints.

  Without any it is measured anew. Other levels than those of the evaluation are found by the
  fingerprint in metrics.json.
  """
  checkpoints = checkpoint.Checkpoints(folder)
  best = checkpoints.best_step() is not None
  if config.data.range != "auto" or not checkpoints.steps(best=best):
    return build.grey_range(config)
  _, meta = checkpoints.read(best=best)
  return tuple(meta["range"])


@functools.lru_cache(maxsize=4)
def _test_images(config: FrozenConfigDict, values: frames.Range) -> Sequence[Sample]:
  return build.load_test(config, values)


def _log(run: Run) -> list[dict]:
  path = run.folder / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _means(steps: list, values: list, parts: int = 50) -> np.ndarray:
  """Averages a curve over `parts` pieces; one of fewer than two points a piece stays as it is.

  Returns:
    (2, pieces): mean step and mean value of each.
  """
  curve = np.array([steps, values], float)
  if len(steps) < 2 * parts:
    return curve
  return np.stack([piece.mean(1) for piece in np.array_split(curve, parts, axis=1)], axis=1)


def _pairs(points) -> tuple[list, list]:
  kept = [(x, y) for x, y in points if y is not None]
  return [x for x, _ in kept], [y for _, y in kept]
