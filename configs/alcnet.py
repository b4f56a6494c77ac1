"""ALCNet with FDEP on SIRST3.

  python main.py --config configs/alcnet.py --workdir runs/alcnet

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                       IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original           68.30  69.55  95.28  34.07  87.56  84.74  74.20
  FDEP w/o CO-ISD    73.17  73.23  97.14  24.95  91.73  88.67  81.34
  FDEP               70.57  72.88  95.61  22.05  89.75  87.25  78.31

Tab. 2, trained on each alone (%):

                                   IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original           70.64  92.02  90.56  87.09  78.87
              FDEP w/o CO-ISD    74.15  95.82  93.15  91.66  85.38
              FDEP               71.68  93.54  91.51  88.57  81.04
  NUDT-SIRST  Original           72.73  96.19  91.20  88.86  81.04
              FDEP w/o CO-ISD    77.01  98.20  93.95  89.42  84.01
              FDEP               74.15  97.14  92.04  88.97  81.89
  IRSTD-1K    Original           67.15  90.91  88.82  86.97  77.24
              FDEP w/o CO-ISD    68.73  95.29  89.52  88.45  79.18
              FDEP               68.02  91.25  89.76  88.15  79.12
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "alcnet"
  return c
