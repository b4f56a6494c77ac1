"""Checks configs, explains wrong command lines, and keeps a run folder to one config."""

import difflib
import importlib.util
import json
import logging
import os
import pathlib
import re
import traceback
from collections.abc import Container, Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from fdep_jax.runtime import files

# A run may be continued with different values of these: they do not change a step's result.
_FREE = re.compile(
  r"train\.(steps|epochs|nonfinite|remat)|(log|checkpoint)\..*|host_devices|distributed"
  r"|profile_steps|prior\.(bank_folder|shard)|eval\.(batch_size|branches|save_probs|least_steps)"
  r"|data\.(threads|on_device|lazy)"
)


# Settings that runs of earlier versions do not have, and the value that they ran with.
_ADDED = {
  "eval.least_steps": 1,
  "eval.select_by": "hse",
  "eval.branches": "all",
  "model.start_prob": 0.0,
  "model.bn_momentum": 0.0,
  "train.init_from": "",
  "data.range": "",
  "data.train_images": 0,
  "data.on_device": False,
  "data.lazy": False,
  "train.steps_per_dispatch": 1,
  "prior.normalisation": "model",
}

# Settings that build something else than an `FDEP` around a detector, and their other values.
_WHOLE_DETECTOR = {"model.share": "both", "model.on_dino": "no", "prior.unfreeze": False}

# What each process of a run may have for itself; of the paths, the contents are compared.
_OWN = re.compile(
  r"distributed|host_devices|data\.(root|threads)|log\.(compile_cache|progress)"
  r"|prior\.(checkpoint|bank_folder)|train\.teacher"
)

# Paths: a begun run may be continued with the same files at another place.
_PLACES = ("data.root", "prior.checkpoint")

_ADDRESS = re.compile(r"[^,\s]+:\d+,(\d+),(\d+)")  # of `distributed`

_CHOICES = {
  "mode": ("original", "fdep_wo_coisd", "fdep", "classical"),
  "model.fusion": ("samf", "add"),
  "model.bn_stats": ("per_branch", "shared"),
  "model.share": ("both", "encoder", "decoder"),
  "model.on_dino": ("no", "plain", "msda"),
  "data.augment": ("recipe", "dihedral", "none"),
  "prior.normalisation": ("model", "imagenet", "satellite"),
  "prior.dtype": ("float32", "bfloat16"),
  "train.dtype": ("float32", "bfloat16"),
  "train.nonfinite": ("stop", "skip"),
  "train.remat": ("none", "products"),
  "train.labels": ("true", "pseudo", "both"),
  "loss.edge_mode": ("intended", "released"),
  "eval.select_on": ("val", "test"),
  "eval.select_by": ("hse", "iou"),
  "eval.branches": ("all", "deployed"),
}
_POSITIVE = (
  "data.crop", "data.threads", "train.batch_size", "train.learning_rate", "eval.batch_size",
  "eval.least_steps", "train.steps_per_dispatch",
  "checkpoint.every_steps", "checkpoint.keep", "log.every_steps", "host_devices",
)  # fmt: skip


# A section and the name that earlier versions gave it. `configs/base.py` has it under both, so
# whatever sets or reads the old name still works; run folders have the new one.
_OLD, _NEW = "dino", "prior"


def new_name(name: str) -> str:
  """Returns the name that a setting has now: prior.bank for dino.bank."""
  return f"{_NEW}.{name.removeprefix(f'{_OLD}.')}" if name.startswith(f"{_OLD}.") else name


def adopt(config: ConfigDict, source: str = "the config") -> None:
  """Takes over settings under their old names, in place; says so in one line.

  Raises:
    ValueError: one setting has two values, one under each name.
  """
  if _OLD not in config and _NEW not in config:
    return
  if _OLD in config and _NEW in config and config[_OLD] is config[_NEW]:
    return
  with config.unlocked():
    if _NEW not in config:
      config[_NEW] = config[_OLD]
      _add(config)
      logging.info("%s has settings named %s.*, which are now called %s.*", source, _OLD, _NEW)
    elif _OLD in config:
      _merge(config, source)
    config[_OLD] = config[_NEW]


