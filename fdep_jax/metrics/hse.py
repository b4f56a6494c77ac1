"""HSE and the conventional metrics from probability maps and masks (paper §3.4, Algorithm 1).

HSE = HSE-P × HSE-T. HSE-P is the area under the pixel precision-recall curve of all pixels of all
images, HSE-T the area under the target-level curve over thresholds.

  score = hse.score(probs, masks)  # floats in [0, 1] and bools; numpy, jax or torch
  print(score.hse, score.hse_p, score.hse_t)
"""

import dataclasses
import math
import warnings

import numpy as np

from fdep_jax.metrics import columns, components, pixels
from fdep_jax.runtime.problems import listing

# 0.05, 0.10 … 0.95 as float32, so that a score saved as 0.15 is not above the threshold 0.15.
THRESHOLDS = (np.arange(1, 20) / 20).astype(np.float32)
THRESHOLDS.setflags(write=False)
HALF = np.float32(0.5)  # IoU, nIoU, Pd and Fa are taken at prob > 0.5
PAPER = ("iou", "niou", "pd", "fa", "hse_p", "hse_t", "hse")  # the columns of the paper's tables
_PENDING = 1 << 18  # active pixels that are gathered before they are labelled together


@dataclasses.dataclass(frozen=True)
class Options:
  """Options for everything that the paper leaves open about its metrics.

  The defaults are OUR CHOICE; docs/metric.md holds other readings against the paper's numbers.

  Attributes:
    thresholds: thresholds τ of HSE-T, in [0, 1); compared as float32, `prob > τ`.
    max_distance: a prediction finds a target if their centroids are nearer than this, in pixels.
    extend: start the target-level curve at recall 0 with the precision of its lowest-recall point.
    area: "trapezoid" or "step" (Σ ΔR·P) for the target-level curve.
    connectivity: 8 or 4, the neighbours that connect pixels to a component.
    matching: "first", "nearest" or "optimal"; see `components.match`.
    empty_niou: IoU of an image with neither target nor prediction; None leaves it out of the mean.
    false_alarm: "unclaimed" counts the pixels of components that no target claims. "area" is
      DNANet's rule, for comparison with older papers: a false alarm of the same area as some hit in
      its image is forgiven.
  """

  thresholds: tuple = tuple(THRESHOLDS.tolist())
  max_distance: float = 3.0
  extend: bool = True
  area: str = "trapezoid"
  connectivity: int = 8
  matching: str = "first"
  empty_niou: float | None = 0.0
  false_alarm: str = "unclaimed"

  def __post_init__(self):
    if isinstance(self.thresholds, Options):  # the first argument that is not by name
      raise ValueError(
        'Options are given by name: hse.score(probs, masks, matching="nearest"). All fields of an '
        "hse.Options at once are **vars(options)."
      )
    problems = []
    try:
      values = np.unique(np.asarray(self.thresholds, np.float32))
    except (TypeError, ValueError):
      values = np.zeros(0, np.float32)
    if not len(values) or not ((values >= 0) & (values < 1)).all():
      problems.append(f"thresholds is {self.thresholds!r}; give at least one number in [0, 1)")
    object.__setattr__(self, "thresholds", tuple(values.tolist()))
    if not (np.isscalar(self.max_distance) and 0 < self.max_distance < math.inf):
      problems.append(f"max_distance is {self.max_distance!r}; give a number of pixels above 0")
    allowed = {
      "area": ("trapezoid", "step"),
      "connectivity": (8, 4),
      "matching": ("first", "nearest", "optimal"),
      "false_alarm": ("unclaimed", "area"),
    }
    for name, values in allowed.items():
      if getattr(self, name) not in values:
        problems.append(f"{name} is {getattr(self, name)!r}; it must be one of {values}")
    if problems:
      raise ValueError(listing("options of the metric", problems))

  @property
  def grid(self):
    """The thresholds and 0.5, ascending, float32."""
    return np.unique(np.append(np.asarray(self.thresholds, np.float32), HALF))

  def of_grid(self):
    """Returns the indices in `grid` of the thresholds and of 0.5."""
    grid = self.grid
    return np.searchsorted(grid, np.asarray(self.thresholds, np.float32)), int(
      np.searchsorted(grid, HALF)
    )


