"""Computes confidence intervals by bootstrap over images, from the counts of each image."""

import numpy as np

from fdep_jax.metrics import hse, pixels

METRICS = (*hse.PAPER, "precision", "recall", "f1", "roc_auc", "ap")
LOWER_IS_BETTER = ("fa",)
# The pixel curve of a resample has about this many points, with equally many positives between two,
# joined by trapezoids. The error is far below the width of any interval.
_POINTS = 1024


def intervals(total, resamples=1000, level=0.95, seed=0):
  """Computes percentile intervals of every metric.

  Args:
    total: an `hse.Accumulator`.
    resamples: number of sets drawn; each has as many images as `total`, with replacement.
    level: probability of the interval.
    seed: the same seed gives the same intervals.

  Returns:
    {metric: (low, high)}; NaN if no resample has the metric.
  """
  values = samples(total, draw(len(total), resamples, seed))
  return {name: _interval(value, level) for name, value in values.items()}


def compare(a, b, resamples=1000, level=0.95, seed=0):
  """Compares two detectors in pairs: the same images are drawn for both.

  Args:
    a, b: two `hse.Accumulator` of the same images in the same order, with the same options.

  Returns:
    {metric: {"difference": a − b, "low", "high", "a_is_better": probability}}; a tie counts half,
    and for Fa less is better.

  Raises:
    ValueError: the images or the options differ.
  """
  ours, theirs = a.counts(), b.counts()
  same = len(ours) == len(theirs) and all(
    (getattr(ours, n) == getattr(theirs, n)).all() for n in ("pixels", "target_pixels", "targets")
  )
  if not same or a.options != b.options:
    raise ValueError(
      "A paired comparison needs the same images and options; given are "
      f"{len(ours)} and {len(theirs)} images with {ours.targets.sum()} and {theirs.targets.sum()} "
      f"targets\n  {a.options}\n  {b.options}"
    )
  weights = draw(len(ours), resamples, seed)
  left, right = samples(a, weights), samples(b, weights)
  point = [samples(x, np.ones((1, len(ours)))) for x in (a, b)]
  out = {}
  for name in METRICS:
    gap = left[name] - right[name]
    low, high = _interval(gap, level)
    gap = gap[~np.isnan(gap)] * (-1 if name in LOWER_IS_BETTER else 1)
    out[name] = {
      "difference": float(point[0][name][0] - point[1][name][0]),
      "low": low,
      "high": high,
      "a_is_better": float(((gap > 0) + (gap == 0) / 2).mean()) if len(gap) else np.nan,
    }
  return out


def draw(images, resamples, seed):
  """Draws how often each image is in each resample: resamples × images."""
  rng = np.random.default_rng(seed)
  return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def samples(total, weights):
  """Computes {metric: one value per row of `weights` (resamples × images)} of an `Accumulator`."""
  counts, options = total.counts(), total.options
  summed = {n: weights @ getattr(counts, n) for n in vars(counts)}
  at, _ = options.of_grid()
  out = {k: np.asarray(v) for k, v in hse.rates(summed, options).items()}
  iou = hse.image_iou(counts, options)
  kept = ~np.isnan(iou)
  with np.errstate(invalid="ignore"):
    out["niou"] = weights[:, kept] @ iou[kept] / weights[:, kept].sum(1)
  out["hse_t"] = hse.target_curve(
    summed["hits"][:, at], summed["predicted"][:, at], summed["targets"], options
  )[2]
  count, at_least, above = (weights @ m for m in _pixel_counts(total))
  negatives = summed["pixels"] - summed["target_pixels"]
  out["hse_p"], out["ap"], out["roc_auc"] = pixels.areas(count, at_least, above, negatives)
  out["hse"] = out["hse_p"] * out["hse_t"]
  return {name: out[name] for name in METRICS}


def _pixel_counts(total):
  """Counts positives in, negatives reaching and negatives above each group of scores, per image.

  Returns:
    Three arrays, images × groups, the highest scores first.
  """
  scores, number = np.unique(np.concatenate(total.positives), return_counts=True)
  # A score that many positives share (a saturated 1.0) is its own group, as the curve bends there.
  group = (np.cumsum(number) - number) * _POINTS // max(number.sum(), 1)
  heavy = number * _POINTS > number.sum()
  new = np.ones(len(scores), bool)
  new[1:] = (group[1:] != group[:-1]) | heavy[1:] | heavy[:-1]
  first = np.flatnonzero(new)
  low, high = scores[first], scores[np.append(first[1:], len(scores))[: len(first)] - 1]
  cuts = np.stack([low, high + 1], axis=1).ravel()  # ascending; may repeat
  count = np.stack(
    [np.bincount(np.searchsorted(low, p, "right") - 1, minlength=len(low)) for p in total.positives]
  )
  reach = np.stack(
    [sum(pixels.counts_of(cuts, [n], end) for end in ("low", "high")) / 2 for n in total.negatives]
  )
  at_least, above = pixels.split(reach)
  return count[:, ::-1], at_least, above


def _interval(values, level):
  values = values[~np.isnan(values)]
  if not len(values):
    return np.nan, np.nan
  return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist())
