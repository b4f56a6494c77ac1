"""What a config names, made: the images, the frozen prior, the model; and a trained run, loaded."""

import json
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import ablations, checkpoint, data, dinov2, mesh, settings
from fdep_jax.backbones import Logits, network_class
from fdep_jax.fdep import FDEP

# The quick start's stand-in where no DINOv2 file is given.
RANDOM_PRIOR = {"width": 96, "depth": 4, "heads": 4}

# Marks the prior's operations in a compiled module (plan.py tells their FLOPs apart).
PRIOR_SCOPE = "frozen_prior"


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


class Detector(NamedTuple):
  """One trained branch."""

  model: FDEP  # in evaluation mode; without fusion modules where the branch is "light"
  branch: str  # "light" or "main"
  config: ConfigDict  # of the run
  mean: float  # that the network's input is normalised with, of grey levels / 255
  std: float
  prior: Prior | None  # for the main branch
  source: str  # the run and its step, for messages and manifests
  folder: pathlib.Path  # of the run, or the exported file
  step: int  # of the checkpoint


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
  return Prior(vit, fused_levels(config, vit.depth), sha256)


def fused_levels(config: ConfigDict, depth: int) -> tuple[int, ...]:
  """0-based blocks of a ViT of `depth` that are fused."""
  levels = tuple(config.dino.levels) or dinov2.quarter_levels(depth)
  wrong = [level for level in levels if not 0 <= level < depth]
  if wrong:
    raise ValueError(f"dino.levels names blocks {wrong}; this ViT has 0 to {depth - 1}.")
  return levels


def place_prior(config: ConfigDict, prior: Prior | None, the_mesh):
  """The frozen prior's weights on the devices, shared out among them if `dino.shard`, or None."""
  if prior is None or not prior.vit.frozen:  # the model has those that are trained
    return None
  return mesh.put_frozen(nnx.split(prior.vit)[1], the_mesh, config.dino.shard)


def create_model(config: ConfigDict, prior: Prior | None) -> FDEP:
  """The model that the config trains, freshly initialised from its seed.

  Without a prior the light branch alone; an ablation's model where the config asks for one.
  """
  rngs = nnx.Rngs(config.seed)
  width, num_levels = (prior.vit.width, len(prior.levels)) if prior else (0, 0)
  network = (config.model.backbone, width, num_levels, config.model.fusion)
  if prior and config.model.on_dino != "no":
    model = ablations.OnDino(config.model.on_dino, width, num_levels, rngs=rngs)
  elif prior and config.model.share != "both":
    model = ablations.PartlyShared(config.model.share, *network, rngs=rngs)
  else:
    # Trained alone, the main branch is the only one that uses the decoder.
    bn_stats = config.model.bn_stats if config.mode == "fdep" else "shared"
    model = FDEP(*network, bn_stats=bn_stats, rngs=rngs)
  if prior and not prior.vit.frozen:
    model = ablations.Unfrozen(model, prior.vit, prior.levels)
  return model


def load_detector(
  workdir: str | os.PathLike | None, which: str | int | None = None, branch: str | None = None
) -> Detector:
  """One branch of a trained run.

  Args:
    workdir: of the run; None where `which` is a path.
    which: "best" (the default; the newest where none was selected), "last", a step, or the path
      of a checkpoint: `RUN`, `RUN/best`, `RUN/checkpoints/STEP`, or an exported
      `light.safetensors`.
    branch: "light" or "main" (needs the run's DINOv2 weights); default the deployed one.

  Raises:
    ValueError: the run has no such branch or step, or was trained with other DINOv2 weights.
    FileNotFoundError: no run, no checkpoint, or no DINOv2 weights.
  """
  if str(which).endswith(".safetensors"):
    if branch == "main":
      raise ValueError(f"{which} holds the light branch only. Give the --workdir of its run.")
    return load_light(which)
  workdir, which = _find_checkpoint(workdir, which)
  config = settings.load(workdir)
  trained = {"original": ("light",), "fdep_wo_coisd": ("main",)}.get(config.mode, ("light", "main"))
  branch = branch or trained[0]
  if branch not in trained:
    raise ValueError(
      f"{workdir} was trained in mode {config.mode}, which has no {branch} branch; it has "
      f"{' and '.join(trained)}. Choose --branch {trained[0]}, or a run that trained the other."
    )
  prior = None
  if branch == "main":
    if config.dino.checkpoint != "random" and not os.path.isfile(config.dino.checkpoint):
      raise FileNotFoundError(
        f"The main branch needs the DINOv2 weights of the run, {config.dino.checkpoint}, which is "
        "no file here. Put it there, or use --branch light if the run has one."
      )
    prior = load_prior(config)
  model = create_model(config, prior)
  model.eval()
  _, params, stats, _ = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  try:
    step, best = _choose_step(checkpoints, workdir, which)
    # Without fusion modules `like` is a part of what is stored: the light branch alone.
    state, meta = checkpoints.restore({"params": params, "stats": stats}, step, best=best)
    step = meta["step"]
  finally:
    checkpoints.close()
  if prior and prior.sha256 != meta["dino_sha256"]:
    raise ValueError(
      f"{workdir} was trained with other DINOv2 weights (SHA-256 {meta['dino_sha256']}) than "
      f"{config.dino.checkpoint} ({prior.sha256}). Name the file it was trained with."
    )
  nnx.update(model, state["params"], state["stats"])
  source = f"{workdir}, step {step}"
  return Detector(model, branch, config, meta["mean"], meta["std"], prior, source, workdir, step)


