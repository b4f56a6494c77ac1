"""Table 2: the eight networks on each dataset, as published and with FDEP.

  python main.py --mode sweep --config configs/tables/table2.py --workdir runs/paper
  python main.py --mode table --config configs/tables/table2.py --workdir runs/paper --out tables/2

72 runs; needs data/NUAA-SIRST, data/NUDT-SIRST, data/IRSTD-1K and the weights of Table 1.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table 2. Networks on each dataset."
  rows = tables.by_networks("table2", tables.DATASETS)
  return Table(title, ("Network", "Scheme"), tables.PARTS_COLUMNS, rows)
