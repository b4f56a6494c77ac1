"""Several processes train the run that one trains."""

import json
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import ROOT, TOYS, lines, parameters, take_steps, toy_config

from fdep_jax import build, cli, settings, train
from fdep_jax import step as step_lib
from fdep_jax.layers.basic import BatchNorm
from fdep_jax.runtime import mesh

_BEGIN = f"""
import json, pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from fdep_jax import backbones, train
from fdep_jax.runtime import mesh
backbones.__path__.append({str(TOYS)!r})
from helpers import toy_config
config = toy_config(**json.loads(sys.argv[1]))
mesh.start(config)
assert jax.process_count() == 2 and len(jax.devices()) == 4
assert config.log.compile_cache and not jax.config.jax_compilation_cache_dir
"""


def start_processes(changes, then):
  """Two processes on this machine with two devices each, as a user would start them."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}

  def start(index):
    settings = {"host_devices": 2, "distributed": f"127.0.0.1:{port},2,{index}"}
    return subprocess.Popen(
      [sys.executable, "-c", _BEGIN + then, json.dumps(changes | settings)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return [start(index) for index in range(2)]


def finish(processes, code=0):
  try:
    outputs = [process.communicate(timeout=400)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == code, output[-4000:]
  return outputs


@pytest.mark.slow
def test_two_processes_train_evaluate_and_save_what_one_does(toy, tmp_path):
  changes = {"log.every_steps": 1, "train.steps": 5, "checkpoint.every_steps": 2, "prior.bank": 2}
  running = start_processes(changes, f"train.train(config, {str(tmp_path / 'two')!r})")
  one = toy_config(**changes, host_devices=4)
  train.train(one, tmp_path / "one")
  outputs = finish(running)
  losses = [
    [line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two")
  ]
  assert len(losses[0]) == 5
  np.testing.assert_allclose(*losses, rtol=1e-5)
  metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
  for branch in ("light", "main"):
    assert metrics[0][branch]["pd"] == metrics[1][branch]["pd"]
    assert metrics[0][branch]["hse"] == pytest.approx(metrics[1][branch]["hse"], rel=0.05)
  assert sum("test images" in output for output in outputs) == 1  # one of them reports
  # What two processes saved, one continues.
  more = toy_config(**changes | {"train.steps": 7})
  train.train(more, tmp_path / "two")
  assert [line["step"] for line in lines(tmp_path / "two") if "loss" in line] == list(range(1, 8))
  assert all(np.isfinite(value).all() for value in parameters(tmp_path / "two", more).values())


@pytest.mark.parametrize("value", ["on", "host,2,0", "host:1,2,2", "host:1,2"])
def test_an_address_that_cannot_be_one_is_refused(value):
  with pytest.raises(ValueError, match="distributed is .*HOST:PORT,COUNT,INDEX"):
    settings.check(toy_config(distributed=value))


@pytest.mark.parametrize(
  ("distributed", "platform", "kept"),
  [("off", "cpu", True), ("h:1,2,0", "cpu", False), ("h:1,2,0", "tpu", True)],
)
def test_several_processes_on_cpus_keep_no_programs(
  distributed, platform, kept, tmp_path, monkeypatch
):
  monkeypatch.setattr(mesh.rendezvous, "meet", lambda *_: None)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_: None)
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  monkeypatch.setattr(mesh, "minimum", lambda _: None)
  before = jax.config.jax_compilation_cache_dir
  try:
    mesh.start(toy_config(**{"distributed": distributed, "log.compile_cache": str(tmp_path)}))
    assert (jax.config.jax_compilation_cache_dir == str(tmp_path)) == kept
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("length", [0, 40])
def test_processes_that_were_started_differently_are_told_what_differs(monkeypatch, length):
  from jax.experimental import multihost_utils

  mine = {"workdir": "a" * length, "seed": 0, "data.crop": 32}
  theirs = {"workdir": "b", "seed": 0}
  found = {}

  def gather(row):
    other = np.frombuffer(json.dumps(theirs).encode().ljust(row.size), np.uint8)
    found["width"] = row.size
    return np.stack([row, row, other])

  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(mesh, "minimum", lambda value: min(value, -len(json.dumps(theirs))))
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  with pytest.raises(ValueError) as told:
    mesh.agree(mine)
  assert str(told.value).splitlines() == [
    "The processes do not fit together:",
    "  data.crop: 32 in process 0, None in process 2",
    f"  workdir: {mine['workdir']!r} in process 0, 'b' in process 2",
    "Start every process with the same command, with its own index in distributed.",
  ]
  theirs = mine
  mesh.agree(mine)


@pytest.mark.parametrize("changes", [{}, {"mode": "original"}])
def test_processes_compare_settings_folder_data_and_prior_before_they_train(
  toy, tmp_path, monkeypatch, changes
):
  told = []
  monkeypatch.setattr(mesh, "agree", told.append)
  monkeypatch.setattr(train, "Loop", None)
  config = toy_config(**{"distributed": "auto", "data.threads": 3, **changes})
  with pytest.raises(TypeError):  # there is no loop
    train.train(config, tmp_path)
  settings_, contents = told
  assert settings_.pop("workdir") == str(tmp_path)
  assert {
    key: value for key, value in settings.flat(config).items() if key in settings_
  } == settings_
  own = set(settings.flat(config)) - set(settings_)
  assert {"distributed", "data.threads", "data.root"} <= own and len(own) == 9
  assert set(contents) == {"train", "val", "test", "prior"}
  assert (contents["prior"] is None) == (config.mode == "original")


@pytest.mark.slow
def test_two_processes_with_different_settings_end_in_one_sentence(toy, tmp_path):
  then = f"""
