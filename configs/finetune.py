"""Fine-tunes a network of the zoo on few images of your own: minutes on two cores, no DINOv2.

  python main.py --config configs/finetune.py --config.data.root=data/mine --workdir runs/mine_tuned

Starts from zoo:acm, with the crops and the BatchNorm momentum of its training. --config.mode=fdep
trains it with FDEP, which needs weights/dinov2_vits14_pretrain.pth. What 20, 50 and 200 images of
IRSTD-1K gave, from a network that had not seen IRSTD-1K: results/README.md.
"""

from configs import base

STEPS = 600
WARMUP = 50  # steps, then a cosine to 0
CROPS_PER_IMAGE = 24  # that training draws from


def get_config():
  c = base.get_config()
  c.mode = "original"
  c.model.backbone = "acm"
  c.model.bn_momentum = 0.9
  c.data.root = "data/mine"
  c.data.crop = 128  # pixels
  c.data.crop_margin = 32
  c.data.augment = "dihedral"
  c.data.target_crop_prob = 0.1
  c.data.val_fraction = 0.05  # one of 20
  c.prior.bank = CROPS_PER_IMAGE
  c.prior.checkpoint = "weights/dinov2_vits14_pretrain.pth"
  c.train.batch_size = 16
  c.train.init_from = "zoo:acm"
  c.train.steps = STEPS
  c.train.learning_rate = 3e-3
  c.train.schedule = "warmup_cosine_decay_schedule"
  c.train.schedule_args = {
    "init_value": 0.0,
    "peak_value": "learning_rate",
    "warmup_steps": WARMUP,
    "decay_steps": "steps",
  }
  c.eval.batch_size = 8
  c.eval.least_steps = STEPS  # take the last: few held-out images choose by chance
  c.checkpoint.every_steps = 200
  return c
