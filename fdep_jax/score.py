"""Scores a folder of any detector's probability maps against a folder of masks (`--mode score`).

Needs numpy, scipy and pillow only, and matplotlib for `pr.png`.
"""

import argparse
import collections
import contextlib
import csv
import difflib
import hashlib
import io
import itertools
import logging
import math
import os
import pathlib
import warnings
import zipfile

import numpy as np

from fdep_jax.data import folders as datasets
from fdep_jax.data import frames
from fdep_jax.metrics import bootstrap, columns, hse
from fdep_jax.metrics import masks as masks_lib
from fdep_jax.report import folder as results
from fdep_jax.report import plots
from fdep_jax.runtime import files
from fdep_jax.runtime.problems import listing

MASKS = (".png", ".bmp", ".tif", ".tiff", ".npy", ".npz", ".jpg", ".jpeg")
READABLE = (".png", ".bmp", ".tif", ".tiff", ".npy", ".npz")
MAX_BYTES = 2**30  # of an unpacked array; a small NPZ may hold far more than the memory
_NEEDS_A_CURVE = ("hse", "hse_p", "hse_t", "roc_auc", "ap")
_BINARY = (
  "HSE needs probability maps: it is an area over thresholds, and all maps of {} together hold "
  "only the values {}. A map that was thresholded already has one point where HSE needs a curve. "
  "Save the sigmoid's output itself (16-bit PNG, float NPY) and score that."
)


def parse(argv) -> argparse.Namespace:
  """Parses the flags of `--mode score`.

  Raises:
    ValueError: a flag or a word is unknown.
  """
  parser = _Parser(description="Scores probability maps against masks.", allow_abbrev=False)
  folders = lambda text: text.split(",")  # noqa: E731
  parser.add_argument("--mode", choices=["score"], required=True)
  parser.add_argument(
    "--predictions", type=folders, help="folder of probability maps; A,B compares two"
  )
  parser.add_argument("--masks", help="folder of masks with the same file names, or of a dataset")
  parser.add_argument(
    "--split", choices=["train", "test", "all"], help="of a dataset in --masks; default test"
  )
  parser.add_argument("--out", help="folder for metrics.json, curves.npz, images.csv and pr.png")
  values, left = parser.parse_known_args(argv)
  if left:
    names = ("predictions", "masks", "split", "out")
    raise ValueError(f"--mode score: {_unknown(left, [f'--{name}' for name in names])}")
  return values


def _unknown(words, flags):
  """Says what is wrong with the first of the words that the parser left over."""
  wrong = next((word for word in words if word.startswith("-")), None)
  if wrong is None:
    return f"the word {words[0]!r} belongs to no flag. Two folders of maps are --predictions A,B."
  name = wrong.partition("=")[0]
  near = difflib.get_close_matches(name, flags, 1, 0.7)
  return f"there is no flag {name}. " + (
    f"The nearest is {near[0]}." if near else f"There are {', '.join(flags)}."
  )


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise ValueError(f"--mode score: {message}.")


def command(flags) -> None:
  """Runs `--mode score`."""
  if len(flags.predictions) > 2:
    raise ValueError(f"--predictions names {len(flags.predictions)} folders; one or two fit.")
  run(flags.predictions[0], flags.masks, flags.out, *flags.predictions[1:], split=flags.split)


