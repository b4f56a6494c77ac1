"""SDSNet: YuChuang1205/PAL (and PhysiLearn/SDS-Net) state_dict ↔ fdep_jax.backbones.sdsnet."""

import numpy as np

from converters.rules import (
  CONV,
  CONV1D,
  NORM,
  Dead,
  Kind,
  Rule,
  conv_norm,
  dead_norm,
  leaky_block,
)

_SHARE = Kind({"w": "share"})


def options(state: dict[str, np.ndarray]) -> dict[str, int]:
  """The image's channels, which the first convolution tells; 3 where it does not fit."""
  first = state.get("backbone.down_blocks.0.conv1.weight")
  return {"in_channels": 1 if first is not None and first.shape[1:2] == (1,) else 3}


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = []
  for i, block in enumerate(net.encoder):
    last = i == len(net.encoder) - 1
    layer = "backbone.final_block" if last else f"backbone.down_blocks.{i}"
    table += leaky_block(layer, f"encoder/{i}", shortcut=block.shortcut is not None)
  for i in range(3):
    table.append((f"shallow.embeddings.{i}.patch_embeddings", f"shallow/embed/{i}", CONV))
    table.append((f"shallow.srb.norms.{i}.body", f"shallow/norms/{i}", NORM))
    table += _restore(f"shallow.FM.{i}", f"shallow/restore/{i}")
  for n in range(len(net.shallow.layers)):
    layer, ours = f"shallow.srb.layer.{n}", f"shallow/layers/{n}"
    for i in range(3):
      table.append((f"{layer}.norms.{i}.body", f"{ours}/norms/{i}", NORM))
      table += _multi_scale(f"{layer}.msca.msm{i + 1}", f"{ours}/queries/{i}")
      table.append((f"{layer}.msca.project_out{i + 1}", f"{ours}/project/{i}", CONV))
      table += _gate(f"{layer}.mdfa.{i}", f"{ours}/gates/{i}")
    table += _multi_scale(f"{layer}.msca.msmk", f"{ours}/keys")
    table += _multi_scale(f"{layer}.msca.msmv", f"{ours}/values")
  table.append(("deep.embeddings.patch_embeddings", "deep/embed", CONV))
  table.append(("deep.drb.norms.body", "deep/norm", NORM))
  table += _restore("deep.FM", "deep/restore")
  for n in range(len(net.deep.layers)):
    layer, ours = f"deep.drb.layer.{n}", f"deep/layers/{n}"
    table.append((f"{layer}.norms.body", f"{ours}/norm", NORM))
    for letter, name in (("q", "query"), ("k", "keys"), ("v", "values")):
      table += _multi_scale(f"{layer}.mssa.msm{letter}", f"{ours}/{name}")
    table.append((f"{layer}.mssa.project_out1", f"{ours}/project", CONV))
    table += _gate(f"{layer}.mdfa", f"{ours}/gate")
  for i in range(3):  # levels 3 to 1
    layer = f"adsf{i + 1}"
    table.append((layer, f"fuse/{i}", _SHARE))
    table.append((f"{layer}.conv1", f"fuse/{i}/local", CONV1D))
    table.append((f"{layer}.fc", f"fuse/{i}/dense", CONV))
    layer = f"dcbl{i + 1}.conv_layers"
    table += conv_norm((f"{layer}.0", f"{layer}.1"), f"decoder/{i}/layer1")
    table += conv_norm((f"{layer}.3", f"{layer}.4"), f"decoder/{i}/layer2")
    table.append((f"gt_conv{3 - i}.0", f"heads/{i}", CONV))
  return [*table, ("out", "heads/3", CONV), ("outconv", "joint", CONV)]


def dead(net) -> list[Dead]:
  """Built, never run: the layers' norms of the concatenated tokens."""
  reason = "the attention normalises the tokens itself"
  return [
    dead_norm(f"shallow.srb.layer.{n}.attn_norm.body", 224, reason)
    for n in range(len(net.shallow.layers))
  ]


def _multi_scale(layer: str, ours: str) -> list[Rule]:
  table = [(f"{layer}.norm.body", f"{ours}/norm", NORM)]
  for k in range(3):
    convs = f"{layer}.conv_layers"
    table.append((f"{convs}.conv1_1_{k}", f"{ours}/horizontal/{k}", CONV))
    table.append((f"{convs}.conv2_1_{k}", f"{ours}/vertical/{k}", CONV))
  return table


def _gate(layer: str, ours: str) -> list[Rule]:
  return [
    (f"{layer}.mlp.0", f"{ours}/channel/reduce", CONV),
    (f"{layer}.mlp.2", f"{ours}/channel/expand", CONV),
    (f"{layer}.conv", f"{ours}/spatial", CONV),
  ]


def _restore(layer: str, ours: str) -> list[Rule]:
  return conv_norm((f"{layer}.conv", f"{layer}.norm"), ours)
