"""Training end to end on a toy detector: determinism, resuming, what is and is not trained."""

import contextlib
import gzip
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
from helpers import batch, lines, parameters, parts, toy_config

from configs import base
from fdep_jax import build, data, evaluate, forward, report, settings, train
from fdep_jax import step as step_lib
from fdep_jax.runtime import checkpoint, log, mesh


def test_same_seed_and_an_interruption_give_identical_parameters(toy, tmp_path, monkeypatch):
  config = toy_config(**{"train.steps": 12, "log.every_steps": 1})
  train.train(config, tmp_path / "a")
  train.train(toy_config(**{"train.steps": 5, "log.every_steps": 1}), tmp_path / "b")
  assert checkpoint.Checkpoints(tmp_path / "b").steps()[-1] == 5
  evaluate_run = evaluate.evaluate

  def evaluate_again(workdir, *arguments):
    assert not (workdir / "metrics.json").exists()  # those of the shorter run are gone
    return evaluate_run(workdir, *arguments)

  monkeypatch.setattr(evaluate, "evaluate", evaluate_again)
  train.train(config, tmp_path / "b")
  a, b = (parameters(tmp_path / name, config) for name in "ab")
  assert any(k.startswith("opt/") for k in a) and any(k.startswith("rng/") for k in a)
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], key)
  losses = [
    {line["step"]: line["loss"] for line in lines(tmp_path / name) if "loss" in line}
    for name in "ab"
  ]
  assert losses[0] == losses[1]
  assert sorted(losses[1]) == list(range(1, 13))


@pytest.mark.parametrize("several", [1, 2])
def test_a_run_whose_prior_is_divided_among_devices_has_whole_checkpoints(toy, tmp_path, several):
  about = {"host_devices": 2, "prior.shard": True, "train.steps": 4, "eval.every_epochs": 8.0}
  config = toy_config(**about, **{"train.steps_per_dispatch": several})
  train.train(config, tmp_path)  # reads its checkpoint back
  assert checkpoint.Checkpoints(tmp_path).steps() == [4]
  assert parameters(tmp_path, config) and not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("mode", ["original", "fdep_wo_coisd", "fdep"])
def test_every_mode_trains_and_reports_its_branches(toy, tmp_path, mode):
  config = toy_config(mode=mode)
  metrics = train.train(config, tmp_path)
  assert metrics == json.loads((tmp_path / "metrics.json").read_text())
  branches = {"original": {"light"}, "fdep_wo_coisd": {"main"}, "fdep": {"light", "main"}}[mode]
  assert {"light", "main"} & set(metrics) == branches
  for name in branches:
    assert {"hse", "hse_p", "hse_t", "iou", "niou", "pd", "fa"} <= set(metrics[name])
  assert {"params", "flops", "seconds_per_image", "checkpoint", "split", "last"} <= set(metrics)
  own = build.parameters(toy_config(mode="original"))
  assert metrics["params_deployed"] == (metrics["params"] if mode == "fdep_wo_coisd" else own)
  assert (metrics["params"] == own) == (mode == "original")
  assert settings.load(tmp_path).mode == mode
  assert (tmp_path / "examples.png").stat().st_size > 1000
  (shown,) = report._read(tmp_path / "report.html")["runs"]
  assert set(shown["branches"]) == branches and shown["config"] == settings.flat(config)
  assert all(shown["metrics"][name] == metrics[name] for name in branches)
  values = [line["loss"] for line in lines(tmp_path) if "loss" in line]
  assert all(math.isfinite(v) for v in values)
  again = evaluate.evaluate(tmp_path)  # from the folder alone
  for name in branches:
    assert again[name] == metrics[name]


def cut(samples, sizes):
  """Gives every sample one of the sizes in turn."""
  return [
    data.Sample(s.name, s.image[:h, :w], s.mask[:h, :w])
    for s, (h, w) in zip(samples, itertools.cycle(sizes), strict=False)
  ]


