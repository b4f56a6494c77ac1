"""ILNet: Li-Haoqing/ILNet `ILNet_L`, `_M`, `_S` state_dict ↔ fdep_jax.backbones.ilnet."""

import numpy as np

from converters.rules import BATCH_NORM, CONV, CONV1D, PIXEL_NORM, Rule, conv_norm


def options(state: dict[str, np.ndarray]) -> dict[str, str]:
  """The size, which the tail and the width of the first level tell."""
  if "side543.weight" not in state:
    return {"size": "L"}
  first = state.get("encode_modules.0.conv_in.conv.weight")
  return {"size": "S" if first is not None and len(first) == 8 else "M"}


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = []
  for i, block in enumerate(net.encoder):
    table += _residual_u(f"encode_modules.{i}", f"encoder/{i}", len(block.down))
  for i, block in enumerate(net.decoder):
    table += _residual_u(f"decode_modules.{i}", f"decoder/{i}", len(block.down))
  for i in range(len(net.fuse)):
    table += _fusion(f"ipof_modules.{i}", f"fuse/{i}")
  heads = "side_modules" if net.masked is None else "loss_modules"
  table += [(f"{heads}.{i}", f"side/{i}", CONV) for i in range(len(net.side))]
  if net.masked is not None:
    table += [(f"side_modules.{i}", f"masked/maps/{i}", CONV) for i in range(len(net.side))]
    table.append(("side543", "masked/mask", CONV))
    table.append(("side543_cat", "masked/merge", CONV))
  return [*table, ("out_conv", "head", CONV), ("bn", "out_norm", BATCH_NORM)]


def _residual_u(layer: str, ours: str, depth: int) -> list[Rule]:
  table = conv_norm(f"{layer}.conv_in", f"{ours}/enter")
  for i in range(depth):
    table += conv_norm(f"{layer}.encode_modules.{i}", f"{ours}/down/{i}")
  for i in range(depth - 1):  # listed from the deepest
    table += conv_norm(f"{layer}.decode_modules.{i}", f"{ours}/up/{depth - 2 - i}")
  return table


def _fusion(layer: str, ours: str) -> list[Rule]:
  table = _pair(f"{layer}.conv_1", f"{ours}/place1", f"{ours}/place2")
  for number, name in ((2, "content"), (3, "choice"), (4, "position")):
    path = f"{ours}/{name}"
    table += _pair(f"{layer}.conv_{number}", f"{path}/layer1", f"{path}/layer2")
  return [
    *table,
    (f"{layer}.conv_up.0", f"{ours}/reduce", CONV),
    (f"{layer}.conv_up.1", f"{ours}/reduce_norm", PIXEL_NORM),
    (f"{layer}.conv_up.3", f"{ours}/expand", CONV),
    (f"{layer}.conv_up.4", f"{ours}/expand_norm", PIXEL_NORM),
    (f"{layer}.DODA.conv", f"{ours}/mix/local", CONV1D),
    *conv_norm((f"{layer}.out.0", f"{layer}.out.1"), f"{ours}/out"),
  ]


def _pair(layer: str, first: str, second: str) -> list[Rule]:
  return [
    *conv_norm((f"{layer}.0", f"{layer}.1"), first),
    *conv_norm((f"{layer}.3", f"{layer}.4"), second),
  ]
