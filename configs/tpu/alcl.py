"""ALCL-Net with FDEP on a TPU slice: configs/alcl.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/alcl.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/alcl

Fits: 3.59 of 15.75 GiB a chip.
"""

from configs import alcl


def get_config():
  c = alcl.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
