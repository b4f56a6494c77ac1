"""`train.init_from`: a training starts from the weights of an earlier one."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import parts, toy_backbone, toy_config

from fdep_jax import backbones, build, detector, export, settings, start, train
from fdep_jax.runtime import checkpoint

WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat)
RUN = "train.init_from"


def weights_of(model) -> dict[str, np.ndarray]:
  return {k: np.asarray(v) for k, v in checkpoint.flatten(nnx.state(model, WEIGHTS)).items()}


def distinct(model, seed: int = 0) -> dict[str, np.ndarray]:
  """Gives every weight of a model a value that no other has; returns them."""
  rng = np.random.default_rng(seed)
  state = nnx.state(model, WEIGHTS)
  nnx.update(model, jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), state))
  return weights_of(model)


def made(seed: int = 1, **changes):
  return parts(toy_config(seed=seed, **changes))[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of four steps with both branches."""
  folder = tmp_path_factory.mktemp("init") / "run"
  with toy_backbone():
    train.train(toy_config(**{"train.steps": 4}), folder)
  return folder


def same(found: dict, expected: dict, names) -> None:
  for name in names:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_light_branch_fills_the_network_and_both_sets_of_statistics(toy):
  given = distinct(build.create_model(toy_config(mode="original"), None))
  model = made()
  before = weights_of(model)
  start.fill(model, given, "x")
  after = weights_of(model)
  same(after, given, given)
  new = [name for name in after if name.startswith("fusion/")]
  same(after, before, new)
  stats = [name for name in after if name.startswith("main_stats/")]
  assert new and stats and len(given) + len(new) + len(stats) == len(after)
  for name in stats:
    own = "backbone/" + name.removeprefix("main_stats/")
    np.testing.assert_array_equal(after[name], given[own])


def test_both_branches_fill_everything(toy):
  given = distinct(made(seed=0))
  model = made()
  start.fill(model, given, "x")
  same(weights_of(model), given, given)


def test_a_light_branch_takes_what_it_has_of_both(toy):
  given = distinct(made(seed=0))
  model = build.create_model(toy_config(mode="original"), None)
  start.fill(model, given, "x")
  found = weights_of(model)
  same(found, given, found)


@pytest.mark.parametrize("change", ["missing", "more", "shape", "fusion"])
def test_weights_that_do_not_fit_are_refused_by_name(toy, change):
  given = distinct(made(seed=0))
  name = next(n for n in given if n.startswith("fusion/" if change == "fusion" else "backbone/"))
  if change in ("missing", "fusion"):
    given.pop(name)
  elif change == "more":
    name = "backbone/another"
    given[name] = np.zeros(3, np.float32)
  else:
    given[name] = np.zeros((1, 2, 3), np.float32)
  model = made()
  before = weights_of(model)
  with pytest.raises(ValueError, match=f"train.init_from=x: (?s:.*){name}"):
    start.fill(model, given, "x")
  same(weights_of(model), before, before)


@pytest.mark.parametrize("part", ["", "best", "checkpoints/4"])
def test_a_run_is_read_whole(toy, trained, part):
  found = start.read(trained / part, "toy")
  kinds = {name.partition("/")[0] for name in found}
  assert kinds >= {"backbone", "fusion", "main_stats"}
  model = made()
  start.fill(model, found, "x")
  same(weights_of(model), found, weights_of(model))


def test_an_exported_file_is_read_as_the_light_branch(toy, trained, tmp_path):
  export.export(trained, tmp_path / "out")
  found = start.read(tmp_path / "out" / "light.safetensors", "toy")
  expected = start.read(trained, "toy")
  assert found.keys() == {name for name in expected if name.startswith("backbone/")}
  same(found, expected, found)


def test_a_published_file_is_read(tmp_path):
  from safetensors.numpy import save_file

  import converters

  net = backbones.create("acm", rngs=nnx.Rngs(0))
  save_file(converters.to_torch(net), tmp_path / "acm.safetensors")
  found = start.read(tmp_path / "acm.safetensors", "acm")
  expected = {f"backbone/{name}": array for name, array in weights_of(net).items()}
  assert found.keys() == expected.keys()
  same(found, expected, expected)


def test_a_training_begins_with_these_weights_and_a_new_optimizer(toy, trained, tmp_path):
  config = toy_config(**{RUN: str(trained), "train.learning_rate": 1e-30, "train.steps": 1})
  config.train.weight_decay = 0.0
  train.train(config, tmp_path / "tuned")
  expected, found = start.read(trained, "toy"), start.read(tmp_path / "tuned", "toy")
  params = [name for name in found if not name.endswith(("mean", "var"))]
  same(found, expected, params)
  assert checkpoint.Checkpoints(tmp_path / "tuned").steps() == [1]


@pytest.mark.slow
def test_a_begun_run_goes_on_without_the_weights_that_it_started_from(toy, trained, tmp_path):
  copy = tmp_path / "copy"
  export.export(trained, copy)
  file = copy / "light.safetensors"
  config = toy_config(**{RUN: str(file), "train.steps": 4, "checkpoint.every_steps": 2})
  train.train(config, tmp_path / "run")
  file.unlink()
  config.train.steps = 6
  train.train(config, tmp_path / "run")
  assert checkpoint.Checkpoints(tmp_path / "run").steps()[-1] == 6


def test_a_folder_keeps_to_the_weights_it_started_from(toy, tmp_path):
  settings.claim_workdir(tmp_path, toy_config())
  with pytest.raises(ValueError, match="train.init_from"):
    settings.claim_workdir(tmp_path, toy_config(**{RUN: "another"}))


def test_what_cannot_be_started_from_is_refused_before_anything_is_written(toy, trained, tmp_path):
  (tmp_path / "empty").mkdir()
  for source, network, said in (
    ("nothing.pth.tar", "toy", "no such file or folder"),
    (str(tmp_path / "empty"), "toy", "empty"),
    (str(trained), "acm", "its network is toy, and model.backbone is acm"),
  ):
    config = toy_config(**{RUN: source, "model.backbone": network, "mode": "original"})
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){source}.*{said}"):
      train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "changes",
  [
    {"model.share": "encoder"},
    {"model.on_dino": "plain", "mode": "fdep_wo_coisd"},
    {"prior.unfreeze": True, "mode": "fdep_wo_coisd"},
  ],
)
def test_an_ablation_of_the_structure_is_not_started_so(changes):
  with pytest.raises(ValueError, match="train.init_from starts a whole detector"):
    settings.check(toy_config(**{RUN: "x"}, **changes))


def test_detector_is_not_changed_by_being_a_start(toy, trained):
  """The weights that a training starts from are those that prediction uses."""
  found = start.read(trained, "toy")
  light = weights_of(detector.load(trained).model)
  same(found, light, light)
