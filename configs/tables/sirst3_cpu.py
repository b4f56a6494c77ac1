"""Does FDEP help? ACM (five seeds) and ALCNet (three) on SIRST3 on two cores, with controls.

  for seed in 0 1 2; do
    python -m converters.untrained vits14 $seed weights/untrained_vits14_seed$seed.safetensors
  done
  python main.py --mode sweep --config configs/tables/sirst3_cpu.py --workdir runs/sirst3_cpu
  python main.py --mode table --config configs/tables/sirst3_cpu.py --workdir runs/sirst3_cpu \
      --out results/sirst3_cpu

Needs data/SIRST3 (links to the three datasets will do) and weights/dinov2_vits14_pretrain.pth. What
was asked, how the settings were chosen and how the results are read was written down before the
first run of the study: results/sirst3_cpu/PLAN.md. What is not set here is as in nuaa_cpu.py.

All runs of a seed see the same crops in the same order; those with one prior share its levels of
them, 5.6 GB a seed and prior. ACM's rows run first, then the controls, then ALCNet.
Run the sweep twice at once, each with NPROC=1, for both cores.
"""

from configs import tables
from configs.tables import nuaa_cpu
from fdep_jax.tables.experiments import Row, Table

NETWORKS = ("ACM", "ALCNet")  # of the paper's tables
SEEDS = (0, 1, 2, 3, 4)
CONTROL_SEEDS = (0, 1, 2)
ALCNET_SEEDS = (0, 1, 2)  # as far as the hours reach; the plan has SEEDS
STEPS = 5656  # 60 epochs of the 1508 images that are not held out
LEARNING_RATE = 3e-3
WARMUP = 200  # steps, then a cosine to 0
TARGET_CROPS = 0.1  # share of crops placed on a target
START_PROB = 0.01  # of a target, by the last bias of an untrained network
BN_MOMENTUM = 0.9  # of the running statistics
CROPS_PER_IMAGE = 12  # that training draws from
EPOCHS_PER_EVALUATION = 15.0


def get_config():
  c = nuaa_cpu.get_config()
  c.model.start_prob = START_PROB
  c.model.bn_momentum = BN_MOMENTUM
  c.data.root = "data/SIRST3"
  c.data.augment = "dihedral"
  c.data.target_crop_prob = TARGET_CROPS
  c.prior.bank = CROPS_PER_IMAGE
  c.train.steps = STEPS
  c.train.learning_rate = LEARNING_RATE
  c.train.schedule_args.warmup_steps = WARMUP
  c.eval.every_epochs = EPOCHS_PER_EVALUATION
  c.eval.branches = "deployed"
  c.checkpoint.every_steps = 200
  c.checkpoint.keep = 1
  return c


def get_table():
  shared = {"prior.bank_folder": "{workdir}/bank_seed{seed}"}
  rows = [
    row._replace(changes=row.changes | shared)
    for row in tables.by_networks("table1")
    if row.label[0] in NETWORKS
  ]
  rows = [
    row if row.label[0] == "ACM" else row._replace(seeds=ALCNET_SEEDS, stage=2) for row in rows
  ]
  by_name = {row.name: row for row in rows}
  rows += [
    # The same second branch, SAMF and gradients, but nothing that a ViT has learnt. OUR CHOICE:
    # another untrained ViT for every seed.
    _control(
      by_name["acm-fdep"],
      "untrained",
      "+ FDEP, untrained ViT",
      {
        "prior.checkpoint": "weights/untrained_vits14_seed{seed}.safetensors",
        "prior.bank_folder": "{workdir}/bank_untrained_seed{seed}",
      },
    ),
    # As many gradients of the light branch's loss as FDEP has of both losses.
    _control(
      by_name["acm-original"],
      "twice",
      "Original, twice the steps",
      {"train.steps": 2 * STEPS},
    ),
  ]
  title = "SIRST3 on two cores (paper: 448×448 crops, ViT-L/14, 400 epochs)."
  return Table(title, ("Network", "Scheme"), tables.ALL, tuple(rows), SEEDS)


def _control(row: Row, name: str, scheme: str, changes: dict[str, object]) -> Row:
  """A row that the paper does not have, to be compared with FDEP."""
  return row._replace(
    name=f"{row.name}-{name}",
    label=(row.label[0], scheme),
    baseline="acm-fdep",
    changes=row.changes | changes,
    paper={},
    seeds=CONTROL_SEEDS,
    stage=1,
  )
