"""How many labelled images does a new camera need? ACM on 20, 50 and 200 images of IRSTD-1K.

  python main.py --config configs/tables/sirst3_cpu.py --workdir runs/nuaa_nudt \
      --config.model.backbone=acm --config.data.root=data/NUAA-NUDT --config.train.steps=2950
  python main.py --mode sweep --config configs/tables/few_frames.py --workdir runs/few_frames
  python main.py --mode table --config configs/tables/few_frames.py --workdir runs/few_frames \
      --out results/few_frames

IRSTD-1K stands for somebody's own camera. The first command trains FDEP on the union of NUAA-SIRST
and NUDT-SIRST (data/NUAA-NUDT, links will do), 60 epochs. The rows start from scratch or from that
run, and see so many train images of IRSTD-1K, drawn by the seed, for equally many steps. From
scratch and fine-tuned have settings of their own, each the best of its tries. What is not set here
is as in configs/finetune.py. How the settings were chosen, and the results: results/README.md.
"""

from configs import finetune
from fdep_jax.metrics import columns
from fdep_jax.tables.experiments import Row, Table

PRETRAINED = "runs/nuaa_nudt"
IMAGES = (20, 50, 200)
DRAWS = (0, 1, 2)
FROM_SCRATCH = {"train.init_from": "", "data.target_crop_prob": 0.5, "model.start_prob": 0.01}


def get_config():
  c = finetune.get_config()
  c.data.root = "data/IRSTD-1K"
  c.train.init_from = PRETRAINED
  c.eval.branches = "deployed"
  c.checkpoint.keep = 1
  return c


def get_table():
  schemes = (  # name, label, mode, changes, and the one to compare with
    ("scratch", "From scratch", "original", FROM_SCRATCH, ""),
    ("tuned", "Fine-tuned", "original", {}, "scratch"),
    ("tuned_fdep", "Fine-tuned with FDEP", "fdep", {}, "tuned"),
  )
  rows = []
  for count in IMAGES:
    for name, label, mode, changes, other in schemes:
      changed = {"mode": mode, "data.train_images": count} | changes
      baseline = f"{other}{count}" if other else ""
      rows.append(Row(f"{name}{count}", (str(count), label), changed, {}, baseline=baseline))
  title = "ACM on few images of IRSTD-1K, 201 test images."
  return Table(title, ("Images", "Training"), tuple(columns.METRICS), tuple(rows), DRAWS)
