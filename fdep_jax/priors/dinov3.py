"""DINOv3 (ViT-S to ViT-7B, patch 16): rotary positions, storage tokens, LayerNorm ε = 1e-5."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdep_jax.layers import transformer
from fdep_jax.priors._vit import Frozen, VisionTransformer

SIZES = {
  "vits16": {"width": 384, "depth": 12, "heads": 6},
  "vits16plus": {"width": 384, "depth": 12, "heads": 6, "swiglu": True, "hidden": 1536},
  "vitb16": {"width": 768, "depth": 12, "heads": 12},
  "vitl16": {"width": 1024, "depth": 24, "heads": 16},
  "vitl16plus": {"width": 1024, "depth": 24, "heads": 16, "swiglu": True, "hidden": 4096},
  "vith16plus": {"width": 1280, "depth": 32, "heads": 20, "swiglu": True, "hidden": 5120},
  "vit7b16": {"width": 4096, "depth": 40, "heads": 32, "swiglu": True, "hidden": 8192},
}
PATCH = 16  # pixels
REGISTERS = 4
BASE = 100.0  # of the periods


class DINOv3(VisionTransformer):
  """DINOv3: positions turn the queries and keys of the patch tokens, in every block alike.

  Args:
    width, depth, heads: as for `VisionTransformer`.
    registers: storage tokens.
    patch: pixels.
    variable: type of the parameters; the periods stay frozen.
    options: as for `VisionTransformer`.
  """

  title = "DINOv3"
  sizes = SIZES
  small = {"width": 96, "depth": 4, "heads": 4}

  def __init__(
    self,
    width: int,
    depth: int,
    heads: int,
    *,
    registers: int = REGISTERS,
    patch: int = PATCH,
    variable: type[nnx.Variable] = Frozen,
    **options,
  ):
    if (width // heads) % 4:
      raise ValueError(f"Heads are {width // heads} wide; rotary positions need a multiple of 4.")
    super().__init__(
      width, depth, heads, registers=registers, patch=patch, key_bias=False, epsilon=1e-5,
      variable=variable, **options,
    )  # fmt: skip
    self.periods = Frozen(periods(width // heads // 4))

  @classmethod
  def size_of(cls, file: str) -> dict | None:
    size = re.search(r"dinov3[-_]vit[-_]?(s|b|l|h|7b)[-_]?16[-_]?(plus)?", file)
    return SIZES.get(f"vit{size[1]}16{size[2] or ''}") if size else None

  def rope(self, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Computes the sines and cosines of height×width patches, each (h·w)×head width float32."""
    return transformer.rope_table(height, width, self.periods[...])


def periods(count: int) -> jax.Array:
  """Computes the published periods, 100^(k/count) for k = 0 … count − 1, float32."""
  return jnp.asarray(BASE ** (np.arange(count) / count), jnp.float32)
