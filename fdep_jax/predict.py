"""Finds targets in frames of any size and bit depth with a trained run (`--mode predict`).

from fdep_jax import predict
detector = predict.load("runs/msda")
result = predict.run("frames", "out", detector)  # what the command line does
prob = predict.Predictor(detector)(frame)  # or H×W probabilities of one H×W or H×W×3 array,
found = predict.targets(prob)  # and the targets in them
"""

import csv
import io
import json
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from fdep_jax import detector as detector_lib
from fdep_jax.data import frames
from fdep_jax.detector import Detector
from fdep_jax.runtime import files, mesh
from fdep_jax.tiling import Predictor

load = detector_lib.load


class Target(NamedTuple):
  """A connected component (8 neighbours) of the pixels above the threshold."""

  row: float  # centroid, pixels; (0, 0) is the centre of the first pixel
  col: float
  area: int  # pixels
  peak: float  # largest probability
  confidence: float  # mean probability over its pixels; between threshold and peak, not calibrated
  box: tuple[int, int, int, int]  # top, left, bottom, right; the last two one past the end


class Frame(NamedTuple):
  """What was found in one frame."""

  file: str  # as given, relative to the input folder
  page: int | None  # from 0, where the file has several
  output: str  # of the three pictures, relative to the output folder, without _prob.png
  height: int
  width: int
  targets: list[Target]


class Result(NamedTuple):
  """What `run` did."""

  out: pathlib.Path
  files: int  # of the source
  frames: list[Frame]
  unreadable: dict[str, str]  # file -> reason

  def __str__(self):
    number = sum(len(frame.targets) for frame in self.frames)
    return f"{number} targets in {len(self.frames)} frames; see {self.out / 'targets.csv'}"

  def complaint(self) -> str:
    """The files that could not be read."""
    lines = [f"{file}: {reason}" for file, reason in self.unreadable.items()]
    title = f"{len(lines)} of {self.files} files could not be read; the others are done:"
    return "\n  ".join([title, *lines])


def targets(prob: np.ndarray, threshold: float = 0.5) -> list[Target]:
  """The targets of an H×W probability map, in raster order of their first pixels."""
  from scipy import ndimage

  active = prob > np.float32(threshold)
  label, number = ndimage.label(active, np.ones((3, 3)))
  index = np.flatnonzero(active)
  owner = label.ravel()[index] - 1
  value = prob.ravel()[index].astype(np.float64)
  row, col = np.divmod(index, prob.shape[1])
  area = np.bincount(owner, minlength=number)
  rows, cols, mean = (np.bincount(owner, w, number) / area for w in (row, col, value))
  peak = np.zeros(number)
  np.maximum.at(peak, owner, value)
  return [
    Target(
      float(rows[i]), float(cols[i]), int(area[i]), float(peak[i]), float(mean[i]),
      (box[0].start, box[1].start, box[0].stop, box[1].stop),
    )
    for i, box in enumerate(ndimage.find_objects(label))
  ]  # fmt: skip


def command(flags) -> None:
  """`--mode predict`; unreadable files are a ValueError (exit code 2) after the others are done."""
  values = frames.parse_range(flags.range)
  out = pathlib.Path(flags.out or pathlib.Path(flags.workdir or ".") / "predictions").expanduser()
  _inputs(pathlib.Path(flags.input).expanduser(), out)  # refused before anything is loaded
  detector = load(flags.workdir, flags.checkpoint, flags.branch)
  mesh.cache_programs(detector.config)
  result = run(flags.input, out, detector, threshold=flags.threshold, values=values)
  print(result)
  if result.unreadable:
    raise ValueError(result.complaint())


