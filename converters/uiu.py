"""UIU-Net: state_dict of YuChuang1205/PAL or XinyiYing/BasicIRSTD ↔ fdep_jax.backbones.uiu."""

import numpy as np

from converters.rules import BATCH_NORM, CONV, NORM, Kind, Rule, conv_norm


def options(state: dict[str, np.ndarray]) -> dict[str, object]:
  """Infers keywords of `create`: input channels and the fusion blocks' norm."""
  first = state.get("stage1.rebnconvin.conv_s1.weight")
  batch = any(n.startswith("fuse") and n.endswith(".running_mean") for n in state)
  return {
    "in_channels": 1 if first is not None and first.shape[1:2] == (1,) else 3,
    "fusion_norm": "batch" if batch else "group",
  }


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = []
  for i, block in enumerate(net.encoder):
    table += _residual_u(f"stage{i + 1}", f"encoder/{i}", len(block.down))
  for i, block in enumerate(net.decoder):
    table += _residual_u(f"stage{i + 1}d", f"decoder/{i}", len(block.down))
  norm = BATCH_NORM if hasattr(net.fuse[0].out.norm, "mean") else NORM
  for i in range(4):
    layer, ours = f"fuse{i + 2}", f"fuse/{i}"
    table += _fusion_conv(f"{layer}.feature_high", 0, f"{ours}/high", norm)
    table += _fusion_conv(f"{layer}.topdown", 1, f"{ours}/channel1", norm)
    table += _fusion_conv(f"{layer}.topdown", 4, f"{ours}/channel2", norm)
    table += _fusion_conv(f"{layer}.bottomup", 0, f"{ours}/spatial1", norm)
    table.append((f"{layer}.bottomup.3.conv1", f"{ours}/spatial2", CONV))
    table += _fusion_conv(f"{layer}.post", 0, f"{ours}/out", norm)
  table += [(f"side{i + 1}", f"side/{i}", CONV) for i in range(6)]
  table.append(("outconv", "head", CONV))
  return table


def _residual_u(layer: str, ours: str, depth: int) -> list[Rule]:
  table = _unit(f"{layer}.rebnconvin", f"{ours}/enter")
  for i in range(depth):
    table += _unit(f"{layer}.rebnconv{i + 1}", f"{ours}/down/{i}")
  for i in range(depth - 1):
    table += _unit(f"{layer}.rebnconv{i + 1}d", f"{ours}/up/{i}")
  return table


def _unit(layer: str, ours: str) -> list[Rule]:
  return conv_norm((f"{layer}.conv_s1", f"{layer}.bn_s1"), ours)


def _fusion_conv(layer: str, index: int, ours: str, norm: Kind) -> list[Rule]:
  return [
    (f"{layer}.{index}", f"{ours}/conv", CONV),
    (f"{layer}.{index + 1}", f"{ours}/norm", norm),
  ]