@dataclasses.dataclass(frozen=True)
class Counts:
  """Integers that determine every threshold metric; arrays over images, which may be summed.

  `predicted` and `hits` have a second axis, over `Options.grid`. The others are at prob > 0.5.
  """

  pixels: np.ndarray
  target_pixels: np.ndarray
  predicted_pixels: np.ndarray
  intersection: np.ndarray
  targets: np.ndarray  # components of the mask
  predicted: np.ndarray  # images × grid: components of the thresholded map
  hits: np.ndarray  # images × grid: targets that claimed a component
  false_alarm_pixels: np.ndarray  # of components that no target claims
  false_alarm_pixels_by_area: np.ndarray  # the same by DNANet's rule

  def __len__(self):
    return len(self.pixels)


@dataclasses.dataclass(frozen=True)
class Score:
  """The metrics of a set of images, as fractions (Fa too: tables show Fa × 10⁶).

  Without a true target hse, hse_p, hse_t, pd, recall, f1, roc_auc and ap are NaN.
  """

  hse: float
  hse_p: float
  hse_t: float
  iou: float  # over the set
  niou: float  # mean over the images
  pd: float
  fa: float
  precision: float  # of pixels; 0 where nothing is predicted
  recall: float
  f1: float
  roc_auc: float
  ap: float  # average precision of pixels (step rule)
  images: int
  pixels: int
  target_pixels: int
  targets: int
  hits: int  # targets found at prob > 0.5
  false_alarms: int  # components that no target claims at prob > 0.5
  hse_p_error: float  # an upper bound of |hse_p − exact HSE-P|; 0 from `score`
  curves: dict = dataclasses.field(repr=False, compare=False)  # arrays of both curves

  def as_dict(self):
    """Returns the numbers for JSON, NaN as None, without the curves."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "curves"}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}


def score(probs, masks, thresholds=THRESHOLDS, max_distance=3.0, **options):
  """Scores probability maps against masks.

  Args:
    probs: floats in [0, 1], compared as float32: one H×W map, a B×H×W, B×1×H×W or B×H×W×1 batch,
      or a list of maps and batches, whose sizes may differ. Arrays may be numpy's, jax's or
      torch's, of any float type, on any device, with or without gradients.
    masks: bools, the same.
    thresholds: thresholds of HSE-T, in [0, 1).
    max_distance: pixels between centroids, exclusive.
    **options: see `Options`; all fields of one are `**vars(options)`.

  Returns:
    A `Score`; exact, HSE-P included.

  Raises:
    ValueError: listing every map and mask that cannot be scored.
  """
  options = Options(thresholds=thresholds, max_distance=max_distance, **options)
  probs, masks = images(probs), images(masks)
  if len(probs) != len(masks) or not probs:
    raise ValueError(
      f"{columns.counted(len(probs), 'probability map')} and {columns.counted(len(masks), 'mask')} "
      "were given; each map needs its mask, and at least one pair is needed."
    )
  problems, pairs = [], []
  for i, pair in enumerate(zip(probs, masks, strict=True)):
    prob, mask, problem = check(*pair)
    problems += [f"image {i}: {p}" for p in problem]
    pairs.append((prob, mask))
  if problems:
    raise ValueError(listing("probability maps or masks", problems))
  counter = Counter(options)
  for prob, mask in pairs:
    counter.add(prob, mask)
  edges, false = pixels.curve(pairs)
  return _score(counter.counts(), edges, false, false, options)


class Accumulator:
  """Computes what `score` does, batch by batch; may be merged over devices, hosts or files.

  Keeps for each image the counts at every threshold, the scores of its target pixels and at most
  2·`pixels.EXACT` groups of the other pixels: below 100 KB for any size of image. HSE-P is then
  within `Score.hse_p_error` of the exact value. That bound is 0 or below 1e-6 unless each image of
  a set has thousands of target pixels.

    total = hse.Accumulator()
    total.update(prob, mask)  # or .update_counts(...) with counts from `jitted`
    total.merge(other)
    total.result().hse
  """

  def __init__(self, thresholds=THRESHOLDS, max_distance=3.0, **options):
    self.options = Options(thresholds=thresholds, max_distance=max_distance, **options)
    self._counter = Counter(self.options)
    self.positives = []  # per image, ascending bits
    self.negatives = []  # per image, a pixels.Summary

  def __len__(self):
    return len(self.positives)

  def update(self, prob, mask):
    """Adds one image or a batch.

    Args:
      prob: floats in [0, 1], H×W, B×H×W, B×1×H×W or B×H×W×1; any array that `score` takes.
      mask: bools of the same images.

    Raises:
      ValueError: listing all problems; nothing is added.
    """
    probs, masks = _images(to_numpy(prob)), _images(to_numpy(mask))
    if len(probs) != len(masks):
      raise ValueError(
        f"{columns.counted(len(probs), 'probability map')} and "
        f"{columns.counted(len(masks), 'mask')} were given; each map needs its mask."
      )
    pairs, problems = [], []
    for i, pair in enumerate(zip(probs, masks, strict=True)):
      prob, mask, found = check(*pair)
      pairs.append((prob, mask))
      problems += [f"image {i}: {p}" if len(probs) > 1 else p for p in found]
    if problems:
      raise ValueError(listing("probability map or mask", problems))
    for prob, mask in pairs:
      self._counter.add(prob, mask)
      values = pixels.bits(prob)
      self.positives.append(np.sort(values[mask.ravel()]))
      self.negatives.append(pixels.summarise(np.sort(values[~mask.ravel()])))

  def update_counts(self, counts, positives, negatives):
    """Adds images from their `Counts` and lists with one entry per image."""
    self._counter.add_counts(counts)
    self.positives += positives
    self.negatives += negatives

  def merge(self, other):
    """Appends the images of an accumulator with the same options."""
    if self.options != other.options:
      raise ValueError(
        f"Cannot merge metrics of different options:\n  {self.options}\n  {other.options}"
      )
    if len(other):
      self.update_counts(other.counts(), other.positives, other.negatives)

  def select(self, places):
    """Returns an accumulator of the images at `places`, counted in the order they were added."""
    counts, out = self.counts(), Accumulator(**vars(self.options))
    out.update_counts(
      Counts(**{name: values[places] for name, values in vars(counts).items()}),
      [self.positives[i] for i in places],
      [self.negatives[i] for i in places],
    )
    return out

  def counts(self):
    """Returns the `Counts` of the images so far, in the order they were added."""
    return self._counter.counts()

  def result(self):
    """Returns the `Score` of the images so far."""
    counts = self.counts()
    edges = pixels.edges_of(np.concatenate(self.positives))
    low, high = (pixels.counts_of(edges[-1], self.negatives, end) for end in ("low", "high"))
    return _score(counts, edges, low, high, self.options)


def detections(prob, mask, options):
  """Matches the targets and the predictions of one image at prob > 0.5.

  Args:
    prob: H×W float32 in [0, 1].
    mask: H×W bool.
    options: `Options`.

  Returns:
    (targets, found, claimed): `components.Components` of the mask and of the map, and the index
    into `found` that each target claims, −1 if the target is missed.
  """
  parts = []
  for value in (prob > HALF, mask):
    index = np.flatnonzero(value)
    ones = np.ones(len(index), np.int16)
    parts += components.find([index], [ones], [mask.shape], 1, options.connectivity)
  found, targets = parts
  return targets, found, components.match(targets, found, options.max_distance, options.matching)


class Counter:
  """Collects active pixels, labels those of many images together, and returns their `Counts`."""

  def __init__(self, options):
    self.options = options
    self.grid = options.grid
    self.half = options.of_grid()[1]
    self._done = []
    self._images = []
    self._pending = 0

  def add(self, prob, mask):
    index = components.active_pixels(prob, self.grid[0])
    level = np.searchsorted(self.grid, prob.ravel()[index]).astype(np.int16)
    targets = np.flatnonzero(mask)
    predicted = index[level > self.half]
    self._images.append(
      (prob.shape, index, level, targets, len(predicted), int(mask.ravel()[predicted].sum()))
    )
    self._pending += len(index) + len(targets)
    if self._pending > _PENDING:
      self._flush()

  def add_counts(self, counts):
    self._flush()
    self._done.append(counts)

  def counts(self):
    self._flush()
    if not self._done:
      raise ValueError("No image was added to the metric; call update(prob, mask) first.")
    if len(self._done) > 1:
      names = [f.name for f in dataclasses.fields(Counts)]
      self._done = [
        Counts(**{n: np.concatenate([getattr(c, n) for c in self._done]) for n in names})
      ]
    return self._done[0]

  def _flush(self):
    if not self._images:
      return
    sizes, index, level, target_index, predicted, intersection = zip(*self._images, strict=True)
    self._images, self._pending = [], 0
    number, grid, options = len(sizes), len(self.grid), self.options
    ones = [np.ones(len(t), np.int16) for t in target_index]
    targets = components.find(target_index, ones, sizes, 1, options.connectivity)[0]
    found = components.find(index, level, sizes, grid, options.connectivity)
    per_image = lambda image, **w: np.bincount(image, minlength=number, **w).astype(np.int64)  # noqa: E731
    hits, predictions = np.zeros((2, number, grid), np.int64)
    for k, maps in enumerate(found):
      claimed = components.match(targets, maps, options.max_distance, options.matching)
      hits[:, k] = per_image(targets.image[claimed >= 0])
      predictions[:, k] = per_image(maps.image)
      if k == self.half:
        free = np.ones(len(maps), bool)
        free[claimed[claimed >= 0]] = False
        kind = np.stack([maps.image, maps.area], axis=1)
        unlike = free & ~_rows_in(kind, kind[~free])
        false = [per_image(maps.image[m], weights=maps.area[m]) for m in (free, unlike)]
    self._done.append(
      Counts(
        pixels=np.array([h * w for h, w in sizes], np.int64),
        target_pixels=np.array([len(t) for t in target_index], np.int64),
        predicted_pixels=np.array(predicted, np.int64),
        intersection=np.array(intersection, np.int64),
        targets=per_image(targets.image),
        predicted=predictions,
        hits=hits,
        false_alarm_pixels=false[0],
        false_alarm_pixels_by_area=false[1],
      )
    )


def _rows_in(rows, others):
  """Returns a boolean for each of `rows` (n×2 non-negative integers): is it among `others`?"""
  width = int(rows.max(initial=0)) + 1
  return np.isin(rows @ [width, 1], others @ [width, 1])


def target_curve(hits, predicted, targets, options):
  """Computes the target-level precision-recall points, sorted by recall, and the area below them.

  Args:
    hits, predicted: counts at the thresholds; may have leading axes (resamples).
    targets: numbers of true targets, of the leading shape.
    options: `Options`.

  Returns:
    (recall, precision, area): points with the extension to recall 0, ties with the higher precision
    first; NaN without targets.
  """
  precision = np.asarray(pixels.precision_at(hits, predicted - hits))
  order = np.lexsort((-precision, hits), axis=-1)
  precision = np.take_along_axis(precision, order, axis=-1)
  with np.errstate(invalid="ignore", divide="ignore"):
    recall = np.take_along_axis(np.asarray(hits), order, axis=-1) / np.asarray(targets)[..., None]
  if options.extend:
    recall = np.concatenate([np.zeros_like(recall[..., :1]) + 0 * recall[..., :1], recall], axis=-1)
    precision = np.concatenate([precision[..., :1], precision], axis=-1)
  height = precision[..., 1:]
  if options.area == "trapezoid":
    height = (height + precision[..., :-1]) / 2
  return recall, precision, (np.diff(recall, axis=-1) * height).sum(-1)


MERGED = 0.9  # of the most targets that any threshold finds


def merging(hits):
  """Marks thresholds that find fewer targets than a higher one does.

  A lower threshold keeps every pixel, but predictions merge with each other or with the background,
  so that their centroids leave the targets.

  Args:
    hits: numbers of found targets at ascending thresholds.

  Returns:
    Bools: below the threshold that finds most, and fewer than `MERGED` of its number.
  """
  hits = np.asarray(hits)
  most = int(hits.argmax())
  return (np.arange(len(hits)) < most) & (hits < MERGED * hits[most])


def warning_of_merging(score):
  """Says which thresholds merge targets, in one sentence; "" if none does."""
  order = np.argsort(score.curves["threshold"])
  thresholds = score.curves["threshold"][order]
  hits = score.curves["threshold_hits"][order]
  merged = merging(hits)
  if not merged.any():
    return ""
  best = int(hits.argmax())
  listed = ", ".join(f"{t:.2g}" for t in thresholds[merged])
  return (
    f"at prob > {listed} predictions merge with each other or with the background: down to "
    f"{hits[merged].min()} of {score.targets} targets are found, and {hits[best]} at "
    f"{thresholds[best]:.2g}. These points lower HSE-T (docs/metric.md)."
  )


def image_iou(counts, options):
  """Computes the IoU of each image at prob > 0.5; NaN if `empty_niou` leaves the image out."""
  union = counts.target_pixels + counts.predicted_pixels - counts.intersection
  empty = math.nan if options.empty_niou is None else options.empty_niou
  return np.where(union > 0, counts.intersection / np.maximum(union, 1), empty)


def _ratio(a, b, otherwise):
  return np.where(b > 0, a / np.maximum(b, 1), otherwise)


def rates(total, options):
  """Computes the threshold metrics of summed `Counts`; arrays may have leading axes (resamples)."""
  half = options.of_grid()[1]
  true, targets = total["intersection"], total["target_pixels"]
  positive = total["predicted_pixels"]
  by_area = options.false_alarm == "area"
  recall = _ratio(true, targets, math.nan)
  return {
    # As in the reference code: a set with neither targets nor predictions has IoU 0.
    "iou": _ratio(true, targets + positive - true, 0.0),
    "pd": _ratio(total["hits"][..., half], total["targets"], math.nan),
    "fa": total["false_alarm_pixels_by_area" if by_area else "false_alarm_pixels"]
    / total["pixels"],
    "precision": _ratio(true, positive, 0.0),
    "recall": recall,
    "f1": _ratio(2 * true, targets + positive, math.nan) + 0 * recall,
  }


def _score(counts, edges, false_low, false_high, options):
  """Computes the `Score` from counts and the bounds of how many negatives reach each edge."""
  values, number, _ = edges
  total = {f.name: getattr(counts, f.name).sum(0) for f in dataclasses.fields(Counts)}
  negatives = total["pixels"] - total["target_pixels"]
  curve = lambda false: pixels.areas(number, *pixels.split(false), negatives)  # noqa: E731
  middle = (false_low + false_high) / 2
  hse_p, ap, roc_auc = (float(a) for a in curve(middle))
  at, half = options.of_grid()
  recall, precision, hse_t = target_curve(
    total["hits"][at], total["predicted"][at], total["targets"], options
  )
  hse_t = float(hse_t)
  if not total["targets"]:
    warnings.warn(
      f"No mask of {columns.counted(len(counts), 'image')} has a target: HSE, HSE-P, HSE-T, Pd are "
      "undefined (NaN).",
      RuntimeWarning,
      stacklevel=3,
    )
  iou = image_iou(counts, options)
  kept = iou[~np.isnan(iou)]
  true, false = np.cumsum(number), pixels.split(middle)[0]
  return Score(
    hse=hse_p * hse_t,
    hse_p=hse_p,
    hse_t=hse_t,
    niou=math.fsum(kept) / len(kept) if len(kept) else math.nan,  # the same in any order
    roc_auc=roc_auc,
    ap=ap,
    **{k: float(v) for k, v in rates(total, options).items()},
    images=len(counts),
    pixels=int(total["pixels"]),
    target_pixels=int(total["target_pixels"]),
    targets=int(total["targets"]),
    hits=int(total["hits"][half]),
    false_alarms=int(total["predicted"][half] - total["hits"][half]),
    hse_p_error=float(max(curve(false_low)[0] - hse_p, hse_p - curve(false_high)[0])),
    curves={
      "pixel_score": values.astype(np.uint32).view(np.float32),
      "pixel_true": true,
      "pixel_false": false,
      "pixel_negatives": negatives,
      "target_recall": recall,
      "target_precision": precision,
      "threshold": np.asarray(options.thresholds, np.float32),
      "threshold_hits": total["hits"][at],
      "threshold_predicted": total["predicted"][at],
    },
  )


def images(maps):
  """Splits maps or masks into a list of numpy arrays, one an image.

  Args:
    maps: an array H×W, B×H×W, B×1×H×W, B×H×W×1 or H×W×1, or an iterable of these.
  """
  if not hasattr(maps, "shape"):
    parts = [_images(to_numpy(part)) for part in maps]
    return [image for part in parts for image in part]
  return _images(to_numpy(maps))


def _images(array):
  if not array.size:
    return [array]  # `check` names the shape
  if array.ndim == 4 and array.shape[1] == 1:
    return list(array[:, 0])
  if array.ndim == 4 and array.shape[3] == 1:
    return list(array[..., 0])
  if array.ndim == 3 and array.shape[2] == 1 < array.shape[0]:
    return [array[..., 0]]  # H×W×1, since no image is one pixel wide
  return list(array) if array.ndim == 3 else [array]


def to_numpy(array):
  """Copies a numpy, jax or torch array, or a nested list, to numpy; bfloat16 becomes float32.

  Neither jax nor torch is imported.
  """
  if hasattr(array, "detach"):  # torch
    array = array.detach().cpu()
    array = (array.float() if array.is_floating_point() else array).numpy()
  array = np.asarray(array)
  # The 8- and 16-bit floats that jax adds to numpy are of no kind that numpy knows.
  small = array.dtype.kind == "V" and "float" in array.dtype.name
  return array.astype(np.float32) if small else array


ROUNDING = 1e-5  # values this far outside [0, 1] come from rounding and are cut


def check(prob, mask):
  """Returns (prob as float32, mask, problems) of one image, H×W numpy arrays."""
  prob, mask, problems = np.asarray(prob), np.asarray(mask), []
  if mask.dtype != bool:
    cut = 127 if mask.size and mask.dtype.kind in "uif" and mask.max() > 1 else 0.5
    problems.append(
      f"the mask is {mask.dtype}, but must be bool; binarise it first (mask > {cut}, by its values)"
    )
  if prob.dtype.kind != "f":
    way = {"bool": "give the probabilities that were thresholded", "uint8": "divide it by 255"}
    default = "divide it by the value that means 1, the same for all maps"
    problems.append(
      f"the map is {prob.dtype}, but must be floats in [0, 1]; {way.get(prob.dtype.name, default)}"
    )
  if prob.ndim != 2 or prob.shape != mask.shape or not prob.size:
    problems.append(
      f"the map is {_shape(prob)} and the mask {_shape(mask)}; both must be the same H×W, not empty"
    )
  if problems:
    return prob, mask, problems
  prob = np.ascontiguousarray(prob, np.float32)
  # One comparison is enough if all is well: NaN, infinities, negative numbers and −0.0 are larger.
  if prob.view(np.uint32).max() > 0x3F800000:
    prob = prob + np.float32(0)
    if not np.isfinite(prob).all():
      number = int(np.sum(~np.isfinite(prob)))
      problems.append(f"the map has {columns.counted(number, 'value')} NaN or infinite")
    elif prob.min() >= -ROUNDING and prob.max() <= 1 + ROUNDING:
      prob = np.clip(prob, 0, 1)
    else:
      advice = "apply the sigmoid to logits"
      if prob.min() >= 0 and 2 < prob.max() <= 255:
        advice = f"divide grey levels by 255, {advice}"
      problems.append(
        f"the map's values are in [{prob.min():.9g}, {prob.max():.9g}], but must be in [0, 1]; "
        f"{advice}"
      )
  return prob, np.ascontiguousarray(mask), problems


def _shape(array):
  return "×".join(map(str, array.shape)) or "a single number"
