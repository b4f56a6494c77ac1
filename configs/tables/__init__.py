"""The paper's tables: what their rows change in a config, and the numbers printed there."""

import importlib
import json
import pathlib

from configs import base
from fdep_jax import backbones, settings
from fdep_jax.metrics.columns import COSTS, METRICS
from fdep_jax.tables.experiments import Row

NETWORKS = {  # paper's name: ours, in the tables' order
  backbones.network_class(name).paper_name: name
  for name in ("acm", "alcnet", "mlcl", "alcl", "dna", "ggl", "uiu", "msda")
}
MODES = {
  "original": "Original",
  "fdep_wo_coisd": "+ FDEP w/o CO-ISD",
  "fdep": "+ FDEP Framework",
}
VITS = {size: f"weights/dinov2_vit{size[0].lower()}14_pretrain.pth" for size in ("S/14", "B/14")}
ALL, HSE = tuple(METRICS), ("hse_p", "hse_t", "hse")
DATASETS = ("NUAA-SIRST", "NUDT-SIRST", "IRSTD-1K")
PARTS_COLUMNS = ("iou", "pd", *HSE)  # of Tab. 2 and S4


def paper(table: str) -> list[dict]:
  """The rows of one of the paper's tables."""
  return json.loads((pathlib.Path(__file__).parent / "paper.json").read_text())[table]


def numbers(row: dict) -> dict[str, float | None]:
  """Its metrics and costs alone."""
  return {name: row[name] for name in (*METRICS, *COSTS) if name in row}


def network(name: str, mode: str, **changes) -> dict[str, object]:
  """The settings that `configs/<name>.py` changes in the base config, the mode, and `changes`."""
  ours = settings.flat(importlib.import_module(f"configs.{name}").get_config())
  theirs = settings.flat(base.get_config())
  changed = {key: value for key, value in ours.items() if value != theirs[key]}
  return {**changed, "model.backbone": name, "mode": mode, **changes}


def msda(mode: str, fusion: str = "samf", vit: str = "L/14") -> Row:
  """MSDA-Net with the given prior, as Tables 3, 4 and S2 vary it."""
  changes, name = {}, f"msda-{mode}"
  if vit != "L/14":
    changes["prior.checkpoint"] = VITS[vit]
    name += f"-vit_{vit[0].lower()}"
  if fusion != "samf":
    changes["model.fusion"] = fusion
    name += f"-{fusion}"
  return Row(name, (), network("msda", mode, **changes), {})


def by_networks(table: str, sides: tuple[str, ...] = ("",)) -> tuple[Row, ...]:
  """Networks × modes, with a dataset a side where `sides` names them (Tab. 1 and 2)."""
  rows = []
  for printed in paper(table):
    name, mode = NETWORKS[printed["network"]], printed["mode"]
    label = (printed["network"], MODES[mode])
    for side in sides:
      changes = network(name, mode) | ({"data.root": f"data/{side}"} if side else {})
      key = f"{name}-{mode}" + (f"-{side}" if side else "")
      rows.append(Row(key, label, changes, numbers(printed[side] if side else printed), side))
  return tuple(rows)


def by_vits(table: str, mode: str) -> tuple[Row, ...]:
  """ViT sizes with and without SAMF (Tab. 4 and S2)."""
  return tuple(
    msda(mode, "samf" if printed["samf"] else "add", printed["vit"])._replace(
      label=(f"ViT-{printed['vit']}", "✓" if printed["samf"] else ""), paper=numbers(printed)
    )
    for printed in paper(table)
  )


def by_methods(table: str, like: str, sides: tuple[str, ...] = ("",)) -> tuple[Row, ...]:
  """The networks as published beside MSDA-Net's three rows, which are those of `like`."""
  rows = []
  alike = {(row.name, row.side): row for row in by_networks(like, sides)}
  for printed in paper(table):
    for side in sides:
      key = f"{NETWORKS[printed['method']]}-original" + (f"-{side}" if side else "")
      row = alike[key, side]
      rows.append(row._replace(paper=numbers(printed[side] if side else printed)))
  return (*rows, *(row for row in alike.values() if row.name.startswith("msda-")))
