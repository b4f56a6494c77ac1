"""Loads one branch of a trained run, of an exported file, or a published network."""

import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import backbones, build, settings, zoo
from fdep_jax.data import Statistic
from fdep_jax.fdep import FDEP
from fdep_jax.metrics import columns
from fdep_jax.priors import Prior
from fdep_jax.runtime import checkpoint, files

_NAME_IT = "name its network, --backbone NAME"
POOR = 0.02  # HSE on the images that select, below which their order means nothing


class Detector(NamedTuple):
  """One trained branch."""

  model: FDEP  # in evaluation mode; has fusion modules only if the branch is "main"
  branch: str  # "light" or "main"
  config: ConfigDict  # of the run
  mean: Statistic  # of grey levels / 255; normalises the input
  std: Statistic
  prior: Prior | None  # for the main branch
  source: str  # the run and its step, for messages and manifests
  folder: pathlib.Path  # of the run, or the file
  step: int | None  # of the checkpoint; None: a published network, whose training is not known
  range: str | tuple[float, float] = ""  # that became the grey levels; "": it had 8-bit images
  fill: Statistic = 0.0  # grey level / 255 that pads images
  options: Mapping[str, object] = {}  # keywords of `backbones.create`: the network's variant
  exported: Mapping[str, object] = {}  # what `--mode export` wrote into the file, of its run


