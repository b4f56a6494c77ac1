"""ALCNet: state_dict of YuChuang1205/PAL, XinyiYing/BasicIRSTD or LESPS ↔ backbones.alcnet."""

from converters import acm
from converters.rules import CONV_TRANSPOSE, Dead, Rule, dead_batch_norm, dead_conv

options = acm.options


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = acm.encoder(net)
  table += [(f"deconv{i}", f"up/{i}", CONV_TRANSPOSE) for i in range(3)]
  table += acm.fusion(net, "fuse12", "fuse/0") + acm.fusion(net, "fuse23", "fuse/1")
  return table + acm.head()


def dead(net) -> list[Dead]:
  """Lists the layers that the published network builds but never runs (92,928 parameters)."""
  reason = "built in __init__, never called in forward"
  entries = []
  for i, channels in ((1, 16), (2, 32)):
    for j in range(4):
      for k in (1, 2):
        layer, shape = f"uplayer{i}.{j}", (channels, channels, 3, 3)
        entries.append(dead_conv(f"{layer}.conv{k}", shape, reason, bias=False))
        entries.append(dead_batch_norm(f"{layer}.bn{k}", channels, reason))
  return entries
