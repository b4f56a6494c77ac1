"""Checks configs, explains wrong command lines, and keeps a run folder to one config."""

import difflib
import importlib.util
import json
import logging
import os
import pathlib
import re
from collections.abc import Container, Iterable, Mapping

from ml_collections import ConfigDict

from fdep_jax.runtime import files

# A run may be continued with different values of these: they do not change a step's result.
_FREE = re.compile(
  r"train\.(steps|epochs|nonfinite|remat)|(log|checkpoint)\..*|host_devices|distributed"
  r"|profile_steps|dino\.(bank_folder|shard)|eval\.(batch_size|save_probs|least_steps)|data\.threads"
)


# Settings that runs of earlier versions do not have, and the value that they ran with.
_ADDED = {"eval.least_steps": 1, "data.range": ""}

# Paths: a begun run may be continued with the same files at another place.
_PLACES = ("data.root", "dino.checkpoint")

_ADDRESS = re.compile(r"[^,\s]+:\d+,(\d+),(\d+)")  # of `distributed`

_CHOICES = {
  "mode": ("original", "fdep_wo_coisd", "fdep"),
  "model.fusion": ("samf", "add"),
  "model.bn_stats": ("per_branch", "shared"),
  "model.share": ("both", "encoder", "decoder"),
  "model.on_dino": ("no", "plain", "msda"),
  "data.augment": ("recipe", "dihedral", "none"),
  "dino.dtype": ("float32", "bfloat16"),
  "train.dtype": ("float32", "bfloat16"),
  "train.nonfinite": ("stop", "skip"),
  "train.remat": ("none", "products"),
  "train.labels": ("true", "pseudo", "both"),
  "loss.edge_mode": ("intended", "released"),
  "eval.select_on": ("val", "test"),
}
_POSITIVE = (
  "data.crop", "data.threads", "train.batch_size", "train.learning_rate", "eval.batch_size",
  "eval.least_steps",
  "checkpoint.every_steps", "checkpoint.keep", "log.every_steps", "host_devices",
)  # fmt: skip


def flat(config: ConfigDict) -> dict[str, object]:
  """Returns every setting by its dotted name, as JSON stores it."""

  def walk(prefix, value):
    if isinstance(value, dict):
      for key, inner in value.items():
        yield from walk(f"{prefix}{key}.", inner)
    else:
      yield prefix[:-1], list(value) if isinstance(value, tuple) else value

  return dict(walk("", config.to_dict()))


def explain_flags(argv: list[str], error: Exception) -> str:
  """Explains why a command line cannot be parsed: names unknown settings and similar ones."""
  arguments = dict(
    _split_flag(a, following) for a, following in zip(argv, [*argv[1:], ""], strict=True)
  )
  lines = []
  path, *own = arguments.get("--config", "").split(":", 1)  # FILE or FILE:ARGUMENT
  if os.path.isfile(path):
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
      known = list(flat(module.get_config(*own)))
    except (OSError, TypeError, ValueError) as refusal:
      return str(refusal) if path.endswith("of_run.py") else f"{path}: {refusal}"
    for argument in arguments:
      name = argument.removeprefix("--config.")
      if name == argument or name in known:
        continue
      near = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
      near += [k for k in difflib.get_close_matches(name, known, 3, 0.5) if k not in near]
      hint = f"The nearest are {', '.join(near)}." if near else f"There are {', '.join(known)}."
      lines.append(f"The config has no setting {name!r}. {hint}")
  return "\n".join(lines) or str(error)


