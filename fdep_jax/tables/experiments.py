"""Defines tables of experiments (`configs/tables`): changed settings and the paper's numbers."""

import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from fdep_jax import settings


class Row(NamedTuple):
  """One experiment.

  Rows with the same label and different sides are printed side by side, as the datasets of Tab. 2.
  """

  name: str  # of its runs' folders; tables with equal runs use equal names
  label: tuple[str, ...]  # the first columns
  changes: dict[str, object]  # settings by dotted name; texts may have "{seed}" and "{workdir}"
  paper: dict[str, float | None]  # the paper's numbers by column
  side: str = ""
  teacher: str = ""  # row whose run with the same seed makes the pseudo-labels
  baseline: str = ""  # row to compare with; default the first with its first label and side
  note: str = ""
  uncounted: int = 0  # parameters that the paper counts in P and the model does not have
  seeds: tuple[int, ...] = ()  # those of the table's that it runs with; () for all of them
  stage: int = 0  # a sweep begins runs of a higher stage after those of the lower ones


class Table(NamedTuple):
  """Experiments that make one table."""

  title: str
  head: tuple[str, ...]  # headings of the labels
  columns: tuple[str, ...]  # of metrics.columns.METRICS
  rows: tuple[Row, ...]
  seeds: tuple[int, ...] = (0,)
  trained_params: bool = True  # P as the paper counts it, else of the deployed branch alone


def load(path: str | os.PathLike) -> Table:
  """Loads the table that a file of `configs/tables` defines beside its base config.

  Raises:
    ValueError: the file defines no table, two rows have one name, or a row names an unknown one.
  """
  spec = importlib.util.spec_from_file_location("table", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_table"):
    raise ValueError(
      f"{path} is the config of one run, not a table: it has no get_table(). Choose a "
      "table in configs/tables, or --mode train for this config."
    )
  table = module.get_table()
  names = [row.name for row in table.rows]
  for row in table.rows:
    if names.count(row.name) > 1:
      raise ValueError(f"{path} has two rows named {row.name}, which would share a folder.")
    for kind, other in (("teacher", row.teacher), ("baseline", row.baseline)):
      if other and other not in names:
        raise ValueError(f"{path}: the {kind} of row {row.name} is {other}, which is not a row.")
    strange = sorted(set(row.seeds) - set(table.seeds))
    if strange:
      raise ValueError(f"{path}: row {row.name} has seeds {strange}, which the table has not.")
  return table


def baselines(rows: Sequence[Row]) -> dict[str, str]:
  """Returns {row: the row to compare it with}, by name; a baseline maps to itself."""
  first = {}
  for row in rows:
    first.setdefault((row.label[0], row.side), row.name)
  return {row.name: row.baseline or first[row.label[0], row.side] for row in rows}


def from_flags(values) -> tuple[Table, ConfigDict]:
  """Returns the table and the base config of the command line.

  Raises:
    ValueError: a setting of the command line overrides a setting that the rows vary.
  """
  holder = values["config"] if isinstance(values, flags.FlagValues) else None
  path = config_flags.get_config_filename(holder).split(":", 1)[0]  # FILE or FILE:ARGUMENT
  table = load(path)
  if values.seeds:
    table = table._replace(seeds=_seeds(values.seeds))
  taken = {settings.new_name(name) for row in table.rows for name in row.changes} | {"seed"}
  if taken & {"train.steps", "train.epochs"}:  # either is a length
    taken |= {"train.steps", "train.epochs"}
  given = {settings.new_name(name) for name in config_flags.get_override_values(holder)}
  clashes = sorted(taken & given)
  if clashes:
    raise ValueError(
      f"The rows of {path} set {', '.join(clashes)} themselves (seeds: --seeds 0,1,2). Leave "
      "that out, or change the table. If data or weights are elsewhere, link them to the paths of "
      "the rows."
    )
  return table, values.config


def _seeds(texts: Sequence[str]) -> tuple[int, ...]:
  if not all(text.strip().isdecimal() for text in texts) or len(set(map(int, texts))) < len(texts):
    raise ValueError(
      f"--seeds is {','.join(texts)!r}; it must be different whole numbers from 0, as in 0,1,2."
    )
  return tuple(int(text) for text in texts)


def resolve(base: ConfigDict, row: Row, seed: int, workdir: str | os.PathLike) -> ConfigDict:
  """Makes the config of one run.

  Raises:
    ValueError: the row changes a setting that does not exist.
  """
  config = base.copy_and_resolve_references()
  known = settings.flat(config)
  unknown = [name for name in row.changes if settings.new_name(name) not in known]
  if unknown:
    raise ValueError(f"Row {row.name} changes {', '.join(unknown)}, which no config has.")
  for name, value in row.changes.items():
    if isinstance(value, str):
      value = value.format(seed=seed, workdir=pathlib.Path(workdir).expanduser())
    config.update_from_flattened_dict({name: value})
  if row.teacher:
    config.train.teacher = str(folder(workdir, row.teacher, seed))
  config.seed = seed
  return config


def folder(workdir: str | os.PathLike, name: str, seed: int) -> pathlib.Path:
  """Returns the folder of one run."""
  return pathlib.Path(workdir).expanduser() / f"{name}_seed{seed}"
