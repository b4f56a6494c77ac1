"""Detectors, created by file name: `create("msda", rngs=nnx.Rngs(0))`.

Each is an encoder-decoder: `encode` returns the skips and the top feature, `decode` the logits.
"""

import importlib
import pkgutil
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx


class Logits(NamedTuple):
  """Raw scores before the sigmoid, all at the image's size.

  `final` is the prediction, B×H×W×1. `side` contains the other supervised heads, B×H×W×1 each, in
  the published code's order.
  """

  final: jax.Array
  side: tuple[jax.Array, ...] = ()

  @property
  def heads(self) -> tuple[jax.Array, ...]:
    """All heads that the loss sums over."""
    return (*self.side, self.final)


class Backbone(nnx.Module):
  """An encoder-decoder detector. To add one, write one subclass in a new file of this folder.

  FDEP changes only `top` and decodes twice a step. So `encode` computes everything that does not
  depend on `top`, including decoder blocks on the skips, and returns it in `skips` (any pytree).
  """

  stride: ClassVar[int]  # H and W of an image must be multiples of it
  top_channels: ClassVar[int]  # C of `top`
  top_stride: ClassVar[int]  # H and W of `top` are the image's divided by it
  paper_name: ClassVar[str]  # the name in the paper's tables
  in_channels: int = 3

  def encode(self, image: jax.Array) -> tuple[Any, jax.Array]:
    """Computes skips and top feature.

    Args:
      image: B×H×W×in_channels, normalised; H and W multiples of `stride`.

    Returns:
      `skips`, all that `decode` needs besides `top`, and `top`,
      B×H/top_stride×W/top_stride×top_channels.

    Raises:
      ValueError: the image's size or channels do not fit.
    """
    raise NotImplementedError

  def decode(self, skips: Any, top: jax.Array) -> Logits:
    """Computes logits from the skips and a top feature, with or without a fused prior."""
    raise NotImplementedError

  def __call__(self, image: jax.Array) -> Logits:
    return self.decode(*self.encode(image))

  def check_image(self, image: jax.Array) -> None:
    """Raises a ValueError that says what to do if the network cannot take the image."""
    name = type(self).__module__
    if image.ndim != 4 or image.shape[-1] != self.in_channels:
      raise ValueError(
        f"Image has shape {'×'.join(map(str, image.shape))}; {name} needs B×H×W×{self.in_channels} "
        "(channels last). Transpose it or repeat its grey channel."
      )
    height, width = image.shape[1:3]
    if height % self.stride or width % self.stride or not height * width:
      raise ValueError(
        f"Image is {height}×{width}; {name} needs multiples of {self.stride}. Pad it with zeros to "
        f"{-(-height // self.stride) * self.stride}×{-(-width // self.stride) * self.stride} and "
        "crop the logits, or choose data.crop accordingly."
      )


def names() -> list[str]:
  """Lists the networks' names: the files of this folder that do not start with an underscore."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_"))


def network_class(name: str) -> type[Backbone]:
  """Returns the one `Backbone` that `backbones/<name>.py` defines."""
  if name not in names():
    raise ValueError(f"No backbone is called {name!r}; there are {', '.join(names())}.")
  module = importlib.import_module(f"{__name__}.{name}")
  classes = [
    value
    for value in vars(module).values()
    if isinstance(value, type)
    and issubclass(value, Backbone)
    and value.__module__ == module.__name__
  ]
  if len(classes) != 1:
    raise ValueError(f"{module.__name__} must define one Backbone, not {len(classes)}.")
  return classes[0]


def create(name: str, *, rngs: nnx.Rngs, **options) -> Backbone:
  """Creates a network with initial weights; `options` are the keywords of its class."""
  return network_class(name)(rngs=rngs, **options)
