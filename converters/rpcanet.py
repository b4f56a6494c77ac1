"""RPCANet: fengyiwu98/RPCANet `RPCANet9` state_dict (its `.pkl`) ↔ fdep_jax.backbones.rpcanet."""

from converters.rules import CONV, Kind, Rule, conv_norm

_STEP = Kind({"epsilon": "step"})


def rules(net) -> list[Rule]:
  """Lists the rules, one line a layer."""
  table = []
  for i in range(len(net.stages)):
    layer, ours = f"decos.{i}", f"stages/{i}"
    table += _normed(f"{layer}.lowrank.convs", f"{ours}/background")
    table.append((f"{layer}.sparse", ours, _STEP))
    table += [
      (f"{layer}.sparse.convs.{2 * k}", f"{ours}/sparse/layers/{k}", CONV) for k in range(7)
    ]
    table.append((f"{layer}.sparse.convs.14", f"{ours}/sparse/out", CONV))
    table += _normed(f"{layer}.merge.mapping", f"{ours}/merge")
  return table


def _normed(layer: str, ours: str) -> list[Rule]:
  table = []
  for k in range(4):
    table += conv_norm((f"{layer}.{3 * k}", f"{layer}.{3 * k + 1}"), f"{ours}/layers/{k}")
  return [*table, (f"{layer}.12", f"{ours}/out", CONV)]
