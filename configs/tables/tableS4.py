"""Table S4: methods without training, and all networks, on each dataset; FDEP on four more.

  python main.py --mode sweep --config configs/tables/tableS4.py --workdir runs/paper
  python main.py --mode table --config configs/tables/tableS4.py --workdir runs/paper \
      --out tables/S4

78 runs: nine of methods without training, 30 of Table 2, 15 of the five other networks as
published, and 24 with FDEP on four of them, which the paper does not have.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table S4. Methods on each dataset."
  rows = tables.by_methods("tableS4", "table2", tables.DATASETS)
  return Table(title, ("Method", "Scheme"), tables.PARTS_COLUMNS, rows)
