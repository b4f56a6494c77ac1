"""Datasets (folders, TFDS, synthetic scenes), their augmentation, and batches."""

from collections.abc import Sequence
from pathlib import Path

from fdep_jax.data import frames
from fdep_jax.data.folders import (
  DataError,
  MissingDataError,
  check_all,
  check_named,
  check_range,
  has_split,
  measure_range,
  parts,
  read,
  validate,
)
from fdep_jax.data.pipeline import CropBank, eval_batches, padded_size, train_iterator
from fdep_jax.data.samples import (
  LazySamples,
  Sample,
  Statistic,
  check_contrast,
  draw,
  fingerprint,
  sizes,
  split_validation,
  statistics,
)
from fdep_jax.data.synthetic import scenes

__all__ = [
  "CropBank",
  "DataError",
  "LazySamples",
  "MissingDataError",
  "Sample",
  "Statistic",
  "check_all",
  "check_contrast",
  "check_named",
  "draw",
  "eval_batches",
  "fingerprint",
  "has_split",
  "load",
  "measure_range",
  "padded_size",
  "parts",
  "read",
  "read_tfds",
  "scenes",
  "sizes",
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
  lazy: bool = False,
) -> Sequence[Sample]:
  """Calls `tfds_builders.read_tfds`; tensorflow_datasets is imported only then."""
  from fdep_jax.data import tfds_builders

  return tfds_builders.read_tfds(name, split, data_dir, manual_dir, lazy)


def load(
  root: str | Path,
  split: str,
  data_dir: str | Path | None = None,
  manual_dir: str | Path | None = None,
  values: frames.Range = "",
  lazy: bool = False,
  option: str = frames.OPTION,
) -> Sequence[Sample]:
  """Reads a dataset from a folder, or by `read_tfds` if `root` is "tfds:<name>" (tfds:sirst3).

  `values` is the range of a folder's images, as for `read`; `lazy` and `option` are as there.
  A range for TFDS is refused.
  """
  check_named(root)
  if values:
    check_range(root, option)
  if str(root).startswith("tfds:"):
    return read_tfds(str(root).removeprefix("tfds:"), split, data_dir, manual_dir, lazy)
  return read(root, split, values, lazy, option)