def run(predictions, masks, out=None, compare=None, resamples=1000, split=None, **options):
  """Scores a folder, prints the paper's columns and writes the reports.

  Args:
    predictions: folder of maps; `<stem>.png` (8 or 16 bit), `.tif`, `.npy` or `.npz`. If files are
      named `<stem>_prob.*`, as `--mode predict` writes them, only these are read. Integers are
      divided by their type's maximum. Sizes may differ.
    masks: folder of masks with the same stems (a suffix `_pixels0` is dropped), binarised at > 127,
      or the folder of a dataset (`data.folders`). A beginning or ending that all files of a folder
      share, such as `_pred`, is dropped if the stems agree then.
    out: folder for `metrics.json`, `curves.npz`, `images.csv` and `pr.png`; None writes nothing.
    compare: a second folder of maps, for a paired comparison. `pr.png` shows both; the other
      files of the second are `curves_compared.npz` and `images_compared.csv`.
    resamples: number of bootstrap resamples; 0 leaves the intervals out.
    split: of a dataset: "train", "test" or "all"; None takes "test". Masks of the other split are
      not read.
    **options: see `hse.Options`.

  Returns:
    The content of `metrics.json`: {"predictions": metrics as fractions, with "intervals"}, and with
    `compare` also "compared" and "comparison". "inputs" are the folders and the split, "options"
    those of the metric, "files" the number of maps and a SHA-256 of their names and sizes.
    The metrics of a union, such as SIRST3, have "parts": {name: metrics with "images", their
    number}. If all maps of a folder are binary, the metrics that need a curve are None and
    "hse_refused" says why.

  Raises:
    ValueError: listing every file that is missing, extra, unreadable, of the wrong size or range;
      or `out` is the folder of a run, is read, or holds results of other inputs or options.
    FileNotFoundError: a folder does not exist.
  """
  options = hse.Options(**options)
  predictions, masks = _folder("predictions", predictions), _folder("masks", masks)
  compare, out = _folder("predictions", compare), _folder("out", out)
  if out is not None and (out / "config.json").exists():
    raise ValueError(f"--out {out} is the folder of a run, with its own results. Name another.")
  folders = {"predictions": predictions} | ({"compared": compare} if compare is not None else {})
  for folder in (*folders.values(), masks):
    if not folder.is_dir():
      raise FileNotFoundError(f"{folder} is not a folder; give a folder of {', '.join(READABLE)}.")
  if compare is not None and os.path.samefile(predictions, compare):
    raise ValueError(f"{predictions} and {compare} are the same folder. Name two to compare.")
  record = {"inputs": _inputs(folders, masks, split), "options": vars(options)}
  if out is not None:
    results.check(out, record, (*folders.values(), masks))
  problems, sets = [], {}
  for name, folder in folders.items():
    sets[name], found = _accumulate(folder, masks, split, options)
    problems += found
  if problems:
    raise ValueError(listing("files", list(dict.fromkeys(problems))))
  metrics = {name: _metrics(found, resamples) for name, found in sets.items()}
  if compare is not None and resamples:
    totals = [found["total"] for found in sets.values()]
    refused = any(found["refused"] for found in sets.values())
    metrics["comparison"] = {
      name: {k: _json(v) for k, v in result.items()}
      for name, result in bootstrap.compare(*totals, resamples).items()
      if not (refused and name in _NEEDS_A_CURVE)
    }
  metrics |= record | {"files": {name: found["files"] for name, found in sets.items()}}
  titles = datasets.folder_names(list(folders.values()))
  for found, title in zip(sets.values(), titles, strict=True):
    found["title"] = title
  print(_table(metrics, sets))
  if out is not None:
    _write(out, metrics, sets)
    print(f"wrote {out}")
  return metrics


def _folder(flag, path):
  """Returns a folder's path without ~; None if it is not named."""
  if isinstance(path, str) and not path.strip():  # would mean the folder in which this runs
    raise ValueError(
      f"--{flag} has an empty name. Name a folder; in --predictions A,B leave no comma at the end."
    )
  return None if path is None else files.expand(path)


def _inputs(folders, masks, split):
  """Returns what is scored: absolute paths, and the split if the masks are a dataset's."""
  places = {name: os.path.abspath(path) for name, path in {**folders, "masks": masks}.items()}
  root = _dataset(masks, split)
  return {**places, "split": (split or "test") if root else None}


