"""Loads one branch of a trained run, or of an exported file."""

import json
import logging
import os
import pathlib
from typing import NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import build, settings
from fdep_jax.fdep import FDEP
from fdep_jax.metrics import columns
from fdep_jax.priors import Prior
from fdep_jax.runtime import checkpoint, files

POOR = 0.02  # HSE on the images that select, below which their order means nothing


class Detector(NamedTuple):
  """One trained branch."""

  model: FDEP  # in evaluation mode; has fusion modules only if the branch is "main"
  branch: str  # "light" or "main"
  config: ConfigDict  # of the run
  mean: float  # of grey levels / 255; normalises the input
  std: float
  prior: Prior | None  # for the main branch
  source: str  # the run and its step, for messages and manifests
  folder: pathlib.Path  # of the run, or the exported file
  step: int  # of the checkpoint
  range: str | tuple[float, float] = ""  # that became the grey levels; "": it had 8-bit images


def load(
  workdir: str | os.PathLike | None,
  which: str | int | None = None,
  branch: str | None = None,
  config: ConfigDict | None = None,
) -> Detector:
  """Loads one branch of a trained run.

  Args:
    workdir: of the run; None if `which` is a path.
    which: "best" (the default; the newest if none was selected), "last", a step, or the path
      of a checkpoint: `RUN`, `RUN/best`, `RUN/checkpoints/STEP`, or an exported
      `light.safetensors`.
    branch: "light", or "main", which needs the run's prior weights; default the deployed one.
    config: of the run, if the prior's file is not where its config.json says.

  Raises:
    ValueError: the run has no such branch or step, or was trained with different prior weights.
    FileNotFoundError: no run, no checkpoint, or no prior weights.
  """
  if str(which).endswith(".safetensors"):
    if branch == "main":
      raise ValueError(f"{which} holds the light branch only. Give the --workdir of its run.")
    if workdir is not None:
      raise ValueError(f"{which} needs no run: leave --workdir out. Predictions go to --out.")
    return load_light(which)
  workdir, which = find_checkpoint(workdir, which)
  config = config or settings.load(workdir)
  trained = {"original": ("light",), "fdep_wo_coisd": ("main",)}.get(config.mode, ("light", "main"))
  branch = branch or trained[0]
  if branch not in trained:
    raise ValueError(
      f"{workdir} was trained in mode {config.mode}, which has no {branch} branch; it has "
      f"{' and '.join(trained)}. Choose --branch {trained[0]}, or a run with that branch."
    )
  prior = None
  if branch == "main":
    if config.prior.checkpoint != "random" and not os.path.isfile(config.prior.checkpoint):
      raise FileNotFoundError(
        "The main branch needs the run's prior weights, but there is no file "
        f"{config.prior.checkpoint} (here: {os.path.abspath(config.prior.checkpoint)}). Name it "
        "with --config.prior.checkpoint=FILE and --workdir RUN, or use --branch light if the run "
        "has one."
      )
    prior = build.load_prior(config)
  model = build.create_model(config, prior)
  model.eval()
  _, params, stats, _ = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  try:
    step, best = choose_step(checkpoints, workdir, which)
    # For the light branch this reads only a part of the checkpoint: no fusion modules.
    state, meta = checkpoints.restore({"params": params, "stats": stats}, step, best=best)
    step = meta["step"]
  finally:
    checkpoints.close()
  if best and selection_doubt(meta):
    logging.warning("%s: %s", workdir, selection_doubt(meta))
  if prior:
    build.check_prior(prior.sha256, meta, workdir, config)
  nnx.update(model, state["params"], state["stats"])
  source = f"{workdir}, step {step}"
  values = meta.get("range", "")
  return Detector(
    model, branch, config, meta["mean"], meta["std"], prior, source, workdir, step,
    tuple(values) if isinstance(values, list) else values,
  )  # fmt: skip