def _merge(config: ConfigDict, source: str) -> None:
  """Takes each setting from the section where it is not the default."""
  from configs import base

  default, old, new = base.get_config()[_NEW], config[_OLD], config[_NEW]
  taken, clashes = [], []
  for name, value in old.items():
    if name not in new or new[name] == value or value == default.get(name):
      continue
    if new[name] == default.get(name):
      new[name] = value
      taken.append(f"{_OLD}.{name}")
    else:
      clashes.append(f"{_OLD}.{name} is {value!r} and {_NEW}.{name} is {new[name]!r}")
  if clashes:
    raise ValueError(
      f"{source}: {'; '.join(clashes)}. {_OLD} is the old name of {_NEW}; leave it out."
    )
  if taken:
    logging.info("%s sets %s, which is now called %s.*", source, ", ".join(taken), _NEW)


def old_flags(argv: list[str]) -> str:
  """Returns one line on a command line's settings that have new names; "" if there are none."""
  names = [argument.partition("=")[0].removeprefix("--config.") for argument in argv]
  old = [name for name in dict.fromkeys(names) if new_name(name) != name]
  if not old:
    return ""
  return f"{', '.join(old)}: now called {', '.join(map(new_name, old))}; the old names still work."


def as_dict(config: ConfigDict) -> dict:
  """Returns a config as nested dicts, each section once, under the name that it has now."""
  values = config.to_dict()
  old = values.pop(_OLD, None)
  return values if old is None or _NEW in values else {**values, _NEW: old}


def flat(config: ConfigDict) -> dict[str, object]:
  """Returns every setting by its dotted name, as JSON stores it."""

  def walk(prefix, value):
    if isinstance(value, dict):
      for key, inner in value.items():
        yield from walk(f"{prefix}{key}.", inner)
    else:
      yield prefix[:-1], list(value) if isinstance(value, tuple) else value

  return dict(walk("", as_dict(config)))


def explain_flags(argv: list[str], error: Exception) -> str:
  """Explains why a command line cannot be parsed: names unknown settings and similar ones."""
  arguments = dict(
    _split_flag(a, following) for a, following in zip(argv, [*argv[1:], ""], strict=False)
  )
  lines = []
  path, *own = arguments.get("--config", "").split(":", 1)  # FILE or FILE:ARGUMENT
  if os.path.isfile(path):
    try:
      spec = importlib.util.spec_from_file_location("config", path)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      if not hasattr(module, "get_config"):
        return f"{path} is no config: it has no function get_config. See configs/msda.py."
      known = list(flat(module.get_config(*own)))
    except Exception as refusal:  # whatever somebody's own file raises
      return str(refusal) if path.endswith(("of_run.py", "of_file.py")) else _at(path, refusal)
    for argument in arguments:
      name = argument.removeprefix("--config.")
      if name == argument or new_name(name) in known:
        continue
      lines.append(_unknown(name, known))
  return "\n".join(lines) or str(error)


def _at(path: str, error: Exception) -> str:
  """Says in one line where a config file fails."""
  kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
  if isinstance(error, SyntaxError):
    return f"{error.filename or path}, line {error.lineno}: {kind}{error.msg}"
  numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == path]  # fmt: skip
  return f"{path}{f', line {numbers[-1]}' if numbers else ''}: {kind}{error}"


def _unknown(name: str, known: Sequence[str]) -> str:
  """Says that there is no such setting, and which are near: also train.learning_rate for lr."""
  last = name.rsplit(".", 1)[-1]

  def named(other: str) -> bool:
    word = other.rsplit(".", 1)[-1]
    return last in (word, "".join(part[:1] for part in word.split("_")))

  near = [k for k in known if named(k)]
  near += [k for k in difflib.get_close_matches(name, known, 3, 0.5) if k not in near]
  hint = f"The nearest are {', '.join(near)}." if near else f"There are {', '.join(known)}."
  return f"The config has no setting {name!r}. {hint}"


