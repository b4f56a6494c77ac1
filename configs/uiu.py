"""UIU-Net with FDEP on SIRST3.

  python main.py --config configs/uiu.py --workdir runs/uiu

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                      IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original          81.99  83.73  96.54  12.15  96.00  91.69  88.02
  FDEP w/o CO-ISD   84.34  85.58  97.41   5.35  96.93  93.30  90.44
  FDEP              83.12  85.05  97.08  13.31  96.57  93.22  90.01

Tab. 2, trained on each alone (%):

                                  IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original          78.23  96.58  94.37  91.03  85.91
              FDEP w/o CO-ISD   79.34  98.10  95.87  90.11  86.39
              FDEP              79.65  97.34  94.97  90.51  85.96
  NUDT-SIRST  Original          94.88  99.05  99.44  97.59  97.05
              FDEP w/o CO-ISD   95.52  99.05  99.40  97.89  97.30
              FDEP              95.55  99.37  99.47  97.90  97.38
  IRSTD-1K    Original          67.64  93.27  86.27  88.73  76.55
              FDEP w/o CO-ISD   72.44  94.28  91.95  85.84  78.93
              FDEP              68.46  91.58  90.14  87.67  79.03
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "uiu"
  return c
