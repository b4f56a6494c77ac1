"""Stores the prior bank: DINOv2's levels of a fixed set of crops, computed once, read from disk.

The prior is frozen, so its levels of a crop never change. With ViT-L/14 at 448×448 computing them
takes four fifths of a step. OUR CHOICE, off by default: the paper's recipe draws new crops at every
step.

Files, below `generation_<g>/`: `bank.json` (weights, levels and crops used), `shard_<p>.bin`
(bfloat16, crops×levels×h×w×D, written by process p, memory-mapped) and `shard_<p>.done` (number of
crops written).
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from fdep_jax.data import CropBank
from fdep_jax.priors import NORMALISATIONS, Normalisation, Prior
from fdep_jax.runtime import files, mesh

_DTYPE = np.dtype(ml_dtypes.bfloat16)


def _listed(normalisation: Normalisation) -> list[list[float]]:
  return [list(values) for values in normalisation]


# What banks were made with that do not say so.
_BEFORE = {"normalisation": _listed(NORMALISATIONS["imagenet"])}


class Bank:
  """The levels of every crop of a `CropBank`.

  Args:
    folder: of the bank; created when needed.
    crops: the crops to store levels for.
    prior: computes the levels.
    keep_old: keep the levels of earlier generations of crops.

  Raises:
    ValueError: `folder` contains a bank of different weights, levels or crops, or its disk is too
      full.
  """

  def __init__(
    self, folder: pathlib.Path, crops: CropBank, prior: Prior, *, keep_old: bool = False
  ):
    self._folder, self._crops, self._prior, self._keep_old = folder, crops, prior, keep_old
    side = -(-crops.size // prior.patch)
    self.shape = (len(prior.blocks), side, side, prior.width)  # of one crop
    self._generation = -1
    self._shards: list[np.memmap] = []
    self._identity = {
      "format": 1,
      "dino_sha256": prior.sha256,
      "dino_dtype": str(jnp.dtype(prior.model.dtype)),
      "normalisation": _listed(prior.prepare.normalisation),
      "levels": list(prior.blocks),
      "crop": crops.size,
      "crops": len(crops),
      "seed": crops.seed,
      "augment": crops.augment,
      "target_crop_prob": crops.target_crop_prob,
      "crop_margin": crops.crop_margin,
      "data_sha256": _fingerprint(crops),
    }
    for path in sorted(folder.glob("generation_*/bank.json")):
      self._check_identity(path)
    self._check_room()

  @property
  def bytes_per_crop(self) -> int:
    return int(np.prod(self.shape)) * _DTYPE.itemsize

  def levels(self, numbers: Sequence[int]) -> list[np.ndarray]:
    """Reads the levels of crops, each B×h×w×D bfloat16; call `prepare` before.

    Args:
      numbers: of the B crops, all of one generation.
    """
    rows = [int(number) % len(self._crops) for number in numbers]
    per_shard = len(self._shards[0])
    crops = np.stack([self._shards[row // per_shard][row % per_shard] for row in rows])
    return list(crops.view(_DTYPE).swapaxes(0, 1))

  def prepare(self, step: int, batch_size: int, the_mesh, progress: bool = True) -> None:
    """Ensures that the levels needed at `step` (0-based) are on disk.

    All processes must call it. It continues where an interrupted call stopped.

    Args:
      step: training step.
      batch_size: crops to compute at once.
      the_mesh: devices to compute on.
      progress: show a progress bar.
    """
    generation = self._crops.generation(step)
    if generation == self._generation:
      return
    self._shards = []
    self._make(
      self._folder / f"generation_{generation}", generation, batch_size, the_mesh, progress
    )
    self._generation = generation
    if mesh.writes() and not self._keep_old:
      for old in self._folder.glob("generation_*"):
        if old.name != f"generation_{generation}":
          shutil.rmtree(old)

  def _make(self, folder, generation: int, batch_size: int, the_mesh, progress: bool) -> None:
    # The least: another run may fill the bank between two processes' looks at it.
    if not mesh.minimum(self._complete(folder)):
      # Runs that share the folder wait for the one that fills it.
      with files.locked(folder, wait=True) if mesh.writes() else contextlib.nullcontext():
        _barrier("bank begins")
        self._check_identity(folder / "bank.json")
        if mesh.writes():
          self._describe(folder, generation)
        _barrier("bank is described")
        if _shard_count(folder) == jax.process_count():  # or another run has filled it meanwhile
          self._fill(folder, generation, batch_size, the_mesh, progress)
        _barrier("bank is full")
    self._check_identity(folder / "bank.json")  # again: different runs may begin at the same time
    shards = _shard_count(folder)
    shape = (self._per_shard(shards), *self.shape)
    self._shards = [
      np.memmap(folder / f"shard_{p}.bin", np.uint16, "r", shape=shape) for p in range(shards)
    ]

  def _describe(self, folder: pathlib.Path, generation: int) -> None:
    """Writes `bank.json` for the processes of this run, unless the bank is complete.

    Shards that a different number of processes began hold other crops, so they are removed.
    """
    if self._complete(folder):
      return
    shards, count = _shard_count(folder), jax.process_count()
    if shards != count:
      if shards:
        logging.info("%s was begun by %d processes; starting again", folder, shards)
      for path in folder.glob("shard_*"):
        path.unlink()
    described = self._identity | {"generation": generation, "shards": count}
    files.write(folder / "bank.json", json.dumps(described, indent=2))

  def _fill(self, folder, generation, batch_size, the_mesh, progress) -> None:
    """Writes this process's shard. Every process computes equally many batches."""
    process, count = jax.process_index(), jax.process_count()
    rows = max(batch_size // count, the_mesh.devices.size // count)
    compute = _levels_of(the_mesh)
    prior = self._prior.placed(the_mesh)
    per_shard = self._per_shard(count)
    shape = (per_shard, *self.shape)
    bin_path, done_path = folder / f"shard_{process}.bin", folder / f"shard_{process}.done"
    done = int(done_path.read_text()) if done_path.exists() and bin_path.exists() else 0
    shard = np.memmap(bin_path, np.uint16, "r+" if done else "w+", shape=shape)
    first = int(mesh.minimum(done))
    logging.info(
      "prior bank: %d crops, %.2f GB, in %s", len(self._crops), self._total() / 1e9, self._folder
    )
    hidden = None if progress and mesh.writes() else True
    with tqdm(total=per_shard, initial=first, unit="crop", desc="bank", disable=hidden) as bar:
      for start in range(first, per_shard, rows):
        places = [min(start + i, per_shard - 1) for i in range(rows)]
        numbers = [min(process * per_shard + place, len(self._crops) - 1) for place in places]
        image = np.stack(
          [self._crops.crop(generation * len(self._crops) + number)[0] for number in numbers]
        )
        levels = mesh.local_rows(compute(prior, mesh.put_batch(image, the_mesh)))
        end = min(start + rows, per_shard)
        shard[start:end] = levels[: end - start].view(np.uint16)
        shard.flush()
        files.write(done_path, str(end))
        bar.update(end - start)

  def _complete(self, folder: pathlib.Path) -> bool:
    shards = _shard_count(folder)
    done = [folder / f"shard_{p}.done" for p in range(shards)]
    return shards > 0 and all(
      path.exists() and int(path.read_text()) >= self._per_shard(shards) for path in done
    )

  def _per_shard(self, shards: int) -> int:
    return -(-len(self._crops) // shards)

  def _total(self) -> int:
    return len(self._crops) * self.bytes_per_crop

  def _check_identity(self, path: pathlib.Path) -> None:
    if not path.exists():
      return
    theirs = {**_BEFORE, **json.loads(path.read_text())}
    lines = [
      f"{key}: {theirs.get(key)} there, {value} here"
      for key, value in self._identity.items()
      if theirs.get(key) != value
    ]
    if lines:
      raise ValueError(
        "\n  ".join([f"{path.parent} contains a different prior bank:", *lines])
        + "\nDelete the folder, or set prior.bank_folder to a different one."
      )

  def _check_room(self) -> None:
    there = self._folder
    while not there.exists():
      there = there.parent
    used = sum(path.stat().st_blocks * 512 for path in self._folder.glob("generation_*/*.bin"))
    room = shutil.disk_usage(there).free + used
    if self._total() > room:
      fits = room // (self.bytes_per_crop * len(self._crops.samples))
      raise ValueError(
        f"prior.bank={self._crops.per_image} needs {self._total() / 1e9:.1f} GB in {self._folder} "
        f"({len(self._crops)} crops of {self.bytes_per_crop / 1e6:.2f} MB); {room / 1e9:.1f} GB "
        "are free. " + (f"prior.bank={fits} fits." if fits else "Not even prior.bank=1 fits.")
      )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if self._total() > memory:
      logging.info(
        "the prior bank (%.1f GB) is larger than the memory (%.1f GB): batches are read from disk",
        self._total() / 1e9, memory / 1e9,
      )  # fmt: skip


def _shard_count(folder: pathlib.Path) -> int:
  """Returns the number of processes that the bank was begun by; 0 if there is none."""
  path = folder / "bank.json"
  return json.loads(path.read_text())["shards"] if path.exists() else 0


def _levels_of(the_mesh) -> Callable:
  """Makes the jitted (prior, B×H×W×3 uint8) → B×levels×h×w×D bfloat16."""

  def levels(prior, image):
    return jax.numpy.stack(prior.levels(image), 1).astype(_DTYPE)

  return jax.jit(levels, out_shardings=mesh.split(the_mesh))


def _fingerprint(crops: CropBank) -> str:
  """Returns a SHA-256 of the images and masks that the crops are cut from."""
  digest = hashlib.sha256()
  for sample in crops.samples:
    digest.update(f"{sample.name} {sample.mask.shape}".encode())
    digest.update(np.ascontiguousarray(sample.image))
    digest.update(np.ascontiguousarray(sample.mask))
  return digest.hexdigest()


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)
