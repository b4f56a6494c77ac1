"""Draws random crops and the training recipe's augmentation, and applies them in numpy.

What is drawn of a sample becomes a few integers: the corner of its crop, and steps. Pixels are
computed from these with integers alone, here on the host and in `resident.py` on the devices. So
both give the same images, bit for bit.

An image is H×W×3 uint8, its mask H×W bool. A step is `WIDTH` integers: one of `KINDS`, and its
numbers, filled up with zeros:

  NOTHING
  LEVELS       factor of the grey levels in 1/65536, and their shift
  NOISE        deviation in 1/1024 grey level, and two keys of the random numbers
  TURN, WARP   matrix M (4 numbers) and offset o (2) in 1/2048: pixel p becomes that at M·p + o,
               with TURN a whole pixel

Source of the recipe: YuChuang1205/PAL train_model.py (albumentations 1.3.0).
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

KINDS = NOTHING, LEVELS, NOISE, TURN, WARP = range(5)
WIDTH = 7
# OUR CHOICE: warps are rounded to 1/2048, so that bilinear interpolation fits in 31 bits: 8 of the
# grey level and 11 for each axis. In a crop of 448 that moves no place by more than 0.12 pixels.
BITS = 11
UNIT = 1 << BITS
_FACTOR = 65536
_NOISE_BITS = (10, 12)  # after the point: of the deviation, of the table of normal numbers

Step = tuple[int, ...]


# ----------------------------------------------------------------------------------------- drawing


def draw_corner(
  mask: np.ndarray, size: int, rng: np.random.Generator, target_prob: float = 0.0, margin: int = 0
) -> tuple[int, int]:
  """Draws the top left corner (y, x) of a size×size window, uniformly.

  Args:
    mask: of the image.
    size: pixels. A smaller image is extended by zeros at the right and bottom.
    rng: source of all random numbers.
    target_prob: probability of choosing a window that contains a target pixel drawn uniformly from
      the mask (any window if the mask is empty). 0 in the recipe: many of its crops have no target.
    margin: a window may reach this many pixels beyond the right and bottom border, into zeros; 0
      in the recipe.
  """
  lowest = np.zeros(2, int)
  highest = np.maximum(np.array(mask.shape) + margin - size, 0)
  if target_prob > 0 and rng.random() < target_prob and mask.any():
    pixels = np.argwhere(mask)
    pixel = pixels[rng.integers(len(pixels))]
    lowest = np.maximum(lowest, pixel - size + 1)
    highest = np.minimum(highest, pixel)
  y, x = rng.integers(lowest, highest, endpoint=True)
  return int(y), int(x)


def about_centre(kind: int, matrix, shift, shape: tuple[int, int]) -> Step:
  """Makes the step that samples at `matrix` @ (p − centre) + centre + `shift` for every pixel p.

  Places are (y, x). Both arguments are rounded to 1/2048.
  """
  matrix = np.rint(UNIT * np.asarray(matrix, float))
  centre = (np.array(shape) - 1) / 2
  offset = np.rint(UNIT * (centre + shift) - matrix @ centre)
  return (kind, *map(int, matrix.ravel()), *map(int, offset))


def vertical_flip(size: int, rng: np.random.Generator) -> Step:
  return about_centre(TURN, [[-1, 0], [0, 1]], 0, (size, size))


def horizontal_flip(size: int, rng: np.random.Generator) -> Step:
  return about_centre(TURN, [[1, 0], [0, -1]], 0, (size, size))


def transpose(size: int, rng: np.random.Generator) -> Step:
  return about_centre(TURN, [[0, 1], [1, 0]], 0, (size, size))


def rotate90(size: int, rng: np.random.Generator) -> Step:
  """Rotates by 0 to 3 quarter turns, as `np.rot90`."""
  matrix = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), int(rng.integers(4)))
  return about_centre(TURN, matrix, 0, (size, size))


def rotate(size: int, rng: np.random.Generator) -> Step:
  """Rotates by up to ±45° about the centre."""
  angle = np.deg2rad(rng.uniform(-45, 45))
  cos, sin = np.cos(angle), np.sin(angle)
  return about_centre(WARP, [[cos, -sin], [sin, cos]], 0, (size, size))


def shift(size: int, rng: np.random.Generator) -> Step:
  """Shifts by up to ±10 % of the height and, independently, of the width; not in whole pixels."""
  return about_centre(WARP, np.eye(2), rng.uniform(-0.1, 0.1, 2) * size, (size, size))


def scale(size: int, rng: np.random.Generator) -> Step:
  """Scales by a factor of 0.8 to 1.2 about the centre."""
  return about_centre(WARP, np.eye(2) / rng.uniform(0.8, 1.2), 0, (size, size))


def brightness(size: int, rng: np.random.Generator) -> Step:
  """Adds up to ±30 % of white."""
  return _filled(LEVELS, _FACTOR, round(rng.uniform(-0.3, 0.3) * 255))


def contrast(size: int, rng: np.random.Generator) -> Step:
  """Multiplies the grey levels by 0.7 to 1.3; zero stays, not the mean."""
  return _filled(LEVELS, round(rng.uniform(0.7, 1.3) * _FACTOR), 0)


def noise(size: int, rng: np.random.Generator) -> Step:
  """Adds Gaussian noise of variance 10 to 50 grey levels², per channel as in the recipe."""
  deviation = round(np.sqrt(rng.uniform(10, 50)) * 2 ** _NOISE_BITS[0])
  return _filled(NOISE, deviation, *map(int, rng.integers(2**31, size=2)))


def unchanged(size: int, rng: np.random.Generator) -> Step:
  return _filled(NOTHING)


def _filled(*numbers: int) -> Step:
  return numbers + (0,) * (WIDTH - len(numbers))


# The recipe gives each transform a probability. Its library uses them only as weights to draw a
# transform, and always applies the drawn one.
WEIGHTS = {
  vertical_flip: 0.5,
  horizontal_flip: 0.5,
  transpose: 0.5,
  rotate90: 0.5,
  brightness: 0.2,
  contrast: 0.2,
  rotate: 0.3,
  shift: 0.5,
  scale: 0.5,
  noise: 0.2,
  unchanged: 1.0,  # twice in the recipe's list, 0.5 each
}
_TRANSFORMS = list(WEIGHTS)
_PHOTOMETRIC = (brightness, contrast, noise)
_PROBABILITIES = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())


def draw(rng: np.random.Generator) -> list[Callable]:
  """Draws the transforms for one sample: none in half the cases, else three with replacement."""
  if rng.random() >= 0.5:
    return []
  return [_TRANSFORMS[i] for i in rng.choice(len(_TRANSFORMS), size=3, p=_PROBABILITIES)]


def recipe(size: int, rng: np.random.Generator) -> list[Step]:
  """Draws the steps of the paper's augmentation, in order."""
  return [transform(size, rng) for transform in draw(rng)]


