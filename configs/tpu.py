"""Any network's own config for a TPU slice: in bfloat16, with less memory for activations.

  python main.py --config configs/tpu.py:msda --workdir runs/msda
  python main.py --mode plan --config configs/tpu.py:msda --topology v5e:4x4 \
      --config.train.batch_size=64 --out plans/msda

The second command needs no TPU. Its results for all of them: docs/training.md.
"""

import importlib

# Network: train.remat, as planned for batch 64 on v5e:4x4.
NETWORKS = {
  "acm": "none",
  "alcl": "products",
  "alcnet": "none",
  "dna": "products",
  "ggl": "products",
  "ilnet": "products",
  "mlcl": "products",
  "msda": "products",
  "mtu": "products",
  "rpcanet": "products",
  "sctransnet": "products",
  "sdsnet": "products",
  "uiu": "products",
}


def get_config(network=""):
  if network not in NETWORKS:
    raise ValueError(
      f"the network is {network!r}; name one of {', '.join(NETWORKS)} after a colon, as in "
      "configs/tpu.py:msda."
    )
  c = importlib.import_module(f"configs.{network}").get_config()
  c.train.dtype = "bfloat16"
  c.prior.dtype = "bfloat16"
  c.train.remat = NETWORKS[network]
  return c
