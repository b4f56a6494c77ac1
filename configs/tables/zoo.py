"""Trains zoo:mlcl: MLCL-Net with FDEP on SIRST3 on two cores, one seed.

  mkdir -p runs/zoo && ln -s ../sirst3_cpu/bank_seed0 runs/zoo/  # if that sweep has run
  python main.py --mode sweep --config configs/tables/zoo.py --workdir runs/zoo
  python main.py --mode table --config configs/tables/zoo.py --workdir runs/zoo --out results/zoo

Settings, data and held-out images are those of sirst3_cpu.py; zoo:acm is a run of that table. The
link makes both share DINOv2's levels of the crops.
"""

from configs import tables
from configs.tables import sirst3_cpu
from fdep_jax.tables.experiments import Table


def get_config():
  c = sirst3_cpu.get_config()
  c.host_devices = 2  # one a core: this one training has both
  return c


def get_table():
  bank = {"prior.bank_folder": "{workdir}/bank_seed{seed}"}
  rows = tuple(
    row._replace(changes=row.changes | bank)
    for row in tables.by_networks("table1")
    if row.name == "mlcl-fdep"
  )
  title = "SIRST3 on two cores (paper: 448×448 crops, ViT-L/14, 400 epochs)."
  return Table(title, ("Network", "Scheme"), tables.ALL, rows, (0,))
