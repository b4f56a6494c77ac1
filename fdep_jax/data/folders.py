"""Reads datasets in the common folder layouts; one error lists all problems of a dataset.

Accepted layouts, with NAME for the folder's own name:

  NAME/{images,masks}/  NAME/img_idx/{train,test}_NAME.txt      BasicIRSTD, LESPS, DNANet
  NAME/{images,masks}/  NAME/splits/{train,test}.txt            (or the two files in NAME/ itself)
  NAME/{images,masks}/  NAME/50_50/{train,test}.txt             DNANet; any one folder of that kind
  NAME/{train,val}/{img,mask}/  or  NAME/{origin,val}/{img,mask}/     PAL; its "val" is the test set
  NAME/{train,test}/{images,masks}/                             or other common names of the two
  NAME/<one of the above>/ ...                                  a union, such as SIRST3

IRSTD-1K's own folders IRSTD1k_Img and IRSTD1k_Label are accepted as images and masks. The names of
masks may end in _pixels0 (NUAA-SIRST), _mask, _gt or _label. Names in split files may have folders
(sequence_1/0001). Without train.txt, trainval.txt is read as the train split.

A third split, val.txt or val/ beside test/, holds the images that select the checkpoint. It must
share no name with train or test. If it is the test split once more, as in some public copies, or if
a part of a union has none, it is not read.
"""

import itertools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fdep_jax.data import frames
from fdep_jax.data import samples as sample_lib
from fdep_jax.data.samples import Sample
from fdep_jax.metrics import masks as mask_rules
from fdep_jax.runtime import files as file_lib
from fdep_jax.runtime.problems import shorten

SPLITS = ("train", "test")
VAL = "val"  # a dataset may have it

# Numbers of train and test pairs, counted on the full public copies. Unions are read in this order,
# the paper's order of SIRST3's parts.
KNOWN_COUNTS = {
  "NUAA-SIRST": (213, 214),
  "NUDT-SIRST": (663, 664),
  "IRSTD-1K": (800, 201),
  "SIRST3": (1676, 1079),
}

_LOG = logging.getLogger(__name__)
_IMAGES = ("images", "irstd1k_img")
_MASKS = ("masks", "irstd1k_label")
_IMAGE_HALVES = ("img", "images", "image")  # inside a folder of a split
_MASK_HALVES = ("mask", "masks", "label", "labels", "gt")
_AFFIXES = ("_pixels0", "_mask", "_gt", "_label")  # that the names of masks may end in
_TRAINVAL = "trainval.txt"  # read as the train split if there is no train.txt
_SUFFIX = re.compile(r"\.(png|bmp|jpe?g|tiff?)$", re.IGNORECASE)
_LAYOUTS = (
  "images/ and masks/ with img_idx/{train,test}_NAME.txt or splits/{train,test}.txt, PAL's "
  "train/{img,mask} and val/{img,mask}, train/{images,masks} and test/{images,masks}, or a folder "
  "of such folders"
)


class DataError(ValueError):
  """An unusable dataset; the message lists all its problems."""


class MissingDataError(DataError, FileNotFoundError):
  """A `DataError` whose only problems are missing files or folders."""


class _Problem(NamedTuple):
  text: str
  split: str | None = None  # None: concerns both
  missing: bool = False  # whether the problem is only that something does not exist
  whole: bool = False  # whether there is no such split at all


class _Pair(NamedTuple):
  name: str
  image: Path
  mask: Path


def check_named(root: str | Path) -> None:
  """Refuses an empty name of a dataset, which would mean the folder in which the program runs.

  Raises:
    DataError: it is empty.
  """
  if isinstance(root, str) and not root.strip():
    raise DataError(
      "The name of a dataset is empty. Name a folder; in --data A,B leave no comma at the end"
    )


def check_range(root: str | Path, option: str) -> None:
  """Refuses a range for images of TFDS, which have 8 bits.

  Raises:
    DataError: it is a dataset of TFDS.
  """
  if str(root).startswith("tfds:"):
    raise DataError(
      f"{root}: images of TFDS have 8 bits, and {option} is for more. Leave {option} out, or name "
      "the dataset's folder"
    )


