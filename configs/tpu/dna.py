"""DNA-Net with FDEP on a TPU slice: configs/dna.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/dna.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/dna

Fits: 11.58 of 15.75 GiB a chip.
"""

from configs import dna


def get_config():
  c = dna.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
