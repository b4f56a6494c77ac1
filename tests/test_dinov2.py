"""DINOv2: golden outputs of the published code, the converter, and what both must refuse."""

import subprocess
import sys

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from goldens import Golden
from helpers import relative_error

import converters
from converters import dinov2 as convert_dinov2
from fdep_jax.priors import dinov2


def make(**sizes):
  """A network of random weights, all other than their initial values; heads are 64 wide."""
  sizes = {"width": 128, "depth": 2, "heads": 2, "grid": 5, **sizes}
  vit = nnx.eval_shape(lambda: dinov2.DINOv2(**sizes, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  for path, leaf in nnx.to_flat_state(nnx.state(vit)):
    values = rng.standard_normal(leaf.shape).astype(np.float32)
    scale = leaf.shape[-2] ** -0.5 if path[-1] == "kernel" else 0.2
    leaf.set_value(jnp.asarray(scale * values + (path[-1] in ("scale", "scale1", "scale2"))))
  return vit


def run(vit, image, levels=None):
  """The normalised maps, and all tokens before the norm, of one compiled call."""
  graph, state = nnx.split(vit)

  @jax.jit
  def both(state, image):  # the weights are an argument: as constants they take long to compile
    network = nnx.merge(graph, state)
    tokens = network.tokens(image, levels)
    return [network.feature_map(t, image.shape) for t in tokens], tokens

  return both(state, image)


@pytest.fixture(scope="module")
def tiny():
  return make(depth=3)


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(0).standard_normal((2, 28, 42, 3)).astype(np.float32)


# Golden outputs of facebookresearch/dinov2 in float64. The bar is 1e-4; measured 2e-6 at most.

BAR = 1e-5


@pytest.mark.parametrize(
  "name",
  [
    "vits14",
    "vits14_reg",
    pytest.param("vitb14", marks=pytest.mark.slow),
    "vitl14",
    pytest.param("vitg14", marks=pytest.mark.slow),
  ],
)
def test_outputs_equal_the_published_network_on_formula_weights(name):
  golden = Golden("dinov2", name)
  kept = tuple(f"blocks.{i}." for i in range(int(golden.facts["blocks_kept"])))
  manifest = {
    k: v for k, v in golden.manifest.items() if not k.startswith("blocks.") or k.startswith(kept)
  }
  vit = converters.load_dinov2(formula.weights(manifest))
  assert vit.depth == golden.facts["blocks_kept"]
  levels = tuple(golden.facts["levels"].tolist())
  compared = set()
  for height, width in ((224, 224), (98, 154)):
    size = f"{height}x{width}"
    x = formula.image((1, 3, height, width), 0).transpose(0, 2, 3, 1)
    maps, tokens = run(vit, x, levels)
    ours = {f"{size}_pos": vit.position_embedding(height // 14, width // 14)[0, ::5]}
    for i, (level, raw) in enumerate(zip(maps, tokens, strict=True)):
      assert level.shape == (1, height // 14, width // 14, vit.width)
      ours[f"{size}_level{i}_norm"] = level.reshape(-1, vit.width)[::7]
      ours[f"{size}_level{i}_raw"] = raw[0, 1 + vit.registers :][::29]
    for key, array in ours.items():
      assert golden.error(key, array) <= BAR, key
    compared |= set(ours)
  assert compared == set(golden.keys)


def test_the_pretrained_file_has_the_published_outputs_and_is_converted(shared, tmp_path):
  golden = np.load(shared / "golden" / "dinov2" / "vits14_pretrained.npz")
  source = shared / "weights" / "dinov2_vits14_pretrain.pth"
  vit = converters.load_dinov2(source)
  levels = dinov2.quarter_levels(vit.depth)
  assert levels == tuple(golden["levels"])
  compared = set()
  for height, width in ((224, 224), (98, 154), (448, 448)):
    x = formula.image((1, 3, height, width), 0).transpose(0, 2, 3, 1)
    maps, _ = run(vit, x)
    for i, level in enumerate(maps):
      key = f"{height}x{width}_level{i}_norm"
      assert relative_error(level.reshape(-1, vit.width)[::11], golden[key]) <= BAR, key
      compared.add(key)
  assert compared == set(golden) - {"levels"}
  out = tmp_path / "vits14.safetensors"
  assert convert_dinov2.convert(source, out) == sha256(source)
  with safetensors.safe_open(out, framework="np") as file:
    assert file.metadata()["sha256"] == sha256(source)
  original, converted = converters.read_torch(source), converters.read_torch(out)
  assert set(original) - set(converted) == {"mask_token"}
  assert all(np.array_equal(array, original[name]) for name, array in converted.items())


# Sizes and position embeddings.


@pytest.mark.parametrize(
  ("name", "registers", "parameters"),
  [
    # As torch.hub's models have, less `mask_token` (one width), which nothing here uses.
    ("vits14", 0, 22_056_576 - 384),
    ("vits14", 4, 22_058_112 - 384),
    ("vitb14", 0, 86_580_480 - 768),
    ("vitl14", 0, 304_368_640 - 1024),
    ("vitg14", 0, 1_136_480_768 - 1536),
  ],
)
def test_the_sizes_have_the_published_parameter_counts(name, registers, parameters):
  vit = nnx.eval_shape(
    lambda: dinov2.DINOv2(**dinov2.SIZES[name], registers=registers, rngs=nnx.Rngs(0))
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(vit))) == parameters


@pytest.mark.parametrize(
  ("depth", "levels"),
  [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (40, (9, 19, 29, 39)), (3, (0, 1, 2, 2))],
)
def test_quarter_levels_are_the_last_blocks_of_the_quarters(depth, levels):
  assert dinov2.quarter_levels(depth) == levels


@pytest.mark.parametrize("registers", [0, 4])
def test_the_native_grid_is_returned_untouched(registers):
  vit = make(width=64, depth=1, heads=1, registers=registers)
  stored = np.concatenate([vit.class_position[...], vit.position[...].reshape(1, 25, 64)], 1)
  np.testing.assert_array_equal(vit.position_embedding(5, 5), stored)
  # 25 patches too, but not square: interpolated.
  assert not np.array_equal(vit.position_embedding(1, 25), stored)


# torch 2.13, F.interpolate(mode="bicubic") in float64 of i² + 3·j on a 5×5 grid: rows 0 and 3 of
# column 2, by scale_factor ((h + 0.1)/5, (w + 0.1)/5), and by size with antialias.
POSITIONS = {
  (0, 4, 3): (10.937392, 25.570724),
  (0, 7, 9): (2.385203, 6.261779),
  (4, 4, 3): (10.971282, 25.877805),
  (4, 7, 9): (2.577491, 6.635744),
}


@pytest.mark.parametrize(("registers", "height", "width"), POSITIONS)
def test_positions_of_smaller_and_larger_images_are_interpolated_as_pytorch_does(
  registers, height, width
):
  vit = make(width=64, depth=1, heads=1, registers=registers)
  row, column = np.mgrid[:5, :5]
  vit.position[...] = jnp.broadcast_to((row**2 + 3.0 * column)[..., None], (5, 5, 64))
  ours = vit.position_embedding(height, width)[0, 1:].reshape(height, width, 64)
  np.testing.assert_allclose(ours[[0, 3], 2, 7], POSITIONS[registers, height, width], atol=2e-5)


def test_prepare_resizes_to_the_next_multiples_and_normalises():
  image = np.full((1, 28, 28, 3), 0.5, np.float32)
  expected = (0.5 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
  np.testing.assert_allclose(dinov2.prepare(image)[0, 3, 5], expected, rtol=1e-5)
  ramp = np.broadcast_to(np.arange(7.0).reshape(1, 1, 7, 1), (1, 14, 7, 3))
  prepared = dinov2.prepare(ramp) * 0.229 + 0.485
  assert prepared.shape == (1, 14, 14, 3)
  # Twice as fine: half-pixel centres at −0.25 (the border's value), 0.25, 0.75 …
  np.testing.assert_allclose(
    prepared[0, 0, :, 0], np.clip(np.arange(14) / 2 - 0.25, 0, 6), atol=1e-5
  )
  assert dinov2.prepare(np.zeros((2, 15, 30, 3))).shape == (2, 28, 42, 3)


# The module.


def test_a_call_gives_the_feature_maps_of_its_tokens(tiny, image):
  for ours, expected in zip(jax.jit(tiny)(image), run(tiny, image, (0, 1, 2, 2))[0], strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_levels_come_in_the_order_asked_for_and_may_repeat(tiny, image):
  first, second, last = run(tiny, image, (0, 1, 2))[0]
  again = run(tiny, image, (2, 0, 2))[0]
  for ours, expected in zip(again, (last, first, last), strict=True):
    np.testing.assert_array_equal(ours, expected)
  assert first.shape == (2, 2, 3, 128) and first.dtype == jnp.float32
  assert relative_error(second, np.asarray(first)) > 0.1


def test_blocks_behind_the_deepest_level_are_not_run(tiny, image):
  assert "length=2" in str(jax.make_jaxpr(lambda x: tiny(x, (1, 0)))(image))
  assert "length=3" in str(jax.make_jaxpr(lambda x: tiny(x, (2,)))(image))
  broken = nnx.clone(tiny)
  broken.blocks.scale1[...] = broken.blocks.scale1[...].at[2].set(jnp.nan)
  assert all(np.isfinite(level).all() for level in run(broken, image, (0, 1))[0])
  assert np.isnan(run(broken, image, (2,))[0][0]).all()


def test_a_map_keeps_the_images_rows_and_columns(tiny):
  image = np.zeros((1, 28, 56, 3), np.float32)
  changed = image.copy()
  changed[:, 14:28, 42:56] = 1.0
  deaf = nnx.clone(tiny)  # no attention: tokens do not see each other
  deaf.blocks.project.kernel[...] = jnp.zeros_like(tiny.blocks.project.kernel[...])
  difference = np.abs(run(deaf, changed, (2,))[0][0] - run(deaf, image, (2,))[0][0]).sum((0, 3))
  np.testing.assert_array_equal(difference > 0, [[0, 0, 0, 0], [0, 0, 0, 1]])


def test_it_is_frozen_unless_asked_otherwise(tiny, image):
  assert not jax.tree.leaves(nnx.state(tiny, nnx.Param))
  graph, state = nnx.split(tiny)

  def total(state, image):
    return jnp.square(nnx.merge(graph, state)(image, (2,))[0][..., 0]).sum()

  gradient = jax.jit(jax.grad(total))(state, image)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
  trained = converters.load_dinov2(convert_dinov2.state_dict(tiny), variable=nnx.Param)
  graph, state = nnx.split(trained, nnx.Param)
  gradient = nnx.to_flat_state(jax.jit(jax.grad(total))(state, image))
  moved = {"/".join(map(str, path)) for path, leaf in gradient if np.any(leaf[...])}
  assert moved == {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def test_without_a_checkpoint_it_is_random_and_its_features_depend_on_the_image(image):
  vit = dinov2.DINOv2(width=64, depth=2, heads=4, registers=1, grid=3, rngs=nnx.Rngs(0))
  level = run(vit, image, (1,))[0][0]
  assert level.shape == (2, 2, 3, 64) and level.dtype == jnp.float32
  assert relative_error(level[0], np.asarray(level[1])) > 0.5


def test_bfloat16_stores_half_and_stays_near_float32(tiny, image):
  half = converters.load_dinov2(convert_dinov2.state_dict(tiny), dtype=jnp.bfloat16)
  assert half.blocks.qkv.kernel.dtype == jnp.bfloat16
  assert half.blocks.norm1.scale.dtype == half.position.dtype == jnp.float32
  for ours, expected in zip(run(half, image, (0, 2))[0], run(tiny, image, (0, 2))[0], strict=True):
    assert ours.dtype == jnp.float32
    assert relative_error(ours, np.asarray(expected)) < 0.012  # twice the measured 0.006


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((1, 30, 28, 3), np.float32, "Image is 30×28; DINOv2 needs multiples of 14.*prepare"),
    ((1, 28, 0, 3), np.float32, "multiples of 14"),
    ((1, 28, 28, 1), np.float32, r"\(1, 28, 28, 1\)"),
    ((28, 28, 3), np.float32, "batch"),
    ((1, 28, 28, 3), np.uint8, "uint8"),
  ],
)
def test_images_that_do_not_fit_are_refused_with_the_fix(tiny, shape, dtype, message):
  with pytest.raises(ValueError, match=message):
    tiny(np.zeros(shape, dtype))


@pytest.mark.parametrize("levels", [(3,), (-1,), (), (0, 12)])
def test_levels_that_do_not_exist_are_refused(tiny, image, levels):
  with pytest.raises(ValueError, match="0 … 2"):
    tiny(image, levels)


# The converter.


def to_hugging_face(state):
  """Hugging Face's names, as its own conversion script gives them."""
  layer = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
  }
  outside = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
  }
  renamed = {"embeddings.mask_token": np.zeros((1, 4), np.float32)}
  for name, array in state.items():
    if name in outside:
      renamed[outside[name]] = array
      continue
    _, block, rest = name.split(".", 2)
    prefix = f"encoder.layer.{block}."
    if rest.startswith("attn.qkv."):
      parts = zip(("query", "key", "value"), np.split(array, 3), strict=True)
      for part, piece in parts:
        renamed[f"{prefix}attention.attention.{part}.{rest.rsplit('.')[-1]}"] = piece
      continue
    for old, new in layer.items():
      rest = rest.replace(old, new)
    renamed[prefix + rest] = array
  return renamed


@pytest.mark.parametrize("options", [{}, {"registers": 4}, {"swiglu": True}])
def test_every_naming_gives_the_same_network(options):
  made = make(**options)
  state = convert_dinov2.state_dict(made)
  vit = converters.load_dinov2(state)
  back = convert_dinov2.state_dict(vit)
  assert set(back) == set(state)
  for name, array in state.items():
    np.testing.assert_array_equal(back[name], array)
  assert (vit.registers, vit.blocks.swiglu) == (made.registers, made.blocks.swiglu)

  chunked = {name.replace("blocks.1.", "blocks.1.1."): a for name, a in state.items()}
  teacher = {f"teacher.backbone.{name}": array for name, array in chunked.items()}
  teacher |= {f"student.backbone.{name}": array * 0 for name, array in state.items()}
  teacher["teacher.dino_head.mlp.0.weight"] = np.zeros((2, 2), np.float32)
  classifier = {f"dinov2.{name}": array for name, array in to_hugging_face(state).items()}
  classifier["classifier.weight"] = np.zeros((2, 2), np.float32)
  for other in (
    to_hugging_face(state),
    teacher,
    classifier,
    {**state, "mask_token": state["norm.bias"]},
  ):
    again = convert_dinov2.state_dict(converters.load_dinov2(other))
    for name, array in state.items():
      np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("hugging_face", [False, True])
def test_every_problem_of_a_checkpoint_is_in_one_message(tiny, hugging_face):
  state = convert_dinov2.state_dict(tiny)
  if hugging_face:
    state = to_hugging_face(state)
    missing, short, integer = (
      "encoder.layer.1.attention.attention.key.bias",
      "encoder.layer.0.mlp.fc2.weight",
      "layernorm.weight",
    )
  else:
    missing, short, integer = "blocks.1.ls1.gamma", "blocks.0.mlp.fc2.weight", "norm.weight"
  del state[missing]
  state[short] = state[short][:, 1:]
  state[integer] = state[integer].astype(np.int64)
  state["norm3.bias"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match="4 conversion problems") as error:
    converters.load_dinov2(state)
  for expected in (
    f"{missing}: missing; it fills blocks/",
    rf"{short}: float32(128, 511) instead of floats (128, 512)",
    f"{integer}: int64(128,) instead of floats (128,)",
    "norm3.bias: unknown",
  ):
    assert expected in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda state: {"conv.weight": state["norm.bias"]}, "not a DINOv2 checkpoint: neither"),
    (lambda state: {}, "not a DINOv2 checkpoint: neither"),
    (lambda state: {**state, "pos_embed": state["pos_embed"][:, 1:]}, r"1 \+ n²"),
    (lambda state: {k: v for k, v in state.items() if k != "pos_embed"}, "pos_embed is missing"),
    (lambda state: {k: v for k, v in state.items() if "blocks" not in k}, "there is no blocks.0"),
    (lambda state: {k: v for k, v in state.items() if "s.1." not in k}, "14 conversion problems"),
    (lambda state: {f"{p}.{k}": v for p in "ab" for k, v in state.items()}, "several networks"),
    (
      lambda state: {**state, "patch_embed.proj.weight": state["patch_embed.proj.weight"][0]},
      r"not \(width, 3, patch, patch\)",
    ),
  ],
)
def test_a_state_dict_that_is_no_dinov2_is_refused(tiny, change, message):
  with pytest.raises(ValueError, match=message):
    converters.load_dinov2(change(convert_dinov2.state_dict(tiny)))


