"""ALCL-Net with FDEP on SIRST3.

  python main.py --config configs/alcl.py --workdir runs/alcl

The paper's results: configs/tables/table1.py (SIRST3) and table2.py (each dataset alone).
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "alcl"
  c.train.learning_rate = 5e-4  # half of base: PAL advises it for ALCL and GGL, for stability
  return c
