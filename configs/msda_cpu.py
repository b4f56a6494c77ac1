"""MSDA-Net with FDEP on NUAA-SIRST at a CPU's size: ViT-S/14, 96×96 crops, batch 8.

  python main.py --config configs/msda_cpu.py --workdir runs/msda_cpu

Needs data/NUAA-SIRST and weights/dinov2_vits14_pretrain.pth. 400 steps in about 35 minutes on two
shared cores, the evaluation of both branches at 34 image shapes included. It shows the full recipe
at work, not what it can reach: these are 17 epochs, the paper trains for 400 on 448×448 crops.

              IoU   nIoU    Pd     Fa·1e6  HSE-P  HSE-T  HSE
  main       30.46  28.49  52.47   80.19   41.26  37.22  15.36   214 test images, step 400
  light      36.78  37.02  66.92  119.91   50.20  44.63  22.40
  paper      75.98         95.06           92.84  90.44  83.96   light
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
  c.prior.checkpoint = "weights/dinov2_vits14_pretrain.pth"
  c.train.batch_size = 8
  c.train.steps = 400
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