config.train.batch_size *= 1 + jax.process_index()
try:
  train.train(config, {str(tmp_path)!r} + f"/{{jax.process_index()}}")
except ValueError as error:
  print("told:", str(error).replace(chr(10), " "))
"""
  for output in finish(start_processes({}, then)):
    (line,) = [line for line in output.splitlines() if line.startswith("told:")]
    assert "train.batch_size: 4 in process 0, 8 in process 1" in line and "workdir: " in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_device_that_is_not_here_is_one_sentence(tmp_path, platform):
  done = subprocess.run(
    [sys.executable, "main.py", "--config", "quickstart", "--workdir", str(tmp_path / "run")],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert f"JAX_PLATFORMS is '{platform}', but jax finds no such device here" in done.stderr
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "words",
  [
    ("--mode=predict", "--workdir=run", "--input=frames"),
    ("--mode=export", "--workdir=run"),
    ("--mode=table", "--config=quickstart", "--workdir=run", "--retime"),
  ],
)
def test_modes_that_compute_look_for_the_device_first(parse, monkeypatch, words):
  def absent():
    raise ValueError("jax finds no such device here")

  monkeypatch.setattr(mesh, "check_devices", absent)
  monkeypatch.setattr(cli.logging, "basicConfig", lambda **_: None)  # it would outlive the test
  parse(*words)
  with pytest.raises(ValueError, match="jax finds no such device here"):
    cli.main([])


def test_float64_is_refused():
  with (
    jax.enable_x64(True),
    pytest.raises(ValueError, match="JAX_ENABLE_X64 is set, .* without it"),
  ):
    mesh.start(toy_config())


def test_one_process_writes():
  assert mesh.writes()


@pytest.mark.slow
@pytest.mark.parametrize(
  "exchange", ["float(jax.jit(jax.numpy.min)(rows))", "mesh.minimum(jax.process_index() + 3)"]
)
def test_a_process_waits_for_one_that_loads_or_compiles_longer(exchange):
  then = f"""
import time
import numpy as np
rows = mesh.put_rows(np.arange(3.0, 7), mesh.make())
time.sleep(35 * jax.process_index())  # Gloo's patience for a first exchange is 30 s
assert {exchange} == 3
"""
  finish(start_processes({}, then))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["msda", "dna"])
def test_eight_devices_and_two_processes_take_the_steps_of_one(backbone, tmp_path):
  """Hard mining included: every target of a batch is on the first device."""
  results = {}
  running = start_processes(
    {},
    f"""
jax.config.update("jax_enable_x64", True)
import numpy as np
from helpers import take_steps
found = take_steps({backbone!r}, 2)
if mesh.writes():
  np.savez({str(tmp_path / "two.npz")!r}, **found)
""",
  )
  with jax.enable_x64(True):
    for devices in (1, 8):
      results[devices] = take_steps(backbone, devices)
  finish(running)
  results["two processes"] = dict(np.load(tmp_path / "two.npz"))
  losses, parameters_of_one = results[1].pop("losses"), results.pop(1)
  for name, theirs in results.items():
    np.testing.assert_allclose(theirs.pop("losses"), losses, rtol=1e-5, err_msg=str(name))
    for key, value in parameters_of_one.items():
      np.testing.assert_allclose(theirs[key], value, rtol=1e-4, atol=1e-4, err_msg=key)


def test_a_batch_norm_meets_the_other_devices_once_in_each_direction():
  graphdef, state = nnx.split(BatchNorm(3))
  the_mesh = mesh.make(8, 8)

  def loss(state, x):
    return jnp.square(nnx.merge(graphdef, state)(x) + x).sum()

  x = mesh.put_batch(np.ones((8, 4, 4, 3), np.float32), the_mesh)
  step = jax.jit(jax.grad(loss, argnums=(0, 1)))
  text = step.lower(mesh.put_replicated(state, the_mesh), x).compile().as_text()
  assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2


def test_the_compiled_step_moves_gradients_and_statistics_not_pixels(toy):
  """No all-gather, and nothing that devices exchange is as large as a map of the logits."""
  config = toy_config(**{"train.batch_size": 8, "data.crop": 64})
  prior = build.load_prior(config)
  model = build.create_model(config, prior)
  the_mesh = mesh.make(8, 8)
  step = step_lib.make_step(config, model, optax.sgd(0.1), 0.5, 0.2)
  state = mesh.put_replicated(step_lib.init_state(model, optax.sgd(0.1)), the_mesh)
  placed = mesh.put_replicated(prior, the_mesh)
  batch = {"image": np.zeros((8, 64, 64, 3), np.uint8), "mask": np.zeros((8, 64, 64), bool)}
  text = step.lower(state, placed, mesh.put_batch(batch, the_mesh)).compile().as_text()
  assert not re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)", text)
  reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
  assert reduced
  largest = max(
    np.prod([int(n) for n in shape.split(",") if n])
    for line in reduced
    for shape in re.findall(r"\w+\[([\d,]*)\]", line)
  )
  biggest_parameter = max(x.size for x in jax.tree.leaves(state["params"]))
  assert largest <= biggest_parameter
