"""Foundation models: goldens of DINOv1 and DINOv3, the contract, their files, and refusals."""

import dataclasses
import json
import subprocess
import sys

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import Golden, load_names
from helpers import relative_error, toy_config, toy_prior

import converters
from converters import dinov3 as convert_dinov3
from converters import foundation
from fdep_jax import build, data, priors
from fdep_jax.layers import transformer
from fdep_jax.priors import bank, dino, dinov2, dinov3
from fdep_jax.runtime import hlo, mesh

KINDS = [*priors.names(), "toyprior"]


@pytest.fixture(scope="module", autouse=True)
def toy_is_known():
  with toy_prior():
    yield


def make(kind, **options):
  """A small model of random weights, all of them other than their initial values."""
  found = priors.model_class(kind)
  model = nnx.eval_shape(lambda: found(**{**found.small, **options}, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  for path, leaf in nnx.to_flat_state(nnx.state(model)):
    name = path[-1]
    values = rng.standard_normal(leaf.shape).astype(np.float32)
    scale = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.2
    values = scale * values + (name in ("scale", "scale1", "scale2"))
    if name == "bias" and "qkv" in path and not model.blocks.key_bias:
      values[:, model.width : 2 * model.width] = 0
    leaf.set_value(dinov3.periods(*leaf.shape) if name == "periods" else jnp.asarray(values))
  return model


def load(state, kind, **options):
  heads = priors.model_class(kind).small.get("heads")
  return converters.load_prior(state, heads=heads, **options)


def image_of(model, rows=2, columns=3, batch=1):
  shape = (batch, rows * model.patch, columns * model.patch, 3)
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def run(model, image, levels=None):
  """The maps, and all tokens, of one compiled call with the weights as its argument."""
  graph, state = nnx.split(model)

  @jax.jit
  def both(state, image):
    network = nnx.merge(graph, state)
    tokens = network.tokens(image, levels)
    return [network.feature_map(t, image.shape) for t in tokens], tokens

  return both(state, image)


def maps_of(model, image, blocks):
  graph, state = nnx.split(model)
  return jax.jit(lambda state, image: nnx.merge(graph, state)(image, blocks))(state, image)


def flat(model):
  return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(ours, theirs):
  ours, theirs = flat(ours), flat(theirs)
  assert set(ours) == set(theirs)
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours[name], array, name)


# Golden outputs of the published code in float64, on formula weights. Measured: 1e-6 at most.

BAR = 1e-5


def formula_state(golden, naming="upstream", round_periods=False):
  kept = int(golden.facts["blocks_kept"])
  manifest = {
    name: shape
    for name, shape in golden.manifest.items()
    if not name.startswith("blocks.") or int(name.split(".")[1]) < kept
  }
  state = formula.prior_weights(manifest, round_periods)
  if "embedding_scale" in golden.facts:
    small = ("cls_token", "pos_embed", "storage_tokens", "patch_embed.proj.weight")
    for name in (*small, "patch_embed.proj.bias"):
      if name in state:
        state[name] = state[name] * np.float32(golden.facts["embedding_scale"])
  if naming == "upstream":
    return state
  kind = "dinov3" if "rope_embed.periods" in state else "dino"
  return formula.renamed(state, load_names(kind), naming)


@pytest.mark.parametrize(
  ("name", "naming", "sizes"),
  [
    ("dino_vits16_small", "upstream", ("112x176",)),
    ("dinov3_vits16_small", "hub", ("112x176",)),
    ("dino_vits16", "memory5", ("112x176",)),
    ("dinov3_vits16_bf16periods", "upstream", ("112x176",)),
    ("dinov3_vits16plus", "hub", ("112x176",)),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("dino_vits16", "upstream", ("224x224", "112x176", "256x256")),
        ("dino_vits8", "hub", ("224x224", "56x88", "128x128")),
        ("dino_vitb16", "hub", ("224x224", "112x176", "256x256")),
        ("dinov3_vits16", "upstream", ("224x224", "112x176")),
        ("dinov3_vits16", "memory5", ("224x224", "112x176")),
        ("dinov3_vits16plus", "upstream", ("224x224", "112x176")),
        ("dinov3_vitb16", "hub", ("224x224", "112x176")),
        ("dinov3_vitl16", "upstream", ("224x224", "112x176")),
      )
    ),
  ],
)
def test_outputs_equal_the_published_network(name, naming, sizes):
  golden = Golden("priors", name)
  model = converters.load_prior(formula_state(golden, naming, "bf16" in name))
  assert type(model) is (dino.DINO if name.startswith("dino_") else dinov3.DINOv3)
  levels = tuple(golden.facts["levels"].tolist())
  for size in sizes:
    height, width = map(int, size.split("x"))
    x = formula.image((1, 3, height, width), 0).transpose(0, 2, 3, 1)
    maps, tokens = run(model, x, levels)
    ours = {}
    for i, (level, raw) in enumerate(zip(maps, tokens, strict=True)):
      ours[f"{size}_level{i}_norm"] = level.reshape(-1, model.width)[::7]
      ours[f"{size}_level{i}_raw"] = raw[0, 1 + model.registers :][::29]
    places = height // model.patch, width // model.patch
    if model.grid and "small" not in name:
      ours[f"{size}_pos"] = model.position_embedding(*places)[0, ::5]
    elif "small" not in name:
      ours[f"{size}_rope"] = np.stack(model.rope(*places), 1)[::5]
    assert set(ours) == {key for key in golden.keys if key.startswith(f"{size}_")}
    for key, array in ours.items():
      assert golden.error(key, array) <= BAR, key


