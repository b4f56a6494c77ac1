"""Facts of single networks: their supervision, sizes, float32 parts, large frames, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import converters
from configs import base
from fdep_jax import ablations, backbones, build, predict, step
from fdep_jax import detector as detector_lib
from fdep_jax.backbones import Backbone, Logits, ilnet, rpcanet, sdsnet
from fdep_jax.data import frames
from fdep_jax.fdep import FDEP
from fdep_jax.layers import basic
from fdep_jax.predict import tiling


def shapes_only(name: str, **options) -> Backbone:
  return nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0), **options))


def count(module) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def detector(net: Backbone) -> detector_lib.Detector:
  model = FDEP(net, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  return detector_lib.Detector(model, "light", None, 0.0, 1.0, None, "a test", None, 0)


# Supervision.


@pytest.mark.parametrize("name", [n for n in backbones.names() if n not in ("rpcanet", "sdsnet")])
def test_losses_of_all_heads_are_summed(name):
  logits = Logits(jnp.full((1, 2, 2, 1), 1.0), tuple(jnp.full((1, 2, 2, 1), v) for v in (2.0, 4.0)))
  assert backbones.network_class(name).supervise(logits, None, jnp.mean) == 7


def test_sdsnet_averages_its_five_losses():
  heads = [jnp.full((1, 2, 2, 1), float(value)) for value in (1, 2, 3, 4, 10)]
  logits = Logits(heads[0], tuple(heads[1:]))
  assert sdsnet.SDSNet.supervise(logits, None, jnp.mean) == 4
  # So does the distillation term, which follows the loss.
  zero = Logits(*jax.tree.map(jnp.zeros_like, logits))
  total = ablations.distillation(logits, zero)
  mean = ablations.distillation(logits, zero, sdsnet.SDSNet.supervise)
  np.testing.assert_allclose(mean, total / 5, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_rpcanet_is_trained_to_rebuild_its_image(channels):
  image = jnp.broadcast_to(jnp.array([0.2, 0.6]).reshape(1, 1, 2, 1), (1, 1, 2, channels))
  logits = Logits(jnp.full((1, 1, 2, 1), 3.0), (jnp.full((1, 1, 2, 1), 0.5),))
  loss = rpcanet.RPCANet.supervise(logits, image, jnp.sum)
  np.testing.assert_allclose(loss, 6 + 0.01 * (0.3**2 + 0.1**2) / 2, rtol=1e-6)


# A network without a top feature.


def test_modes_with_fdep_are_refused_for_a_network_without_a_top_before_data_is_read():
  config = base.get_config()
  config.model.backbone, config.data.root = "rpcanet", "nowhere"
  for mode in ("fdep", "fdep_wo_coisd"):
    config.mode = mode
    with pytest.raises(ValueError, match="(?s)RPCANet.*no top feature.*full resolution.*original"):
      build.check_inputs(config)
  config.mode = "original"
  with pytest.raises(FileNotFoundError, match="nowhere"):
    build.check_inputs(config)
  with pytest.raises(ValueError, match="FDEP cannot be attached to RPCANet"):
    nnx.eval_shape(lambda: ablations.PartlyShared("encoder", "rpcanet", 8, 2, rngs=nnx.Rngs(0)))


def test_rpcanet_takes_grey_levels_as_they_are_and_the_mean_of_three_channels():
  config = base.get_config()
  config.data.root, config.data.synthetic_train, config.data.synthetic_test = "synthetic", 4, 2
  config.model.backbone = "rpcanet"
  images = build.load_images(config)
  assert (images.mean, images.std) == (0.0, 1.0)
  config.model.backbone = "acm"
  assert build.load_images(config).std < 1

  net = rpcanet.RPCANet(rngs=nnx.Rngs(0))
  net.stages = nnx.List(list(net.stages)[:1])
  net.eval()
  image = jax.random.uniform(jax.random.key(0), (1, 4, 5, 3))
  np.testing.assert_allclose(net(image).final, net(image.mean(-1, keepdims=True)).final, atol=1e-5)
  with pytest.raises(ValueError, match="needs B×H×W×1.*grey channel alone"):
    net(image[..., :2])


# ILNet's normalisation of its logits, and its sizes.


def test_ilnets_normalisation_of_logits_runs_in_evaluation_only_and_is_not_trained():
  norm = ilnet.EvaluationNorm()
  x = jax.random.normal(jax.random.key(0), (1, 2, 3, 1))
  norm.train()
  np.testing.assert_array_equal(norm(x), x)
  norm.eval()
  np.testing.assert_allclose(norm(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
  for value, new in ((norm.scale, 3.0), (norm.bias, 0.5), (norm.mean, 2.0), (norm.var, 4.0)):
    value.set_value(jnp.full(1, new))
  np.testing.assert_allclose(norm(x), (x - 2) * 3 / np.sqrt(4 + 1e-5) + 0.5, rtol=1e-5)
  # Not in what an optimiser sees, but in what is saved and exported.
  net = shapes_only("ilnet", size="S")
  params, stats = nnx.state(net, nnx.Param), nnx.state(net, nnx.BatchStat)
  names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
  saved = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(stats)}
  own = {f"out_norm/{name}" for name in ("scale", "bias", "mean", "var")}
  assert not own & names and own <= saved
  optimizer = optax.adamw(1e-3, weight_decay=0.1)
  assert "out_norm" not in str(jax.tree_util.tree_structure(jax.eval_shape(optimizer.init, params)))


@pytest.mark.parametrize("size, number", [("L", 4_039_792), ("M", 1_581_631), ("S", 45_980)])
def test_the_size_of_ilnet_is_read_off_its_checkpoint(size, number):
  net = shapes_only("ilnet", size=size)
  assert count(net) + 2 == number  # and the scale and bias that are not trained
  rng = np.random.default_rng(0)
  nnx.update(
    net, jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape, np.float32)), nnx.state(net))
  )
  state = converters.to_torch(net)
  again = converters.load_backbone("ilnet", state)
  assert again.top_channels == net.top_channels == {"L": 128, "M": 64, "S": 8}[size]
  back = converters.to_torch(again)
  assert set(back) == set(state)
  for key, array in state.items():
    np.testing.assert_array_equal(back[key], array, key)


def test_a_small_ilnet_runs_at_any_size_and_an_unknown_one_is_refused():
  net = shapes_only("ilnet", size="S")
  graphdef, state = nnx.split(net)
  image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
  logits = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, image)
  assert [head.shape for head in logits.heads] == [(2, 64, 96, 1)] * 7
  with pytest.raises(ValueError, match="size is 'XL'; it must be one of L, M, S"):
    ilnet.ILNet(size="XL", rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_one_channel_sdsnet_is_read_off_its_checkpoint():
  net = nnx.eval_shape(lambda: sdsnet.SDSNet(in_channels=1, rngs=nnx.Rngs(0)))
  assert count(net) == 2_504_695 - 1_792  # of the published code, less its norms that never run
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.state(net))
  nnx.update(net, zeros)
  state = {f"model.{key}": array for key, array in converters.to_torch(net).items()}
  assert converters.load_backbone("sdsnet", state).in_channels == 1


# bfloat16.


def test_rpcanet_unfolds_in_float32_when_its_convolutions_are_bfloat16():
  net = rpcanet.RPCANet(rngs=nnx.Rngs(0))
  net.stages = nnx.List(list(net.stages)[:2])
  net.eval()
  graphdef, params, rest = nnx.split(net, nnx.Param, ...)
  image = jax.random.uniform(jax.random.key(0), (1, 12, 12, 1))
  wide = nnx.merge(graphdef, params, rest)(image)
  narrow = nnx.merge(graphdef, step.cast(params, jnp.bfloat16), rest)(image)
  kinds = {v[...].dtype for _, v in nnx.to_flat_state(step.cast(params, jnp.bfloat16))}
  assert kinds == {jnp.dtype("bfloat16"), jnp.dtype("float32")}  # norms, and the step's size
  for ours, exact in zip(narrow.heads, wide.heads, strict=True):
    assert ours.dtype == jnp.float32
    assert 0 < np.linalg.norm(ours - exact) <= 0.03 * np.linalg.norm(exact)
  # Without any network in the stages the maps pass exactly.
  zero = jax.tree.map(jnp.zeros_like, step.cast(params, jnp.bfloat16))
  (background,) = nnx.merge(graphdef, zero, rest)(image).side
  np.testing.assert_array_equal(background, 0)


def test_statistics_of_whole_maps_are_float32_under_bfloat16():
  x = 100 + jax.random.normal(jax.random.key(0), (1, 64, 64, 1))
  place = ilnet._normalise_map(x)
  assert place.dtype == jnp.float32
  np.testing.assert_allclose([place.mean(), place.var()], [0, 1], atol=1e-4)
  narrow = x.astype(jnp.bfloat16)
  weighted = ilnet._weighted_mean(narrow, narrow)
  assert weighted.dtype == jnp.float32
  wide = np.asarray(narrow, np.float64)
  weight = np.exp(wide - wide.max())
  np.testing.assert_allclose(weighted.ravel(), (weight * wide).sum() / weight.sum(), rtol=1e-6)


# Depthwise convolutions.


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("size", [3, 9, 30])
def test_a_convolution_along_an_axis_is_the_depthwise_one(axis, size):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    shape = (2, size, 5, 3) if axis == 1 else (2, 5, size, 3)
    x, kernel = jnp.asarray(rng.standard_normal(shape)), jnp.asarray(rng.standard_normal((21, 3)))
    weights = jnp.asarray(rng.standard_normal(shape))

    def plain(x, kernel):
      window = (21, 1) if axis == 1 else (1, 21)
      return jax.lax.conv_general_dilated(
        x,
        kernel.reshape(*window, 1, 3),
        (1, 1),
        [(size // 2, size // 2) for size in window],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
      )

    def ours(x, kernel):
      return sdsnet.convolve_axis(x, kernel, axis)

    results = [jax.vjp(function, x, kernel) for function in (ours, plain)]
    (ours, pull), (plain, plain_pull) = results
    np.testing.assert_allclose(ours, plain, atol=1e-12)
    for gradient, expected in zip(pull(weights), plain_pull(weights), strict=True):
      np.testing.assert_allclose(gradient, expected, atol=1e-12)


# Large frames.


class Mapwise(Backbone):
  """ILNet's two uses of a whole map on features of a small field."""

  stride = top_stride = 1
  top_channels = 4
  paper_name = "Mapwise"

  def __init__(self, *, rngs: nnx.Rngs):
    self.stem = basic.Conv(3, 4, rngs=rngs)
    self.place = basic.Conv(4, 1, rngs=rngs)

  def encode(self, image):
    return (), nnx.relu(self.stem(image))

  def decode(self, skips, top):
    place = self.place(top)
    context = ilnet._weighted_mean(place, top)
    weighted = (top * context).sum(-1, keepdims=True)
    return Logits(ilnet._normalise_map(weighted) + 0.1 * place)


