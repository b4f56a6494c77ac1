"""Files of untrained ViTs: of the right shape, different by seed, refused where they must be."""

import numpy as np
import pytest

import converters
from converters import untrained
from converters.dinov2 import fingerprint
from fdep_jax.priors import dinov2

SMALL = {"width": 128, "depth": 4, "heads": 2}


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(dinov2.SIZES, "vits14", SMALL)


def test_the_file_loads_as_any_other_of_its_size(small, tmp_path):
  path = tmp_path / "untrained_vits14_seed3.safetensors"
  assert untrained.main(["vits14", "3", str(path)]) == 0
  vit = converters.load_dinov2(path)
  assert (vit.width, vit.depth, vit.patch, vit.grid) == (128, 4, 14, 37)
  image = np.random.default_rng(0).standard_normal((1, 28, 28, 3)).astype(np.float32)
  levels = np.stack(vit(image, levels=(0, 1, 2, 3)))
  assert np.isfinite(levels).all()
  # Every level ends in a LayerNorm; each is another map.
  np.testing.assert_allclose(levels.std(-1), 1, atol=0.01)
  flat = levels.reshape(4, -1)
  assert (np.corrcoef(flat) - np.eye(4)).max() < 0.95
  assert list(tmp_path.iterdir()) == [path]


def test_seeds_differ_and_one_seed_is_one_file(small, tmp_path):
  paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "again")]
  for path, seed in zip(paths, (0, 1, 0), strict=True):
    untrained.write("vits14", seed, path)
  a, b, again = map(fingerprint, paths)
  assert a == again != b


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("vitz14", 0, "a.safetensors"), "must be one of vits14"),
    (("vits14", -1, "a.safetensors"), "whole number from 0"),
    (("vits14", 0, "a.pth"), "name it a.safetensors"),
    (("vits14", 0, "nowhere/a.safetensors"), "no such folder"),
  ],
)
def test_what_cannot_be_is_refused(small, tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    untrained.write(*arguments)
  assert not list(tmp_path.iterdir())


def test_the_command_line_says_how_it_is_used(capsys):
  assert untrained.main(["vits14", "one", "a.safetensors"]) == 2
  assert "SIZE SEED OUT" in capsys.readouterr().err
