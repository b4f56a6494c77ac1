"""FKRW: a facet kernel finds bright spots, a random walker tells targets from clutter.

After qin2019infrared, the form of its authors' published program.
"""

import numpy as np
from scipy import ndimage

from fdep_jax.classical import _image

FACET = np.array(
  [[-4, -1, 0, -1, -4], [-1, 2, 3, 2, -1], [0, 3, 4, 3, 0], [-1, 2, 3, 2, -1], [-4, -1, 0, -1, -4]],
  np.float64,
)
HALF = 5  # the walker sees a window of 11×11 pixels
DEVIATIONS = 4  # candidates respond by so many standard deviations above the mean
POWER = 6  # of the contrast
BETA = 200  # of the walker's weights exp(−β·|ΔI|), I in [0, 1]
_LEAST = 1e-5  # added to every weight
_DIGITS = 9  # grey levels of candidates that agree so far tie; their order is then by column
_DISC = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2
_BATCH = 256  # windows solved together


def fkrw(image, *, published=False):
  """Computes the facet kernel and random walker map of an image.

  Args:
    image: H×W grey levels in [0, 255], finite; computed in float64.
    published: do as the authors' program does, which takes every pixel of full brightness for
      background, since it marks the background by that value. It loses saturated targets. The
      default leaves this out.

  Returns:
    H×W float64 in [0, 1], the largest value just below 1; 0 everywhere where nothing is found.

  Raises:
    ValueError: the image is not H×W finite numbers.
  """
  smooth, response, connectivity, contrast = parts(image, published=published)
  out = np.maximum(connectivity * contrast * response, 0)
  return out / (out.max() + 1e-6)


def parts(image, *, published=False):
  """Computes what the map is the product of.

  Returns:
    (smooth, response, connectivity, contrast), each H×W float64: grey levels in [0, 1] without
    single bright pixels; the facet kernel's answer; how much more likely the walker stays within a
    region than it reaches what is around it; the region's contrast to its surroundings, to the
    sixth power. The last two are 0 outside of regions.
  """
  smooth = _without_spikes(_image.checked(image) / 255)
  response = ndimage.correlate(smooth, FACET, mode="mirror")
  connectivity, contrast = np.zeros((2, *smooth.shape))
  candidates = _candidates(smooth, response)
  if not len(candidates):
    return smooth, response, connectivity, contrast
  padded = _mirrored(smooth)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * HALF + 1,) * 2)
  windows = windows[candidates[:, 0], candidates[:, 1]]
  probability = _walk(windows, published)
  region = probability >= 0.5
  # Where a window reaches beyond the image there is nothing to be marked.
  taken = np.zeros(padded.shape, bool)
  marks = np.zeros((2, *padded.shape))
  for (row, col), window, prob, own in zip(candidates, windows, probability, region, strict=True):
    if taken[row + HALF, col + HALF]:
      continue
    if own.sum() < 2:  # of its centre alone, which no later region gets
      taken[row + HALF, col + HALF] = True
      continue
    here = np.s_[row : row + 2 * HALF + 1, col : col + 2 * HALF + 1]
    new = own & ~taken[here]
    marks[0][here][new] = _connectivity(prob, own)
    marks[1][here][new] = _contrast(window, own)
    taken[here] |= own
  inner = np.s_[HALF:-HALF, HALF:-HALF]
  return smooth, response, marks[0][inner], marks[1][inner]


def _without_spikes(grey):
  """Lowers pixels above all their neighbours to these, then means of 2×2 pixels."""
  ring = np.ones((3, 3), bool)
  ring[1, 1] = False
  around = ndimage.maximum_filter(grey, footprint=ring, mode="constant", cval=0.0)
  below = np.pad(np.minimum(grey, around), ((0, 1), (0, 1)), "edge")
  return (below[:-1, :-1] + below[1:, :-1] + below[:-1, 1:] + below[1:, 1:]) / 4


def _candidates(smooth, response):
  """(row, col) of the pixels that respond strongly, brightest first, ties by column."""
  deviation = response.std(ddof=1) if response.size > 1 else 0.0
  cols, rows = np.nonzero((response >= response.mean() + DEVIATIONS * deviation).T)
  if not deviation > 0:
    rows = cols = rows[:0]
  grey = smooth[rows, cols].round(_DIGITS)
  return np.stack([rows, cols], 1)[np.argsort(-grey, kind="stable")]


def _mirrored(smooth):
  """With a margin of HALF, mirrored without repeating the edge, more than once if need be."""
  return np.pad(smooth, HALF, "reflect")


def _walk(windows, published):
  """How likely a walker from each pixel reaches the window's centre before its border, n×11×11."""
  return np.concatenate(
    [_walk_batch(windows[i : i + _BATCH], published) for i in range(0, len(windows), _BATCH)]
  )


def _walk_batch(windows, published):
  number, side = len(windows), 2 * HALF - 1  # pixels inside of the border
  down = np.exp(-BETA * np.abs(np.diff(windows, axis=1)))[:, :, 1:-1] + _LEAST
  right = np.exp(-BETA * np.abs(np.diff(windows, axis=2)))[:, 1:-1] + _LEAST
  node = np.arange(side * side).reshape(side, side)
  matrix = np.zeros((number, side * side, side * side))
  degree = down[:, 1:] + down[:, :-1] + right[:, :, 1:] + right[:, :, :-1]
  matrix[:, node.ravel(), node.ravel()] = degree.reshape(number, -1)
  for weight, one, other in (
    (down[:, 1:-1], node[:-1], node[1:]),
    (right[:, :, 1:-1], node[:, :-1], node[:, 1:]),
  ):
    weight, one, other = weight.reshape(number, -1), one.ravel(), other.ravel()
    matrix[:, one, other] = matrix[:, other, one] = -weight
  # The border is where the probability is 0; other seeds have equations of their own.
  seed = np.zeros((number, side, side), bool)
  if published:
    seed |= windows[:, 1:-1, 1:-1] == 1
  lost = seed[:, HALF - 1, HALF - 1].copy()  # a target's and a background's seed at once
  seed[:, HALF - 1, HALF - 1] = True
  image, place = np.nonzero(seed.reshape(number, -1))
  matrix[image, place] = 0
  matrix[image, place, place] = 1
  target = np.zeros(side * side)
  target[node[HALF - 1, HALF - 1]] = 1
  out = np.zeros(windows.shape)
  solved = np.linalg.solve(matrix, np.broadcast_to(target[:, None], (number, side * side, 1)))
  out[:, 1:-1, 1:-1] = solved.reshape(number, side, side)
  out[lost] = 0
  return out


def _connectivity(prob, region):
  centre = prob[HALF, HALF]
  inside = (prob[region].sum() - centre) / (region.sum() - 1)
  return inside / ((prob[~region].sum() + centre) / (region.size - region.sum() + 1))


def _contrast(window, region):
  once = ndimage.binary_dilation(region, _DISC)
  ring = ndimage.binary_dilation(once, _DISC) & ~once
  if not ring.any():
    return 0.0
  highest = window[ring].max()
  if not highest > 0:
    return 0.0
  ratio = window[region].mean() / highest
  return ratio**POWER if ratio - 1 > 1e-9 else 0.0
