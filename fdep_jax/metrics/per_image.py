"""Keeps the integers of each image from which every interval is computed, also in a small file."""

import dataclasses
import io
import json
import zipfile

import numpy as np

from fdep_jax.metrics import hse, pixels
from fdep_jax.runtime import files

FILE = "counts.npz"  # beside metrics.json, of the checkpoint that it scores
# The pixel curve of a resample has about this many points, with equally many positives between two,
# joined by trapezoids. The error is far below the width of any interval.
POINTS = 1024
_FIELDS = tuple(field.name for field in dataclasses.fields(hse.Counts))


@dataclasses.dataclass(frozen=True, eq=False)
class PerImage:
  """The counts of a set of images, a row each; groups of scores run from the highest down.

  Attributes:
    options: `hse.Options` of the counts.
    counts: `hse.Counts`.
    positives: images × groups, target pixels with a score in the group.
    reached: images × 2·groups, twice the other pixels above each group and reaching into it, in
      turn. Twice, as pixels between two bounds count half.
  """

  options: hse.Options
  counts: hse.Counts
  positives: np.ndarray
  reached: np.ndarray

  def __len__(self):
    return len(self.counts)

  def pixel_counts(self):
    """Returns positives in, negatives reaching and negatives above each group: images × groups."""
    return self.positives, self.reached[:, 1::2] / 2, self.reached[:, ::2] / 2


def of(total):
  """Returns the `PerImage` of an `hse.Accumulator`; a `PerImage` as it is."""
  if isinstance(total, PerImage):
    return total
  scores, number = np.unique(np.concatenate(total.positives), return_counts=True)
  # A score that many positives share (a saturated 1.0) is its own group, as the curve bends there.
  group = (np.cumsum(number) - number) * POINTS // max(number.sum(), 1)
  heavy = number * POINTS > number.sum()
  new = np.ones(len(scores), bool)
  new[1:] = (group[1:] != group[:-1]) | heavy[1:] | heavy[:-1]
  first = np.flatnonzero(new)
  low, high = scores[first], scores[np.append(first[1:], len(scores))[: len(first)] - 1]
  cuts = np.stack([low, high + 1], axis=1).ravel()  # ascending; may repeat
  positives = np.stack(
    [np.bincount(np.searchsorted(low, p, "right") - 1, minlength=len(low)) for p in total.positives]
  )
  reached = np.stack(
    [sum(pixels.counts_of(cuts, [n], end) for end in ("low", "high")) for n in total.negatives]
  )
  reached = np.rint(reached).astype(np.int64)
  highest_first = (np.ascontiguousarray(array[:, ::-1]) for array in (positives, reached))
  return PerImage(total.options, total.counts(), *highest_first)


def save(path, totals):
  """Writes {branch: `hse.Accumulator` or `PerImage`} as NPZ, whole or not at all."""
  arrays = {}
  for name, found in totals.items():
    found = of(found)
    arrays[f"{name}.options"] = np.array(json.dumps(vars(found.options), sort_keys=True))
    for field in _FIELDS:
      arrays[f"{name}.{field}"] = _small(getattr(found.counts, field))
    arrays[f"{name}.positives"] = _small(found.positives)
    # Differences are mostly 0, which leaves a small file.
    arrays[f"{name}.reached"] = _small(np.diff(found.reached, axis=1, prepend=0))
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  files.write(path, content.getvalue())


def load(path):
  """Reads {name: `PerImage`} from a file of `save`.

  Raises:
    ValueError: the file is damaged, or no such file.
  """
  try:
    with np.load(path, allow_pickle=False) as data:
      names = dict.fromkeys(key.rpartition(".")[0] for key in data.files)
      return {name: _read(name, data) for name in names}
  except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(
      f"{path} is damaged, or holds no counts of images ({error}). Evaluate the run again "
      "(--mode eval)."
    ) from None


def _read(name, data):
  counts = {field: data[f"{name}.{field}"].astype(np.int64) for field in _FIELDS}
  return PerImage(
    hse.Options(**json.loads(str(data[f"{name}.options"]))),
    hse.Counts(**counts),
    data[f"{name}.positives"].astype(np.int64),
    np.cumsum(data[f"{name}.reached"], axis=1, dtype=np.int64),
  )


def _small(array):
  """Returns non-negative integers in the smallest type that holds them."""
  return array.astype(np.min_scalar_type(int(array.max(initial=0))))
