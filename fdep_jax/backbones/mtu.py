"""MTU-Net: multi-level TransUNet (9.27 M parameters, top feature 256 @ 1/16).

Source: TianhaoWu16/Multi-level-TransUNet-for-Space-based-Infrared-Tiny-ship-Detection, `res_UNet`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdep_jax.backbones import Backbone, Logits
from fdep_jax.layers import attention, basic, ops

_CHANNELS = (16, 32, 64, 128, 256)  # of level i, at 1/2^i of the image
_WIDTH = 64  # of a token
_HIDDEN = 4096
_TOKENS = 4096  # rows of a position table but the first: 1024×1024 pixels


class MTUNet(Backbone):
  """A U-Net; each of its four upper levels reaches the top through a transformer of its own.

  The published code runs at 1024×1024 pixels only. Ours takes any size whose tokens have a row in
  the position tables, (H/16)·(W/16) ≤ 4096. Rows are counted along the raster, so that a position
  has another row in an image of another width, and rows beyond the training images' number of
  tokens are never trained: this network is best used at the size that it was trained at.
  """

  stride = 16
  top_stride = 16
  top_channels = 256
  max_pixels = _TOKENS * 16**2
  whole_frame = "a token of its transformers holds pixels from all over the frame"
  paper_name = "MTU-Net"

  def __init__(self, *, rngs: nnx.Rngs):
    pairs = list(zip((3, *_CHANNELS), _CHANNELS, strict=False))
    self.levels = nnx.List(
      [
        nnx.List(
          [attention.LeakyBlock(a, b, rngs=rngs)]
          + [attention.LeakyBlock(b, b, rngs=rngs) for _ in range(min(i, 1))]
        )
        for i, (a, b) in enumerate(pairs)
      ]
    )
    self.transformers = nnx.List(
      [Transformer(c, 16 >> i, rngs=rngs) for i, c in enumerate(_CHANNELS[:4])]
    )
    self.merge = attention.LeakyBlock(4 * _WIDTH + 256, 256, rngs=rngs)
    self.up = nnx.List(
      [attention.LeakyBlock(a + b, a, rngs=rngs) for a, b in pairs[1:]]
    )  # up[i]: to level i
    self.head = basic.Conv(16, 1, 1, rngs=rngs)

  @classmethod
  def caution(cls, size: tuple[int, int], crop: int) -> str:
    rows, columns = size
    tokens, trained = rows * columns // cls.stride**2, (crop // cls.stride) ** 2
    if columns == crop and tokens <= trained:
      return ""
    fresh = tokens - trained
    untrained = f", and {fresh} of {tokens} were never trained" if fresh > 0 else ""
    return (
      f"{cls.paper_name} counts positions along the raster of the image: trained at {crop}×{crop}, "
      f"at {rows}×{columns} they mean other places{untrained}. Cut or resize images to "
      f"{crop}×{crop} for its best."
    )

  def encode(self, image: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    self.check_image(image)
    features, x = [], image
    for i, blocks in enumerate(self.levels):
      if i > 0:
        x = ops.max_pool2(x)
      for block in blocks:
        x = block(x)
      features.append(x)
    tokens = [self.transformers[i](features[i]) for i in reversed(range(4))]
    return tuple(features[:4]), self.merge(jnp.concatenate([*tokens, x], -1))

  def decode(self, skips: tuple[jax.Array, ...], top: jax.Array) -> Logits:
    x = top
    for i in reversed(range(4)):
      doubled = ops.upsample2(x, align_corners=True)
      x = self.up[i](jnp.concatenate([skips[i], doubled], -1))
    return Logits(self.head(x))


class Transformer(nnx.Module):
  """One transformer block on tokens that are spread over the whole map: B×H×W×C → B×H/p×W/p×64.

  A token holds p×p pixels that lie H/p and W/p apart. Its block normalises after its sums, has one
  head, and multiplies its logits by 32; a class token takes part in the attention and is then
  dropped, so only its key and value exist here. Embedding, attention and sums are computed in
  float32 under bfloat16: the logits reach hundreds.
  """

  _SCALE = 32.0  # (64)**1 / 2 in the published code, where √64 was meant, and divides nothing

  def __init__(self, channels: int, patch: int, *, rngs: nnx.Rngs):
    self.patch = patch
    self.embed = attention.Linear(patch**2 * channels, _WIDTH, rngs=rngs)
    self.class_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, _WIDTH)))
    self.position = nnx.Param(jax.random.uniform(rngs.params(), (1 + _TOKENS, _WIDTH)))
    # Output 3d + i is element d of the query, key or value.
    self.query_key_value = attention.Linear(_WIDTH, 3 * _WIDTH, bias=False, rngs=rngs)
    self.out = attention.Linear(_WIDTH, _WIDTH, bias=False, rngs=rngs)
    self.norm1 = attention.LayerNorm(_WIDTH)
    self.expand = attention.Linear(_WIDTH, _HIDDEN, rngs=rngs)
    self.reduce = attention.Linear(_HIDDEN, _WIDTH, rngs=rngs)
    self.norm2 = attention.LayerNorm(_WIDTH)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    kernel = self.embed.kernel[...].reshape(self.patch, self.patch, x.shape[-1], _WIDTH)
    tokens = ops.embed_phases(x, kernel) + self.embed.bias[...].reshape(1, 1, 1, -1)
    position = self.position[...].astype(wide)
    first = self.class_token[...].astype(wide).reshape(1, 1, 1, -1) + position[:1].reshape(
      1, 1, 1, -1
    )
    tokens = self.dropout(ops.add_positions(tokens.astype(wide), position[1:]))
    if not self.dropout.deterministic:
      first = self.dropout(jnp.broadcast_to(first, (x.shape[0], *first.shape[1:])))
    query, key, value = (self.query_key_value.kernel[...].astype(wide)[:, i::3] for i in range(3))
    attended = ops.pixel_attention(
      tokens @ (self._SCALE * query), tokens @ key, tokens @ value, first @ key, first @ value
    )
    tokens = self.norm1(tokens + self.dropout(self.out(attended)))
    hidden = self.dropout(gelu(self.expand(tokens.astype(dtype))))
    tokens = self.norm2(tokens + self.dropout(self.reduce(hidden)).astype(wide))
    return tokens.astype(dtype)


def gelu(x: jax.Array) -> jax.Array:
  """x·Φ(x), with the error function as PyTorch has it."""
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))
