"""DINOv2 (ViT-S/B/L/g 14), the frozen foundation model whose levels SAMF fuses (paper §3.2)."""

import re

import jax

from fdep_jax import priors
from fdep_jax.layers.transformer import Block, Frozen
from fdep_jax.priors import quarter_levels
from fdep_jax.priors._vit import VisionTransformer

__all__ = ["SIZES", "Block", "DINOv2", "Frozen", "prepare", "quarter_levels"]

# The published sizes; keyword arguments of `DINOv2`. Each exists with `registers` 0 and 4.
SIZES = {
  "vits14": {"width": 384, "depth": 12, "heads": 6},
  "vitb14": {"width": 768, "depth": 12, "heads": 12},
  "vitl14": {"width": 1024, "depth": 24, "heads": 16},
  "vitg14": {"width": 1536, "depth": 40, "heads": 24, "swiglu": True},
}
PATCH = 14  # pixels
GRID = 37  # patches along each side in pretraining, 518 / 14

IMAGENET_MEAN, IMAGENET_STD = priors.NORMALISATIONS["imagenet"]


def prepare(image: jax.Array, patch: int = PATCH) -> jax.Array:
  """Resizes and normalises an image for DINOv2, as `priors.prepare` does with ImageNet's numbers.

  Args:
    image: B×H×W×3 RGB in [0, 1]; an infrared frame has three equal channels.
    patch: pixels.

  Returns:
    B×H'×W'×3 float32 with ImageNet's mean and deviation; H' and W' are H and W rounded up.
  """
  return priors.prepare(image, patch, priors.NORMALISATIONS["imagenet"])


class DINOv2(VisionTransformer):
  """DINOv2: learnt positions, LayerScale, LayerNorm ε = 1e-6, and registers in some models.

  Args:
    width, depth, heads: as for `VisionTransformer`.
    registers: 4 in the models that have them, which interpolate their position table differently.
    swiglu: true for ViT-g.
    patch, grid, and further options: as for `VisionTransformer`.
  """

  title = "DINOv2"
  sizes = SIZES
  small = {"width": 96, "depth": 4, "heads": 4}

  def __init__(
    self, width: int, depth: int, heads: int, *, patch: int = PATCH, grid: int = GRID, **options
  ):
    super().__init__(width, depth, heads, patch=patch, grid=grid, **options)

  @classmethod
  def size_of(cls, file: str) -> dict | None:
    size = re.search(r"vit[-_]?([sblg])[-_]?14", file) or re.search(
      r"dinov2[-_](?:with[-_]registers[-_])?(s|b|l|g)(?:mall|ase|arge|iant)", file
    )
    if not size:
      return None
    return {**SIZES[f"vit{size[1]}14"], "registers": 4 if "reg" in file else 0}

  def resize_positions(self, table: jax.Array, height: int, width: int) -> jax.Array:
    """Interpolates the position table: in models with registers with a = −0.5, antialiased."""
    if not self.registers:
      return super().resize_positions(table, height, width)
    return jax.image.resize(table, (height, width, self.width), "cubic", antialias=True)
