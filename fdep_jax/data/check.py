"""Checks datasets and shows their first pairs (`--mode validate`)."""

import logging
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fdep_jax import data
from fdep_jax.data import folders, frames
from fdep_jax.runtime import files

SHOWN = 6  # pairs in a picture
_SIDE = 240  # pixels of a pair's picture
_OPTION = "--range"  # of this mode, names the range
_AMBER = (255, 176, 0)


def command(flags) -> None:
  """Runs `--mode validate`.

  Raises:
    ValueError, FileNotFoundError: the message lists all problems of all datasets.
  """
  values, errors = frames.parse_range(flags.range) if flags.range else "", []
  for root, name in zip(flags.data, _names(flags.data), strict=True):
    try:
      own = data.measure_range(root, _OPTION) if values == "auto" else values
      validate(root, flags.out or "validation", own, name)
    except ValueError as error:
      errors.append(error)
  if errors:
    missing = all(isinstance(error, data.MissingDataError) for error in errors)
    kind = data.MissingDataError if missing else data.DataError
    raise kind("\n".join(map(str, errors)))


def _names(roots: Sequence[str]) -> list[str]:
  """Returns the names of the datasets' pictures, one for each."""
  return folders.folder_names([files.expand(re.sub("^tfds:", "tfds/", root)) for root in roots])


def validate(
  root: str, out: str, values: frames.Range = "", name: str | None = None
) -> dict[str, dict]:
  """Reads all splits, prints what is in them, and writes `<out>/<name>.png`.

  A folder may have no train split, as evaluation needs none.

  Args:
    root: folder of a dataset, or "tfds:<name>".
    out: folder, created if absent.
    values: range of the grey levels, as for `data.read`.
    name: of the picture; default the dataset's.

  Returns:
    {split: facts}, see `facts`.

  Raises:
    DataError: lists all problems, among them an absent test split.
    ValueError: each train image has one grey level only.
  """
  about = {"values": values, "option": _OPTION}
  data.check_named(root)
  folder = not root.startswith("tfds:")
  trains = not folder or data.has_split(root, "train")
  splits = {name: data.load(root, name, **about) for name in ("train", "test")[not trains :]}
  if folder and (own := data.load(root, "val", **about)):
    splits["val"] = own
  first = next(iter(splits.values()))
  if trains:
    data.check_contrast(root, first, **about)
  found = {split: facts(samples) for split, samples in splits.items()}
  print(f"{root}: no problems" + (f", range {frames.show_range(values)}" if values else ""))
  for split, values in found.items():
    print(f"  {split:<6}" + ", ".join(map(_said, values.items())))
  if not trains:
    print("  train none: the set can be evaluated, but not trained on")
  path = files.expand(out) / f"{name or _names([root])[0]}.png"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
      picture(first[:SHOWN]).save(partial, "PNG")
  except OSError as error:
    raise ValueError(f"{path} cannot be written ({error.strerror}). Choose a --out.") from None
  logging.info("wrote %s: the first pairs; outlines are the masks'", path)
  return found


def _said(fact: tuple[str, object]) -> str:
  name, value = fact
  one = value == 1 and name in ("images", "targets")
  return f"{value} {name.removesuffix('s') if one else name}"


def facts(samples: Sequence[data.Sample]) -> dict[str, object]:
  """Counts images, targets (8 neighbours) and sizes of a split."""
  from scipy import ndimage

  areas = []
  for sample in samples:
    label, _ = ndimage.label(sample.mask, np.ones((3, 3)))
    areas += np.bincount(label.ravel())[1:].tolist()
  heights, widths = zip(*data.sizes(samples), strict=True)
  sizes = sorted({f"{w}×{h}" for h, w in zip(heights, widths, strict=True)})
  return {
    "images": len(samples),
    "without a target": sum(not sample.mask.any() for sample in samples),
    "targets": len(areas),
    "pixels in the median target": round(float(np.median(areas))) if areas else 0,
    "pixels in the largest": max(areas, default=0),
    **({"pixels in every image": sizes[0]} if len(sizes) == 1 else {"different sizes": len(sizes)}),
  }


def picture(samples: Sequence[data.Sample]) -> Image.Image:
  """Draws images above the same images with the outlines of their masks."""
  from scipy import ndimage

  sheet = Image.new("RGB", (_SIDE * len(samples), 2 * _SIDE + 20), (0, 0, 0))
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
  for i, sample in enumerate(samples):
    outline = ndimage.binary_dilation(sample.mask, np.ones((3, 3)), 2) & ~ndimage.binary_dilation(
      sample.mask, np.ones((3, 3))
    )
    marked = np.where(outline[..., None], np.uint8(_AMBER), sample.image)
    for row, array in enumerate((sample.image, marked)):
      small = Image.fromarray(array)
      scale = min(_SIDE / small.width, _SIDE / small.height)
      size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
      sheet.paste(small.resize(size, Image.Resampling.NEAREST), (i * _SIDE, 20 + row * _SIDE))
    draw.text((i * _SIDE + 4, 3), sample.name[-36:], (255, 255, 255), font)
  return sheet
