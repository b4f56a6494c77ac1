"""How a network starts: the probability of its heads, and the momentum of its norms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import toy_config

from fdep_jax import backbones, build, settings
from fdep_jax.layers import basic

RUN = "model.start_prob"


def last_biases(config) -> dict[tuple, np.ndarray]:
  params = nnx.to_flat_state(nnx.state(build.create_model(config, None), nnx.Param))
  return {path: np.asarray(leaf[...]) for path, leaf in params}


@pytest.mark.parametrize("name, heads", [("acm", 1), ("alcnet", 1), ("dna", 4)])
def test_only_the_last_biases_are_others(name, heads):
  about = {"model.backbone": name, "mode": "original"}
  drawn, started = (last_biases(toy_config(**about, **{RUN: p})) for p in (0.0, 0.01))
  changed = [path for path in drawn if not np.array_equal(drawn[path], started[path])]
  assert len(changed) == heads
  for path in changed:
    np.testing.assert_allclose(started[path], [np.log(0.01 / 0.99)], rtol=1e-6)


def test_an_untrained_network_says_about_that_probability():
  config = toy_config(**{"model.backbone": "acm", "mode": "original", RUN: 0.01})
  model = build.create_model(config, None)
  model.eval()
  prob = jax.nn.sigmoid(model.light(jnp.zeros((1, 32, 32, 3))).final)
  assert 0.005 < prob.mean() < 0.02


@pytest.mark.parametrize("name", [n for n in backbones.names() if n != "rpcanet"])
def test_every_network_with_heads_can_start_so(name):
  config = toy_config(**{"model.backbone": name, "mode": "original", RUN: 0.01})
  nnx.eval_shape(lambda: build.create_model(config, None))  # raises where there is none


def test_a_network_without_heads_is_refused():
  config = toy_config(**{"model.backbone": "rpcanet", "mode": "original", RUN: 0.01})
  with pytest.raises(ValueError, match="this one has none"):
    nnx.eval_shape(lambda: build.create_model(config, None))


@pytest.mark.parametrize("name", [RUN, "model.bn_momentum"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_it_is_below_1(name, value):
  with pytest.raises(ValueError, match=rf"{name} is .* not in \[0, 1\)"):
    settings.check(toy_config(**{name: value}))


@pytest.mark.parametrize("given, expected", [(0.0, {0.1, 0.9}), (0.8, {0.8})])
def test_all_norms_have_the_momentum_that_is_asked_for(given, expected):
  config = toy_config(**{"model.backbone": "acm", "mode": "original", "model.bn_momentum": given})
  model = build.create_model(config, None)
  norms = [m for _, m in nnx.iter_graph(model) if isinstance(m, basic.BatchNorm)]
  assert len(norms) > 10 and {norm.momentum for norm in norms} == expected


def test_runs_of_before_started_as_drawn(tmp_path):
  config = toy_config()
  settings.claim_workdir(tmp_path, config)
  written = json.loads((tmp_path / "config.json").read_text())
  assert written["model"].pop("start_prob") == 0
  (tmp_path / "config.json").write_text(json.dumps(written))
  assert settings.load(tmp_path).model.start_prob == 0
  settings.claim_workdir(tmp_path, config)  # the same run
  with pytest.raises(ValueError, match=r"model.start_prob: 0.0 there, 0.5 here"):
    settings.claim_workdir(tmp_path, toy_config(**{RUN: 0.5}))
