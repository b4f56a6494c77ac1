"""Reads frames of any bit depth and converts them to the grey levels of 8-bit pictures.

The files are PNG, BMP, TIFF and JPEG pictures, whatever their suffix, and NumPy's NPY: 8 to 32
bits, integers or floats, grey, palette or colour (transparency is dropped). Every page of a TIFF
and every H×W part of an N×H×W array is a frame.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fdep_jax.metrics import columns

SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".npy")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".wmv", ".webm", ".mpg", ".mpeg", ".m4v", ".ts", ".gif")
MAX_PIXELS = 2**27  # of one frame (11585²); a larger one is a mistake or an attack

# Percentiles mapped to black and white. OUR CHOICE: a target fills about 1e-4 of a frame, and a few
# dead or glaring pixels must not set the range.
BLACK, WHITE = 0.1, 99.99

Range = str | tuple[float, float]

_FORMATS = ("PNG", "BMP", "TIFF", "JPEG")
# Tags of TIFF.
_REDUCED = 254  # bit 0 marks a reduced copy of a page
_BITS = 258  # of each channel
_PLANAR = 284  # 2: a plane for each channel


def about_video(path: str | Path) -> str:
  """Says how to make frames of a video."""
  return (
    f"{path} is a video; frames are read from pictures. Make them with `mkdir frames && ffmpeg -i "
    f"{path} frames/%06d.png` and give the folder frames."
  )


class FrameError(ValueError):
  """An unusable file; the message is the reason."""


OPTION = "--config.data.range"  # names the range, except where a mode has an option of its own
CLIPPED = 0.99  # share of black and white pixels from which a range does not fit an image


class RangeError(FrameError):
  """An image that does not fit the range of a dataset; all images of one kind are told as one."""

  def __init__(self, reason: str, advice: str):
    """Takes a phrase of the image, and the advice to all of its kind: {option} is the option."""
    super().__init__(f"{reason}. {advice.format(option=OPTION)}")
    self.reason, self.advice = reason, advice

  def told(self, option: str) -> str:
    """Returns the message with the option of the mode in use."""
    return f"{self.reason}. {self.advice.format(option=option)}"


def read(path: str | Path) -> Iterator[np.ndarray]:
  """Yields the frames of a file as they are stored: H×W, or H×W×3 for colour.

  Yields:
    uint8, uint16, int32 or other integers; float32 or float64, finite.

  Raises:
    FrameError: a ValueError with the reason in a phrase: not a picture, damaged, empty, complex,
      not finite, too large. Nothing in a file is ever executed.
  """
  path = Path(path)
  if path.suffix.lower() in VIDEOS:
    raise FrameError(about_video(path))
  try:
    with open(path, "rb") as file:
      is_array = file.read(6) == b"\x93NUMPY"
    frames = _read_array(path) if is_array else _read_picture(path)
    yield from map(checked, frames)
  except FrameError:
    raise
  except Exception as error:  # decoders raise many types; each means a bad file
    reason = re.sub(r" *<_io[^>]*>|'?" + re.escape(str(path)) + "'?", "", str(error))
    reason = " ".join(reason.split())[:200] or type(error).__name__
    raise FrameError(f"cannot be decoded ({reason}); is it a complete picture?") from None


def checked(frame: np.ndarray) -> np.ndarray:
  """Returns the frame in native byte order, or raises a FrameError."""
  if frame.dtype.kind not in "uif" or frame.dtype.itemsize > 8:
    raise FrameError(f"holds {frame.dtype}; save integers or floats")
  if frame.ndim not in (2, 3) or frame.shape[2:] not in ((), (3,)) or not frame.size:
    shape = "×".join(map(str, frame.shape))
    raise FrameError(f"has the shape {shape}; frames are H×W or H×W×3, and not empty")
  if frame.dtype.kind == "f":
    bad = frame.size - int(np.isfinite(frame).sum())
    if bad:
      raise FrameError(
        f"holds {columns.counted(bad, 'value')} not finite; replace NaN and infinity"
      )
  return frame.astype(frame.dtype.newbyteorder("="), copy=False)


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise FrameError(
      f"has {width}×{height} pixels; at most {MAX_PIXELS} are read. Cut it into parts"
    )


def _read_array(path: Path) -> Iterator[np.ndarray]:
  # Mapped, not read: a header that claims more than the file has is refused before memory is taken.
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
    warnings.simplefilter("ignore")  # Pillow's, about size (checked here) and damaged metadata
    with _opened(path) as picture:
      pages = picture.n_frames if picture.format == "TIFF" else 1
  for page in range(pages):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      frame = _read_page(path, page)
    if frame is not None:
      yield frame


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
  # As a stream: Pillow maps a TIFF of which it has the path, with height and width confused if the
  # file says that it is turned by 90°.
  with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as picture:
    yield picture


def _read_page(path: Path, page: int) -> np.ndarray | None:
  """Reads one page, turned as viewers show it; None if it is a reduced copy of a page."""
  with _opened(path) as picture:
    if page:
      picture.seek(page)
      if picture.tag_v2.get(_REDUCED, 0) & 1:
        return None
    _check_size(*picture.size)
    if bits(picture) > 8 and picture.mode[0] not in "IF":
      planes = picture.format == "TIFF" and picture.tag_v2.get(_PLANAR, 1) != 1
      if planes or picture.mode not in ("RGB", "RGBA", "LA"):
        kind = "planes" if planes else picture.mode
        raise FrameError(
          f"holds more than 8 bits per channel as {kind}, of which 8 would be read; save one "
          "channel, or RGB pixel by pixel"
        )
      return _read_deep_colour(path, page, _layout(picture))
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
      return np.array(picture)
    return np.array(picture.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB"))


def bits(picture: Image.Image) -> int:
  """Returns the bits per channel of an opened file; call it before the pixels are read.

  Pillow's mode does not tell: it reads colours of 16 bits as 8, most by dropping the low byte.
  """
  if picture.format == "TIFF":
    return max(picture.tag_v2.get(_BITS, (1,)))
  return 16 if picture.format == "PNG" and ";16" in _layout(picture) else 8


def _layout(picture: Image.Image) -> str:
  """Returns Pillow's name for the file's pixel layout, such as RGB;16B; "" if it has none."""
  arguments = picture.tile[0][3] if picture.tile else ""
  layout = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
  return layout if isinstance(layout, str) else ""


def _read_deep_colour(path: Path, page: int, layout: str) -> np.ndarray:
  """Decodes 16 bits a channel, once for each byte, because Pillow keeps only the high one."""
  high, low = (_decode_as(path, page, layout, swap) for swap in (False, True))
  if layout.startswith("LA"):
    return high[..., 0].astype(np.uint16) * 256 + high[..., 1]
  return (high.astype(np.uint16) * 256 + low)[..., :3]


def _decode_as(path: Path, page: int, layout: str, swap: bool) -> np.ndarray:
  with _opened(path) as picture:
    if page:
      picture.seek(page)
    if layout.startswith("LA"):  # two 16-bit channels take four bytes, like RGBA
      picture._mode, new = "RGBA", "RGBA"
    else:
      order = {"B": "L", "L": "B", "N": "B"}[layout[-1]] if swap else layout[-1]
      new = layout[:-1] + order
    picture.tile = [
      tile._replace(args=(new, *tile.args[1:]) if isinstance(tile.args, tuple) else new)
      for tile in picture.tile
    ]
    return np.array(ImageOps.exif_transpose(picture))


def parse_range(text: str) -> Range:
  """Parses a flag's value: "auto", "full" or "LOW,HIGH"."""
  if text in ("auto", "full"):
    return text
  try:
    low, high = (float(part) for part in text.split(","))
  except ValueError:
    low = high = 0.0
  if not (np.isfinite([low, high]).all() and low < high):
    raise ValueError(f"range is {text!r}; it must be auto, full, or LOW,HIGH with LOW < HIGH.")
  return low, high


