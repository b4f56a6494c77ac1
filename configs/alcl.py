"""ALCL-Net with FDEP on SIRST3.

  python main.py --config configs/alcl.py --workdir runs/alcl

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                       IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original           80.94  83.39  96.74  11.22  95.09  91.23  86.75
  FDEP w/o CO-ISD    83.06  84.16  97.21   8.49  96.31  92.30  88.90
  FDEP               81.83  83.95  96.41  16.09  95.74  91.29  87.40

Tab. 2, trained on each alone (%):

                                   IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original           76.52  95.82  93.44  90.02  84.11
              FDEP w/o CO-ISD    79.07  97.34  95.11  92.14  87.63
              FDEP               77.69  95.82  93.10  91.86  85.53
  NUDT-SIRST  Original           94.25  99.15  99.38  94.25  93.66
              FDEP w/o CO-ISD    94.39  98.10  99.01  96.41  95.46
              FDEP               94.44  98.94  99.31  96.54  95.88
  IRSTD-1K    Original           67.35  92.26  86.49  86.11  74.48
              FDEP w/o CO-ISD    72.24  92.93  91.37  85.74  78.34
              FDEP               69.82  92.26  88.95  83.55  75.15
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "alcl"
  c.train.learning_rate = 5e-4  # half of base: PAL advises it for ALCL and GGL, for stability
  return c
