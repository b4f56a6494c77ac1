"""Measures the input pipeline's images a second, stage by stage.

  python -m benchmarks.input --data ../data/NUAA-SIRST

Without --data, uses synthetic scenes of 256×256. As in training, threads of this process do the
work, not worker processes. Compare the last rows with the images a second that a run prints.
"""

import argparse
import time

import numpy as np

from fdep_jax import data
from fdep_jax.data import augment


def rate(call, images_per_call: int, seconds: float = 2.0) -> float:
  """Measures the images a second of a call, repeated for `seconds`."""
  call()
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    call()
    count += 1
  return images_per_call * count / (time.perf_counter() - start)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", help="folder of a dataset, or tfds:<builder>")
  parser.add_argument("--crop", type=int, default=448, help="pixels")
  parser.add_argument("--batch", type=int, default=16, help="images")
  flags = parser.parse_args()
  print("| stage | images/s |\n| --- | ---: |")
  start = time.perf_counter()
  samples = data.load(flags.data, "train") if flags.data else data.scenes(100, 256, seed=1)
  stage = "read, decode, check (once a run)" if flags.data else "make scenes (once a run)"
  print(f"| {stage} | {len(samples) / (time.perf_counter() - start):.0f} |")

  random = np.random.default_rng(0)
  crops = [augment.random_crop(s.image, s.mask, flags.crop, random) for s in samples]

  def crop():
    for sample in samples:
      augment.random_crop(sample.image, sample.mask, flags.crop, random)

  def transform():
    for image, mask in crops:
      augment.recipe(image, mask, random)

  print(f"| crop {flags.crop}×{flags.crop} | {rate(crop, len(samples)):.0f} |")
  print(f"| augment (recipe) | {rate(transform, len(samples)):.0f} |")
  for threads in (1, 2):
    stream = data.train_iterator(
      samples, crop=flags.crop, batch_size=flags.batch, seed=0, threads=threads
    )
    images = rate(lambda: next(stream), flags.batch)  # noqa: B023 - used up before the next
    stream.close()
    print(f"| batches of {flags.batch}, {threads} thread{'s' * (threads > 1)} | {images:.0f} |")


if __name__ == "__main__":
  main()
