"""TFDS builders that need no TensorFlow: nuaa_sirst, nudt_sirst, irstd1k, sirst3.

Fetch the images by hand into the manual directory: a folder per dataset, named NUAA-SIRST,
NUDT-SIRST, IRSTD-1K or SIRST3 (also irstd_1k and the like), in any layout of `folders.py`. SIRST3
may be a folder of the other three.

Files are ArrayRecord, the only format that TFDS reads and writes without TensorFlow. Examples keep
the order of the split files. Each contains the decoded pair as PNG (RGB image; mask of 0 and 255),
so that other programs can read it too.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from fdep_jax.data import folders, samples


class _FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Copies a folder that passes the checks of `folders.read` into ArrayRecord files."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = __doc__
  # TFDS 4.9.10 finds this path with importlib_resources, a dependency that it does not declare.
  code_path = epath.Path(__file__)
  FOLDER: str  # one of folders.KNOWN_COUNTS

  def __init__(self, *, file_format="array_record", **kwargs):
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    image, mask = (
      tfds.features.Image(shape=(None, None, channels), encoding_format="png")
      for channels in (3, 1)
    )
    features = {"name": tfds.features.Text(), "image": image, "mask": mask}
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.FOLDER}: infrared frames with pixel masks of their small targets.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    root = find_folder(dl_manager.manual_dir, self.FOLDER)
    folders.validate(root)
    return {split: self._generate_examples(root, split) for split in folders.SPLITS}

  def _generate_examples(self, root, split):
    for i, sample in enumerate(folders.read(root, split)):
      mask = sample.mask.astype(np.uint8) * 255
      yield i, {"name": sample.name, "image": _png(sample.image), "mask": _png(mask)}


class NuaaSirst(_FolderBuilder):
  FOLDER = "NUAA-SIRST"


class NudtSirst(_FolderBuilder):
  FOLDER = "NUDT-SIRST"


class Irstd1k(_FolderBuilder):
  FOLDER = "IRSTD-1K"


class Sirst3(_FolderBuilder):
  FOLDER = "SIRST3"


BUILDERS = {builder.name: builder for builder in (NuaaSirst, NudtSirst, Irstd1k, Sirst3)}


def find_folder(manual_dir: str | Path, name: str) -> Path:
  """Finds the subfolder of the dataset `name`; raises MissingDataError if there is none."""
  manual_dir = Path(manual_dir)
  children = sorted(p for p in manual_dir.glob("*") if p.is_dir())
  found = [p for p in children if folders.known_name(p) == name]
  if not found:
    raise folders.MissingDataError(
      f"{manual_dir}: no folder {name} here. Fetch the dataset by hand and put it there, or name "
      "the folder above it as manual_dir"
    )
  return next((p for p in found if p.name == name), found[0])


def read_tfds(
  name: str,
  split: str,
  data_dir: str | Path | None = None,
  manual_dir: str | Path | None = None,
  lazy: bool = False,
) -> Sequence[samples.Sample]:
  """Reads the same samples in the same order as `folders.read`, from a TFDS dataset.

  The dataset is prepared on first use only. If the folder changes, delete <data_dir>/<name>.

  Args:
    name: a key of `BUILDERS`.
    split: "train", "test" or "all" (train, then test).
    data_dir: TFDS's own folder; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    manual_dir: see the top of this file; None: <data_dir>/downloads/manual.
    lazy: decodes every sample each time it is asked for, as `folders.read`.

  Raises:
    DataError: as `folders.read`, when the dataset has to be prepared first.
  """
  if name not in BUILDERS:
    raise ValueError(f"there is no TFDS dataset {name!r}; known: {', '.join(BUILDERS)}")
  if split not in (*folders.SPLITS, "all"):
    raise ValueError(f"split is {split!r}; it must be 'train', 'test' or 'all'")
  builder = BUILDERS[name](data_dir=None if data_dir is None else str(data_dir))
  if not builder.is_prepared():
    manual = Path(manual_dir or Path(builder.data_dir).parents[1] / "downloads" / "manual")
    find_folder(manual, builder.FOLDER)
    config = tfds.download.DownloadConfig(manual_dir=str(manual))
    builder.download_and_prepare(download_config=config)
  skip = tfds.decode.SkipDecoding()
  source = builder.as_data_source(
    split="train+test" if split == "all" else split, decoders={"image": skip, "mask": skip}
  )
  if not lazy:
    return [_sample(source[i]) for i in range(len(source))]
  sizes = [_sample(source[i]).mask.shape for i in range(len(source))]
  return samples.LazySamples(lambda place: _sample(source[place]), sizes)


def _sample(example) -> samples.Sample:
  mask, _ = samples.decode_mask(example["mask"])
  name = example["name"].decode()
  return samples.Sample(name, samples.decode_image(example["image"]), mask)


def _png(array: np.ndarray) -> bytes:
  stream = io.BytesIO()
  Image.fromarray(array).save(stream, "PNG")
  return stream.getvalue()
