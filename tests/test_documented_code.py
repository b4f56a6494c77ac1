"""Runs the Python examples of docs/training.md."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, batch

import converters
from configs import msda
from fdep_jax import build, settings
from fdep_jax import step as step_lib
from fdep_jax.priors import dinov2

PAGE = (ROOT / "docs/training.md").read_text()


def example(title: str) -> str:
  """The first Python code below a heading."""
  return re.search(rf"## {title}\n.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]


def test_a_schedule_is_set_in_a_config_file_and_changed_by_flags(tmp_path, parse):
  path = tmp_path / "mine.py"
  path.write_text(example("The learning rate"))
  flag = re.search(r"--config\.train\.schedule_args\.\S+?(?=`)", PAGE)[0]
  config = parse(f"--config={path}", f"--workdir={tmp_path}/run", flag).config
  settings.check(config)
  step_lib.check_schedule(config, 100)
  schedule = step_lib.make_schedule(config, 100)
  np.testing.assert_allclose([schedule(0), schedule(100)], [1e-3, 1e-4], rtol=1e-6)
  assert config.model.backbone == msda.get_config().model.backbone


def test_a_schedule_without_its_arguments_says_where_both_are_set():
  config = msda.get_config()
  config.train.schedule = "cosine_decay_schedule"
  with pytest.raises(ValueError, match="together with its arguments, .*: docs/training.md"):
    step_lib.make_schedule(config, 100)


def test_fdep_trains_in_a_loop_of_ones_own(toy, monkeypatch):
  small = dinov2.DINOv2(
    **{**build.RANDOM_PRIOR, "depth": 12, "width": 12, "heads": 2}, rngs=nnx.Rngs(0)
  )
  monkeypatch.setattr(converters, "load_prior", lambda path: small)
  code = example("FDEP in a training loop of your own")
  assert len(code.splitlines()) <= 25
  names: dict = {}
  assert code.count('"acm"') == 1
  exec(code.replace('"acm"', '"toy"'), names)  # which compiles sooner
  model = names["model"]
  before = nnx.state(nnx.clone(model), nnx.Param)
  image, mask = batch(2)["image"], batch(2)["mask"]
  losses = [names["step"](model, names["optimizer"], names["prior"], image, mask) for _ in range(2)]
  assert np.isfinite(losses).all() and losses[1] < losses[0]
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx.state(model, nnx.Param))
  assert all(jax.tree.leaves(moved))
  model.eval()
  assert model.light(jnp.zeros((1, 32, 32, 3))).final.shape == (1, 32, 32, 1)