def _accumulate(folder, masks, split, options):
  """Reads a folder once. Returns ({"total", "parts", "rows", "refused", "files"}, problems)."""
  pairs, parts, problems = _pairs(folder, masks, split)
  found, values, means = _Counts(parts, options), np.zeros(0, np.float32), _Means()
  for stem, (prob_path, mask_path) in pairs.items():
    prob, mask, problem = _read_pair(prob_path, mask_path)
    problems += problem
    if problems:
      continue
    if len(values) <= 2:
      values = np.union1d(values, np.unique(prob)[:3])
    found.add(stem, prob, mask)
    means.add(prob, mask)
  refused = None
  if not problems and len(values) <= 2 and values.max() > 0:
    refused = _BINARY.format(folder, " and ".join(f"{v:g}" for v in values))
    threshold = values.min() if len(values) == 2 else 0
    if values.max() <= hse.HALF:  # 0/1 saved as 8 bit: any value above the lower one is a detection
      found = _Counts(parts, options)
      for stem, paths in pairs.items():
        prob, mask, _ = _read_pair(*paths)
        found.add(stem, (prob > threshold).astype(np.float32), mask)
  return {
    "total": found.total(),
    "parts": found.parts if len(found.parts) > 1 else {},
    "rows": found.rows,
    "refused": refused,
    "warning": means.warning(),
    "files": _files([prob for prob, _ in pairs.values()]),
  }, problems


def _files(paths):
  """Returns the number of files and a SHA-256 of their names and sizes, which opens none."""
  listed = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
  digest = hashlib.sha256(listed.encode("utf-8", "surrogateescape"))
  return {"number": len(paths), "sha256": digest.hexdigest()}


class _Means:
  """Collects the mean probability of the targets' pixels and of all others."""

  def __init__(self):
    self.sums, self.numbers = np.zeros(2), np.zeros(2)  # others, targets

  def add(self, prob, mask):
    for i, chosen in enumerate((~mask, mask)):
      self.sums[i] += prob[chosen].sum(dtype=np.float64)
      self.numbers[i] += chosen.sum()

  def warning(self):
    """Says that the maps look inverted; "" if they do not."""
    others, targets = self.sums / np.maximum(self.numbers, 1)
    if not self.numbers.all() or targets >= others:
      return ""
    return (
      f"the maps are lower on targets (mean {targets:.3g}) than elsewhere (mean {others:.3g}). If "
      "they are inverted, save 1 − map; if not, they may be of other images than the masks."
    )


class _Counts:
  """Collects the counts of every part, and the lines of `images.csv`."""

  def __init__(self, part_of, options):
    self.part_of, self.options = part_of, options
    self.parts = {}  # accumulators by the part's name
    self.rows = []

  def add(self, stem, prob, mask):
    part = self.part_of[stem]
    self.parts.setdefault(part, hse.Accumulator(**vars(self.options))).update(prob, mask)
    self.rows.append(_row(stem, prob, mask, self.options))

  def total(self):
    total = hse.Accumulator(**vars(self.options))
    for part in self.parts.values():
      total.merge(part)
    return total


def _pairs(predictions, masks, split):
  """Finds the mask of every map.

  Returns:
    {stem: (map, mask)}, {stem: name of the dataset's part}, and a list of the files without a
    partner.
  """
  root = _dataset(masks, split)
  problems, part_of, others = [], {}, []
  unread = [_unread(predictions, READABLE), "" if root else _unread(masks, MASKS)]
  if any(unread):
    return {}, {}, list(filter(None, unread))
  maps, found = _by_stem(predictions, READABLE, "_prob", only_with_suffix=True)
  if root:
    split = split or "test"
    truth, part_of = _of_split(root, split)
    maps, _ = _without_affixes(maps, truth, masks_too=False)
    others = sorted(maps.keys() & _of_other_splits(root, split) - truth.keys())
    more, source = [], f"split {split} of {root}"
  else:
    truth, more = _by_stem(masks, MASKS, "_pixels0")
    maps, truth = _without_affixes(maps, truth)
    source = masks
  problems += found + more
  both = [stem for stem in (truth if root else sorted(truth)) if stem in maps]
  if len(both) < len(truth) and (fits := _split_of(maps, root or masks.parent, split)):
    advice = f"Write --masks {root or masks.parent} --split {fits}"
    return {}, {}, [f"{predictions} holds the maps of the split {fits}. {advice}"]
  if others:
    # Not as info, which nobody sees here: without absl no level of logging is set.
    logging.warning("maps of %s that are not of %s: %d, left out", predictions, source, len(others))
  for stem in sorted(maps.keys() - truth.keys() - set(others)):
    problems.append(f"{maps[stem]}: no mask {stem}.* in {source}")
  unused = sorted(truth.keys() - maps.keys())
  problems += [f"{truth[stem]}: no prediction {stem}.* in {predictions}" for stem in unused]
  if unused and not root and datasets.is_dataset(masks.parent):
    problems.insert(
      0,
      f"{masks.parent} is a dataset. If the maps are of one split, write --masks {masks.parent} "
      "--split test",
    )
  return {s: (maps[s], truth[s]) for s in both}, {s: part_of.get(s, "") for s in both}, problems


