"""Models and losses that only the paper's ablations need: partial sharing, DINOv2 as an encoder."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fdep_jax import backbones, samf
from fdep_jax.backbones import Backbone, Logits
from fdep_jax.backbones.msda import MSDANet
from fdep_jax.fdep import FUSIONS
from fdep_jax.layers import basic, ops
from fdep_jax.priors import Foundation


class PartlyShared(nnx.Module):
  """FDEP whose branches share their encoder or their decoder only (Tab. 5).

  Holds two whole detectors that share the parameters of one half. The encoder's parameters are
  those that the top feature depends on; blocks that process the skips belong to the decoder. Each
  branch keeps its own running statistics, as in FDEP by default.

  Args:
    share: "encoder" or "decoder".
    backbone: a name of `backbones.names()`.
    dino_width, num_levels, fusion: as for `FDEP`.
  """

  def __init__(
    self,
    share: Literal["encoder", "decoder"],
    backbone: str,
    dino_width: int,
    num_levels: int,
    fusion: Literal["samf", "add"] = "samf",
    *,
    rngs: nnx.Rngs,
  ):
    self.backbone = backbones.create(backbone, rngs=rngs)
    self.backbone.require_top()
    channels = self.backbone.top_channels
    self.fusion = nnx.List(
      [FUSIONS[fusion](channels, dino_width, rngs=rngs) for _ in range(num_levels)]
    )
    self.main_backbone = backbones.create(backbone, rngs=rngs)
    for path in parameters_of(self.backbone, share):
      ours, theirs = self.main_backbone, self.backbone
      for part in path[:-1]:
        ours, theirs = _child(ours, part), _child(theirs, part)
      setattr(ours, path[-1], getattr(theirs, path[-1]))

  @property
  def network(self) -> type[Backbone]:
    return type(self.backbone)

  @property
  def in_channels(self) -> int:
    return self.backbone.in_channels

  def light(self, image: jax.Array) -> Logits:
    """Runs the deployed branch on `image`, B×H×W×C."""
    return self.backbone(image)

  def main(self, image: jax.Array, levels: Sequence[jax.Array]) -> Logits:
    """Runs the branch that fuses the levels, B×h×w×D each."""
    skips, top = self.main_backbone.encode(image)
    self.main_backbone.check_top(image, top)
    for fuse, level in zip(self.fusion, levels, strict=True):
      top = fuse(top, level)
    return self.main_backbone.decode(skips, top)

  def __call__(self, image: jax.Array, levels: Sequence[jax.Array]) -> tuple[Logits, Logits]:
    """Runs both branches; returns the main branch's logits, then the light branch's."""
    return self.main(image, levels), self.light(image)


def parameters_of(backbone: Backbone, half: Literal["encoder", "decoder"]) -> list[tuple]:
  """Lists the paths of one half's parameters.

  The encoder's are those that the top feature depends on; all others are the decoder's.
  """
  graphdef, params, rest = nnx.split(backbone, nnx.Param, ...)
  paths = [path for path, _ in nnx.to_flat_state(params)]

  def top(leaves, rest, image):
    state = nnx.from_flat_state(dict(zip(paths, leaves, strict=True)))
    return nnx.merge(graphdef, state, rest, copy=True).encode(image)[1]

  size = 2 * max(backbone.stride, backbone.top_stride)
  image = jax.ShapeDtypeStruct((1, size, size, backbone.in_channels), jnp.float32)
  leaves = [variable for _, variable in nnx.to_flat_state(params)]
  jaxpr = jax.make_jaxpr(top)(leaves, rest, image).jaxpr
  needed = set(jaxpr.outvars)
  for equation in reversed(jaxpr.eqns):
    if needed.intersection(equation.outvars):
      needed.update(v for v in equation.invars if isinstance(v, type(jaxpr.invars[0])))
  used = [variable in needed for variable in jaxpr.invars[: len(paths)]]
  return [path for path, is_used in zip(paths, used, strict=True) if is_used == (half == "encoder")]


def _child(module: nnx.Module, part: str | int):
  return module[part] if isinstance(module, nnx.List | nnx.Dict) else getattr(module, part)


def distillation(
  main: Logits, light: Logits, supervise: Callable[..., jax.Array] = Backbone.supervise
) -> jax.Array:
  """Computes the explicit distillation term (Tab. 5) between the light and the main branch.

  OUR CHOICE, as the paper prints no formula: the Kullback-Leibler divergence of the light branch's
  probabilities from the main branch's, averaged over pixels and summed over heads, as the loss
  itself is. No gradient reaches the main branch.

  Args:
    main, light: the branches' logits.
    supervise: of the network, which says how its heads are summed.
  """
  side = tuple(_divergence(*pair) for pair in zip(main.side, light.side, strict=True))
  terms = Logits(_divergence(main.final, light.final), side)
  return supervise(terms, None, lambda term: term)


def _divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """A scalar, at least float32."""
  wide = jnp.promote_types(student.dtype, jnp.float32)
  teacher, student = jax.lax.stop_gradient(teacher).astype(wide), student.astype(wide)
  prob = jax.nn.sigmoid(teacher)
  cross = optax.sigmoid_binary_cross_entropy(student, prob)
  return jnp.mean(cross - optax.sigmoid_binary_cross_entropy(teacher, prob))


class OnDino(nnx.Module):
  """A decoder directly on DINOv2's levels: a main branch without a detector's encoder (Tab. 6).

  OUR CHOICE: the two decoders below; the paper only names them ("DINO + D", "DINO + MSDA(D)").

  Args:
    decoder: "plain" or "msda".
    dino_width: D of a level.
    num_levels: number of levels.
  """

  network = Backbone  # its loss is the sum over heads
  in_channels = 3

  def __init__(
    self, decoder: Literal["plain", "msda"], dino_width: int, num_levels: int, *, rngs: nnx.Rngs
  ):
    kinds = {"plain": PlainDecoder, "msda": MSDADecoder}
    self.decoder = kinds[decoder](dino_width, num_levels, rngs=rngs)

  def main(self, image: jax.Array, levels: Sequence[jax.Array]) -> Logits:
    """Returns logits, B×H×W×1, from levels, B×h×w×D; only the size of `image`, B×H×W×3, is used."""
    return self.decoder(levels, image.shape[1:3])


class PlainDecoder(nnx.Module):
  """The decoder of "DINO + D": projects and sums the levels, then doubles the size four times.

  A 3×3 convolution follows each doubling.
  """

  def __init__(self, dino_width: int, num_levels: int, *, rngs: nnx.Rngs):
    channels = (64, 64, 32, 16, 16)  # at 1/16 … 1 of the size
    self.project = nnx.List(
      [basic.Conv(dino_width, channels[0], 1, rngs=rngs) for _ in range(num_levels)]
    )
    self.enlarge = nnx.List(
      [
        basic.ConvNormRelu(i, o, rngs=rngs)
        for i, o in zip(channels[:-1], channels[1:], strict=True)
      ]
    )
    self.head = basic.Conv(channels[-1], 1, 1, rngs=rngs)

  def __call__(self, levels: Sequence[jax.Array], size: tuple[int, int]) -> Logits:
    x = sum(project(level) for project, level in zip(self.project, levels, strict=True))
    x = ops.resize(x, _part(size, 16), align_corners=False)
    for layer in self.enlarge:
      x = layer(ops.upsample2(x, align_corners=False))
    return Logits(self.head(x))


class MSDADecoder(nnx.Module):
  """The decoder of "DINO + MSDA(D)": MSDA-Net's decoder, whose five inputs are projected levels.

  Shallow levels become the large features; with four levels the first is used twice.
  """

  def __init__(self, dino_width: int, num_levels: int, *, rngs: nnx.Rngs):
    net = MSDANet(rngs=rngs)
    self.context, self.fuse, self.head = net.context, net.fuse, net.head
    channels = (16, 32, 64, 64, 64)  # at 1, 1/2 … 1/16 of the size
    self.level = nnx.static([i * num_levels // len(channels) for i in range(len(channels))])
    self.align = nnx.List([samf.Alignment(c, dino_width, rngs=rngs) for c in channels])

  def __call__(self, levels: Sequence[jax.Array], size: tuple[int, int]) -> Logits:
    *skips, top = (
      align.to_size(levels[level], _part(size, 2**i))
      for i, (align, level) in enumerate(zip(self.align, self.level, strict=True))
    )
    skips = tuple(context(skip) for context, skip in zip(self.context, skips, strict=False))
    return MSDANet.decode(self, skips, top)


def _part(size: tuple[int, int], factor: int) -> tuple[int, int]:
  return size[0] // factor, size[1] // factor


class Unfrozen(nnx.Module):
  """A model that is trained together with its DINOv2 (Tab. 6).

  Args:
    model: has a `main` branch.
    vit: DINOv2 whose parameters are `nnx.Param`.
    levels: 0-based blocks whose outputs are fused.
  """

  def __init__(self, model: nnx.Module, vit: Foundation, levels: tuple[int, ...]):
    self.model, self.vit, self.levels = model, vit, levels

  @property
  def network(self) -> type[Backbone]:
    return self.model.network

  @property
  def in_channels(self) -> int:
    return self.model.in_channels

  def main(self, image: jax.Array, prepared: Sequence[jax.Array]) -> Logits:
    """Runs the model's main branch; `prepared` holds one array, the image as DINOv2 takes it."""
    return self.model.main(image, self.vit(prepared[0], self.levels))
