"""UIU-Net with FDEP on a TPU slice: configs/uiu.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/uiu.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/uiu

Fits: 7.07 of 15.75 GiB a chip.
"""

from configs import uiu


def get_config():
  c = uiu.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
