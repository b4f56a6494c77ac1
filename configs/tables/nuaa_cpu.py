"""Networks of 1 GMAC on NUAA-SIRST on two cores: as published, FDEP w/o CO-ISD, FDEP; three seeds.

  python main.py --mode sweep --config configs/tables/nuaa_cpu.py --workdir runs/nuaa_cpu
  python main.py --mode table --config configs/tables/nuaa_cpu.py --workdir runs/nuaa_cpu \
      --out results/nuaa_cpu

Needs data/NUAA-SIRST and weights/dinov2_vits14_pretrain.pth. All runs of a seed see the same crops
in the same order, and share the ViT's levels of them, 1.4 GB a seed. The schedule was chosen on
held-out train images with the network as published, before any run was scored on the test set; what
was tried, and the results: results/README.md. Run the first command twice at once for both cores.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Table

NETWORKS = ("ACM",)  # of the paper's tables; ALCNet costs as little
SEEDS = (0, 1, 2)
CROP = 128  # pixels
BATCH = 16
STEPS = 1800
LEARNING_RATE = 5e-3
WARMUP = 100  # steps, then a cosine to 0
TARGET_CROPS = 0.5  # share of crops placed on a target
CROPS_PER_IMAGE = 24  # that training draws from
EPOCHS_PER_EVALUATION = 25.0


def get_config():
  c = base.get_config()
  c.data.root = "data/NUAA-SIRST"
  c.data.crop = CROP
  c.data.crop_margin = 32
  c.data.target_crop_prob = TARGET_CROPS
  c.prior.checkpoint = "weights/dinov2_vits14_pretrain.pth"
  c.prior.bank = CROPS_PER_IMAGE
  c.train.batch_size = BATCH
  c.train.steps = STEPS
  c.train.learning_rate = LEARNING_RATE
  c.train.schedule = "warmup_cosine_decay_schedule"
  c.train.schedule_args = {
    "init_value": 0.0,
    "peak_value": "learning_rate",
    "warmup_steps": WARMUP,
    "decay_steps": "steps",
  }
  c.eval.every_epochs = EPOCHS_PER_EVALUATION
  c.eval.batch_size = 8
  c.eval.save_probs = True  # for the paired intervals and the figures
  c.checkpoint.every_steps = 300
  c.log.tensorboard = False
  return c


def get_table():
  shared = {"prior.bank_folder": "{workdir}/bank_seed{seed}"}
  rows = tuple(
    row._replace(
      side="",
      name=row.name.removesuffix("-NUAA-SIRST"),
      changes={k: v for k, v in row.changes.items() if k != "data.root"} | shared,  # base has it
    )
    for row in tables.by_networks("table2", ("NUAA-SIRST",))
    if row.label[0] in NETWORKS
  )
  title = "NUAA-SIRST on two cores (paper: 448×448 crops, ViT-L/14, 400 epochs)."
  return Table(title, ("Network", "Scheme"), tables.ALL, rows, SEEDS)