def measure_range(root: str | Path, option: str = frames.OPTION) -> tuple[float, float]:
  """Measures the range of a dataset's train images: data.range=auto.

  OUR CHOICE: from the lowest 0.1th to the highest 99.99th percentile of an image.

  Args:
    root: the dataset's folder.
    option: that names the range, for messages.

  Raises:
    DataError: as `read`; also if an image has 8 bits.
  """
  check_named(root)
  check_range(root, option)
  root = file_lib.expand(root)
  parts, problems = _survey(root)
  problems = [p for p in problems if p.split in (None, "train")]
  low, high = math.inf, -math.inf
  paths = [pair.image for pairs in parts.values() for pair in pairs["train"]]
  errors = []
  for path in paths:
    try:
      for frame in frames.read(path):
        frames.check_depth(frame)
        ends = np.percentile(frame, (frames.BLACK, frames.WHITE), method="nearest")
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    except ValueError as error:
      errors.append((path, error))
  problems += _told(errors, root, len(paths), option)
  if problems or not low < high:
    texts = [p.text for p in problems] or [f"all train images hold the one value {low:g}"]
    raise DataError("\n  ".join([f"{root}: the range cannot be measured:", *shorten(texts)]))
  return low, high


def read(
  root: str | Path,
  split: str,
  values: frames.Range = "",
  lazy: bool = False,
  option: str = frames.OPTION,
) -> Sequence[Sample]:
  """Reads and decodes every pair of a split, in the order of its split file.

  A union is read in the order NUAA-SIRST, NUDT-SIRST, IRSTD-1K, then the others by name
  (OUR CHOICE: the paper's order of SIRST3's parts). A name that occurs in two parts gets the part's
  name as a prefix: `NUDT-SIRST_000001`. PAL's folders have no split files and are read in natural
  order of the names (Misc_2 before Misc_10).

  Args:
    root: the dataset's folder, see the top of this file.
    split: "train", "test", "all" (train, then test), or "val", which is [] if there is none.
    values: range that becomes the grey levels, see `frames.grey_levels`; "": reads 8 bits only.
      With a range only images of more than 8 bits are read.
    lazy: decodes every pair once to check it, and again each time it is asked for.
    option: that names the range, for messages.

  Returns:
    A list, or `LazySamples`, which raise a `DataError` if a file has become unreadable.

  Raises:
    DataError: a ValueError listing all problems at once: images and masks of different size,
      undecodable files, images that do not fit the range, masks of 0 and 1, a split of empty masks
      only, a name listed twice or in both splits.
    MissingDataError: a DataError and FileNotFoundError, if the only problems are folders, split
      files, images or masks that do not exist.
  """
  if split not in (*SPLITS, VAL, "all"):
    raise ValueError(f"split is {split!r}; it must be 'train', 'test', 'val' or 'all'")
  check_named(root)
  root = file_lib.expand(root)
  wanted = SPLITS if split == "all" else (split,)
  parts, problems = _survey(root)
  problems = [p for p in problems if p.split in (None, *wanted)]
  kept: list[Sample | tuple[int, int]] = []  # if lazy, their sizes
  for which in wanted:
    for part, pairs in parts.items():
      decoded, some_target, found = _decode(pairs[which], root, values, lazy, option)
      problems += found
      if decoded and not found and not some_target:
        number = len(decoded)
        every = f"all {number} masks are" if number > 1 else "the only mask is"
        text = f"{_show(part, root)}{which}: {every} empty"
        problems.append(_Problem(f"{text}; a target pixel must be > 127, usually 255"))
      kept += decoded
  if problems:
    texts = [p.text for p in problems]
    title = f"{root}: {len(texts)} problem{'s' * (len(texts) > 1)} in split {split!r}"
    kind = MissingDataError if all(p.missing for p in problems) else DataError
    raise kind("\n  ".join([title, *shorten(texts)]))
  for which in wanted:
    _compare_counts(root, which, {part: len(pairs[which]) for part, pairs in parts.items()})
  if not lazy:
    return kept
  listed = [pair for which in wanted for pairs in parts.values() for pair in pairs[which]]
  return sample_lib.LazySamples(lambda place: _decode_again(listed[place], values), kept)