def test_whole_maps_of_ilnet_are_the_frames_in_windows():
  levels = np.random.default_rng(0).uniform(0, 255, (180, 250)).astype(np.float32)
  levels[100:] /= 4
  predictor = tiling.Predictor(detector(Mapwise(rngs=nnx.Rngs(0))))
  [(_, untiled)] = predictor._batch([(None, levels)])
  np.testing.assert_allclose(predictor.tiled(levels, window=96, halo=32), untiled, atol=2e-6)


def test_a_tiled_rpcanet_is_the_untiled_one():
  # Six stages see 6·18 = 108 pixels to each side, which is within HALO; these two, 36.
  assert 6 * 18 <= tiling.HALO
  net = rpcanet.RPCANet(rngs=nnx.Rngs(0))
  net.stages = nnx.List(list(net.stages)[:2])
  levels = np.random.default_rng(0).uniform(0, 255, (250, 60)).astype(np.float32)
  predictor = tiling.Predictor(detector(net))
  [(_, untiled)] = predictor._batch([(None, levels)])
  assert untiled.std() > 0.01
  tiled = predictor.tiled(levels, window=160, halo=64)
  np.testing.assert_allclose(tiled, untiled, atol=1e-5)


class Whole(Backbone):
  """A network that must see its frame whole, and as much as it can of it."""

  stride = top_stride = 1
  top_channels = 3
  paper_name = "Whole"
  whole_frame = "its attention spans the frame"

  def encode(self, image):
    return (), image

  def decode(self, skips, top):
    return Logits(top.mean(-1, keepdims=True) - top.mean())


