"""DNA-Net with FDEP on SIRST3.

  python main.py --config configs/dna.py --workdir runs/dna

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                      IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original          82.59  86.08  96.68   9.29  95.38  93.41  89.10
  FDEP w/o CO-ISD   83.06  86.09  98.14   8.90  96.33  94.99  91.50
  FDEP              82.54  86.06  97.54  11.93  95.46  93.89  89.62

Tab. 2, trained on each alone (%):

                                  IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original          76.29  96.58  93.56  91.19  85.31
              FDEP w/o CO-ISD   80.36  97.72  95.70  93.07  89.07
              FDEP              79.26  96.58  95.09  92.14  87.62
  NUDT-SIRST  Original          95.17  99.26  99.45  96.88  96.34
              FDEP w/o CO-ISD   95.20  99.26  99.47  98.21  97.69
              FDEP              95.45  99.37  99.45  98.00  97.47
  IRSTD-1K    Original          68.07  94.28  86.27  86.83  74.91
              FDEP w/o CO-ISD   71.53  94.61  90.78  87.49  79.42
              FDEP              71.05  93.27  90.80  84.10  76.37
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "dna"
  return c