def _unread(folder, kinds):
  """Says which files a folder without any readable one holds; "" if it has one."""
  suffixes = collections.Counter(p.suffix.lower() for p in folder.iterdir() if p.is_file())
  if any(kind in suffixes for kind in kinds):
    return ""
  held = ", ".join(f"{n} {s or 'without an ending'}" for s, n in suffixes.most_common(5))
  said = f"{folder}: no file ends in {', '.join(kinds)}; there are {held or 'no files'}"
  if ".mat" in suffixes:
    said += (
      ". Convert every .mat file: np.save('a.npy', scipy.io.loadmat('a.mat')[NAME]); NAME is that "
      "of the array (of version 7.3: np.transpose(h5py.File('a.mat')[NAME]))"
    )
  return said


def _dataset(masks, split):
  """Returns the folder of the dataset that --masks names, or None if it holds masks alone."""
  if datasets.is_dataset(masks):
    holds_masks = any(p.suffix.lower() in MASKS for p in masks.iterdir())
    return None if holds_masks and not split else masks
  if split and not datasets.is_dataset(masks.parent):
    raise ValueError(
      f"--split {split}: {masks} is no dataset, so it has no splits. Name the dataset's folder, or "
      "leave --split out to score all masks."
    )
  return masks.parent if split else None


def _of_split(root, split):
  """Returns {stem: mask} and {stem: part} of a dataset's split; stems are those of saved maps."""
  masks, part_of = {}, {}
  for part, listed in datasets.masks(root, split).items():
    for name, path in listed.items():
      stem = name.replace("/", "_")
      masks[stem], part_of[stem] = path, part
  return masks, part_of


def _split_of(maps, root, scored):
  """Returns the split of a dataset whose images the maps are of, all and no others; "" if none."""
  if datasets.is_dataset(root):
    for split in ("test", "train", "all"):
      with contextlib.suppress(datasets.DataError):
        truth, _ = _of_split(root, split)
        own, _ = _without_affixes(maps, truth, masks_too=False)
        if split != scored and own.keys() == truth.keys():
          return split
  return ""


def _of_other_splits(root, split):
  """Returns the stems of the splits that are not scored, as far as these can be listed."""
  stems = set()
  for other in {"train", "test", datasets.VAL} - {split}:
    with contextlib.suppress(datasets.DataError):
      stems |= _of_split(root, other)[0].keys()
  return stems


def _without_affixes(maps, truth, masks_too=True):
  """Drops beginnings and endings that all files share, such as `_pred`, if the stems agree then.

  Takes the shortest ones. Stems of which some agree already stay as they are.
  """
  if maps.keys() & truth.keys():
    return maps, truth
  tried = itertools.product(_affixes(maps), _affixes(truth) if masks_too else [("", "")])
  for of_maps, of_truth in sorted(tried, key=lambda both: len("".join(itertools.chain(*both)))):
    shorter = _strip(maps, of_maps)
    masks = _strip(truth, of_truth)
    if masks.keys() == shorter.keys() or (not masks_too and masks.keys() <= shorter.keys()):
      for what, (start, end) in (("maps", of_maps), ("masks", of_truth)):
        if start or end:
          logging.warning("the names of all %s are read without %s", what, f"{start}…{end}")
      return shorter, masks
  return maps, truth


