"""Tries everything within minutes on two cores: MLCL-Net with FDEP on synthetic scenes.

  make quickstart

Takes the DINOv2 weights that $FDEP_DINO names, else a small ViT with random weights.
"""

import os

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "mlcl"
  c.host_devices = 2
  c.data.root = "synthetic"
  c.data.crop = 64
  c.data.synthetic_size = 96
  c.data.target_crop_prob = 0.5
  c.dino.checkpoint = os.environ.get("FDEP_DINO", "random")
  c.train.batch_size = 8
  c.train.steps = 300
  c.train.schedule = "warmup_cosine_decay_schedule"
  c.train.schedule_args = {
    "init_value": 0.0,
    "peak_value": "learning_rate",
    "warmup_steps": 20,
    "decay_steps": "steps",
  }
  c.eval.every_epochs = 3.0
  c.checkpoint.every_steps = 100
  return c
