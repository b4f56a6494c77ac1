"""Facts of MTU-Net and SCTransNet: attention in float32, sizes, positions, windows, checkpoints."""

import logging

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import Golden
from jax.extend.core import ClosedJaxpr

import converters
from configs import base
from fdep_jax import backbones, step
from fdep_jax import detector as detector_lib
from fdep_jax.backbones import mtu, sctransnet
from fdep_jax.fdep import FDEP
from fdep_jax.layers import attention
from fdep_jax.predict import tiling


def shapes_only(name: str, **options) -> backbones.Backbone:
  return nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0), **options))


def equations(jaxpr):
  """All operations of a program, those of its functions included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      if isinstance(value, ClosedJaxpr):
        yield from equations(value.jaxpr)


# bfloat16.


@pytest.mark.parametrize(
  "name, maps",
  [("mtu", 4), ("sctransnet", 4), pytest.param("sdsnet", 8, marks=pytest.mark.slow)],
)
def test_attention_is_float32_under_bfloat16(name, maps):
  # What a softmax exponentiates, and the products that its logits come from.
  net = shapes_only(name)
  graphdef, params, rest = nnx.split(net, nnx.Param, ...)
  shapes = jax.eval_shape(lambda params: step.cast(params, jnp.bfloat16), params)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.bfloat16)
  program = jax.make_jaxpr(lambda p, r, x: nnx.merge(graphdef, p, r)(x))(shapes, rest, image)
  found = list(equations(program.jaxpr))
  exponents = [eqn.invars[0].aval for eqn in found if eqn.primitive.name == "exp"]
  assert len(exponents) == maps and {aval.dtype.name for aval in exponents} == {"float32"}
  exact = [
    eqn
    for eqn in found
    if eqn.primitive.name == "dot_general"
    and eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    and eqn.outvars[0].aval.shape[0] == 1
    and {atom.aval.dtype.name for atom in eqn.invars} == {"float32"}
  ]
  assert len(exact) >= maps
  # Elsewhere products are bfloat16.
  kinds = {
    eqn.outvars[0].aval.dtype.name
    for eqn in found
    if eqn.primitive.name in ("dot_general", "conv_general_dilated")
  }
  assert "bfloat16" in kinds


def test_a_layer_norm_is_float32_under_bfloat16():
  norm = attention.LayerNorm(64)
  x = (100 + jax.random.normal(jax.random.key(0), (1, 2, 2, 64))).astype(jnp.bfloat16)
  y = norm(x)
  wide = np.asarray(x, np.float64)
  centred = wide - wide.mean(-1, keepdims=True)
  expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02)


# Sizes.


def evaluate_shape(net, height, width):
  graphdef, state = nnx.split(net)
  image = jax.ShapeDtypeStruct((1, height, width, net.in_channels), jnp.float32)
  return jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, image).final.shape


def test_mtu_takes_as_many_pixels_as_it_has_positions_for():
  net = shapes_only("mtu")
  assert evaluate_shape(net, 1024, 1024) == (1, 1024, 1024, 1)
  assert evaluate_shape(net, 256, 4096) == (1, 256, 4096, 1)
  with pytest.raises(ValueError, match="1040×1024.*mtu takes at most 1048576 pixels.*Cut it"):
    evaluate_shape(net, 1040, 1024)


@pytest.mark.parametrize(
  "size, words",
  [
    ((448, 448), None),
    ((320, 448), None),  # positions of fewer rows, each at its own place
    ((448, 320), "at 448×320 they mean other places. Cut"),
    ((512, 512), "mean other places, and 240 of 1024 were never trained"),
  ],
)
def test_mtu_tells_where_its_positions_mean_other_places(size, words):
  caution = mtu.MTUNet.caution(size, 448)
  assert (words in caution) if words else caution == ""
  assert sctransnet.SCTransNet.caution(size, 448) == ""


class Cautious(backbones.Backbone):
  """A network that doubts all sizes but one."""

  stride = top_stride = 1
  top_channels = 3
  paper_name = "Cautious"

  @classmethod
  def caution(cls, size, crop):
    return "" if size == (crop, crop) else f"not trained at {size[0]}×{size[1]}"

  def encode(self, image):
    return (), image

  def decode(self, skips, top):
    return backbones.Logits(top.mean(-1, keepdims=True))


def test_predictions_at_a_doubtful_size_are_warned_of_once(caplog):
  model = FDEP(Cautious(), num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  config = base.get_config()
  config.data.crop = 64
  detector = detector_lib.Detector(model, "light", None, 0.0, 1.0, None, "", None, 0)
  predictor = tiling.Predictor(detector._replace(config=config))
  with caplog.at_level(logging.WARNING):
    for shape in ((64, 64), (60, 64), (70, 64), (75, 64)):
      predictor(np.zeros(shape, np.uint8))
  assert [record.message for record in caplog.records] == ["not trained at 96×64"]


@pytest.mark.slow
def test_a_tiled_sctransnet_is_the_untiled_one():
  manifest = Golden("networks", "sctransnet").manifest
  net = converters.load_backbone("sctransnet", formula.weights(manifest))
  model = FDEP(net, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  predictor = tiling.Predictor(
    detector_lib.Detector(model, "light", None, 0.4, 0.2, None, "", None, 0)
  )
  levels = np.random.default_rng(0).uniform(0, 255, (64, 1280)).astype(np.float32)
  levels[:, 400:800] /= 4
  [(_, untiled)] = predictor._batch([(None, levels)])
  assert untiled.std() > 0.05
  # Its maps at 1/16 reach over 300 pixels, but weakly: measured 7e-6 at the halo of 128 pixels and
  # 3e-7 at 256, on 160×1280 pixels.
  np.testing.assert_allclose(predictor.tiled(levels), untiled, atol=3e-5)


# Checkpoints.


def test_a_one_channel_sctransnet_is_read_off_its_checkpoint():
  net = shapes_only("sctransnet", in_channels=1)
  assert evaluate_shape(net, 16, 32) == (1, 16, 32, 1)
  nnx.update(net, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nnx.state(net)))
  state = {f"model.{key}": array for key, array in converters.to_torch(net).items()}
  assert converters.load_backbone("sctransnet", state).in_channels == 1


@pytest.mark.parametrize(
  "name, layers",
  [("mtu", {"vit1", "conv0_0_0.0.conv1", "head.block.4"}), ("sctransnet", {"mtc.embeddings_1"})],
)
def test_dead_layers_have_a_reason(name, layers):
  dead = converters._dead(converters._table(name), shapes_only(name))
  assert layers <= {entry.layer for entry in dead}
  assert all("never" in entry.reason for entry in dead)