def parts(root: str | Path, split: str) -> dict[str, int]:
  """Returns {folder: number of pairs} of the parts of a union, in the order of `read`.

  A dataset that is no union, or none of a folder, has no parts: {}.
  """
  root = file_lib.expand(root)
  if not root.is_dir() or _is_dataset(root):
    return {}
  found, _ = _survey(root)
  return {part.name: len(pairs[split]) for part, pairs in found.items()}


def check_all(roots: Sequence[str | Path], option: str = "--data", split: str = "test") -> None:
  """Refuses datasets whose files are missing, all in one error, without opening an image.

  Args:
    roots: folders; others ("synthetic", "tfds:…") are not looked at.
    option: that names them, for the message.
    split: that must be there.

  Raises:
    MissingDataError: a folder, or files of its split, do not exist.
  """
  lines = []
  for root in roots:
    check_named(root)
    if str(root) == "synthetic" or str(root).startswith("tfds:"):
      continue
    try:
      masks(root, split)
    except MissingDataError as error:
      lines.append(f"{option} {error}")
  if lines:
    raise MissingDataError("\n".join(lines))


def has_split(root: str | Path, split: str) -> bool:
  """Returns whether any part of a dataset has a file or a folder of the split."""
  parts, problems = _survey(file_lib.expand(root))
  return sum(p.whole and p.split == split for p in problems) < len(parts)


def folder_names(folders: Sequence[Path]) -> list[str]:
  """Returns the folders' names, or the part of each path after their common parent."""
  # Not resolved, so that a link keeps its own name.
  paths = [Path(os.path.abspath(folder)) for folder in folders]
  if len({path.name for path in paths}) == len(paths):
    return [path.name for path in paths]
  common = Path(os.path.commonpath(paths))
  common = common.parent if common in paths else common
  return [path.relative_to(common).as_posix() for path in paths]


def is_dataset(folder: str | Path) -> bool:
  """Returns whether a folder has images beside masks, or is a union of such folders."""
  folder = file_lib.expand(folder)
  children = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
  return any(map(_has_both, [folder, *children]))


def _has_both(folder: Path) -> bool:
  if not folder.is_dir():
    return False
  halves = _child(folder, _IMAGES), _child(folder, _MASKS)
  return all(halves) or (not any(halves) and _is_dataset(folder))


def masks(root: str | Path, split: str) -> dict[str, dict[str, Path]]:
  """Lists the masks of a split without opening them.

  Args:
    root: the dataset's folder.
    split: "train", "test", "val" or "all".

  Returns:
    {folder's name: {name: mask}} for each part of a union, or of the dataset alone; order and names
    are those of `read`.

  Raises:
    DataError: split files, images or masks are missing.
  """
  wanted = SPLITS if split == "all" else (split,)
  parts, problems = _survey(file_lib.expand(root))
  texts = [p.text for p in problems if p.split in (None, *wanted)]
  if texts:
    raise MissingDataError("\n  ".join([f"{root}: split {split!r}", *shorten(texts)]))
  return {
    part.name: {pair.name: pair.mask for which in wanted for pair in pairs[which]}
    for part, pairs in parts.items()
  }


def validate(root: str | Path) -> dict[str, int]:
  """Checks and decodes both splits as `read` does; returns the numbers of pairs by split."""
  read(root, "all")
  parts, _ = _survey(file_lib.expand(root))
  return {split: sum(len(pairs[split]) for pairs in parts.values()) for split in SPLITS}


# ------------------------------------------------------------------------------ finding the files


def _child(folder: Path, names: Iterable[str]) -> Path | None:
  """Finds the subfolder of the first of `names` that exists, ignoring case."""
  found = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
  return next((found[n] for n in names if n in found), None)


def _is_dataset(folder: Path) -> bool:
  if _child(folder, _IMAGES) or _child(folder, _MASKS):
    return True
  halves = [_child(folder, [n]) for n in ("train", "origin", "val", "test")]
  return any(half and _child(half, _IMAGE_HALVES) for half in halves)


def _key(name: str) -> str:
  return re.sub(r"[^a-z0-9]", "", name.lower())


