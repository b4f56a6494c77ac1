"""Table 6: DINOv2 as the encoder, of a plain decoder and of MSDA-Net's, frozen or not, on SIRST3.

  python main.py --mode sweep --config configs/tables/table6.py --workdir runs/paper
  python main.py --mode table --config configs/tables/table6.py --workdir runs/paper --out tables/6

Five runs, the last one Table 1's. The paper only names these decoders; ours are in
`fdep_jax/ablations.py`. An unfrozen ViT-L has gradients and optimiser: take an accelerator.
"""

from configs import base, tables
from fdep_jax.tables.experiments import Row, Table

get_config = base.get_config
DECODERS = {"DINO + D": "plain", "DINO + MSDA(D)": "msda", "FDEP w/o CO-ISD": "no"}


def get_table():
  rows = []
  for printed in tables.paper("table6"):
    decoder, changes, name = DECODERS[printed["scheme"]], {}, "msda-fdep_wo_coisd"
    if decoder != "no":
      changes["model.on_dino"] = decoder
      name = f"dino-{decoder}"
    if not printed["frozen"]:
      changes["prior.unfreeze"] = True
      name += "-unfrozen"
    label = (printed["scheme"], "✓" if printed["frozen"] else "")
    changes = tables.network("msda", "fdep_wo_coisd", **changes)
    rows.append(Row(name, label, changes, tables.numbers(printed), baseline="msda-fdep_wo_coisd"))
  title = "Table 6. DINOv2 as the encoder, SIRST3."
  return Table(title, ("Scheme", "Frozen"), tables.ALL, tuple(rows))
