"""Gives the mean and deviation that a published network's images are normalised with, by name."""

import math

import numpy as np

from fdep_jax.data import Statistic

_GREY_LEVELS = {  # mean and deviation of grey levels, 0 to 255
  # XinyiYing/BasicIRSTD utils.py, `get_img_norm_cfg`
  "basicirstd:NUAA-SIRST": (101.06385040283203, 34.619606018066406),
  "basicirstd:NUDT-SIRST": (107.80905151367188, 33.02274703979492),
  "basicirstd:IRSTD-1K": (87.4661865234375, 39.71953201293945),
  "basicirstd:NUDT-SIRST-Sea": (43.62403869628906, 18.91838264465332),
  "basicirstd:SIRST4": (62.10432052612305, 23.96998405456543),
  "basicirstd:IRDST-real": (101.54053497314453, 56.49856185913086),
  # XinyiYing/LESPS utils.py. Those of its other sets are BasicIRSTD's, which has none for SIRST3.
  "lesps:SIRST3": (95.010, 41.511),
  # xdFai/SCTransNet utils.py: NUAA-SIRST's, also for SIRST3
  "sctransnet:SIRST3": (101.06385040283203, 34.619606018066406),
}
KNOWN: dict[str, tuple[Statistic, Statistic]] = {
  "none": (0.0, 1.0),  # grey levels / 255
  # torchvision; YeRen123455/Infrared-Small-Target-Detection (DNANet) and many others
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  **{name: (mean / 255, std / 255) for name, (mean, std) in _GREY_LEVELS.items()},
}
FLAGS = (
  "--mean M --std S (as fractions of white, or as grey levels of 0 to 255), or --normalisation "
  f"NAME with one of {', '.join(KNOWN)}"
)


def parse(
  mean: str | None, std: str | None, name: str | None
) -> tuple[Statistic, Statistic] | None:
  """Reads what a command line says of the normalisation.

  Args:
    mean, std: a number, or three for red, green and blue, with commas. A deviation above 1 says
      that both are grey levels of 0 to 255; otherwise both are fractions of white.
    name: one of `KNOWN`, in upper or lower case.

  Returns:
    Mean and deviation of grey levels / 255; None if nothing is given.

  Raises:
    ValueError: a name is not known, or numbers are missing, no numbers, or of different units.
  """
  if name:
    if mean or std:
      raise ValueError(
        f"--normalisation {name} is a mean and a deviation. Leave out --mean and --std."
      )
    known = {known.lower(): values for known, values in KNOWN.items()}
    if name.lower() not in known:
      raise ValueError(f"--normalisation {name} is not known. There are {', '.join(KNOWN)}.")
    return known[name.lower()]
  if not mean and not std:
    return None
  if not mean or not std:
    there, absent = ("mean", "std") if mean else ("std", "mean")
    raise ValueError(f"--{there} is given without --{absent}. Give both.")
  return _checked(_numbers("mean", mean), _numbers("std", std), f"--mean {mean} --std {std}")


def stated(means: list[float], stds: list[float]) -> tuple[Statistic, Statistic]:
  """Returns the mean and deviation that a published checkpoint states, in the units of `parse`.

  Raises:
    ValueError: they cannot be meant.
  """
  return _checked(means, stds, f"its mean {means} and std {stds}")


def _checked(means: list[float], stds: list[float], said: str) -> tuple[Statistic, Statistic]:
  levels = max(stds) > 1
  problem = ""
  if not all(map(math.isfinite, (*means, *stds))):
    problem = "they are not finite"
  elif min(stds) <= 0 or min(means) < 0:
    problem = "a deviation is above 0, and a mean is not below"
  elif max(*means, *stds) > 255:
    problem = "grey levels are 255 at most"
  elif not levels and max(means) > 1:
    problem = "the mean is of grey levels from 0 to 255, the deviation of fractions"
  elif levels and any(0 < value <= 1 for value in (*means, *stds)):
    problem = "one is of grey levels from 0 to 255, one of fractions"
  if problem:
    raise ValueError(
      f"{said}: {problem}. Give both as fractions of white (0.39 and 0.13) or both as grey levels "
      "(99.5 and 33.2)."
    )
  unit = 255 if levels else 1
  return _statistic([m / unit for m in means]), _statistic([s / unit for s in stds])


def of_file(mean: float | list[float], std: float | list[float]) -> tuple[Statistic, Statistic]:
  """Returns the mean and deviation that a file of `--mode export` holds, of grey levels / 255."""
  return _statistic(np.ravel(mean).tolist()), _statistic(np.ravel(std).tolist())


def choose(
  standardised: bool,
  channels: int,
  given: tuple[Statistic, Statistic] | None,
  of_file: tuple[Statistic, Statistic] | None,
) -> tuple[Statistic, Statistic]:
  """Returns the mean and deviation for a network.

  Args:
    standardised: false for a network that takes grey levels / 255 as they are.
    channels: of its image.
    given: from `parse`.
    of_file: the checkpoint's own, from `of_file`.

  Raises:
    ValueError: there is none, there are two, or three channels have one that the network lacks.
  """
  if not standardised:
    if given not in (None, KNOWN["none"]):
      raise ValueError(
        "the network takes grey levels divided by 255 as they are. Leave out --mean, --std and "
        "--normalisation."
      )
    return KNOWN["none"]
  if given and of_file:
    raise ValueError(
      "the file has its own mean and deviation. Leave out --mean, --std and --normalisation."
    )
  chosen = given or of_file
  if chosen is None:
    raise ValueError(f"the file does not say how its images are normalised. Give {FLAGS}.")
  if channels == 1 and any(isinstance(value, tuple) for value in chosen):
    raise ValueError(
      "the network takes one grey channel, and the normalisation is of three. Give one mean and "
      "one deviation, or a different name."
    )
  return chosen


def _numbers(flag: str, text: str) -> list[float]:
  try:
    values = [float(part) for part in text.split(",")]
  except ValueError:
    values = []
  if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
    raise ValueError(f"--{flag} {text}: it must be a number, or three with commas between.")
  return values


def _statistic(values: list[float]) -> Statistic:
  return tuple(values) if len({*values}) > 1 else values[0]