def check_flags(values, of_run: Mapping[str, str]) -> None:
  """Applies the rules of lengths, and refuses settings on a command line that have no effect.

  Args:
    values: parsed flags, an absl `FlagValues`.
    of_run: {mode: pattern of the settings that it may change in a trained run}.

  Raises:
    ValueError: one line a setting.
  """
  from ml_collections import config_flags

  config = values.config
  if config is None:
    return
  given, mode = config_flags.get_override_values(values["config"]), values.mode
  if mode in of_run:
    wrong = [name for name in given if not re.fullmatch(of_run[mode], name)]
    if wrong:
      known = [name for name in flat(config) if re.fullmatch(of_run[mode], name)]
      raise ValueError(
        f"--mode {mode} cannot change {', '.join(wrong)}, which a trained run has fixed or which "
        f"{mode} does not use. It may change {', '.join(known)}."
      )
    return
  settle_length(config, given)
  lines = []
  if mode == "plan":
    lines = [
      f"{name} has no effect: --topology says what a plan is for. Leave it out."
      for name in ("host_devices", "distributed", "log.compile_cache")
      if name in given
    ]
  if mode in ("train", "plan"):
    lines += idle(config, given)
  if lines:
    raise ValueError("\n".join(lines))


def settle_length(config: ConfigDict, given: Container[str]) -> None:
  """Lets a command line's train.epochs win over a train.steps of the config file.

  Raises:
    ValueError: the command line gives both.
  """
  if "train.epochs" not in given or config.train.steps <= 0:
    return
  if "train.steps" in given:
    raise ValueError(
      f"train.steps={config.train.steps} and train.epochs={config.train.epochs} are both given, "
      "and each is a length. Give one."
    )
  logging.warning(
    "train.epochs=%s is given, so the config's train.steps=%s is left out",
    config.train.epochs, config.train.steps,
  )  # fmt: skip
  config.train.steps = 0


def _no_folder(root: str) -> bool:
  return root == "synthetic" or root.startswith("tfds:")


def idle(config: ConfigDict, given: Iterable[str]) -> list[str]:
  """Lists those of the given settings that have no effect beside the others, with the reason."""
  values = flat(config)
  mode = values["mode"]
  rates = [v for k, v in values.items() if k.startswith("train.schedule_args.")]
  rules = (  # pattern, whether it has no effect, why
    (r"dino\..*|model\.(fusion|share|on_dino)", mode == "original", "mode original uses no prior"),
    (r"model\.bn_stats|loss\.light_weight", mode != "fdep", f"mode {mode} trains one branch"),
    (r"model\.fusion", values["model.on_dino"] != "no", "model.on_dino replaces the fusion"),
    (r"dino\.bank_\w+", not values["dino.bank"], "dino.bank is 0"),
    (r"data\.range", _no_folder(values["data.root"]), "data.root is no folder"),
    (r"data\.synthetic_\w+", values["data.root"] != "synthetic", "data.root is not synthetic"),
    (r"data\.val_fraction", values["eval.select_on"] != "val", "eval.select_on is not val"),
    (
      r"train\.learning_rate",
      "learning_rate" not in rates,
      'no argument of the schedule (train.schedule_args) is "learning_rate"',
    ),
  )
  found = {}
  for name in given:
    for pattern, without_effect, why in rules:
      if without_effect and re.fullmatch(pattern, name):
        found.setdefault(name, f"{name} has no effect: {why}. Leave it out.")
  return list(found.values())


def _split_flag(argument: str, following: str) -> tuple[str, str]:
  name, equals, value = argument.partition("=")
  return name, value if equals else following


