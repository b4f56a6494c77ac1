"""Describes the TPU slice of a plan (`v5e:4x4`) or its CPU stand-in (`cpu:8`).

It sets up jax, so import it before jax.
"""

import importlib.util
import os
import pathlib
import re
from typing import NamedTuple

INSTALL = 'pip install -r requirements-tpu.txt (or "jax[tpu]" of the installed jax version)'


class Chip(NamedTuple):
  """Peak figures of one chip, from cloud.google.com/tpu/docs/<kind>; HBM from the compiler."""

  flops: float  # a second, bfloat16
  bandwidth: float  # bytes of HBM a second
  hbm: float  # bytes that the compiler lets a program use


_GIB = 2**30
CHIPS = {
  "v4": Chip(275e12, 1.228e12, 30.75 * _GIB),
  "v5e": Chip(197e12, 0.819e12, 15.75 * _GIB),
  "v5p": Chip(459e12, 2.765e12, 94.75 * _GIB),
  "v6e": Chip(918e12, 1.638e12, 31.25 * _GIB),
}


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """Parses `v5e:4x4` to ("v5e", (4, 4)), `cpu:8` to ("cpu", (8,)).

  Raises:
    ValueError: `name` is not a slice.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  kind, shape = match.groups() if match else ("", "")
  sides = tuple(int(side) for side in shape.split("x")) if match else ()
  axes = {"cpu": (1,), "v4": (3,), "v5p": (3,), "v5e": (2,), "v6e": (2,)}.get(kind, ())
  if len(sides) not in axes or 0 in sides:
    raise ValueError(
      f"--topology is {name!r}; it must be cpu:N, or a TPU slice such as v5e:4x4, v6e:2x2, "
      "v4:2x2x1 or v5p:2x2x1."
    )
  return kind, sides


def start(name: str) -> None:
  """Sets the environment variables of jax and libtpu. Call it before jax is imported.

  Raises:
    ValueError: `name` is not a slice.
    FileNotFoundError: the slice has TPUs and libtpu is not installed.
  """
  kind, _ = parse(name)
  os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on an accelerator, if there is one
  if kind == "cpu":
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


def devices(name: str) -> list:
  """Returns the slice's devices, to compile for. Call `start` before.

  Raises:
    ValueError: there is no such slice.
  """
  import jax
  from jax.experimental import topologies

  kind, sides = parse(name)
  if kind == "cpu":
    found = jax.devices("cpu")
    if len(found) < sides[0]:
      raise ValueError(f"--topology {name}, but jax was started with {len(found)} CPU devices.")
    return found[: sides[0]]
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except Exception as error:  # jax raises the compiler's errors as they are
    raise ValueError(f"--topology {name}: the TPU compiler has no such slice ({error}).") from None


def host_memory() -> int:
  """Returns the bytes of memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
