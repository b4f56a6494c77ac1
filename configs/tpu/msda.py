"""MSDA-Net with FDEP on a TPU slice: configs/msda.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/msda.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/msda

Fits: 5.94 of 15.75 GiB a chip.
"""

from configs import msda


def get_config():
  c = msda.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