def _affixes(stems):
  """Lists the (beginning, ending) that all stems share, cut at a separator, "" included."""
  start = os.path.commonprefix(list(stems))
  end = os.path.commonprefix([stem[::-1] for stem in stems])[::-1]
  starts = ["", *(start[: i + 1] for i, c in enumerate(start) if c in "_-. ")]
  ends = ["", *(end[i:] for i, c in enumerate(end) if c in "_-. ")]
  return list(itertools.product(starts, ends))


def _strip(paths, affix):
  start, end = affix
  return {
    stem.removeprefix(start).removesuffix(end): path
    for stem, path in paths.items()
    if len(stem) > len(start) + len(end)
  }


def _by_stem(folder, kinds, suffix, only_with_suffix=False):
  paths = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in kinds and p.is_file()]
  if only_with_suffix and any(p.stem.endswith(suffix) for p in paths):
    paths = [p for p in paths if p.stem.endswith(suffix)]
  out, problems = {}, []
  for path in paths:
    stem = path.stem.removesuffix(suffix)
    if stem in out:
      problems.append(f"{path}: {out[stem].name} has the same stem; keep one of them")
    out.setdefault(stem, path)
  return out, problems


def _read_pair(prob_path, mask_path):
  """Returns (prob H×W float32, mask H×W bool, problems)."""
  problems, prob, mask = [], None, None
  try:
    prob = read_prob(prob_path)
  except ValueError as error:
    problems.append(f"{prob_path}: {error}")
  try:
    mask = read_mask(mask_path)
  except ValueError as error:
    problems.append(f"{mask_path}: {error}")
  if not problems:
    prob, mask, found = hse.check(prob, mask)
    problems += [f"{prob_path}: {p}" for p in found]
  return prob, mask, problems


def read_prob(path):
  """Reads a probability map, H×W float32; integers are divided by their type's maximum."""
  array = _read(path)
  if array.dtype.kind == "f":
    return array.astype(np.float32)
  if array.dtype == bool:
    return array.astype(np.float32)
  if array.dtype not in (np.uint8, np.uint16):
    raise ValueError(f"holds {array.dtype}; save floats in [0, 1], or 8- or 16-bit integers")
  return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)


