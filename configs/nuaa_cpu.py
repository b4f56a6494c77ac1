"""ALCL-Net alone on NUAA-SIRST from scratch on two cores: 128×128 crops, batch 8.

  python main.py --config configs/nuaa_cpu.py --workdir runs/nuaa_cpu

Needs data/NUAA-SIRST; no DINOv2. The best checkpoint is chosen on a tenth of the train images. The
paper's ALCL-Net, 448×448 crops and 400 epochs: IoU 76.52, HSE 84.11.
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