def geometric(size: int, rng: np.random.Generator) -> list[Step]:
  """Draws the recipe without brightness, contrast and noise."""
  return [transform(size, rng) for transform in draw(rng) if transform not in _PHOTOMETRIC]


def photometric(size: int, rng: np.random.Generator) -> list[Step]:
  """Draws only the recipe's brightness, contrast and noise."""
  return [transform(size, rng) for transform in draw(rng) if transform in _PHOTOMETRIC]


def dihedral(size: int, rng: np.random.Generator) -> list[Step]:
  """Draws one of the square's eight symmetries, uniformly; they change no pixel value."""
  turn, mirrored = rotate90(size, rng), rng.integers(2)
  return [horizontal_flip(size, rng), turn] if mirrored else [turn]


def none(size: int, rng: np.random.Generator) -> list[Step]:
  return []


# Name of data.augment -> (size, rng) -> steps.
AUGMENTATIONS = {"recipe": recipe, "dihedral": dihedral, "none": none}

# With a prior bank: (drawn once per crop, drawn anew at every use); see `CropBank`.
BANKED = {
  "recipe": (geometric, photometric),
  "dihedral": (dihedral, none),
  "none": (none, none),
}
_MOST_STEPS = 3  # of each


def packed(
  place: int, corner: tuple[int, int], steps: list[Step], drawn_twice: bool = False
) -> np.ndarray:
  """Packs the place of a sample, the corner of its crop, and its steps into one int32 vector.

  Steps that do nothing come last, so that all vectors have one length: 24, of a bank's crop 45.
  """
  steps = [step for step in steps if step[0] != NOTHING]
  count = _MOST_STEPS * (2 if drawn_twice else 1)
  steps += [_filled(NOTHING)] * (count - len(steps))
  return np.array([place, *corner, *np.ravel(steps)], np.int32)


# ---------------------------------------------------------------------------------------- applying


def cut(image: np.ndarray, mask: np.ndarray, size: int, corner: tuple[int, int]):
  """Cuts the size×size window at a corner (y, x); beyond the right and bottom border it is 0."""
  window = tuple(slice(place, place + size) for place in corner)
  image, mask = image[window], mask[window]
  if mask.shape == (size, size):
    return image, mask
  lacking = [(0, size - side) for side in mask.shape]
  return np.pad(image, (*lacking, (0, 0))), np.pad(mask, lacking)


def apply(image: np.ndarray, mask: np.ndarray, steps: Iterable[Sequence[int]]):
  """Applies steps to a pair, in order.

  A warp interpolates the image bilinearly, and the mask by nearest neighbour. Beyond the border
  both are mirrored once about the border pixel (reflect-101), so a target near it may appear twice
  in both.
  """
  for kind, *numbers in steps:
    if kind == TURN:
      image, mask = _turn(image, numbers), _turn(mask, numbers)
    elif kind == WARP:
      image, mask = _warp(image, mask, numbers)
    elif kind == LEVELS:
      levels = scaled_levels(np.arange(256), *numbers[:2])
      image = np.clip(levels, 0, 255).astype(np.uint8)[image]
    elif kind == NOISE:
      image = _add_noise(image, *numbers[:3])
  return image, mask


