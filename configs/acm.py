"""ACM with FDEP on SIRST3.

  python main.py --config configs/acm.py --workdir runs/acm

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                       IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original           62.76  61.25  94.62  18.78  82.41  82.58  68.05
  FDEP w/o CO-ISD    70.43  69.73  96.48  19.70  90.02  86.66  78.01
  FDEP               68.56  68.01  95.42  13.92  89.17  85.02  75.81

Tab. 2, trained on each alone (%):

                                   IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original           67.07  91.63  87.25  89.23  77.86
              FDEP w/o CO-ISD    70.94  94.68  90.95  90.16  82.01
              FDEP               70.34  94.68  89.60  89.39  80.09
  NUDT-SIRST  Original           67.31  97.88  86.31  85.22  73.55
              FDEP w/o CO-ISD    72.16  98.41  90.85  85.78  77.93
              FDEP               69.82  97.67  89.56  85.24  76.34
  IRSTD-1K    Original           63.26  90.24  83.86  86.70  72.71
              FDEP w/o CO-ISD    67.71  89.23  88.57  83.76  74.19
              FDEP               65.96  89.90  87.44  84.34  73.75
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "acm"
  return c
