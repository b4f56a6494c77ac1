"""Slices to plan for: `v5e:4x4`, `cpu:8`. Imported before jax, which it tells where to look."""

import importlib.util
import os
import pathlib
import re
from typing import NamedTuple

INSTALL = 'pip install -r requirements-tpu.txt (or "jax[tpu]" of the installed jax version)'


class Chip(NamedTuple):
  """Peak figures of one chip, from cloud.google.com/tpu/docs/<kind>; HBM as the compiler has it."""

  flops: float  # a second, bfloat16
  bandwidth: float  # bytes of HBM a second
  hbm: float  # bytes that a program may use: what the compiler leaves of the chip's memory


_GIB = 2**30
CHIPS = {
  "v4": Chip(275e12, 1.228e12, 30.75 * _GIB),
  "v5e": Chip(197e12, 0.819e12, 15.75 * _GIB),
  "v5p": Chip(459e12, 2.765e12, 94.75 * _GIB),
  "v6e": Chip(918e12, 1.638e12, 31.25 * _GIB),
}


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """`v5e:4x4` -> ("v5e", (4, 4)); `cpu:8` -> ("cpu", (8,)).

  Raises:
    ValueError: it names no slice.
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
  """Sets what jax and libtpu read when they start. Nothing may have imported jax before.

  Raises:
    ValueError: `name` is no slice.
    FileNotFoundError: a TPU is planned for and libtpu is not installed.
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
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # asks no cloud which machine this is
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two plans may run at once: no chip is held
  os.environ.setdefault("TPU_LOG_DIR", "disabled")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")  # it complains that there are no workers
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def devices(name: str) -> list:
  """The slice's devices, to compile for. After `start`.

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
  except Exception as error:  # jax passes on whatever the compiler says
    raise ValueError(f"--topology {name}: the TPU compiler has no such slice ({error}).") from None


def host_memory() -> int:
  """Bytes of memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