def check(config: ConfigDict) -> None:
  """Raises one ValueError that lists all missing settings or, if none is, all wrong values."""
  values, problems = flat(config), []
  _check_complete(values, "the config")
  for name, choices in _CHOICES.items():
    if values[name] not in choices:
      problems.append(f"{name} is {values[name]!r}; it must be one of {', '.join(choices)}.")
  problems += [f"{n} is {values[n]}; it must be positive." for n in _POSITIVE if not values[n] > 0]
  if values["train.steps"] <= 0 and values["train.epochs"] <= 0:
    problems.append("train.steps and train.epochs are both 0; one of them must be positive.")
  if not 0 < values["data.val_fraction"] < 1 and values["eval.select_on"] == "val":
    problems.append(
      f"data.val_fraction is {values['data.val_fraction']}; selecting on held-out train images "
      "(eval.select_on=val) needs a fraction between 0 and 1."
    )
  if not 0 <= values["data.target_crop_prob"] <= 1:
    problems.append(f"data.target_crop_prob is {values['data.target_crop_prob']}, not in [0, 1].")
  if not re.fullmatch(r"|auto|full|[^,]+,[^,]+", values["data.range"]):
    problems.append(
      f"data.range is {values['data.range']!r}; it must be LOW,HIGH, full, auto or empty."
    )
  problems += _ablation_problems(values)
  for name in ("data.crop_margin", "dino.bank", "dino.bank_refresh_epochs", "loss.distill_weight"):
    if values[name] < 0:
      problems.append(f"{name} is {values[name]}; it must not be negative.")
  if values["dino.checkpoint"] == "random" and values["data.root"] != "synthetic":
    problems.append(
      'dino.checkpoint is "random", which only the quick start on synthetic scenes may use. '
      "Name a DINOv2 checkpoint."
    )
  if values["train.batch_size"] % max(values["host_devices"], 1):
    problems.append(
      f"train.batch_size is {values['train.batch_size']}, which {values['host_devices']} host "
      "devices cannot share equally. Use "
      f"{-(-values['train.batch_size'] // values['host_devices']) * values['host_devices']}, or "
      "change host_devices."
    )
  address = _ADDRESS.fullmatch(values["distributed"])
  if values["distributed"] not in ("off", "auto") and not (
    address and int(address[2]) < int(address[1])
  ):
    problems.append(
      f"distributed is {values['distributed']!r}; it must be off, auto (TPU pods, SLURM, Open "
      "MPI), or HOST:PORT,COUNT,INDEX: the address of process 0, the number of processes, and the "
      "0-based number of this one."
    )
  profile = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", values["profile_steps"])
  if values["profile_steps"] and not (profile and int(profile[1]) <= int(profile[2])):
    problems.append(
      f"profile_steps is {values['profile_steps']!r}; it must be FIRST-LAST (10-12), or empty."
    )
  if problems:
    raise ValueError("\n  ".join([f"{len(problems)} problems in the config:", *problems]))


def _check_complete(values: dict[str, object], source: str) -> None:
  """Raises ValueError if settings are missing, as from an older version's `config.json`."""
  from configs import base

  ours = flat(base.get_config())
  own = "train.schedule_args."  # differ between schedules
  missing = [name for name in ours if name not in values and not name.startswith(own)]
  if missing:
    lines = [f"{name} (configs/base.py: {json.dumps(ours[name])})" for name in missing]
    raise ValueError(
      "\n  ".join([f"{source} lacks {len(missing)} settings of this version:", *lines])
      + "\nAn older version wrote it. Add them with the values that the run used, or use that "
      "version."
    )


def _ablation_problems(values: dict) -> list[str]:
  """Lists contradictions among the settings that only ablations need."""
  problems, mode = [], values["mode"]
  for name, is_used, modes in (
    ("model.share", values["model.share"] != "both", ("fdep",)),
    ("loss.distill_weight", values["loss.distill_weight"] > 0, ("fdep",)),
    ("model.on_dino", values["model.on_dino"] != "no", ("fdep_wo_coisd",)),
    ("dino.unfreeze", values["dino.unfreeze"], ("fdep_wo_coisd",)),
  ):
    if is_used and mode not in modes:
      problems.append(f"{name} is {values[name]!r}, which needs mode {modes[0]}; it is {mode!r}.")
  if values["dino.unfreeze"] and values["dino.bank"]:
    problems.append("dino.bank needs a frozen DINOv2. Set dino.bank=0 or dino.unfreeze=False.")
  if values["dino.unfreeze"] and values["dino.dtype"] != "float32":
    problems.append("dino.unfreeze trains DINOv2, which needs dino.dtype=float32.")
  if (values["train.labels"] != "true") != bool(values["train.teacher"]):
    problems.append(
      f"train.labels is {values['train.labels']!r} and train.teacher {values['train.teacher']!r}; "
      "pseudo-labels need the folder of the run that makes them, and true labels none."
    )
  return problems


