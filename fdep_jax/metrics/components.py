"""Finds connected components of thresholded maps and matches them with targets (paper §3.4).

Targets are sparse and thresholds nested. So only the pixels above the lowest threshold are looked
at: their neighbour pairs are found once, and each threshold keeps the pairs whose weaker end
exceeds it. Maps that are mostly active (an untrained network's) are labelled densely instead, with
the same result.
"""

import dataclasses

import numpy as np

DENSE = 1 / 4  # maps with a larger active fraction are labelled densely, which needs less memory


@dataclasses.dataclass(frozen=True)
class Components:
  """Components at one threshold, sorted by image, then in raster order of their first pixel."""

  image: np.ndarray  # int64
  area: np.ndarray  # pixels
  row: np.ndarray  # centroid, pixels, float64: the mean as skimage's regionprops gives it
  col: np.ndarray

  def __len__(self):
    return len(self.image)


def active_pixels(value, floor):
  """Returns the flat indices of the pixels of one map above `floor`, in raster order."""
  return np.flatnonzero(value.ravel() > floor)


def find(indices, levels, sizes, num_levels, connectivity=8):
  """Finds the components of every image at every threshold.

  Args:
    indices: per image, flat indices of its active pixels, ascending.
    levels: per image, how many of the thresholds each of these pixels exceeds (≥ 1).
    sizes: per image, (height, width).
    num_levels: number of thresholds.
    connectivity: 8 or 4.

  Returns:
    A list of `Components`, one per threshold, ascending.
  """
  dense = np.array(
    [len(i) > max(DENSE * h * w, 256) for i, (h, w) in zip(indices, sizes, strict=True)]
  )
  parts = [[] for _ in range(num_levels)]
  sparse = np.flatnonzero(~dense) if len(sizes) else np.array([], int)
  if len(sparse):
    pick = lambda what: [what[i] for i in sparse]  # noqa: E731
    found = _find_sparse(pick(indices), pick(levels), pick(sizes), num_levels, connectivity)
    for k, components in enumerate(found):
      parts[k].append(dataclasses.replace(components, image=sparse[components.image]))
  for i in np.flatnonzero(dense):
    for k, components in enumerate(
      _find_dense(indices[i], levels[i], sizes[i], num_levels, connectivity)
    ):
      parts[k].append(dataclasses.replace(components, image=components.image + i))
  return [_concatenate(part) for part in parts]


def _concatenate(parts):
  fields = [f.name for f in dataclasses.fields(Components)]
  joined = {f: np.concatenate([getattr(p, f) for p in parts] or [np.zeros(0)]) for f in fields}
  order = np.argsort(joined["image"], kind="stable")
  return Components(**{f: values[order] for f, values in joined.items()})


def _find_sparse(indices, levels, sizes, num_levels, connectivity):
  from scipy.sparse import coo_array
  from scipy.sparse.csgraph import connected_components

  number = [len(i) for i in indices]
  image = np.repeat(np.arange(len(indices)), number)
  height, width = np.array(sizes, np.int64).T
  index, level = np.concatenate(indices).astype(np.int64), np.concatenate(levels)
  row, col = np.divmod(index, width[image])
  # A number for each pixel of all images. A gap of one column and two rows keeps the ends of rows,
  # and different images, from touching.
  pitch = (width + 1)[image]
  base = np.concatenate([[0], np.cumsum((height + 2) * (width + 1))[:-1]])[image]
  key = base + row * pitch + col

  edges = [np.flatnonzero(np.diff(key) == 1)]
  ends = [edges[0] + 1]
  below = np.searchsorted(
    key, key + pitch - 1
  )  # the first pixel at or after the lower left neighbour
  padded = np.append(key, -1)
  for offset in (-1, 0, 1):
    hit = padded[np.minimum(below, len(key))] == key + pitch + offset
    if connectivity == 8 or offset == 0:
      edges.append(np.flatnonzero(hit))
      ends.append(below[hit])
    below = below + hit
  start, end = np.concatenate(edges), np.concatenate(ends)
  weight = np.minimum(level[start], level[end])

  # From the highest threshold down, components only grow and join. So the nodes of each step are
  # the components of the previous step and the new pixels; its edges are the new pairs.
  out = []
  node = np.zeros(len(key), np.int64)  # of each pixel that is active so far
  first = area = rows = cols = np.zeros(0, np.int64)  # of each component; first: its first pixel
  for k in reversed(range(num_levels)):
    new, joined = np.flatnonzero(level == k + 1), weight == k + 1
    number = len(first) + len(new)
    node[new] = np.arange(len(first), number)
    first, area = np.append(first, new), np.append(area, np.ones(len(new), np.int64))
    rows, cols = np.append(rows, row[new]), np.append(cols, col[new])
    if joined.any():
      ends = (node[start[joined]], node[end[joined]])
      graph = coo_array((np.ones(len(ends[0]), bool), ends), (number, number))
      label = connected_components(graph, directed=False)[1]
      earliest = np.argsort(first)[::-1]
      area, rows, cols = (
        np.bincount(label, weights=x).astype(np.int64) for x in (area, rows, cols)
      )
      head = np.empty(len(area), np.int64)
      head[label[earliest]] = first[earliest]  # the last write wins: the first pixel
      first = head
      active = level > k
      node[active] = label[node[active]]
    out.append(_in_raster_order(image[first], first, area, rows, cols))
  return out[::-1]


