"""Evaluates the detectors without training, and finds targets with them (`--method`).

A method with its options is written as `fkrw`, `fkrw:published` or `nipps:weight=1`. An evaluation
is a folder like a trained run's: its config has mode "classical" and the method in place of a
network, and `metrics.json` has the same form. So tables and reports show it like any other.
"""

import hashlib
import inspect
import logging
import os
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from fdep_jax import classical, data, report, settings
from fdep_jax.metrics import columns, hse, per_image
from fdep_jax.report import folder as folder_lib
from fdep_jax.runtime import files

MODE = "classical"
_BRANCH = "light"  # where metrics.json has the numbers of what is deployed
_MAPS = "maps"  # folder of maps beside the runs, which they share


class Detector:
  """A method as `predict.run` uses it."""

  branch = MODE
  range = ""  # frames become grey levels by their own percentiles

  def __init__(self, method: str):
    classical.parse(method)  # refused before anything is read
    self.source = method

  def check_size(self, size: tuple[int, int]) -> None:
    """Accepts frames of every size."""

  def stream(
    self, items: Iterable[tuple[object, np.ndarray]]
  ) -> Iterator[tuple[object, np.ndarray]]:
    """(key, H×W float32 probabilities) of (key, grey levels) pairs, not in their order."""
    waiting = {}

    def numbered():  # keys hold whole images, which the pool need not see
      for place, (key, levels) in enumerate(items):
        waiting[place] = key
        yield place, levels

    for found in classical.maps(self.source, numbered()):
      yield waiting.pop(found.key), classical.probability(found.values)


def command(flags) -> None:
  """`--mode eval --method M --data A,B --out DIR`: a folder a dataset, and a table of them."""
  out = files.expand(flags.out)
  roots = [root.rstrip("/") for root in flags.data]
  names = [os.path.basename(root) or root for root in roots]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(f"--data names {', '.join(twice)} twice; their results would share a folder.")
  classical.parse(flags.method)
  folder_lib.check(out, {}, roots)
  data.check_all(roots)
  rows = {}
  for name, root in zip(names, roots, strict=True):
    config = config_of(flags.method, root)
    folder = out / f"{flags.method.replace(':', '-')}-{name}"
    rows[name] = evaluate(folder, config)
  print(table(rows))


