"""Decodes labelled infrared frames, computes their statistics, and splits off validation images."""

import hashlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fdep_jax.data import frames
from fdep_jax.metrics import masks


class Sample(NamedTuple):
  """A decoded frame and the mask of its targets.

  `image` is H×W×3 uint8 (grey replicated, palette resolved, alpha dropped), `mask` H×W bool.
  """

  name: str
  image: np.ndarray
  mask: np.ndarray


class LazySamples(Sequence):
  """Samples that are decoded each time they are asked for, so that their number costs no memory.

  Args:
    decode: place → sample; called by several threads.
    sizes: (height, width) of each sample.
    places: of the samples among those that `decode` knows; default all.
  """

  _AHEAD = 16  # decoded ahead of an iteration

  def __init__(
    self,
    decode: Callable[[int], Sample],
    sizes: Sequence[tuple[int, int]],
    places: Sequence[int] | None = None,
  ):
    self._decode, self._sizes = decode, sizes
    self._places = range(len(sizes)) if places is None else places

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.select(range(len(self))[index])
    return self._decode(self._places[index])

  def __iter__(self) -> Iterator[Sample]:
    with futures.ThreadPoolExecutor(max_workers=8) as pool:
      for start in range(0, len(self), self._AHEAD):
        yield from pool.map(self._decode, self._places[start : start + self._AHEAD])

  def select(self, indices: Sequence[int]) -> "LazySamples":
    """Returns some of the samples, in the order of the indices."""
    return LazySamples(self._decode, self._sizes, [self._places[i] for i in indices])

  @property
  def sizes(self) -> list[tuple[int, int]]:
    return [self._sizes[place] for place in self._places]


def sizes(samples: Sequence[Sample]) -> list[tuple[int, int]]:
  """Returns the (height, width) of samples, without decoding them."""
  lazy = isinstance(samples, LazySamples)
  return samples.sizes if lazy else [sample.mask.shape for sample in samples]


def select(samples: Sequence[Sample], indices: Sequence[int]) -> Sequence[Sample]:
  """Returns some of the samples, in the order of the indices, without decoding them."""
  lazy = isinstance(samples, LazySamples)
  return samples.select(indices) if lazy else [samples[i] for i in indices]


# Mean or deviation of grey levels / 255: one for all channels, or one for each.
Statistic = float | tuple[float, float, float]

_FORMATS = ("PNG", "BMP", "JPEG", "TIFF")
_EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_DECODING_ERRORS = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  struct.error,
  zlib.error,
  Image.DecompressionBombError,
)


def _open(content: bytes, deep: bool = False) -> Image.Image:
  """Opens a picture as viewers show it, turned as its EXIF data say."""
  try:
    picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    bits = frames.bits(picture)
    picture.load()
    picture = ImageOps.exif_transpose(picture)
  except _DECODING_ERRORS as error:
    reason = re.sub(r" <_io[^>]*>", "", str(error))
    raise ValueError(f"cannot be decoded ({reason}); is it damaged? Fetch it again") from None
  if deep and (picture.mode in _EIGHT_BIT and bits <= 8 or picture.mode[0] in "IF"):
    return picture
  if bits > 8 or picture.mode not in _EIGHT_BIT:
    raise frames.RangeError(
      f"holds more than 8 bits per channel (mode {picture.mode})",
      "Name the range that becomes black to white: {option}=LOW,HIGH in the sensor's counts, full, "
      "or auto",
    )
  return picture


def decode_image(content: bytes) -> np.ndarray:
  """Decodes the bytes of a PNG, BMP, JPEG or TIFF file to H×W×3 uint8.

  Raises:
    ValueError: damaged or cut short, or more than 8 bits per channel (scaling 16 bits down
      without knowing the sensor's range would blacken most frames).
  """
  return np.array(_open(content).convert("RGB"))


def read_frame(path: str | os.PathLike, values: frames.Range) -> np.ndarray:
  """Reads an image of more than 8 bits as H×W×3 uint8.

  Args:
    path: a file with one frame.
    values: range that becomes the grey levels, "full" or (low, high), see `frames.grey_levels`.

  Raises:
    ValueError: it cannot be read, has several frames, has 8 bits, or nearly all of it is black or
      white (the last two: `frames.RangeError`).
  """
  found = list(frames.read(path))
  if len(found) != 1:
    raise ValueError(f"has {len(found)} frames; save one a file")
  frames.check_depth(found[0])
  grey = np.uint8(frames.grey_levels(found[0], values))
  frames.check_clipped(found[0], grey, values)
  return np.repeat(grey[..., None], 3, -1) if grey.ndim == 2 else grey


