"""SCTransNet: PAL `SCTransNet_No_Sigmoid` state_dict ↔ fdep_jax.backbones.sctransnet."""

import numpy as np

from converters.rules import (
  CONV,
  CONV1D,
  LINEAR_AS_CONV,
  NORM,
  Dead,
  Kind,
  Rule,
  conv_norm,
  leaky_block,
)

_CHANNELS = (32, 64, 128, 256)


def options(state: dict[str, np.ndarray]) -> dict[str, int]:
  """The image's channels, which the first convolution tells; 3 where it does not fit."""
  first = state.get("inc.0.conv1.weight")
  return {"in_channels": 1 if first is not None and first.shape[1:2] == (1,) else 3}


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = leaky_block("inc.0", "levels/0", shortcut=True)
  for i in range(1, 5):
    table += leaky_block(f"down_encoder{i}.0", f"levels/{i}", shortcut=i < 4)
  for i in range(4):
    table.append((f"mtc.embeddings_{i + 1}.patch_embeddings", f"embed/{i}", CONV))
    table.append((f"mtc.encoder.encoder_norm{i + 1}.body", f"norms/{i}", NORM))
    rebuilt = f"mtc.reconstruct_{i + 1}"
    table += conv_norm((f"{rebuilt}.conv", f"{rebuilt}.norm"), f"reconstruct/{i}")
    up = f"up_decoder{i + 1}"
    table.append((f"{up}.coatt.mlp_x.1", f"up/{i}/from_skip", LINEAR_AS_CONV))
    table.append((f"{up}.coatt.mlp_g.1", f"up/{i}/from_deep", LINEAR_AS_CONV))
    for k in range(2):
      conv = f"{up}.nConvs.{k}"
      table += conv_norm((f"{conv}.conv", f"{conv}.norm"), f"up/{i}/conv{k + 1}")
    table += _layer(f"mtc.encoder.layer.{i}", f"layers/{i}")
  table += [(f"gt_conv{5 - i}.0", f"side_heads/{i}", CONV) for i in range(4)]
  return [*table, ("outc", "head", CONV), ("outconv", "fused_head", CONV)]


def _layer(layer: str, ours: str) -> list[Rule]:
  attention = f"{layer}.channel_attn"
  table = [
    (f"{layer}.attn_norm.body", f"{ours}/norm_all", NORM),
    (f"{attention}.mheadk", f"{ours}/key1", CONV),
    (f"{attention}.mheadv", f"{ours}/value1", CONV),
    (f"{attention}.k", f"{ours}/key3", CONV),
    (f"{attention}.v", f"{ours}/value3", CONV),
  ]
  for i in range(4):
    n, forward = i + 1, f"{layer}.ffn{i + 1}"
    table += [
      (f"{layer}.attn_norm{n}.body", f"{ours}/norms/{i}", NORM),
      (f"{attention}.mhead{n}", f"{ours}/query1/{i}", CONV),
      (f"{attention}.q{n}", f"{ours}/query3/{i}", CONV),
      (f"{attention}.project_out{n}", f"{ours}/out/{i}", CONV),
      (f"{layer}.ffn_norm{n}.body", f"{ours}/forward_norms/{i}", NORM),
      (f"{forward}.project_in", f"{ours}/expand/{i}", CONV),
      (f"{forward}.dwconv3x3", f"{ours}/depth3/{i}", CONV),
      (f"{forward}.dwconv5x5", f"{ours}/depth5/{i}", CONV),
      (f"{forward}.project_out", f"{ours}/reduce/{i}", CONV),
      (f"{forward}.eca.conv.0", f"{ours}/gate/{i}", CONV1D),
    ]
  return table


def dead(net) -> list[Dead]:
  """122,944 parameters that the published network builds and never uses."""
  position = Kind({"position_embeddings": "position"})
  entries = [
    Dead(
      f"mtc.embeddings_{i + 1}",
      position,
      {"position_embeddings": (1, 256, channels)},
      "never added to the embedding",
    )
    for i, channels in enumerate(_CHANNELS)
  ]
  names = [f"q{i}_attn{j}" for i in range(1, 5) for j in range(1, 5)]
  scalars = Kind({name: name for name in names})
  return entries + [
    Dead(
      f"mtc.encoder.layer.{i}.channel_attn",
      scalars,
      {name: (1,) for name in names},
      "never used in forward",
    )
    for i in range(4)
  ]
