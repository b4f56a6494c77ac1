"""Computes the counts of `hse` on GPUs and TPUs, in one jitted function of static shape.

The input is a map on a canvas, the output counts of fixed size, without a transfer to the host;
`vmap` runs over images. Only the pixels above the lowest threshold are labelled, in a static number
of slots. An image is flagged if it needs more slots, or if float32 and int32 cannot decide a match
for certain. `add` counts flagged images on the CPU: slower, with the same numbers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fdep_jax.metrics import hse, pixels

_ONE = 0x3F800000  # the bits of 1.0


@dataclasses.dataclass(frozen=True)
class Budget:
  """Static sizes of one image; images that exceed them are counted on the CPU."""

  active: int = 2048  # pixels above the lowest threshold
  components: int = 256  # at any threshold
  target_pixels: int = 2048
  targets: int = 64


def add(total, probs, masks, sizes, budget=None, keep=slice(None)):
  """Counts a batch on the device and adds it to an accumulator, image by image in order.

  Args:
    total: an `hse.Accumulator` with matching="first".
    probs: B×H×W float32 in [0, 1] on a canvas; values beyond an image's size are ignored.
    masks: B×H×W bool.
    sizes: B×2 int32, height and width of each image.
    budget: a `Budget`.
    keep: slice of the images to add; the others only fill the batch.

  Returns:
    The number of images that were counted on the CPU.
  """
  options = total.options
  if options.matching != "first":
    raise ValueError(
      f"matching is {options.matching!r}; the jitted counts know only 'first'. "
      "Use Accumulator.update for the other rules."
    )
  found = jax.device_get(
    count_batch(
      probs,
      masks,
      jnp.asarray(sizes, jnp.int32),
      jnp.asarray(options.grid.view(np.int32)),
      half=options.of_grid()[1],
      max_distance=float(options.max_distance),
      connectivity=options.connectivity,
      budget=budget or Budget(),
    )
  )
  slower = 0
  for i in range(len(found["flagged"]))[keep]:
    if found["flagged"][i]:
      slower += 1
      height, width = (int(n) for n in np.asarray(sizes)[i])
      prob, mask = np.asarray(probs[i]), np.asarray(masks[i])
      total.update(prob[:height, :width], mask[:height, :width])
      continue
    counts = {f.name: found[f.name][i : i + 1] for f in dataclasses.fields(hse.Counts)}
    positives = found["positives"][i][: counts["target_pixels"][0]].view(np.uint32)[::-1]
    filled = found["negative_count"][i] > 0
    high, low, number = (
      found[f"negative_{name}"][i][filled].view(np.uint32) for name in ("high", "low", "count")
    )
    total.update_counts(
      hse.Counts(**{k: v.astype(np.int64) for k, v in counts.items()}),
      [positives],
      [pixels.Summary(high, low, number)],
    )
  return slower


class Counter:
  """Adds images of mixed sizes to an accumulator, in their order.

  All are counted on one canvas, `ROWS` at once, so that one compiled program serves them.

  Args:
    total: an `hse.Accumulator`, as for `add`.
    canvas: (height, width) that every image fits into, pixels.
    budget: a `Budget`.
  """

  ROWS = 8

  def __init__(self, total, canvas, budget=None):
    self.total, self.slower = total, 0  # images that were counted on the CPU
    self._canvas, self._budget, self._waiting = canvas, budget, []

  def update(self, prob, mask):
    """Adds one image, H×W float32 in [0, 1] and H×W bool; it counts after the next `flush`."""
    self._waiting.append((prob, mask))
    if len(self._waiting) == self.ROWS:
      self.flush()

  def flush(self):
    """Counts the images that wait for more."""
    if not self._waiting:
      return
    probs = np.zeros((self.ROWS, *self._canvas), np.float32)
    masks, sizes = np.zeros(probs.shape, bool), np.ones((self.ROWS, 2), np.int32)
    for i, (prob, mask) in enumerate(self._waiting):
      sizes[i] = mask.shape
      probs[i, : sizes[i, 0], : sizes[i, 1]] = prob
      masks[i, : sizes[i, 0], : sizes[i, 1]] = mask
    keep, self._waiting = slice(len(self._waiting)), []
    self.slower += add(self.total, probs, masks, sizes, self._budget, keep)


@functools.partial(jax.jit, static_argnames=("half", "max_distance", "connectivity", "budget"))
def count_batch(probs, masks, sizes, grid, *, half, max_distance, connectivity, budget):
  """Applies `count` to B images: probs and masks B×H×W, sizes B×2."""
  one = functools.partial(
    count, half=half, max_distance=max_distance, connectivity=connectivity, budget=budget
  )
  return jax.vmap(one, in_axes=(0, 0, 0, None))(probs, masks, sizes, grid)


def count(prob, mask, size, grid, *, half, max_distance, connectivity=8, budget=None):
  """Counts one image; the results have fixed sizes.

  Args:
    prob: H×W float32 in [0, 1].
    mask: H×W bool.
    size: (height, width) of the image in the canvas's upper left corner.
    grid: T int32, the bits of the ascending float32 thresholds.
    half: index of 0.5 in `grid`.
    max_distance: pixels, exclusive.
    connectivity: 8 or 4.
    budget: a `Budget`.

  Returns:
    A dict: the fields of `hse.Counts` (int32), `positives` (bits, descending, padded),
    `negative_high`, `negative_low`, `negative_count` (a `pixels.Summary`, padded), and `flagged`:
    if true, nothing of it may be used, and the image must be counted on the CPU.
  """
  budget = budget or Budget()
  height, width = prob.shape
  if max(height, width) * max(budget.active, budget.target_pixels) >= 2**31:
    raise ValueError(f"The canvas {height}×{width} with {budget} overflows int32; tile the map.")
  inside = (jnp.arange(height) < size[0])[:, None] & (jnp.arange(width) < size[1])[None, :]
  # The bits have the order of the scores, and no device flushes or rounds them.
  bits = jax.lax.bitcast_convert_type(prob.astype(jnp.float32), jnp.int32)
  bits = jnp.where(bits == jnp.int32(-(2**31)), 0, bits)  # −0.0
  invalid = (inside & ((bits < 0) | (bits > _ONE))).any()
  bits = jnp.where(inside, bits, 0)
  mask = mask & inside

  active, score, row, col, links = _slots(bits > grid[0], bits, budget.active, connectivity)
  above = score[None, :] > grid[:, None]  # T×A
  label = jax.vmap(functools.partial(_label, links))(above)
  found = jax.vmap(functools.partial(_measure, row, col, budget.components))(label)
  target_pixels, target_score, target_row, target_col, target_links = _slots(
    mask, bits, budget.target_pixels, connectivity
  )
  target_label = _label(target_links, target_row >= 0)
  targets = _measure(target_row, target_col, budget.targets, target_label)
  hits, claimed, unsure = _match(targets, found, max_distance, max(height, width))

  area, free = found["area"][half], (found["area"][half] > 0) & ~claimed[half]
  alike = ((area[:, None] == area[None, :]) & claimed[half][None, :]).any(1)
  predicted = bits > grid[half]
  total = lambda x: x.sum(dtype=jnp.int32)  # noqa: E731
  flagged = (
    invalid
    | (active > budget.active)
    | (target_pixels > budget.target_pixels)
    | (found["number"] > budget.components).any()
    | (targets["number"] > budget.targets)
    | unsure
  )
  return {
    "pixels": (size[0] * size[1]).astype(jnp.int32),
    "target_pixels": target_pixels,
    "predicted_pixels": total(predicted),
    "intersection": total(predicted & mask),
    "targets": targets["number"],
    "predicted": found["number"],
    "hits": hits,
    "false_alarm_pixels": total(jnp.where(free, area, 0)),
    "false_alarm_pixels_by_area": total(jnp.where(free & ~alike, area, 0)),
    "positives": jnp.sort(jnp.where(target_row >= 0, target_score, -1))[::-1],
    **_summarise(jnp.where(inside & ~mask, bits, -1).ravel()),
    "flagged": flagged,
  }


def _slots(chosen, bits, number, connectivity):
  """Puts the chosen pixels of an image, in raster order, in a static number of slots.

  Returns:
    (number of pixels, score bits, row, col, links): row is −1 in an empty slot; links, slots×8
    (or 4), has the slot of each neighbour, or `number` for none.
  """
  height, width = chosen.shape
  index = jnp.nonzero(chosen.ravel(), size=number, fill_value=height * width)[0].astype(jnp.int32)
  used = index < height * width
  row, col = index // width, index % width
  # Slot numbers on the canvas, with a border of one pixel so that neighbours are plain offsets.
  pitch = width + 2
  place = jnp.where(used, (row + 1) * pitch + col + 1, (height + 2) * pitch)
  canvas = jnp.full((height + 2) * pitch + 1, number, jnp.int32)
  canvas = canvas.at[place].set(jnp.arange(number, dtype=jnp.int32), mode="drop")
  canvas = canvas.at[-1].set(number)
  steps = (-pitch, -1, 1, pitch)
  if connectivity == 8:
    steps = (-pitch - 1, -pitch, -pitch + 1, -1, 1, pitch - 1, pitch, pitch + 1)
  steps = jnp.array(steps)
  links = canvas[jnp.where(used[:, None], place[:, None] + steps[None, :], place[:, None])]
  score = bits.ravel().at[index].get(mode="fill", fill_value=-1)
  row, col = jnp.where(used, row, -1), jnp.where(used, col, -1)
  return chosen.sum(dtype=jnp.int32), score, row, col, links


def _label(links, above):
  """Returns the first slot of each slot's component, A int32; A for a slot below the threshold.

  Hooking and pointer jumping: every slot offers its neighbours' least label to its root, then
  takes its root's label. A component of n slots settles in about log n rounds.
  """
  number = len(above)

  def step(state):
    label, _ = state
    padded = jnp.append(label, number)  # entry A stands for no neighbour and for inactive slots
    least = jnp.where(above, jnp.minimum(label, padded[links].min(1)), number)
    hooked = padded.at[label].min(least).at[:number].min(least)
    hooked = hooked[hooked]
    new = hooked[hooked][:number]
    return new, (new != label).any()

  start = jnp.where(above, jnp.arange(number, dtype=jnp.int32), number)
  return jax.lax.while_loop(lambda state: state[1], step, (start, above.any()))[0]


def _measure(row, col, number, label):
  """Computes number, areas and coordinate sums of components, in raster order of first pixels."""
  slots = len(label)
  root = label == jnp.arange(slots, dtype=jnp.int32)
  rank = jnp.concatenate([jnp.cumsum(root, dtype=jnp.int32) - 1, jnp.full(1, number, jnp.int32)])
  component = rank[label]  # `number` or more is dropped
  add_up = lambda x: jnp.zeros(number, jnp.int32).at[component].add(x, mode="drop")  # noqa: E731
  return {
    "number": root.sum(dtype=jnp.int32),
    "area": add_up(jnp.ones_like(label)),
    "rows": add_up(row),
    "cols": add_up(col),
  }


def _match(targets, found, max_distance, extent):
  """Lets each target, in raster order, claim the first free component near it, at each threshold.

  Returns:
    (hits per threshold, claimed T×C, unsure): unsure if a distance is too near `max_distance` to
    decide.
  """
  center = lambda c, axis: c[axis] / jnp.maximum(c["area"], 1)  # noqa: E731
  found_row, found_col = center(found, "rows"), center(found, "cols")
  target_row, target_col = center(targets, "rows"), center(targets, "cols")
  # More than the worst float32 error of a difference of two centroids (sum, quotient, difference),
  # and its effect on the squared distance.
  error = 8 * extent * 2.0**-23
  margin = 4 * max_distance * error + error**2
  limit = max_distance * max_distance
  whole = float(limit).is_integer() and limit < 2**15
  largest = int((2**31 / (limit + 2 * margin)) ** 0.5) - 1 if whole else 0

  def power_of_two(x):
    return (x & (x - 1)) == 0

  def near(g):
    area = targets["area"][g]
    exists = (area > 0) & (found["area"] > 0)
    gap = (found_row - target_row[g]) ** 2 + (found_col - target_col[g]) ** 2
    close = gap < limit - margin
    doubtful = exists & ~close & (gap <= limit + margin)
    # In doubt, compare in integers, multiplied by both areas. int32 wraps around, but the result of
    # a doubtful pair is small. Exactly at the limit the CPU's float64 decides by its rounding,
    # except that powers of two divide without any; such a pair is not nearer.
    product = found["area"] * area
    small = (found["area"] <= largest // jnp.maximum(area, 1)) & doubtful
    rows = found["rows"] * area - targets["rows"][g] * found["area"]
    cols = found["cols"] * area - targets["cols"][g] * found["area"]
    square, bound = rows * rows + cols * cols, int(limit) * product * product
    settled = small & ((square != bound) | (power_of_two(area) & power_of_two(found["area"])))
    return exists & (close | (settled & (square < bound))), (doubtful & ~settled).any()

  def claim(g, state):
    hits, claimed, unsure = state
    can, doubt = near(g)
    can = can & ~claimed
    first = can & (jnp.cumsum(can, axis=1) == 1)
    return hits + first.any(1), claimed | first, unsure | doubt

  start = (
    jnp.zeros(found["area"].shape[0], jnp.int32),
    jnp.zeros(found["area"].shape, bool),
    jnp.zeros((), bool),
  )
  last = jnp.minimum(targets["number"], targets["area"].shape[0])
  return jax.lax.fori_loop(0, last, claim, start)


def _summarise(bits):
  """Applies `pixels.summarise` to the bits that are not −1; pads the result to its static size."""
  size = 2 * pixels.EXACT
  number = len(bits)
  scores = jnp.sort(bits)[::-1]
  total = (scores >= 0).sum(dtype=jnp.int32)
  new = jnp.concatenate([jnp.ones(1, bool), scores[1:] != scores[:-1]]) & (scores >= 0)
  runs = jnp.nonzero(new, size=size, fill_value=number)[0].astype(jnp.int32)
  groups = np.full(size, number, np.int32)
  starts = pixels.group_starts(number)
  groups[: len(starts)] = starts
  first = jnp.where(new.sum(dtype=jnp.int32) <= size, runs, jnp.asarray(groups))
  first = jnp.minimum(first, total)
  after = jnp.concatenate([first[1:], total[None]])
  at = lambda i: scores[jnp.clip(i, 0, number - 1)]  # noqa: E731
  return {
    "negative_high": at(first),
    "negative_low": at(after - 1),
    "negative_count": after - first,
  }