def read_mask(path):
  """Reads a mask, H×W bool, by the rule of training (`metrics.masks`).

  Only a NumPy file may hold ones and zeros.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() in (".npy", ".npz"):
    mask, warning = masks_lib.binary(_read(path), ones=True)
  else:
    with _decoding():
      mask, warning = masks_lib.binary(_open(path, masks_lib.levels))
  warning = warning or masks_lib.check_share(mask)
  if warning:
    logging.warning("%s: %s", path, warning)
  return mask


@contextlib.contextmanager
def _decoding():
  """Turns the errors of decoders, which are of many types, into a ValueError."""
  try:
    yield
  except ValueError:
    raise
  except Exception as error:  # all of them mean a bad file
    raise ValueError(f"cannot be read ({error or type(error).__name__})") from error


def _read(path):
  """Reads the single channel of a file in its stored type: bool, uint8, uint16 or floats."""
  path = pathlib.Path(path)
  with _decoding():
    saved = path.suffix.lower() in (".npy", ".npz")
    array = _read_array(path) if saved else _open(path, _channels)
  if array.dtype.kind == "V":
    raise ValueError(
      f"holds {array.dtype.itemsize} raw bytes a value, as NumPy saves bfloat16; save float32, as "
      "in prob.float().numpy()"
    )
  shape = array.shape
  array = array.squeeze() if array.ndim > 2 else array
  if saved and array.ndim == 3 and 2 in (array.shape[0], array.shape[-1]):
    raise ValueError(
      f"has the shape {shape}; if it is the softmax of background and target, save the "
      "target's channel alone: prob[..., 1], or prob[1] with channels first"
    )
  if array.ndim == 3 and array.shape[-1] in (2, 3, 4):
    colours = array[..., :3] if array.shape[-1] > 2 else array[..., :1]
    if not (colours == colours[..., :1]).all():
      raise ValueError("is a colour image; save one channel")
    array = colours[..., 0]
  if array.ndim != 2 or not array.size:
    raise ValueError(f"has the shape {shape}; save one H×W map per file")
  return array


def _read_array(path):
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      largest = max((member.file_size for member in archive.infolist()), default=0)
    if largest > MAX_BYTES:
      raise ValueError(
        f"unpacks to {largest / 2**30:.1f} GiB; at most {MAX_BYTES / 2**30:g} are read"
      )
  data = np.load(path, allow_pickle=False)
  if isinstance(data, np.ndarray):  # np.load looks at the content, not at the name
    return data
  with data:
    names = data.files
    if len(names) != 1 and "prob" not in names:
      raise ValueError(
        f"holds the arrays {', '.join(names) or '(none)'}; save one, or one named prob"
      )
    array = data["prob" if "prob" in names else names[0]]
  if not isinstance(array, np.ndarray):
    raise ValueError("does not hold an array")
  return array


def _open(path, convert):
  from PIL import Image, ImageOps

  with open(path, "rb") as file, Image.open(file) as image:  # as a stream: see data.frames
    if getattr(image, "n_frames", 1) > 1:
      raise ValueError(f"has {image.n_frames} pages; save one map per file")
    if frames.bits(image) > 8 and image.mode[0] not in "IF":
      raise ValueError("has several channels of more than 8 bits; save one channel")
    image.load()
    return convert(ImageOps.exif_transpose(image))


def _channels(image):
  if image.mode == "P":
    image = image.convert("RGB")
  array = np.array(image)
  deep = image.mode.startswith("I")
  if deep and array.dtype != np.uint16:  # Pillow gives 16 bit as int32 in some formats
    if array.min(initial=0) < 0 or array.max(initial=0) > 65535:
      raise ValueError("holds 32-bit integers; save floats in [0, 1], or 8- or 16-bit integers")
    array = array.astype(np.uint16)
  return array


def _row(stem, prob, mask, options):
  """Returns an image's line of `images.csv`; centroids are "row,col" in pixels, blank-separated."""
  targets, found, claimed = hse.detections(prob, mask, options)
  free = np.ones(len(found), bool)
  free[claimed[claimed >= 0]] = False
  positive = prob > hse.HALF
  union = int((positive | mask).sum())

  def centroids(components, keep):
    return " ".join(
      f"{r:.2f},{c:.2f}" for r, c in zip(components.row[keep], components.col[keep], strict=True)
    )

  return {
    "file": columns.csv_text(stem),
    "height": mask.shape[0],
    "width": mask.shape[1],
    "targets": len(targets),
    "hits": int((claimed >= 0).sum()),
    "misses": int((claimed < 0).sum()),
    "false_alarms": int(free.sum()),
    "false_alarm_pixels": int(found.area[free].sum()),
    "iou": f"{(positive & mask).sum() / union:.6f}" if union else "",
    "hit_centroids": centroids(targets, claimed >= 0),
    "missed_centroids": centroids(targets, claimed < 0),
    "false_alarm_centroids": centroids(found, free),
  }


def _metrics(found, resamples):
  out, found["score"] = _of_total(found["total"], resamples, found["refused"])
  if found["refused"]:
    out["hse_refused"] = found["refused"]
  for name, total in found["parts"].items():
    metrics, _ = _of_total(total, resamples, found["refused"])
    out.setdefault("parts", {})[name] = metrics | {"images": len(total)}
  return out


