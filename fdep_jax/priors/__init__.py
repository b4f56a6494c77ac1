"""Frozen foundation models, found by file name: the prior that SAMF fuses into a detector.

`create("dinov3", "vits16", rngs=nnx.Rngs(0))` makes one, `converters.load_prior` reads one from a
file, and `Prior` holds one as a run uses it.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.runtime import mesh

# Marks the prior's operations in a compiled module (plan.py reports their FLOPs separately).
SCOPE = "frozen_prior"
_NO_MODELS = ("bank",)  # files of this folder that are none


class Normalisation(NamedTuple):
  """Mean and deviation of RGB in [0, 1]."""

  mean: tuple[float, float, float]
  std: tuple[float, float, float]


NORMALISATIONS = {
  "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  # DINOv3's weights of satellite images (SAT-493M). No file says that it holds those.
  "satellite": Normalisation((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}


class Foundation(nnx.Module):
  """A foundation model as a prior. A new one is one file in this folder with one subclass.

  Beside the file stands `converters/<name>.py` with the names of its weights, which
  `converters.load_prior` finds by the same name. Nothing else is edited.
  """

  title: ClassVar[str]  # for messages and tables
  sizes: ClassVar[dict[str, dict]]  # the published ones: name → keywords of the class
  small: ClassVar[dict]  # keywords of a network for tests, whose random features are no noise
  normalisation: ClassVar[str] = "imagenet"  # of NORMALISATIONS
  patch: int  # pixels; H and W of an image must be multiples of it
  width: int  # channels of a level
  depth: int  # blocks
  frozen: bool  # whether gradients stop at the levels

  def levels(self, image: jax.Array, blocks: Sequence[int]) -> list[jax.Array]:
    """Computes the feature maps after the given blocks.

    Args:
      image: B×H×W×3, as `prepare` makes it.
      blocks: 0-based, in any order.

    Returns:
      For each block, in the order given, B×H/patch×W/patch×width float32.

    Raises:
      ValueError: the image or a block does not fit.
    """
    raise NotImplementedError

  def macs(self, height: int, width: int, blocks: Sequence[int]) -> float:
    """Counts the multiply-accumulates of `levels` on one image of height×width patches."""
    raise NotImplementedError

  @property
  def dtype(self) -> jnp.dtype:
    """Type of the matrices."""
    raise NotImplementedError

  @classmethod
  def size_of(cls, file: str) -> dict | None:
    """Infers keywords of the class from the lower-case name of a weight file; None: not its own."""
    raise NotImplementedError

  def prepare(self, image: jax.Array) -> jax.Array:
    """Resizes to whole patches and normalises B×H×W×3 RGB in [0, 1] for this model."""
    return prepare(image, self.patch, NORMALISATIONS[self.normalisation])

  def __call__(self, image: jax.Array, levels: Sequence[int] | None = None) -> list[jax.Array]:
    """Computes `levels`, by default those of `quarter_levels`."""
    return self.levels(image, quarter_levels(self.depth) if levels is None else tuple(levels))


def quarter_levels(depth: int, count: int = 4) -> tuple[int, ...]:
  """Returns the last block of each of `count` equal parts, 0-based; ViT-L: (5, 11, 17, 23)."""
  return tuple(-(-depth * (i + 1) // count) - 1 for i in range(count))


def prepare(image: jax.Array, patch: int, normalisation: Normalisation) -> jax.Array:
  """Resizes and normalises an image.

  The resize is bilinear, to the next multiples of `patch`.

  Args:
    image: B×H×W×3 RGB in [0, 1]; an infrared frame has three equal channels.
    patch: pixels.
    normalisation: mean and deviation.

  Returns:
    B×H'×W'×3 float32; H' and W' are H and W rounded up.
  """
  image = jnp.asarray(image, jnp.float32)
  batch, height, width, channels = image.shape
  size = tuple(-(-side // patch) * patch for side in (height, width))
  if size != (height, width):  # only ever enlarges, by less than a patch
    image = jax.image.resize(image, (batch, *size, channels), "bilinear", antialias=False)
  mean, std = (jnp.array(values).reshape(1, 1, 1, -1) for values in normalisation)
  return (image - mean) / std


def names() -> list[str]:
  """Lists the kinds of prior: the files of this folder, without the bank and `_` files."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_") and name not in _NO_MODELS)


