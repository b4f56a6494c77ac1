"""Computes the exact area under the pixel precision-recall curve (paper §3.4, Eq. 11).

Recall changes only at the scores of positive pixels, so the area needs the positives' scores and,
at each of them, two counts of negatives: at least this score, and above it. Scores are float32 in
[0, 1], whose bit patterns, read as integers, have the same order. Everything here uses these
integers, and never sorts the pixels of all images together.
"""

import concurrent.futures
import dataclasses
import functools

import numpy as np

# Scores of ranks up to EXACT are kept; beyond, a group that starts at rank r holds (r / EXACT)²
# negatives, so a summary has at most 2·EXACT groups for any size of image. OUR CHOICE: with the
# few tens of target pixels of an infrared image, the area changes by less than 1e-7.
EXACT = 4096

PIVOT = np.float32(1 / 32).view(np.uint32)
_GROUP = 1 << 17  # values that are sorted together: they fit a core's cache


def bits(scores):
  """Returns integers in the order of the float32 scores, which are in [0, 1] and not −0.0."""
  return scores.ravel().view(np.uint32)


def precision_at(true, false):
  """Computes precision from counts; 1 if nothing is predicted, as at the end of sklearn's curve."""
  predicted = true + false
  return np.where(predicted > 0, true / np.maximum(predicted, 1), 1.0)


def areas(count, false_at_least, false_above, negatives):
  """Computes areas under the precision-recall and ROC curves from counts at the positive scores.

  Arrays may have leading axes (resamples); the last axis runs over the scores, highest first.

  Args:
    count: numbers of positives with exactly each score.
    false_at_least: numbers of negatives with this score or a higher one.
    false_above: numbers of negatives with a higher score.
    negatives: number of all negatives.

  Returns:
    (hse_p, ap, roc_auc), each of the leading shape; fractions. hse_p is the trapezoid area, equal
    to sklearn's `auc(recall, precision)` of `precision_recall_curve`; ap the step rule,
    Σ (R_n − R_{n−1}) P_n. All NaN without positives, roc_auc also without negatives.
  """
  count = np.asarray(count, np.float64)
  true_at_least = np.cumsum(count, axis=-1)
  true_above = true_at_least - count
  total = true_at_least[..., -1] if count.shape[-1] else np.zeros(count.shape[:-1])
  at = precision_at(true_at_least, false_at_least)
  above = precision_at(true_above, false_above)
  beaten = negatives[..., None] - (np.asarray(false_at_least) + false_above) / 2  # a tie beats half
  with np.errstate(invalid="ignore", divide="ignore"):
    hse_p = (count * (at + above) / 2).sum(-1) / total
    ap = (count * at).sum(-1) / total
    roc_auc = (count * beaten).sum(-1) / (total * negatives)
  return hse_p, ap, roc_auc


def edges_of(positives):
  """Returns distinct positive scores, highest first, their counts, and cuts between ≥ and >."""
  values, count = np.unique(positives, return_counts=True)
  return values[::-1], count[::-1], np.stack([values, values + 1], axis=1).ravel()


def reached(edges, maps):
  """Counts the values of all `maps` (uint32, of any shapes) that reach each ascending edge."""
  # Most pixels have low scores and most positives high ones. So the few low edges are looked up in
  # each group of maps; the many high edges once, in the few high values of all groups.
  middle = np.searchsorted(edges, PIVOT)
  out = np.zeros(len(edges), np.int64)
  few = max(_GROUP // 16, len(edges))

  def count(group):
    values = np.concatenate(group)
    values.sort()
    high = values[np.searchsorted(values, PIVOT) :]
    if len(high) > few:
      return _at_least(edges, values), values[:0]
    low = _at_least(edges[:middle], values)
    return np.append(low, np.zeros(len(edges) - middle, np.int64)), high.copy()

  highs = []
  with concurrent.futures.ThreadPoolExecutor(2) as pool:  # sorting releases the interpreter
    for counts, high in pool.map(count, _groups(maps)):
      out += counts
      highs.append(high)
  out[middle:] += _at_least(edges[middle:], np.sort(np.concatenate(highs)))
  return out


def _groups(maps):
  """Yields lists of flat maps with about _GROUP values together."""
  held, number = [], 0
  for values in maps:
    held.append(values.ravel())
    number += values.size
    if number >= _GROUP:
      yield held
      held, number = [], 0
  if held:
    yield held


def _at_least(edges, ascending):
  return len(ascending) - np.searchsorted(ascending, edges)


def curve(pairs):
  """Returns `edges_of` the target pixels of (map, mask) pairs, and the negatives reaching each."""
  edges = edges_of(np.concatenate([bits(prob[mask]) for prob, mask in pairs]))
  _, count, cuts = edges
  at_least = np.cumsum(count)  # highest score first
  positives = np.stack([at_least, at_least - count], axis=1)[::-1].ravel()
  return edges, reached(cuts, (bits(prob) for prob, _ in pairs)) - positives


def split(counts_at_edges):
  """Splits counts at cuts into (at least, above) per distinct positive score, highest first."""
  pairs = counts_at_edges.reshape(*counts_at_edges.shape[:-1], -1, 2)[..., ::-1, :]
  return pairs[..., 0], pairs[..., 1]


@functools.cache
def group_starts(number):
  """Returns the ranks at which the groups of a summary of `number` negatives start."""
  starts, rank = list(range(min(number, EXACT))), min(number, EXACT)
  while rank < number:
    starts.append(rank)
    rank += -(-rank * rank // (EXACT * EXACT))
  return np.array(starts, np.int64)


@dataclasses.dataclass(frozen=True)
class Summary:
  """Negatives of one image in at most 2·EXACT groups; the scores of a group are in [low, high].

  Exact (low equals high) for the EXACT highest scores, and for all if few are distinct.
  """

  high: np.ndarray  # uint32, descending
  low: np.ndarray  # uint32
  count: np.ndarray  # uint32

  @property
  def total(self):
    return int(self.count.sum())


def summarise(sorted_bits):
  """Returns the `Summary` of ascending `sorted_bits`."""
  scores = sorted_bits[::-1]
  new = np.ones(len(scores), bool)
  new[1:] = scores[1:] != scores[:-1]
  first = np.flatnonzero(new)  # runs of equal scores
  if len(first) > 2 * EXACT:
    first = group_starts(len(scores))
  last = np.append(first[1:], len(scores))[: len(first)] - 1
  count = np.diff(first, append=len(scores)).astype(np.uint32)
  return Summary(scores[first], scores[last], count)


def counts_of(edges, summaries, which):
  """Counts negatives that reach each edge if each group has its `which` ("low", "high") score."""
  slots = np.zeros(len(edges) + 1)
  for summary in summaries:
    slot = np.searchsorted(edges, getattr(summary, which), side="right")
    slots += np.bincount(slot, weights=summary.count, minlength=len(slots))
  return slots[::-1].cumsum()[::-1][1:]
