"""ALCNet with FDEP on a TPU slice: configs/alcnet.py, computed in bfloat16.

python main.py --mode plan --config configs/tpu/alcnet.py --topology v5e:4x4 \
    --config.train.batch_size=64 --out plans/alcnet

Fits: 1.85 of 15.75 GiB a chip.
"""

from configs import alcnet


def get_config():
  c = alcnet.get_config()
  c.train.dtype = "bfloat16"
  c.dino.dtype = "bfloat16"
  return c
