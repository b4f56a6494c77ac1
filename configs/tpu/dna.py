"""DNA-Net with FDEP on a TPU slice: configs/dna.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/dna.py --topology v5e:2x2 --out plans/dna
"""

from configs import dna


def get_config():
  c = dna.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  c.train.remat = "products"
  return c
