"""MLCL-Net with FDEP on SIRST3.

  python main.py --config configs/mlcl.py --workdir runs/mlcl

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                       IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original           79.83  82.88  96.35  19.02  94.37  91.98  86.80
  FDEP w/o CO-ISD    84.16  85.08  97.54   8.59  96.63  93.57  90.43
  FDEP               80.24  83.46  95.42  12.25  94.27  92.50  87.20

Tab. 2, trained on each alone (%):

                                   IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original           76.37  96.96  93.80  88.79  83.28
              FDEP w/o CO-ISD    80.35  97.72  95.88  93.52  89.66
              FDEP               77.59  95.82  92.98  91.84  85.40
  NUDT-SIRST  Original           94.47  98.73  99.35  96.73  96.11
              FDEP w/o CO-ISD    95.82  99.47  99.48  98.21  97.70
              FDEP               94.93  99.05  99.37  97.30  96.69
  IRSTD-1K    Original           66.07  90.24  84.62  85.72  72.53
              FDEP w/o CO-ISD    71.68  91.58  91.05  87.36  79.54
              FDEP               66.41  90.91  85.82  85.07  73.01
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "mlcl"
  return c
