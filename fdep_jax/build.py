"""Builds data, prior and model from a config."""

import logging
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import ablations, data, forward, priors, settings
from fdep_jax.backbones import network_class
from fdep_jax.data import frames
from fdep_jax.fdep import FDEP
from fdep_jax.layers import basic
from fdep_jax.metrics import columns
from fdep_jax.priors import Foundation, Prior, dinov2
from fdep_jax.runtime import files

# Small DINOv2 of the quick start, which needs no weight file.
RANDOM_PRIOR = dict(dinov2.DINOv2.small)


class Images(NamedTuple):
  """A dataset as a run uses it."""

  train: Sequence[data.Sample]  # without the held-out images
  val: Sequence[data.Sample]  # the set's own or held out of train; empty if the test split selects
  test: Sequence[data.Sample]
  mean: data.Statistic  # of grey levels / 255, over the train images, the held-out ones as well
  std: data.Statistic  # (0 and 1 for a network that takes grey levels as they are)
  range: frames.Range = ""  # that became the grey levels; "": the images have 8 bits


def check_network(config: ConfigDict) -> None:
  """Raises ValueError if the network cannot take the mode, or crops of `data.crop` pixels."""
  network = network_class(config.model.backbone)
  if config.mode.startswith("fdep"):
    network.require_top()
  if network.in_channels not in (1, 3):
    raise ValueError(
      f"{config.model.backbone} takes images of {network.in_channels} channels; those of a run "
      "have three, whose mean a network of one channel gets. Set in_channels to 3 or 1."
    )
  stride = network.stride
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
  check_network(config)
  missing = []
  root, checkpoint = config.data.root, config.prior.checkpoint
  data.check_named(root)
  if root != "synthetic" and not root.startswith("tfds:") and not os.path.isdir(files.expand(root)):
    missing.append(
      f"data.root: there is no folder {_place(root)}. Download the dataset and lay it out as "
      "images/ masks/ splits/{train,test}.txt (docs/data.md), or set "
      "--config.data.root=PATH to a different folder (--mode eval then needs --out DIR, too)."
    )
  weights = config.mode != "original" and checkpoint != "random"
  if weights and not os.path.isfile(files.expand(checkpoint)):
    missing.append(
      f"prior.checkpoint: there is no file {_place(checkpoint)}. Download "
      "dinov2_vitl14_pretrain.pth from the facebookresearch/dinov2 repository, or another prior "
      "(docs/priors.md), or convert your own file with `python -m converters IN OUT` and set "
      "--config.prior.checkpoint=OUT. --config.mode=original trains the network alone, without one."
    )
  if missing:
    raise FileNotFoundError("\n".join(missing))


def _place(path: str) -> str:
  """Returns the path, and where it leads from here if it is relative."""
  absolute = os.path.abspath(files.expand(path))
  return path if os.path.isabs(path) else f"{path} (here: {absolute})"


def load_images(config: ConfigDict) -> Images:
  """Reads both splits; mean and deviation are the train split's, if the network wants any.

  Raises:
    ValueError: the data cannot be used, or each train image has one grey level only.
  """
  if config.data.root == "synthetic":
    size = config.data.synthetic_size
    values, train = "", data.scenes(config.data.synthetic_train, size, seed=1)
  else:
    values = grey_range(config)
    train = data.load(config.data.root, "train", values=values, lazy=config.data.lazy)
  if config.data.train_images:
    train = data.draw(train, config.data.train_images, config.seed)
  data.check_contrast(config.data.root, train, values)
  test = load_test(config, values)
  mean, std = 0.0, 1.0
  if network_class(config.model.backbone).standardised:
    mean, std = data.statistics(train)
  val = []
  if config.eval.select_on == "val":
    val = load_validation(config, values)
    if not val:
      train, val = data.split_validation(train, config.data.val_fraction, seed=0)
  return Images(train, val, test, mean, std, values)


def load_validation(config: ConfigDict, values: frames.Range = "") -> Sequence[data.Sample]:
  """Reads the dataset's own validation split; [] if it has none."""
  root = config.data.root
  if root == "synthetic" or root.startswith("tfds:"):
    return []
  val = data.load(root, "val", values=values, lazy=config.data.lazy)
  if val:
    number = columns.counted(len(val), "image")
    logging.info("the checkpoint is selected on the dataset's own split val, %s", number)
  return val


def load_test(config: ConfigDict, values: frames.Range = "") -> Sequence[data.Sample]:
  """Reads the test split; `values` is the range of its grey levels."""
  if config.data.root == "synthetic":
    return data.scenes(config.data.synthetic_test, config.data.synthetic_size, seed=2)
  return data.load(config.data.root, "test", values=values, lazy=config.data.lazy)


def grey_range(config: ConfigDict) -> frames.Range:
  """Returns the range that becomes the grey levels of the whole dataset, `data.range` resolved."""
  if config.data.range == "auto":
    return data.measure_range(config.data.root)
  return frames.parse_range(config.data.range) if config.data.range else ""


