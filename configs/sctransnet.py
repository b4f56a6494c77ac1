"""SCTransNet with FDEP on SIRST3; the paper has its original only.

  python main.py --config configs/sctransnet.py --workdir runs/sctransnet

Paper, Tab. S3, SIRST3 test set (%; Fa in 10⁻⁶):

                      IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original          82.58  86.24  96.61   9.96  94.93  92.94  88.23

Tab. S4, trained on each alone (%):

                                  IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original          73.66  96.20  92.12  88.73  81.74
  NUDT-SIRST  Original          93.74  98.84  98.71  96.66  95.41
  IRSTD-1K    Original          67.03  92.26  86.23  83.82  72.28
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "sctransnet"
  return c
