"""Finds targets in frames of any size and bit depth with a trained run (`--mode predict`).

from fdep_jax import predict
detector = predict.load("runs/msda")
result = predict.run("frames", "out", detector)  # as the command line does
prob = predict.Predictor(detector)(frame)  # H×W probabilities of one H×W or H×W×3 array
found = predict.targets(prob)  # the targets in them
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
from fdep_jax import untrained
from fdep_jax.data import frames
from fdep_jax.detector import Detector
from fdep_jax.metrics import columns
from fdep_jax.predict.tiling import Predictor, levels_of
from fdep_jax.report import folder as folder_lib
from fdep_jax.runtime import files, mesh
from fdep_jax.runtime.problems import shorten

load = detector_lib.load
load_published = detector_lib.load_published


class Target(NamedTuple):
  """A connected component (8 neighbours) of the pixels above the threshold."""

  row: float  # centroid, pixels; (0, 0) is the centre of the first pixel
  col: float
  area: int  # pixels
  peak: float  # largest probability
  confidence: float  # mean probability over its pixels, not calibrated
  box: tuple[int, int, int, int]  # top, left, bottom, right; the last two exclusive


class Frame(NamedTuple):
  """The targets found in one frame."""

  file: str  # as given, relative to the input folder
  page: int | None  # 0-based; None if the file has only one
  output: str  # path of its pictures in the output folder, without _prob.png and so on
  height: int
  width: int
  targets: list[Target]


class Result(NamedTuple):
  """The outcome of `run`."""

  out: pathlib.Path
  files: int  # in the source
  frames: list[Frame]
  unreadable: dict[str, str]  # file -> reason

  def __str__(self):
    number = sum(len(frame.targets) for frame in self.frames)
    found = f"{columns.counted(number, 'target')} in {columns.counted(len(self.frames), 'frame')}"
    return f"{found}; see {self.out / 'targets.csv'}"

  def complaint(self) -> str:
    """Describes the files that could not be read."""
    lines = [f"{file}: {reason}" for file, reason in self.unreadable.items()]
    number = f"{len(lines)} of {columns.counted(self.files, 'file')}"
    title = f"{number} could not be read; the others are done:"
    return "\n  ".join([title, *shorten(lines)])


def targets(prob: np.ndarray, threshold: float = 0.5) -> list[Target]:
  """Finds the targets of an H×W probability map, in raster order of their first pixels.

  Args:
    prob: float probabilities.
    threshold: a target's pixels are above it.
  """
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
  """Runs `--mode predict`.

  Raises:
    ValueError: files could not be read (exit code 2); the others are done.
  """
  values = frames.parse_range(flags.range) if flags.range else None
  out = pathlib.Path(flags.out or pathlib.Path(flags.workdir or ".") / "predictions").expanduser()
  folder_lib.check(out, {})
  _inputs(pathlib.Path(flags.input).expanduser(), out)  # checks folders before loading
  detector = _detector(flags)
  result = run(flags.input, out, detector, threshold=flags.threshold, values=values)
  print(result)
  if result.unreadable:
    raise ValueError(result.complaint())


def _detector(flags):
  """Loads the run, the published network or the method that the command line names.

  Raises:
    ValueError: both are named, or a method with a flag that only a run has.
  """
  if flags.method:
    names = ("checkpoint", "branch") if flags.out else ("checkpoint", "branch", "workdir")
    both = [f"--{name}" for name in names if getattr(flags, name)]
    if both:
      raise ValueError(
        f"--method {flags.method} needs no trained run; leave out {' and '.join(both)}. "
        "--out names the folder to write."
      )
    return untrained.Detector(flags.method)
  detector = detector_lib.of_flags(flags)
  mesh.cache_programs(flags.config or detector.config)
  return detector


def run(
  source: str | os.PathLike,
  out: str | os.PathLike,
  detector: Detector | untrained.Detector,
  *,
  threshold: float = 0.5,
  values: frames.Range | None = None,
  progress: bool = True,
) -> Result:
  """Finds the targets in a file, or in every picture below a folder, and writes them.

  Writes for each frame `<stem>_prob.png` (16 bits, probability·65535), `<stem>_mask.png` (0 and
  255) and `<stem>_overlay.png`, in the same sub folders as in the source. Writes for all frames
  `targets.csv`, one line a target, and `targets.json`. If two files of a folder differ only in
  their suffix, the stem includes it. Pages of a file are numbered `_page0000`, `_page0001` and so
  on. A file is written whole or not at all.

  Args:
    source: a file, or a folder; includes sub folders, ignores other and hidden files.
    out: folder to write.
    detector: from `load`, or `untrained.Detector("mpcm")`.
    threshold: pixels of masks and targets are above it.
    values: range that becomes the grey levels, see `data.frames.grey_levels`; default that of the
      training, which takes no frames of 8 bits, else "auto".
    progress: show a bar.

  Returns:
    The targets, and the files that could not be read (the others are done).

  Raises:
    FileNotFoundError, ValueError: there is no picture, or `out` cannot be written.
  """
  if not 0 <= threshold < 1:
    raise ValueError(f"threshold is {threshold}; it must be in [0, 1).")
  source, out = pathlib.Path(source).expanduser(), pathlib.Path(out).expanduser()
  inputs = _inputs(source, out)
  _warn_of_replacing(out, {"source": str(source), "detector": detector.source})
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("targets.csv", "targets.json"):  # of an earlier run
      (out / name).unlink(missing_ok=True)
  except OSError as error:
    raise ValueError(
      f"{out} cannot be written ({error.strerror}). Choose a different folder."
    ) from None
  logging.info(
    "%s, %s branch of %s", columns.counted(len(inputs), "file"), detector.branch, detector.source
  )
  done, unreadable = [], {}
  with tqdm(total=len(inputs), unit="file", disable=None if progress else True) as bar:
    predictor = Predictor(detector) if isinstance(detector, Detector) else detector
    readable = _read(inputs, values, detector.range, unreadable, bar, predictor.check_size)
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
    "range": values or detector.range or "auto",
  }
  _write_targets(out, settings, done, unreadable)
  return Result(out, len(inputs), done, unreadable)


def _warn_of_replacing(out: pathlib.Path, about: dict[str, str]) -> None:
  """Tells of targets of another source or detector in the folder to write."""
  try:
    found = json.loads((out / "targets.json").read_text())
    before = {name: found[name] for name in about}
  except (OSError, ValueError, KeyError, TypeError):
    return
  if before != about:
    logging.warning(
      "%s holds the targets that %s found in %s: targets.csv and targets.json are replaced, the "
      "pictures of other frames stay", out, before["detector"], before["source"],
    )  # fmt: skip


def _inputs(source: pathlib.Path, out: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
  """Lists the pictures, sorted: {name: (path, stem of its output files)}; at least one."""
  if source.is_file():
    if source.suffix.lower() in frames.VIDEOS:
      raise ValueError(frames.about_video(source))
    return {source.name: (source, source.stem)}
  if not source.is_dir():
    raise FileNotFoundError(f"{source} does not exist. Give a picture or a folder of pictures.")
  if source.resolve() == out.resolve():
    raise ValueError(f"{out} is also the input folder. Choose a different --out.")
  paths, others, videos = [], 0, []
  for folder, names, inside in os.walk(source):
    folder = pathlib.Path(folder)
    names[:] = [
      n for n in names if n[0] != "." and (folder / n).resolve() != out.resolve()
    ]  # skips the output of an earlier run
    for name in inside:
      fits = name[0] != "." and pathlib.Path(name).suffix.lower() in frames.SUFFIXES
      if fits and (folder / name).is_file():
        paths.append((folder / name).relative_to(source))
      else:
        others += 1
        if pathlib.Path(name).suffix.lower() in frames.VIDEOS:
          videos.append(folder / name)
  if videos:
    logging.warning("%s", frames.about_video(videos[0]))
  if not paths:
    raise ValueError(
      f"{source} contains no pictures ({', '.join(frames.SUFFIXES)}), only "
      f"{columns.counted(others, 'other file')}."
    )
  if others:
    logging.info("%s: %s ignored", source, columns.counted(others, "other file"))
  paths.sort()
  # Ignores case, as some file systems do.
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


def _read(inputs, values, trained, unreadable, bar, check_size) -> Iterator:
  """Yields ((file, page, output, grey levels), grey levels) of every readable frame."""
  taken = {stem.lower() for _, stem in inputs.values()}
  for file, (path, stem) in inputs.items():
    held = None  # one frame back: the first page gets a number only if a second follows
    usable = 0  # frames so far, so that it is also the page that is being read
    try:
      for frame in frames.read(path):
        levels = levels_of(frame, values, trained)
        check_size(levels.shape[:2])
        if held is not None:
          yield _item(file, usable - 1, stem, taken, held)
        held = levels
        usable += 1
    except frames.FrameError as error:
      unreadable[file] = f"page {usable}: {error}" if usable else str(error)
    if held is not None:
      several = usable > 1 or file in unreadable
      yield _item(file, usable - 1 if several else None, stem, taken, held)
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
  """Draws every target's box, number (in the CSV) and confidence on the frame, in RGB.

  Small frames are enlarged, so that boxes and text do not hide the targets.

  Args:
    levels: H×W or H×W×3 grey levels.
    found: targets in the CSV's order.
    most: draws at most this many, those of the highest confidence.
  """
  height, width = levels.shape[:2]
  scale = max(1, min(8, round(640 / max(height, width))))
  low, high = np.percentile(levels, (0.1, 99.99))  # contrast for viewing only
  view = np.clip((levels - low) * (255 / max(high - low, 1)), 0, 255).astype(np.uint8)
  picture = Image.fromarray(view).convert("RGB")
  picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
  draw = ImageDraw.Draw(picture)
  side = max(picture.size)
  line, letters, gap = max(1, side // 800), max(12, side // 60), max(3, side // 200)
  font = ImageFont.load_default(letters)
  strongest = sorted(range(len(found)), key=lambda i: -found[i].confidence)[:most]
  labels = []  # their boxes
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
      writer.writerow([columns.csv_text(frame.file), *shown, *t.box, page, number])
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
