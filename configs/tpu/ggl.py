"""GGL-Net with FDEP on a TPU slice: configs/ggl.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/ggl.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/ggl

Fits: 3.51 of 15.75 GiB a chip.
"""

from configs import ggl


def get_config():
  c = ggl.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
