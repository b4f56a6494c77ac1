"""NIPPS: patches of the background are of low rank, targets are sparse (dai2017non).

min ‖B‖ + λ‖T‖₁ with B + T = D and T ≥ 0, where the columns of D are the image's patches and ‖B‖
is the sum of B's singular values without the first N. Solved by the inexact augmented Lagrangian
method, as in the author's published program.
"""

import numpy as np
from scipy import linalg

from fdep_jax.classical import _image

PATCH, STEP = 50, 10  # pixels
WEIGHT = 2.0  # λ = WEIGHT/√(the smaller side of D)
RATIO = 0.005  # singular values from this part of the largest on are kept whole
_TOLERANCE = 1e-7  # of ‖D − B − T‖ to ‖D‖, Frobenius
_ROUNDS = 1000
_GROWTH, _MOST = 1.5, 1e7  # of the penalty μ: each round, in all
_CACHED = 1 << 18  # numbers


def nipps(image, weight=WEIGHT, ratio=RATIO):
  """Computes the target image of the non-negative patch-image model with partial singular values.

  Small images often keep nearly all singular values, and then have no target anywhere: this is the
  method. Where a singular value lies just at the edge of those that are kept, the result may change
  with the last digit of the input.

  Args:
    image: H×W grey levels, finite; computed in float64. Below 50 pixels, which the published
      program does not take, the patch shrinks to the image's smaller side (OUR CHOICE).
    weight: of sparsity, the L of λ = L/√min(m, n).
    ratio: kept are the singular values of D of at least this part of the largest.

  Returns:
    H×W float64, ≥ 0, in the image's unit.

  Raises:
    ValueError: the image is not H×W finite numbers, or an option is not positive.
  """
  image = _image.checked(image)
  if not (weight > 0 and 0 < ratio < 1):
    raise ValueError(f"weight is {weight} and ratio {ratio}; give weight > 0 and 0 < ratio < 1.")
  windows = _windows(image.shape)
  patch = windows[0][0].stop - windows[0][0].start
  matrix = np.stack([image[window].T.ravel() for window in windows], axis=1)
  targets = separate(matrix, weight, ratio)[0]
  total, count = np.zeros(image.shape), np.zeros(image.shape)
  for window, column in zip(windows, targets.T, strict=True):
    total[window] += column.reshape(patch, patch).T
    count[window] += 1
  return total / count


def _windows(shape):
  """Slices of all patches, those of a column of patches together; the last ones end flush."""
  patch = min(PATCH, *shape)
  step = min(STEP, patch)  # without gaps between small patches
  rows, cols = (sorted({*range(0, n - patch + 1, step), n - patch}) for n in shape)
  return [np.s_[r : r + patch, c : c + patch] for c in cols for r in rows]


def separate(matrix, weight=WEIGHT, ratio=RATIO):
  """Separates a matrix of patches into sparse targets and a background of low rank.

  Args:
    matrix: m×n float64, a patch a column.
    weight, ratio: as `nipps`.

  Returns:
    (targets m×n, kept, rounds): `kept` singular values are not lessened.
  """
  wide = matrix.shape[1] > matrix.shape[0]
  tall = np.ascontiguousarray(matrix.T if wide else matrix)
  targets, kept, rounds = _separate(tall, weight, ratio)
  return targets.T if wide else targets, kept, rounds


# In each round, with Y the multiplier: T = max(D − B + (Y − λ)/μ, 0); B = A = D − T + Y/μ with all
# singular values but the first N lessened by 1/μ; Y ← Y + μ(D − B − T). The new Y is therefore
# μ(A − B), that is A·P, where P has A's right singular vectors and instead of a singular value s
# 0 for the first N and min(μ, 1/s) for the others. They come from AᵀA, which is small. That loses
# half of the digits of small singular values, but 1/μ stays far above those.