def known_name(folder: Path) -> str | None:
  """Returns the dataset that a folder's name means: irstd_1k and IRSTD-1k are IRSTD-1K."""
  names = {_key(n): n for n in KNOWN_COUNTS} | {"sirst": "NUAA-SIRST"}
  return names.get(_key(folder.name))


def _survey(root: Path) -> tuple[dict[Path, dict[str, list[_Pair]]], list[_Problem]]:
  """Lists the pairs of both splits of every part, in reading order, without opening an image."""
  if not root.is_dir():
    raise MissingDataError(f"{root}: there is no such folder. A dataset is {_LAYOUTS}")
  problems: list[_Problem] = []
  folders = [root]
  if not _is_dataset(root):
    children = sorted(p for p in root.iterdir() if p.is_dir())
    folders = sorted(filter(_is_dataset, children), key=_reading_order)
    for child in children:
      if known_name(child) and child not in folders:
        problems.append(_Problem(f"{child.name}: no dataset in this folder", missing=True))
    if not folders:
      state = f"holds no dataset, but {_content(root)}" if any(root.iterdir()) else "is empty"
      raise MissingDataError(f"{root}: this folder {state}. A dataset is {_LAYOUTS}")
  parts = {}
  for folder in folders:
    split_files = _child(folder, _IMAGES) or _child(folder, _MASKS)
    list_pairs = _list_by_split_files if split_files else _list_pal
    parts[folder], found = list_pairs(folder)
    problems += [p._replace(text=_show(folder, root) + p.text) for p in found]
  _drop_partial_val(parts)
  _prefix_colliding_names(parts)
  return parts, problems


def _content(folder: Path, most: int = 10) -> str:
  """Names the first folders in a folder, two levels deep, or the first files if it has none."""
  inside = [*folder.glob("*"), *folder.glob("*/*")]
  names = sorted(f"{p.relative_to(folder).as_posix()}/" for p in inside if p.is_dir())
  names = names or sorted(p.name for p in inside)
  return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _drop_partial_val(parts: dict[Path, dict[str, list[_Pair]]]) -> None:
  """Leaves the validation splits of a union out if not every part has one."""
  having = [part.name for part, splits in parts.items() if splits[VAL]]
  if having and len(having) < len(parts):
    message = "the validation split of %s is not read, as other parts of the union have none"
    _LOG.warning(message, ", ".join(having))
    for splits in parts.values():
      splits[VAL] = []


def _reading_order(part: Path) -> tuple[int, str]:
  known = list(KNOWN_COUNTS)
  name = known_name(part)
  return (known.index(name) if name else len(known), part.name)


def _natural(name: str) -> list:
  return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name)]


def _files(folder: Path) -> dict[str, list[Path]]:
  """Lists the image files below a folder by path in it, without extension."""
  result: dict[str, list[Path]] = {}
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    if _SUFFIX.search(name) and not any(part.startswith(".") for part in name.split("/")):
      result.setdefault(_SUFFIX.sub("", name), []).append(path)
  return result


def _strip(name: str) -> str:
  """Returns the name of a mask without the affix that marks it as one."""
  return next((name.removesuffix(affix) for affix in _AFFIXES if name.endswith(affix)), name)


def _resolve(name: str, images: dict[str, list[Path]]) -> str:
  """Returns the listed name as the image folder has it: images/seq/a, seq/a and a may be meant."""
  parts = name.split("/")
  tails = ["/".join(parts[i:]) for i in range(len(parts))]
  return next((tail for tail in tails if tail in images), tails[-1])


def _show(part: Path, root: Path) -> str:
  """Returns a problem's prefix: the part's name, if the dataset is a union."""
  return "" if part == root else f"{part.name}: "


