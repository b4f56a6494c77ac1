"""Measures the input pipeline's images a second: stages of the numpy route, then both routes.

  python -m benchmarks.input --data ../data/NUAA-SIRST

Without --data, uses synthetic scenes of 512×512. As in training, threads of this process do the
work, not worker processes. Both routes give the same batches (`data.on_device`). They are measured
in turns, and the best turn counts, so that other work on the machine disturbs both alike. CPU time
is that of all threads: on an idle machine, n cores reach n times its images a second. Compare the
last rows with the images a second that a run prints.
"""

import argparse
import os
import time

import jax
import numpy as np

from fdep_jax import data
from fdep_jax.data import augment, resident
from fdep_jax.runtime import mesh


def rate(call, images_per_call: int, seconds: float = 2.0) -> tuple[float, float]:
  """Measures the images a second of a call, repeated for `seconds`: by the clock, of CPU time."""
  call()
  count, start, cpu = 0, time.perf_counter(), time.process_time()
  while time.perf_counter() - start < seconds:
    call()
    count += 1
  passed = time.perf_counter() - start, time.process_time() - cpu
  return images_per_call * count / passed[0], images_per_call * count / passed[1]


def routes(samples, crop: int, batch: int, devices: int, turns: int) -> dict:
  """Measures both routes in turns; returns {route: best (images/s, images/s of CPU time)}."""
  options = dict(crop=crop, batch_size=batch, seed=0)
  the_mesh = mesh.make(devices, batch)
  memory = resident.Resident(samples, crop, the_mesh)
  drawn = data.train_iterator(samples, **options, on_device=True)
  numpy_route = data.train_iterator(samples, **options, prefetch=0)

  def device_route():
    placed = mesh.put_batch(next(drawn), the_mesh)
    jax.block_until_ready(memory.batch(placed["choice"]))

  calls = {
    "numpy, one thread": lambda: next(numpy_route),
    f"on {devices} device{'s' * (devices > 1)}": device_route,
  }
  found = {name: [] for name in calls}
  for _ in range(turns):
    for name, call in calls.items():
      found[name].append(rate(call, batch))
  drawn.close()
  return {name: tuple(map(max, zip(*rates, strict=True))) for name, rates in found.items()}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", help="folder of a dataset, or tfds:<builder>")
  parser.add_argument("--crop", type=int, default=448, help="pixels")
  parser.add_argument("--batch", type=int, default=16, help="images")
  parser.add_argument("--devices", type=int, default=os.cpu_count(), help="of a CPU, one a core")
  parser.add_argument("--turns", type=int, default=5)
  flags = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", flags.devices)
  print("| stage | images/s | of CPU time |\n| --- | ---: | ---: |")
  start = time.perf_counter()
  samples = data.load(flags.data, "train") if flags.data else 8 * data.scenes(50, 512, seed=1)
  stage = "read, decode, check (once a run)" if flags.data else "make scenes (once a run)"
  print(f"| {stage} | {len(samples) / (time.perf_counter() - start):.0f} | |")

  def show(name, rates):
    print(f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} |", flush=True)

  random = np.random.default_rng(0)
  crops = []

  def crop():
    crops.clear()
    for sample in samples:
      corner = augment.draw_corner(sample.mask, flags.crop, random)
      crops.append(augment.cut(sample.image, sample.mask, flags.crop, corner))

  def transform():
    for image, mask in crops:
      augment.apply(image, mask, augment.recipe(flags.crop, random))

  show(f"crop {flags.crop}×{flags.crop}", rate(crop, len(samples)))
  show("augment (recipe)", rate(transform, len(samples)))
  found = routes(samples, flags.crop, flags.batch, len(jax.devices()), flags.turns)
  for name, rates in found.items():
    show(f"batches of {flags.batch}, {name}", rates)
  first, second = found.values()
  print(f"ratio by the clock {second[0] / first[0]:.1f}, of CPU time {second[1] / first[1]:.1f}")


if __name__ == "__main__":
  main()