def test_a_width_without_64_channels_a_head_needs_the_heads():
  state = convert_dinov2.state_dict(make(width=48, depth=1, heads=3))
  with pytest.raises(ValueError, match="give `heads`"):
    converters.load_dinov2(state)
  assert converters.load_dinov2(state, heads=3).blocks.heads == 3
  with pytest.raises(ValueError, match="5 heads"):
    dinov2.DINOv2(width=48, depth=1, heads=5, rngs=nnx.Rngs(0))


# python -m converters.dinov2 IN OUT


@pytest.fixture
def source(tmp_path, tiny):
  path = tmp_path / "in.safetensors"
  safetensors.numpy.save_file(to_hugging_face(convert_dinov2.state_dict(tiny)), path)
  return path


def sha256(path):
  done = subprocess.run(["sha256sum", path], capture_output=True, check=True, text=True)
  return done.stdout.split()[0]


def test_a_converted_file_loads_alike_and_carries_its_sources_sha256(tmp_path, source, tiny, image):
  out = tmp_path / "out.safetensors"
  done = subprocess.run(
    [sys.executable, "-m", "converters.dinov2", source, out], capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert sha256(source) in done.stdout
  assert convert_dinov2.fingerprint(source) == convert_dinov2.fingerprint(out) == sha256(source)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]
  expected = run(tiny, image, (0, 2))[0]
  for ours, level in zip(run(converters.load_dinov2(out), image, (0, 2))[0], expected, strict=True):
    np.testing.assert_array_equal(ours, level)
  # The converted file is upstream's state_dict, but for the mask token.
  assert set(converters.read_torch(out)) == set(convert_dinov2.state_dict(tiny))
  # Again: the same file, nothing to do. From the converted file: still the first source's hash.
  changed = out.stat().st_mtime_ns
  assert convert_dinov2.main([str(source), str(out)]) == 0 and out.stat().st_mtime_ns == changed
  assert convert_dinov2.convert(out, tmp_path / "again.safetensors") == sha256(source)


