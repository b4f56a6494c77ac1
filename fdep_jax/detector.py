"""Loads one branch of a trained run, or of an exported file."""

import json
import os
import pathlib
from typing import NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import build, settings
from fdep_jax.fdep import FDEP
from fdep_jax.priors import Prior
from fdep_jax.runtime import checkpoint, files


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


def load(
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
    prior = build.load_prior(config)
  model = build.create_model(config, prior)
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
  return Detector(model, "light", config, mean, std, None, source, files.expand(path), step)


def _find_checkpoint(workdir, which) -> tuple[pathlib.Path, str | int]:
  """The run folder, and "best", "last" or a step."""
  which = "best" if which is None else which
  if str(which) in ("best", "last") or str(which).isdecimal():
    if workdir is None:
      raise ValueError(f"checkpoint {which} of which run? Give its --workdir, or a path.")
    return files.expand(workdir), which
  path = files.expand(which)
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