def decode_mask(content: bytes, share: bool = True) -> tuple[np.ndarray, str]:
  """Decodes the bytes of a mask file to H×W bool, and a warning or "".

  Args:
    content: of the file.
    share: checks the share of target pixels.

  Raises:
    ValueError: damaged, or as `metrics.masks`, whose rule it applies.
  """
  mask, warning = masks.binary(masks.levels(_open(content, deep=True)))
  return mask, warning or (masks.check_share(mask) if share else "")


def check_contrast(
  root: str, samples: Sequence[Sample], values: frames.Range = "", option: str = frames.OPTION
) -> None:
  """Checks that an image has two grey levels, without which nothing can be learnt.

  Args:
    root: of the dataset, for the message.
    samples: of the train split; decodes them up to the first with two levels.
    values: range of the grey levels.
    option: that names it.

  Raises:
    ValueError: each image has one grey level only.
  """
  found = []
  for sample in samples:
    if np.ptp(sample.image.reshape(-1, 3), axis=0).any():
      return
    found.append(int(sample.image.flat[0]))
  if not found:
    return
  levels = f"{min(found)}" if min(found) == max(found) else f"{min(found)} to {max(found)}"
  advice = "so they show nothing. Save them again from the sensor's counts"
  if values:
    advice = f"with the range {frames.show_range(values)}. Name the range of the images' own values"
    advice += f": {option}=LOW,HIGH in the sensor's counts, or auto"
  raise ValueError(
    f"{root}: each of the {len(found)} train images has one grey level only ({levels} of 255), "
    f"their deviation is 0, {advice}."
  )


def statistics(samples: Sequence[Sample]) -> tuple[float, float]:
  """Computes mean and standard deviation for normalising, as fractions of 255.

  Both are averages over the images: of the luma's mean, and of its standard deviation (not the
  pooled one). Both are scalars, used for all three channels.

  Source: YuChuang1205/PAL components/cal_mean_std.py.
  """
  if not samples:
    raise ValueError("statistics of no samples; give the train split")
  grey = (np.asarray(Image.fromarray(s.image).convert("L"), np.float64) / 255 for s in samples)
  means, deviations = zip(*((g.mean(), g.std()) for g in grey), strict=True)
  return float(np.mean(means)), float(np.mean(deviations))


def fingerprint(samples: Sequence[Sample]) -> str:
  """Returns a SHA-256 of the images and masks, in order; names and file formats do not matter."""
  digest = hashlib.sha256()
  for sample in samples:
    for array in (sample.image, sample.mask):
      digest.update(repr(array.shape).encode())
      digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


def draw(samples: Sequence[Sample], count: int, seed: int) -> Sequence[Sample]:
  """Draws some samples, which keep their order.

  The choice depends only on `seed` and the number of samples; a greater `count` adds to it.

  Raises:
    ValueError: there are not so many.
  """
  if count > len(samples):
    raise ValueError(
      f"data.train_images is {count}, and the train split has {len(samples)} images. Set it to "
      f"{len(samples)} or less, or to 0 for all."
    )
  return select(samples, sorted(np.random.default_rng(seed).permutation(len(samples))[:count]))


def split_validation(
  samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[Sequence[Sample], Sequence[Sample]]:
  """Holds out a random `fraction`; returns (train, validation), both in the given order.

  The choice depends only on `seed` and the number of samples. At least one sample is held out if
  `fraction` > 0.
  """
  if not 0 <= fraction < 1:
    raise ValueError(f"validation fraction is {fraction}; it must be in [0, 1)")
  if fraction == 0:
    return samples, []
  held = max(1, round(fraction * len(samples)))
  if held >= len(samples):
    raise ValueError(
      f"holding out {fraction} of {len(samples)} samples leaves none to train on; give more data"
    )
  chosen = set(np.random.default_rng(seed).permutation(len(samples))[:held].tolist())
  train = [i for i in range(len(samples)) if i not in chosen]
  return select(samples, train), select(samples, sorted(chosen))
