"""Checks the command line before it is parsed: modes, flags that a mode does not use, words.

Imports the standard library only, so that `--mode score` starts without jax, flax and absl.
"""

import difflib
import os
from collections.abc import Mapping, Sequence

from fdep_jax import zoo

_TRAINED = ("original", "fdep_wo_coisd", "fdep")  # values of the setting `mode`
_TRUTH = ("true", "false", "yes", "no", "on", "off")

# Why a mode does not use a flag, and what to do instead.
_INSTEAD = {
  ("train", "checkpoint"): "A run continues from its own newest checkpoint; a new one starts from "
  "its seed.",
  ("train", "data"): "The dataset is a setting: --config.data.root=FOLDER.",
  ("train", "input"): "Targets in frames are found by --mode predict.",
  ("train", "out"): "The results of a run are in its --workdir.",
  ("train", "seeds"): "The seed of a run is --config.seed=1.",
  ("sweep", "out"): "The runs are in --workdir; --mode table writes to --out.",
  ("eval", "threshold"): "IoU, Pd and Fa are those at 0.5, HSE covers all thresholds, and "
  "report.html has a slider.",
  ("score", "threshold"): "IoU, Pd and Fa are those at 0.5, and HSE covers all thresholds.",
  ("eval", "branch"): "It scores every branch that the run trained.",
  ("export", "branch"): "It writes the light branch, which is the network without the prior.",
  ("export", "threshold"): "The program returns probabilities; compare them with any threshold.",
  ("report", "workdir"): "Name the folders of evaluated runs as --runs A,B.",
}
_FOR_RUNS = "It uses the settings of the run"  # of modes that read a trained run
_CONFIG = {
  "eval": f"{_FOR_RUNS}: leave --config FILE out, and give what shall differ alone, as in "
  "--config.data.root=PATH --out DIR.",
  "predict": f"{_FOR_RUNS}: leave --config FILE out. Only the place of the prior's file may "
  "differ: --config.prior.checkpoint=FILE.",
  "export": f"{_FOR_RUNS}, which --workdir or --checkpoint names.",
  "validate": "Name the dataset with --data; --range LOW,HIGH is its data.range.",
}


def mode_of(argv: Sequence[str]) -> str | None:
  """Returns the value of --mode, the last if it is repeated; None if it is not given."""
  mode = None
  for argument, following in zip(argv, [*argv[1:], None], strict=False):
    name, equals, value = argument.partition("=")
    if name in ("--mode", "-mode"):
      mode = value if equals else following
  return mode


def given(argv: Sequence[str], known: Sequence[str]) -> list[str]:
  """Lists the known flags on a command line, without dashes, in order.

  "config" stands for --config FILE, "config.…" for a changed setting.
  """
  found = []
  for argument in argv:
    if argument == "--":
      break
    if not argument.startswith("-"):
      continue
    name = argument.lstrip("-").partition("=")[0]
    if name not in known and name.startswith("no"):
      name = name.removeprefix("no")
    if name in known or name.startswith("config."):
      found.append(name)
  return list(dict.fromkeys(found))


def check(
  argv: Sequence[str], uses: Mapping[str, Sequence[str]], settings: Mapping[str, str]
) -> None:
  """Refuses an unknown mode and flags that the mode does not use.

  Args:
    argv: the words after the program's name.
    uses: {mode: its flags}. "config" means --config FILE together with changed settings.
    settings: {mode: why}: modes that take changed settings of a run, without --config FILE.

  Raises:
    ValueError: one line for each flag, with the reason.
  """
  mode = mode_of(argv)
  mode = "train" if mode is None else mode
  if mode not in uses:
    raise ValueError(_unknown_mode(mode, list(uses)))
  known = {name for names in uses.values() for name in names} | {"mode", "config"}
  lines, seen = [], given(argv, sorted(known))
  for name in seen:
    flag = name.partition(".")[0]
    if flag == "mode" or flag in uses[mode] or (mode in settings and name != flag):
      continue
    takes = ", ".join(f"--{use}" for use in uses[mode])
    reason = _INSTEAD.get((mode, name)) or (_CONFIG.get(mode) if flag == "config" else None)
    lines.append(f"--mode {mode} does not use --{name}. {reason or f'It takes {takes}.'}")
  if any(name.startswith("config.") for name in seen) and "config" not in seen:
    if "config" in uses[mode]:
      lines.append("--config.… changes a setting of a config: name the config, --config FILE.")
    elif "method" in seen:
      lines.append("--method NAME is no network and has no settings. Leave --config.… out.")
    elif (
      mode in settings
      and not {"workdir", "backbone"} & {*seen}
      and not any(map(zoo.is_light, values(argv, "checkpoint")))
    ):
      lines.append(
        "--config.… changes a setting of a run: name its folder, --workdir RUN, or a network, "
        f"--checkpoint {zoo.BEST}."
      )
  if lines:
    raise ValueError("\n".join(lines))


def values(argv: Sequence[str], flag: str) -> list[str]:
  """Lists the values of a flag, in order."""
  found = []
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    if name in (f"--{flag}", f"-{flag}"):
      found.append(value if equals else following)
  return found


def _unknown_mode(mode: str, modes: Sequence[str]) -> str:
  if mode in _TRAINED:
    return (
      f"--mode {mode} is no mode of the program. Which branches are trained is a setting: "
      f"--config.mode={mode}."
    )
  near = [name for name in modes if mode and (mode.startswith(name) or name.startswith(mode))]
  near = near or difflib.get_close_matches(mode, modes, 1)
  hint = f" The nearest is {near[0]}." if near else ""
  return f"--mode {mode} is no mode of the program. There are {', '.join(modes)}.{hint}"


def check_words(words: Sequence[str], argv: Sequence[str]) -> None:
  """Refuses words that belong to no flag.

  Args:
    words: those that the parser left over.
    argv: all of them.

  Raises:
    ValueError: says what to write instead.
  """
  if not words:
    return
  lines = [f"{len(words)} words belong to no flag: {' '.join(words)}."]
  if len(words) == 1:
    lines = [f"The word {words[0]!r} belongs to no flag."]
  before = dict(zip(argv[1:], argv, strict=False))
  for word in words:
    flag = before.get(word, "")
    if word.lower() in _TRUTH and flag.startswith("-") and "=" not in flag:
      lines.append(f"Write {flag}={word.capitalize()}.")
    elif word.endswith(".py") and os.path.isfile(word):
      lines.append(f"Write --config={word}.")
  raise ValueError(" ".join(lines))
