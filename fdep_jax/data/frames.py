"""Frames as cameras and tools write them, at any bit depth, as the grey levels that networks know.

Read are PNG, BMP, TIFF and JPEG pictures, whatever their suffix, and NumPy's NPY; 8 to 32 bits,
integers or floats, grey, palette or colour (transparency is dropped). Every page of a TIFF is a
frame, and so is every H×W part of an N×H×W array.
"""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".npy")
MAX_PIXELS = 2**27  # of one frame, 11585²: more is a mistake or an attack

# Percentiles that become black and white. OUR CHOICE: a target fills about 1e-4 of a frame, and a
# few dead or glaring pixels must not set the range.
BLACK, WHITE = 0.1, 99.99

Range = str | tuple[float, float]

_FORMATS = ("PNG", "BMP", "TIFF", "JPEG")
_REDUCED = 254  # TIFF's NewSubfileType; bit 0: a smaller copy of another page


class FrameError(ValueError):
  """A file that cannot be used; the message is the reason."""


def read(path: str | Path) -> Iterator[np.ndarray]:
  """The frames of a file, one after the other: H×W, or H×W×3 for colour, as they are stored.

  Yields:
    uint8, uint16, int32 or other integers; float32 or float64, finite.

  Raises:
    FrameError: a ValueError with the reason in a phrase: no picture, damaged, empty, complex, not
      finite, too large. Nothing in a file is ever executed.
  """
  path = Path(path)
  try:
    with open(path, "rb") as file:
      is_array = file.read(6) == b"\x93NUMPY"
    frames = _read_array(path) if is_array else _read_picture(path)
    yield from map(checked, frames)
  except FrameError:
    raise
  except Exception as error:  # whatever decoders raise on these bytes, it is about the file
    reason = re.sub(r" *<_io[^>]*>|'?" + re.escape(str(path)) + "'?", "", str(error))
    reason = " ".join(reason.split())[:200] or type(error).__name__
    raise FrameError(f"cannot be decoded ({reason}); is it a picture, and whole?") from None


def checked(frame: np.ndarray) -> np.ndarray:
  """The frame in native byte order, or a FrameError."""
  if frame.dtype.kind not in "uif" or frame.dtype.itemsize > 8:
    raise FrameError(f"holds {frame.dtype}; save integers or floats")
  if frame.ndim not in (2, 3) or frame.shape[2:] not in ((), (3,)) or not frame.size:
    shape = "×".join(map(str, frame.shape))
    raise FrameError(f"has the shape {shape}; frames are H×W or H×W×3, and not empty")
  if frame.dtype.kind == "f":
    bad = frame.size - int(np.isfinite(frame).sum())
    if bad:
      raise FrameError(f"holds {bad} values that are not finite; replace NaN and infinity")
  return frame.astype(frame.dtype.newbyteorder("="), copy=False)


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise FrameError(
      f"has {width}×{height} pixels; at most {MAX_PIXELS} are read. Cut it into parts"
    )


def _read_array(path: Path) -> Iterator[np.ndarray]:
  # Mapped, not read: a header that promises more than the file holds is refused before it costs.
  array = np.load(path, mmap_mode="r", allow_pickle=False)
  if array.ndim == 2:
    frames = [array]
  elif array.ndim == 3:
    frames = [array] if array.shape[-1] in (1, 3, 4) else array
  elif array.ndim == 4 and array.shape[-1] in (1, 3, 4):
    frames = array
  else:
    shape = "×".join(map(str, array.shape))
    raise FrameError(f"has the shape {shape}; save H×W, H×W×3, N×H×W or N×H×W×3")
  if not len(frames):
    raise FrameError("holds no frames")
  for frame in frames:
    _check_size(frame.shape[1], frame.shape[0])
    frame = np.array(frame if frame.ndim == 2 else frame[..., :3])
    frame = frame[..., 0] if frame.shape[2:] == (1,) else frame
    if frame.dtype == bool:
      frame = frame * np.uint8(255)
    yield frame


def _read_picture(path: Path) -> Iterator[np.ndarray]:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Pillow, about size (checked here) and damaged metadata
    with Image.open(path, formats=_FORMATS) as picture:
      pages = picture.n_frames if picture.format == "TIFF" else 1
  for page in range(pages):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      frame = _read_page(path, page)
    if frame is not None:
      yield frame


