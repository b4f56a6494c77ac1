"""MSDA-Net with FDEP on NUAA-SIRST at a CPU's size: ViT-S/14, 96×96 crops, batch 8.

  python main.py --config configs/msda_cpu.py --workdir runs/msda_cpu

Needs data/NUAA-SIRST and weights/dinov2_vits14_pretrain.pth, and two cores. It shows the full
recipe at work, not what it can reach: the paper trains on 448×448 crops for 400 epochs.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "msda"
  c.host_devices = 2  # one a core: XLA runs many convolutions on a single one
  c.data.root = "data/NUAA-SIRST"
  c.data.crop = 96  # pixels
  c.data.crop_margin = 32
  c.data.target_crop_prob = 0.25
  c.dino.checkpoint = "weights/dinov2_vits14_pretrain.pth"
  c.train.batch_size = 8
  c.train.steps = 600
  c.train.schedule = "warmup_cosine_decay_schedule"
  c.train.schedule_args = {
    "init_value": 0.0,
    "peak_value": "learning_rate",
    "warmup_steps": 50,
    "decay_steps": "steps",
  }
  c.eval.every_epochs = 7.0
  c.eval.batch_size = 4
  c.checkpoint.every_steps = 100
  return c
