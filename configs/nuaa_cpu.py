"""ALCL-Net alone on NUAA-SIRST from scratch on two cores: 128×128 crops, batch 8.

  python main.py --config configs/nuaa_cpu.py --workdir runs/nuaa_cpu

Needs data/NUAA-SIRST; no DINOv2. 2000 steps in 43 minutes on two shared cores. The best checkpoint
is chosen on a tenth of the train images.

              IoU   nIoU    Pd     Fa·1e6  HSE-P  HSE-T  HSE
  ours       61.22  63.18  88.59   68.26   81.23  71.02  57.69   test images, step 1536
  paper      76.52         95.82           93.44  90.02  84.11   448×448 crops, 400 epochs
"""

from configs import base


def get_config():
  c = base.get_config()
  c.mode = "original"
  c.model.backbone = "alcl"
  c.host_devices = 2  # one a core
  c.data.root = "data/NUAA-SIRST"
  c.data.crop = 128  # pixels
  c.data.crop_margin = 32
  c.data.target_crop_prob = 0.25
  c.train.batch_size = 8
  c.train.steps = 2000
  c.train.schedule = "warmup_cosine_decay_schedule"
  c.train.schedule_args = {
    "init_value": 0.0,
    "peak_value": "learning_rate",
    "warmup_steps": 60,
    "decay_steps": "steps",
  }
  c.eval.every_epochs = 8.0
  c.eval.batch_size = 8
  c.checkpoint.every_steps = 200
  return c
