"""Datasets from folders, TFDS or thin air, their augmentation, and batches of them."""

from pathlib import Path

from fdep_jax.data.folders import DataError, MissingDataError, read, validate
from fdep_jax.data.pipeline import CropBank, canvas_size, eval_batches, padded_size, train_iterator
from fdep_jax.data.samples import Sample, split_validation, statistics
from fdep_jax.data.synthetic import scenes

__all__ = [
  "CropBank",
  "DataError",
  "MissingDataError",
  "Sample",
  "canvas_size",
  "eval_batches",
  "load",
  "padded_size",
  "read",
  "read_tfds",
  "scenes",
  "split_validation",
  "statistics",
  "train_iterator",
  "validate",
]


def read_tfds(
  name: str,
  split: str,
  data_dir: str | Path | None = None,
  manual_dir: str | Path | None = None,
) -> list[Sample]:
  """See `tfds_builders.read_tfds`; imports tensorflow_datasets only when called."""
  from fdep_jax.data import tfds_builders

  return tfds_builders.read_tfds(name, split, data_dir, manual_dir)


def load(
  root: str | Path,
  split: str,
  data_dir: str | Path | None = None,
  manual_dir: str | Path | None = None,
) -> list[Sample]:
  """`read(root, split)`, or `read_tfds` where `root` is "tfds:<name>", such as "tfds:sirst3"."""
  if str(root).startswith("tfds:"):
    return read_tfds(str(root).removeprefix("tfds:"), split, data_dir, manual_dir)
  return read(root, split)
