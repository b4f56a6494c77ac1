"""ILNet-L with FDEP on SIRST3; the paper has its original only.

  python main.py --config configs/ilnet.py --workdir runs/ilnet

Paper, Tab. S3, SIRST3 test set (%; Fa in 10⁻⁶):

                      IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original          82.89  81.02  96.41   6.20  95.96  90.23  86.59

Tab. S4, trained on each alone (%):

                                  IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original          77.32  95.44  94.86  87.66  83.15
  NUDT-SIRST  Original          91.74  98.62  98.79  94.76  93.61
  IRSTD-1K    Original          68.25  93.60  86.78  85.90  74.54
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "ilnet"
  return c
