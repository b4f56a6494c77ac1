"""MSDA-Net with FDEP on a TPU slice: configs/msda.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/msda.py --topology v5e:2x2 --out plans/msda
"""

from configs import msda


def get_config():
  c = msda.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
