"""MLCL-Net: YuChuang1205/PAL `MLCL_no_sigmoid` state_dict ↔ fdep_jax.backbones.mlcl."""

from converters.rules import CONV, Rule, conv_norm


def options(state) -> dict:
  """Infers keywords of `create`: the small variant has no third block in its stages."""
  blocks = {name.split(".")[1] for name in state if name.startswith("stage.resnet1_")}
  return {"small": "resnet1_2" in blocks and "resnet1_3" not in blocks}


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = conv_norm(("stage.layer1.0", "stage.layer1.1"), "stem/conv1")
  table += conv_norm(("stage.layer1.3", "stage.layer1.4"), "stem/conv2")
  for i, stage in enumerate(net.stages):
    for j in range(len(stage)):
      table += _block(f"stage.resnet{i + 1}_{j + 1}", f"stages/{i}/{j}", down=i > 0 and j == 0)
  for i in range(3):
    layer, ours = f"mlcl{i + 1}", f"contrast/{i}"
    for b in range(3):
      table += [
        (f"{layer}.layer{b + 1}.0", f"{ours}/branches/{b}/0", CONV),
        (f"{layer}.layer{b + 1}.2", f"{ours}/branches/{b}/1", CONV),
      ]
    table += [(f"{layer}.conv", f"{ours}/merge", CONV), (f"conv{i + 1}.0", f"widen/{i}", CONV)]
  return table + [("layer.0", "head/conv1", CONV), ("layer.2", "head/conv2", CONV)]


def _block(layer: str, ours: str, *, down: bool) -> list[Rule]:
  if not down:
    return conv_norm((f"{layer}.layer.0", f"{layer}.layer.1"), f"{ours}/conv1") + conv_norm(
      (f"{layer}.layer.3", f"{layer}.layer.4"), f"{ours}/conv2"
    )
  return [
    *conv_norm((f"{layer}.layer1.0", f"{layer}.layer1.1"), f"{ours}/conv1"),
    *conv_norm((f"{layer}.layer1.4", f"{layer}.layer1.5"), f"{ours}/conv2"),
    *conv_norm((f"{layer}.layer2.0", f"{layer}.layer2.1"), f"{ours}/shortcut"),
  ]