def selection_doubt(saved: dict) -> str:
  """Says why the selection of a best checkpoint may be chance; "" if nothing is known against it.

  Args:
    saved: the JSON object of the best checkpoint.
  """
  step, best, steps = saved["step"], saved.get("best"), saved.get("steps") or 0
  if best is not None and best < POOR:
    score = columns.METRICS[saved.get("selected_by", "hse")]  # older versions did not write it
    return (
      f"the selected checkpoint, step {step}, has {score.heading} {score.shown(best)} on the "
      "images that select, so the selection is chance. --checkpoint last may be better."
    )
  if step <= steps / 10:
    return (
      f"the selected checkpoint, step {step} of {steps}, is from the first tenth of the training. "
      "The images that select may be too few, or the training did not go on. --checkpoint last is "
      "the newest."
    )
  return ""


def load_light(path: str | os.PathLike) -> Detector:
  """Loads the light branch from a `light.safetensors` of `--mode export`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a different kind of file, or does not fit the network it names.
  """
  import safetensors

  import converters

  arrays = converters.read_torch(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      about = json.loads(file.metadata()["fdep_jax"])
    config = settings.completed(about["config"])
    settings.check(config)
    mean, std, step = float(about["mean"]), float(about["std"]), int(about["step"])
    values = about.get("range", "")
    values = tuple(map(float, values)) if isinstance(values, list) else str(values)
  except (KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyError | TypeError):
      reason = "it lacks the settings of a run; converters.load_backbone reads files of PyTorch"
    if str(path).endswith("_torch.safetensors"):
      reason = "it is for PyTorch; the file for this package is light.safetensors beside it"
    raise ValueError(f"{path} is no light.safetensors of --mode export: {reason}.") from None
  model = FDEP(config.model.backbone, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  weights = nnx.state(model.backbone, nnx.Any(nnx.Param, nnx.BatchStat))
  try:
    nnx.update(model.backbone, checkpoint.unflatten(arrays, weights))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  source = f"{path} of {about['run']}, step {step}"
  folder = files.expand(path)
  return Detector(model, "light", config, mean, std, None, source, folder, step, values)


def find_checkpoint(
  workdir: str | os.PathLike | None, which: str | int | None
) -> tuple[pathlib.Path, str | int]:
  """Returns the run folder, and "best", "last" or a step; arguments as for `load`.

  Raises:
    FileNotFoundError: a path is no checkpoint.
    ValueError: a path is of a different run than `workdir`, or there is neither.
  """
  run, which = _parse_checkpoint(workdir, which)
  if workdir is not None and run.resolve() != files.expand(workdir).resolve():
    raise ValueError(
      f"--checkpoint is of the run {run}, and --workdir is {workdir}. Leave --workdir out, or name "
      "a checkpoint of that run: best, last or a step."
    )
  return run, which


def _parse_checkpoint(workdir, which) -> tuple[pathlib.Path, str | int]:
  which = "best" if which is None else which
  if str(which) in ("best", "last") or str(which).isdecimal():
    if workdir is None:
      raise ValueError(f"Checkpoint {which} needs the --workdir of its run, or give a path.")
    return files.expand(workdir), which
  path = files.expand(which)
  if path.is_file():
    raise ValueError(
      f"{path} is a file. --checkpoint takes best, last, a step, a folder RUN, RUN/best or "
      "RUN/checkpoints/STEP, or a light.safetensors of --mode export. Programs (.onnx, .stablehlo) "
      "run elsewhere: docs/deployment.md; converters.load_backbone reads PyTorch's files in Python."
    )
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


def choose_step(
  checkpoints: checkpoint.Checkpoints, workdir: pathlib.Path, which: str | int
) -> tuple[int | None, bool]:
  """Returns the step (None: the newest whole one) and whether to read it from `best/`.

  Raises:
    FileNotFoundError, ValueError: there is no such checkpoint.
  """
  steps, best = checkpoints.steps(), checkpoints.best_step()
  if not steps and best is None:
    raise FileNotFoundError(f"{workdir} has no checkpoint yet. Train first (--mode train).")
  if str(which) == "best" and best is not None:
    return None, True
  if str(which) in ("best", "last"):
    if not steps:
      raise FileNotFoundError(f"{workdir} has only its best checkpoint, step {best}. Give best.")
    return None, False
  if int(which) in steps or int(which) == best:
    return int(which), int(which) not in steps
  raise ValueError(f"{workdir} has no step {which}; it has {steps}, and best is step {best}.")
