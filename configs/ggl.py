"""GGL-Net with FDEP on SIRST3.

  python main.py --config configs/ggl.py --workdir runs/ggl

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                       IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original           81.69  84.74  97.21   7.78  95.24  92.39  87.99
  FDEP w/o CO-ISD    84.35  85.62  97.54  13.90  96.78  94.58  91.53
  FDEP               83.59  86.29  97.34  11.46  96.48  94.00  90.69

Tab. 2, trained on each alone (%):

                                   IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original           79.46  97.34  94.64  93.44  88.43
              FDEP w/o CO-ISD    79.59  98.48  95.70  94.48  90.41
              FDEP               80.12  98.10  94.84  94.04  89.19
  NUDT-SIRST  Original           94.68  98.94  99.25  97.26  96.53
              FDEP w/o CO-ISD    95.49  99.26  99.40  98.00  97.41
              FDEP               95.23  99.05  99.36  97.46  96.84
  IRSTD-1K    Original           67.68  89.56  87.06  86.84  75.60
              FDEP w/o CO-ISD    68.77  94.28  88.61  89.16  79.00
              FDEP               67.42  92.93  86.06  90.24  77.66
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "ggl"
  c.train.learning_rate = 5e-4  # half of base: PAL advises it for ALCL and GGL, for stability
  return c
