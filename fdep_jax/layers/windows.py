"""Lets a network compute a large frame window by window with the statistics of the whole frame.

Two things in the networks depend on more than a neighbourhood: statistics of a whole feature
(channel gates, GroupNorm), and resizing with aligned corners, whose sampling points depend on the
place in the frame and on its size. While a `Window` is active, `ops` and GroupNorm take both from
the frame.

The frame's statistics come from earlier passes over all windows. `found` contains one window's
share of each; the shares of all windows, put together, are `known` in the next pass. Every pass
makes at least one more layer exact, so the passes end; in practice, a few are enough.
"""

import contextlib
import contextvars

import jax
import jax.numpy as jnp

_ACTIVE: contextvars.ContextVar["Window | None"] = contextvars.ContextVar("window", default=None)

Statistics = tuple[list[jax.Array], list[jax.Array]]  # means and maxima, 1×1×1×C, in call order


class Window:
  """The place in its frame of one forward pass's image (batch of 1).

  All places and sizes are in pixels, multiples of the network's stride, rows before columns.

  Args:
    size: size of the window; static.
    frame: 2 int32, size of the frame.
    offset: 2 int32, the window's first pixel in the frame.
    core: 2×2 int32, first and last-plus-one row, then column, of the part of the window that counts
      in statistics. The cores of all windows cover the frame exactly once.
    known: the frame's statistics, NaN if not known yet; None: none is known.
  """

  def __init__(self, size, frame, offset, core, known: Statistics | None = None):
    self.size, self.frame, self.offset, self.core = size, frame, offset, core
    self._known = None if known is None else tuple(iter(values) for values in known)
    self.found: Statistics = ([], [])

  def place(self, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns the frame's length and the window's offset along axis 1 or 2 of the feature x."""
    scale = self._scale(x, axis)
    return self.frame[axis - 1] // scale, self.offset[axis - 1] // scale

  def mean(self, x: jax.Array) -> jax.Array:
    """Returns the mean, B×1×1×C, over the frame's feature, of which x is a window."""
    number = self.place(x, 1)[0] * self.place(x, 2)[0]
    share = jnp.where(self._in_core(x), x, 0).sum((1, 2), keepdims=True) / number.astype(x.dtype)
    return self._statistic(0, share, x.mean((1, 2), keepdims=True))

  def max(self, x: jax.Array) -> jax.Array:
    """Returns the maximum, B×1×1×C, over the frame's feature, of which x is a window."""
    share = jnp.where(self._in_core(x), x, -jnp.inf).max((1, 2), keepdims=True)
    return self._statistic(1, share, x.max((1, 2), keepdims=True))

  def _statistic(self, kind: int, share: jax.Array, local: jax.Array) -> jax.Array:
    self.found[kind].append(share)
    if self._known is None:
      return local
    known = next(self._known[kind])
    return jnp.where(jnp.isnan(known), local, known)

  def _scale(self, x: jax.Array, axis: int) -> int:
    return self.size[axis - 1] // x.shape[axis]

  def _in_core(self, x: jax.Array) -> jax.Array:
    inside = []
    for axis in (1, 2):
      place = jnp.arange(x.shape[axis]) * self._scale(x, axis)
      first, end = self.core[axis - 1]
      inside.append((place >= first) & (place < end))
    return inside[0].reshape(1, -1, 1, 1) & inside[1].reshape(1, 1, -1, 1)


@contextlib.contextmanager
def active(window: Window):
  """Makes networks traced inside treat their image as this window."""
  token = _ACTIVE.set(window)
  try:
    yield window
  finally:
    _ACTIVE.reset(token)


def current(x: jax.Array) -> Window | None:
  """Returns the active window for the feature x; None in ordinary passes and for 1×1 features."""
  return None if x.shape[1:3] == (1, 1) else _ACTIVE.get()
