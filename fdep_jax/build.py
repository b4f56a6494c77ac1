"""Builds data, prior and model from a config."""

import os
import re
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import ablations, data, priors
from fdep_jax.backbones import network_class
from fdep_jax.data import frames
from fdep_jax.fdep import FDEP
from fdep_jax.priors import Prior, dinov2

# ViT of the quick start, which needs no DINOv2 file.
RANDOM_PRIOR = {"width": 96, "depth": 4, "heads": 4}


class Images(NamedTuple):
  """A dataset as a run uses it."""

  train: list[data.Sample]  # without the held-out images
  val: list[data.Sample]  # held out of train; empty if the test split selects
  test: list[data.Sample]
  mean: float  # of grey levels / 255, over the whole train split
  std: float
  range: frames.Range = ""  # that became the grey levels; "": the images have 8 bits


def check_crop(config: ConfigDict) -> None:
  """Raises ValueError if the network cannot take crops of `data.crop` pixels."""
  stride = network_class(config.model.backbone).stride
  if config.data.crop % stride:
    nearest = max(round(config.data.crop / stride), 1) * stride
    raise ValueError(
      f"data.crop is {config.data.crop}; {config.model.backbone} needs a multiple of {stride}. "
      f"Use {nearest}."
    )


def check_inputs(config: ConfigDict) -> None:
  """Checks that the crop fits the network and that all files exist; one error names all missing.

  Raises:
    FileNotFoundError: data or weights are missing.
    ValueError: a setting does not fit the network.
  """
  check_crop(config)
  missing = []
  root, checkpoint = config.data.root, config.dino.checkpoint
  if root != "synthetic" and not root.startswith("tfds:") and not os.path.isdir(root):
    missing.append(
      f"data.root: there is no folder {_place(root)}. Download the dataset and lay it out as "
      "images/ masks/ splits/{train,test}.txt (docs/data.md), or set "
      "--config.data.root=PATH to a different folder."
    )
  if config.mode != "original" and checkpoint != "random" and not os.path.isfile(checkpoint):
    missing.append(
      f"dino.checkpoint: there is no file {_place(checkpoint)}. Download "
      "dinov2_vitl14_pretrain.pth from the facebookresearch/dinov2 repository (docs/data.md), or "
      "convert your own file with "
      "`python -m converters.dinov2 IN OUT` and set --config.dino.checkpoint=OUT."
    )
  if missing:
    raise FileNotFoundError("\n".join(missing))


def _place(path: str) -> str:
  """Returns the path, and where it leads from here if it is relative."""
  absolute = os.path.abspath(os.path.expanduser(path))
  return path if os.path.isabs(path) else f"{path} (here: {absolute})"


def load_images(config: ConfigDict) -> Images:
  """Reads both splits; mean and deviation are those of the train split."""
  if config.data.root == "synthetic":
    size = config.data.synthetic_size
    values, train = "", data.scenes(config.data.synthetic_train, size, seed=1)
  else:
    values = grey_range(config)
    train = data.load(config.data.root, "train", values=values)
  test = load_test(config, values)
  mean, std = data.statistics(train)
  val = []
  if config.eval.select_on == "val":
    train, val = data.split_validation(train, config.data.val_fraction, seed=0)
  return Images(train, val, test, mean, std, values)


def load_test(config: ConfigDict, values: frames.Range = "") -> list[data.Sample]:
  """Reads the test split; `values` is the range of its grey levels."""
  if config.data.root == "synthetic":
    return data.scenes(config.data.synthetic_test, config.data.synthetic_size, seed=2)
  return data.load(config.data.root, "test", values=values)


def grey_range(config: ConfigDict) -> frames.Range:
  """Returns the range that becomes the grey levels of the whole dataset, `data.range` resolved."""
  if config.data.range == "auto":
    return data.measure_range(config.data.root)
  return frames.parse_range(config.data.range) if config.data.range else ""


def load_prior(config: ConfigDict) -> Prior | None:
  """Loads DINOv2 with the levels to fuse; returns None if only the detector is trained."""
  if config.mode == "original":
    return None
  import converters
  from converters.dinov2 import fingerprint

  dtype = jnp.dtype(config.dino.dtype)
  variable = nnx.Param if config.dino.unfreeze else dinov2.Frozen
  if config.dino.checkpoint == "random":
    vit = dinov2.DINOv2(**RANDOM_PRIOR, dtype=dtype, variable=variable, rngs=nnx.Rngs(0))
    sha256 = "random"
  else:
    vit = converters.load_dinov2(config.dino.checkpoint, dtype=dtype, variable=variable)
    sha256 = fingerprint(config.dino.checkpoint)
  return priors.from_module(vit, fused_levels(config, vit.depth), dinov2.prepare, sha256)


