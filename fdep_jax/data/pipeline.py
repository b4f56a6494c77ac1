"""Makes batches: an endless stream that resumes exactly, to train; padded groups, to evaluate."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fdep_jax.data import augment as augment_lib
from fdep_jax.data import samples as sample_lib
from fdep_jax.data.samples import Sample, Statistic


@dataclasses.dataclass(frozen=True)
class CropBank:
  """A fixed set of augmented crops of every image; each crop depends on its number alone.

  OUR CHOICE; the paper's recipe draws new crops at every step. A frozen network's levels of a fixed
  crop need computing only once (`fdep_jax.priors.bank`). Place and geometry of a crop are drawn
  once. Brightness, contrast and noise are drawn anew at every use: the detector's input keeps the
  recipe's distribution, and the frozen network sees the crop without them.

  Args:
    samples: N samples.
    per_image: K. Crop number g·K·N + i, i < K·N, is crop i // N of sample i % N in generation g.
    refresh_steps: steps after which a new generation of crops is drawn; 0: never.
    size, augment, target_crop_prob, crop_margin, seed: as `train_iterator`.
  """

  samples: Sequence[Sample]
  per_image: int
  size: int
  seed: int
  augment: str = "recipe"
  target_crop_prob: float = 0.0
  crop_margin: int = 0
  refresh_steps: int = 0

  def __len__(self) -> int:
    return len(self.samples) * self.per_image

  def generation(self, step: int) -> int:
    """Returns how often the crops have been drawn anew before `step` (0-based)."""
    return step // self.refresh_steps if self.refresh_steps else 0

  def place(self, number: int) -> int:
    """Returns the place of a crop's sample in `samples`."""
    return number % len(self) % len(self.samples)

  def draw(self, number: int, mask: np.ndarray) -> tuple[tuple[int, int], list[augment_lib.Step]]:
    """Draws a crop's corner and steps; `mask` is that of its sample."""
    # 0xBA17 keeps these random numbers apart from all others that are drawn with the seed.
    rng = np.random.default_rng([0xBA17, self.seed, number])
    corner = augment_lib.draw_corner(mask, self.size, rng, self.target_crop_prob, self.crop_margin)
    return corner, augment_lib.BANKED[self.augment][0](self.size, rng)

  def crop(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a crop's image, size×size×3 uint8, and mask, size×size bool."""
    sample = self.samples[self.place(number)]
    corner, steps = self.draw(number, sample.mask)
    pair = augment_lib.cut(sample.image, sample.mask, self.size, corner)
    return augment_lib.apply(*pair, steps)


def train_iterator(
  samples: Sequence[Sample],
  *,
  crop: int,
  batch_size: int,
  seed: int,
  augment: str = "recipe",
  target_crop_prob: float = 0.0,
  crop_margin: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
  threads: int = 1,
  bank: CropBank | None = None,
  on_device: bool = False,
):
  """Returns endless batches {"image": b×crop×crop×3 uint8, "mask": b×crop×crop bool}.

  One global stream of records is shuffled anew each epoch, cropped, augmented and cut into
  batches of `batch_size`. A record's random numbers depend only on `seed` and on its place in the
  stream. Process p of n gets rows [p·b/n, (p+1)·b/n) of every batch, so any number of processes
  trains on the same global batches. A batch may span two epochs, so each image occurs exactly once
  in every `len(samples)` records (OUR CHOICE: a short last batch would compile a second time, and a
  dropped one would lose images).

  Args:
    crop: side of the training window, pixels.
    batch_size: images in the global batch; must be divisible by `process_count`.
    augment: "recipe" (the paper's), "dihedral" or "none".
    target_crop_prob, crop_margin: see `augment.draw_corner`; the paper's are 0.
    prefetch: batches made ahead; 0: each is made on request.
    threads: threads that make batches; their number does not change the batches.
    bank: the crops to draw from, each once in K epochs; its own settings replace those given here.
      Batches then also contain "crop", b int64: the crops' numbers.
    on_device: batches hold "choice", b×N int32, instead: `resident.Resident` makes the same pixels.

  Returns:
    A grain iterator. `get_state()` returns {"next_index": step}; `set_state` continues at any step
    with bit-identical batches, even if `prefetch`, `threads`, `process_count` and `on_device` have
    changed. `close()` ends its threads.
  """
  if not samples:
    raise ValueError("no samples to train on")
  _check(augment, crop, batch_size, process_count, target_crop_prob, crop_margin)
  import grain

  def record(number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    place = bank.place(number) if bank else number
    sample = samples[place]
    # What is drawn of a record is drawn here, whichever route computes its pixels.
    if bank:
      corner, steps = bank.draw(number, sample.mask)
      steps += augment_lib.BANKED[bank.augment][1](bank.size, rng)
    else:
      corner = augment_lib.draw_corner(sample.mask, crop, rng, target_crop_prob, crop_margin)
      steps = augment_lib.AUGMENTATIONS[augment](crop, rng)
    found = {"crop": np.int64(number)} if bank else {}
    if on_device:
      return found | {"choice": augment_lib.packed(place, corner, steps, drawn_twice=bool(bank))}
    pair = augment_lib.cut(sample.image, sample.mask, bank.size if bank else crop, corner)
    image, mask = augment_lib.apply(*pair, steps)
    return found | {"image": image, "mask": mask}

  # grain adds the epoch to the seed. Hashed, seed 1 does not begin with seed 0's second epoch.
  shuffle_seed, record_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
  count = len(bank) if bank else len(samples)
  stream = grain.MapDataset.range(count).shuffle(seed=shuffle_seed).repeat()
  if bank:
    stream = stream.map_with_index(
      lambda place, i: bank.generation(place // batch_size) * len(bank) + i
    )
  stream = stream.random_map(record, seed=record_seed)
  # Batches have one process's size: number step·n + p contains process p's rows of that step. (An
  # endless stream has no remainder, but grain's count of it overflows for batches of one.)
  batches = stream.batch(batch_size // process_count, drop_remainder=True)
  batches = batches[process_index::process_count]
  options = grain.ReadOptions(
    num_threads=threads if prefetch else 0, prefetch_buffer_size=max(prefetch, 0)
  )
  return iter(batches.to_iter_dataset(options))


def _check(augment, crop, batch_size, process_count, target_crop_prob, crop_margin) -> None:
  """Raises if `train_iterator` cannot work with these arguments."""
  if augment not in augment_lib.AUGMENTATIONS:
    known = ", ".join(repr(name) for name in augment_lib.AUGMENTATIONS)
    raise ValueError(f"augment is {augment!r}; it must be one of {known}")
  if crop < 1 or batch_size < 1:
    raise ValueError(f"crop is {crop} and batch_size {batch_size}; both must be at least 1")
  if batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size}, which {process_count} processes cannot share equally"
    )
  if not 0 <= target_crop_prob <= 1:
    raise ValueError(f"target_crop_prob is {target_crop_prob}; it must be in [0, 1]")
  if crop_margin < 0:
    raise ValueError(f"crop_margin is {crop_margin}; it must not be negative")


def padded_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
  """Rounds (height, width) up to multiples."""
  height, width = (-(-side // multiple) * multiple for side in size)
  return height, width


def eval_batches(
  samples: Sequence[Sample],
  multiple: int = 32,
  batch_size: int = 16,
  *,
  row_multiple: int = 1,
  fill: Statistic = 0.0,
) -> Iterator[dict[str, Any]]:
  """Yields whole images, padded at the right and bottom and grouped by padded shape.

  Images are never resized.

  Args:
    multiple: each side is padded to a multiple of this; 32 as in the reference.
    batch_size: the most images in a batch.
    row_multiple: batches have a multiple of this many rows (the number of devices).
    fill: grey level / 255 of the padding.

  Yields:
    {"image": B×H×W×3 uint8, "sizes": [(height, width), …], "indices": [place in `samples`, …]}.
    Images are float32 if `fill` is not 0. All batches of a shape have the same B, so that each
    shape compiles once. The last one is filled up with empty images; its `sizes` and `indices` are
    then shorter than B. Shapes come in the order of their first image, images of a shape in the
    given order.
  """
  if batch_size < 1 or batch_size % row_multiple:
    raise ValueError(
      f"batch_size is {batch_size}; it must be a positive multiple of row_multiple, {row_multiple}"
    )
  levels = 255 * np.asarray(fill, np.float32)
  dtype = np.float32 if levels.any() else np.uint8
  groups: dict[tuple[int, int], list[int]] = {}
  all_sizes = sample_lib.sizes(samples)
  for i, size in enumerate(all_sizes):
    groups.setdefault(padded_size(size, multiple), []).append(i)

  def batches():
    for (height, width), members in groups.items():
      rows = -(-len(members) // -(-len(members) // batch_size))  # as even as possible
      rows = -(-rows // row_multiple) * row_multiple
      for start in range(0, len(members), rows):
        indices = members[start : start + rows]
        sizes = [all_sizes[i] for i in indices]
        image = np.empty((rows, height, width, 3), dtype)
        image[...] = levels
        for row, (i, (h, w)) in enumerate(zip(indices, sizes, strict=True)):
          image[row, :h, :w] = samples[i].image
        yield {"image": image, "sizes": sizes, "indices": indices}

  return batches()
