"""Other foundation models as the prior: ACM and MSDA-Net on SIRST3, ours (the paper has DINOv2).

  python main.py --mode sweep --config configs/tables/priors.py --workdir runs/paper
  python main.py --mode table --config configs/tables/priors.py --workdir runs/paper \
      --out tables/priors

46 runs, of which those with DINOv2 are Tables 1 and 4's where the paper has them. Needs the files
named below in weights/; docs/priors.md says where they are, what their licences allow, and what a
step costs with each.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Row, Table

get_config = base.get_config
NETWORKS = ("ACM", "MSDA-Net")
PRIORS = {  # label: the authors' file name
  "DINOv1 S/16": "dino_deitsmall16_pretrain.pth",
  "DINOv1 B/16": "dino_vitbase16_pretrain.pth",
  "DINOv2 S/14": "dinov2_vits14_pretrain.pth",
  "DINOv2 S/14, registers": "dinov2_vits14_reg4_pretrain.pth",
  "DINOv2 B/14": "dinov2_vitb14_pretrain.pth",
  "DINOv2 B/14, registers": "dinov2_vitb14_reg4_pretrain.pth",
  "DINOv2 L/14": "dinov2_vitl14_pretrain.pth",
  "DINOv2 L/14, registers": "dinov2_vitl14_reg4_pretrain.pth",
  "DINOv3 S/16": "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
  "DINOv3 B/16": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
  "DINOv3 L/16": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
}
# Rows of the paper's tables have the names that they have there, and share their runs.
KNOWN = {"DINOv2 L/14": "", "DINOv2 S/14": "-vit_s", "DINOv2 B/14": "-vit_b"}


def get_table():
  rows = []
  for network in NETWORKS:
    ours = tables.NETWORKS[network]
    start = f"{ours}-original"
    changes = tables.network(ours, "original")
    rows.append(Row(start, (network, "none", tables.MODES["original"]), changes, {}))
    for prior, file in PRIORS.items():
      # The default is not named, as in Table 1, so that the runs are the same.
      changed = {} if prior == "DINOv2 L/14" else {"prior.checkpoint": f"weights/{file}"}
      ending = KNOWN.get(prior, "-" + file.split("_pretrain")[0])
      for mode in ("fdep_wo_coisd", "fdep"):
        changes = tables.network(ours, mode, **changed)
        label = (network, prior, tables.MODES[mode])
        rows.append(Row(f"{ours}-{mode}{ending}", label, changes, {}, baseline=start))
  title = "Foundation models as the prior, SIRST3 (ours)."
  return Table(title, ("Network", "Prior", "Scheme"), tables.ALL, tuple(rows))
