"""SDSNet with FDEP on SIRST3; the paper has its original only.

  python main.py --config configs/sdsnet.py --workdir runs/sdsnet

Paper, Tab. S3, SIRST3 test set (%; Fa in 10⁻⁶):

                      IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original          81.22  83.60  96.35  13.91  95.81  92.84  88.96

Tab. S4, trained on each alone (%):

                                  IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original          73.86  95.06  90.96  88.42  80.44
  NUDT-SIRST  Original          92.97  99.26  99.07  96.18  95.29
  IRSTD-1K    Original          70.92  88.89  90.77  84.62  76.82
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "sdsnet"
  return c
