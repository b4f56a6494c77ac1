"""Several processes train the run that one trains."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from test_train import lines, parameters, toy_config

from fdep_jax import mesh, train

_ROOT = pathlib.Path(__file__).parents[1]
_WORKER = """
import sys, json, pathlib
sys.path[:0] = [{root!r}, {tests!r}]
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from fdep_jax import backbones, mesh, train
backbones.__path__.append(str(pathlib.Path({tests!r}) / "toy_backbones"))
from test_train import toy_config
config = toy_config(**json.loads(sys.argv[1]))
mesh.start(config)
assert jax.process_count() == 2 and len(jax.devices()) == 4
train.train(config, sys.argv[2])
"""


def start_processes(workdir, changes):
  """Two processes on this machine with two devices each, as a user would start them."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  source = _WORKER.format(root=str(_ROOT), tests=str(_ROOT / "tests"))
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  return [
    subprocess.Popen(
      [
        sys.executable,
        "-c",
        source,
        json.dumps(changes | {"host_devices": 2, "distributed": f"127.0.0.1:{port},2,{index}"}),
        str(workdir),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]


def finish(processes, code=0):
  outputs = [process.communicate(timeout=400)[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == code, output[-4000:]
  return outputs


def test_two_processes_train_evaluate_and_save_what_one_does(toy, tmp_path):
  changes = {"log.every_steps": 1, "train.steps": 5, "checkpoint.every_steps": 2, "dino.bank": 2}
  changes["log.compile_cache"] = ""
  running = start_processes(tmp_path / "two", changes)
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
  from fdep_jax import settings

  with pytest.raises(ValueError, match="distributed is .*HOST:PORT,COUNT,INDEX"):
    settings.check(toy_config(distributed=value))


def test_one_process_writes():
  assert mesh.writes()