def run(
  source: str | os.PathLike,
  out: str | os.PathLike,
  detector: Detector,
  *,
  threshold: float = 0.5,
  values: frames.Range = "auto",
  progress: bool = True,
) -> Result:
  """Predicts a file, or every picture below a folder, and writes what was found.

  For each frame `<stem>_prob.png` (16 bits, probability·65535), `<stem>_mask.png` (0 and 255) and
  `<stem>_overlay.png`, in folders as in the source; for all of them `targets.csv`, a line a
  target, and `targets.json`. Where two files of a folder differ in their suffix only, the stem
  keeps it; pages of a file get `_page0000` and on. Every file is whole or absent.

  Args:
    source: a file, or a folder with its sub folders; other files and hidden ones are ignored.
    out: folder to write.
    detector: from `load`.
    threshold: of masks and targets, exclusive.
    values: how values become grey levels, see `data.frames.grey_levels`.
    progress: show a bar.

  Returns:
    What was found, and the files that could not be read (the others are done).

  Raises:
    FileNotFoundError, ValueError: there is nothing to predict, or `out` cannot be written.
  """
  if not 0 <= threshold < 1:
    raise ValueError(f"threshold is {threshold}; it must be in [0, 1).")
  source, out = pathlib.Path(source).expanduser(), pathlib.Path(out).expanduser()
  inputs = _inputs(source, out)
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("targets.csv", "targets.json"):  # of an earlier run
      (out / name).unlink(missing_ok=True)
  except OSError as error:
    raise ValueError(f"{out} cannot be written ({error.strerror}). Choose another.") from None
  logging.info(
    "%d file%s, %s branch of %s", len(inputs), "s" * (len(inputs) != 1), detector.branch,
    detector.source,
  )  # fmt: skip
  done, unreadable = [], {}
  with tqdm(total=len(inputs), unit="file", disable=None if progress else True) as bar:
    predictor = Predictor(detector)
    readable = _read(inputs, values, unreadable, bar, predictor.check_size)
    for (file, page, output, levels), prob in predictor.stream(readable):
      frame = Frame(file, page, output, *prob.shape, targets(prob, threshold))
      _write_pictures(out / output, levels, prob, threshold, frame.targets)
      done.append(frame)
  order = {file: i for i, file in enumerate(inputs)}
  done.sort(key=lambda frame: (order[frame.file], frame.page or 0))
  settings = {
    "source": str(source),
    "detector": detector.source,
    "branch": detector.branch,
    "threshold": threshold,
    "range": values,
  }
  _write_targets(out, settings, done, unreadable)
  return Result(out, len(inputs), done, unreadable)