def _list_by_split_files(part: Path) -> tuple[dict[str, list[_Pair]], list[_Problem]]:
  problems = []
  files = {}
  for kind, choices in (("image", _IMAGES), ("mask", _MASKS)):
    folder = _child(part, choices)
    files[kind] = _files(folder) if folder else {}
    if folder is None:
      text = f"there is no {kind} folder ({' or '.join(choices)}); there are {_content(part)}"
      problems.append(_Problem(text, missing=True))
    elif not files[kind]:
      problems.append(_Problem(f"{folder.name}: no {kind} files in this folder", missing=True))
  names, sources = {}, {}
  for split in (*SPLITS, VAL):
    listed, sources[split] = _split_names(part, split, problems)
    names[split] = [_resolve(name, files["image"]) for name in listed]
  if names[VAL] and not _is_own(part, names):
    names[VAL] = []
  if sources["train"] == _TRAINVAL:
    held_out = set(names[VAL])
    names["train"] = [name for name in names["train"] if name not in held_out]
  _check_names(names, problems)
  if not (files["image"] and files["mask"]):
    return {split: [] for split in names}, problems
  return {s: _match(names[s], files["image"], files["mask"], s, problems) for s in names}, problems


def _is_own(part: Path, names: dict[str, list[str]]) -> bool:
  """Returns whether the validation split is not just the test split under another name."""
  if set(names[VAL]) != set(names["test"]):
    return True
  _LOG.warning("%s: the split val is the test split, so it is not read", part)
  return False


def _split_names(part: Path, split: str, problems: list[_Problem]) -> tuple[list[str], str]:
  """Reads the names in a split's file, without extension, and returns them with the file's name.

  Returns [], "" if there is none, and adds a problem unless the split is val.
  """
  index = part / "img_idx"
  looked_for = [
    index / f"{split}_{part.name}.txt",
    part / "splits" / f"{split}.txt",
    part / f"{split}.txt",
  ]
  found = [p for p in looked_for if p.is_file()]
  if not found:
    found = _split_folder(part, split, problems)
  if not found and split == "train":
    found = [p.with_name(_TRAINVAL) for p in looked_for[1:]]
    found = [p for p in found if p.is_file()]
  if not found:
    # A renamed folder still has the img_idx file of its old name. Of several, none is guessed.
    found = sorted(index.glob(f"{split}_*.txt"))
    if len(found) > 1:
      text = f"img_idx has {', '.join(p.name for p in found)}; rename the right one to"
      problems.append(_Problem(f"{text} {split}_{part.name}.txt", split))
      return [], ""
  if not found and split == VAL:
    return [], ""
  if not found:
    tried = " or ".join(str(p.relative_to(part)) for p in looked_for)
    others = sorted(p.relative_to(part).as_posix() for p in part.glob("**/*.txt"))[:10]
    text = f"no split file for {split!r}; looked for {tried} in {part}"
    text += f"; there are {', '.join(others)}" if others else "; there are no .txt files"
    text += ". Such a file lists names of images: docs/data.md has commands that write it"
    problems.append(_Problem(text, split, missing=True, whole=True))
    return [], ""
  listed = []
  for path in found:
    try:
      lines = _text(path).splitlines()
    except UnicodeDecodeError:
      text = f"{path.relative_to(part)}: not a text in UTF-8, or UTF-16 with its mark"
      problems.append(_Problem(f"{text}; save it as UTF-8", split))
      return [], ""
    names = [line.strip().replace("\\", "/").strip("/") for line in lines if line.strip()]
    listed.append([_SUFFIX.sub("", name) for name in names])
    if not names:
      problems.append(_Problem(f"{path.relative_to(part)}: lists no names", split))
  if any(set(names) != set(listed[0]) for names in listed):
    both = " and ".join(str(p.relative_to(part)) for p in found)
    problems.append(_Problem(f"{both} list different names; keep only the right one", split))
  return listed[0], found[0].name


def _text(path: Path) -> str:
  """Reads UTF-8, or UTF-16 with a byte order mark, as Windows writes it.

  Raises:
    UnicodeDecodeError: it is neither.
  """
  content = path.read_bytes()
  utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
  text = content.decode("utf-16" if utf16 else "utf-8-sig")
  if "\0" in text:  # of UTF-16 without the mark
    raise UnicodeDecodeError("utf-8", content, content.find(b"\0"), len(content), "a zero")
  return text


def _split_folder(part: Path, split: str, problems: list[_Problem]) -> list[Path]:
  """Finds the split's file in the only folder with both files, such as 50_50/."""
  both = sorted(p.parent for p in part.glob("*/train.txt") if p.with_name("test.txt").is_file())
  if len(both) > 1:
    listed = ", ".join(f"{folder.name}/" for folder in both)
    text = f"{listed} each have train.txt and test.txt; copy the right two to splits/"
    problems.append(_Problem(text, split))
    return []
  return [f for f in (folder / f"{split}.txt" for folder in both) if f.is_file()]


