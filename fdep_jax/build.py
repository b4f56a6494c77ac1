"""Builds data, prior and model from a config."""

import math
import os
import re
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import ablations, data, priors
from fdep_jax.backbones import network_class
from fdep_jax.fdep import FDEP
from fdep_jax.priors import Prior, dinov2

# The quick start's stand-in where no DINOv2 file is given.
RANDOM_PRIOR = {"width": 96, "depth": 4, "heads": 4}


class Images(NamedTuple):
  """A dataset as a run uses it."""

  train: list[data.Sample]  # without the held-out images
  val: list[data.Sample]  # held out of train, or empty where selection is on the test split
  test: list[data.Sample]
  mean: float  # of grey levels / 255, over the whole train split
  std: float


def check_crop(config: ConfigDict) -> None:
  """Refuses a crop that the network cannot take."""
  stride = network_class(config.model.backbone).stride
  if config.data.crop % stride:
    nearest = max(round(config.data.crop / stride), 1) * stride
    raise ValueError(
      f"data.crop is {config.data.crop}; {config.model.backbone} needs a multiple of {stride}. "
      f"Use {nearest}."
    )


def check_inputs(config: ConfigDict) -> None:
  """Refuses a config whose crop does not fit or whose files are absent, naming all of it.

  Raises:
    FileNotFoundError: data or weights are missing.
    ValueError: a setting does not fit the network.
  """
  check_crop(config)
  missing = []
  root, checkpoint = config.data.root, config.dino.checkpoint
  if root != "synthetic" and not root.startswith("tfds:") and not os.path.isdir(root):
    missing.append(
      f"data.root: there is no folder {root}. Download the dataset and lay it out as "
      "images/ masks/ splits/{train,test}.txt (docs/data.md), or name another folder with "
      "--config.data.root=PATH."
    )
  if config.mode != "original" and checkpoint != "random" and not os.path.isfile(checkpoint):
    missing.append(
      f"dino.checkpoint: there is no file {checkpoint}. Download dinov2_vitl14_pretrain.pth from "
      "the facebookresearch/dinov2 repository (docs/data.md), or convert what you have with "
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
  variable = nnx.Param if config.dino.unfreeze else dinov2.Frozen
  if config.dino.checkpoint == "random":
    vit = dinov2.DINOv2(**RANDOM_PRIOR, dtype=dtype, variable=variable, rngs=nnx.Rngs(0))
    sha256 = "random"
  else:
    vit = converters.load_dinov2(config.dino.checkpoint, dtype=dtype, variable=variable)
    sha256 = fingerprint(config.dino.checkpoint)
  return priors.of(vit, fused_levels(config, vit.depth), dinov2.prepare, sha256)


def fused_levels(config: ConfigDict, depth: int) -> tuple[int, ...]:
  """0-based blocks of a ViT of `depth` that are fused."""
  levels = tuple(config.dino.levels) or dinov2.quarter_levels(depth)
  wrong = [level for level in levels if not 0 <= level < depth]
  if wrong:
    raise ValueError(f"dino.levels names blocks {wrong}; this ViT has 0 to {depth - 1}.")
  return levels


def create_model(config: ConfigDict, prior: Prior | None) -> FDEP:
  """The model that the config trains, freshly initialised from its seed.

  Without a prior the light branch alone; an ablation's model where the config asks for one.
  """
  rngs = nnx.Rngs(config.seed)
  width, num_levels = (prior.width, len(prior.blocks)) if prior else (0, 0)
  network = (config.model.backbone, width, num_levels, config.model.fusion)
  if prior and config.model.on_dino != "no":
    model = ablations.OnDino(config.model.on_dino, width, num_levels, rngs=rngs)
  elif prior and config.model.share != "both":
    model = ablations.PartlyShared(config.model.share, *network, rngs=rngs)
  else:
    # Trained alone, the main branch is the only one that uses the decoder.
    bn_stats = config.model.bn_stats if config.mode == "fdep" else "shared"
    model = FDEP(*network, bn_stats=bn_stats, rngs=rngs)
  if config.model.start_prob:
    _start_heads(model, config.model.start_prob)
  if prior and not prior.frozen:
    model = ablations.Unfrozen(model, prior.model, prior.blocks)
  return model


def _start_heads(model: nnx.Module, probability: float) -> None:
  """Sets the last bias of every head to the log odds of `probability`.

  Source: Lin et al., Focal Loss for Dense Object Detection, §4.1.

  Raises:
    ValueError: the network has no `head` or `heads` that ends in a bias of one channel.
  """
  params = nnx.state(model, nnx.Param)
  found = 0
  for path, leaf in nnx.to_flat_state(params):
    if {"head", "heads"} & set(path) and path[-1] == "bias" and leaf.shape == (1,):
      leaf.set_value(jnp.full_like(leaf[...], math.log(probability / (1 - probability))))
      found += 1
  if not found:
    raise ValueError(
      "model.start_prob sets the last bias of what a network calls `head` or `heads`; this one has "
      "none. Rename it there, or use model.start_prob=0."
    )
  nnx.update(model, params)


def vit_arguments(checkpoint: str) -> dict:
  """Keywords of `DINOv2` from a file's name; the file need not exist.

  Raises:
    ValueError: the name does not tell the size.
  """
  if checkpoint == "random":
    return RANDOM_PRIOR
  name = os.path.basename(checkpoint).lower()
  size = re.search(r"vit[-_]?([sblg])[-_]?14", name)
  if not size:
    raise ValueError(
      f"dino.checkpoint is {checkpoint!r}, whose name does not tell the ViT's size. Plans read no "
      "weights: name a file such as dinov2_vitl14_pretrain.pth (s, b, l, g; it need not exist)."
    )
  return {**dinov2.SIZES[f"vit{size.group(1)}14"], "registers": 4 if "reg" in name else 0}


def abstract(config: ConfigDict) -> tuple[Prior | None, nnx.Module]:
  """Builds prior and model as shapes only, without memory or weights.

  Raises:
    ValueError: the name of `dino.checkpoint` does not tell the ViT's size.
  """
  prior = None
  if config.mode != "original":
    options = {**vit_arguments(config.dino.checkpoint), "dtype": jnp.dtype(config.dino.dtype)}
    vit = nnx.eval_shape(lambda: dinov2.DINOv2(**options, rngs=nnx.Rngs(0)))
    prior = priors.of(vit, fused_levels(config, vit.depth), dinov2.prepare, "abstract")
  return prior, nnx.eval_shape(lambda: create_model(config, prior))


def count_parameters(params: nnx.State) -> int:
  """Counts parameters (P of the paper), DINOv2 excluded even when trained."""
  flat = nnx.to_flat_state(params)
  return sum(leaf.size for path, leaf in flat if path[0] != "vit")


def parameters(config: ConfigDict) -> int:
  """Counts the parameters (P of the paper) of the model that a config builds, without weights.

  Raises:
    ValueError: the name of `dino.checkpoint` does not tell the ViT's size.
  """
  config = config.copy_and_resolve_references()
  config.model.bn_stats = "shared"  # statistics are no parameters; spares a trace of the decoder
  return count_parameters(nnx.state(abstract(config)[1], nnx.Param))
