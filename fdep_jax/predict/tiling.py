"""Computes probability maps of frames of any size, large ones by overlapping windows."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from fdep_jax import forward
from fdep_jax.data import frames, padded_size
from fdep_jax.detector import Detector
from fdep_jax.evaluate import PAD
from fdep_jax.layers import windows

# Pixels, multiples of PAD, so every stride divides them. Frames of more than WINDOW² pixels are cut
# into windows of this side. A window overlaps its neighbours by at least HALO beyond its own part.
WINDOW = 768
HALO = 128
SEAM = 32  # width over which neighbouring windows are blended
# Frames up to the area of this side are computed whole by networks that need that. In the main
# branch DINOv2 attends to all pairs of 14×14 patches: 2 GB for each layer at its limit (ViT-L).
WHOLE = {"light": 2048, "main": 1024}
_SETTLED = 1e-6  # change of the frame's statistics between passes, relative to the largest
_PENDING = 2**24  # most pixels of small frames that wait for more of their shape


def levels_of(frame: np.ndarray, values: frames.Range | None, trained: frames.Range) -> np.ndarray:
  """Returns the grey levels of a frame, as `frames.grey_levels`.

  Args:
    frame: H×W or H×W×3.
    values: range that the caller names, or None.
    trained: range of the training, which is taken otherwise; "": 8 bits.

  Raises:
    FrameError: the frame has 8 bits, and the range is that of the training.
  """
  if frame.dtype == np.uint8 and trained and not values:
    raise frames.FrameError(
      "has 8 bits per channel, but the network was trained on more, with the range "
      f"{frames.show_range(trained)}. Give the sensor's counts, or name a range: --range=auto "
      "takes 8 bits as they are"
    )
  return frames.grey_levels(frame, values or trained or "auto")


class Predictor:
  """Computes probability maps of frames of any size with one branch of a trained run."""

  def __init__(self, detector: Detector):
    self._whole, self._part, self._shapes = _forwards(detector)
    network = getattr(detector.model, "backbone", None)
    self._range = detector.range
    self._fill = 255 * np.asarray(detector.fill, np.float32)
    self._why_whole = network.whole_frame if network else ""
    # Of sizes that the network was not trained for, each told once. The crop of a published
    # network's training is not known.
    self._caution, self._told = lambda size: "", set()
    if network and detector.config is not None and detector.step is not None:
      self._caution = lambda size: network.caution(size, detector.config.data.crop)
    if self._why_whole:
      self._network = network.paper_name
      self._largest = min(WHOLE[detector.branch] ** 2, network.max_pixels or math.inf)

  def __call__(self, frame: np.ndarray, values: frames.Range | None = None) -> np.ndarray:
    """Returns H×W float32 probabilities of an H×W or H×W×3 array.

    Args:
      frame: of any integer or float type.
      values: as for `frames.grey_levels`; default the range of the training, else "auto".

    Raises:
      FrameError: the frame has 8 bits, and the range is that of the training.
    """
    frame = frames.checked(np.asarray(frame))
    return next(self.stream([(None, levels_of(frame, values, self._range))]))[1]

  def stream(
    self, items: Iterable[tuple[object, np.ndarray]], batch_size: int = 16
  ) -> Iterator[tuple[object, np.ndarray]]:
    """Yields (key, H×W float32 probabilities) for (key, grey levels) pairs, in any order.

    Frames up to a window's area are computed whole: padded to multiples of 32 as in
    evaluation, batched by shape. Larger ones are computed by windows, see `tiled`. Networks that
    cannot be computed by windows (`Backbone.whole_frame`) compute frames up to the area of WHOLE²
    whole, one at a time.

    Raises:
      FrameError: a frame is larger than that.
    """
    waiting: dict[tuple[int, int], list] = {}
    area = WINDOW**2
    for key, levels in items:
      height, width = padded_size(levels.shape[:2], PAD)
      if height * width > area:
        if self._why_whole:
          self.check_size(levels.shape[:2])
          yield from self._batch([(key, levels)])
        else:
          yield key, self.tiled(levels)
        continue
      group = waiting.setdefault((height, width), [])
      group.append((key, levels))
      if len(group) == max(1, min(batch_size, area // (height * width))):
        yield from self._batch(waiting.pop((height, width)))
      elif sum(h * w * len(group) for (h, w), group in waiting.items()) > _PENDING:
        for shape in list(waiting):
          yield from self._batch(waiting.pop(shape))
    for group in waiting.values():
      yield from self._batch(group)

  def check_size(self, size: tuple[int, int]) -> None:
    """Refuses a frame (rows, columns) that can be computed neither whole nor by windows."""
    height, width = padded_size(size, PAD)
    if self._why_whole and height * width > self._largest:
      raise frames.FrameError(
        f"{height}×{width} pixels (padded to multiples of {PAD}) are more than the "
        f"{self._largest:,} that {self._network} computes as a whole; it cannot do so by windows: "
        f"{self._why_whole}. Cut the frame into smaller ones, or use a network without this limit "
        "(docs/deployment.md)"
      )

  def _batch(self, group: list) -> Iterator[tuple[object, np.ndarray]]:
    height, width = padded_size(group[0][1].shape[:2], PAD)
    caution = self._caution((height, width))
    if caution and caution not in self._told:
      self._told.add(caution)
      logging.warning(caution)
    # Batch sizes are powers of two, so that a smaller last batch rarely needs a compilation.
    image = np.empty((1 << (len(group) - 1).bit_length(), height, width, 3), np.float32)
    image[...] = self._fill
    for row, (_, levels) in zip(image, group, strict=False):
      row[: levels.shape[0], : levels.shape[1]] = _colour(levels)
    probs = np.asarray(self._whole(image))
    for prob, (key, levels) in zip(probs, group, strict=False):
      yield key, prob[: levels.shape[0], : levels.shape[1]]

  def tiled(self, levels: np.ndarray, window: int = WINDOW, halo: int = HALO) -> np.ndarray:
    """Computes H×W probabilities of a large frame window by window, in the memory of one window.

    Every window uses the whole frame's feature statistics and sampling points
    (`layers/windows.py`). So the result differs from the untiled one only by what a network draws
    from beyond the halo. Statistics of the frame need more passes over all windows; networks
    without them (ALCL-Net, MLCL-Net) need one. The main branch's DINOv2 attends within a window
    only, so that branch's result differs more.

    Args:
      levels: H×W or H×W×3 grey levels in [0, 255].
      window, halo: in pixels, multiples of 32.

    Raises:
      ValueError: the network cannot be computed by windows.
    """
    if self._why_whole:
      raise ValueError(f"{self._network} cannot be computed by windows: {self._why_whole}.")
    height, width = padded_size(levels.shape[:2], PAD)
    cuts = [_cut(length, window, halo) for length in (height, width)]
    size = tuple(min(window, length) for length in (height, width))
    frame = np.array([height, width], np.int32)
    first = (np.zeros(2, np.int32), np.zeros((2, 2), np.int32))
    shapes = self._shapes(_image(levels, (0, 0), size, self._fill), frame, *first, None)
    known = [[np.full(s.shape, np.nan, np.float32) for s in kind] for kind in shapes[1]]
    # The first pass has no statistics; each pass makes at least one more exact.
    for _ in range(2 + sum(map(len, known))):
      prob = np.zeros((height, width), np.float32)
      found = [[np.zeros(k.shape) for k in known[0]], [np.full(k.shape, -np.inf) for k in known[1]]]
      for rows in cuts[0]:
        for cols in cuts[1]:
          offset = np.array([rows.start, cols.start], np.int32)
          core = np.array([rows.core, cols.core], np.int32) - offset.reshape(2, 1)
          image = _image(levels, offset, size, self._fill)
          part, shares = jax.device_get(self._part(image, frame, offset, core, known))
          here = np.s_[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
          prob[here] += part * rows.weight.reshape(-1, 1) * cols.weight
          found[0] = [a + b for a, b in zip(found[0], shares[0], strict=True)]
          found[1] = [np.maximum(a, b) for a, b in zip(found[1], shares[1], strict=True)]
      found = [[f.astype(np.float32) for f in kind] for kind in found]
      if all(map(_settled, sum(known, []), sum(found, []))):
        break
      known = found
    return prob[: levels.shape[0], : levels.shape[1]]


def _forwards(detector: Detector) -> tuple[Callable, Callable, Callable]:
  """Makes three functions.

  Returns:
    Two jitted ones, batch → B×H×W, and window → (h×w, its shares of statistics); and the shapes of
    what the second returns, without computing it.
  """
  graphdef, state = nnx.split(detector.model)

  def apply(state, prior, image):
    model = nnx.merge(graphdef, state)
    mode = forward.ALONE[detector.branch]
    found = forward.logits(model, mode, image, prior, detector.mean, detector.std)
    return forward.probability(found[detector.branch])

  @forward.jit
  def part(state, prior, image, frame, offset, core, known):
    with windows.active(windows.Window(image.shape[1:3], frame, offset, core, known)) as window:
      prob = apply(state, prior, image)[0]
    return prob, window.found

  whole = forward.jit(apply)
  state, prior = jax.device_put((state, detector.prior))
  return (
    lambda image: whole(state, prior, image),
    lambda *arguments: part(state, prior, *arguments),
    lambda *arguments: part.eval_shape(state, prior, *arguments),
  )


def _colour(levels: np.ndarray) -> np.ndarray:
  return levels if levels.ndim == 3 else levels[..., None]


def _image(levels: np.ndarray, offset, size: tuple[int, int], fill: np.ndarray) -> np.ndarray:
  """Cuts a window out of the padded frame, 1×h×w×3."""
  image = np.empty((1, *size, 3), np.float32)
  image[...] = fill
  part = levels[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
  image[0, : part.shape[0], : part.shape[1]] = _colour(part)
  return image


def _settled(old: np.ndarray, new: np.ndarray) -> bool:
  return bool(np.abs(new - old).max() <= _SETTLED * np.abs(new).max())  # false if old is NaN


class _Cut(NamedTuple):
  start: int  # of the window, in pixels along one axis of the frame
  core: tuple[int, int]  # its own part, from seam to seam, in the frame
  weight: np.ndarray  # of its pixels in the blend; over all windows the weights add up to 1


def _cut(length: int, window: int, halo: int) -> list[_Cut]:
  """Places windows of equal length along an axis, overlapping by at least 2·halo."""
  if length <= window:
    return [_Cut(0, (0, length), np.ones(length, np.float32))]
  starts = [*range(0, length - window, window - 2 * halo), length - window]
  # Half-way through each overlap, on the grid of the coarsest feature.
  seams = [(a + window + b) // 2 // PAD * PAD for a, b in zip(starts, starts[1:], strict=False)]
  edges = [0, *seams, length]
  place = np.arange(length) + 0.5
  right = [np.ones(length), *(np.clip((place - s) / SEAM + 0.5, 0, 1) for s in seams)]
  right.append(np.zeros(length))  # right[i]: total weight of windows i and later
  return [
    _Cut(s, edges[i : i + 2], (right[i] - right[i + 1])[s : s + window].astype(np.float32))
    for i, s in enumerate(starts)
  ]
