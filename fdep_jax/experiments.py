"""Tables of experiments (`configs/tables`): rows of changed settings beside the paper's numbers."""

import importlib.util
import os
import pathlib
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from fdep_jax import settings

METRICS = {  # as in the paper's tables: heading, name in metrics.json, factor, decimals
  "iou": ("IoU", "iou", 100, 2),
  "niou": ("nIoU", "niou", 100, 2),
  "pd": ("Pd", "pd", 100, 2),
  "fa_1e6": ("Fa·1e6", "fa", 1e6, 2),
  "hse_p": ("HSE-P", "hse_p", 100, 2),
  "hse_t": ("HSE-T", "hse_t", 100, 2),
  "hse": ("HSE", "hse", 100, 2),
}
COSTS = {
  "params_m": ("P (M)", "params", 1e-6, 2),
  "flops_g": ("GFLOPs", "flops", 1e-9, 2),
  "time_s": ("Time (s)", "seconds_per_image", 1, 3),
}


class Row(NamedTuple):
  """One experiment.

  Rows of one label and several sides stand side by side, as the datasets of Tab. 2 do.
  """

  name: str  # of its runs' folders; the same in two tables where the runs are the same
  label: tuple[str, ...]  # the first columns
  changes: dict[str, object]  # settings by dotted name; "{seed}" in a text stands for the seed
  paper: dict[str, float | None]  # the paper's numbers; a column that is absent is not printed
  side: str = ""
  teacher: str = ""  # the row whose run of the same seed makes the pseudo-labels
  note: str = ""


class Table(NamedTuple):
  """Experiments that are read together."""

  title: str
  head: tuple[str, ...]  # headings of the labels
  columns: tuple[str, ...]  # of METRICS
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
    if row.teacher and row.teacher not in names:
      raise ValueError(f"{path}: row {row.name} names a teacher {row.teacher}, which is no row.")
  return table


def from_flags(values) -> tuple[Table, ConfigDict]:
  """The table and the base config of the command line.

  Raises:
    ValueError: a setting of the command line is one that tells the rows apart.
  """
  holder = values["config"] if isinstance(values, flags.FlagValues) else None
  path = config_flags.get_config_filename(holder)
  table = load(path)
  if values.seeds:
    table = table._replace(seeds=tuple(int(seed) for seed in values.seeds))
  taken = {name for row in table.rows for name in row.changes} | {"seed"}
  clashes = sorted(taken & set(config_flags.get_override_values(holder)))
  if clashes:
    raise ValueError(
      f"The rows of {path} set {', '.join(clashes)} themselves (seeds: --seeds 0,1,2). Leave "
      "that out, or change the table."
    )
  return table, values.config


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
    value = value.format(seed=seed) if isinstance(value, str) else value
    config.update_from_flattened_dict({name: value})
  if row.teacher:
    config.train.teacher = str(folder(workdir, row.teacher, seed))
  config.seed = seed
  return config


def folder(workdir: str | os.PathLike, name: str, seed: int) -> pathlib.Path:
  """Of one run."""
  return pathlib.Path(workdir).expanduser() / f"{name}_seed{seed}"


def parameters(config: ConfigDict) -> int:
  """P of the paper, of the model as it is built; needs no weights.

  Raises:
    ValueError: the name of `dino.checkpoint` does not tell the ViT's size.
  """
  from flax import nnx

  from fdep_jax import evaluate, plan

  config = config.copy_and_resolve_references()
  config.model.bn_stats = "shared"  # statistics are no parameters; spares a trace of the decoder
  return evaluate.count_parameters(nnx.state(plan.abstract(config).model, nnx.Param))
