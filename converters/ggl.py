"""GGL-Net: YuChuang1205/PAL model/GGL state_dict ↔ fdep_jax.backbones.ggl."""

from converters.rules import CONV, LINEAR_AS_CONV, Rule, conv_norm


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = conv_norm(("stage.layer1.0", "stage.layer1.1"), "stem/conv1")
  table += conv_norm(("stage.layer1.3", "stage.layer1.4"), "stem/conv2")
  table += conv_norm(("stage.resnet1_1.layer.0", "stage.resnet1_1.layer.1"), "enter/0/conv1")
  table += conv_norm(("stage.resnet1_1.layer.3", "stage.resnet1_1.layer.4"), "enter/0/conv2")
  for i in range(1, 5):
    block = f"stage.resnet{i + 1}_1"
    table += conv_norm((f"{block}.layer1.0", f"{block}.layer1.1"), f"enter/{i}/conv1")
    table += conv_norm((f"{block}.layer1.4", f"{block}.layer1.5"), f"enter/{i}/conv2")
    table += conv_norm((f"{block}.layer2.0", f"{block}.layer2.1"), f"enter/{i}/shortcut")
  for i in range(5):
    for j in range(2):
      block, ours = f"stage.resnet{i + 1}_{j + 2}", f"gated/{i}/{j}"
      table += conv_norm((f"{block}.layer1.0", f"{block}.layer1.1"), f"{ours}/conv1")
      table += _squeeze(f"{block}.SEAttention", ours)
      table += conv_norm((f"{block}.layer2.0", f"{block}.layer2.1"), f"{ours}/conv2")
    for layer, path in (("layer1", "gradient"), ("layer2", "joint")):
      block, ours = f"stage.Res{i + 1}.{layer}", f"inject/{i}/{path}"
      table += conv_norm((f"{block}.0", f"{block}.1"), f"{ours}/conv1")
      table += _squeeze(f"{block}.3", ours)
      table += conv_norm((f"{block}.4", f"{block}.5"), f"{ours}/conv2")
    table.append((f"lcl{i + 1}.layer1.0", f"contrast/{i}/conv1", CONV))
    table.append((f"lcl{i + 1}.layer1.2", f"contrast/{i}/conv2", CONV))
  for i in range(4):
    block = f"sbam{i + 1}"
    table += conv_norm((f"{block}.hl_layer.1", f"{block}.hl_layer.2"), f"up/{i}")
    table.append((f"{block}.hl_layer_2.se.0", f"channel/{i}/reduce", CONV))
    table.append((f"{block}.hl_layer_2.se.2", f"channel/{i}/expand", CONV))
    table.append((f"{block}.ll_layer.conv", f"position/{i}", CONV))
  return table + [("layer.0", "head/conv1", CONV), ("layer.2", "head/conv2", CONV)]


def _squeeze(layer: str, ours: str) -> list[Rule]:
  return [
    (f"{layer}.fc.0", f"{ours}/squeeze/reduce", LINEAR_AS_CONV),
    (f"{layer}.fc.2", f"{ours}/squeeze/expand", LINEAR_AS_CONV),
  ]
