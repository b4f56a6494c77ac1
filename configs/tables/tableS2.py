"""Table S2: MSDA-Net with FDEP w/o CO-ISD, by ViT size, with and without SAMF, on SIRST3.

  python main.py --mode sweep --config configs/tables/tableS2.py --workdir runs/paper
  python main.py --mode table --config configs/tables/tableS2.py --workdir runs/paper \
      --out tables/S2

Six runs; needs weights/dinov2_vit{s,b,l}14_pretrain.pth.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table S2. Size of the ViT, MSDA-Net with FDEP w/o CO-ISD on SIRST3."
  return Table(title, ("DINOv2", "SAMF"), tables.HSE, tables.by_vits("tableS2", "fdep_wo_coisd"))
