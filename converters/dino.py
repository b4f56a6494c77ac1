"""Names of DINOv1's weights: facebookresearch/dino, Hugging Face's `ViTModel`."""

from converters import foundation
from converters.foundation import PATCHES, Naming, Rule, Table, matrix, norm
from fdep_jax.priors import dino

_NAMINGS = (
  Naming(
    0,
    patch="patch_embed.proj.weight",
    block="blocks.",
    mark="attn.qkv.weight",
    position="pos_embed",
    plain="mlp.fc1.weight",
  ),
  Naming(
    1,
    patch="embeddings.patch_embeddings.projection.weight",
    block="encoder.layer.",
    mark="attention.attention.query.weight",
    position="embeddings.position_embeddings",
    plain="intermediate.dense.weight",
  ),
  Naming(
    2,
    patch="embeddings.patch_embeddings.projection.weight",
    block="layers.",
    mark="attention.q_proj.weight",
    position="embeddings.position_embeddings",
    plain="mlp.fc1.weight",
  ),
)
_PATCHES = "embeddings.patch_embeddings.projection"
_RULES = [
  Rule("patch_embed/kernel", tuple(naming.patch for naming in _NAMINGS), PATCHES),
  Rule("patch_embed/bias", ("patch_embed.proj.bias", f"{_PATCHES}.bias", f"{_PATCHES}.bias")),
  Rule("class_token", ("cls_token", "embeddings.cls_token", "embeddings.cls_token")),
  *norm("norm", "norm", "layernorm", "layernorm"),
]
_BLOCK_RULES = [
  *norm("norm1", "norm1", "layernorm_before", "layernorm_before"),
  *matrix(
    "qkv",
    "attn.qkv",
    tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    tuple(f"attention.{name}_proj" for name in "qkv"),
  ),
  *matrix("project", "attn.proj", "attention.output.dense", "attention.o_proj"),
  *norm("norm2", "norm2", "layernorm_after", "layernorm_after"),
  *matrix("expand", "mlp.fc1", "intermediate.dense", "mlp.fc1"),
  *matrix("reduce", "mlp.fc2", "output.dense", "mlp.fc2"),
]


def _recognises(names: foundation.Names) -> bool:
  has_table = names.has("pos_embed", "position_embeddings")
  return has_table and names.has("norm1.weight", "layernorm_before.weight") and not _scaled(names)


def _scaled(names: foundation.Names) -> bool:
  return names.has("ls1.gamma", "layer_scale1.lambda1", "mask_token", "register_tokens")


TABLE = Table(
  dino.DINO,
  _NAMINGS,
  lambda state, naming: foundation.vit_sizes(dino.DINO.title, state, naming),
  lambda model: _RULES,
  _recognises,
  lambda model: _BLOCK_RULES,
  {r"(head|projection_head)\.(mlp|last_layer)\..*": "the head of pretraining"},
)
