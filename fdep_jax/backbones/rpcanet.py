"""RPCANet: robust principal component analysis, unfolded (0.68 M parameters, no top feature).

Source: fengyiwu98/RPCANet, `RPCANet9` with six stages.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import basic

_STAGES = 6
_CHANNELS = 32
_REBUILT_WEIGHT = 0.01  # of the squared error of the rebuilt image


class RPCANet(Backbone):
  """Splits an image D into background B and targets T, six times over; T holds the logits.

  Every stage hands the next one two maps of one channel at full resolution. They stay float32 when
  the convolutions compute in bfloat16: a stage adds and subtracts maps that differ by little.

  The image is B×H×W×1 grey levels in [0, 1], neither centred nor scaled, as the network is trained
  to rebuild it. Of B×H×W×3 the mean over channels is taken.
  """

  stride = 1
  top_stride = 0
  top_channels = 0
  paper_name = "RPCANet"
  in_channels = 1
  standardised = False
  no_top = (
    "it has neither encoder nor decoder, and its stages hand on single-channel maps at full "
    "resolution"
  )

  def __init__(self, *, rngs: nnx.Rngs):
    self.stages = nnx.List([Stage(rngs=rngs) for _ in range(_STAGES)])

  def encode(self, image: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    """(rebuilt image, targets), both B×H×W×1, and no top feature."""
    if image.ndim == 4 and image.shape[-1] == 3:
      image = image.mean(-1, keepdims=True)
    self.check_image(image)
    image = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    targets = jnp.zeros_like(image)
    for stage in self.stages:
      image, targets = stage(image, targets)
    return (image, targets), None

  def decode(self, skips: tuple[jax.Array, jax.Array], top: None) -> Logits:
    rebuilt, targets = skips
    return Logits(targets, (rebuilt,))

  @staticmethod
  def supervise(
    logits: Logits, image: jax.Array, criterion: Callable[[jax.Array], jax.Array]
  ) -> jax.Array:
    """The targets' loss and 0.01 times the mean squared error of the rebuilt image.

    Without the second term the last stage's `merge` would get no gradient. OUR CHOICE: the first is
    the loss that all networks are trained with here; its authors take a soft IoU.
    """
    (rebuilt,) = logits.side
    error = rebuilt - image.astype(rebuilt.dtype).mean(-1, keepdims=True)
    return criterion(logits.final) + _REBUILT_WEIGHT * jnp.mean(jnp.square(error))


class Stage(nnx.Module):
  """One iteration: background, then targets, then the image that both make."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.background = NormedChain(rngs=rngs)
    self.sparse = PlainChain(rngs=rngs)
    self.step = basic.NormParam(jnp.full(1, 0.01))  # ε; float32, as the maps it scales
    self.merge = NormedChain(rngs=rngs)

  def __call__(self, image: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    rest = image - targets
    background = rest + self.background(rest)
    candidates = targets + image - background
    targets = candidates - self.step[...].reshape(1, 1, 1, 1) * self.sparse(candidates)
    return self.merge(background + targets), targets


class NormedChain(nnx.Module):
  """Four conv3-BN-ReLU layers 1→32 and a conv3 →1; float32 in and out."""

  def __init__(self, *, rngs: nnx.Rngs):
    channels = (1, *[_CHANNELS] * 4)
    self.layers = nnx.List(
      [
        basic.ConvNormRelu(i, o, init="xavier", rngs=rngs)
        for i, o in zip(channels[:-1], channels[1:], strict=True)
      ]
    )
    self.out = basic.Conv(_CHANNELS, 1, init="xavier", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(self.out.kernel[...].dtype)
    for layer in self.layers:
      y = layer(y)
    return self.out(y).astype(x.dtype)


class PlainChain(nnx.Module):
  """Seven conv3-ReLU layers 1→32 and a conv3 →1, without norms; float32 in and out."""

  def __init__(self, *, rngs: nnx.Rngs):
    channels = (1, *[_CHANNELS] * 7)
    self.layers = nnx.List(
      [
        basic.Conv(i, o, init="xavier", rngs=rngs)
        for i, o in zip(channels[:-1], channels[1:], strict=True)
      ]
    )
    self.out = basic.Conv(_CHANNELS, 1, init="xavier", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(self.out.kernel[...].dtype)
    for layer in self.layers:
      y = nnx.relu(layer(y))
    return self.out(y).astype(x.dtype)
