"""Defines tables of experiments (`configs/tables`): changed settings and the paper's numbers."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from fdep_jax import settings
from fdep_jax.metrics.columns import COSTS, METRICS


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
    ValueError: the file defines no table, or a wrong one; one error lists all that is wrong.
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
  if problems := _problems(table):
    title = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the table {path}:"
    raise ValueError("\n  ".join([title, *problems]))
  return table


def _problems(table: Table) -> list[str]:
  """Lists what is wrong with a table, apart from the settings of its rows (`resolve`)."""
  rows = table.rows if isinstance(table, Table) else None
  if not isinstance(rows, tuple | list) or not all(isinstance(row, Row) for row in rows):
    return ["get_table() must return a Table whose rows are a tuple of Rows (a comma: (row,))."]
  problems = []
  if not _are(table.seeds, _is_seed) or len(set(table.seeds)) < len(table.seeds):
    problems.append(
      f"seeds is {table.seeds!r}; it must be a tuple of different whole numbers from 0: (0, 1, 2), "
      "or (0,) for one."
    )
  for name, texts in (("head", table.head), ("columns", table.columns)):
    if not _are(texts, _is_text, least=0):
      problems.append(f"{name} is {texts!r}; it must be a tuple of texts (a comma: ('IoU',)).")
  if _are(table.columns, _is_text, least=0):
    wrong = [name for name in table.columns if name not in METRICS]
    problems += [f"columns: there is no {n!r}, but {', '.join(METRICS)}." for n in wrong]
  if not rows:
    problems.append("it has no rows.")
  first = {}
  for row in rows:
    problems += [f"row {row.name!r}: {text}" for text in _row_problems(row, table)]
    place = f"label {row.label!r}" + (f" and the side {row.side!r}" if row.side else "")
    other = first.setdefault(place, row.name)
    if other != row.name:
      problems.append(
        f"row {row.name!r}: it has the {place} of row {other!r}, whose place in the table it would "
        "take. Change the label or the side of one of them."
      )
  return list(dict.fromkeys(problems))


def _row_problems(row: Row, table: Table) -> Iterator[str]:
  names = [other.name for other in table.rows]
  if not _is_text(row.name) or not re.fullmatch(r"[^/\s]+", row.name):
    yield "its name is that of a folder: a text without spaces and slashes."
  if names.count(row.name) > 1:
    yield f"{names.count(row.name)} rows have this name, and would share a folder."
  if not isinstance(row.label, tuple) or not _are(row.label, _is_text):  # rows are found by it
    yield f"label is {row.label!r}; it must be a tuple of texts (a comma: ('ACM',))."
  elif len(row.label) != len(table.head):
    yield f"its label {row.label!r} has {len(row.label)} parts, and head {len(table.head)}."
  if not isinstance(row.changes, dict):
    yield f"changes is {row.changes!r}; it must be a dict of settings, {{'train.steps': 10}}."
  if not isinstance(row.paper, dict):
    yield f"paper is {row.paper!r}; it must be a dict of numbers by column, {{}} if there are none."
  else:
    for name in [name for name in row.paper if name not in (*METRICS, *COSTS)]:
      yield f"paper has {name!r}; there are {', '.join((*METRICS, *COSTS))}."
  for kind, other in (("teacher", row.teacher), ("baseline", row.baseline)):
    if other and other not in names:
      yield f"its {kind} is {other!r}, which is not a row."
  if not _are(row.seeds, _is_seed, least=0):
    yield f"seeds is {row.seeds!r}; it must be a tuple of whole numbers, as in (0,)."
  elif _are(table.seeds, _is_seed) and (strange := sorted(set(row.seeds) - set(table.seeds))):
    yield f"it has seeds {strange}, which the table has not."
  elif row.teacher in names:
    theirs = table.rows[names.index(row.teacher)].seeds
    # A row without seeds of its own runs with whatever --seeds names.
    if _are(theirs, _is_seed) and not (row.seeds and set(row.seeds) <= set(theirs)):
      ours = f"seeds {row.seeds}" if row.seeds else "every seed"
      yield (
        f"it runs with {ours}, and its teacher {row.teacher!r} with {theirs} alone. Give it seeds "
        "of its teacher, or leave out the teacher's."
      )


def _are(values, kind: Callable[[object], bool], least: int = 1) -> bool:
  return isinstance(values, tuple | list) and len(values) >= least and all(map(kind, values))


def _is_text(value) -> bool:
  return isinstance(value, str)


def _is_seed(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
    ValueError: the row changes a setting that does not exist, or to a value that it cannot have.
  """
  config = base.copy_and_resolve_references()
  known = settings.flat(config)
  unknown = [name for name in row.changes if settings.new_name(name) not in known]
  if unknown:
    raise ValueError(f"Row {row.name} changes {', '.join(unknown)}, which no config has.")
  for name, value in row.changes.items():
    try:
      if isinstance(value, str):
        value = value.format(seed=seed, workdir=pathlib.Path(workdir).expanduser())
      config.update_from_flattened_dict({name: value})
    except (KeyError, IndexError, TypeError, ValueError) as error:
      place = "{seed} and {workdir} alone stand for something" if "{" in str(value) else error
      raise ValueError(f"Row {row.name} sets {name} to {value!r}: {place}.") from None
  if row.teacher:
    config.train.teacher = str(folder(workdir, row.teacher, seed))
  config.seed = seed
  return config


def folder(workdir: str | os.PathLike, name: str, seed: int) -> pathlib.Path:
  """Returns the folder of one run."""
  return pathlib.Path(workdir).expanduser() / f"{name}_seed{seed}"
