"""Describes the devices of a plan: a TPU slice (`v5e:4x4`), GPUs (`rtx4090:1`), or CPUs (`cpu:8`).

It sets up jax, so import it before jax.
"""

import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import re
from typing import NamedTuple

from fdep_jax.runtime import gpus

INSTALL = 'pip install -r requirements-tpu.txt (or "jax[tpu]" of the installed jax version)'


_GIB = 2**30
# Bytes of a GPU that stay free for what the compiler does not count: cuDNN's workspace, the CUDA
# context and the trials of autotuning. Not measured: no card was there.
SPARE = 2 * _GIB


class Chip(NamedTuple):
  """Peak figures of one chip.

  TPUs: from cloud.google.com/tpu/docs/<kind>, HBM from the compiler. GPUs: see `runtime.gpus`.
  """

  flops: float  # a second, bfloat16
  bandwidth: float  # bytes of memory a second
  hbm: float  # bytes that a program may use
  flops_float32: float | None = None  # a second; None: all products are of bfloat16


CHIPS = {
  "v4": Chip(275e12, 1.228e12, 30.75 * _GIB),
  "v5e": Chip(197e12, 0.819e12, 15.75 * _GIB),
  "v5p": Chip(459e12, 2.765e12, 94.75 * _GIB),
  "v6e": Chip(918e12, 1.638e12, 31.25 * _GIB),
  **{
    kind: Chip(gpu.bfloat16, gpu.bandwidth, gpu.memory - SPARE, gpu.float32)
    for kind, gpu in gpus.GPUS.items()
  },
}
_AXES = {"cpu": (1,), "v4": (3,), "v5p": (3,), "v5e": (2,), "v6e": (2,)}


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """Parses `v5e:4x4` to ("v5e", (4, 4)), `rtx4090:2` to ("rtx4090", (2,)).

  Raises:
    ValueError: `name` is neither a slice, nor GPUs, nor CPUs.
  """
  match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name)
  kind, shape = match.groups() if match else ("", "")
  sides = tuple(int(side) for side in shape.split("x")) if match else ()
  axes = (1,) if kind in gpus.GPUS else _AXES.get(kind, ())
  if len(sides) not in axes or 0 in sides:
    raise ValueError(
      f"--topology is {name!r}; it must be cpu:N, or a TPU slice such as v5e:4x4, v6e:2x2, "
      f"v4:2x2x1 or v5p:2x2x1, or N GPUs of one kind, KIND:N with one of {', '.join(gpus.GPUS)}."
    )
  return kind, sides


def start(name: str) -> None:
  """Sets the environment variables of jax and the compilers. Call it before jax is imported.

  Raises:
    ValueError: `name` is not a topology.
    FileNotFoundError: the compiler for it is not installed.
  """
  kind, _ = parse(name)
  os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on an accelerator, if there is one
  if kind == "cpu":
    return
  if kind in gpus.GPUS:
    _start_gpu(name)
    return
  package = importlib.util.find_spec("libtpu")
  library = pathlib.Path(package.origin).with_name("libtpu.so") if package else None
  if library is None or not library.is_file():
    raise FileNotFoundError(
      f"--topology {name} needs the TPU compiler (libtpu), not a TPU: {INSTALL}."
    )
  os.environ["TPU_LIBRARY_PATH"] = str(library)
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # does not ask the cloud for this machine's kind
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # allows two plans at once, as they use no chip
  os.environ.setdefault("TPU_LOG_DIR", "disabled")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")  # hides warnings about missing workers
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


_GPU_FLAGS = (
  # Triton's products are tuned by trials on a card. Without one, some find no tile sizes.
  "--xla_gpu_enable_triton_gemm=false",
  # Nobody runs the kernels. On ACM this saves a fifth of the time, and the compiled module is the
  # same to the letter.
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_gpu_disable_gpuasm_optimizations=true",
)


def _start_gpu(name: str) -> None:
  jax_version = _version("jax")
  if _version("jax-cuda12-pjrt") != jax_version or _version("nvidia-cuda-nvcc-cu12") is None:
    raise FileNotFoundError(
      f"--topology {name} needs XLA's GPU compiler for jax {jax_version}, not a GPU: "
      "pip install -r requirements-gpu-plan.txt."
    )
  given = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = " ".join([*given.split(), *_GPU_FLAGS])
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  logging.getLogger("jax_plugins").setLevel(logging.ERROR)  # hides that it cannot run programs


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def devices(name: str) -> list:
  """Returns the devices to compile for. Call `start` before.

  Raises:
    ValueError: there are no such devices.
  """
  import jax
  from jax.experimental import topologies

  kind, sides = parse(name)
  if kind == "cpu":
    found = jax.devices("cpu")
    if len(found) < sides[0]:
      raise ValueError(f"--topology {name}, but jax was started with {len(found)} CPU devices.")
    return found[: sides[0]]
  if kind in gpus.GPUS:
    # The shape is slices × hosts × GPUs.
    shape, target = f"1x1x{sides[0]}", gpus.target(kind)
    found = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target)
    return list(found.devices)
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except Exception as error:  # jax raises the compiler's errors as they are
    raise ValueError(f"--topology {name}: the TPU compiler has no such slice ({error}).") from None


def host_memory() -> int:
  """Returns the bytes of memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
