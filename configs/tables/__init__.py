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
FURTHER = {  # networks of Tab. S3 and S4 alone, in their order; the paper has no FDEP of them
  backbones.network_class(name).paper_name: name
  for name in ("mtu", "rpcanet", "sctransnet", "ilnet", "sdsnet")
}
# Parameters of layers that are never run, which the paper counts in these rows (in no others), and
# what to know of its count.
UNCOUNTED = {"mtu": 3_480_321, "sctransnet": 122_944}
PARAMETER_NOTES = {
  "mtu": "P with 3.48 M of layers that are never run, as the paper counts",
  "sctransnet": "P with 0.12 M that are never used, as the paper counts; 11,326,579, cut off there",
  "sdsnet": "P: 2.50 M, 2.51 with norms that are never run; the paper's 2.55 is unexplained",
}
OURS = "ours: the paper does not attach FDEP to this network"
MODES = {
  "original": "Original",
  "fdep_wo_coisd": "+ FDEP w/o CO-ISD",
  "fdep": "+ FDEP Framework",
}
CLASSICAL = {  # paper's name: the method without training, and a note
  "FKRW": ("fkrw:published", "as its authors' program; each map divided by its maximum, 8 bits"),
  "MPCM": ("mpcm", "no published form gives the paper's numbers; maps as FKRW's"),
  "NIPPS": ("nipps", "its author's settings; maps as FKRW's"),
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
  """Methods without training and published networks beside MSDA-Net's rows, those of `like`.

  Networks of this table alone get rows with FDEP, too, where it can be attached.
  """
  rows = []
  alike = {(row.name, row.side): row for row in by_networks(like, sides)}
  for printed in paper(table):
    if printed["method"] in CLASSICAL:
      rows += [_classical(printed, side) for side in sides]
      continue
    if printed["method"] in FURTHER:
      rows += _further(printed, sides)
      continue
    for side in sides:
      key = f"{NETWORKS[printed['method']]}-original" + (f"-{side}" if side else "")
      row = alike[key, side]
      rows.append(row._replace(paper=numbers(printed[side] if side else printed)))
  return (*rows, *(row for row in alike.values() if row.name.startswith("msda-")))


def _classical(printed: dict, side: str) -> Row:
  """A method without training."""
  method, note = CLASSICAL[printed["method"]]
  changes = {"mode": "classical", "model.backbone": method}
  changes |= {"data.root": f"data/{side}"} if side else {}
  name = method.replace(":", "_") + (f"-{side}" if side else "")
  label = (printed["method"], "No training")
  return Row(name, label, changes, numbers(printed[side] if side else printed), side, note=note)


def _further(printed: dict, sides: tuple[str, ...]) -> list[Row]:
  """A network of this table alone: the paper's row, and ours with FDEP."""
  name, rows = FURTHER[printed["method"]], []
  for mode in MODES if backbones.network_class(name).top_channels else ("original",):
    published = mode == "original"
    for side in sides:
      rows.append(
        Row(
          f"{name}-{mode}" + (f"-{side}" if side else ""),
          (printed["method"], MODES[mode]),
          network(name, mode) | ({"data.root": f"data/{side}"} if side else {}),
          numbers(printed[side] if side else printed) if published else {},
          side,
          note=PARAMETER_NOTES.get(name, "") if published else OURS,
          uncounted=UNCOUNTED.get(name, 0) if published else 0,
        )
      )
  return rows
