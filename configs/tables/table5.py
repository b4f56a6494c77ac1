"""Table 5: what the branches of MSDA-Net with FDEP share, and an explicit distillation term.

  python main.py --mode sweep --config configs/tables/table5.py --workdir runs/paper
  python main.py --mode table --config configs/tables/table5.py --workdir runs/paper --out tables/5

Six runs on SIRST3. The paper prints neither the term nor its weight; ours is the
divergence of the outputs (`fdep_jax/ablations.py`) with weight 1.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Row, Table

get_config = base.get_config
SHARES = {"E": "encoder", "D": "decoder", "E+D": "both"}


def get_table():
  rows = []
  for printed in tables.paper("table5"):
    share, changes, name = SHARES[printed["share"]], {}, "msda-fdep"
    if share != "both":
      changes["model.share"] = share
      name += f"-share_{share}"
    if printed["distill"]:
      changes["loss.distill_weight"] = 1.0
      name += "-distill"
    label = (printed["share"], "✓" if printed["distill"] else "")
    changes = tables.network("msda", "fdep", **changes)
    rows.append(Row(name, label, changes, tables.numbers(printed), baseline="msda-fdep"))
  head = ("Shared", "Distillation term")
  return Table("Table 5. Sharing, MSDA-Net on SIRST3.", head, tables.HSE, tuple(rows))
