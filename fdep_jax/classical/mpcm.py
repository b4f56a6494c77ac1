"""MPCM: contrast of a patch with its eight neighbours, at several sizes (wei2016multiscale)."""

import numpy as np

from fdep_jax.classical import _image

SIZES = (3, 5, 7, 9)  # pixels, odd; those of MS_PCM. OUR CHOICE: the paper at hand names none
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1))  # the other four lie opposite


def mpcm(image, sizes=SIZES, bright_only=False):
  """Computes the multiscale patch-based contrast of an image.

  At each size d the mean of the d×d patch around a pixel is compared with the means of its eight
  neighbours at distance d. The contrast is the least product of the differences to two opposite
  neighbours; the map is the largest contrast over the sizes, and 0 where that is negative. The
  image continues beyond its border with the values of its edge.

  Args:
    image: H×W grey levels, finite; any real dtype, computed in float64.
    sizes: side lengths of the patches, odd.
    bright_only: drop pixels darker than their neighbours, which are a contrast, too. No published
      code does so.

  Returns:
    H×W float64, ≥ 0, squared grey levels.

  Raises:
    ValueError: the image is not H×W finite numbers, or a size is not odd and positive.
  """
  image = _image.checked(image)
  sizes = tuple(sizes)
  if not sizes or any(d != int(d) or d < 1 or not d % 2 for d in sizes):
    raise ValueError(f"sizes is {sizes!r}; give odd whole numbers of pixels, as in {SIZES}.")
  out = np.zeros(image.shape)
  for size in map(int, sizes):
    np.maximum(out, contrast(image, size, bright_only), out=out)
  return out


def contrast(image, size, bright_only=False):
  """The contrast of float64 `image` at one odd `size`; not clipped, so negative on edges."""
  height, width = image.shape
  sums = _sums(image, size)
  centre = sums[size : size + height, size : size + width]

  def less(row, col):  # the centre's sum less that of the neighbour in this direction
    row, col = size * (1 + row), size * (1 + col)
    return centre - sums[row : row + height, col : col + width]

  least, product = None, np.empty(image.shape)
  for row, col in _RING:
    difference = less(row, col)
    if bright_only:
      np.maximum(difference, 0, out=difference)
    np.multiply(difference, less(-row, -col), out=product)
    if least is None:
      least = product.copy()
    else:
      np.minimum(least, product, out=least)
  least /= size**4
  return least


def _sums(image, size):
  """Sums over size×size windows around every pixel of the image continued by `size` pixels."""
  margin = size + size // 2
  # Contrast does not change with a constant, and a constant image becomes exactly 0. Whole grey
  # levels then have exact sums.
  sums = np.pad(image - image.min(), margin, "edge")
  height, width = (n - size + 1 for n in sums.shape)
  rows = sums[:height].copy()
  for i in range(1, size):
    rows += sums[i : i + height]
  sums = rows[:, :width].copy()
  for i in range(1, size):
    sums += rows[:, i : i + width]
  return sums
