"""Configs as users meet them: typos explained, values checked, a run folder kept to one config."""

import difflib
import importlib.util
import json
import os
import pathlib
import re

from ml_collections import ConfigDict

from fdep_jax.runtime import files

# A run may be continued with other values of these: they do not change what a step computes.
_FREE = re.compile(
  r"train\.(steps|epochs|nonfinite|remat)|(log|checkpoint)\..*|host_devices|distributed"
  r"|profile_steps|dino\.(bank_folder|shard)|eval\.(batch_size|save_probs)|data\.threads"
)

# Settings that runs of earlier versions do not have, and the value that they ran with.
_ADDED = {"model.start_prob": 0.0}


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
  "checkpoint.every_steps", "checkpoint.keep", "log.every_steps", "host_devices",
)  # fmt: skip


def flat(config: ConfigDict) -> dict[str, object]:
  """Every setting by its dotted name, as JSON takes it."""

  def walk(prefix, value):
    if isinstance(value, dict):
      for key, inner in value.items():
        yield from walk(f"{prefix}{key}.", inner)
    else:
      yield prefix[:-1], list(value) if isinstance(value, tuple) else value

  return dict(walk("", config.to_dict()))


def explain_flags(argv: list[str], error: Exception) -> str:
  """What is wrong with a command line that could not be parsed: unknown settings by name."""
  arguments = dict(
    _split_flag(a, following) for a, following in zip(argv, [*argv[1:], ""], strict=True)
  )
  lines = []
  if os.path.isfile(arguments.get("--config", "")):
    spec = importlib.util.spec_from_file_location("config", arguments["--config"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = list(flat(module.get_config()))
    for argument in arguments:
      name = argument.removeprefix("--config.")
      if name == argument or name in known:
        continue
      near = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
      near += [k for k in difflib.get_close_matches(name, known, 3, 0.5) if k not in near]
      hint = f"The nearest are {', '.join(near)}." if near else f"There are {', '.join(known)}."
      lines.append(f"The config has no setting {name!r}. {hint}")
  return "\n".join(lines) or str(error)


def _split_flag(argument: str, following: str) -> tuple[str, str]:
  name, equals, value = argument.partition("=")
  return name, value if equals else following


def check(config: ConfigDict) -> None:
  """Refuses missing settings, else values that cannot work, all of them in one ValueError."""
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
  if not 0 <= values["model.start_prob"] < 1:
    problems.append(f"model.start_prob is {values['model.start_prob']}, not in [0, 1).")
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
      "devices cannot share equally."
    )
  address = _ADDRESS.fullmatch(values["distributed"])
  if values["distributed"] not in ("off", "auto") and not (
    address and int(address[2]) < int(address[1])
  ):
    problems.append(
      f"distributed is {values['distributed']!r}; it must be off, auto (TPU pods, SLURM, Open "
      "MPI), or HOST:PORT,COUNT,INDEX: the address of process 0, how many processes there are, and "
      "which of them this is, from 0."
    )
  profile = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", values["profile_steps"])
  if values["profile_steps"] and not (profile and int(profile[1]) <= int(profile[2])):
    problems.append(
      f"profile_steps is {values['profile_steps']!r}; it must be FIRST-LAST, as 10-12, or empty."
    )
  if problems:
    raise ValueError("\n  ".join([f"{len(problems)} problems in the config:", *problems]))


def _check_complete(values: dict[str, object], source: str) -> None:
  """Refuses a config that lacks settings, as an older version's `config.json` does."""
  from configs import base

  ours = flat(base.get_config())
  own = "train.schedule_args."  # other schedules have other arguments
  missing = [name for name in ours if name not in values and not name.startswith(own)]
  if missing:
    lines = [f"{name} (configs/base.py: {json.dumps(ours[name])})" for name in missing]
    raise ValueError(
      "\n  ".join([f"{source} lacks {len(missing)} settings of this version:", *lines])
      + "\nAn older version wrote it. Add them with the values that say what the run did, or use "
      "that version."
    )


def _ablation_problems(values: dict) -> list[str]:
  """What does not go together among the settings that only ablations need."""
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
    problems.append("dino.bank stores what a frozen DINOv2 gives; dino.unfreeze needs dino.bank=0.")
  if values["dino.unfreeze"] and values["dino.dtype"] != "float32":
    problems.append("dino.unfreeze trains DINOv2, which needs dino.dtype=float32.")
  if (values["train.labels"] != "true") != bool(values["train.teacher"]):
    problems.append(
      f"train.labels is {values['train.labels']!r} and train.teacher {values['train.teacher']!r}; "
      "pseudo-labels need the folder of the run that makes them, and true labels none."
    )
  return problems


def results_of(config: ConfigDict) -> dict[str, object]:
  """The settings that change what a run computes."""
  values = _comparable(config)
  uses_length = "steps" in [v for k, v in values.items() if k.startswith("train.schedule_args.")]
  return {
    key: value
    for key, value in values.items()
    if not _FREE.fullmatch(key) or (uses_length and key in ("train.steps", "train.epochs"))
  }


def differing(theirs: ConfigDict, config: ConfigDict) -> list[str]:
  """The settings in which two configs of other results differ: "name: one there, another here"."""
  ours, theirs = _comparable(config), _comparable(theirs)
  return [
    f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
    for key in sorted({*results_of(config), *(k for k in theirs if k not in ours)})
    if ours.get(key) != theirs.get(key) and (key in ours or not _FREE.fullmatch(key))
  ]


def _comparable(config: ConfigDict) -> dict[str, object]:
  """A teacher is the same run wherever its folder lies."""
  values = flat(config)
  return values | {"train.teacher": os.path.basename(values.get("train.teacher", "").rstrip("/"))}


def claim_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Writes `config.json`, or refuses a folder that belongs to a config of other results.

  Raises:
    ValueError: naming every setting that differs, or that the folder cannot be written.
  """
  path = workdir / "config.json"
  if path.exists():
    lines = differing(_read(workdir), config)
    if lines:
      raise ValueError(
        "\n  ".join([f"{workdir} holds a run of another config:", *lines])
        + "\nChoose another --workdir, or the settings of the run that is there."
      )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, config.to_dict())
  except OSError as error:
    raise ValueError(f"{workdir} cannot be written ({error.strerror}). Choose another.") from None


def load(workdir: str | os.PathLike) -> ConfigDict:
  """The config that a run folder was made with.

  Raises:
    FileNotFoundError: the folder has none.
    ValueError: it is damaged, or lacks settings of this version.
  """
  config = _read(workdir)
  _check_complete(flat(config), f"{workdir}/config.json")
  return config


def _read(workdir: str | os.PathLike) -> ConfigDict:
  path = pathlib.Path(workdir) / "config.json"
  try:
    config = ConfigDict(json.loads(path.read_text()))
    known = flat(config)
    config.update_from_flattened_dict({k: v for k, v in _ADDED.items() if k not in known})
    return config
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} is not the folder of a run."
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} is not a config: {error}") from None
