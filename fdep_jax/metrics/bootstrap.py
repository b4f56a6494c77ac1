"""Computes confidence intervals by bootstrap over images, from the counts of each image."""

import numpy as np

from fdep_jax.metrics import hse, per_image, pixels

METRICS = (*hse.PAPER, "precision", "recall", "f1", "roc_auc", "ap")
LOWER_IS_BETTER = ("fa",)


def intervals(total, resamples=1000, level=0.95, seed=0):
  """Computes percentile intervals of every metric.

  Args:
    total: an `hse.Accumulator`, or the `per_image.PerImage` of one, which gives the same.
    resamples: number of sets drawn; each has as many images as `total`, with replacement.
    level: probability of the interval.
    seed: the same seed gives the same intervals.

  Returns:
    {metric: (low, high)}; NaN if no resample has the metric.
  """
  values = samples(total, draw(len(total), resamples, seed))
  return {name: _interval(value, level) for name, value in values.items()}


def note(found, headings):
  """Says which intervals are a single point, in one sentence; "" if none is.

  Args:
    found: {metric: (low, high)}, None or NaN if there is none.
    headings: {metric: its name for people}; others are not looked at.
  """
  points = [
    heading
    for name, heading in headings.items()
    if (ends := found.get(name)) and ends[0] is not None and ends[0] == ends[1]
  ]
  if not points:
    return ""
  return (
    f"an interval of one point ({', '.join(points)}) says that all images agree, not that the "
    "value is certain: other images may differ."
  )


def compare(a, b, resamples=1000, level=0.95, seed=0):
  """Compares two detectors in pairs: the same images are drawn for both.

  Args:
    a, b: totals as for `intervals`, of the same images in the same order, with the same options.

  Returns:
    {metric: {"difference": a − b, "low", "high", "a_is_better": share of the draws}}; a tie
    counts half, and for Fa less is better. The share says nothing of other trainings of the two.

  Raises:
    ValueError: the images or the options differ.
  """
  a, b = per_image.of(a), per_image.of(b)
  check_pair(a, b)
  weights = draw(len(a), resamples, seed)
  left, right = samples(a, weights), samples(b, weights)
  point = [samples(x, np.ones((1, len(a)))) for x in (a, b)]
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


def check_pair(a, b):
  """Raises ValueError unless two `PerImage` are of the same images and options."""
  ours, theirs = a.counts, b.counts
  same = len(ours) == len(theirs) and all(
    (getattr(ours, n) == getattr(theirs, n)).all() for n in ("pixels", "target_pixels", "targets")
  )
  if not same or a.options != b.options:
    raise ValueError(
      "A paired comparison needs the same images and options; given are "
      f"{len(ours)} and {len(theirs)} images with {ours.targets.sum()} and {theirs.targets.sum()} "
      f"targets\n  {a.options}\n  {b.options}"
    )


def t_interval(values, level=0.95):
  """Computes Student's interval of the mean of a few trainings, one value a seed.

  Returns:
    (low, high); NaN for fewer than two values.
  """
  from scipy import special

  count = len(values)
  if count < 2:
    return np.nan, np.nan
  reach = special.stdtrit(count - 1, (1 + level) / 2) * np.std(values, ddof=1) / count**0.5
  return float(np.mean(values) - reach), float(np.mean(values) + reach)


def draw(images, resamples, seed):
  """Draws how often each image is in each resample: resamples × images."""
  rng = np.random.default_rng(seed)
  return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def samples(total, weights):
  """Computes {metric: one value per row of `weights` (resamples × images)}; `total` as above."""
  total = per_image.of(total)
  counts, options = total.counts, total.options
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
  count, at_least, above = (weights @ m for m in total.pixel_counts())
  negatives = summed["pixels"] - summed["target_pixels"]
  out["hse_p"], out["ap"], out["roc_auc"] = pixels.areas(count, at_least, above, negatives)
  out["hse"] = out["hse_p"] * out["hse_t"]
  return {name: out[name] for name in METRICS}


def _interval(values, level):
  values = values[~np.isnan(values)]
  if not len(values):
    return np.nan, np.nan
  return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist())
