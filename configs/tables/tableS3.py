"""Table S3: methods without training, and all networks, on SIRST3; FDEP on four more of them.

  python main.py --mode sweep --config configs/tables/tableS3.py --workdir runs/paper
  python main.py --mode table --config configs/tables/tableS3.py --workdir runs/paper \
      --out tables/S3

26 runs: three methods without training, ten of Table 1, the five other networks as published, and
eight with FDEP that the paper does not have (RPCANet has no top feature to attach it to). NIPPS
takes one to two seconds an image, about a minute at 512×512; its maps are kept in runs/paper/maps,
for Table S4, too.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table S3. Methods on SIRST3."
  return Table(title, ("Method", "Scheme"), tables.ALL, tables.by_methods("tableS3", "table1"))
