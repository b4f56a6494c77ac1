"""Table S4: the methods without training and the networks that are here, on each dataset.

  python main.py --mode sweep --config configs/tables/tableS4.py --workdir runs/paper
  python main.py --mode table --config configs/tables/tableS4.py --workdir runs/paper \
      --out tables/S4

39 runs: nine of methods without training, and 30 of Table 2's.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table S4. Methods on each dataset."
  rows = tables.by_methods("tableS4", "table2", tables.DATASETS)
  return Table(title, ("Method", "Scheme"), tables.PARTS_COLUMNS, rows)