def test_a_network_that_needs_its_frame_whole_gets_it_or_refuses_it(tmp_path, monkeypatch):
  monkeypatch.setattr(tiling, "WHOLE", {"light": 1024})
  predictor = tiling.Predictor(detector(Whole()))
  levels = np.random.default_rng(0).uniform(0, 255, (900, 1000)).astype(np.float32)
  assert 900 * 1000 > tiling.WINDOW**2
  padded = np.zeros((928, 1024))
  padded[:900, :1000] = levels / 255
  expected = 1 / (1 + np.exp(-(levels / 255 - padded.mean())))
  [(_, prob)] = predictor.stream([(None, levels)])
  np.testing.assert_allclose(prob, expected, atol=1e-5)
  with pytest.raises(frames.FrameError, match="(?s)1056×1024.*Whole.*its attention spans.*smaller"):
    predictor(np.zeros((1030, 1000), np.uint8))
  with pytest.raises(ValueError, match="cannot be computed by windows"):
    predictor.tiled(levels)
  # Of a folder, the others are done.
  from PIL import Image

  for name, size in (("large", (1000, 1030)), ("small", (40, 30))):
    Image.new("L", size).save(tmp_path / f"{name}.png")
  result = predict.run(tmp_path, tmp_path / "out", detector(Whole()), progress=False)
  assert [frame.file for frame in result.frames] == ["small.png"]
  assert "its attention spans the frame" in result.unreadable["large.png"]