def _in_raster_order(image, first, area, rows, cols):
  order = np.argsort(first)
  image, area, rows, cols = image[order], area[order], rows[order], cols[order]
  return Components(image.astype(np.int64), area, rows / area, cols / area)


def _find_dense(index, level, size, num_levels, connectivity):
  from scipy import ndimage

  dense = np.zeros(size, np.int64)
  dense.ravel()[index] = level
  structure = np.ones((3, 3)) if connectivity == 8 else None
  row, col = np.divmod(index, size[1])
  out = []
  for k in range(num_levels):
    keep = level > k
    index, level, row, col = index[keep], level[keep], row[keep], col[keep]
    label = ndimage.label(dense > k, structure)[0].ravel()[index] - 1
    number = int(label.max(initial=-1)) + 1
    first = np.empty(number, np.int64)
    first[label[::-1]] = np.arange(len(label))[::-1]  # the last write wins: the first pixel
    area, rows, cols = (np.bincount(label, w, number) for w in (None, row, col))
    out.append(_in_raster_order(np.zeros(number), first, area, rows, cols))
  return out


def near(targets, found, max_distance):
  """Finds pairs (target, component) of one image with centroids nearer than `max_distance` pixels.

  Returns:
    (target, component, distance): arrays over pairs, sorted by target, then by component.
  """
  # Sort the components by image and row; each target then sees one window of them.
  order = np.lexsort((found.row, found.image))
  top = 2 * max_distance + 2 + max((x.max() for x in (found.row, targets.row) if len(x)), default=0)
  height = found.image[order] * top + found.row[order]
  centre = targets.image * top + targets.row
  # The window is one pixel wider than needed, so that rounding in `height` drops no pair.
  low = np.searchsorted(height, centre - max_distance - 1)
  number = np.searchsorted(height, centre + max_distance + 1, side="right") - low
  target = np.repeat(np.arange(len(targets)), number)
  component = order[np.arange(number.sum()) + np.repeat(low - (number.cumsum() - number), number)]
  rows = found.row[component] - targets.row[target]
  cols = found.col[component] - targets.col[target]
  distance = np.sqrt(rows * rows + cols * cols)
  keep = (distance < max_distance) & (found.image[component] == targets.image[target])
  target, component, distance = target[keep], component[keep], distance[keep]
  order = np.lexsort((component, target))
  return target[order], component[order], distance[order]


def match(targets, found, max_distance=3.0, rule="first"):
  """Returns the index of the component that each target claims, −1 for none.

  Args:
    targets: true `Components`.
    found: predicted `Components` of the same images.
    max_distance: pixels between centroids, exclusive.
    rule: "first": each target, in raster order, claims the first unclaimed component in raster
      order (PAL's and DNANet's rule). "nearest": the nearest unclaimed one. "optimal": as many
      pairs as possible, and of these the least sum of distances.
  """
  target, component, distance = near(targets, found, max_distance)
  claimed = np.full(len(targets), -1)
  if rule == "optimal":
    return _match_optimal(claimed, target, component, distance)
  if rule == "nearest":
    order = np.lexsort((component, distance, target))
    target, component = target[order], component[order]
  taken = set()
  for t, c in zip(target.tolist(), component.tolist(), strict=True):
    if claimed[t] < 0 and c not in taken:
      claimed[t] = c
      taken.add(c)
  return claimed


def _match_optimal(claimed, target, component, distance):
  from scipy.optimize import linear_sum_assignment

  if not len(target):
    return claimed
  targets, row = np.unique(target, return_inverse=True)
  components, col = np.unique(component, return_inverse=True)
  # The constant makes one more pair outweigh any sum of distances.
  cost = np.zeros((len(targets), len(components)))
  cost[row, col] = distance - (distance.sum() + 1)
  chosen = linear_sum_assignment(cost)
  for r, c in zip(*chosen, strict=True):
    if cost[r, c] < 0:
      claimed[targets[r]] = components[c]
  return claimed
