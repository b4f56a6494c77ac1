"""Table 3: MSDA-Net with DINO, SAMF and CO-ISD added one by one, on SIRST3.

  python main.py --mode sweep --config configs/tables/table3.py --workdir runs/paper
  python main.py --mode table --config configs/tables/table3.py --workdir runs/paper --out tables/3

Five runs, of which three are Table 1's.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  rows = []
  for printed in tables.paper("table3"):
    used = [printed[part] for part in ("dino", "samf", "coisd")]
    mode = "fdep" if printed["coisd"] else "fdep_wo_coisd" if printed["dino"] else "original"
    row = tables.msda(mode, "add" if printed["dino"] and not printed["samf"] else "samf")
    label = (printed["scheme"], *("✓" if part else "" for part in used))
    row = row._replace(label=label, paper=tables.numbers(printed), baseline="msda-original")
    rows.append(row)
  head = ("Scheme", "DINO", "SAMF", "CO-ISD")
  return Table("Table 3. Parts of FDEP, MSDA-Net on SIRST3.", head, tables.HSE, tuple(rows))
