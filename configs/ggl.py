"""GGL-Net with FDEP on SIRST3.

  python main.py --config configs/ggl.py --workdir runs/ggl

The paper's results: configs/tables/table1.py (SIRST3) and table2.py (each dataset alone).

The learning rate is that of all networks, as the paper trains all with the same settings. If the
loss becomes unstable, take what PAL advises for ALCL-Net and GGL-Net:
--config.train.learning_rate=5e-4.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "ggl"
  return c