def show_range(values: Range) -> str:
  """Returns a range as it is given on the command line."""
  return values if isinstance(values, str) else ",".join(f"{value:.10g}" for value in values)


def check_depth(frame: np.ndarray) -> None:
  """Raises RangeError for 8 bits, which are grey levels already, in a dataset with a range."""
  if frame.dtype == np.uint8:
    raise RangeError(
      "has 8 bits per channel, but a range is given",
      "{option} is for images of more than 8 bits, and is the same for all. Leave it out if all "
      "images have 8 bits; otherwise save these from the sensor's counts, or take them out. A run "
      "that was trained with a range takes no images of 8 bits",
    )


def check_clipped(frame: np.ndarray, levels: np.ndarray, values: Range) -> None:
  """Raises RangeError if nearly all grey levels of a frame are black or white."""
  share = np.mean((levels == 0) | (levels == 255))
  if share >= CLIPPED:
    raise RangeError(
      f"has values from {frame.min():.10g} to {frame.max():.10g}, of which the range "
      f"{show_range(values)} makes {int(100 * share)} % black or white",
      "Name the range of the images' own values: {option}=LOW,HIGH in the sensor's counts, or "
      "auto, which measures it on the train images",
    )


def grey_levels(frame: np.ndarray, values: Range = "auto") -> np.ndarray:
  """Converts a frame to the grey levels of 8-bit pictures, which networks are trained on.

  Training, evaluation and prediction all call this, so that one file with one range gives one
  input.

  Args:
    frame: H×W or H×W×3, any type.
    values: the range that becomes [0, 255]; values outside it become black or white.
      "auto" (OUR CHOICE): 8 bits stay as they are. Floats in [0, 1] are multiplied by 255. 16 bits
      that only widen 8 (all values multiples of 257) are divided by 257. Everything else is
      stretched linearly from the frame's 0.1th to its 99.99th percentile: thermal cameras write 14
      bits, of which a scene fills a few hundred counts; divided by 65535 it would be black.
      "full": the whole range of an integer type; [0, 1] for floats.
      (low, high): in the frame's own unit, the same for every frame; for sequences, and if counts
      mean temperatures.

  Returns:
    The same shape, float32 in [0, 255]: whole numbers for "full" and (low, high), as training keeps
    8 bits of them; not rounded for "auto".
  """
  integer = frame.dtype.kind in "iu"
  whole = values != "auto"
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
  # float64, because float32 would lose fine steps of the frame; row by row, to save memory.
  out = np.empty(frame.shape, np.float32)
  for row, line in zip(out, frame, strict=True):
    # Halved first: the difference of two finite floats can be infinite.
    part = (line.astype(np.float64) / 2 - low / 2) / (high / 2 - low / 2)
    row[:] = np.clip(part, 0, 1) * 255
    if whole:
      np.rint(row, out=row)
  return out