def test_the_converter_leaves_nothing_behind_when_it_refuses(tmp_path, source, capsys):
  taken = tmp_path / "taken.safetensors"
  taken.write_bytes(b"something else")
  (tmp_path / "bad.pth").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  out = tmp_path / "out.safetensors"
  for arguments, message in (
    ([], "Usage"),
    ([tmp_path / "none.pth", out], "no such file"),
    ([tmp_path / "bad.pth", out], "posix.system refused"),
    ([source, tmp_path / "out.pth"], "name it out.safetensors"),
    ([source, tmp_path / "folder" / "out.safetensors"], "no such folder"),
    ([source, taken], "remove or rename"),
  ):
    assert convert_dinov2.main([str(argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_converted_file_that_gives_other_outputs_is_not_kept(tmp_path, source, monkeypatch):
  def off_by_a_bit(vit, original=convert_dinov2.state_dict):
    state = original(vit)
    return {**state, "blocks.1.mlp.fc2.bias": state["blocks.1.mlp.fc2.bias"] + np.float32(1e-3)}

  monkeypatch.setattr(convert_dinov2, "state_dict", off_by_a_bit)
  with pytest.raises(ValueError, match="its outputs differ"):
    convert_dinov2.convert(source, tmp_path / "out.safetensors")
  assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
