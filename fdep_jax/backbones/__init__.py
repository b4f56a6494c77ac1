"""Detectors, created by file name: `create("msda", rngs=nnx.Rngs(0))`.

Each is an encoder-decoder: `encode` returns the skips and the top feature, `decode` the logits.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx


class Logits(NamedTuple):
  """Raw scores before the sigmoid, all at the image's size.

  `final` is the prediction, B×H×W×1. `side` contains the other supervised heads, B×H×W×1 each, in
  the published code's order. RPCANet's side head is no score but the image that it rebuilds.
  """

  final: jax.Array
  side: tuple[jax.Array, ...] = ()

  @property
  def heads(self) -> tuple[jax.Array, ...]:
    """Every supervised head, `final` last."""
    return (*self.side, self.final)


class Backbone(nnx.Module):
  """An encoder-decoder detector. To add one, write one subclass in a new file of this folder.

  FDEP changes only `top` and decodes twice a step. So `encode` computes everything that does not
  depend on `top`, including decoder blocks on the skips, and returns it in `skips` (any pytree).

  A network without a top feature sets `top_channels` and `top_stride` to 0 and gives the reason in
  `no_top`. Its `encode` returns None for `top`, and FDEP cannot be attached to it.
  """

  stride: ClassVar[int]  # H and W of an image must be multiples of it
  top_channels: ClassVar[int]  # C of `top`; 0: there is none
  top_stride: ClassVar[int]  # H and W of `top` are the image's divided by it
  paper_name: ClassVar[str]  # the name in the paper's tables
  in_channels: int = 3  # 1: it gets the mean of an image's three channels
  max_pixels: ClassVar[int | None] = None  # largest H·W of an image, where there is one
  no_top: ClassVar[str] = ""  # why there is no top feature; a clause, as "its stages …"
  # Why a frame cannot be computed window by window (predict/tiling.py); a clause. "": it can.
  whole_frame: ClassVar[str] = ""
  # Whether images are (grey level/255 − mean)/deviation; otherwise they are grey level/255.
  standardised: ClassVar[bool] = True

  def encode(self, image: jax.Array) -> tuple[Any, jax.Array]:
    """Computes skips and top feature.

    Args:
      image: B×H×W×in_channels, normalised; H and W multiples of `stride`.

    Returns:
      `skips`, all that `decode` needs besides `top`, and `top`,
      B×H/top_stride×W/top_stride×top_channels, or None for a network without one.

    Raises:
      ValueError: the image's size or channels do not fit.
    """
    raise NotImplementedError

  def decode(self, skips: Any, top: jax.Array) -> Logits:
    """Computes logits from the skips and a top feature, with or without a fused prior."""
    raise NotImplementedError

  def __call__(self, image: jax.Array) -> Logits:
    return self.decode(*self.encode(image))

  @staticmethod
  def supervise(
    logits: Logits, image: jax.Array, criterion: Callable[[jax.Array], jax.Array]
  ) -> jax.Array:
    """The published supervision of the network: here the sum over all heads.

    A network that is trained otherwise overrides it.

    Args:
      logits: of a branch.
      image: what the network was given.
      criterion: the loss of one head, B×H×W×1 -> scalar.
    """
    return sum(criterion(head) for head in logits.heads)

  @classmethod
  def require_top(cls) -> None:
    """Refuses a network that has no top feature, to which FDEP cannot be attached."""
    if not cls.top_channels:
      raise ValueError(
        f"FDEP cannot be attached to {cls.paper_name}, which has no top feature: {cls.no_top}. "
        "Train it alone (mode=original), or choose another network (model.backbone)."
      )

  @classmethod
  def caution(cls, size: tuple[int, int], crop: int) -> str:
    """Says why results at this size are doubtful after training on crops; "" if they are not.

    Args:
      size: rows and columns of an image, padded.
      crop: side of the square that the network was trained on, pixels.
    """
    del size, crop
    return ""

  def check_image(self, image: jax.Array) -> None:
    """Raises a ValueError that says what to do if the network cannot take the image."""
    name = type(self).__module__
    if image.ndim != 4 or image.shape[-1] != self.in_channels:
      advice = "repeat its grey channel" if self.in_channels > 1 else "give its grey channel alone"
      raise ValueError(
        f"Image has shape {'×'.join(map(str, image.shape))}; {name} needs B×H×W×{self.in_channels} "
        f"(channels last). Transpose it or {advice}."
      )
    height, width = image.shape[1:3]
    if height % self.stride or width % self.stride or not height * width:
      raise ValueError(
        f"Image is {height}×{width}; {name} needs multiples of {self.stride}. Pad it with zeros to "
        f"{-(-height // self.stride) * self.stride}×{-(-width // self.stride) * self.stride} and "
        "crop the logits, or choose data.crop accordingly."
      )
    if self.max_pixels is not None and height * width > self.max_pixels:
      raise ValueError(
        f"Image is {height}×{width}; {name} takes at most {self.max_pixels} pixels. Cut it into "
        "parts, or shrink it."
      )

  def check_top(self, image: jax.Array, top: jax.Array | None) -> None:
    """Raises a ValueError if the top feature of an image is not what the class says."""
    height, width = (size // self.top_stride for size in image.shape[1:3])
    wanted = (image.shape[0], height, width, self.top_channels)
    if top is None or top.shape != wanted:
      shapes = [
        "×".join(map(str, shape)) for shape in (image.shape, getattr(top, "shape", ("None",)))
      ]
      raise ValueError(
        f"{type(self).__module__} says top_channels = {self.top_channels} and top_stride = "
        f"{self.top_stride}, so for an image of {shapes[0]} its top feature must be "
        f"{'×'.join(map(str, wanted))}; encode returns {shapes[1]}. Correct one of them."
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