def _separate(matrix, weight, ratio):
  values, vectors = linalg.eigh(matrix.T @ matrix, driver="evd")
  values = np.sqrt(np.maximum(values[::-1], 0))
  if not values[0] > 0:
    return np.zeros(matrix.shape), 1, 0
  basis = vectors[:, ::-1]
  below = values / values[0] < ratio
  kept = max(int(np.argmax(below)) if below.any() else len(values), 1)
  lam = weight / np.sqrt(min(matrix.shape))
  scale = max(values[0], np.abs(matrix).max() / lam)
  state = _Penalty(1.25 / values[0])
  multiplier, rest, rounds = _before_targets(matrix, values, basis, kept, lam, 1 / scale, state)
  if multiplier is None:
    return np.zeros(matrix.shape), kept, rounds

  norm = np.linalg.norm(matrix)
  targets, joined = np.zeros(matrix.shape), np.empty(matrix.shape)
  # Some rows at a time, so that what is computed element by element stays in the cache.
  height = max(1, _CACHED // matrix.shape[1])
  blocks = [np.s_[i : i + height] for i in range(0, len(matrix), height)]
  while rounds < _ROUNDS:
    for block in blocks:
      scaled, sparse = joined[block], targets[block]
      np.divide(multiplier[block], state.now, out=scaled)
      sparse += rest[block]  # D − B
      sparse += scaled
      sparse -= lam / state.now
      np.maximum(sparse, 0, out=sparse)
      scaled -= sparse
      scaled += matrix[block]  # A
    weights = _weights(joined, state.now, kept)
    missing = 0.0
    for block in blocks:
      updated = joined[block] @ weights
      np.subtract(updated, multiplier[block], out=rest[block])
      rest[block] /= state.now  # D − B − T
      multiplier[block] = updated
      missing += np.vdot(rest[block], rest[block])
    rounds += 1
    state.grow()
    if np.sqrt(missing) < _TOLERANCE * norm:
      break
  return targets, kept, rounds


class _Penalty:
  """μ, which grows from round to round."""

  def __init__(self, start):
    self.now, self._most = start, start * _MOST

  def grow(self):
    self.now = min(self.now * _GROWTH, self._most)


def _weights(matrix, penalty, kept):
  """P of a round, n×n symmetric."""
  values, vectors = linalg.eigh(
    matrix.T @ matrix, driver="evd", overwrite_a=True, check_finite=False
  )
  values = np.sqrt(np.maximum(values, 0))
  values[len(values) - kept :] = np.inf
  vectors *= np.sqrt(np.minimum(penalty, 1 / np.maximum(values, 1 / penalty)))
  return vectors @ vectors.T


def _before_targets(matrix, values, basis, kept, lam, factor, state):
  """The rounds as long as there is no target: all matrices share D's singular vectors.

  So a round is one of n numbers: Y is D with its singular values times `factors`.

  Returns:
    (Y, D − B − T, rounds) at the first round with a target, or (None, None, rounds) if the method
    ended before.
  """
  factors = np.full(len(values), factor)
  rest = np.ones(len(values))  # D − B − T as D's singular values times these; B = 0 at the start
  norm = np.linalg.norm(values)
  rotated = matrix @ basis
  image_of = lambda factors: (rotated * factors) @ basis.T  # noqa: E731
  for rounds in range(_ROUNDS):
    if image_of(rest + factors / state.now).max() > lam / state.now:
      return image_of(factors), image_of(rest), rounds
    lessened = values * (1 + factors / state.now)  # singular values of A
    updated = (1 + factors / state.now) * np.minimum(
      state.now, 1 / np.maximum(lessened, 1 / state.now)
    )
    updated[np.argsort(-lessened, kind="stable")[:kept]] = 0
    rest = (updated - factors) / state.now
    factors = updated
    state.grow()
    if np.linalg.norm(rest * values) < _TOLERANCE * norm:
      return None, None, rounds + 1
  return None, None, _ROUNDS
