"""Keeps a dataset in device memory, and cuts and augments its crops there (`data.on_device`).

The host sends what is drawn of a sample (`augment.packed`), 96 bytes. Images and masks equal those
of the numpy route bit for bit, as both compute with integers.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fdep_jax.data import augment
from fdep_jax.data.samples import Sample
from fdep_jax.runtime import mesh

# Memory is a table with rows of this many bytes: int32 could not number the bytes of a large set.
_ROW_BITS = 12
_ROW = 1 << _ROW_BITS


@jax.tree_util.register_pytree_node_class
class Resident:
  """The decoded images and masks of a split in the memory of every device.

  Of a grey image one channel is kept, so a set takes about two bytes a pixel.

  Args:
    samples: images of any size.
    size: side of the crops, pixels.
    the_mesh: devices.

  Raises:
    ValueError: the set does not fit into a device's free memory.
  """

  def __init__(self, samples: Sequence[Sample], size: int, the_mesh):
    check_room(samples, the_mesh)
    shapes = _shapes(samples)
    starts = np.cumsum([0, *(np.prod(shape, dtype=np.int64) for shape in shapes)])
    memory = np.zeros((-(-starts[-1] // _ROW), _ROW), np.uint8)
    table = np.zeros((len(samples), 5), np.int32)
    for place, (sample, shape, start) in enumerate(zip(samples, shapes, starts, strict=False)):
      planes = [*np.moveaxis(sample.image, -1, 0)[: shape[0] - 1], sample.mask]
      memory.reshape(-1)[start : starts[place + 1]] = np.ravel(planes)
      # Row and column of its first byte; planes, height and width.
      table[place] = start >> _ROW_BITS, start & _ROW - 1, *shape
    self._memory = mesh.put_replicated((memory, table), the_mesh)
    coloured = any(planes > 2 for planes, _, _ in shapes)
    self._compute = jax.jit(_split(lambda *given: _batch(*given, size, coloured), the_mesh))

  def tree_flatten(self):
    return (self._memory,), self._compute

  @classmethod
  def tree_unflatten(cls, compute, children):
    self = object.__new__(cls)
    (self._memory,), self._compute = children, compute
    return self

  def batch(self, choices: jax.Array) -> dict[str, jax.Array]:
    """Computes {"image": B×size×size×3 uint8, "mask": B×size×size bool} of drawn crops.

    Args:
      choices: B rows of `augment.packed`, split over the devices.
    """
    image, mask = self._compute(*self._memory, choices)
    return {"image": image, "mask": mask}

  def program(self, choices: jax.Array) -> str:
    """Returns the compiled program, as text."""
    return self._compute.lower(*self._memory, choices).compile().as_text()


def _shapes(samples: Sequence[Sample]) -> list[tuple[int, int, int]]:
  """Returns planes (one channel, or three if they differ, and the mask), height and width."""
  coloured = ((s.image != s.image[..., :1]).any() for s in samples)
  return [(4 if c else 2, *s.mask.shape) for s, c in zip(samples, coloured, strict=True)]


def check_room(samples: Sequence[Sample], the_mesh) -> None:
  """Raises ValueError if the samples do not fit into the memory of each device."""
  needed = sum(math.prod(shape) for shape in _shapes(samples))
  device = the_mesh.local_devices[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    free = stats["bytes_limit"] - stats["bytes_in_use"]
  else:  # CPU devices share the memory of the machine
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free //= len(the_mesh.local_devices)
  if needed > free:
    raise ValueError(
      f"data.on_device=True needs {needed / 1e9:.2f} GB for the train images on each device, and "
      f"{free / 1e9:.2f} GB are free. Leave it out: the batches are the same."
    )


def _split(function, the_mesh):
  """Lets each device compute its rows of the last argument; the others are on all devices."""
  whole, rows = PartitionSpec(), PartitionSpec("data")
  return jax.shard_map(
    function, mesh=the_mesh, in_specs=(whole, whole, rows), out_specs=rows, check_vma=False
  )


def _batch(memory, table, choices, size: int, coloured: bool):
  def one(choice):
    steps = choice[3:].reshape(-1, augment.WIDTH)
    drawn = jnp.sum(steps[:, 0] != augment.NOTHING)  # the others follow
    found = _cut(memory, table[choice[0]], choice[1], choice[2], size, coloured)
    found = jax.lax.fori_loop(0, drawn, lambda i, found: _apply(found, steps[i]), found)
    return jnp.moveaxis(found.image, 0, -1), found.mask

  # One after the other, a CPU computes only the steps that are drawn. Elsewhere all samples are
  # computed at once, with every kind of step.
  if jax.default_backend() == "cpu":
    return jax.lax.map(one, choices)
  return jax.vmap(one)(choices)


class _Crop(NamedTuple):
  image: jax.Array  # 3×S×S uint8
  mask: jax.Array  # S×S bool
  grey: jax.Array  # whether the channels are equal


def _cut(memory, entry, y, x, size: int, coloured: bool):
  """Cuts the window at (y, x) of the sample of a table's entry, as `augment.cut`."""
  row, column, planes, height, width = entry
  rows, columns = _grid(size)
  rows, columns = y + rows, x + columns
  inside = (rows < height) & (columns < width)

  def plane(number):
    place = column + (number * height + rows) * width + columns
    place = jnp.where(inside, place, 0)
    found = memory.at[row + (place >> _ROW_BITS), place & _ROW - 1]
    return jnp.where(inside, found.get(mode="promise_in_bounds"), 0)

  if coloured:
    found = jax.lax.cond(
      planes > 2,
      lambda: jnp.stack([plane(0), plane(1), plane(2)]),
      lambda: _grey(plane(0)),
    )
  else:
    found = _grey(plane(0))
  return _Crop(found, plane(planes - 1) > 0, planes == 2)


