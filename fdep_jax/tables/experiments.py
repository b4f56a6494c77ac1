"""Tables of experiments (`configs/tables`): rows of changed settings beside the paper's numbers."""

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

  Rows of one label and several sides stand side by side, as the datasets of Tab. 2 do.
  """

  name: str  # of its runs' folders; the same in two tables where the runs are the same
  label: tuple[str, ...]  # the first columns
  changes: dict[str, object]  # settings by dotted name; texts may hold "{seed}" and "{workdir}"
  paper: dict[str, float | None]  # the paper's numbers; a column that is absent is not printed
  side: str = ""
  teacher: str = ""  # the row whose run of the same seed makes the pseudo-labels
  baseline: str = ""  # the row it is compared with; else the first of its first label and side
  note: str = ""
  seeds: tuple[int, ...] = ()  # it runs with these of the table's alone; () for all of them
  stage: int = 0  # a sweep begins runs of a higher stage after those of the lower ones


class Table(NamedTuple):
  """Experiments that are read together."""

  title: str
  head: tuple[str, ...]  # headings of the labels
  columns: tuple[str, ...]  # of metrics.columns.METRICS
  rows: tuple[Row, ...]
  seeds: tuple[int, ...] = (0,)


def load(path: str | os.PathLike) -> Table:
  """The table that a file of `configs/tables` defines beside its base config.

  Raises:
    ValueError: it defines none, or two rows of one name.
  """
  spec = importlib.util.spec_from_file_location("table", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_table"):
    raise ValueError(
      f"{path} is the config of one run, not a table: it has no get_table(). Tables are in "
      "configs/tables; --mode train runs this one."
    )
  table = module.get_table()
  names = [row.name for row in table.rows]
  for row in table.rows:
    if names.count(row.name) > 1:
      raise ValueError(f"{path} has two rows named {row.name}, which would share a folder.")
    for kind, other in (("teacher", row.teacher), ("baseline", row.baseline)):
      if other and other not in names:
        raise ValueError(f"{path}: row {row.name} names a {kind} {other}, which is no row.")
    strange = sorted(set(row.seeds) - set(table.seeds))
    if strange:
      raise ValueError(f"{path}: row {row.name} names seeds {strange}, which the table has not.")
  return table


def baselines(rows: Sequence[Row]) -> dict[str, str]:
  """{name of a row: name of the row that it is compared with, its own for that one}."""
  first = {}
  for row in rows:
    first.setdefault((row.label[0], row.side), row.name)
  return {row.name: row.baseline or first[row.label[0], row.side] for row in rows}


def from_flags(values) -> tuple[Table, ConfigDict]:
  """The table and the base config of the command line.

  Raises:
    ValueError: a setting of the command line is one that tells the rows apart.
  """
  holder = values["config"] if isinstance(values, flags.FlagValues) else None
  path = config_flags.get_config_filename(holder)
  table = load(path)
  if values.seeds:
    table = table._replace(seeds=_seeds(values.seeds))
  taken = {name for row in table.rows for name in row.changes} | {"seed"}
  clashes = sorted(taken & set(config_flags.get_override_values(holder)))
  if clashes:
    raise ValueError(
      f"The rows of {path} set {', '.join(clashes)} themselves (seeds: --seeds 0,1,2). Leave "
      "that out, or change the table; data and weights that lie elsewhere may be linked to where "
      "the rows look for them."
    )
  return table, values.config


def _seeds(texts: Sequence[str]) -> tuple[int, ...]:
  if not all(text.strip().isdecimal() for text in texts) or len(set(map(int, texts))) < len(texts):
    raise ValueError(
      f"--seeds is {','.join(texts)!r}; it must be different whole numbers from 0, as in 0,1,2."
    )
  return tuple(int(text) for text in texts)


def resolve(base: ConfigDict, row: Row, seed: int, workdir: str | os.PathLike) -> ConfigDict:
  """The config of one run.

  Raises:
    ValueError: the row changes a setting that does not exist.
  """
  config = base.copy_and_resolve_references()
  known = settings.flat(config)
  unknown = [name for name in row.changes if name not in known]
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
  """Of one run."""
  return pathlib.Path(workdir).expanduser() / f"{name}_seed{seed}"
