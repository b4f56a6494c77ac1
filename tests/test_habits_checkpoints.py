"""Weight files as people have them: prefixes, torch.compile, EMA, training files, damage."""

import re

import numpy as np
import pytest
from flax import nnx
from helpers import mapping, whole, write_zip
from safetensors.numpy import save_file

import converters
from converters import dinov2 as convert_dinov2
from converters import rules
from fdep_jax import backbones
from fdep_jax import detector as detector_lib
from fdep_jax.priors import dinov2


@pytest.fixture(scope="module")
def weights():
  return converters.to_torch(backbones.create("acm", rngs=nnx.Rngs(0)))


def prefixed(weights, prefix):
  return {prefix + name: array for name, array in weights.items()}


PREFIXES = (
  "", "module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "model.module.",
  "ema_state_dict.", "state_dict.model.backbone.", "segmentor.", "student.net.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_one_prefix_below_which_the_names_fit_is_found(prefix, weights):
  net = converters.load_backbone("acm", prefixed(weights, prefix))
  found = converters.to_torch(net)
  for name in ("stem.1.weight", "head.block.4.bias"):
    np.testing.assert_array_equal(found[name], weights[name])


def test_marks_of_torch_compile_inside_names_are_dropped(weights):
  inside = {n.replace("layer1.", "layer1._orig_mod."): a for n, a in weights.items()}
  converters.load_backbone("acm", inside)


def test_two_whole_networks_in_one_file_are_named(weights):
  both = prefixed(weights, "model.") | prefixed(weights, "ema.")
  with pytest.raises(ValueError, match="two networks acm in it, below 'model.' and 'ema.'"):
    converters.load_backbone("acm", both)


def test_other_tensors_beside_the_prefix_are_refused(weights):
  with pytest.raises(ValueError, match="aux.weight: unknown"):
    converters.load_backbone("acm", prefixed(weights, "net.") | {"aux.weight": np.ones(3)})


def test_a_file_of_another_network_shows_both_sides_in_twenty_lines(weights):
  other = {f"backbone.conv{i}.weight": np.ones(3, np.float32) for i in range(50)}
  with pytest.raises(ValueError) as info:
    converters.load_backbone("acm", other)
  lines = str(info.value).splitlines()
  assert len(lines) == 19  # a title and how many more there are
  assert sum("missing" in line for line in lines) == 8
  assert sum("backbone.conv" in line for line in lines) == 9


def test_weights_that_are_not_finite_are_refused(weights):
  name = "head.block.4.weight"
  bad = weights | {name: weights[name] * np.float32(np.nan)}
  with pytest.raises(ValueError, match=f"{name}: .* values are NaN or infinite"):
    converters.load_backbone("acm", bad)


def test_a_file_that_is_cut_off_says_so(tmp_path):
  array = np.ones((64, 64), np.float32)
  path = write_zip(tmp_path / "a.pth", mapping({"w": whole(array, "0")}), {"0": array})
  save_file({"w": array, "v" * 300: array}, tmp_path / "b.safetensors")
  for name, parts in (("a.pth", (0.5, 0.9)), ("b.safetensors", (0.001, 0.01, 0.5, 0.99))):
    content = (tmp_path / name).read_bytes()
    assert converters.read_torch(path if name == "a.pth" else tmp_path / name)
    for part in parts:
      cut = tmp_path / f"cut_{name}"
      cut.write_bytes(content[: max(int(part * len(content)), 20)])
      with pytest.raises(ValueError, match="(cut off|not a whole).*download it again"):
        converters.read_torch(cut)


# DINOv2.


@pytest.fixture(scope="module")
def vit():
  small = dinov2.DINOv2(width=64, depth=2, heads=1, grid=3, rngs=nnx.Rngs(0))
  return convert_dinov2.state_dict(small)


def test_a_training_checkpoint_of_dinov2_gives_its_teacher(vit):
  state = prefixed(vit, "teacher.backbone._fsdp_wrapped_module.")
  state |= {name: 0 * array for name, array in prefixed(vit, "student.backbone.").items()}
  state |= {f"{part}.dino_head.mlp.0.weight": np.ones((2, 2)) for part in ("teacher", "student")}
  state |= {"dino_loss.center": np.zeros((1, 8)), "ibot_patch_loss.center": np.zeros((1, 1, 8))}
  found = convert_dinov2.state_dict(converters.load_dinov2(state))
  for name, array in vit.items():
    np.testing.assert_array_equal(found[name], array, name)


def test_a_dinov2_without_its_last_block_is_refused(vit, monkeypatch, tmp_path):
  monkeypatch.setitem(dinov2.SIZES, "toy", {"width": 64, "depth": 2, "heads": 1})
  save_file(vit, tmp_path / "whole.safetensors")
  converters.load_dinov2(tmp_path / "whole.safetensors")
  cut = {name: array for name, array in vit.items() if not name.startswith("blocks.1.")}
  save_file(cut, tmp_path / "cut.safetensors")
  with pytest.raises(ValueError, match="has 1 blocks, and a DINOv2 of width 64 has 2: it is cut"):
    converters.load_dinov2(tmp_path / "cut.safetensors")


def test_dinov2_weights_that_are_not_finite_are_refused(vit):
  for name, value in (("norm.weight", np.inf), ("pos_embed", np.nan)):  # no rule fills the second
    bad = vit | {name: np.full_like(vit[name], value)}
    with pytest.raises(ValueError, match=f"{name}: {vit[name].size} values are NaN or infinite"):
      converters.load_dinov2(bad)


# --checkpoint.


def test_a_file_that_is_no_checkpoint_of_ours_gets_the_reason(tmp_path, weights):
  save_file(weights, tmp_path / "light_torch.safetensors", {"fdep_jax": "{}"})
  save_file(weights, tmp_path / "other.safetensors")
  (tmp_path / "light.onnx").write_bytes(b"\x08\x09")
  (tmp_path / "acm.pth.tar").write_bytes(b"PK\x03\x04")
  for name, said in (
    ("light_torch.safetensors", "for PyTorch. Take light.safetensors beside it, or .*--backbone"),
    ("other.safetensors", "lacks the settings of a run. If .* name its network, --backbone NAME"),
    ("light.onnx", "is a file. --checkpoint takes best, last"),
    ("acm.pth.tar", "If it is a file for PyTorch, name its network, --backbone NAME"),
  ):
    with pytest.raises(ValueError) as info:
      detector_lib.load(None, tmp_path / name)
    assert re.search(said, str(info.value)) and "KeyError" not in str(info.value)


def test_a_shortened_list_of_problems_keeps_both_sides():
  missing, unknown = [f"{i}: missing" for i in range(30)], [f"{i}: unknown, no" for i in range(3)]
  found = rules.listing(missing + unknown)
  assert found == [*missing[:14], *unknown, "… and 16 more"]
  assert rules.listing(unknown) == unknown