def _read_page(path: Path, page: int) -> np.ndarray | None:
  """One page, or None for a smaller copy of another."""
  with Image.open(path, formats=_FORMATS) as picture:
    if page:
      picture.seek(page)
      if picture.tag_v2.get(_REDUCED, 0) & 1:
        return None
    _check_size(*picture.size)
    layout = _layout(picture)
    if ";16" in layout and picture.mode in ("RGB", "RGBA", "LA"):
      return _read_deep_colour(path, page, layout)
    if picture.mode.startswith("I") or picture.mode == "F":
      return np.array(picture)
    return np.array(picture.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB"))


def _layout(picture: Image.Image) -> str:
  """Pillow's name for how the file stores a pixel, such as RGB;16B; "" where it has none."""
  arguments = picture.tile[0][3] if picture.tile else ""
  layout = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
  return layout if isinstance(layout, str) else ""


def _read_deep_colour(path: Path, page: int, layout: str) -> np.ndarray:
  """16 bits a channel, of which Pillow keeps the high byte: decode once for each byte."""
  high, low = (_decode_as(path, page, layout, swap) for swap in (False, True))
  if layout.startswith("LA"):
    return high[..., 0].astype(np.uint16) * 256 + high[..., 1]
  return (high.astype(np.uint16) * 256 + low)[..., :3]


def _decode_as(path: Path, page: int, layout: str, swap: bool) -> np.ndarray:
  with Image.open(path, formats=_FORMATS) as picture:
    if page:
      picture.seek(page)
    if layout.startswith("LA"):  # two 16-bit channels are four bytes, as RGBA's
      picture._mode, new = "RGBA", "RGBA"
    else:
      order = {"B": "L", "L": "B", "N": "B"}[layout[-1]] if swap else layout[-1]
      new = layout[:-1] + order
    picture.tile = [
      tile._replace(args=(new, *tile.args[1:]) if isinstance(tile.args, tuple) else new)
      for tile in picture.tile
    ]
    return np.array(picture)


def parse_range(text: str) -> Range:
  """ "auto", "full" or "LOW,HIGH", as a flag gives it."""
  if text in ("auto", "full"):
    return text
  try:
    low, high = (float(part) for part in text.split(","))
  except ValueError:
    low = high = 0.0
  if not (np.isfinite([low, high]).all() and low < high):
    raise ValueError(f"range is {text!r}; it must be auto, full, or LOW,HIGH with LOW < HIGH.")
  return low, high


def grey_levels(frame: np.ndarray, values: Range = "auto") -> np.ndarray:
  """A frame in the grey levels of 8-bit pictures, which networks are trained on.

  Args:
    frame: H×W or H×W×3, any type.
    values: how they become grey levels.
      "auto". OUR CHOICE: 8 bits are taken as they are, and so are floats in [0, 1] (times 255)
      and 16 bits that only widen 8 (all values multiples of 257). Everything else is stretched
      linearly from the frame's 0.1th to its 99.99th percentile: thermal cameras write 14 bits, of
      which a scene fills a few hundred counts; divided by 65535 it would be black.
      "full": integers are divided by their type's maximum, floats are taken to be in [0, 1].
      (low, high): this range is stretched, in the frame's own unit; the same for every frame, for
      sequences and where counts mean temperatures.
      What lies outside becomes black or white.

  Returns:
    The same shape, float32 in [0, 255]; not rounded.
  """
  integer = frame.dtype.kind in "iu"
  if frame.dtype == np.uint8 and isinstance(values, str):
    return frame.astype(np.float32)
  if values == "auto":
    if frame.dtype == np.uint16 and not (frame % 257).any():
      return (frame // 257).astype(np.float32)
    if not integer and frame.min() >= 0 and frame.max() <= 1:
      return frame.astype(np.float32) * np.float32(255)
    low, high = np.percentile(frame, (BLACK, WHITE), method="nearest")
    if not low < high:
      low, high = frame.min(), frame.max()
  elif values == "full":
    low, high = (0, np.iinfo(frame.dtype).max) if integer else (0, 1)
  else:
    low, high = values
  low, high = float(low), float(high)
  if not low < high:
    return np.zeros(frame.shape, np.float32)  # one value everywhere
  # float64 where float32 would lose the frame's own steps; row by row, to stay small.
  out = np.empty(frame.shape, np.float32)
  for row, line in zip(out, frame, strict=True):
    # Halves: the difference of two finite floats can be infinite.
    part = (line.astype(np.float64) / 2 - low / 2) / (high / 2 - low / 2)
    row[:] = np.clip(part, 0, 1) * 255
  return out
