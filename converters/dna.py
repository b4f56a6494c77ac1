"""DNA-Net: state_dict of YuChuang1205/PAL, BasicIRSTD or LESPS ↔ fdep_jax.backbones.dna."""

import numpy as np

from converters.rules import CONV, Rule, conv_norm


def options(state: dict[str, np.ndarray]) -> dict[str, int]:
  """Infers the image's channels from the first convolution; 3 where it does not fit."""
  first = state.get("conv0_0.0.conv1.weight")
  return {"in_channels": 1 if first is not None and first.shape[1:2] == (1,) else 3}


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = []
  for i in range(5):
    for j in range(5 - i):
      for k in range(1 if i == 0 else 2):
        table += _block(f"conv{i}_{j}.{k}", f"nodes/{i}/{j}/{k}", shortcut=k == 0)
  table += _block("conv0_4_final.0", "merge", shortcut=True)
  table += [(f"conv0_{i + 1}_1x1", f"squeeze/{i}", CONV) for i in range(4)]
  table += [(f"final{i + 1}", f"heads/{i}", CONV) for i in range(4)]
  return table


def _block(layer: str, ours: str, *, shortcut: bool) -> list[Rule]:
  table = conv_norm((f"{layer}.conv1", f"{layer}.bn1"), f"{ours}/conv1")
  table += conv_norm((f"{layer}.conv2", f"{layer}.bn2"), f"{ours}/conv2")
  if shortcut:  # the number of channels changes
    table += conv_norm((f"{layer}.shortcut.0", f"{layer}.shortcut.1"), f"{ours}/shortcut")
  return table + [
    (f"{layer}.ca.fc1", f"{ours}/channel/reduce", CONV),
    (f"{layer}.ca.fc2", f"{ours}/channel/expand", CONV),
    (f"{layer}.sa.conv1", f"{ours}/spatial", CONV),
  ]