def check_prior(sha256: str | None, saved: dict, workdir, config: ConfigDict) -> None:
  """Raises ValueError if a checkpoint was trained with DINOv2 weights of a different SHA-256.

  Args:
    sha256: of the weights at hand.
    saved: the JSON object of the checkpoint.
    workdir, config: of the run.
  """
  if sha256 != saved["dino_sha256"]:
    raise ValueError(
      f"{workdir} was trained with different DINOv2 weights (SHA-256 {saved['dino_sha256']}) than "
      f"{config.dino.checkpoint} ({sha256}). Put back the file it was trained with, or name it: "
      "--config.dino.checkpoint=FILE."
    )


def fused_levels(config: ConfigDict, depth: int) -> tuple[int, ...]:
  """Returns the 0-based blocks to fuse, of a ViT with `depth` blocks."""
  levels = tuple(config.dino.levels) or dinov2.quarter_levels(depth)
  wrong = [level for level in levels if not 0 <= level < depth]
  if wrong:
    raise ValueError(f"dino.levels names blocks {wrong}; this ViT has 0 to {depth - 1}.")
  return levels


def create_model(config: ConfigDict, prior: Prior | None) -> FDEP:
  """Builds the model that the config trains, initialised from its seed.

  Without a prior the model has the light branch only.
  """
  rngs = nnx.Rngs(config.seed)
  width, num_levels = (prior.width, len(prior.blocks)) if prior else (0, 0)
  network = (config.model.backbone, width, num_levels, config.model.fusion)
  if prior and config.model.on_dino != "no":
    model = ablations.OnDino(config.model.on_dino, width, num_levels, rngs=rngs)
  elif prior and config.model.share != "both":
    model = ablations.PartlyShared(config.model.share, *network, rngs=rngs)
  else:
    # A main branch trained alone shares its decoder with no other branch.
    bn_stats = config.model.bn_stats if config.mode == "fdep" else "shared"
    model = FDEP(*network, bn_stats=bn_stats, rngs=rngs)
  if prior and not prior.frozen:
    model = ablations.Unfrozen(model, prior.model, prior.blocks)
  return model


def vit_arguments(checkpoint: str) -> dict:
  """Derives the arguments of `DINOv2` from a file name; the file need not exist.

  Raises:
    ValueError: the name does not contain the ViT's size.
  """
  if checkpoint == "random":
    return RANDOM_PRIOR
  name = os.path.basename(checkpoint).lower()
  size = re.search(r"vit[-_]?([sblg])[-_]?14", name)
  if not size:
    raise ValueError(
      f"dino.checkpoint is {checkpoint!r}, whose name does not contain the ViT's size. "
      "Plans read no weights: give a name such as dinov2_vitl14_pretrain.pth (s, b, l or g; the "
      "file need not exist)."
    )
  return {**dinov2.SIZES[f"vit{size.group(1)}14"], "registers": 4 if "reg" in name else 0}


def abstract(config: ConfigDict) -> tuple[Prior | None, nnx.Module]:
  """Builds prior and model as shapes only, without memory or weights.

  Raises:
    ValueError: the name of `dino.checkpoint` does not contain the ViT's size.
  """
  prior = None
  if config.mode != "original":
    options = {**vit_arguments(config.dino.checkpoint), "dtype": jnp.dtype(config.dino.dtype)}
    vit = nnx.eval_shape(lambda: dinov2.DINOv2(**options, rngs=nnx.Rngs(0)))
    prior = priors.from_module(vit, fused_levels(config, vit.depth), dinov2.prepare, "abstract")
  return prior, nnx.eval_shape(lambda: create_model(config, prior))


def count_parameters(params: nnx.State) -> int:
  """Counts parameters (P of the paper), DINOv2 excluded even when trained."""
  flat = nnx.to_flat_state(params)
  return sum(leaf.size for path, leaf in flat if path[0] != "vit")


def parameters(config: ConfigDict) -> int:
  """Counts the parameters (P of the paper) of the model that a config builds, without weights.

  Raises:
    ValueError: the name of `dino.checkpoint` does not contain the ViT's size.
  """
  config = config.copy_and_resolve_references()
  config.model.bn_stats = "shared"  # same count; saves tracing the decoder
  return count_parameters(nnx.state(abstract(config)[1], nnx.Param))
