"""MTU-Net with FDEP on SIRST3; the paper has its original only.

  python main.py --config configs/mtu.py --workdir runs/mtu

The largest image is 1024×1024; its positions are learned for one width, so that it is best tested
at the size of data.crop.

Paper, Tab. S3, SIRST3 test set (%; Fa in 10⁻⁶):

                      IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original          67.92  66.83  92.36  36.98  84.38  80.61  68.02

Tab. S4, trained on each alone (%):

                                  IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original          76.14  95.06  89.59  86.07  77.11
  NUDT-SIRST  Original          84.65  97.66  95.02  93.86  89.18
  IRSTD-1K    Original          67.42  87.88  83.89  76.66  64.31
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "mtu"
  return c