def _of_total(total, resamples, refused):
  """Returns the metrics of an accumulator for JSON, and its `Score`."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # `_table` says that no mask has a target
    score = total.result()
  out = score.as_dict()
  if resamples:
    intervals = bootstrap.intervals(total, resamples)
    out["intervals"] = {k: [_json(v) for v in pair] for k, pair in intervals.items()}
  if refused:
    for name in _NEEDS_A_CURVE:
      out[name] = None
      out.get("intervals", {}).pop(name, None)
  return out, score


def _json(value):
  return None if isinstance(value, float) and math.isnan(value) else value


def _table(metrics, sets):
  """Formats the paper's columns, in percent (Fa × 10⁶), with the 95 % intervals below."""
  rows = {}
  for name, of_set in sets.items():
    parts = {f"  {part}": found for part, found in metrics[name].get("parts", {}).items()}
    rows[name] = {of_set["title"]: metrics[name]} | parts
  width = max(24, *(len(title) + 1 for titles in rows.values() for title in titles))

  def line(name, cells):
    return f"{name:<{width}}" + "".join(f" {cell:>15}" for cell in cells)

  lines = [line("", [c.heading for c in columns.METRICS.values()])]
  for name, titles in rows.items():
    values = metrics[name]
    for title, found in titles.items():
      shown = [c.shown(found[c.key]) for c in columns.METRICS.values()]
      lines.append(line(title, shown))
      spans = found.get("intervals", {})
      if spans:
        cells = [c.interval(spans.get(c.key)) for c in columns.METRICS.values()]
        lines.append(line("  95 %", cells))
    if not values["targets"]:
      undefined = ", ".join(c.heading for c in columns.METRICS.values() if values[c.key] is None)
      title = sets[name]["title"]
      lines.append(f"Warning: {title}: no mask has a target, so {undefined} are undefined.")
    headings = {c.key: c.heading for c in columns.METRICS.values()}
    if note := bootstrap.note(values.get("intervals", {}), headings):
      lines.append(f"Note: {sets[name]['title']}: {note}")
    if sets[name]["warning"]:
      lines.append(f"Warning: {sets[name]['title']}: {sets[name]['warning']}")
    if "hse_refused" in values:
      lines.append(values["hse_refused"])
    elif warning := hse.warning_of_merging(sets[name]["score"]):
      lines.append(f"Warning: {sets[name]['title']}: {warning}")
  if "comparison" in metrics:
    compared = metrics["comparison"]
    shares = [compared.get(c.key, {}).get("a_is_better") for c in columns.METRICS.values()]
    lines.append(
      line("first is better (share)", ["-" if p is None else f"{p:.3f}" for p in shares])
    )
  return "\n".join(lines)


def _write(out, metrics, sets):
  """Replaces all files of `out` together, so that none is of an earlier result."""
  out.mkdir(parents=True, exist_ok=True)
  contents = {}
  for name, found in sets.items():
    ending = "_compared" if name == "compared" else ""
    curves, table = io.BytesIO(), io.StringIO(newline="")
    np.savez_compressed(curves, **found["score"].curves)
    writer = csv.DictWriter(table, fieldnames=list(found["rows"][0]))
    writer.writeheader()
    writer.writerows(found["rows"])
    contents[f"curves{ending}.npz"] = curves.getvalue()
    contents[f"images{ending}.csv"] = table.getvalue()
  paths = [out / name for name in (*contents, "pr.png", "metrics.json")]
  with files.replacing_all(paths) as partial:
    *others, picture, numbers = partial
    for path, content in zip(others, contents.values(), strict=True):
      files.write(path, content)
    _draw(picture, sets)
    files.write_json(numbers, metrics)


def _draw(path, sets):
  """Draws `pr.png`, unless no set has curves, or matplotlib is not installed."""
  drawn = [found for found in sets.values() if not found["refused"]]
  if not drawn:
    return
  try:
    figure, axes = plots.figure(1, 2, (9, 4))
  except ModuleNotFoundError as error:
    print(f"pr.png is left out, because {error.name.split('.')[0]} is not installed.")
    return
  for found in drawn:
    plots.precision_recall(axes, found["score"], found["title"] if len(sets) > 1 else "")
  plots.save(figure, path, dpi=120)
