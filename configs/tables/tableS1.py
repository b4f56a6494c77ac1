"""Table S1: the DINOv2 levels that are fused, MSDA-Net with FDEP on SIRST3.

  python main.py --mode sweep --config configs/tables/tableS1.py --workdir runs/paper
  python main.py --mode table --config configs/tables/tableS1.py --workdir runs/paper \
      --out tables/S1

Eight runs, of which 6/12/18/24, ViT-L's default, is Table 1's.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Row, Table

get_config = base.get_config
DEFAULT = "6/12/18/24"


def get_table():
  rows = []
  for printed in tables.paper("tableS1"):
    changes, name = {}, "msda-fdep"
    if printed["levels"] != DEFAULT:
      changes["prior.levels"] = tuple(int(level) - 1 for level in printed["levels"].split("/"))
      name += f"-levels_{printed['levels'].replace('/', '_')}"
    changes = tables.network("msda", "fdep", **changes)
    paper = tables.numbers(printed)
    rows.append(Row(name, (printed["levels"],), changes, paper, baseline="msda-fdep"))
  title = "Table S1. Fused levels (counted from 1), MSDA-Net with FDEP on SIRST3."
  return Table(title, ("Levels",), tables.HSE, tuple(rows))