def load_prior(config: ConfigDict) -> Prior | None:
  """Loads the prior with the levels to fuse; returns None if only the detector is trained."""
  if config.mode == "original":
    return None
  settings.adopt(config)
  import converters
  from converters.foundation import fingerprint

  dtype = jnp.dtype(config.prior.dtype)
  variable = nnx.Param if config.prior.unfreeze else dinov2.Frozen
  if config.prior.checkpoint == "random":
    model = dinov2.DINOv2(**RANDOM_PRIOR, dtype=dtype, variable=variable, rngs=nnx.Rngs(0))
    sha256 = "random"
  else:
    path = files.expand(config.prior.checkpoint)
    model = converters.load_prior(path, dtype=dtype, variable=variable)
    sha256 = fingerprint(path)
  return _prior(config, model, sha256)


def _prior(config: ConfigDict, model: Foundation, sha256: str) -> Prior:
  normalisation = config.prior.normalisation
  satellite = "sat493m" in os.path.basename(config.prior.checkpoint).lower()
  if satellite and normalisation != "satellite":
    logging.warning(
      "%s is named like DINOv3's satellite weights, which need prior.normalisation=satellite; it "
      "is %s", config.prior.checkpoint, normalisation,
    )  # fmt: skip
  levels = fused_levels(config, model.depth)
  return priors.from_module(
    model, levels, sha256, None if normalisation == "model" else normalisation
  )


def check_prior(sha256: str | None, saved: dict, workdir, config: ConfigDict) -> None:
  """Raises ValueError if a checkpoint was trained with prior weights of a different SHA-256.

  Args:
    sha256: of the weights at hand.
    saved: the JSON object of the checkpoint.
    workdir, config: of the run.
  """
  if sha256 != saved["dino_sha256"]:
    raise ValueError(
      f"{workdir} was trained with different prior weights (SHA-256 {saved['dino_sha256']}) than "
      f"{config.prior.checkpoint} ({sha256}). Put back the file it was trained with, or name it: "
      "--config.prior.checkpoint=FILE."
    )


def fused_levels(config: ConfigDict, depth: int) -> tuple[int, ...]:
  """Returns the 0-based blocks to fuse, of a prior with `depth` blocks."""
  levels = tuple(config.prior.levels) or priors.quarter_levels(depth)
  wrong = [level for level in levels if not 0 <= level < depth]
  if wrong:
    raise ValueError(f"prior.levels names blocks {wrong}; this prior has 0 to {depth - 1}.")
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
  if config.model.bn_momentum:
    for _, module in nnx.iter_graph(model):
      if isinstance(module, basic.BatchNorm):
        module.momentum = config.model.bn_momentum
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


def named_model(checkpoint: str) -> tuple[type[Foundation], dict]:
  """Derives a prior's class and its arguments from a file name; the file need not exist.

  Raises:
    ValueError: the name does not contain the ViT's size.
  """
  if checkpoint == "random":
    return dinov2.DINOv2, RANDOM_PRIOR
  file = os.path.basename(checkpoint).lower()
  for name in priors.names():
    found = priors.model_class(name)
    arguments = found.size_of(file)
    if arguments is not None:
      return found, arguments
  raise ValueError(
    f"prior.checkpoint is {checkpoint!r}, whose name does not contain the ViT's size. "
    "Plans read no weights: give a name such as dinov2_vitl14_pretrain.pth, dino_vits16.pth or "
    "dinov3_vitb16.pth (the file need not exist)."
  )


def abstract(config: ConfigDict) -> tuple[Prior | None, nnx.Module]:
  """Builds prior and model as shapes only, without memory or weights.

  Raises:
    ValueError: the name of `prior.checkpoint` does not contain the ViT's size.
  """
  prior = None
  settings.adopt(config)
  if config.mode != "original":
    model = nnx.eval_shape(lambda: _random_prior(config))
    prior = _prior(config, model, "abstract")
  return prior, nnx.eval_shape(lambda: random_model(config, prior))


def random_model(config: ConfigDict, prior: Prior | None) -> nnx.Module:
  """Builds the model for a prior of shapes only; a trained prior's weights are random.

  To be traced (`jax.eval_shape`), as a trained prior is part of the model.
  """
  if prior and not prior.frozen:
    prior = _prior(config, _random_prior(config), prior.sha256)
  return create_model(config, prior)


def _random_prior(config: ConfigDict) -> nnx.Module:
  found, arguments = named_model(config.prior.checkpoint)
  options = {**arguments, "dtype": jnp.dtype(config.prior.dtype)}
  variable = nnx.Param if config.prior.unfreeze else dinov2.Frozen
  return found(**options, variable=variable, rngs=nnx.Rngs(0))


def count_parameters(params: nnx.State) -> int:
  """Counts parameters (P of the paper), the prior excluded even when trained."""
  flat = nnx.to_flat_state(params)
  return sum(leaf.size for path, leaf in flat if path[0] != "vit")


def count_deployed(config: ConfigDict, model: nnx.Module) -> int:
  """Counts the parameters of the deployed branch: of a light branch, without SAMF."""
  light = forward.deployed_branch(config.mode) == "light"
  model = model.model if isinstance(model, ablations.Unfrozen) else model
  return count_parameters(nnx.state(model.backbone if light else model, nnx.Param))


def parameters(config: ConfigDict) -> int:
  """Counts the parameters (P of the paper) of the model that a config builds, without weights.

  Raises:
    ValueError: the name of `prior.checkpoint` does not contain the ViT's size.
  """
  config = config.copy_and_resolve_references()
  config.model.bn_stats = "shared"  # same count; saves tracing the decoder
  return count_parameters(nnx.state(abstract(config)[1], nnx.Param))
