"""ACM: state_dict of YuChuang1205/PAL, XinyiYing/BasicIRSTD or LESPS ↔ backbones.acm."""

from converters.rules import (
  BATCH_NORM,
  CONV,
  CONV_TRANSPOSE,
  NORM,
  Rule,
  conv_norm,
)


def options(state) -> dict:
  """Infers keywords of `create`: input channels and the fusion blocks' norm."""
  first = state.get("stem.0.weight")
  batch = any(n.startswith("fuse") and n.endswith(".running_mean") for n in state)
  return {
    "in_channels": 3 if first is None or first.ndim != 1 else first.size,
    "fusion_norm": "batch" if batch else "group",
  }


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = encoder(net)
  for i in range(2):
    table.append((f"deconv{i + 1}", f"up/{i}", CONV_TRANSPOSE))
    table += fusion(net, f"fuse{i + 1}", f"fuse/{i}")
    for j in range(3):
      table += basic_block(f"uplayer{i + 1}.{j}", f"refine/{i}/{j}")
  return table + head()


def encoder(net) -> list[Rule]:
  """Lists the rules of the encoder, which ACM and ALCNet share."""
  table = [("stem.0", "encoder/norm", BATCH_NORM)]
  for i in range(3):
    table += conv_norm((f"stem.{3 * i + 1}", f"stem.{3 * i + 2}"), f"encoder/stem/{i}")
  for i, stage in enumerate(net.encoder.stages):
    for j, block in enumerate(stage):
      layer, ours = f"layer{i + 1}.{j}", f"encoder/stages/{i}/{j}"
      table += basic_block(layer, ours)
      if block.shortcut is not None:
        table += conv_norm((f"{layer}.downsample.0", f"{layer}.downsample.1"), f"{ours}/shortcut")
  return table


def basic_block(layer: str, ours: str) -> list[Rule]:
  """Lists the rules of a block's two convolutions, without its shortcut."""
  return conv_norm((f"{layer}.conv1", f"{layer}.bn1"), f"{ours}/conv1") + conv_norm(
    (f"{layer}.conv2", f"{layer}.bn2"), f"{ours}/conv2"
  )


def fusion(net, layer: str, ours: str) -> list[Rule]:
  """Lists the rules of a fusion: both gates and the merging convolution."""
  norm = BATCH_NORM if hasattr(net.fuse[0].post_norm, "mean") else NORM
  table = [
    (f"{layer}.post.0", f"{ours}/post", CONV),
    (f"{layer}.post.1", f"{ours}/post_norm", norm),
  ]
  for gate, first in (("topdown", 1), ("bottomup", 0)):  # child 0 of topdown: the global mean
    table += [
      (f"{layer}.{gate}.{first}", f"{ours}/{gate}/conv1", CONV),
      (f"{layer}.{gate}.{first + 1}", f"{ours}/{gate}/norm1", norm),
      (f"{layer}.{gate}.{first + 3}", f"{ours}/{gate}/conv2", CONV),
      (f"{layer}.{gate}.{first + 4}", f"{ours}/{gate}/norm2", norm),
    ]
  return table


def head() -> list[Rule]:
  """Lists the rules of the head; its children 2 and 3 are ReLU and dropout."""
  return [
    *conv_norm(("head.block.0", "head.block.1"), "head/conv1"),
    ("head.block.4", "head/conv2", CONV),
  ]