def model_class(name: str) -> type[Foundation]:
  """Returns the one `Foundation` that `priors/<name>.py` defines."""
  if name not in names():
    raise ValueError(f"No prior is called {name!r}; there are {', '.join(names())}.")
  module = importlib.import_module(f"{__name__}.{name}")
  classes = [
    value
    for value in vars(module).values()
    if isinstance(value, type)
    and issubclass(value, Foundation)
    and value.__module__ == module.__name__
  ]
  if len(classes) != 1:
    raise ValueError(f"{module.__name__} must define one Foundation, not {len(classes)}.")
  return classes[0]


def create(name: str, size: str, *, rngs: nnx.Rngs, **options) -> Foundation:
  """Creates a prior of a published size with random weights, which serve shapes and tests only."""
  found = model_class(name)
  if size not in found.sizes:
    raise ValueError(f"{found.title} has no size {size!r}; it has {', '.join(found.sizes)}.")
  return found(**found.sizes[size], rngs=rngs, **options)


@dataclasses.dataclass(frozen=True)
class Preparation:
  """Makes a model's input; equal ones compare equal, so that nothing is compiled twice."""

  patch: int  # pixels
  normalisation: Normalisation

  def __call__(self, image: jax.Array) -> jax.Array:
    return prepare(image, self.patch, self.normalisation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prior:
  """A foundation model with its weights, and the blocks whose outputs are fused.

  A pytree whose leaves are the weights, so a compiled function takes it as an argument.

  A trained prior (`unfreeze`) is part of the trained model. Then `placed` drops the weights here,
  and `levels` returns only the prepared image, from which the model computes the levels.
  """

  weights: nnx.State | None
  graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
  blocks: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # 0-based
  width: int = dataclasses.field(metadata={"static": True})  # channels of a level
  depth: int = dataclasses.field(metadata={"static": True})  # blocks of the model
  patch: int = dataclasses.field(metadata={"static": True})  # pixels
  frozen: bool = dataclasses.field(metadata={"static": True})
  # B×H×W×3 in [0, 1] → the model's input
  prepare: Callable[[jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})
  sha256: str = dataclasses.field(metadata={"static": True})  # of the weight file, or "random"

  @property
  def model(self) -> Foundation:
    """The module with its weights."""
    return nnx.merge(self.graphdef, self.weights)

  def placed(self, the_mesh, shard: bool = False) -> "Prior":
    """Puts frozen weights on the devices: a copy on each, or (`shard`) a part on each."""
    if not self.frozen:
      return dataclasses.replace(self, weights=None)
    return dataclasses.replace(self, weights=mesh.put_frozen(self.weights, the_mesh, shard))

  def levels(self, image: jax.Array) -> list[jax.Array]:
    """Computes the levels to be fused, without gradients.

    Args:
      image: B×H×W×3 grey levels in [0, 255], uint8 or float.

    Returns:
      B×h×w×width float32 for each of `blocks`; only the prepared image if the prior is trained.
    """
    image = image.astype(jnp.float32) / 255
    if not self.frozen:
      return [self.prepare(image)]
    with jax.named_scope(SCOPE):
      levels = self.model.levels(self.prepare(image), self.blocks)
      return [jax.lax.stop_gradient(level) for level in levels]


def from_module(
  model: Foundation, blocks: tuple[int, ...], sha256: str, normalisation: str | None = None
) -> Prior:
  """Makes a prior from a loaded model.

  Args:
    model: with its weights.
    blocks: 0-based, whose outputs are fused.
    sha256: of its weight file, or "random".
    normalisation: of NORMALISATIONS; default the model's own.
  """
  graphdef, weights = nnx.split(model)
  found = NORMALISATIONS[normalisation or model.normalisation]
  prepare = Preparation(model.patch, found)
  return Prior(
    weights, graphdef, blocks, model.width, model.depth, model.patch, model.frozen, prepare, sha256
  )
