"""Two choices of ours in ACM with FDEP on NUAA-SIRST: the edge weight and the running statistics.

  python main.py --mode sweep --config configs/tables/nuaa_cpu_choices.py --workdir runs/nuaa_cpu
  python main.py --mode table --config configs/tables/nuaa_cpu_choices.py --workdir runs/nuaa_cpu \
      --out results/nuaa_cpu_choices

One seed, in the folder of `nuaa_cpu.py`, whose FDEP run is the first row.
"""

from configs.tables import nuaa_cpu

get_config = nuaa_cpu.get_config
CHOICES = {  # name: label, what it changes
  "released": ("loss.edge_mode=released", {"loss.edge_mode": "released"}),
  "shared": ("model.bn_stats=shared", {"model.bn_stats": "shared"}),
}


def get_table():
  table = nuaa_cpu.get_table()
  fdep = next(row for row in table.rows if row.name == "acm-fdep")
  rows = [fdep._replace(label=("ACM", "intended, per_branch"), paper={})]
  rows += [
    fdep._replace(
      name=f"{fdep.name}-{name}", label=("ACM", label), changes=fdep.changes | changes, paper={}
    )
    for name, (label, changes) in CHOICES.items()
  ]
  title = "Edge weight and running statistics: ACM with FDEP on NUAA-SIRST, one seed."
  return table._replace(title=title, head=("Network", "Choice"), rows=tuple(rows), seeds=(0,))