def load_light(path: str | os.PathLike) -> Detector:
  """The light branch from a file `light.safetensors` of `--mode export`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no such file, or does not fit the network it names.
  """
  import safetensors

  import converters

  arrays = converters.read_torch(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      about = json.loads(file.metadata()["fdep_jax"])
    config = ConfigDict(about["config"])
    settings.check(config)
    mean, std, step = float(about["mean"]), float(about["std"]), int(about["step"])
  except (KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"{path} is no light.safetensors of --mode export ({type(error).__name__}: {error})."
    ) from None
  model = FDEP(config.model.backbone, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  weights = nnx.state(model.backbone, nnx.Any(nnx.Param, nnx.BatchStat))
  try:
    nnx.update(model.backbone, checkpoint.unflatten(arrays, weights))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  source = f"{path} of {about['run']}, step {step}"
  return Detector(model, "light", config, mean, std, None, source, run_folder(path), step)


def _find_checkpoint(workdir, which) -> tuple[pathlib.Path, str | int]:
  """The run folder, and "best", "last" or a step."""
  which = "best" if which is None else which
  if str(which) in ("best", "last") or str(which).isdecimal():
    if workdir is None:
      raise ValueError(f"checkpoint {which} of which run? Give its --workdir, or a path.")
    return run_folder(workdir), which
  path = run_folder(which)
  if not path.is_dir():
    raise FileNotFoundError(
      f"{path} is no checkpoint: give best, last, a step, a folder RUN, RUN/best or "
      "RUN/checkpoints/STEP, or a light.safetensors."
    )
  if path.name == "best" or path.parent.name == "best":
    return (path.parent if path.name == "best" else path.parent.parent), "best"
  if path.name == "checkpoints":
    return path.parent, "last"
  if path.parent.name == "checkpoints" and path.name.isdecimal():
    return path.parent.parent, int(path.name)
  return path, "best"


def _choose_step(checkpoints, workdir, which: str | int) -> tuple[int | None, bool]:
  """(step, None for the newest that is whole; whether it is the selected one's copy)."""
  steps, best = checkpoints.steps(), checkpoints.best_step()
  if not steps and best is None:
    raise FileNotFoundError(f"{workdir} has no checkpoint yet. Train first (--mode train).")
  if str(which) == "best" and best is not None:
    return None, True
  if str(which) in ("best", "last"):
    if not steps:
      raise FileNotFoundError(f"{workdir} holds only its best checkpoint, step {best}.")
    return None, False
  if int(which) in steps or int(which) == best:
    return int(which), int(which) not in steps
  raise ValueError(f"{workdir} has no step {which}; it has {steps} and best, step {best}.")


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
  """DINOv2's levels of B×H×W×3 uint8 images, outside every gradient.

  Where the model has a DINOv2 of its own to train, what that takes: the prepared image alone.
  """
  if not prior.vit.frozen:
    return [dinov2.prepare(image.astype(jnp.float32) / 255)]
  vit = nnx.merge(graphdef, vit_state)
  with jax.named_scope(PRIOR_SCOPE):
    prepared = dinov2.prepare(image.astype(jnp.float32) / 255)
    return [jax.lax.stop_gradient(level) for level in vit(prepared, prior.levels)]


def run_folder(path: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(path).expanduser()