def check_flags(values, of_run: Mapping[str, str]) -> None:
  """Applies the rules of lengths, and refuses settings on a command line that have no effect.

  Args:
    values: parsed flags, an absl `FlagValues`.
    of_run: {mode: pattern of the settings that it may change in a trained run, or for a file}.

  Raises:
    ValueError: one line a setting.
  """
  from ml_collections import config_flags

  config = values.config
  if config is None:
    return
  given = [new_name(name) for name in config_flags.get_override_values(values["config"])]
  mode = values.mode
  if mode in of_run:
    wrong = [name for name in given if not re.fullmatch(of_run[mode], name)]
    if wrong:
      known = [name for name in flat(config) if re.fullmatch(of_run[mode], name)]
      raise ValueError(
        f"--mode {mode} cannot change {', '.join(wrong)}, which the training has fixed or which "
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
    (r"prior\..*|model\.(fusion|share|on_dino)", mode == "original", "mode original uses no prior"),
    (r"model\.bn_stats|loss\.light_weight", mode != "fdep", f"mode {mode} trains one branch"),
    (r"model\.fusion", values["model.on_dino"] != "no", "model.on_dino replaces the fusion"),
    (r"prior\.bank_\w+", not values["prior.bank"], "prior.bank is 0"),
    (r"data\.lazy", values["data.root"] == "synthetic", "synthetic scenes are always in memory"),
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


def check(config: ConfigDict, trains: bool = True) -> None:
  """Raises one ValueError that lists all missing settings or, if none is, all wrong values.

  Args:
    config: all settings.
    trains: false for a run that is trained already. Its prior and new data need not fit, and
      another version may have written settings that this one does not have.
  """
  adopt(config)
  values = flat(config)
  _check_complete(values, "the config")
  problems = _unknown_settings(values) if trains else []
  for name, choices in _CHOICES.items():
    if values[name] not in choices:
      problems.append(f"{name} is {values[name]!r}; it must be one of {', '.join(choices)}.")
  problems += [
    f"{name} is {value}; it must be a finite number, which config.json can hold."
    for name, value in values.items()
    if trains and files.finite(value) != value
  ]
  problems += [f"{n} is {values[n]}; it must be positive." for n in _POSITIVE if not values[n] > 0]
  if values["train.steps"] <= 0 and values["train.epochs"] <= 0:
    problems.append("train.steps and train.epochs are both 0; one of them must be positive.")
  problems += [
    f"{name} is {values[name]}; it must not be negative."
    for name in ("train.steps", "train.epochs")
    if values[name] < 0
  ]
  problems += _data_problems(values)
  problems += [
    f"{name} is {values[name]}, not in [0, 1)."
    for name in ("model.start_prob", "model.bn_momentum")
    if not 0 <= values[name] < 1
  ]
  problems += _ablation_problems(values)
  if values["mode"] == "classical":
    from fdep_jax import classical

    try:
      classical.parse(values["model.backbone"])
    except ValueError as error:
      problems.append(f"model.backbone: {error}")
  for name in (
    "data.crop_margin",
    "prior.bank",
    "prior.bank_refresh_epochs",
    "loss.distill_weight",
  ):
    if values[name] < 0:
      problems.append(f"{name} is {values[name]}; it must not be negative.")
  random = values["prior.checkpoint"] == "random"
  if trains and random and values["data.root"] != "synthetic":
    problems.append(
      'prior.checkpoint is "random", which only the quick start on synthetic scenes may use. '
      "Name a prior's weight file."
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
    title = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the config:"
    raise ValueError("\n  ".join([title, *problems]))


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


def _unknown_settings(values: dict[str, object]) -> list[str]:
  """Lists settings that a config file adds and nothing reads, as a misspelt one."""
  from configs import base

  known = list(flat(base.get_config()))
  own = "train.schedule_args."  # differ between schedules, and optax refuses wrong ones
  return [_unknown(n, known) for n in values if n not in known and not n.startswith(own)]


def _data_problems(values: dict) -> list[str]:
  """Lists wrong values and contradictions among the settings of the data."""
  problems = []
  if not 0 < values["data.val_fraction"] < 1 and values["eval.select_on"] == "val":
    problems.append(
      f"data.val_fraction is {values['data.val_fraction']}; selecting on held-out train images "
      "(eval.select_on=val) needs a fraction between 0 and 1."
    )
  if values["data.train_images"] < 0:
    problems.append(
      f"data.train_images is {values['data.train_images']}; it must be a number of images, or 0 "
      "for all."
    )
  if not 0 <= values["data.target_crop_prob"] <= 1:
    problems.append(f"data.target_crop_prob is {values['data.target_crop_prob']}, not in [0, 1].")
  if not re.fullmatch(r"|auto|full|[^,]+,[^,]+", values["data.range"]):
    problems.append(
      f"data.range is {values['data.range']!r}; it must be LOW,HIGH, full, auto or empty."
    )
  if values["data.lazy"] and values["data.on_device"]:
    problems.append(
      "data.lazy and data.on_device are both True: images are decoded when they are needed, or "
      "kept in device memory. Set one to False."
    )
  if values["data.lazy"] and values["train.labels"] != "true":
    problems.append(
      f"train.labels is {values['train.labels']!r}, whose masks are kept in memory. Set "
      "data.lazy=False."
    )
  return problems


def _ablation_problems(values: dict) -> list[str]:
  """Lists contradictions among the settings that only ablations need."""
  problems, mode = [], values["mode"]
  for name, is_used, modes in (
    ("model.share", values["model.share"] != "both", ("fdep",)),
    ("loss.distill_weight", values["loss.distill_weight"] > 0, ("fdep",)),
    ("model.on_dino", values["model.on_dino"] != "no", ("fdep_wo_coisd",)),
    ("prior.unfreeze", values["prior.unfreeze"], ("fdep_wo_coisd",)),
  ):
    if is_used and mode not in modes:
      problems.append(f"{name} is {values[name]!r}, which needs mode {modes[0]}; it is {mode!r}.")
  if values["prior.unfreeze"] and values["prior.bank"]:
    problems.append("prior.bank needs a frozen DINOv2. Set prior.bank=0 or prior.unfreeze=False.")
  if values["prior.unfreeze"] and values["prior.dtype"] != "float32":
    problems.append("prior.unfreeze trains DINOv2, which needs prior.dtype=float32.")
  other = [name for name, usual in _WHOLE_DETECTOR.items() if values[name] != usual]
  if values["train.init_from"] and other:
    problems.append(
      f"train.init_from starts a whole detector, which {' and '.join(other)} change. Leave out one "
      "of them."
    )
  if (values["train.labels"] != "true") != bool(values["train.teacher"]):
    problems.append(
      f"train.labels is {values['train.labels']!r} and train.teacher {values['train.teacher']!r}; "
      "pseudo-labels need the folder of the run that makes them, and true labels none."
    )
  return problems


def _shown(value) -> object:
  return "empty" if value == "" else value


def results_of(config: ConfigDict) -> dict[str, object]:
  """Returns the settings that change a run's results."""
  values = _comparable(config)
  uses_length = "steps" in [v for k, v in values.items() if k.startswith("train.schedule_args.")]
  return {
    key: value
    for key, value in values.items()
    if not _FREE.fullmatch(key) or (uses_length and key in ("train.steps", "train.epochs"))
  }


def shared(config: ConfigDict) -> dict[str, object]:
  """Returns the settings that all processes of a run must have alike."""
  return {key: value for key, value in flat(config).items() if not _OWN.fullmatch(key)}


def differing(theirs: ConfigDict, config: ConfigDict) -> list[str]:
  """Lists the differing settings that change results, as "name: value there, value here"."""
  ours, theirs = _comparable(config), _comparable(theirs)
  return [
    f"{key}: {_shown(theirs.get(key))} there, {_shown(ours.get(key))} here"
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
    moved: accepts different paths of data and the prior; the caller compares their contents.

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
    files.write_json(path, as_dict(config))
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


def completed(values: dict, source: str = "the config") -> ConfigDict:
  """Returns the config of an earlier version with the settings that were added since.

  Args:
    values: nested, as `as_dict` returns them; the names may be old.
    source: where they are from, for messages.
  """
  config = ConfigDict(values)
  adopt(config, source)
  _add(config)
  return config


def _add(config: ConfigDict) -> None:
  """Adds the settings that earlier versions lacked, with the values that they ran with."""
  known = flat(config)
  config.update_from_flattened_dict({k: v for k, v in _ADDED.items() if k not in known})


def _read(workdir: str | os.PathLike) -> ConfigDict:
  path = files.expand(workdir) / "config.json"
  try:
    config = completed(json.loads(path.read_text()), str(path))
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} is not the folder of a run."
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} is not a config: {error}") from None
  return config
