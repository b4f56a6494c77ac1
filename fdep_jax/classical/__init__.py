"""Detectors without training, found by file name: `classical.method("mpcm")(image)` gives a map.

They need numpy and scipy only. Maps have units of their own; `probability` makes each a
probability map that `metrics.hse` scores.
"""

import contextlib
import importlib
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import NamedTuple

import numpy as np

__all__ = ["Map", "grey", "maps", "method", "names", "parse", "probability"]

# Read by the libraries that numpy and scipy compute matrices with, when they start.
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP", "BLIS")}


class Map(NamedTuple):
  """A method's map of one image."""

  key: object  # of the image
  values: np.ndarray  # H×W float64, in the method's own unit
  seconds: float  # the method alone took, in one process


def names() -> list[str]:
  """Every method's name: the files of this folder that do not start with an underscore."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_"))


def method(name: str) -> Callable[..., np.ndarray]:
  """The function of `classical/<name>.py`, called as the file: H×W grey levels → H×W map.

  Raises:
    ValueError: there is no such method.
  """
  if name not in names():
    raise ValueError(f"No method is called {name!r}; there are {', '.join(names())}.")
  return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def parse(text: str) -> tuple[str, dict[str, object]]:
  """Splits a method's name from its options: "fkrw:published" or "nipps:weight=1,ratio=0.02".

  Returns:
    (name, options); an option without a value is True, others are numbers.

  Raises:
    ValueError: there is no such method, or it has no such option.
  """
  name, _, rest = text.partition(":")
  # A sequence, such as the sizes of mpcm, cannot be written here.
  parameters = [
    key
    for key, parameter in inspect.signature(method(name)).parameters.items()
    if isinstance(parameter.default, int | float)
  ]
  options: dict[str, object] = {}
  for item in filter(None, rest.split(",")):
    key, equals, value = item.partition("=")
    if key not in parameters:
      raise ValueError(f"{name} has no option {key!r}; it has {', '.join(parameters)}.")
    try:
      options[key] = float(value) if equals else True
    except ValueError:
      raise ValueError(f"The option {key} of {name} is {value!r}; give a number.") from None
  return name, options


def grey(levels: np.ndarray) -> np.ndarray:
  """Grey levels of an H×W or H×W×3 array; colours by the luma of ITU-R 601, as Pillow's "L".

  Bytes are rounded to whole levels as Pillow does, floats are not.
  """
  levels = np.asarray(levels)
  if levels.ndim == 2:
    return levels
  if levels.dtype == np.uint8:
    from PIL import Image

    return np.asarray(Image.fromarray(levels).convert("L"))
  return levels @ np.array([0.299, 0.587, 0.114])


def probability(values: np.ndarray, eight_bit: bool = True) -> np.ndarray:
  """Turns a map of any unit into one of [0, 1]: negative values become 0, the largest becomes 1.

  So every image with any response has a detection at prob > 0.5: what is a target is decided
  within one image. OUR CHOICE, as the paper is silent: of the conventions tried this one comes
  nearest to its Table S4 (docs/metric.md).

  Args:
    values: H×W, finite.
    eight_bit: round to multiples of 1/255, as maps that are saved as 8-bit pictures.

  Returns:
    H×W float32; 0 everywhere if nothing is positive.
  """
  values = np.maximum(values, 0)
  top = values.max()
  if not top > 0:
    return np.zeros(values.shape, np.float32)
  values = values / top
  return np.float32(np.rint(values * 255) / 255 if eight_bit else values)


def maps(
  text: str, images: Iterable[tuple[object, np.ndarray]], processes: int | None = None
) -> Iterator[Map]:
  """Computes the maps of many images in a pool of processes.

  Args:
    text: a method with options, see `parse`.
    images: (key, H×W or H×W×3 grey levels in [0, 255]), read as they are needed.
    processes: default one a processor that this process may use; without a pool if it is 1.

  Yields:
    Maps in the order in which they are done.

  Raises:
    ValueError: there is no such method or option.
  """
  name, options = parse(text)
  if not processes:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    processes = len(affinity(0)) if affinity else os.cpu_count() or 1
  if processes == 1:
    for key, image in images:
      yield _map(name, options, key, image)
    return
  context = multiprocessing.get_context("spawn")
  pool = futures.ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
  try:
    with _one_thread():
      waiting: set[futures.Future] = set()
      for key, image in images:
        waiting.add(pool.submit(_map, name, options, key, image))
        while len(waiting) >= 2 * processes:
          done, waiting = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
          for future in done:
            yield future.result()
      for future in futures.as_completed(waiting):
        yield future.result()
  finally:
    pool.shutdown(cancel_futures=True)


def _map(name: str, options: dict, key: object, image: np.ndarray) -> Map:
  start = time.perf_counter()
  values = method(name)(grey(image), **options)
  return Map(key, values, time.perf_counter() - start)


def _end_with_parent() -> None:
  """Ends a process of the pool as soon as the process that started it is gone."""

  def wait():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _one_thread():
  """Makes processes that start in the block compute matrices in one thread each.

  With more threads than processors they would wait for each other.
  """
  before = {name: os.environ.get(name) for name in _ONE_THREAD}
  os.environ.update(_ONE_THREAD)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value
