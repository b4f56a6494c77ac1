"""One mesh axis, `data`: batches are split over it, everything else is on every device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make(host_devices: int = 1, batch_size: int | None = None) -> Mesh:
  """A mesh over all devices; of a CPU over `host_devices` of them.

  Automatic axes: explicit ones refuse reshapes of a split batch.

  Raises:
    ValueError: the devices cannot share `batch_size` equally, or the CPU has fewer.
  """
  devices = jax.devices()
  if devices[0].platform == "cpu" and jax.process_count() == 1:
    if len(devices) < host_devices:
      raise ValueError(
        f"host_devices is {host_devices}, but jax was started with {len(devices)}; set "
        "jax_num_cpu_devices before anything else uses jax (main.py does)."
      )
    devices = devices[:host_devices]
  if batch_size is not None and batch_size % len(devices):
    raise ValueError(
      f"train.batch_size is {batch_size}, which {len(devices)} devices cannot share equally."
    )
  return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
  """Split along the first axis."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch, mesh: Mesh):
  """The global batch on the devices, from this process's rows of it."""
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split(mesh), rows), batch)


def put_replicated(tree, mesh: Mesh):
  """A copy of every array on every device; the originals stay untouched (a step donates its)."""

  def put(array):
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
      return jax.device_put(jax.random.clone(array), replicated(mesh))
    host = np.array(array)
    return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

  return jax.tree.map(put, tree)