def test_periods_of_the_file_count_if_it_has_them():
  golden = Golden("priors", "dinov3_vits16_small")
  exact, rounded = (formula_state(golden, round_periods=r) for r in (False, True))
  loaded = [converters.load_prior(state).periods[...] for state in (exact, rounded)]
  assert 1e-4 < np.abs(loaded[1] / loaded[0] - 1).max() < 2**-8
  np.testing.assert_array_equal(loaded[1], np.float32(rounded["rope_embed.periods"]))
  np.testing.assert_array_equal(loaded[0], dinov3.periods(16))


# The contract.


def test_kinds_are_found_by_their_file_names():
  assert priors.names() == ["dino", "dinov2", "dinov3", "toyprior"]
  with pytest.raises(ValueError, match="No prior is called 'resnet'; there are dino, dinov2"):
    priors.model_class("resnet")
  with pytest.raises(ValueError, match="DINOv1 has no size 'vitl16'; it has vits16, vits8"):
    priors.create("dino", "vitl16", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_gives_a_map_for_each_level_in_the_order_asked_for(kind):
  model = make(kind)
  image = image_of(model)
  last = model.depth - 1
  maps = maps_of(model, image, (last, 0))
  assert [level.shape for level in maps] == 2 * [(1, 2, 3, model.width)]
  assert all(level.dtype == jnp.float32 and np.isfinite(level).all() for level in maps)
  (first,) = maps_of(model, image, (0,))
  np.testing.assert_allclose(maps[1], first, atol=1e-5)
  assert relative_error(maps[0], np.asarray(first)) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_prepared_for_the_patch_and_with_the_models_own_numbers(kind):
  model = make(kind)
  patch, numbers = model.patch, priors.NORMALISATIONS[model.normalisation]
  grey = model.prepare(np.full((1, patch + 1, 2 * patch, 3), 0.5, np.float32))
  assert grey.shape == (1, 2 * patch, 2 * patch, 3)
  expected = (0.5 - np.array(numbers.mean)) / np.array(numbers.std)
  np.testing.assert_allclose(grey[0, 1, 1], expected, rtol=1e-5)
  prior = priors.from_module(model, (0,), "random")
  image = np.full((1, 2 * patch, patch, 3), 128, np.uint8)
  (level,) = jax.jit(lambda prior, image: prior.levels(image))(prior, image)
  (same,) = maps_of(model, model.prepare(image / np.float32(255)), (0,))
  np.testing.assert_allclose(level, same, atol=1e-5)


def test_satellite_weights_are_normalised_as_the_setting_says(caplog):
  image = jnp.full((1, 16, 16, 3), 0.5)
  satellite = {"prior.normalisation": "satellite"}
  own, other = (build.load_prior(toy_config(**c)).prepare(image)[0, 0, 0] for c in ({}, satellite))
  np.testing.assert_allclose(own, (0.5 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225],
                             rtol=1e-5)  # fmt: skip
  np.testing.assert_allclose(other, (0.5 - np.array([0.430, 0.411, 0.296])) / [0.213, 0.156, 0.143],
                             rtol=1e-5)  # fmt: skip
  name = "nowhere/dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
  for changes, warns in (({}, True), (satellite, False)):
    caplog.clear()
    changes = {"prior.checkpoint": name, "model.backbone": "acm", **changes}
    build.abstract(toy_config(**changes))
    assert ("prior.normalisation=satellite" in caplog.text) is warns


@pytest.mark.parametrize(
  ("file", "kind", "size"),
  [
    ("dino_deitsmall16_pretrain.pth", "dino", "vits16"),
    ("dino_deitsmall8_pretrain_full_checkpoint.pth", "dino", "vits8"),
    ("dino_vitbase16_pretrain.pth", "dino", "vitb16"),
    ("dino-vitb8.safetensors", "dino", "vitb8"),
    ("dinov2_vits14_pretrain.pth", "dinov2", "vits14"),
    ("dinov2-large.safetensors", "dinov2", "vitl14"),
    ("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "dinov3", "vits16"),
    ("dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth", "dinov3", "vits16plus"),
    ("dinov3-vith16plus-pretrain-lvd1689m.safetensors", "dinov3", "vith16plus"),
    ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", "dinov3", "vitl16"),
    ("dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth", "dinov3", "vit7b16"),
    ("toyprior.pth", "toyprior", "tiny8"),
  ],
)
def test_plans_know_a_model_by_its_file_name(file, kind, size):
  found, arguments = build.named_model(f"nowhere/{file}")
  assert found is priors.model_class(kind)
  assert arguments.items() >= found.sizes[size].items()


@pytest.mark.parametrize(
  ("kind", "size", "parameters"),
  [
    # The published counts in PRIORS.md's rounding, in millions.
    ("dino", "vits16", 21.7),
    ("dino", "vits8", 21.7),
    ("dino", "vitb16", 85.8),
    ("dinov3", "vits16", 21.6),
    ("dinov3", "vits16plus", 28.7),
    ("dinov3", "vitb16", 85.7),
    ("dinov3", "vitl16", 303),
    ("dinov3", "vith16plus", 840),
    ("dinov3", "vit7b16", 6716),
  ],
)
def test_the_sizes_have_the_published_parameter_counts(kind, size, parameters):
  model = nnx.eval_shape(lambda: priors.create(kind, size, rngs=nnx.Rngs(0)))
  count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) / 1e6
  assert count == pytest.approx(parameters, rel=0.003)


def compiled(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
  ("kind", "size", "side"),
  # At these sizes a position table is not resized, or by less than the bar.
  [("dino", "vits16", 224), ("dinov2", "vits14", 224), ("dinov3", "vits16", 224),
   ("toyprior", "tiny8", 64)],
)  # fmt: skip
def test_the_compiled_flops_are_the_analytic_ones(kind, size, side):
  model = nnx.eval_shape(lambda: priors.create(kind, size, rngs=nnx.Rngs(0)))
  prior = priors.from_module(model, priors.quarter_levels(model.depth), "abstract")
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
  text = compiled(lambda prior, image: prior.levels(image), prior, image)
  patches = side // model.patch
  least = 2 * model.macs(patches, patches, prior.blocks)
  # Both sides: a CPU's compiler rewrites the products within attention, which lose their scope.
  assert sum(hlo.flops(text, priors.SCOPE).values()) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_never_reach_a_prior(kind):
  """Neither its weights nor the image get any, and no backward pass of it is compiled."""
  model = make(kind)
  prior = priors.from_module(model, (0, model.depth - 1), "random")
  image = np.random.default_rng(0).uniform(0, 255, (1, 2 * model.patch, model.patch, 3))
  image = jnp.asarray(image, jnp.float32)

  def loss(weights, image, scale):
    levels = dataclasses.replace(prior, weights=weights).levels(image)
    return sum(jnp.square(level * scale).sum() for level in levels)

  gradients = jax.grad(loss, (0, 1, 2))
  weights, of_image, scale = jax.jit(gradients)(prior.weights, image, 2.0)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves((weights, of_image)))
  assert scale > 0
  texts = [compiled(f, prior.weights, image, 2.0) for f in (gradients, loss)]
  backward, forward = (sum(hlo.flops(text, priors.SCOPE).values()) for text in texts)
  assert backward == forward > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_prior_has_gradients_of_all_it_trains(kind):
  model = load(foundation.state_dict(make(kind)), kind, variable=nnx.Param)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  image = image_of(model, 1, 2)

  def total(params, rest, image):
    return jnp.square(nnx.merge(graph, params, rest)(image, (model.depth - 1,))[0][..., 0]).sum()

  gradient = nnx.to_flat_state(jax.jit(jax.grad(total))(params, rest, image))
  still = {"/".join(map(str, path)) for path, leaf in gradient if not np.any(leaf[...])}
  assert not still
  assert {path[-1] for path, _ in nnx.to_flat_state(rest)} == (
    {"periods"} if kind == "dinov3" else set()
  )


