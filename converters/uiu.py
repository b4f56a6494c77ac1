"""UIU-Net: YuChuang1205/PAL `UIU_No_Sigmoid` state_dict ↔ fdep_jax.backbones.uiu."""

from converters.rules import CONV, NORM, Rule, conv_norm


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = []
  for i, block in enumerate(net.encoder):
    table += _residual_u(f"stage{i + 1}", f"encoder/{i}", len(block.down))
  for i, block in enumerate(net.decoder):
    table += _residual_u(f"stage{i + 1}d", f"decoder/{i}", len(block.down))
  for i in range(4):
    layer, ours = f"fuse{i + 2}", f"fuse/{i}"
    table += _conv_group(f"{layer}.feature_high", 0, f"{ours}/high")
    table += _conv_group(f"{layer}.topdown", 1, f"{ours}/channel1")
    table += _conv_group(f"{layer}.topdown", 4, f"{ours}/channel2")
    table += _conv_group(f"{layer}.bottomup", 0, f"{ours}/spatial1")
    table.append((f"{layer}.bottomup.3.conv1", f"{ours}/spatial2", CONV))
    table += _conv_group(f"{layer}.post", 0, f"{ours}/out")
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


def _conv_group(layer: str, index: int, ours: str) -> list[Rule]:
  return [
    (f"{layer}.{index}", f"{ours}/conv", CONV),
    (f"{layer}.{index + 1}", f"{ours}/norm", NORM),
  ]
