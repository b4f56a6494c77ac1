"""What a config names, made: the images, the frozen prior, the model."""

import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import data, dinov2
from fdep_jax.backbones import Logits, network_class
from fdep_jax.fdep import FDEP

# The quick start's stand-in where no DINOv2 file is given.
RANDOM_PRIOR = {"width": 96, "depth": 4, "heads": 4}


class Images(NamedTuple):
  """A dataset as a run uses it."""

  train: list[data.Sample]  # without the held-out images
  val: list[data.Sample]  # held out of train, or empty where selection is on the test split
  test: list[data.Sample]
  mean: float  # of grey levels / 255, over the whole train split
  std: float


class Prior(NamedTuple):
  """The frozen foundation model."""

  vit: dinov2.DINOv2
  levels: tuple[int, ...]  # 0-based blocks
  sha256: str  # of its weight file, or "random"


def check_inputs(config: ConfigDict) -> None:
  """Refuses a config whose crop does not fit or whose files are absent, naming all of it.

  Raises:
    FileNotFoundError: data or weights are missing.
    ValueError: a setting does not fit the network.
  """
  stride = network_class(config.model.backbone).stride
  if config.data.crop % stride:
    nearest = max(round(config.data.crop / stride), 1) * stride
    raise ValueError(
      f"data.crop is {config.data.crop}; {config.model.backbone} needs a multiple of {stride}. "
      f"Use {nearest}."
    )
  missing = []
  root, checkpoint = config.data.root, config.dino.checkpoint
  if root != "synthetic" and not root.startswith("tfds:") and not os.path.isdir(root):
    missing.append(
      f"data.root: there is no folder {root}. Download the dataset and lay it out as "
      "images/ masks/ splits/{train,test}.txt (README.md, “Data”), or name another folder with "
      "--config.data.root=PATH."
    )
  if config.mode != "original" and checkpoint != "random" and not os.path.isfile(checkpoint):
    missing.append(
      f"dino.checkpoint: there is no file {checkpoint}. Download dinov2_vitl14_pretrain.pth from "
      "the facebookresearch/dinov2 repository (README.md, “DINOv2”), or convert what you have with "
      "`python -m converters.dinov2 IN OUT` and name it with --config.dino.checkpoint=PATH."
    )
  if missing:
    raise FileNotFoundError("\n".join(missing))


def load_images(config: ConfigDict) -> Images:
  """Reads both splits; normalisation is the train split's."""
  if config.data.root == "synthetic":
    size = config.data.synthetic_size
    train = data.scenes(config.data.synthetic_train, size, seed=1)
    test = data.scenes(config.data.synthetic_test, size, seed=2)
  else:
    train = data.load(config.data.root, "train")
    test = data.load(config.data.root, "test")
  mean, std = data.statistics(train)
  val = []
  if config.eval.select_on == "val":
    train, val = data.split_validation(train, config.data.val_fraction, seed=0)
  return Images(train, val, test, mean, std)


def load_prior(config: ConfigDict) -> Prior | None:
  """DINOv2 and the levels to fuse; None where only the detector is trained."""
  if config.mode == "original":
    return None
  import converters
  from converters.dinov2 import fingerprint

  dtype = jnp.dtype(config.dino.dtype)
  if config.dino.checkpoint == "random":
    vit = dinov2.DINOv2(**RANDOM_PRIOR, dtype=dtype, rngs=nnx.Rngs(0))
    sha256 = "random"
  else:
    vit = converters.load_dinov2(config.dino.checkpoint, dtype=dtype)
    sha256 = fingerprint(config.dino.checkpoint)
  levels = tuple(config.dino.levels) or dinov2.quarter_levels(vit.depth)
  wrong = [level for level in levels if not 0 <= level < vit.depth]
  if wrong:
    raise ValueError(f"dino.levels names blocks {wrong}; this ViT has 0 to {vit.depth - 1}.")
  return Prior(vit, levels, sha256)


def create_model(config: ConfigDict, prior: Prior | None) -> FDEP:
  """The model that the config trains, freshly initialised from its seed."""
  return FDEP(
    config.model.backbone,
    dino_width=prior.vit.width if prior else 0,
    num_levels=len(prior.levels) if prior else 0,
    fusion=config.model.fusion,
    # Trained alone, the main branch is the only one that uses the decoder.
    bn_stats=config.model.bn_stats if config.mode == "fdep" else "shared",
    rngs=nnx.Rngs(config.seed),
  )


def branches(model: FDEP, mode: str, image: jax.Array, levels) -> dict[str, Logits]:
  """The trained branches' logits by name: "light" and "main" in mode fdep, else one of them."""
  if mode == "original":
    return {"light": model.light(image)}
  if mode == "fdep_wo_coisd":
    return {"main": model.main(image, levels)}
  main, light = model(image, levels)
  return {"light": light, "main": main}


def normalise(image: jax.Array, mean: float, std: float) -> jax.Array:
  """The detector's input from B×H×W×3 uint8, as PAL: one mean and deviation for all channels."""
  return (image.astype(jnp.float32) / 255 - mean) / std


def frozen_levels(prior: Prior, vit_state, graphdef, image: jax.Array) -> list[jax.Array]:
  """DINOv2's levels of B×H×W×3 uint8 images, outside every gradient."""
  vit = nnx.merge(graphdef, vit_state)
  prepared = dinov2.prepare(image.astype(jnp.float32) / 255)
  return [jax.lax.stop_gradient(level) for level in vit(prepared, prior.levels)]


def run_folder(path: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(path).expanduser()
