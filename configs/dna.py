"""DNA-Net with FDEP on SIRST3.

  python main.py --config configs/dna.py --workdir runs/dna

The paper's results: configs/tables/table1.py (SIRST3) and table2.py (each dataset alone).
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "dna"
  return c
