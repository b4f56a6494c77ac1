"""FDEP: encode once, decode twice, and what each branch may touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
  LEVEL_WIDTH,
  TOYS,
  batch,
  count_parameters,
  parts,
  stats,
  toy_config,
  toy_levels,
  toy_model,
)

from fdep_jax import backbones, build, forward, losses, samf
from fdep_jax import step as step_lib
from fdep_jax.fdep import FDEP

# Parameters in millions with four SAMFs at ViT-L/14: paper, Tab. 1, "+ FDEP" rows; of the networks
# that have none there, executed parameters and four times 1024·C + 11.5·C² + 7·C.
WITH_FDEP = {
  "acm": 0.85,
  "alcl": 9.74,
  "alcnet": 0.88,
  "dna": 8.77,
  "ggl": 13.06,
  "ilnet": 5.32,
  "mlcl": 1.11,
  "msda": 5.24,
  "mtu": 13.34,
  "sctransnet": 15.27,
  "sdsnet": 3.79,
  "uiu": 64.71,
}
WITH_TOP = [name for name in backbones.names() if backbones.network_class(name).top_channels]


def test_every_network_has_its_count_with_fdep_in_the_table():
  assert sorted(WITH_FDEP) == WITH_TOP


@pytest.mark.parametrize("name", WITH_TOP)
def test_parameters_with_fdep_equal_the_papers(name):
  # Shared statistics spare a trace of the decoder; statistics are no parameters.
  model = nnx.eval_shape(lambda: FDEP(name, bn_stats="shared", rngs=nnx.Rngs(0)))
  assert round(count_parameters(model) / 1e6, 2) == WITH_FDEP[name]


def test_dino_without_samf_has_the_papers_count():  # Tab. 3, Schemes 1 and 3
  model = nnx.eval_shape(lambda: FDEP("msda", fusion="add", rngs=nnx.Rngs(0)))
  assert round(count_parameters(model) / 1e6, 2) == 5.05


def two_passes(model: FDEP, image, priors):
  """The two branches as the plain reading has it: two whole networks on shared parameters."""
  skips, top = model.backbone.encode(image)
  for fuse, level in zip(model.fusion, priors, strict=True):
    top = fuse(top, level)
  main = model.backbone.decode(skips, top)
  return main, model.backbone(image)


@pytest.mark.parametrize(
  "name",
  ["toy", *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_TOP)],
)
def test_encoding_once_equals_two_full_passes(toy, name):
  # Loss and every gradient, in float64.
  stride = backbones.network_class(name).stride
  size = max(16, 2 * stride)
  true = jax.random.uniform(jax.random.key(3), (2, size, size)) < 0.1
  with jax.enable_x64(True):
    model = FDEP(name, LEVEL_WIDTH, 4, rngs=nnx.Rngs(0))
    model.train()
    model.set_attributes(deterministic=True, raise_if_not_found=False)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    image = toy.image(2, size).astype(jnp.float64)
    priors = [level.astype(jnp.float64) for level in toy_levels()]

    def loss(params, run):
      model = nnx.merge(graphdef, params, rest, copy=True)
      main, light = run(model, image, priors)
      return losses.eedm(main.heads, true) + 0.5 * losses.eedm(light.heads, true)

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    once, grads_once = run(params, FDEP.__call__)
    twice, grads_twice = run(params, two_passes)
    np.testing.assert_allclose(once, twice, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(grads_once), jax.tree.leaves(grads_twice), strict=True):
      # Sums of terms as large as the largest gradient are rounded at its scale.
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12 * max(1, abs(b).max()))


def test_the_light_branch_is_the_backbone_alone(toy):
  model = toy_model()
  model.eval()
  np.testing.assert_array_equal(model.light(toy.image()).final, model.backbone(toy.image()).final)
  assert count_parameters(model.backbone) == count_parameters(
    backbones.create("toy", rngs=nnx.Rngs(0))
  )


def test_the_branches_differ_and_only_main_sees_the_levels(toy):
  model = toy_model()
  model.eval()
  main, light = model(toy.image(), toy_levels())
  other, same = model(toy.image(), [2 * level for level in toy_levels()])
  assert jnp.isfinite(main.final).all() and jnp.isfinite(light.final).all()
  assert not jnp.allclose(main.final, light.final)
  assert not jnp.allclose(main.final, other.final)
  np.testing.assert_array_equal(light.final, same.final)


@pytest.mark.parametrize("fusion", ["samf", "add"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_any_number_of_levels_is_fused(toy, fusion, number):
  model = toy_model(num_levels=number, fusion=fusion)
  assert model.main(toy.image(), toy_levels(number)).final.shape == (2, 16, 16, 1)
  with pytest.raises(ValueError, match=f"the model fuses {number}"):
    model.main(toy.image(), toy_levels(number + 1))


def test_adding_levels_is_progressive_addition(toy):
  model = toy_model(num_levels=2, fusion="add")
  _, top = model.backbone.encode(toy.image())
  fused = top
  for fuse, level in zip(model.fusion, toy_levels(2), strict=True):
    fused = fuse(fused, level)
  expected = top + sum(
    jax.image.resize(
      level @ fuse.align.project.kernel[...][0, 0]
      + fuse.align.project.bias[...].reshape(1, 1, 1, -1),
      top.shape,
      "bilinear",
    )
    for fuse, level in zip(model.fusion, toy_levels(2), strict=True)
  )
  np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-6)


def test_per_branch_statistics_are_those_of_each_branch_trained_alone(toy):
  both, main, light = toy_model(), toy_model(), toy_model(num_levels=0)
  both.train(), main.train(), light.train()
  both.set_attributes(deterministic=True, raise_if_not_found=False)
  main.set_attributes(deterministic=True, raise_if_not_found=False)
  light.set_attributes(deterministic=True, raise_if_not_found=False)
  nnx.update(light.backbone, nnx.state(both.backbone))
  both(toy.image(), toy_levels())
  main.main(toy.image(), toy_levels())
  light.light(toy.image())
  ours, of_light = stats(both), stats(light)
  for path, value in of_light.items():
    np.testing.assert_allclose(ours[path], value, rtol=1e-6, atol=1e-7)
  moved = [path for path in stats(main) if path.startswith("main_stats/")]
  assert {path.split("/")[1] for path in moved} == {"up"}
  for path in moved:
    np.testing.assert_allclose(ours[path], stats(main)[path], rtol=1e-6, atol=1e-7)
    assert np.abs(ours[path] - ours["backbone/" + path.removeprefix("main_stats/")]).max() > 1e-4


def test_shared_statistics_are_updated_twice_main_first(toy):
  model = toy_model(bn_stats="shared")
  model.train()
  model.set_attributes(deterministic=True, raise_if_not_found=False)
  norm = model.backbone.up.norm
  seen = []
  call = type(norm).__call__

  def spy(self, x):
    if self is norm:
      seen.append(np.asarray(x.mean((0, 1, 2))))
    return call(self, x)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(norm), "__call__", spy)
    model(toy.image(), toy_levels())
  main, light = seen
  np.testing.assert_allclose(norm.mean[...], 0.9 * (0.1 * main) + 0.1 * light, rtol=1e-5, atol=1e-7)


def test_what_runs_once_is_updated_once(toy):
  model, alone = toy_model(bn_stats="shared"), toy_model(num_levels=0)
  nnx.update(alone.backbone, nnx.state(model.backbone))
  for m in (model, alone):
    m.train()
    m.set_attributes(deterministic=True, raise_if_not_found=False)
  model(toy.image(), toy_levels())
  alone.light(toy.image())
  for layer in ("stem", "down", "skip"):
    a, b = (getattr(m.backbone, layer).norm.mean[...] for m in (model, alone))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_unknown_options_are_refused(toy):
  with pytest.raises(ValueError, match="one of samf, add"):
    toy_model(fusion="sum")
  with pytest.raises(ValueError, match="per_branch or shared"):
    toy_model(bn_stats="both")
  with pytest.raises(ValueError, match="No backbone is called 'mdsa'; there are acm"):
    FDEP("mdsa", rngs=nnx.Rngs(0))


MIXED = (
  (TOYS / "flax_unet.py")
  .read_text()
  .replace("nnx.Conv(4, 1, (1, 1), rngs=rngs)", "basic.Conv(4, 1, rngs=rngs)")
  .replace("import Backbone, Logits", "import Backbone, Logits\nfrom fdep_jax.layers import basic")
)


@pytest.mark.parametrize("source", ["flax", "mixed"])
@pytest.mark.parametrize(
  "changes",
  [{}, {"mode": "fdep_wo_coisd"}, {"model.fusion": "add"}, {"model.share": "decoder"}],
  ids=str,
)
def test_flaxs_own_norms_train_in_bfloat16(drop_in, source, changes):
  # Flax's BatchNorm returns float32 there, so `top` and the skips are of another type than SAMF.
  drop_in("mine", MIXED if source == "mixed" else (TOYS / "flax_unet.py").read_text())
  config = toy_config(**{"model.backbone": "mine", "train.dtype": "bfloat16", **changes})
  prior, model, optimizer, state = parts(config)
  steps = step_lib.make_steps(step_lib.make_step(config, model, optimizer, 0.5, 0.2))
  state, metrics = jax.eval_shape(steps, state, prior, None, [batch(), batch()])
  assert metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize("fusion", [samf.SAMF, samf.Add])
def test_a_fused_top_has_the_type_of_the_top(
  fusion,
):  # so the decoder sees one type in both branches
  module = fusion(8, LEVEL_WIDTH, rngs=nnx.Rngs(0))
  nnx.update(module, step_lib.cast(nnx.state(module, nnx.Param), jnp.bfloat16))
  for kind in (jnp.float32, jnp.bfloat16):
    top = jnp.ones((2, 4, 4, 8), kind)
    assert module(top, toy_levels(1)[0]).dtype == kind


GREY = {
  "stride = 4\n  top_stride": "stride = 4\n  in_channels = 1\n  top_stride",
  "Block(3, 4": "Block(1, 4",
}


def dropped(drop_in, edits):
  source = (TOYS / "flax_unet.py").read_text()
  for right, wrong in edits.items():
    assert source.count(right) == 1
    source = source.replace(right, wrong)
  drop_in("mine", source)


@pytest.mark.parametrize("mode", ["fdep", "original"])
def test_a_network_of_one_channel_trains_on_the_mean_of_the_three(drop_in, mode):
  dropped(drop_in, GREY)
  config = toy_config(**{"model.backbone": "mine", "mode": mode})
  build.check_network(config)
  prior, model, optimizer, state = parts(config)
  step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
  jax.eval_shape(step, state, prior, batch())
  image = batch()["image"]
  prepared = forward.prepare(model, image, 0.5, 0.2)
  np.testing.assert_allclose(
    prepared[..., 0], (image.astype(np.float64).mean(-1) / 255 - 0.5) / 0.2, atol=1e-5
  )
  assert prepared.shape[-1] == 1


def test_a_network_of_other_channels_is_refused(drop_in):
  dropped(
    drop_in, {**GREY, "stride = 4\n  top_stride": "stride = 4\n  in_channels = 4\n  top_stride"}
  )
  with pytest.raises(ValueError, match="mine takes images of 4 channels; .* Set in_channels"):
    build.check_network(toy_config(**{"model.backbone": "mine"}))


@pytest.mark.parametrize("stats", ["per_branch", "shared"])
@pytest.mark.parametrize(
  "edits, said",
  [
    ({"top_channels = 16": "top_channels = 8"}, "must be .*×8; encode returns .*×16"),
    (
      {"top_stride = 4": "top_stride = 2"},
      "so for an image of 2×8×8×3 .* must be 2×4×4×16; encode",
    ),
    ({"self.third(nnx.max_pool(second, (2, 2), (2, 2)))": "None"}, "encode returns None"),
  ],
)
def test_a_top_feature_that_is_not_what_the_class_says_is_refused(drop_in, stats, edits, said):
  dropped(drop_in, edits)

  def run(image):
    model = FDEP("mine", LEVEL_WIDTH, 1, bn_stats=stats, rngs=nnx.Rngs(0))
    return model.main(image, toy_levels(1))

  with pytest.raises(ValueError, match=f"backbones.mine says top_channels = .*{said}.* Correct"):
    jax.eval_shape(run, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
