"""Appendix D: conventional two-stage distillation, of which the paper says that it collapses.

  python main.py --mode sweep --config configs/tables/appendixD.py --workdir runs/paper
  python main.py --mode table --config configs/tables/appendixD.py --workdir runs/paper \
      --out tables/D

MSDA-Net on SIRST3: the teacher (FDEP w/o CO-ISD, Table 1's), then the original network on its
pseudo-labels, and on these and the true ones in as many steps.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Row, Table

get_config = base.get_config
COLLAPSES = "the paper prints no numbers: the network collapses early in training"


def get_table():
  alone, teacher = (
    next(row for row in tables.by_networks("table1") if row.name == f"msda-{mode}")
    for mode in ("original", "fdep_wo_coisd")
  )
  student = {"teacher": teacher.name, "note": COLLAPSES, "paper": {}}
  pseudo = tables.network("msda", "original", **{"train.labels": "pseudo"})
  # An epoch is twice the images.
  both = tables.network("msda", "original", **{"train.labels": "both", "train.epochs": 200})
  rows = (
    alone._replace(label=("MSDA-Net", "true")),
    teacher._replace(label=("teacher: + FDEP w/o CO-ISD", "true")),
    Row("msda-original-pseudo", ("MSDA-Net", "pseudo"), pseudo, **student),
    Row("msda-original-both", ("MSDA-Net", "true and pseudo"), both, **student),
  )
  title = "Appendix D. Two-stage distillation, MSDA-Net on SIRST3."
  return Table(title, ("Network", "Labels"), tables.ALL, rows)
