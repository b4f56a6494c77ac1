"""The one rule by which masks are read, in training and in scoring.

A mask is one channel: targets above half of the range (127 of 255, 127·257 of 65535), or booleans.
What would be read wrongly in silence is refused: colours, alpha, class numbers, inverted masks.
"""

import numpy as np
from PIL import Image

MANY, TOO_MANY = 0.1, 0.5  # share of target pixels that is warned of, and refused; real sets: 0.007
_COLOURS = 8  # largest difference of the channels of a grey picture; JPEG makes a few levels
_FEW = 20  # grey levels that can only be numbers of classes or instances


def levels(picture: Image.Image) -> np.ndarray:
  """Returns the single channel of a mask's picture, H×W: bool, uint8, uint16 or float32.

  Raises:
    ValueError: the picture has colours or transparent pixels; says how to convert it.
  """
  if "A" in picture.mode.upper() or "transparency" in picture.info:
    if np.array(picture.convert("RGBA"))[..., 3].min(initial=255) < 255:
      raise ValueError(
        "mask has transparent pixels, and alpha is not read. Save one channel: 255 on targets, 0 "
        "elsewhere. If alpha is the mask: Image.open(path).convert('RGBA').getchannel('A')"
      )
  if picture.mode.startswith("I") or picture.mode == "F":
    return _deep(np.array(picture))
  if picture.mode in ("1", "L"):
    return np.array(picture)
  colours = np.array(picture.convert("RGB"))
  if int(np.ptp(colours.astype(np.int16), axis=-1).max(initial=0)) <= _COLOURS:
    return np.array(picture.convert("L"))
  if picture.mode == "P":
    numbers = np.unique(np.array(picture))
    raise ValueError(
      f"mask is a palette picture with colours; its {len(numbers)} numbers from {numbers[0]} to "
      f"{numbers[-1]} look like classes or instances. Save np.uint8(255 * "
      "(np.array(Image.open(path)) > 0)), if 0 is the background"
    )
  raise ValueError(
    "mask is a colour picture. Save one channel: np.uint8(255 * "
    "(np.array(Image.open(path).convert('RGB')).max(-1) > 0)), if black is the background"
  )


def _deep(array: np.ndarray) -> np.ndarray:
  if array.dtype.kind == "f" or array.dtype == np.uint16:
    return array
  if array.min(initial=0) < 0 or array.max(initial=0) > 65535:
    raise ValueError("mask holds 32-bit integers; save 8 or 16 bits, the largest value on targets")
  return array.astype(np.uint16)


def binary(array: np.ndarray, ones: bool = False) -> tuple[np.ndarray, str]:
  """Marks the targets of a mask.

  Args:
    array: H×W bool, integers or floats.
    ones: zeros and ones are a mask, too; of NumPy files, which are written by programs.

  Returns:
    H×W bool, and a warning or "".

  Raises:
    ValueError: it holds class or instance numbers; says how to convert it.
  """
  top = array.max(initial=0)
  half = 127 * 257 if array.dtype == np.uint16 and top > 255 else 127
  if array.dtype == bool:
    mask = array
  elif array.dtype.kind == "f" or (ones and top <= 1):
    mask = array > (0.5 if top <= 1 else 127)
  elif top == 1:
    raise ValueError("mask holds only 0 and 1; multiply it by 255")
  else:
    numbers = _numbers(array, top)
    if numbers:
      raise ValueError(numbers)
    mask = array > half
  if top > 1 and not mask.any():
    return mask, f"no pixel is > {half} (largest: {top:g}), so it has no target"
  return mask, ""


def check_share(mask: np.ndarray) -> str:
  """Returns a warning if targets fill a large part of a mask, else "".

  Raises:
    ValueError: they fill most of it, so it is inverted.
  """
  share = float(mask.mean()) if mask.size else 0.0
  if share > TOO_MANY:
    raise ValueError(
      f"targets fill {100 * share:.0f} % of the mask, so it looks inverted. Save 255 on targets, 0 "
      "elsewhere (255 - mask)"
    )
  if share > MANY:
    return f"targets fill {100 * share:.0f} % of the mask; is it a mask of small targets?"
  return ""


def _numbers(array: np.ndarray, top) -> str:
  """Says that a mask holds numbers of classes or instances; "" if it does not."""
  if not 1 < top <= (127 if array.dtype == np.uint8 else 2000):
    return ""
  found = np.unique(array)
  if top > _FEW and len(found) <= top / 2:
    return ""
  return (
    f"mask holds {len(found)} numbers from {found[0]} to {top}, which look like classes or "
    "instances. Save np.uint8(255 * (mask > 0)), if 0 is the background"
  )