@pytest.mark.parametrize("kind", KINDS)
def test_the_bank_holds_the_levels_of_every_kind(kind, tmp_path):
  crops = data.CropBank(data.scenes(2, 64, seed=1), per_image=1, size=28, seed=0)
  prior = priors.from_module(make(kind), (0, 1), "0" * 64)
  made = bank.Bank(tmp_path, crops, prior)
  made.prepare(0, 2, mesh.make(1), progress=False)
  image = np.stack([crops.crop(number)[0] for number in (1, 0)])
  expected = jax.jit(lambda prior, image: prior.levels(image))(prior, image)
  for ours, theirs in zip(made.levels([1, 0]), expected, strict=True):
    side = -(-28 // prior.patch)
    assert ours.shape == (2, side, side, prior.width)
    np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=2**-8, atol=1e-5)
  numbers = priors.Normalisation((0.1, 0.1, 0.1), (0.2, 0.2, 0.2))
  other = dataclasses.replace(prior, prepare=priors.Preparation(prior.patch, numbers))
  with pytest.raises(ValueError, match="normalisation: "):
    bank.Bank(tmp_path, crops, other)


def test_a_bank_from_before_normalisation_was_a_setting_is_still_read(tmp_path):
  crops = data.CropBank(data.scenes(1, 64, seed=1), per_image=1, size=28, seed=0)
  prior = priors.from_module(make("dinov2"), (0,), "0" * 64)
  bank.Bank(tmp_path, crops, prior).prepare(0, 1, mesh.make(1), progress=False)
  path = tmp_path / "generation_0" / "bank.json"
  about = json.loads(path.read_text())
  del about["normalisation"]
  path.write_text(json.dumps(about))
  bank.Bank(tmp_path, crops, prior)
  numbers = priors.NORMALISATIONS["satellite"]
  other = dataclasses.replace(prior, prepare=priors.Preparation(prior.patch, numbers))
  with pytest.raises(ValueError, match="normalisation: "):
    bank.Bank(tmp_path, crops, other)


