"""The models of the ablations: what is shared, what is trained, what is distilled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
  LEVEL_WIDTH,
  batch,
  count_parameters,
  lines,
  parts,
  stats,
  toy_config,
  toy_levels,
  toy_model,
)

from fdep_jax import ablations, backbones, build, evaluate, forward, settings, train
from fdep_jax import detector as detector_lib
from fdep_jax import pseudo as pseudo_lib
from fdep_jax.backbones import Logits
from fdep_jax.runtime import checkpoint, mesh

# Design: parameters before and behind the cut, counted on the published networks.
HALVES = {
  "acm": (273_374, 124_597),
  "alcnet": (370_590, 56_519),
  "mlcl": (295_440, 361_809),
  "alcl": (4_727_184, 940_961),
  "dna": (2_818_082, 1_878_806),
  "ggl": (8_063_776, 924_317),
  "uiu": (25_676_928, 24_864_533),
  "msda": (3_545_936, 1_245_105),
}


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=() if n == "acm" else pytest.mark.slow) for n in HALVES]
)
def test_the_halves_of_a_network_have_the_published_counts(name):
  # ALCNet's and the others' gates on skips are the decoder's, though `encode` computes them.
  net = nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0)))
  sizes = {path: v.size for path, v in nnx.to_flat_state(nnx.state(net, nnx.Param))}
  found = [
    sum(sizes[path] for path in ablations.parameters_of(net, half))
    for half in ("encoder", "decoder")
  ]
  assert tuple(found) == HALVES[name]


def partly(share: str) -> ablations.PartlyShared:
  model = ablations.PartlyShared(share, "toy", LEVEL_WIDTH, 4, rngs=nnx.Rngs(0))
  model.set_attributes(deterministic=True, raise_if_not_found=False)
  return model


ENCODER, DECODER = {"stem", "down"}, {"skip", "up", "side", "head"}


@pytest.mark.parametrize("share, same, other", [("encoder", ENCODER, DECODER),
                                               ("decoder", DECODER, ENCODER)])  # fmt: skip
def test_half_the_parameters_are_the_same_and_the_others_are_not(toy, share, same, other):
  model = partly(share)
  whole, net = count_parameters(toy_model()), backbones.create("toy", rngs=nnx.Rngs(0))
  halves = {part: count_parameters(getattr(net, part)) for part in (*ENCODER, *DECODER)}
  assert count_parameters(model) == whole + sum(halves[part] for part in other)
  for part in same:
    ours = jax.tree.leaves(nnx.state(getattr(model.backbone, part), nnx.Param))
    theirs = jax.tree.leaves(nnx.state(getattr(model.main_backbone, part), nnx.Param))
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_array_equal(a, b)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def light(params):
    return jnp.sum(nnx.merge(graphdef, params, rest, copy=True).light(toy.image()).final ** 2)

  def main(params):
    merged = nnx.merge(graphdef, params, rest, copy=True)
    return jnp.sum(merged.main(toy.image(), toy_levels()).final ** 2)

  moved = {
    name: {
      path[1]
      for path, g in nnx.to_flat_state(jax.grad(f)(params))
      if path[0] == "backbone" and np.abs(g[...]).max() > 0
    }
    for name, f in (("light", light), ("main", main))
  }
  assert moved["light"] >= (ENCODER | DECODER) - {"side"}  # which is not in `final`
  assert moved["main"] == same - {"side"}


@pytest.mark.parametrize("share", ["encoder", "decoder"])
def test_the_light_branch_of_a_partly_shared_model_is_the_detector(toy, share):
  model, alone = partly(share), toy_model(num_levels=0)
  model.train(), alone.train()
  nnx.update(alone.backbone, nnx.state(model.backbone))
  main, light = model(toy.image(), toy_levels())
  np.testing.assert_array_equal(light.final, alone.light(toy.image()).final)
  assert not jnp.allclose(main.final, light.final)
  ours, theirs = stats(model), stats(alone)
  for path, value in theirs.items():  # every statistic is updated once, by its branch
    np.testing.assert_allclose(ours[path], value, rtol=1e-6)


def logits(values) -> Logits:
  return Logits(jnp.array(values, jnp.float32).reshape(1, 1, -1, 1))


def test_distillation_is_the_divergence_from_the_main_branch():
  # KL(0.5 ‖ σ(x)) = ln(0.5/σ(x))/2 + ln(0.5/(1−σ(x)))/2; at σ = 0.8: ln(0.25/0.16)/2.
  main, light = logits([0.0, 0.0]), logits([0.0, np.log(4.0)])
  expected = np.log(0.25 / 0.16) / 2
  np.testing.assert_allclose(ablations.distillation(main, light), expected / 2, rtol=1e-5)
  assert ablations.distillation(light, light) == pytest.approx(0, abs=1e-7)
  heads = Logits(main.final, (main.final,)), Logits(light.final, (light.final,))
  np.testing.assert_allclose(ablations.distillation(*heads), expected, rtol=1e-5)
  of_main, of_light = (
    jax.grad(lambda x, y: ablations.distillation(logits(x), logits(y)), argnums)(
      jnp.array([1.0, 2.0]), jnp.array([0.0, 0.5])
    )
    for argnums in (0, 1)
  )
  assert np.all(of_main == 0) and np.all(of_light < 0)


@pytest.mark.parametrize("number", [1, 4, 5])
@pytest.mark.parametrize("decoder", ["plain", "msda"])
def test_a_decoder_on_dinov2_takes_any_number_of_levels_and_fills_the_image(decoder, number):
  def forward(image, levels):
    model = ablations.OnDino(decoder, LEVEL_WIDTH, number, rngs=nnx.Rngs(0))
    return model.main(image, levels).final

  shape = jax.eval_shape(forward, jnp.zeros((2, 32, 48, 3)), toy_levels(number))
  assert shape.shape == (2, 32, 48, 1)


def test_a_decoder_on_dinov2_sees_the_levels_and_not_the_image(toy):
  model = ablations.OnDino("plain", LEVEL_WIDTH, 2, rngs=nnx.Rngs(0))
  model.eval()
  main = jax.jit(lambda image, levels: model.main(image, levels).final)
  image, two = toy.image(), toy_levels(2)
  out = main(image, two)
  assert jnp.isfinite(out).all()
  np.testing.assert_array_equal(out, main(2 * image, two))
  assert not jnp.allclose(out, main(image, [two[0], 2 * two[1]]))


def test_msdas_decoder_has_its_parameters_and_the_projections():
  model = nnx.eval_shape(lambda: ablations.OnDino("msda", 1024, 4, rngs=nnx.Rngs(0)))
  projections = 1025 * (16 + 32 + 64 + 64 + 64)
  assert count_parameters(model) == HALVES["msda"][1] + projections


def test_an_unfrozen_prior_is_trained_saved_and_not_counted(toy, tmp_path):
  changes = {"mode": "fdep_wo_coisd", "model.on_dino": "plain", "train.steps": 2}
  config = toy_config(**changes, **{"prior.unfreeze": True})
  prior, _, _, state = parts(config)
  before = {k: np.asarray(v) for k, v in checkpoint.flatten(state["params"]).items()}
  vit = [name for name in before if name.startswith("vit/")]
  assert sum(before[name].size for name in vit) == count_parameters(prior.model)
  metrics = train.train(config, tmp_path)
  assert metrics["params"] == sum(before[k].size for k in before if k not in vit)
  detector = detector_lib.load(tmp_path)
  after = checkpoint.flatten(nnx.state(detector.model, nnx.Param))
  assert all((np.asarray(after[k]) != before[k]).any() for k in before)
  assert evaluate.evaluate(tmp_path)["main"] == metrics["main"]
  frozen = toy_config(**changes)
  _, model, _, state = parts(frozen)
  assert not any(name.startswith("vit/") for name in checkpoint.flatten(state["params"]))


def test_a_frozen_and_an_unfrozen_prior_give_the_same_at_the_start(toy):
  outputs = []
  for unfreeze in (False, True):
    config = toy_config(mode="fdep_wo_coisd", **{"prior.unfreeze": unfreeze})
    prior, model, _, state = parts(config)
    apply = forward.make_forward(config, model, 0.5, 0.2)
    prior = prior.placed(train.mesh.make())
    assert (prior.weights is None) == unfreeze
    args = (state["params"], state["stats"], state["rng"], prior, batch()["image"])
    outputs.append(apply(*args)["main"])
  np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_the_distillation_term_is_in_the_loss_and_the_log(toy, tmp_path):
  config = toy_config(**{"loss.distill_weight": 2.0, "train.steps": 2, "log.every_steps": 1})
  train.train(config, tmp_path)
  for line in lines(tmp_path):
    if "loss" in line:
      total = line["loss_main"] + line["loss_light"] + 2 * line["loss_distill"]
      assert line["loss"] == pytest.approx(total, rel=1e-5) and line["loss_distill"] > 0


@pytest.mark.parametrize("share", [pytest.param("encoder", marks=pytest.mark.slow), "decoder"])
def test_a_partly_shared_run_is_trained_and_its_light_branch_loaded_alone(toy, tmp_path, share):
  metrics = train.train(toy_config(**{"model.share": share, "train.steps": 2}), tmp_path)
  light, main = (detector_lib.load(tmp_path, branch=branch) for branch in ("light", "main"))
  assert metrics["params"] == count_parameters(main.model) > count_parameters(light.model)
  np.testing.assert_allclose(
    light.model.light(toy.image()).final, main.model.light(toy.image()).final, rtol=1e-5, atol=1e-6
  )


def test_pseudo_labels_are_the_teachers_and_stand_beside_the_true_ones(toy, tmp_path, monkeypatch):
  teacher = tmp_path / "teacher"
  train.train(toy_config(mode="fdep_wo_coisd", **{"train.steps": 2}), teacher)
  seen = {}
  crop_to = train.data.train_iterator

  def spy(samples, **options):
    seen[labels] = samples
    return crop_to(samples, **options)

  monkeypatch.setattr(train.data, "train_iterator", spy)
  for labels in ("pseudo", "both"):
    changes = {"train.steps": 1, "train.labels": labels, "train.teacher": str(teacher)}
    train.train(toy_config(mode="original", **changes), tmp_path / labels)
  seen["true"] = build.load_images(toy_config(mode="original")).train
  detector = detector_lib.load(teacher)
  for true, pseudo in zip(seen["true"], seen["pseudo"], strict=True):
    image = pseudo.image[None]
    fused = detector.prior.levels(jnp.asarray(image))
    normal = forward.normalise(jnp.asarray(image), detector.mean, detector.std)
    prob = jax.nn.sigmoid(detector.model.main(normal, fused).final[0, ..., 0])
    assert ((np.asarray(prob) > 0.5) != pseudo.mask).mean() < 1e-3  # rounding at the threshold
    np.testing.assert_array_equal(true.image, pseudo.image)
  assert any((t.mask != p.mask).any() for t, p in zip(seen["true"], seen["pseudo"], strict=True))
  masks = [[s.mask for s in seen[labels]] for labels in ("both", "true", "pseudo")]
  for a, b in zip(masks[0], masks[1] + masks[2], strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_run_that_scores_its_deployed_branch_alone_can_teach(toy, tmp_path):
  config = toy_config(**{"train.steps": 2, "eval.branches": "deployed"})
  metrics = train.train(config, tmp_path / "teacher")
  assert "light" in metrics and "main" not in metrics and "main" not in metrics["last"]
  student = toy_config(mode="original", **{"train.labels": "pseudo"})
  student.train.teacher = str(tmp_path / "teacher")
  samples = build.load_images(student).train[:2]
  found = pseudo_lib.relabel(student, samples, mesh.make(1))
  assert [sample.mask.shape for sample in found] == [sample.mask.shape for sample in samples]


def test_a_teacher_that_cannot_teach_is_refused_before_training(toy, tmp_path):
  changes = {"mode": "original", "train.labels": "pseudo"}
  config = toy_config(**changes, **{"train.teacher": str(tmp_path / "nothing")})
  with pytest.raises(FileNotFoundError, match="train.teacher: .*nothing"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_settings_that_do_not_go_together_are_refused():
  config = toy_config(
    mode="original",
    **{"model.share": "encoder", "loss.distill_weight": 1.0, "model.on_dino": "plain"},
    **{"prior.unfreeze": True, "prior.bank": 2, "train.labels": "both"},
  )
  with pytest.raises(ValueError) as info:
    settings.check(config)
  message = str(info.value)
  assert "6 problems" in message
  for name in ("model.share", "loss.distill_weight", "model.on_dino", "prior.unfreeze", "teacher"):
    assert name in message