def _list_pal(part: Path) -> tuple[dict[str, list[_Pair]], list[_Problem]]:
  """Lists the pairs of a layout with a folder per split.

  PAL has train (or its copy, origin) and val, its test set. Beside a folder test, val is the
  validation split.
  """
  problems, files = [], {}
  choices_of = {"train": ("train", "origin"), "test": ("test", "val"), VAL: ("val",)}
  for split, choices in choices_of.items():
    halves = [h for h in (_child(part, [c]) for c in choices) if h and _child(h, _IMAGE_HALVES)]
    files[split] = {}, {}
    if split == VAL and not _child(part, ["test"]):
      continue
    if not halves and split != VAL:
      tried = " or ".join(f"{c}/img, {c}/images" for c in choices)
      text = f"no folder for split {split!r}; looked for {tried} in {part}; there are "
      text += _content(part)
      whole = not any(_child(part, [c]) for c in choices)
      problems.append(_Problem(text, split, missing=True, whole=whole))
    if not halves:
      continue
    half, listed = halves[0], []
    for kind, names in (("image", _IMAGE_HALVES), ("mask", _MASK_HALVES)):
      folder = _child(half, names)
      listed.append(_files(folder) if folder else {})
      if folder is None:
        text = f"{half.name}: there is no {kind} folder ({' or '.join(names)}); there are "
        problems.append(_Problem(text + _content(half), split, missing=True))
      elif not listed[-1]:
        text = f"{half.name}/{folder.name}: no image files in this folder"
        problems.append(_Problem(text, split, missing=True))
    files[split] = tuple(listed)
  names = {s: sorted(images, key=_natural) for s, (images, _) in files.items()}
  if names[VAL] and not _is_own(part, names):
    names[VAL], files[VAL] = [], ({}, {})
  _check_names(names, problems)
  pairs: dict[str, list[_Pair]] = {}
  for split, (images, masks) in files.items():
    pairs[split] = []
    if images and masks:
      pairs[split] = _match(names[split], images, masks, split, problems)
      orphans = {_strip(name) for name in masks} - set(images)
      for name in sorted(orphans, key=_natural):
        problems.append(_Problem(f"{split}: {name} has a mask but no image", split, missing=True))
  return pairs, problems


def _check_names(names: dict[str, list[str]], problems: list[_Problem]) -> None:
  for split, listed in names.items():
    for name, count in Counter(listed).items():
      if count > 1:
        problems.append(_Problem(f"{split}: {name} is listed {count} times", split))
  for one, other in itertools.combinations(names, 2):
    for name in sorted(set(names[one]) & set(names[other]), key=_natural):
      problems.append(_Problem(f"{name} is in both {one} and {other}"))


def _match(
  names: list[str],
  images: dict[str, list[Path]],
  masks: dict[str, list[Path]],
  split: str,
  problems: list[_Problem],
) -> list[_Pair]:
  """Finds image and mask of each name.

  If both exist, NAME is preferred to NAME_pixels0 and the like (OUR CHOICE: it marks NUAA-SIRST's
  original masks, one of which has the wrong size).
  """
  pairs = []
  for name in dict.fromkeys(names):
    files = {
      "image": images.get(name, []),
      "mask": next((masks[n] for n in (name, *(name + a for a in _AFFIXES)) if n in masks), []),
    }
    absent = [kind for kind, found in files.items() if not found]
    if absent:
      text = f"{split}: {name} has no {' and no '.join(absent)}"
      problems.append(_Problem(text, split, missing=True))
      continue
    for found in files.values():
      if len(found) > 1:
        listing = " or ".join(p.name for p in found)
        problems.append(_Problem(f"{split}: {name} is ambiguous: {listing}", split))
    pairs.append(_Pair(name, files["image"][0], files["mask"][0]))
  return pairs