# Rotary positions.


def test_coordinates_fill_each_axis_whatever_the_shape():
  sin, cos = transformer.rope_table(2, 3, jnp.array([1.0, 100.0]))
  # Row 1 of 2 is at y = 0.5, column 2 of 3 at x = 2/3; y over all periods first, all of it twice.
  angles = 2 * np.pi * np.array([0.5, 0.5 / 100, 2 / 3, 2 / 3 / 100] * 2)
  np.testing.assert_allclose(sin[5], np.sin(angles), atol=1e-6)
  np.testing.assert_allclose(cos[5], np.cos(angles), atol=1e-6)


def test_only_patches_turn_and_halves_are_paired():
  x = np.random.default_rng(0).standard_normal((2, 5, 3, 4)).astype(np.float32)
  angle = np.random.default_rng(1).standard_normal((3, 2)).astype(np.float32)
  angle = np.concatenate([angle, angle], 1)
  turned = transformer.rotate(jnp.asarray(x), jnp.sin(angle), jnp.cos(angle))
  np.testing.assert_array_equal(turned[:, :2], x[:, :2])
  pairs = x[:, 2:, :, :2] + 1j * x[:, 2:, :, 2:]
  pairs = pairs * np.exp(1j * angle[None, :, None, :2])
  expected = np.concatenate([pairs.real, pairs.imag], -1)
  np.testing.assert_allclose(turned[:, 2:], expected, atol=1e-6)


def test_bfloat16_is_turned_in_float32():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 2, 8)), jnp.bfloat16)
  table = transformer.rope_table(2, 3, dinov3.periods(2))
  assert all(t.dtype == jnp.float32 for t in table)
  turned = transformer.rotate(x, *table)
  assert turned.dtype == jnp.bfloat16
  exact = transformer.rotate(x.astype(jnp.float32), *table)
  np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind):
  model = make(kind)
  half = load(foundation.state_dict(model), kind, dtype=jnp.bfloat16)
  assert half.dtype == jnp.bfloat16
  image, levels = image_of(model), (0, model.depth - 1)
  ours, theirs = (maps_of(m, image, levels) for m in (half, model))
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == jnp.float32
    assert relative_error(a, np.asarray(b)) < 0.02


