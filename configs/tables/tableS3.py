"""Table S3: the networks that are here among the paper's methods, on SIRST3.

  python main.py --mode sweep --config configs/tables/tableS3.py --workdir runs/paper
  python main.py --mode table --config configs/tables/tableS3.py --workdir runs/paper \
      --out tables/S3

Ten runs, all of them Table 1's.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table S3. Methods on SIRST3."
  return Table(title, ("Method", "Scheme"), tables.ALL, tables.by_methods("tableS3", "table1"))