def test_selection_and_final_evaluation_score_a_checkpoint_alike(toy, tmp_path, monkeypatch):
  config = toy_config(
    **{
      "mode": "original",
      "data.synthetic_train": 16,
      "data.val_fraction": 0.5,
      "host_devices": 2,
      "eval.batch_size": 3,
      "eval.every_epochs": 0.5,
      "train.batch_size": 2,
      "train.steps": 6,
    }
  )
  images = build.load_images(config)
  # No side is a multiple of the network's stride of 4.
  images = images._replace(val=cut(images.val, ((30, 41), (37, 63), (61, 35), (58, 61), (62, 31))))
  monkeypatch.setattr(build, "load_images", lambda config: images)
  traced, logits, select = [], forward.logits, train.Loop._select
  monkeypatch.setattr(forward, "logits", lambda *a: traced.append(a[2].shape) or logits(*a))
  fresh = []  # shapes that each selection compiles

  def selects(loop):
    traced.clear()
    found = select(loop)
    fresh.append(sorted(traced))
    return found

  monkeypatch.setattr(train.Loop, "_select", selects)
  train.train(config, tmp_path / "run")
  logged = {line["step"]: line["eval"] for line in lines(tmp_path / "run") if "eval" in line}
  assert fresh == [[(2, 32, 64, 3), (2, 64, 32, 3), (4, 64, 64, 3)], [], []]
  prior = build.load_prior(config)
  loaded = (images._replace(test=images.val), prior, build.create_model(config, prior))
  monkeypatch.setattr(evaluate, "cost", lambda *a: {"flops": 1.0, "seconds_per_image": 1.0})
  for route in (False, True):  # by numpy, and by the jitted counts
    monkeypatch.setattr(evaluate, "COUNT_JITTED", route)
    out = tmp_path / str(route)
    found = evaluate.evaluate(tmp_path / "run", config, loaded, out=out)
  for name in ("metrics.json", "counts.npz"):
    assert (out / name).read_bytes() == (tmp_path / "False" / name).read_bytes()
  for scores in (found, found["last"]):
    for branch, selected in logged[scores["checkpoint"]].items():
      assert selected["hse"] > 0
      assert {name: scores[branch][name] for name in selected} == selected


def test_the_flops_of_a_deployed_main_branch_hold_every_block_of_the_prior(toy, monkeypatch):
  config = toy_config(mode="fdep_wo_coisd")
  width, flops = build.RANDOM_PRIOR["width"], []
  for depth in (4, 8):
    monkeypatch.setitem(build.RANDOM_PRIOR, "depth", depth)
    prior = build.load_prior(config)
    model = build.create_model(config, prior)
    flops.append(evaluate.cost(config, model, prior, repeats=1)["flops"])
  tokens = 1 + math.ceil(config.data.crop / prior.patch) ** 2
  block = 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)
  assert flops[1] - flops[0] == 4 * block


def test_the_prior_is_neither_trained_nor_saved_nor_differentiated(toy):
  config = toy_config()
  prior, model, optimizer, state = parts(config)
  names = list(checkpoint.flatten(state))
  shapes = {leaf.shape for leaf in jax.tree.leaves(prior)}
  matrices = {shape for shape in shapes if len(shape) == 3 and shape[0] == prior.depth}
  assert matrices and not any("vit" in name or "dino" in name for name in names)
  assert not matrices & {leaf.shape for leaf in jax.tree.leaves(state)}
  step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
  jaxpr = jax.make_jaxpr(step)(state, prior, batch())
  scans = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
  over_blocks = [eqn for eqn in scans if eqn.params["length"] == prior.depth]
  assert len(over_blocks) == 1 and not over_blocks[0].params["reverse"]  # forward, once


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def test_a_step_is_adamw_with_decay_on_every_parameter(toy):
  config = toy_config(mode="original")
  _, model, optimizer, state = parts(config)
  zero = jax.tree.map(jnp.zeros_like, state["params"])
  updates, _ = optimizer.update(zero, state["opt"], state["params"])
  for update, value in zip(jax.tree.leaves(updates), jax.tree.leaves(state["params"]), strict=True):
    np.testing.assert_allclose(update, -1e-3 * 0.01 * value, rtol=1e-5)


def test_eight_devices_take_the_step_of_one(toy):
  # Plain gradient descent: Adam turns the rounding in gradients that are zero (biases before a
  # BatchNorm) into whole steps.
  config = toy_config(**{"train.batch_size": 8})
  prior, model, _, _ = parts(config)
  optimizer = optax.sgd(0.1)
  state = step_lib.init_state(model, optimizer)
  results = []
  for devices in (1, 8):
    the_mesh = mesh.make(devices, 8)
    step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
    placed = mesh.put_replicated(prior, the_mesh)
    current = mesh.put_replicated(state, the_mesh)
    for _ in range(2):
      current, metrics = step(current, placed, mesh.put_batch(batch(8), the_mesh))
    results.append((jax.device_get(current["params"]), float(metrics["loss"])))
  assert the_mesh.devices.size == 8
  np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
  for a, b in zip(*(jax.tree.leaves(params) for params, _ in results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_near_float32_with_float32_parameters(toy):
  values = []
  for dtype in ("float32", "bfloat16"):
    config = toy_config(**{"train.dtype": dtype})
    prior, model, optimizer, state = parts(config)
    step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
    state, metrics = step(state, prior, batch())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state["params"], state["stats"])))
    values.append(float(metrics["loss"]))
  assert values[0] == pytest.approx(values[1], rel=0.03) and values[0] != values[1]


