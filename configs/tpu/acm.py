"""ACM with FDEP on a TPU slice: configs/acm.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/acm.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/acm

Fits: 1.87 of 15.75 GiB a chip.
"""

from configs import acm


def get_config():
  c = acm.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  return c
