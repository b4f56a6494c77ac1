"""Names of DINOv2's weights: facebookresearch/dinov2, Hugging Face's `Dinov2Model`.

  python -m converters.dinov2 IN OUT

writes OUT (.safetensors, facebookresearch names, float32), which also contains the SHA-256 of IN.
Training takes either file. `python -m converters` does the same for every kind of prior.
"""

import os
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import foundation
from converters.foundation import PATCHES, Naming, Rule, Table, matrix, norm
from fdep_jax.priors import dinov2

fingerprint = foundation.fingerprint

_HUB = Naming(
  1,
  patch="embeddings.patch_embeddings.projection.weight",
  block="encoder.layer.",
  mark="attention.attention.query.weight",
  position="embeddings.position_embeddings",
  registers="embeddings.register_tokens",
  gated="mlp.weights_in.weight",
  packed=True,
  plain="mlp.fc1.weight",
)
_NAMINGS = (
  Naming(
    0,
    patch="patch_embed.proj.weight",
    block="blocks.",
    mark="attn.qkv.weight",
    position="pos_embed",
    registers="register_tokens",
    gated="mlp.w12.weight",
    packed=True,
    plain="mlp.fc1.weight",
  ),
  _HUB,
  _HUB._replace(  # transformers 5 in memory
    column=2, mark="attention.q_proj.weight", gated="mlp.gate_proj.weight", packed=False
  ),
)


def _rules(model: dinov2.DINOv2) -> list[Rule]:
  def hub(upstream: str, name: str) -> tuple[str, str, str]:
    return upstream, f"embeddings.{name}", f"embeddings.{name}"

  rules = [
    Rule("patch_embed/kernel", tuple(naming.patch for naming in _NAMINGS), PATCHES),
    Rule("patch_embed/bias", hub("patch_embed.proj.bias", "patch_embeddings.projection.bias")),
    Rule("class_token", hub("cls_token", "cls_token")),
    *norm("norm", "norm", "layernorm", "layernorm"),
  ]
  if model.registers:
    rules.append(Rule("register_tokens", hub("register_tokens", "register_tokens")))
  return rules


def _block_rules(model: dinov2.DINOv2) -> list[Rule]:
  if model.blocks.swiglu:
    mlp = [
      *matrix("expand", "mlp.w12", "mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")),
      *matrix("reduce", "mlp.w3", "mlp.weights_out", "mlp.down_proj"),
    ]
  else:
    mlp = [
      *matrix("expand", "mlp.fc1", "mlp.fc1", "mlp.fc1"),
      *matrix("reduce", "mlp.fc2", "mlp.fc2", "mlp.fc2"),
    ]
  return [
    *norm("norm1", "norm1", "norm1", "norm1"),
    *matrix(
      "qkv",
      "attn.qkv",
      tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
      tuple(f"attention.{name}_proj" for name in "qkv"),
    ),
    *matrix("project", "attn.proj", "attention.output.dense", "attention.o_proj"),
    Rule("scale1", ("ls1.gamma", "layer_scale1.lambda1", "layer_scale1.lambda1")),
    *norm("norm2", "norm2", "norm2", "norm2"),
    *mlp,
    Rule("scale2", ("ls2.gamma", "layer_scale2.lambda1", "layer_scale2.lambda1")),
  ]


def _recognises(names: foundation.Names) -> bool:
  has_table = names.has("pos_embed", "position_embeddings")
  return has_table and names.has("ls1.gamma", "layer_scale1.lambda1")


TABLE = Table(
  dinov2.DINOv2,
  _NAMINGS,
  lambda state, naming: foundation.vit_sizes(dinov2.DINOv2.title, state, naming),
  _rules,
  _recognises,
  _block_rules,
  {r"(embeddings\.)?mask_token": "stands for masked patches in pretraining only"},
)


def load_dinov2(
  path_or_state: str | os.PathLike | dict[str, np.ndarray],
  dtype=jnp.float32,
  *,
  heads: int | None = None,
  variable: type[nnx.Variable] = dinov2.Frozen,
) -> dinov2.DINOv2:
  """Loads DINOv2, and only that; arguments and errors are those of `foundation.load_prior`."""
  return foundation.load_prior(path_or_state, dtype, kind="dinov2", heads=heads, variable=variable)


def state_dict(vit: dinov2.DINOv2) -> dict[str, np.ndarray]:
  """Converts back: facebookresearch name -> float32 array, without `mask_token`."""
  return foundation.state_dict(vit)


def convert(source: str | os.PathLike, out: str | os.PathLike) -> str:
  """Writes DINOv2's `source` to `out` as `foundation.convert` does; returns its SHA-256."""
  return foundation.convert(source, out, load_dinov2, state_dict)


def main(argv: list[str]) -> int:
  """Runs the command; returns 0 if OUT is written or exists already, 2 for bad input."""
  return foundation.main(argv, "converters.dinov2", convert)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