def results_of(config: ConfigDict) -> dict[str, object]:
  """Returns the settings that change a run's results."""
  values = _comparable(config)
  uses_length = "steps" in [v for k, v in values.items() if k.startswith("train.schedule_args.")]
  return {
    key: value
    for key, value in values.items()
    if not _FREE.fullmatch(key) or (uses_length and key in ("train.steps", "train.epochs"))
  }


def differing(theirs: ConfigDict, config: ConfigDict) -> list[str]:
  """Lists the differing settings that change results, as "name: value there, value here"."""
  ours, theirs = _comparable(config), _comparable(theirs)
  return [
    f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
    for key in sorted({*results_of(config), *(k for k in theirs if k not in ours)})
    if ours.get(key) != theirs.get(key) and (key in ours or not _FREE.fullmatch(key))
  ]


def _comparable(config: ConfigDict) -> dict[str, object]:
  """Returns all settings, the teacher by its folder's name: the path does not change results."""
  values = flat(config)
  return values | {"train.teacher": os.path.basename(values.get("train.teacher", "").rstrip("/"))}


def check_workdir(workdir: pathlib.Path, config: ConfigDict, moved: bool = False) -> None:
  """Raises if a folder belongs to a run with different settings.

  Args:
    workdir: of the run; need not exist.
    config: to train.
    moved: accepts different paths of data and DINOv2; the caller compares their contents.

  Raises:
    ValueError: settings differ; the message lists all.
  """
  if not (workdir / "config.json").exists():
    return
  lines = differing(_read(workdir), config)
  if moved:
    lines = [line for line in lines if line.partition(":")[0] not in _PLACES]
  if not lines:
    return
  more = "Choose a different --workdir, or use the settings of that run."
  if all(line.startswith(("train.steps:", "train.epochs:")) for line in lines):
    more = (
      f"Its {config.train.schedule} stretches with the length (train.schedule_args), so the steps "
      "that are done would have had other learning rates: a longer run is a different run. Choose "
      "a different --workdir. Runs with a constant rate can be made longer."
    )
  raise ValueError(
    "\n  ".join([f"{workdir} contains a run of a different config:", *lines]) + f"\n{more}"
  )


def claim_workdir(workdir: pathlib.Path, config: ConfigDict, moved: bool = False) -> None:
  """Claims a run folder: writes `config.json`, or raises if it belongs to a different run.

  Raises:
    ValueError: as `check_workdir`, or the folder cannot be written.
  """
  check_workdir(workdir, config, moved)
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, config.to_dict())
  except OSError as error:
    raise ValueError(
      f"{workdir} cannot be written ({error.strerror}). Choose a different folder."
    ) from None


def load(workdir: str | os.PathLike) -> ConfigDict:
  """Reads the config of a run folder.

  Raises:
    FileNotFoundError: the folder has none.
    ValueError: it is damaged, or lacks settings of this version.
  """
  config = _read(workdir)
  _check_complete(flat(config), f"{workdir}/config.json")
  return config


def completed(values: dict) -> ConfigDict:
  """Returns the config of an earlier version with the settings that were added since."""
  config = ConfigDict(values)
  known = flat(config)
  config.update_from_flattened_dict({k: v for k, v in _ADDED.items() if k not in known})
  return config


def _read(workdir: str | os.PathLike) -> ConfigDict:
  path = pathlib.Path(workdir) / "config.json"
  try:
    return completed(json.loads(path.read_text()))
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} is not the folder of a run."
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} is not a config: {error}") from None
