"""MLCL-Net with FDEP on a TPU slice: configs/mlcl.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/mlcl.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/mlcl

Fits: 3.56 of 15.75 GiB a chip.
"""

from configs import mlcl


def get_config():
  c = mlcl.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