def test_any_optax_schedule_is_named_by_the_config():
  config = toy_config(**{"train.schedule": "cosine_decay_schedule"})
  config.train.schedule_args = {"init_value": "learning_rate", "decay_steps": "steps"}
  ours, theirs = step_lib.make_schedule(config, 50), optax.schedules.cosine_decay_schedule(1e-3, 50)
  for step in (0, 10, 50):
    assert ours(step) == theirs(step)
  config.train.schedule = "cosine"
  with pytest.raises(ValueError, match="optax has .*cosine_decay_schedule"):
    step_lib.make_schedule(config, 50)
  config.train.schedule = "constant_schedule"
  with pytest.raises(ValueError, match="do not fit constant_schedule"):
    step_lib.make_schedule(config, 50)


def test_a_trace_of_some_steps_is_written(toy, tmp_path):
  # The run has 8 steps: it ends before the last of those to trace.
  train.train(toy_config(**{"mode": "original", "profile_steps": "7-10"}), tmp_path)
  (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
  with gzip.open(trace, "rt") as file:
    names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
  assert "PjitFunction(step)" in names
  with pytest.raises(ValueError, match="profile_steps is '3-2'; it must be FIRST-LAST"):
    settings.check(toy_config(profile_steps="3-2"))
  with pytest.raises(ValueError, match="profile_steps is 9-10, but the run has 8 steps. Name"):
    train.train(toy_config(profile_steps="9-10"), tmp_path / "never")
  epochs = toy_config(**{"train.steps": 0, "train.epochs": 2, "profile_steps": "3-4"})
  with pytest.raises(ValueError, match="profile_steps is 3-4, but the run has 2 steps. Name"):
    plain.loop_of(epochs, tmp_path / "epochs")  # 4 images in batches of 4


@pytest.mark.parametrize(
  ("steps", "calls"),
  [
    ((1, 2, 3, 4), ["before 2", "stopped after 3"]),
    ((3, 4, 5), ["before 3", "stopped after 3"]),  # goes on in the middle
    ((1, 2), ["before 2", "stopped after 2"]),  # ends, or is stopped, before the last
    ((4, 5), []),
  ],
)
def test_steps_to_trace_that_the_run_does_not_all_take(monkeypatch, tmp_path, steps, calls):
  found, step = [], 0
  monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: found.append(f"before {step}"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append(f"stopped after {step}"))
  with contextlib.suppress(KeyError), log.Profile(tmp_path, toy_config(profile_steps="2-3")) as it:
    for step in steps:
      it.before(range(step, step + 1))
      it.after(range(step, step + 1), {})
    raise KeyError
  assert found == calls


def test_epochs_count_every_image_once():
  config = toy_config(**{"train.steps": 0, "train.epochs": 3, "train.batch_size": 16})
  assert step_lib.total_steps(config, 100) == 19  # 300 images / 16
  assert step_lib.total_steps(base.get_config(), 1676) == 41_900  # the paper's run


def test_a_loss_that_is_not_finite_ends_the_run(toy, tmp_path):
  config = toy_config(**{"train.learning_rate": 1e30, "log.every_steps": 1})
  with pytest.raises(FloatingPointError, match="at step .* Lower train.learning_rate"):
    train.train(config, tmp_path)


def test_a_run_folder_keeps_its_config(toy, tmp_path):
  config = toy_config(**{"train.steps": 4})
  settings.claim_workdir(tmp_path, config)
  before = (tmp_path / "config.json").read_bytes()
  for change in ({"seed": 1}, {"train.batch_size": 2}, {"loss.edge_mode": "released"}):
    with pytest.raises(ValueError, match=f"{list(change)[0]}: .* there, .* here"):
      train.train(toy_config(**{"train.steps": 4, **change}), tmp_path)
  assert (tmp_path / "config.json").read_bytes() == before
  settings.claim_workdir(tmp_path, toy_config(**{"train.steps": 9, "log.every_steps": 3}))


def test_devices_that_cannot_share_the_batch_are_refused():
  with pytest.raises(ValueError, match="train.batch_size is 6, which 4 devices cannot share"):
    mesh.make(4, 6)


def test_a_run_on_few_frames_sees_these_alone(toy):
  config = toy_config(**{"data.train_images": 8})
  drawn, every = build.load_images(config), build.load_images(toy_config())
  assert len(drawn.train) == 6 and len(drawn.val) == 2 and len(drawn.test) == len(every.test)
  seen = [*drawn.train, *drawn.val]
  assert drawn.mean == pytest.approx(data.statistics(seen)[0]) and drawn.mean != every.mean
  config.seed = 1
  again = build.load_images(config)
  assert {s.name for s in seen} != {s.name for s in [*again.train, *again.val]}
  with pytest.raises(ValueError, match="data.train_images is -1; it must be a number of images"):
    settings.check(toy_config(**{"data.train_images": -1}))