def _grid(size: int):
  """Returns the numbers of rows, S×1, and of columns, 1×S."""
  return jnp.arange(size)[:, None], jnp.arange(size)[None]


def _grey(plane):
  return jnp.broadcast_to(plane, (3, *plane.shape))


def _apply(crop: _Crop, step) -> _Crop:
  """Applies one step, as `augment.apply`."""
  size = len(crop.mask)
  rows, columns = _grid(size)

  def levels():
    image = augment.scaled_levels(crop.image.astype(jnp.int32), step[1], step[2])
    return crop._replace(image=_clip(image))

  def noise():
    # Numbered in the order of S×S×3, as there.
    bits = 3 * (size * rows + columns)[None] + jnp.arange(3)[:, None, None]
    bits = bits.astype(jnp.uint32)
    for key in step[2:4].astype(jnp.uint32):
      bits = augment.mixed(bits ^ key)
    normal = jnp.take(augment.normal_table(), bits >> 16, mode="clip").astype(jnp.int32)
    image = _clip(crop.image + augment.scaled_noise(normal, step[1]))
    return crop._replace(image=image, grey=jnp.zeros_like(crop.grey))

  def places():
    yy, yx, xy, xx, oy, ox = step[1:]
    y = _mirrored(yy * rows + yx * columns + oy, size)
    return y, _mirrored(xy * rows + xx * columns + ox, size)

  def nearest(plane, y, x):
    half = augment.UNIT // 2
    corner = ((y + half) >> augment.BITS) * size + ((x + half) >> augment.BITS)
    return jnp.take(plane.reshape(-1), corner, mode="clip")

  def blend(plane, y, x):
    corner = (y >> augment.BITS) * size + (x >> augment.BITS)
    # Beyond the last row and column any value will do: its weight is 0.
    four = (
      jnp.take(plane.reshape(-1), corner + after, mode="clip").astype(jnp.int32)
      for after in (0, 1, size, size + 1)
    )
    down, right = y & augment.UNIT - 1, x & augment.UNIT - 1
    return augment.blended(*four, down, right).astype(jnp.uint8)

  def moved(sample):
    y, x = places()
    image = jax.lax.cond(
      crop.grey,
      lambda: _grey(sample(crop.image[0], y, x)),
      lambda: jnp.stack([sample(plane, y, x) for plane in crop.image]),
    )
    return crop._replace(image=image, mask=nearest(crop.mask, y, x))

  kinds = {
    augment.NOTHING: lambda: crop,
    augment.LEVELS: levels,
    augment.NOISE: noise,
    augment.TURN: lambda: moved(nearest),
    augment.WARP: lambda: moved(blend),
  }
  return jax.lax.switch(step[0], [kinds[kind] for kind in augment.KINDS])


def _clip(levels):
  return jnp.clip(levels, 0, 255).astype(jnp.uint8)


def _mirrored(place, length: int):
  place = jnp.abs(place)
  return jnp.minimum(place, 2 * augment.UNIT * (length - 1) - place)