def _prefix_colliding_names(parts: dict[Path, dict[str, list[_Pair]]]) -> None:
  """Prefixes names that occur in two parts with the part's name.

  Both splits are searched, so that a name does not depend on which split is read.
  """
  owners: dict[str, set[Path]] = {}
  for part, splits in parts.items():
    for pair in (pair for pairs in splits.values() for pair in pairs):
      owners.setdefault(pair.name, set()).add(part)
  for part, splits in parts.items():
    for split, pairs in splits.items():
      splits[split] = [
        p._replace(name=f"{part.name}_{p.name}") if len(owners[p.name]) > 1 else p for p in pairs
      ]


# ------------------------------------------------------------------------------ decoding, checking


def _decode(
  pairs: list[_Pair], root: Path, values: frames.Range, only_sizes: bool, option: str
) -> tuple[list, bool, list[_Problem]]:
  """Returns samples, or only their (height, width); whether one has a target; and the problems."""

  def one(pair):
    sample, problems, warning = _decode_pair(pair, values)
    if warning:
      _LOG.warning("%s: %s", pair.mask, warning)
    if sample is None:
      return None, False, problems
    return sample.mask.shape if only_sizes else sample, sample.mask.any(), problems

  with futures.ThreadPoolExecutor(max_workers=8) as pool:
    results = list(pool.map(one, pairs))
  kept = [sample for sample, _, _ in results if sample is not None]
  found = [problem for _, _, problems in results for problem in problems]
  problems = _told(found, root, len(pairs), option)
  return kept, any(target for _, target, _ in results), problems


def _told(
  found: list[tuple[Path, Exception]], root: Path, number: int, option: str
) -> list[_Problem]:
  """Returns a problem for each file, but one for all images that one range does not fit.

  Args:
    found: files and what is wrong with them.
    root: of the dataset.
    number: of images that were read.
    option: that names the range.
  """
  alike: dict[str, list[str]] = {}
  for path, error in found:
    if isinstance(error, frames.RangeError):
      alike.setdefault(error.advice, []).append(str(path.relative_to(root)))
  problems = []
  for path, error in found:
    place = str(path.relative_to(root))
    if not isinstance(error, frames.RangeError):
      problems.append(_Problem(f"{place}: {error}"))
    elif place == alike[error.advice][0]:
      names = alike[error.advice]
      if len(names) > 1:
        place = f"{len(names)} of {number} images, the first of them {place}"
      problems.append(_Problem(f"{place}: {error.told(option)}"))
  return problems


def _decode_again(pair: _Pair, values: frames.Range) -> Sample:
  sample, problems, _ = _decode_pair(pair, values)
  if problems:
    path, text = problems[0]
    raise DataError(f"{path}: {text}. It could be read when the program began")
  return sample


def _decode_pair(
  pair: _Pair, values: frames.Range
) -> tuple[Sample | None, list[tuple[Path, Exception]], str]:
  """Returns a pair's sample, its problems, and a warning or ""."""
  problems, image, mask = [], None, None
  try:
    if values:
      image = sample_lib.read_frame(pair.image, values)
    else:
      image = sample_lib.decode_image(pair.image.read_bytes())
  except (ValueError, OSError) as error:
    problems.append((pair.image, error))
  try:
    mask, warning = sample_lib.decode_mask(pair.mask.read_bytes(), share=False)
  except (ValueError, OSError) as error:
    problems.append((pair.mask, error))
  if problems:
    return None, problems, ""
  if mask.shape != image.shape[:2]:
    (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
    sizes = f"mask is {mask_width}×{mask_height}, its image {pair.image.name} {width}×{height}"
    return None, [(pair.mask, ValueError(f"{sizes} (width×height); they must be equal"))], ""
  try:  # after the sizes, which explain more
    warning = warning or mask_rules.check_share(mask)
  except ValueError as error:
    return None, [(pair.mask, error)], ""
  return Sample(pair.name, image, mask), [], warning


def _compare_counts(root: Path, split: str, counts: dict[Path, int]) -> None:
  for part, number in (counts | {root: sum(counts.values())}).items():
    name = known_name(part)
    known = name and split in SPLITS
    expected = KNOWN_COUNTS[name][SPLITS.index(split)] if known else number
    if number != expected:
      message = "%s: %d %s pairs, but %s has %d; results are not comparable with published ones"
      _LOG.warning(message, part, number, split, name, expected)
