"""ALCL-Net: YuChuang1205/PAL model/ALCL state_dict ↔ fdep_jax.backbones.alcl."""

from converters.rules import CONV, Rule, conv_norm


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = conv_norm(("stage.layer1.0", "stage.layer1.1"), "stem/conv1")
  table += conv_norm(("stage.layer1.3", "stage.layer1.4"), "stem/conv2")
  for i in range(5):
    for j in range(3):
      block, ours = f"stage.resnet{i + 1}_{j + 1}", f"levels/{i}/{j}"
      if i > 0 and j == 0:
        table += conv_norm((f"{block}.layer1.0", f"{block}.layer1.1"), f"{ours}/conv1")
        table += conv_norm((f"{block}.layer1.4", f"{block}.layer1.5"), f"{ours}/conv2")
        table += conv_norm((f"{block}.layer2.0", f"{block}.layer2.1"), f"{ours}/shortcut")
      else:
        table += conv_norm((f"{block}.layer.0", f"{block}.layer.1"), f"{ours}/conv1")
        table += conv_norm((f"{block}.layer.3", f"{block}.layer.4"), f"{ours}/conv2")
    table.append((f"lcl{i + 1}.layer1.0", f"contrast/{i}/conv1", CONV))
    table.append((f"lcl{i + 1}.layer1.2", f"contrast/{i}/conv2", CONV))
  for i in range(4):
    block = f"sbam{i + 1}"
    table += conv_norm((f"{block}.hl_layer.1", f"{block}.hl_layer.2"), f"up/{i}")
    table += conv_norm((f"{block}.ll_layer.0", f"{block}.ll_layer.1"), f"gate/{i}")
  return table + [("layer.0", "head/conv1", CONV), ("layer.2", "head/conv2", CONV)]