def _turn(array: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
  """Flips and transposes; the numbers are those of a warp that moves whole pixels."""
  yy, yx, xy, xx, *_ = numbers
  if yx:
    array = array.swapaxes(0, 1)
  return array[:: -1 if yy + xy < 0 else 1, :: -1 if yx + xx < 0 else 1]


def _warp(image: np.ndarray, mask: np.ndarray, numbers: Sequence[int]):
  yy, yx, xy, xx, oy, ox = map(np.int32, numbers)
  height, width = mask.shape
  rows, columns = np.arange(height, dtype=np.int32)[:, None], np.arange(width, dtype=np.int32)
  # Without a rotation all pixels of a row have one y: height×1 and 1×width are enough.
  y = _mirrored(yy * rows + (yx * columns if yx else 0) + oy, height)
  x = _mirrored((xy * rows if xy else 0) + xx * columns + ox, width)
  blend = _blend_rows if y.size + x.size == height + width else _blend
  grey = (image == image[..., :1]).all()
  channels = [blend(image[..., c], y, x) for c in range(1 if grey else 3)]
  warped = np.stack(channels * 3 if grey else channels, axis=-1)
  return warped, mask[(y + UNIT // 2) >> BITS, (x + UNIT // 2) >> BITS]


def _mirrored(place: np.ndarray, length: int) -> np.ndarray:
  place = np.abs(place)
  return np.minimum(place, 2 * UNIT * (length - 1) - place)


def _blend(plane: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Interpolates H×W grey levels at places in 1/2048 pixel."""
  corner = (y >> BITS) * plane.shape[1] + (x >> BITS)
  # Beyond the last row and column any value will do: its weight is 0.
  four = (
    plane.ravel().take(corner + after, mode="clip").astype(np.int32)
    for after in (0, 1, plane.shape[1], plane.shape[1] + 1)
  )
  return blended(*four, y & UNIT - 1, x & UNIT - 1).astype(np.uint8)


def _blend_rows(plane: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Interpolates as `_blend` at y, H×1, and x, 1×W, first along the columns, then the rows."""
  top, left = y.ravel() >> BITS, x.ravel() >> BITS
  above, below = (plane.take(top + i, axis=0, mode="clip").astype(np.int32) for i in (0, 1))
  rows = UNIT * above + (below - above) * (y & UNIT - 1)
  before, after = (rows.take(left + i, axis=1, mode="clip") for i in (0, 1))
  return _rounded(UNIT * before + (after - before) * (x & UNIT - 1)).astype(np.uint8)


def _add_noise(image: np.ndarray, deviation: int, *keys: int) -> np.ndarray:
  bits = np.arange(image.size, dtype=np.uint32).reshape(image.shape)
  for key in keys:
    bits = mixed(bits ^ np.uint32(key))
  normal = normal_table()[bits >> 16].astype(np.int32)
  return np.clip(image + scaled_noise(normal, deviation), 0, 255).astype(np.uint8)


# The arithmetic of both routes; arrays are numpy's or jax's, int32 if nothing else is said.


def blended(a, b, c, d, down, right):
  """Interpolates between a and b (right), c and d below them; the weights are in 1/2048."""
  above, below = UNIT * a + (b - a) * right, UNIT * c + (d - c) * right
  return _rounded(UNIT * above + (below - above) * down)


def _rounded(value):
  # OUR CHOICE: rounds. The recipe's library truncates, which darkens by half a grey level.
  return (value + (1 << 2 * BITS - 1)) >> 2 * BITS


def scaled_levels(levels, factor, shift):
  """Multiplies grey levels by a factor in 1/65536, rounds, and adds a shift; to be clipped."""
  return ((levels * factor + _FACTOR // 2) >> 16) + shift


def mixed(bits):
  """Mixes 32-bit numbers, uint32, so that each bit depends on all.

  Source: Chris Wellons, hash-prospector, lowbias32.
  """
  bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
  return bits ^ (bits >> 16)


def scaled_noise(normal, deviation):
  """Multiplies numbers of `normal_table`, int32, by a deviation in 1/1024, and rounds."""
  return (normal * deviation + (1 << sum(_NOISE_BITS) - 1)) >> sum(_NOISE_BITS)


@functools.cache
def normal_table() -> np.ndarray:
  """Returns the standard normal numbers of 65536 equal shares, in 1/4096, int16."""
  from scipy import special

  shares = (np.arange(65536) + 0.5) / 65536
  return np.rint(special.ndtri(shares) * 2 ** _NOISE_BITS[1]).astype(np.int16)
