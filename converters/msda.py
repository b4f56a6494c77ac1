"""MSDA-Net: YuChuang1205/PAL `MSDANet_No_Sigmoid` state_dict ↔ fdep_jax.backbones.msda."""

import numpy as np

from converters.rules import (
  CONV,
  LINEAR_AS_CONV,
  Dead,
  Rule,
  conv_norm,
  dead_batch_norm,
  dead_conv,
)

_CHANNELS = (16, 32, 64, 64, 64)


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
      table += _direction(f"stage.resnet{i + 1}_{j + 2}", f"direction/{i}/{j}")
    table += _branches(f"mlcl{i + 1}", f"context/{i}", (1, 2, 2))
  # Each summary's convolution comes after its level's 4 − i max-pools.
  table += [(f"stage.layer{i + 1}_4.{4 - i}", f"summary/{i}", CONV) for i in range(4)]
  table += [("stage.layer5_4.0", "aggregate1", CONV), ("stage.layer5_4.2", "aggregate2", CONV)]
  for i in range(4):
    block = f"sbam{i + 1}"
    table += conv_norm((f"{block}.hl_layer.0", f"{block}.hl_layer.1"), f"fuse/{i}/out")
    table += conv_norm((f"{block}.concat_layer.0", f"{block}.concat_layer.1"), f"fuse/{i}/concat1")
    table += conv_norm((f"{block}.concat_layer.3", f"{block}.concat_layer.4"), f"fuse/{i}/concat2")
  table += [("layer.0", "head/conv1", CONV), ("layer.2", "head/conv2", CONV)]
  return table


def dead(net) -> list[Dead]:
  """Lists the layers that the published network builds but never runs (14,048 parameters)."""
  reason = "built in __init__, never called in forward"
  entries = []
  for i, channels in enumerate(_CHANNELS):
    layer, shape = f"mlcl{i + 1}.conv_res", (channels, channels, 1, 1)
    entries.append(dead_conv(f"{layer}.conv", shape, reason, bias=False))
    entries.append(dead_batch_norm(f"{layer}.bn", channels, reason))
  return entries


def fixed() -> dict[str, np.ndarray]:
  """Returns the Haar filters, which the published network stores as buffers."""
  root_half = np.float32(0.5**0.5)  # products of two give the published ±0.49999997
  low, high = np.array([root_half, root_half]), np.array([root_half, -root_half])
  bands = {"ll": (low, low), "lh": (high, low), "hl": (low, high), "hh": (high, high)}
  filters = {band: np.outer(*pair).reshape(1, 1, 2, 2) for band, pair in bands.items()}
  buffers = {f"stage.hfrequency.Hfrequencyfeature.DWT_2D.w_{b}": f for b, f in filters.items()}
  for i in range(1, 6):
    for j in (2, 3):
      attention = f"stage.resnet{i}_{j}.FrequencyAttention"
      for band, values in filters.items():
        buffers[f"{attention}.{band.upper()}_DWT_2D_attation.w_{band}"] = values
  return buffers


def _direction(layer: str, ours: str) -> list[Rule]:
  table = _branches(layer, ours, (1, 2, 2, 2))
  for band in ("LL", "LH", "HL", "HH"):
    gate = f"{layer}.FrequencyAttention.{band}_reduce.conv"
    table.append((gate, f"{ours}/frequency/gate/{band.lower()}", CONV))
  residual = f"{layer}.FrequencyAttention.conv_res"
  table += conv_norm((f"{residual}.0", f"{residual}.1"), f"{ours}/frequency/out")
  table += [
    (f"{layer}.SEAttention.fc.0", f"{ours}/squeeze/reduce", LINEAR_AS_CONV),
    (f"{layer}.SEAttention.fc.2", f"{ours}/squeeze/expand", LINEAR_AS_CONV),
  ]
  return table + conv_norm(f"{layer}.conv_res", f"{ours}/out")


def _branches(layer: str, ours: str, lengths: tuple[int, ...]) -> list[Rule]:
  table = conv_norm(f"{layer}.conv_cat", f"{ours}/merge")
  for b, length in enumerate(lengths):
    for k in range(length):
      table += conv_norm(f"{layer}.branch{b}.{k}", f"{ours}/branches/{b}/{k}")
  return table