def test_the_key_bias_of_dinov3_never_counts():
  model = make("dinov3")
  image = image_of(model)
  before = run(model, image)[0]
  model.blocks.qkv.bias[...] = model.blocks.qkv.bias[...].at[:, 96:192].set(3.0)
  for a, b in zip(run(model, image)[0], before, strict=True):
    np.testing.assert_array_equal(a, b)
  state = foundation.state_dict(model)
  assert not np.any(flat(load(state, "dinov3"))["blocks/qkv/bias"][:, 96:192])
  # The stored mask is not read: it is NaN where it was never filled.
  masks = {f"blocks.{i}.attn.qkv.bias_mask": np.full(288, np.nan, np.float32) for i in range(4)}
  loaded = load({**state, **masks}, "dinov3")
  np.testing.assert_array_equal(run(loaded, image)[0][0], before[0])


# Files.


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_recognised_and_comes_back_unchanged(kind):
  model = make(kind)
  state = foundation.state_dict(model)
  loaded = load(state, kind)
  assert type(loaded) is priors.model_class(kind)
  assert_same(loaded, model)
  back = foundation.state_dict(loaded)
  assert set(back) == set(state)
  assert all(np.array_equal(back[name], array) for name, array in state.items())


@pytest.mark.parametrize("kind", ["dino", "dinov3", "dinov3-gated"])
def test_every_naming_gives_the_same_network(kind):
  kind, _, gated = kind.partition("-")
  model = make(kind, **({"swiglu": True, "hidden": 64} if gated else {}))
  state = foundation.state_dict(model)
  hub, memory = (formula.renamed(state, load_names(kind), c) for c in ("hub", "memory5"))
  training = {f"teacher.backbone.{name}": array for name, array in state.items()}
  training |= {f"student.module.backbone.{name}": array * 0 for name, array in state.items()}
  training["teacher.head.mlp.0.weight"] = np.zeros((2, 2), np.float32)
  training["teacher.head.last_layer.weight_g"] = np.zeros((2, 1), np.float32)
  classifier = {f"vit.{name}": array for name, array in hub.items()}
  classifier["classifier.weight"] = np.zeros((2, 2), np.float32)
  wrapped = {f"module.backbone.{name}": array for name, array in state.items()}
  wrapped["module.head.mlp.0.weight"] = np.zeros((2, 2), np.float32)
  others = [hub, memory, training, classifier, wrapped]
  if kind == "dinov3":
    mask = np.zeros((1, model.width), np.float32)
    norm = {f"local_cls_norm.{name}": mask[0] for name in ("weight", "bias")}
    others.append({**state, "mask_token": mask, **norm})
  for other in others:
    assert_same(load(other, kind), model)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_as_transformers_5_holds_it_in_memory_loads(gated):
  model = make("dinov2", **({"swiglu": True} if gated else {"registers": 4}))
  renamed = {}
  for name, array in foundation.state_dict(model).items():
    name = name.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.o_proj")
    for outside in ("cls_token", "register_tokens"):
      name = name.replace(outside, f"embeddings.{outside}")
    name = name.replace("pos_embed", "embeddings.position_embeddings")
    name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
    name = name.replace("ls1.gamma", "layer_scale1.lambda1").replace(
      "ls2.gamma", "layer_scale2.lambda1"
    )
    name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
    name = name.replace("mlp.w3", "mlp.down_proj")
    for old, parts in (
      ("attn.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
      ("mlp.w12", ("mlp.gate_proj", "mlp.up_proj")),
    ):
      if old in name:
        pieces = zip(parts, np.split(array, len(parts)), strict=True)
        renamed |= {name.replace(old, part): piece for part, piece in pieces}
        break
    else:
      renamed[name] = array
  assert_same(load(renamed, "dinov2"), model)


def test_the_largest_dinov3_needs_no_biases_and_others_do(monkeypatch):
  state = foundation.state_dict(make("dinov3", width=256, depth=1, heads=2, swiglu=True, hidden=8))
  del state["blocks.0.attn.qkv.bias"]
  with pytest.raises(ValueError, match="blocks.0.attn.qkv.bias: missing"):
    converters.load_prior(state)
  monkeypatch.setattr(convert_dinov3, "NO_BIAS_WIDTH", 256)  # ViT-7B's is 4096
  loaded = converters.load_prior(state)
  assert loaded.blocks.heads == 2 and not np.any(loaded.blocks.qkv.bias[...])
  del state["rope_embed.periods"]
  assert converters.load_prior(state).blocks.heads == 2


def names(*found):
  return {name: np.zeros(3, np.float32) for name in found}


@pytest.mark.parametrize(
  ("state", "message"),
  [
    (names("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"), "a ConvNeXt"),
    (names("model.stages.0.layers.0.depthwise_conv.weight"), "a ConvNeXt"),
    (names("patch_embed.proj.0.0.weight", "blocks.0.attn.temperature"), "an XCiT"),
    (names("conv1.weight", "layer1.0.conv1.weight"), "a ResNet"),
    (names("text_model.backbone.blocks.0.norm1.weight"), "a model with a text tower"),
    (names("visual.class_embedding", "visual.conv1.weight"), "a CLIP"),
    (names("image_encoder.blocks.0.attn.rel_pos_h"), "a SAM"),
    (names("decoder_embed.weight", "blocks.0.norm1.weight"), "a masked autoencoder"),
    (names("reg_token", "blocks.0.gamma_1"), "timm's own naming"),
    (names("stem.weight"), r"not a foundation model that is covered \(DINOv1, DINOv2, DINOv3, "),
    ({}, "not a foundation model that is covered"),
  ],
)
def test_another_model_is_refused_by_what_it_looks_like(state, message):
  with pytest.raises(ValueError, match=message):
    converters.load_prior(state)


def test_one_kind_asked_for_says_which_other_one_it_got():
  state = foundation.state_dict(make("dino"))
  with pytest.raises(ValueError, match=r"(?s)not a DINOv2 .*ls1.*looks like DINOv1; use conv"):
    converters.load_dinov2(state, heads=4)


@pytest.mark.parametrize("kind", ["dino", "dinov3"])
def test_every_problem_of_a_file_is_in_one_message(kind):
  state = foundation.state_dict(make(kind))
  del state["blocks.1.norm1.weight"]
  state["blocks.0.mlp.fc2.weight"] = state["blocks.0.mlp.fc2.weight"][:, 1:]
  state["norm.weight"] = state["norm.weight"].astype(np.int64)
  state["head.weight"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match="4 conversion problems") as error:
    load(state, kind)
  for line in ("blocks.1.norm1.weight: missing; it fills blocks/norm1/scale", "(96, 383) instead",
               "norm.weight: int64", "head.weight: unknown"):  # fmt: skip
    assert line in str(error.value)


def test_the_command_converts_any_kind(tmp_path, capsys):
  from safetensors.numpy import save_file

  for kind in KINDS[:3]:
    model = make(kind, width=128, heads=2)
    source, out = tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}_out.safetensors"
    save_file(foundation.state_dict(model), source)
    assert foundation.main([str(source), str(out)]) == 0
    assert foundation.fingerprint(out) == foundation.fingerprint(source)
    assert_same(converters.load_prior(out), model)
  assert foundation.main([]) == 2
  assert "python -m converters IN OUT" in capsys.readouterr().err
  done = subprocess.run(
    [sys.executable, "-m", "converters", source, tmp_path / "x.pth"], capture_output=True, text=True
  )
  assert done.returncode == 2 and "name it x.safetensors" in done.stderr


def test_a_prior_without_a_converter_says_what_to_write(monkeypatch):
  monkeypatch.setattr(converters, "__path__", converters.__path__[:1])
  sys.modules.pop("converters.toyprior", None)
  with pytest.raises(ValueError, match="write converters/toyprior.py with a TABLE"):
    foundation.table("toyprior")


def test_a_run_takes_any_kind_by_its_file(tmp_path):
  from safetensors.numpy import save_file

  path = tmp_path / "dinov3_vits16.safetensors"
  save_file(foundation.state_dict(make("dinov3", width=64, heads=1)), path)
  prior = build.load_prior(toy_config(**{"prior.checkpoint": str(path)}))
  assert isinstance(prior.model, dinov3.DINOv3) and prior.blocks == (0, 1, 2, 3)
  assert prior.sha256 == foundation.fingerprint(path)
  # 32 px crops of a run are whole patches of 16; others are resized to the next ones.
  image = jax.ShapeDtypeStruct((1, 40, 32, 3), jnp.uint8)
  levels = jax.eval_shape(lambda prior, image: prior.levels(image), prior, image)
  assert levels[0].shape == (1, 3, 2, 64)
  assert dinov2.prepare(np.zeros((1, 14, 14, 3))).shape == (1, 14, 14, 3)
