"""Keeps a dataset in device memory, and cuts and augments its crops there (`data.on_device`).

The host sends what is drawn of a sample (`augment.packed`), 96 bytes. Images and masks equal those
of the numpy route bit for bit, as both compute with integers.
"""

import os
from collections.abc import Sequence

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
    self._mesh = the_mesh
    shapes = [(4 if _coloured(sample) else 2, *sample.mask.shape) for sample in samples]
    starts = np.cumsum([0, *(np.prod(shape, dtype=np.int64) for shape in shapes)])
    _check_room(int(starts[-1]), the_mesh)
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


def _coloured(sample: Sample) -> bool:
  return bool((sample.image != sample.image[..., :1]).any())


def _check_room(needed: int, the_mesh) -> None:
  """Raises ValueError if `needed` bytes do not fit into the memory of each device."""
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
      f"{device.device_kind} has {free / 1e9:.2f} GB. Leave it out: the batches are the same."
    )


def _split(function, the_mesh):
  """Lets each device compute its rows of the last argument; the others are on all devices."""
  whole, rows = PartitionSpec(), PartitionSpec("data")
  return jax.shard_map(
    function, mesh=the_mesh, in_specs=(whole, whole, rows), out_specs=rows, check_vma=False
  )


def _batch(memory, table, choices, size: int, coloured: bool):
  def one(choice):
    image, mask = _cut(memory, table[choice[0]], choice[1], choice[2], size, coloured)
    steps = choice[3:].reshape(-1, augment.WIDTH)
    return jax.lax.scan(lambda pair, step: (_apply(*pair, step), None), (image, mask), steps)[0]

  # One after the other, a CPU computes only the steps that are drawn. Elsewhere all samples are
  # computed at once, with every kind of step.
  if jax.default_backend() == "cpu":
    return jax.lax.map(one, choices)
  return jax.vmap(one)(choices)


def _cut(memory, entry, y, x, size: int, coloured: bool):
  """Cuts the window at (y, x) of the sample of a table's entry, as `augment.cut`."""
  row, column, planes, height, width = entry
  rows, columns = y + jnp.arange(size)[:, None], x + jnp.arange(size)
  inside = (rows < height) & (columns < width)

  def plane(number):
    place = column + (number * height + rows) * width + columns
    place = jnp.where(inside, place, 0)
    found = memory.at[row + (place >> _ROW_BITS), place & _ROW - 1]
    return jnp.where(inside, found.get(mode="promise_in_bounds"), 0)

  def grey():
    return jnp.broadcast_to(plane(0)[..., None], (size, size, 3))

  def colour():
    return jnp.stack([plane(0), plane(1), plane(2)], -1)

  image = jax.lax.cond(planes > 2, colour, grey) if coloured else grey()
  return image, plane(planes - 1) > 0


def _apply(image, mask, step):
  """Applies one step, as `augment.apply`."""

  def nothing():
    return image, mask

  def levels():
    return _clip(augment.scaled_levels(image.astype(jnp.int32), step[1], step[2])), mask

  def noise():
    bits = jnp.arange(image.size, dtype=jnp.uint32).reshape(image.shape)
    for key in step[2:4].astype(jnp.uint32):
      bits = augment.mixed(bits ^ key)
    normal = jnp.take(augment.normal_table(), bits >> 16, mode="clip").astype(jnp.int32)
    return _clip(image + augment.scaled_noise(normal, step[1])), mask

  def warp():
    return _warp(image, mask, step[1:])

  kinds = {augment.NOTHING: nothing, augment.LEVELS: levels, augment.NOISE: noise}
  kinds[augment.TURN] = warp  # a turn moves whole pixels
  return jax.lax.switch(jnp.minimum(step[0], augment.TURN), [kinds[k] for k in sorted(kinds)])


def _clip(levels):
  return jnp.clip(levels, 0, 255).astype(jnp.uint8)


def _warp(image, mask, numbers):
  yy, yx, xy, xx, oy, ox = numbers
  size = mask.shape[0]
  rows, columns = jnp.arange(size)[:, None], jnp.arange(size)
  y = _mirrored(yy * rows + yx * columns + oy, size)
  x = _mirrored(xy * rows + xx * columns + ox, size)
  corner = (y >> augment.BITS) * size + (x >> augment.BITS)
  down, right = y & augment.UNIT - 1, x & augment.UNIT - 1

  def blend(plane):
    # Beyond the last row and column any value will do: its weight is 0.
    four = (
      jnp.take(plane.reshape(-1), corner + after, mode="clip").astype(jnp.int32)
      for after in (0, 1, size, size + 1)
    )
    return augment.blended(*four, down, right).astype(jnp.uint8)

  def grey():
    return jnp.broadcast_to(blend(image[..., 0])[..., None], image.shape)

  def colour():
    return jnp.stack([blend(image[..., c]) for c in range(3)], -1)

  half = augment.UNIT // 2
  nearest = ((y + half) >> augment.BITS) * size + ((x + half) >> augment.BITS)
  is_grey = (image == image[..., :1]).all()
  return jax.lax.cond(is_grey, grey, colour), jnp.take(mask.reshape(-1), nearest, mode="clip")


def _mirrored(place, length: int):
  place = jnp.abs(place)
  return jnp.minimum(place, 2 * augment.UNIT * (length - 1) - place)
