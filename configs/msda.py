"""MSDA-Net with FDEP on SIRST3: the paper's main setting (ViT-L/14, 448×448, batch 16, 400 epochs).

  python main.py --config configs/msda.py --workdir runs/msda

Needs data/SIRST3 and weights/dinov2_vitl14_pretrain.pth (README.md says where they come from) and
an accelerator; not run to its end by us.

Paper, Tab. 1, SIRST3 test set (%; Fa in 10⁻⁶):

                       IoU   nIoU     Pd     Fa  HSE-P  HSE-T    HSE
  Original           82.86  85.46  97.01  12.53  96.43  93.04  89.72
  FDEP w/o CO-ISD    84.71  86.57  98.14  11.95  97.25  94.32  91.73
  FDEP               84.05  86.33  97.54  14.24  96.92  94.21  91.31

Tab. 2, trained on each alone (%):

                                   IoU     Pd  HSE-P  HSE-T    HSE
  NUAA-SIRST  Original           75.94  96.96  93.25  89.64  83.58
              FDEP w/o CO-ISD    79.48  98.10  95.29  92.35  88.00
              FDEP               75.98  95.06  92.84  90.44  83.96
  NUDT-SIRST  Original           96.03  99.15  99.54  97.10  96.66
              FDEP w/o CO-ISD    96.01  99.05  99.43  98.08  97.53
              FDEP               96.50  99.37  99.50  97.91  97.43
  IRSTD-1K    Original           71.47  92.26  91.21  85.89  78.34
              FDEP w/o CO-ISD    71.96  93.27  91.86  86.07  79.06
              FDEP               71.52  93.60  91.74  86.51  79.37
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.backbone = "msda"
  return c
