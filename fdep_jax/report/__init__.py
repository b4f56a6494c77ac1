"""Writes `examples.png` and `report.html`, which show the detections (`--mode report`).

`report.html` is one file that loads no others: the page `report.html` of this package, filled with
the metrics, the pictures and the probability maps of one evaluation or several.

from fdep_jax import report
report.of(["runs/msda", "runs/msda_original"], "comparison.html")  # runs that were evaluated
"""

import base64
import datetime
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import pathlib
import platform
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from fdep_jax.data import Sample
from fdep_jax.data.folders import folder_names
from fdep_jax.metrics import bootstrap, columns, hse
from fdep_jax.report import plots
from fdep_jax.runtime import files

# The page's thresholds are 1/STEPS, 2/STEPS … They include those of HSE-T exactly.
STEPS = 200
THRESHOLDS = (np.arange(1, STEPS) / STEPS).astype(np.float32)
PICTURE_SIDE = 1024  # pixels; larger pictures are reduced, their maps are not
_QUALITY = 95  # of WebP; high, as targets have a few pixels
_POINTS = 400  # of a drawn curve
_FORMAT = 1
_PLACE = re.compile(r'(<script type="application/json" id="data">)(.*?)(</script>)', re.DOTALL)


class Recorder:
  """Stores the maps of an evaluation for its report, compressed, as they are computed."""

  def __init__(self, samples: Sequence[Sample]):
    self._samples = samples
    self.maps: dict[str, list[str]] = {}  # branch -> packed level maps, in the samples' order

  def watch(
    self, maps: Iterator[tuple[int, dict[str, np.ndarray]]]
  ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields the maps of `evaluate.probabilities` unchanged and stores them."""
    for index, probs in maps:
      for name, prob in probs.items():
        packed = self.maps.setdefault(name, [""] * len(self._samples))
        packed[index] = pack(levels(prob))
      yield index, probs


def levels(prob: np.ndarray) -> np.ndarray:
  """Counts the `THRESHOLDS` that each probability exceeds: `prob > THRESHOLDS[k]` is level > k.

  Returns uint8. So the page's counts at its thresholds are exact; rounding to 8 bits would not be.
  """
  out = np.zeros(prob.shape, np.uint8)
  active = prob > THRESHOLDS[0]
  out[active] = np.searchsorted(THRESHOLDS, prob[active])
  return out


def pack(array: np.ndarray) -> str:
  """Encodes an array of bytes for the page: zlib, then base64."""
  return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def write(
  path: pathlib.Path,
  name: str,
  samples: Sequence[Sample],
  recorder: Recorder,
  totals: dict[str, hse.Accumulator],
  metrics: dict,
  config: dict[str, object],
  about: dict[str, object],
) -> None:
  """Writes the report of one evaluation.

  Args:
    path: of the page.
    name: of the run.
    samples: the images; those of a union part by part, in the order of "parts" in `metrics`.
    recorder: has stored all their maps.
    totals: their metrics by branch.
    metrics: as `metrics.json`, with the "intervals" of every branch.
    config: every setting by its dotted name.
    about: sources of the numbers, in words; `provenance` is added.
  """
  branches = {
    branch: {"curves": _curves(total.result()), "maps": recorder.maps[branch]}
    for branch, total in totals.items()
  }
  about = {**about, "images and masks, SHA-256": _fingerprint(samples), **provenance()}
  run = {"name": name, "about": about, "config": config, "metrics": metrics, "branches": branches}
  parts = [name for name, part in metrics.get("parts", {}).items() for _ in range(part["images"])]
  images = [
    {
      "name": sample.name,
      "part": part,
      "height": sample.mask.shape[0],
      "width": sample.mask.shape[1],
      "picture": _picture(sample.image),
      "mask": pack(sample.mask),
    }
    for sample, part in zip(samples, parts or [""] * len(samples), strict=True)
  ]
  _write(path, images, [run])


def of(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike) -> pathlib.Path:
  """Writes one report of several runs from the `report.html` of each.

  Args:
    workdirs: of the runs; the page compares up to four of their branches.
    out: path of the page, `.html`.

  Returns:
    `out`.

  Raises:
    FileNotFoundError: a run has no report.
    ValueError: a report is damaged, the runs were evaluated on different images, or `out` cannot
      be written.
  """
  folders = [pathlib.Path(workdir).expanduser() for workdir in dict.fromkeys(workdirs)]
  if not folders:
    raise ValueError("A report needs at least one run; none was given.")
  absent = [str(f / "report.html") for f in folders if not (f / "report.html").is_file()]
  if absent:
    raise FileNotFoundError(
      f"There is no {', no '.join(absent)}. Evaluate these runs first (--mode eval --workdir RUN). "
      "A network of a file, or of the zoo: --mode eval --checkpoint FILE --data DATA --out DIR, "
      "and then --runs DIR/DATA."
    )
  reports = [_read(folder / "report.html") for folder in folders]
  keys = ("name", "height", "width", "mask")
  shown = [[[image[key] for key in keys] for image in report["images"]] for report in reports]
  others = [str(f) for f, images in zip(folders, shown, strict=True) if images != shown[0]]
  if others:
    raise ValueError(
      f"{', '.join(others)}: evaluated on different images or masks than {folders[0]}. A "
      "report can only compare runs on the same test images."
    )
  runs = [report["runs"][0] for report in reports]
  for run, label in zip(runs, folder_names(folders), strict=True):
    run["name"] = label
  out = pathlib.Path(out).expanduser()
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, reports[0]["images"], runs)
  except OSError as error:
    raise ValueError(
      f"{out} cannot be written ({error.strerror}). Choose a different path."
    ) from None
  logging.info("wrote %s", out)
  return out


def command(flags) -> None:
  """Runs `--mode report`."""
  of(flags.runs, flags.out)


def intervals(total: hse.Accumulator) -> dict[str, list[float | None]]:
  """Computes the 95 % interval of every metric, {metric: [low, high]}; None if there is none."""
  return {
    name: [None if math.isnan(end) else end for end in ends]
    for name, ends in bootstrap.intervals(total).items()
  }


def provenance() -> dict[str, str]:
  """Returns the time, versions and device of this process, in words."""
  import jax

  names = ("jax", "jaxlib", "flax", "numpy")
  versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
  device = jax.devices()[0]
  return {
    "evaluated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "versions": f"Python {platform.python_version()}, {versions}",
    "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
  }


def _fingerprint(samples: Sequence[Sample]) -> str:
  """Returns a SHA-256 of the decoded images and masks, in order; file formats do not matter."""
  digest = hashlib.sha256()
  for sample in samples:
    for array in (sample.image, sample.mask):
      digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _picture(image: np.ndarray) -> str:
  picture = Image.fromarray(image)
  if (image == image[..., :1]).all():
    picture = picture.convert("L")
  picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
  content = io.BytesIO()
  picture.save(content, "WEBP", quality=_QUALITY)
  return base64.b64encode(content.getvalue()).decode()


def _curves(score: hse.Score) -> dict[str, list]:
  """Returns points (recall, precision) of both curves, thinned for drawing."""
  curves = score.curves
  true, false = curves["pixel_true"], curves["pixel_false"]
  recall = true / max(score.target_pixels, 1)
  # Evenly over recall, which may have few or many steps.
  at = np.unique(np.searchsorted(recall, np.linspace(0, 1, _POINTS)).clip(max=len(recall) - 1))
  pixel = np.stack([recall, true / np.maximum(true + false, 1)], 1)[at] if len(recall) else []
  target = np.stack([curves["target_recall"], curves["target_precision"]], 1)
  rounded = lambda points: np.round(points, 5).tolist()  # noqa: E731
  return {
    "pixel": rounded(pixel),
    "target": rounded(target[np.isfinite(target).all(1)]),
  }


def _write(path: pathlib.Path, images: list[dict], runs: list[dict]) -> None:
  data = {
    "format": _FORMAT,
    "steps": STEPS,
    "max_distance": hse.Options().max_distance,
    "columns": [[c.key, c.heading, c.factor] for c in columns.METRICS.values()],
    "images": images,
    "runs": runs,
  }
  text = json.dumps(files.finite(data), separators=(",", ":"), allow_nan=False)
  text = text.replace("<", "\\u003c")  # no text may end the surrounding <script>
  page = pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8")
  files.write(path, _PLACE.sub(lambda m: m[1] + text + m[3], page, count=1))


def _read(path: pathlib.Path) -> dict:
  """Reads back the data that `_write` put into a report."""
  try:
    found = _PLACE.search(path.read_text(encoding="utf-8"))
    data = json.loads(found[2])
    if data["format"] == _FORMAT:
      return data
  except (KeyError, TypeError, ValueError):
    pass
  raise ValueError(
    f"{path} is damaged or of a different version. Evaluate the run again (--mode eval)."
  )


def examples(
  path: pathlib.Path,
  samples: Sequence[Sample],
  maps: Sequence[dict[str, np.ndarray]],
  caption: str,
) -> None:
  """Writes a PNG, one row an image: image, truth, and each branch's probability map.

  Args:
    path: of the PNG.
    samples: the images.
    maps: for each image {branch: H×W probabilities}.
    caption: line below.
  """
  names = [name for name in ("light", "main") if name in maps[0]]
  titles = ["image", "truth", *(f"{name} branch" for name in names)]
  size = (2.2 * len(titles), 2.2 * len(samples) + 0.4)
  figure, axes = plots.figure(len(samples), len(titles), size, squeeze=False)
  for row, sample, probs in zip(axes, samples, maps, strict=True):
    row[0].imshow(sample.image)
    row[1].imshow(sample.mask, cmap="gray", vmin=0, vmax=1)
    for axis, name in zip(row[2:], names, strict=True):
      axis.imshow(probs[name], cmap="gray", vmin=0, vmax=1)
  for row in axes:
    for axis in row:
      axis.set_xticks([])
      axis.set_yticks([])
  for axis, title in zip(axes[0], titles, strict=True):
    axis.set_title(title, fontsize=9)
  figure.supxlabel(caption, fontsize=8)
  plots.save(figure, path)