def again(mode: str, workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Evaluates the folder of an earlier evaluation (`--mode eval --workdir DIR`).

  Raises:
    ValueError: `mode` is "train".
  """
  if mode == "train":
    method, root = config.model.backbone, config.data.root
    raise ValueError(
      f"{method} has nothing to train. Use --mode eval --method {method} --data {root} --out DIR."
    )
  metrics = evaluate(workdir, config)
  print(table({files.expand(workdir).resolve().name: metrics}))


def config_of(method: str, root: str) -> ConfigDict:
  """The base config changed to evaluate a method on a dataset."""
  from configs import base

  config = base.get_config()
  config.mode, config.model.backbone, config.data.root = MODE, method, root
  return config


def evaluate(
  workdir: str | os.PathLike, config: ConfigDict, processes: int | None = None
) -> dict[str, object]:
  """Scores a method on the test split; writes `metrics.json`, `counts.npz` and `report.html`.

  Every map is kept as an 8-bit picture in a folder `maps` beside `workdir`, from where an
  evaluation that was ended goes on, and others with the same images read it.

  Args:
    workdir: folder to write.
    config: of mode "classical".
    processes: see `classical.maps`.

  Returns:
    The content of `metrics.json`; numbers of the method under "light".

  Raises:
    ValueError, FileNotFoundError: the method, the data or the folder cannot be used.
  """
  workdir = files.expand(workdir)
  settings.check(config)
  samples = _test_images(config)
  settings.claim_workdir(workdir, config)
  method = config.model.backbone
  kept = workdir.parent / _MAPS / kept_folder(method)
  recorder, seconds = report.Recorder(samples), []
  save = workdir / "probs" / _BRANCH if config.eval.save_probs else None

  def watched():
    with tqdm(total=len(samples), unit="image", disable=not config.log.progress or None) as bar:
      for place, prob, took in probabilities(method, samples, kept, processes):
        seconds.append(took)
        bar.update()
        if save is not None:
          save.mkdir(parents=True, exist_ok=True)
          np.save(save / f"{samples[place].name.replace('/', '_')}.npy", prob)
        yield place, {_BRANCH: prob}

  total, order = hse.Accumulator(), []
  for place, probs in recorder.watch(watched()):
    order.append(place)
    total.update(probs[_BRANCH], samples[place].mask)
  total = total.select(np.argsort(order))  # whatever maps were kept
  chosen = total.result().as_dict() | {"intervals": report.intervals(total), "checkpoint": 0}
  metrics = {
    _BRANCH: chosen,
    "params": None,
    "params_deployed": None,
    "deployed": _BRANCH,
    "flops": None,
    "seconds_per_image": statistics.fmean(seconds),
    "split": "test",
    "selected_on": None,
    "images": len(samples),
    "test_sha256": data.fingerprint(samples),
    "last": {_BRANCH: chosen, "checkpoint": 0},
    "steps": 0,
  }
  per_image.save(workdir / per_image.FILE, {_BRANCH: total})
  files.write_json(workdir / "metrics.json", metrics)
  about = {
    "method": f"{method}, without training; each map divided by its maximum, 8 bits",
    "data": f"{config.data.root}, {columns.counted(len(samples), 'test image')}",
  }
  totals, flat = {_BRANCH: total}, settings.flat(config)
  name = workdir.resolve().name
  report.write(workdir / "report.html", name, samples, recorder, totals, metrics, flat, about)
  logging.info("wrote %s and report.html beside it", workdir / "metrics.json")
  return metrics


def table(rows: dict[str, dict]) -> str:
  """Formats the paper's columns, a row a dataset; percent, Fa in 10⁻⁶."""
  shown = {**columns.METRICS, "time_s": columns.COSTS["time_s"]}
  width = max(15, *map(len, rows)) + 1
  lines = [f"{'':<{width}}" + "".join(f"{column.heading:>10}" for column in shown.values())]
  for name, metrics in rows.items():
    values = metrics[_BRANCH] | {"seconds_per_image": metrics["seconds_per_image"]}
    cells = [column.shown(values[column.key]) for column in shown.values()]
    lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
  return "\n".join(lines)


def kept_folder(method: str) -> str:
  """A name that changes with the method's program, so that its older maps are not taken."""
  module = inspect.getmodule(classical.method(classical.parse(method)[0]))
  program = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:8]
  return f"{method.replace(':', '-')}-{program}"


def _test_images(config: ConfigDict) -> list[data.Sample]:
  if config.data.root == "synthetic":
    return data.scenes(config.data.synthetic_test, config.data.synthetic_size, seed=2)
  return data.load(config.data.root, "test")


def probabilities(
  method: str, samples: Sequence[data.Sample], kept: pathlib.Path, processes: int | None
) -> Iterator[tuple[int, np.ndarray, float]]:
  """(place, probabilities, seconds) of all samples: the maps that are kept, then the others."""
  paths = [kept / f"{_digest(sample.image)}.png" for sample in samples]
  absent = []
  for place, path in enumerate(paths):
    found = _read(path, samples[place].image.shape[:2])
    if found is None:
      absent.append(place)
    else:
      yield place, *found
  try:
    kept.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"{kept} cannot be written ({error.strerror}). Choose another.") from None
  todo = ((place, samples[place].image) for place in absent)
  for place, values, seconds in classical.maps(method, todo, processes):
    prob = classical.probability(values)
    _write(paths[place], prob, seconds)
    yield place, prob, seconds


def _digest(image: np.ndarray) -> str:
  grey = np.ascontiguousarray(classical.grey(image))
  return hashlib.sha256(repr(grey.shape).encode() + grey.tobytes()).hexdigest()[:32]


def _write(path: pathlib.Path, prob: np.ndarray, seconds: float) -> None:
  about = PngImagePlugin.PngInfo()
  about.add_text("seconds", f"{seconds:.6f}")
  with files.replacing(path) as partial:
    Image.fromarray(np.uint8(np.rint(prob * 255))).save(partial, "PNG", pnginfo=about)


def _read(path: pathlib.Path, size: tuple[int, int]) -> tuple[np.ndarray, float] | None:
  """A kept map, or None if there is none that can be used."""
  try:
    with Image.open(path) as picture:
      values, seconds = np.array(picture), float(picture.info["seconds"])
  except (OSError, KeyError, ValueError, SyntaxError):
    return None
  if values.shape != size or values.dtype != np.uint8:
    return None
  return np.float32(values / 255), seconds
