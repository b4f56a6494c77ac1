"""Table 4: MSDA-Net with FDEP, by the size of the ViT, with and without SAMF, on SIRST3.

  python main.py --mode sweep --config configs/tables/table4.py --workdir runs/paper
  python main.py --mode table --config configs/tables/table4.py --workdir runs/paper --out tables/4

Six runs; needs weights/dinov2_vit{s,b,l}14_pretrain.pth.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

get_config = base.get_config


def get_table():
  title = "Table 4. Size of the ViT, MSDA-Net with FDEP on SIRST3."
  return Table(title, ("DINOv2", "SAMF"), tables.HSE, tables.by_vits("table4", "fdep"))
