"""MTU-Net: TianhaoWu16's `res_UNet` state_dict ↔ fdep_jax.backbones.mtu."""

from converters.rules import (
  CONV,
  LINEAR,
  NORM,
  Dead,
  Kind,
  Rule,
  dead_batch_norm,
  dead_conv,
  leaky_block,
)

# Parameters of the transformer itself, of no layer of it.
_TOKENS = Kind({"cls_token": "class_token", "embedding": "position"})
_BLOCK = "transformer.layer_blocks.0"


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = []
  for i in range(5):
    for k in range(1 if i == 0 else 2):
      table += leaky_block(f"conv{i}_0.{k}", f"levels/{i}/{k}", shortcut=k == 0)
  for i in range(4):
    vit, ours = f"vit{5 - i}", f"transformers/{i}"
    table += [
      (vit, ours, _TOKENS),
      (f"{vit}.projection", f"{ours}/embed", LINEAR),
      (
        f"{vit}.{_BLOCK}.multi_head_attention.qkv_layer",
        f"{ours}/query_key_value",
        LINEAR,
      ),
      (f"{vit}.{_BLOCK}.multi_head_attention.out_attention", f"{ours}/out", LINEAR),
      (f"{vit}.{_BLOCK}.layer_norm1", f"{ours}/norm1", NORM),
      (f"{vit}.{_BLOCK}.mlp.mlp_layers.0", f"{ours}/expand", LINEAR),
      (f"{vit}.{_BLOCK}.mlp.mlp_layers.3", f"{ours}/reduce", LINEAR),
      (f"{vit}.{_BLOCK}.layer_norm2", f"{ours}/norm2", NORM),
    ]
  table += leaky_block("conv3_1_1.0", "merge", shortcut=True)
  for i in range(4):
    table += leaky_block(f"conv{i}_{4 - i}.0", f"up/{i}", shortcut=True)
  return [*table, ("final", "head", CONV)]


def dead(net) -> list[Dead]:
  """3,480,321 parameters that the published network builds and never runs."""
  reason = "built in __init__, never called in forward"
  entries = []
  for i in (1, 2):
    entries.append(dead_conv(f"conv0_0_0.0.conv{i}", (3, 3, 3, 3), reason, bias=True))
    entries.append(dead_batch_norm(f"conv0_0_0.0.bn{i}", 3, reason))
  attention, mlp = f"vit1.{_BLOCK}.multi_head_attention", f"vit1.{_BLOCK}.mlp.mlp_layers"
  shapes = {"embedding": (4097, 256), "cls_token": (1, 1, 256)}
  entries.append(Dead("vit1", _TOKENS, shapes, reason))
  for layer, shape, bias in (
    ("vit1.projection", (256, 256), True),
    (f"{attention}.qkv_layer", (768, 256), False),
    (f"{attention}.out_attention", (256, 256), False),
    (f"{mlp}.0", (4096, 256), True),
    (f"{mlp}.3", (256, 4096), True),
  ):
    entries.append(dead_conv(layer, shape, reason, bias=bias))
  for i in (1, 2):
    shapes = {"weight": (256,), "bias": (256,)}
    entries.append(Dead(f"vit1.{_BLOCK}.layer_norm{i}", NORM, shapes, reason))
  entries.append(dead_conv("head.block.0", (4, 16, 3, 3), reason, bias=False))
  entries.append(dead_batch_norm("head.block.1", 4, reason))
  entries.append(dead_conv("head.block.4", (1, 4, 1, 1), reason, bias=True))
  return entries