def load(
  workdir: str | os.PathLike | None,
  which: str | int | None = None,
  branch: str | None = None,
  config: ConfigDict | None = None,
) -> Detector:
  """Loads one branch of a trained run.

  Args:
    workdir: of the run; None if `which` is a path. Alone, it may also be a light branch.
    which: "best" (the default; the newest if none was selected), "last", a step, or the path
      of a checkpoint: `RUN`, `RUN/best`, `RUN/best/STEP`, `RUN/checkpoints/STEP`, or a light
      branch: an exported `light.safetensors`, or `zoo:NAME`.
    branch: "light", or "main", which needs the run's prior weights; default the deployed one.
    config: of the run, if the prior's file is not where its config.json says.

  Raises:
    ValueError: the run has no such branch or step, or was trained with different prior weights.
    FileNotFoundError: no run, no checkpoint, or no prior weights.
  """
  light = light_of(workdir, which)
  if light is not None:
    if branch == "main":
      raise ValueError(
        f"{light} holds the light branch only. The main branch is in a run: name its folder."
      )
    return load_light(light)
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
    weights = files.expand(config.prior.checkpoint)
    if config.prior.checkpoint != "random" and not os.path.isfile(weights):
      raise FileNotFoundError(
        "The main branch needs the run's prior weights, but there is no file "
        f"{config.prior.checkpoint} (here: {os.path.abspath(weights)}). Name it "
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
  if best and which == "best" and selection_doubt(meta):
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


def light_of(
  workdir: str | os.PathLike | None, which: str | int | None
) -> str | os.PathLike | None:
  """Returns the light branch alone that the arguments of `load` name; None if they name a run.

  Raises:
    ValueError: they name both.
  """
  one, other = (workdir, which) if zoo.is_light(workdir) else (which, workdir)
  if not zoo.is_light(one):
    return None
  if other is not None:
    raise ValueError(f"{one} is no run and has one checkpoint. Leave {other} out.")
  return one


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
  """Loads the light branch from a `light.safetensors` of `--mode export`, or from zoo:NAME.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a different kind of file, or does not fit the network it names.
  """
  import safetensors

  import converters
  from converters import normalisation

  given, path = path, zoo.place(path)
  arrays = converters.read_torch(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      about = json.loads(file.metadata()["fdep_jax"])
    config = settings.completed(about["config"])
    settings.check(config)
    mean, std = normalisation.of_file(about["mean"], about["std"])
    step = None if about["step"] is None else int(about["step"])
    values, options = _range(about.get("range", "")), dict(about.get("options", {}))
    fill = _fill(about)
  except (KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyError | TypeError):
      reason = f"it lacks the settings of a run. If it is a file for PyTorch, {_NAME_IT}"
    if str(path).endswith("_torch.safetensors"):
      reason = f"it is for PyTorch. Take light.safetensors beside it, or {_NAME_IT}"
    raise ValueError(f"{path} is no light.safetensors of --mode export: {reason}.") from None
  net = backbones.create(config.model.backbone, rngs=nnx.Rngs(0), **options)
  model = FDEP(net, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  weights = nnx.state(model.backbone, nnx.Any(nnx.Param, nnx.BatchStat))
  try:
    nnx.update(model.backbone, checkpoint.unflatten(arrays, weights))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  source = f"{given} of {about['run']}" + ("" if step is None else f", step {step}")
  return Detector(
    model, "light", config, mean, std, None, source, path, step, values, fill, options, about
  )


def _fill(about: dict) -> Statistic:
  """Returns what pads the images of an exported network; runs pad with 0."""
  from converters import normalisation

  value = about.get("input", {}).get("fill", 0.0)
  return normalisation.of_file(value, value)[0]


def _range(values) -> str | tuple[float, float]:
  return tuple(map(float, values)) if isinstance(values, list) else str(values)


def config_of(backbone: str) -> ConfigDict:
  """Returns the base config with this network alone, for what is computed without a run."""
  from configs import base

  config = base.get_config()
  config.mode, config.model.backbone = "original", backbone
  return config


def load_published(
  path: str | os.PathLike,
  backbone: str,
  mean: str | None = None,
  std: str | None = None,
  normalisation: str | None = None,
) -> Detector:
  """Loads a published network, whose weights are in a file for PyTorch.

  Args:
    path: a file for `converters.load_backbone`, or a light_torch.safetensors of `--mode export`.
    backbone: the network's name, one of `backbones.names()`.
    mean, std, normalisation: as for `converters.normalisation.parse`. Files of `--mode export`
      have a mean and a deviation. What other files state (`torch_file.read_checkpoint`) is taken
      if none is given here; the rest need it. A network that takes grey levels as they are needs
      none.

  Returns:
    The network as a light branch, in evaluation mode. Published code pads what it has normalised
    with 0, so that images are padded with the mean; runs pad grey levels with 0.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the network is not known, the file is not a checkpoint of it, or the normalisation
      is missing, given twice, or does not fit.
  """
  import converters
  from converters import normalisation as known
  from converters import torch_file

  network = backbones.network_class(backbone)
  given = known.parse(mean, std, normalisation)
  if zoo.named(path):
    raise ValueError(f"{path} names its network and its normalisation. Leave --backbone out.")
  path = files.expand(path)
  _check_published(path)
  about = _about(path)
  if "config" in about:
    raise ValueError(f"{path} is a light.safetensors and names its network. Leave --backbone out.")
  if about.get("network", backbone) != backbone:
    raise ValueError(f"{path} is of {about['network']}. Give --backbone {about['network']}.")
  found = torch_file.read_checkpoint(path)
  state = found.arrays
  try:
    options = converters.variant(backbone, state)
    net = converters.load_backbone(backbone, state)
  except ValueError as error:
    raise ValueError(
      f"{path}: {error}\n  If it is of a different network, give its name: --backbone NAME."
    ) from None
  own = about.get("input", {})
  of_file = known.of_file(own["mean"], own["std"]) if "mean" in own else None
  try:
    if found.normalisation and network.standardised:
      of_file = _stated(path, given, found.normalisation)
    statistics = known.choose(network.standardised, net.in_channels, given, of_file)
  except ValueError as error:
    raise ValueError(f"{path}, {backbone}: {error}") from None
  model = FDEP(net, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  source, values = f"{path}, {backbone}", _range(own.get("range", ""))
  fill = _fill(about) if "mean" in own else statistics[0]
  return Detector(
    model,
    "light",
    config_of(backbone),
    *statistics,
    None,
    source,
    path,
    None,
    values,
    fill,
    options,
  )


def of_flags(flags) -> Detector:
  """Loads the network that the flags of `--mode predict` or `eval` name; raises as the others.

  Without --workdir and --checkpoint it is the best of the zoo.
  """
  if flags.backbone:
    return load_published(
      flags.checkpoint, flags.backbone, flags.mean, flags.std, flags.normalisation
    )
  which = flags.checkpoint
  if which is None and flags.workdir is None:
    which = zoo.BEST
    logging.info("no --workdir or --checkpoint is given: taking %s, the best of the zoo", which)
  return load(flags.workdir, which, flags.branch, flags.config)


def _stated(path: pathlib.Path, given, numbers: tuple[list[float], list[float]]):
  """Returns the normalisation that a published file states, or None if another is given."""
  from converters import normalisation

  what = "those given are taken" if given else "they are taken"
  logging.info("%s states mean %s and deviation %s of its images; %s", path, *numbers, what)
  return None if given else normalisation.stated(*numbers)


def _check_published(path: pathlib.Path) -> None:
  """Raises ValueError if `path` names the checkpoint of a run, FileNotFoundError if nothing."""
  if path.is_dir() and not any(
    (folder / "config.json").exists() for folder in (path, *path.absolute().parents[:3])
  ):
    raise ValueError(
      f"--checkpoint {path} is a folder, and no run: it has no config.json. Name the file of the "
      f"network. The folder holds {_content(path)}."
    )
  if (
    path.is_dir() or not path.exists() and (str(path) in ("best", "last") or path.name.isdecimal())
  ):
    raise ValueError(
      f"--checkpoint {path} is of a run, whose config names its network. Leave --backbone out, or "
      "name a file: a published checkpoint, or a light_torch.safetensors of --mode export."
    )
  if not path.exists():
    raise FileNotFoundError(f"--checkpoint {path}: there is no such file.")


def network_of(which: str | os.PathLike) -> str:
  """Returns the network that zoo:NAME, or a light.safetensors, names; raises as `load_light`."""
  path = zoo.place(which)
  if not path.is_file() or not is_exported(path):
    load_light(which)  # explains what it is instead
  return _about(path)["config"]["model"]["backbone"]


def is_exported(path: pathlib.Path) -> bool:
  """Tells whether a file is a light.safetensors of `--mode export`, which names its network."""
  return "config" in _about(path)


def _content(folder: pathlib.Path) -> str:
  """Names the first five files of a folder."""
  names = sorted(p.name for p in folder.iterdir() if p.is_file())
  return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "no files"


def _about(path: pathlib.Path) -> dict:
  """Returns what `--mode export` wrote into a safetensors file; {} for other files."""
  import safetensors

  from converters import torch_file

  if not torch_file.is_safetensors(path):
    return {}
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      about = json.loads((file.metadata() or {}).get("fdep_jax", "{}"))
  except (ValueError, safetensors.SafetensorError):
    return {}
  return about if isinstance(about, dict) else {}


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
  given, which = which, "best" if which is None else which
  if str(which) in ("best", "last") or str(which).isdecimal():
    if workdir is None:
      raise ValueError(
        "Name the run, --workdir RUN, or a file or folder, --checkpoint PATH, or a trained network "
        f"of this package, --checkpoint {zoo.BEST}."
        if given is None
        else f"--checkpoint {given} needs the --workdir of its run, or give a path."
      )
    return files.expand(workdir), which
  path = files.expand(which)
  if path.is_file():
    raise ValueError(
      f"{path} is a file. --checkpoint takes best, last, a step, a folder RUN, RUN/best or "
      "RUN/checkpoints/STEP, or a light.safetensors of --mode export. If it is a file for PyTorch, "
      f"{_NAME_IT}. Programs (.onnx, .stablehlo) run elsewhere: docs/deployment.md."
    )
  if not path.is_dir():
    raise FileNotFoundError(
      f"{path} is no checkpoint: give best, last, a step, a folder RUN, RUN/best or "
      f"RUN/checkpoints/STEP, or a light.safetensors.{zoo.hint(path)}"
    )
  # First, as a run may be called best, or lie below a folder of that name.
  if (path / "config.json").exists():
    return path, "best"
  if path.name in ("best", "checkpoints"):
    return path.parent, "best" if path.name == "best" else "last"
  if path.parent.name in ("best", "checkpoints") and path.name.isdecimal():
    return path.parent.parent, int(path.name)
  raise FileNotFoundError(
    f"{path} is not the folder of a run: it has no config.json. It holds {_content(path)}. If "
    f"one of these is a file for PyTorch, {_NAME_IT} --checkpoint FILE."
  )


def choose_step(
  checkpoints: checkpoint.Checkpoints, workdir: pathlib.Path, which: str | int
) -> tuple[int | None, bool]:
  """Returns the step (None: the newest whole one) and whether to read it from `best/`.

  Raises:
    FileNotFoundError, ValueError: there is no such checkpoint.
  """
  steps, kept = checkpoints.steps(), checkpoints.steps(best=True)
  if not steps and not kept:
    raise FileNotFoundError(f"{workdir} has no checkpoint yet. Train first (--mode train).")
  if str(which) == "best" and kept:
    return None, True
  if str(which) in ("best", "last"):
    if not steps:
      raise FileNotFoundError(
        f"{workdir} has only its best checkpoint, step {kept[-1]}. Give best."
      )
    return None, False
  step = int(which)  # one that is in both folders has the same weights in both
  if step in steps or step in kept:
    return step, step not in steps
  raise ValueError(f"{workdir} has no step {step}; it has {steps}, and best/ has {kept}.")
