"""MSDA-Net with FDEP on SIRST3: the paper's main setting (ViT-L/14, 448×448, batch 16, 400 epochs).

  python main.py --config configs/msda.py --workdir runs/msda

Needs data/SIRST3 and weights/dinov2_vitl14_pretrain.pth (docs/data.md says where to get them)
and an accelerator; we have not run it to its end.

The paper's results: configs/tables/table1.py (SIRST3) and table2.py (each dataset alone).
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "msda"
  return c
