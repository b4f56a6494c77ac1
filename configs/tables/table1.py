"""Table 1: the eight networks on SIRST3, as published and with FDEP.

  python main.py --mode sweep --config configs/tables/table1.py --workdir runs/paper
  python main.py --mode table --config configs/tables/table1.py --workdir runs/paper --out tables/1

24 runs of 400 epochs on 448×448 crops; each needs data/SIRST3 and, but for the original networks,
weights/dinov2_vitl14_pretrain.pth.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table 1. Networks on SIRST3."
  return Table(title, ("Network", "Scheme"), tables.ALL, tables.by_networks("table1"))
