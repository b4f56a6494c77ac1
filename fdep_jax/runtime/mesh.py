"""Places arrays on devices: one mesh axis, `data`, over all devices; batches are split over it.

Everything else is copied to every device; the frozen prior's weights may be split instead. The same
code serves one CPU, a few GPUs or the hosts of a TPU slice: each process supplies its rows of a
batch.
"""

import json
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fdep_jax.runtime import rendezvous

_SMALL = 2**16  # elements; smaller arrays are not worth a gather


def start(config: ConfigDict) -> None:
  """Configures jax, joins the run's other processes and waits for them.

  Call it before jax finds its devices. On CPUs every process has `host_devices` devices.

  Raises:
    OSError: a process has not come in time.
    ValueError: `distributed` does not fit this machine or the other processes, or jax's variables
      ask for float64, or for devices that are not here.
  """
  if config.host_devices > 1:
    jax.config.update("jax_num_cpu_devices", config.host_devices)
  if jax.config.jax_enable_x64:
    raise ValueError(
      "JAX_ENABLE_X64 is set, so jax would compute in float64, and checkpoints would hold it. "
      "Results are defined in float32: start without it."
    )
  if config.distributed == "off":
    check_devices()
    cache_programs(config)
    return
  if config.distributed == "auto":
    arguments = ()
  else:
    address, count, index = config.distributed.split(",")
    arguments = (address, int(count), int(index))
    rendezvous.meet(*arguments)
  try:
    with rendezvous.telling("the other processes"):
      jax.distributed.initialize(*arguments)
  except ValueError as error:
    raise ValueError(
      f"distributed is {config.distributed}, but jax finds no processes to join: no TPU pod, no "
      f"SLURM, no Open MPI ({error}). Alone, leave distributed out; elsewhere give "
      "--config.distributed=HOST:PORT,COUNT,INDEX."
    ) from None
  except RuntimeError as error:
    text = str(error).strip().splitlines() or [type(error).__name__]
    raise OSError(f"The processes could not be joined: {text[0]}.") from None
  check_devices()
  # Only the first process writes the cache. Its program, when read again, exchanges in another
  # order than the one that another process compiles; Gloo then ends both.
  if jax.default_backend() != "cpu":
    cache_programs(config)
  # Gloo, which connects CPUs, fails if processes reach the first exchange of a group of devices
  # more than 30 s apart; later exchanges wait. Loading or compiling may delay a process by more.
  minimum(0)


def check_devices() -> None:
  """Raises ValueError if jax finds no device, as JAX_PLATFORMS=tpu on a machine without one."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the second with a plugin that finds no driver
    text = (str(error).strip().splitlines() or ["no driver"])[0]
    raise ValueError(
      f"JAX_PLATFORMS is {jax.config.jax_platforms!r}, but jax finds no such device here ({text}). "
      "Leave the variable out, and jax takes what there is; or install jax for the device: README."
    ) from None


def cache_programs(config: ConfigDict) -> None:
  """Keeps compiled programs for later processes if log.compile_cache names a folder."""
  if config.log.compile_cache:
    folder = os.path.expanduser(config.log.compile_cache)
    jax.config.update("jax_compilation_cache_dir", folder)


def writes() -> bool:
  """Returns whether this is the one process that writes the run's files."""
  return jax.process_index() == 0


def make(host_devices: int = 1, batch_size: int | None = None) -> Mesh:
  """Makes a mesh over all devices of all processes; on a single CPU over `host_devices`.

  Raises:
    ValueError: the devices cannot share `batch_size` equally, or the CPU has too few.
  """
  devices = jax.devices()
  if devices[0].platform == "cpu" and jax.process_count() == 1:
    if len(devices) < host_devices:
      raise ValueError(
        f"host_devices is {host_devices}, but jax was started with {len(devices)}; set "
        "jax_num_cpu_devices before anything else uses jax (main.py does)."
      )
    devices = devices[:host_devices]
  return over(devices, batch_size)


def over(devices: Sequence[jax.Device], batch_size: int | None = None) -> Mesh:
  """Makes a mesh over these devices.

  Raises:
    ValueError: they cannot share `batch_size` equally.
  """
  if batch_size is not None and batch_size % len(devices):
    raise ValueError(
      f"train.batch_size is {batch_size}, which {len(devices)} devices cannot share equally. "
      f"Use {-(-batch_size // len(devices)) * len(devices)}, or fewer devices."
    )
  # Automatic axes, as explicit ones do not allow reshaping a split batch.
  return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that puts the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch, mesh: Mesh):
  """Puts the global batch on the devices, from this process's rows of it."""
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split(mesh), rows), batch)


def put_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """Puts the global batch on the devices, if every process has all its rows."""
  return jax.make_array_from_callback(rows.shape, split(mesh), lambda index: rows[index])


def get(tree):
  """Gathers split arrays as whole numpy arrays on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(tree, tiled=True)


def local_rows(array: jax.Array) -> np.ndarray:
  """Returns this process's rows of an array that is split over the mesh."""
  shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


def minimum(value: int) -> int:
  """Returns the smallest of all processes' values; also a barrier."""
  if jax.process_count() == 1:
    return value
  # Over all devices, as in a step: a smaller group would time out on its own first exchange.
  rows = np.full(jax.local_device_count(), value)
  return int(jax.jit(jnp.min)(put_batch(rows, over(jax.devices()))))


def agree(values: Mapping[str, object]) -> None:
  """Compares values, which JSON can hold, over all processes; also a barrier.

  Raises:
    ValueError: on every process, if they differ; the message lists all that do.
  """
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  text = json.dumps(values).encode()
  padded = np.frombuffer(text.ljust(-minimum(-len(text))), np.uint8)
  rows = multihost_utils.process_allgather(padded)
  first, *others = (json.loads(row.tobytes()) for row in np.asarray(rows))
  lines = [
    f"{name}: {first.get(name)!r} in process 0, {theirs.get(name)!r} in process {index}"
    for index, theirs in enumerate(others, 1)
    for name in sorted({*first, *theirs})
    if first.get(name) != theirs.get(name)
  ]
  if lines:
    raise ValueError(
      "\n  ".join(["The processes do not fit together:", *lines])
      + "\nStart every process with the same command, with its own index in distributed."
    )


def shared_out(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
  """Returns the sharding of FSDP: splits the last axis that the devices can share equally.

  Small arrays are not split. Neither is the first axis: in the prior it counts blocks, which a scan
  takes one at a time.
  """
  devices = mesh.devices.size
  axes = [i for i in range(1, len(shape)) if shape[i] % devices == 0]
  if not axes or np.prod(shape) < _SMALL:
    return replicated(mesh)
  return NamedSharding(mesh, PartitionSpec(*[None] * axes[-1], "data"))


def put_replicated(tree, mesh: Mesh):
  """Copies every array to every device; donating the copy leaves the original valid."""
  return jax.tree.map(lambda array: _put(array, replicated(mesh)), tree)


def put_frozen(tree, mesh: Mesh, shard: bool):
  """Puts the prior's weights on every device, or splits them (`prior.shard`)."""
  return jax.tree.map(
    lambda array: _put(array, shared_out(mesh, array.shape) if shard else replicated(mesh)), tree
  )


def _put(array, sharding: NamedSharding):
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    bits = _put(jax.random.key_data(array), sharding)
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(array))
  host = np.array(array)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
