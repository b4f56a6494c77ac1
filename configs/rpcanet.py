"""RPCANet on SIRST3.

  python main.py --config configs/rpcanet.py --workdir runs/rpcanet

It has no top feature, so FDEP cannot be attached to it: mode original only. All of its work is at
full resolution, twice MSDA-Net's; --config.train.remat=products saves memory on TPUs. Images are
grey levels / 255 without normalisation.

Paper, Tab. S3, SIRST3 test set (%; Fa in 10⁻⁶):

                      IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original          73.68  74.82  92.06  32.24  85.40  82.58  70.53

Tab. S4, trained on each alone (%):

                                  IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original          57.49  88.97  73.50  68.99  50.71
  NUDT-SIRST  Original          87.54  95.56  94.11  90.07  84.77
  IRSTD-1K    Original          63.54  87.63  78.52  75.55  59.33
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "rpcanet"
  c.mode = "original"
  return c
