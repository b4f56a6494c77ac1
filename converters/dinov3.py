"""Names of DINOv3's weights: facebookresearch/dinov3, Hugging Face's `DINOv3ViTModel`."""

import numpy as np

from converters import foundation
from converters.foundation import PATCHES, PLAIN, Naming, Rule, Table, matrix, norm
from fdep_jax.priors import dinov3

_HUB = Naming(
  1,
  patch="embeddings.patch_embeddings.weight",
  block="layer.",
  mark="attention.q_proj.weight",
  registers="embeddings.register_tokens",
  gated="mlp.gate_proj.weight",
  plain="mlp.up_proj.weight",
)
_NAMINGS = (
  Naming(
    0,
    patch="patch_embed.proj.weight",
    block="blocks.",
    mark="attn.qkv.weight",
    registers="storage_tokens",
    gated="mlp.w1.weight",
    plain="mlp.fc1.weight",
  ),
  _HUB,
  _HUB._replace(block="model.layer."),  # transformers 5 in memory
)
_PERIODS = "rope_embed.periods"
NO_BIAS_WIDTH = 4096  # ViT-7B, which has no biases of queries, keys and values


def _without_keys(bias: np.ndarray) -> np.ndarray:
  """Sets the middle third to 0, which the published code multiplies by a stored mask of 1, 0, 1.

  The mask itself is not read: it is NaN in files that were saved before it was filled.
  """
  query, key, value = np.split(bias, 3)
  return np.concatenate([query, np.zeros_like(key), value])


def _rules(model: dinov3.DINOv3) -> list[Rule]:
  rules = [
    Rule("patch_embed/kernel", ("patch_embed.proj.weight", _HUB.patch), PATCHES),
    Rule("patch_embed/bias", ("patch_embed.proj.bias", "embeddings.patch_embeddings.bias")),
    Rule("class_token", ("cls_token", "embeddings.cls_token")),
    *norm("norm", "norm", "norm"),
    # Published files hold periods rounded to bfloat16; Hugging Face's none, computed exactly.
    Rule("periods", (_PERIODS, ()), default=lambda shape: np.asarray(dinov3.periods(*shape))),
  ]
  if model.registers:
    rules.append(Rule("register_tokens", ("storage_tokens", _HUB.registers)))
  return rules


def _block_rules(model: dinov3.DINOv3) -> list[Rule]:
  # Hugging Face stores no key bias.
  kernel, bias = matrix("qkv", "attn.qkv", tuple(f"attention.{n}_proj" for n in "qkv"))
  upstream, (query, _, value) = bias.names
  bias = Rule(
    bias.ours,
    (upstream, (query, None, value)),
    PLAIN._replace(read=_without_keys),
    np.zeros if model.width >= NO_BIAS_WIDTH else None,
  )
  if model.blocks.swiglu:  # the gate first, as in DINOv2's single matrix
    mlp = [
      *matrix("expand", ("mlp.w1", "mlp.w2"), ("mlp.gate_proj", "mlp.up_proj")),
      *matrix("reduce", "mlp.w3", "mlp.down_proj"),
    ]
  else:
    mlp = [
      *matrix("expand", "mlp.fc1", "mlp.up_proj"),
      *matrix("reduce", "mlp.fc2", "mlp.down_proj"),
    ]
  return [
    *norm("norm1", "norm1", "norm1"),
    kernel,
    bias,
    *matrix("project", "attn.proj", "attention.o_proj"),
    Rule("scale1", ("ls1.gamma", "layer_scale1.lambda1")),
    *norm("norm2", "norm2", "norm2"),
    *mlp,
    Rule("scale2", ("ls2.gamma", "layer_scale2.lambda1")),
  ]


def _sizes(state, naming: Naming) -> dict:
  sizes = foundation.vit_sizes(dinov3.DINOv3.title, state, naming)
  periods = np.shape(state.get(_PERIODS, ()))
  head = 128 if sizes["width"] >= NO_BIAS_WIDTH else foundation.HEAD_WIDTH
  if len(periods) == 1 and periods[0]:
    head = 4 * periods[0]
  return {**sizes, "heads": 0 if sizes["width"] % head else sizes["width"] // head}


def _recognises(names: foundation.Names) -> bool:
  own = names.has("storage_tokens", _PERIODS, _HUB.patch, "qkv.bias_mask")
  return own and not names.has("pos_embed", "position_embeddings")


TABLE = Table(
  dinov3.DINOv3,
  _NAMINGS,
  _sizes,
  _rules,
  _recognises,
  _block_rules,
  {
    r"(embeddings\.)?mask_token": "stands for masked patches in pretraining only",
    r"blocks\.\d+\.attn\.qkv\.bias_mask": "1, 0, 1: the key bias never counts",
    r"local_cls_norm\.(weight|bias)": "normalises crops in training only",
  },
)
