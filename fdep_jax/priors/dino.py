"""DINOv1 (ViT-S and ViT-B, patch 16 and 8), the first of the paper's "DINO series"."""

import re

from fdep_jax.priors._vit import VisionTransformer

SIZES = {
  f"vit{letter}{patch}": {"width": width, "depth": 12, "heads": heads, "patch": patch}
  for letter, width, heads in (("s", 384, 6), ("b", 768, 12))
  for patch in (16, 8)
}
IMAGE = 224  # pixels along each side in pretraining


class DINO(VisionTransformer):
  """DINOv1: DINOv2 without LayerScale and registers, on a table for 224×224 pixels.

  Args:
    width, depth, heads: as for `VisionTransformer`.
    patch: 16 or 8 pixels.
    grid: patches along each side of the position table; default 224/patch.
    options: as for `VisionTransformer`.
  """

  title = "DINOv1"
  sizes = SIZES
  small = {"width": 96, "depth": 4, "heads": 4}

  def __init__(
    self, width: int, depth: int, heads: int, *, patch: int = 16, grid: int = 0, **options
  ):
    grid = grid or IMAGE // patch
    super().__init__(width, depth, heads, patch=patch, grid=grid, layer_scale=False, **options)

  @classmethod
  def size_of(cls, file: str) -> dict | None:
    # Upstream calls its files dino_deitsmall16_pretrain.pth and dino_vitbase8_pretrain.pth.
    size = re.search(r"dino[-_](?:vit|deit)(s|b)(?:mall|ase)?[-_]?(16|8)(?!\d)", file)
    return SIZES[f"vit{size[1]}{size[2]}"] if size else None