def _inputs(source: pathlib.Path, out: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
  """File as shown -> (path, stem of what is written for it), sorted; refuses to find nothing."""
  if source.is_file():
    return {source.name: (source, source.stem)}
  if not source.is_dir():
    raise FileNotFoundError(f"{source} does not exist. Give a picture or a folder of pictures.")
  if source.resolve() == out.resolve():
    raise ValueError(f"{out} is the folder of the input, too; choose another --out.")
  paths, others = [], 0
  for folder, names, inside in os.walk(source):
    folder = pathlib.Path(folder)
    names[:] = [
      n for n in names if n[0] != "." and (folder / n).resolve() != out.resolve()
    ]  # not what an earlier run has written
    for name in inside:
      fits = name[0] != "." and pathlib.Path(name).suffix.lower() in frames.SUFFIXES
      if fits and (folder / name).is_file():
        paths.append((folder / name).relative_to(source))
      else:
        others += 1
  if not paths:
    raise ValueError(
      f"{source} holds no pictures ({', '.join(frames.SUFFIXES)}; {others} other files)."
    )
  if others:
    logging.info("%s: %d other files ignored", source, others)
  paths.sort()
  # Compared without case: some file systems do.
  same = Counter(path.with_suffix("").as_posix().lower() for path in paths)
  found, taken = {}, set()
  for path in paths:
    alone = same[path.with_suffix("").as_posix().lower()] == 1
    stem = (path.with_suffix("") if alone else path).as_posix()
    while stem.lower() in taken:
      stem += "_"
    taken.add(stem.lower())
    found[path.as_posix()] = (source / path, stem)
  return found


def _read(inputs, values, unreadable, bar, check_size) -> Iterator:
  """((file, page, output, grey levels), grey levels) of every frame that can be read."""
  taken = {stem.lower() for _, stem in inputs.values()}
  for file, (path, stem) in inputs.items():
    held = None  # the frame before: a file's first page is one of several only if a second comes
    count = 0
    try:
      for count, frame in enumerate(frames.read(path), 1):
        levels = frames.grey_levels(frame, values)
        check_size(levels.shape[:2])
        if held is not None:
          yield _item(file, count - 2, stem, taken, held)
        held = levels
    except frames.FrameError as error:
      unreadable[file] = f"page {count}: {error}" if count else str(error)
    if held is not None:
      several = count > 1 or file in unreadable
      yield _item(file, count - 1 if several else None, stem, taken, held)
    bar.update()


def _item(file: str, page: int | None, stem: str, taken: set[str], levels: np.ndarray):
  if page is not None:
    stem = f"{stem}_page{page:04d}"
    while stem.lower() in taken:
      stem += "_"
    taken.add(stem.lower())
  return (file, page, stem, levels), levels


def _write_pictures(
  stem: pathlib.Path, levels: np.ndarray, prob: np.ndarray, threshold: float, found: list[Target]
) -> None:
  pictures = {
    "prob": Image.fromarray(np.rint(prob * 65535).astype(np.uint16)),
    "mask": Image.fromarray(np.uint8(255) * (prob > np.float32(threshold))),
    "overlay": overlay(levels, found),
  }
  for name, picture in pictures.items():
    content = io.BytesIO()
    picture.save(content, "PNG")
    _write(stem.with_name(f"{stem.name}_{name}.png"), content.getvalue())


_AMBER = (255, 176, 0)


def overlay(levels: np.ndarray, found: Sequence[Target], most: int = 500) -> Image.Image:
  """The frame in RGB with a box, number (the line in the CSV) and confidence at every target.

  Small frames are enlarged, so that boxes and letters do not hide what they are about.

  Args:
    levels: H×W or H×W×3 grey levels.
    found: targets in the CSV's order.
    most: at most so many are drawn, those of the highest confidence.
  """
  height, width = levels.shape[:2]
  scale = max(1, min(8, round(640 / max(height, width))))
  low, high = np.percentile(levels, (0.1, 99.99))  # for the eye only
  view = np.clip((levels - low) * (255 / max(high - low, 1)), 0, 255).astype(np.uint8)
  picture = Image.fromarray(view).convert("RGB")
  picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
  draw = ImageDraw.Draw(picture)
  side = max(picture.size)
  line, letters, gap = max(1, side // 800), max(12, side // 60), max(3, side // 200)
  font = ImageFont.load_default(letters)
  strongest = sorted(range(len(found)), key=lambda i: -found[i].confidence)[:most]
  labels = []  # where they are
  for i in strongest:
    top, left, bottom, right = (edge * scale for edge in found[i].box)
    box = (left - gap, top - gap, right + gap - 1, bottom + gap - 1)
    draw.rectangle(box, outline=_AMBER, width=line)
    text = f"{i + 1}: {found[i].confidence:.2f}"
    w, h = draw.textbbox((0, 0), text, font=font, stroke_width=1)[2:]
    free = [
      (x, y, x + w, y + h)
      for x, y in (
        (box[0], box[1] - h - 2),
        (box[0], box[3] + 2),
        (box[2] + 4, box[1]),
        (box[0] - w - 4, box[1]),
      )
      if 0 <= x <= picture.width - w and 0 <= y <= picture.height - h
    ]
    clear = [p for p in free if not any(_overlap(p, label) for label in labels)]
    labels.append((clear or free or [(0, 0, w, h)])[0])
    draw.text(labels[-1][:2], text, _AMBER, font, stroke_width=1, stroke_fill=(0, 0, 0))
  return picture


def _overlap(a: tuple, b: tuple) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


_COLUMNS = (
  "file", "row", "col", "area", "peak", "confidence", "top", "left", "bottom", "right", "page",
  "number",
)  # fmt: skip


def _write_targets(out: pathlib.Path, settings: dict, done: list[Frame], unreadable: dict) -> None:
  table = io.StringIO()
  writer = csv.writer(table, lineterminator="\n")
  writer.writerow(_COLUMNS)
  for frame in done:
    page = "" if frame.page is None else frame.page
    for number, t in enumerate(frame.targets, 1):
      shown = (f"{t.row:.2f}", f"{t.col:.2f}", t.area, f"{t.peak:.4f}", f"{t.confidence:.4f}")
      writer.writerow([frame.file, *shown, *t.box, page, number])
  content = {
    **settings,
    "frames": [
      {**frame._asdict(), "targets": [target._asdict() for target in frame.targets]}
      for frame in done
    ],
    "unreadable": unreadable,
  }
  _write(out / "targets.csv", table.getvalue())
  _write(out / "targets.json", json.dumps(content, indent=1) + "\n")


def _write(path: pathlib.Path, content: bytes | str) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, content)
  except OSError as error:
    raise ValueError(f"{path} cannot be written ({error.strerror}).") from None
