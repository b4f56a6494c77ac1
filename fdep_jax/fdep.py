"""Fuses a frozen prior into a detector's top feature during training: FDEP (paper Fig. 2).

               ┌──────────────────────────── decode ──> light logits
image ─> encode┤ skips
               └ top ─> SAMF ─> SAMF ─> SAMF ─> SAMF ─> decode ─> main logits
                          ▲       ▲       ▲       ▲      (same decoder parameters)
image ─> DINOv2 ─> level  0       1       2       3
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax import backbones, samf
from fdep_jax.backbones import Backbone, Logits

FUSIONS = {"samf": samf.SAMF, "add": samf.Add}


class MainStat(nnx.BatchStat):
  """A running statistic of the decoder when it decodes for the main branch."""


class FDEP(nnx.Module):
  """A detector with a light branch, as published, and a main branch that fuses the prior.

  Args:
    backbone: a name of `backbones.names()`, or a built network; with a top feature, unless
      `num_levels` is 0.
    dino_width: D of the DINOv2 levels (ViT-S/B/L/g: 384, 768, 1024, 1536).
    num_levels: levels fused, one module each, shallow to deep; 0 for the detector alone.
    fusion: "samf", or "add" to sum the aligned levels (Tab. 3).
    bn_stats: running statistics of the decoder, which both branches use. OUR CHOICE: "per_branch"
      keeps one set for each branch and evaluates each with its own; "shared" keeps one set and
      updates it twice a step, main branch first, as two calls in PyTorch do. Batch statistics are
      always a branch's own. The encoder runs once a step and updates its statistics once.
  """

  def __init__(
    self,
    backbone: str | Backbone,
    dino_width: int = 1024,
    num_levels: int = 4,
    fusion: Literal["samf", "add"] = "samf",
    bn_stats: Literal["per_branch", "shared"] = "per_branch",
    *,
    rngs: nnx.Rngs,
  ):
    if fusion not in FUSIONS:
      raise ValueError(f"fusion is {fusion!r}; it must be one of {', '.join(FUSIONS)}.")
    if bn_stats not in ("per_branch", "shared"):
      raise ValueError(f"bn_stats is {bn_stats!r}; it must be per_branch or shared.")
    if isinstance(backbone, str):
      backbone = backbones.create(backbone, rngs=rngs)
    if num_levels:
      backbone.require_top()
    self.backbone = backbone
    self.fusion = nnx.List(
      [FUSIONS[fusion](backbone.top_channels, dino_width, rngs=rngs) for _ in range(num_levels)]
    )
    self.main_stats = nnx.Dict()
    if bn_stats == "per_branch" and num_levels:
      stats = _stats(backbone)
      for path in sorted(_decoder_stats(backbone)):
        self.main_stats[path] = MainStat(jnp.array(stats[path][...]))

  @property
  def network(self) -> type[Backbone]:
    return type(self.backbone)

  @property
  def in_channels(self) -> int:
    return self.backbone.in_channels

  def light(self, image: jax.Array) -> Logits:
    """Runs the deployed branch, which uses only the detector's own parameters."""
    return self.backbone(image)

  def main(self, image: jax.Array, levels: Sequence[jax.Array]) -> Logits:
    """Runs the branch that fuses the prior ("FDEP w/o CO-ISD" when trained alone)."""
    skips, top = self.backbone.encode(image)
    return self._decode_main(image, skips, top, levels)

  def __call__(self, image: jax.Array, levels: Sequence[jax.Array]) -> tuple[Logits, Logits]:
    """Runs both branches for CO-ISD (paper §3.3): encodes once, decodes twice.

    Args:
      image: B×H×W×in_channels, normalised.
      levels: `num_levels` arrays B×h×w×dino_width of the frozen foundation model.

    Returns:
      The main and the light branch's logits.
    """
    skips, top = self.backbone.encode(image)
    main = self._decode_main(image, skips, top, levels)
    light = self.backbone.decode(skips, top)
    return main, light

  def _decode_main(self, image, skips, top: jax.Array, levels: Sequence[jax.Array]) -> Logits:
    if len(levels) != len(self.fusion):
      raise ValueError(f"{len(levels)} DINOv2 levels given; the model fuses {len(self.fusion)}.")
    self.backbone.check_top(image, top)
    for fuse, level in zip(self.fusion, levels, strict=True):
      top = fuse(top, level)
    self._swap_stats()
    logits = self.backbone.decode(skips, top)
    self._swap_stats()
    return logits

  def _swap_stats(self) -> None:
    """Exchanges the decoder's running statistics with the main branch's, if it has any."""
    stats = _stats(self.backbone)
    for path, mine in self.main_stats.items():
      swapped = stats[path][...], mine[...]
      mine.set_value(swapped[0])  # not `mine[...] =`, which is slow on tracers (see BatchNorm)
      stats[path].set_value(swapped[1])


def _stats(backbone: Backbone) -> dict[str, nnx.BatchStat]:
  """Returns the backbone's running statistics, the variables themselves, by path."""
  return {
    "/".join(map(str, path)): value
    for path, value in nnx.iter_graph(backbone)
    if isinstance(value, nnx.BatchStat)
  }


def _decoder_stats(backbone: Backbone) -> set[str]:
  """Finds the paths of the running statistics that `decode` updates, by tracing it once."""
  graphdef, state = nnx.split(backbone)
  touched = set()

  def trace(state, image):
    net = nnx.merge(graphdef, state)
    net.train()
    skips, top = net.encode(image)
    net.check_top(image, top)
    before = {path: stat[...] for path, stat in _stats(net).items()}
    net.decode(skips, top)
    touched.update(path for path, stat in _stats(net).items() if stat[...] is not before[path])

  size = 2 * max(backbone.stride, backbone.top_stride)
  shape = (2, size, size, backbone.in_channels)
  jax.eval_shape(trace, state, jax.ShapeDtypeStruct(shape, jnp.result_type(float)))
  return touched
