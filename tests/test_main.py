"""The command line as a user meets it: exit codes, one message, nothing half-written."""

import importlib
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, command, make_folder, toy_config
from ml_collections import ConfigDict
from PIL import Image

from configs import base, msda, tpu
from fdep_jax import build, settings, train
from fdep_jax import detector as detector_lib


def folder_config(root, **changes):
  """The toy alone on a folder of pictures."""
  own = {
    "mode": "original",
    "data.root": str(root),
    "data.val_fraction": 0.5,
    "prior.checkpoint": base.get_config().prior.checkpoint,
    "train.batch_size": 2,
    "train.steps": 2,
  }
  return toy_config(**own | changes)


def refused(config, workdir, error=ValueError) -> str:
  """The message of a training that must not begin; the folder must stay untouched."""
  with pytest.raises(error) as info:
    train.train(config, workdir)
  assert not pathlib.Path(workdir).exists()
  return str(info.value)


def test_a_misspelt_setting_gets_the_nearest_names():
  done = command("--config", "configs/msda.py", "--workdir", "never", "--config.train.lrr=1")
  assert done.returncode == 2
  assert "no setting 'train.lrr'" in done.stderr and "train.learning_rate" in done.stderr
  assert "Traceback" not in done.stderr and not (ROOT / "never").exists()


def test_a_config_that_takes_an_argument_is_explained_like_the_others():
  path = ROOT / "configs" / "tpu.py"
  said = settings.explain_flags([f"--config={path}:msda", "--config.train.lrr=1"], KeyError())
  assert "no setting 'train.lrr'" in said and "train.learning_rate" in said
  for argument in ("", ":msad"):
    said = settings.explain_flags([f"--config={path}{argument}"], ValueError("Traceback"))
    assert "name one of acm, " in said and "configs/tpu.py:msda" in said
    assert "Traceback" not in said


def test_the_tpu_config_is_the_networks_own_in_bfloat16():
  for name, remat in tpu.NETWORKS.items():
    own = settings.flat(importlib.import_module(f"configs.{name}").get_config())
    found = settings.flat(tpu.get_config(name))
    wanted = {"train.dtype": "bfloat16", "prior.dtype": "bfloat16", "train.remat": remat}
    assert found == own | wanted and own["train.dtype"] == "float32"


def test_missing_data_and_weights_are_named_together():
  config = msda.get_config()
  config.data.root, config.prior.checkpoint = "nowhere/SIRST3", "nowhere/dinov2.pth"
  with pytest.raises(FileNotFoundError) as info:
    build.check_inputs(config)
  message = str(info.value)
  assert "nowhere/SIRST3" in message and "nowhere/dinov2.pth" in message
  assert "python -m converters IN OUT" in message and "--config.data.root" in message
  assert "--config.mode=original trains the network alone" in message
  config.mode = "original"
  with pytest.raises(FileNotFoundError) as info:
    build.check_inputs(config)
  assert "prior" not in str(info.value)


def test_the_papers_config_does_not_fall_back_on_anything(tmp_path):
  absent = ("--config.data.root=nowhere/SIRST3", "--config.prior.checkpoint=nowhere/x.pth")
  done = command("--config", "configs/msda.py", "--workdir", tmp_path / "run", *absent)
  assert done.returncode == 2 and "nowhere/SIRST3" in done.stderr
  assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_flags_that_a_mode_needs_are_named():
  done = command("--mode", "score")
  assert done.returncode == 2 and "--predictions and --masks" in done.stderr


def test_every_bad_value_of_a_config_is_listed():
  config = base.get_config()
  config.mode, config.train.batch_size, config.eval.select_on = "fdpe", 0, "train"
  with pytest.raises(ValueError) as info:
    settings.check(config)
  message = str(info.value)
  assert "3 problems" in message
  assert "mode is 'fdpe'" in message and "original, fdep_wo_coisd, fdep" in message


def test_settings_that_an_older_run_lacks_are_named(tmp_path):
  values = base.get_config().to_dict()
  del values["prior"]["bank"], values["train"]["remat"]
  (tmp_path / "config.json").write_text(json.dumps(values))
  message = r"config.json lacks 2 settings.*\n.*prior.bank \(.*: 0\)\n.*train.remat \(.*\"none\"\)"
  for read in (settings.load, detector_lib.load):
    with pytest.raises(ValueError, match=message):
      read(tmp_path)
  with pytest.raises(ValueError, match="the config lacks 2 settings"):
    settings.check(ConfigDict(values))
  done = command("--mode", "eval", "--workdir", tmp_path)
  assert done.returncode == 2 and re.search(message, done.stderr) and "Traceback" not in done.stderr


def test_only_the_quick_start_may_use_a_random_prior(toy, tmp_path):
  config = folder_config(
    make_folder(tmp_path / "data"), mode="fdep", **{"prior.checkpoint": "random"}
  )
  assert "only the quick start" in refused(config, tmp_path / "run")


def test_a_missing_split_file_is_refused(toy, tmp_path):
  root = make_folder(tmp_path / "data")
  (root / "splits/train.txt").unlink()
  assert "train" in refused(folder_config(root), tmp_path / "run")


def test_an_empty_folder_is_refused(toy, tmp_path):
  (tmp_path / "data").mkdir()
  assert str(tmp_path / "data") in refused(folder_config(tmp_path / "data"), tmp_path / "run")


def test_a_mask_of_a_different_size_is_refused(toy, tmp_path):
  root = make_folder(tmp_path / "data")
  Image.new("L", (50, 40)).save(root / "masks/1.png")
  message = refused(folder_config(root), tmp_path / "run")
  assert "1.png" in message and "40" in message and "50" in message


def test_a_truncated_image_is_refused(toy, tmp_path):
  root = make_folder(tmp_path / "data")
  content = (root / "images/1.png").read_bytes()
  (root / "images/1.png").write_bytes(content[: len(content) // 2])
  assert "1.png" in refused(folder_config(root), tmp_path / "run")


def test_masks_without_any_target_are_refused(toy, tmp_path):
  root = make_folder(tmp_path / "data")
  for path in (root / "masks").iterdir():
    Image.new("L", (48, 40)).save(path)
  assert "masks are empty" in refused(folder_config(root), tmp_path / "run")


def test_a_crop_that_the_network_cannot_take_is_refused(toy, tmp_path):
  config = folder_config(make_folder(tmp_path / "data"), **{"data.crop": 30})
  message = refused(config, tmp_path / "run")
  assert "data.crop is 30" in message and "multiple of 4" in message


class Attack:
  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("content", ["attack", "text", "other", "partial"])
def test_a_file_that_is_no_dinov2_is_refused(toy, tmp_path, content):
  root, path, marker = make_folder(tmp_path / "data"), tmp_path / "vit.pth", tmp_path / "ran"
  if content == "attack":
    path.write_bytes(pickle.dumps({"cls_token": Attack(marker)}))
  elif content == "text":
    path.write_text("<html>404 Not Found</html>")
  else:
    from safetensors.numpy import save_file

    name = "conv.weight" if content == "other" else "blocks.0.norm1.weight"
    save_file({name: np.zeros((16,), np.float32)}, path)
  config = folder_config(root, mode="fdep", **{"prior.checkpoint": str(path)})
  message = refused(config, tmp_path / "run")
  assert str(path) in message and not marker.exists()
  if content == "attack":
    assert "system" in message


def test_a_folder_that_cannot_be_written_is_refused(toy, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="cannot be written"):
    train.train(folder_config(make_folder(tmp_path / "data")), tmp_path / "file" / "run")


def test_a_terminated_run_saves_and_says_so(tmp_path):
  arguments = ["--config", "configs/quickstart.py", "--workdir", tmp_path / "run"]
  settings_ = ["mode=original", "model.backbone=acm", "host_devices=1", "train.steps=100000",
               "data.synthetic_train=12", "data.synthetic_test=2", "data.synthetic_size=64",
               "data.crop=32", "train.batch_size=2", "log.every_steps=1",
               "eval.every_epochs=1e6"]  # fmt: skip
  process = subprocess.Popen(
    [sys.executable, "main.py", *map(str, arguments), *(f"--config.{s}" for s in settings_)],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  log = tmp_path / "run" / "metrics.jsonl"
  deadline = time.time() + 240
  while time.time() < deadline and process.poll() is None:
    if log.exists() and log.read_text().count("\n") >= 2:
      break
    time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 75, errors
  assert "saved" in errors
  assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_score_compares_two_folders_of_maps(tmp_path):
  rng = np.random.default_rng(0)
  for name in ("masks", "good", "bad"):
    (tmp_path / name).mkdir()
  for i in range(3):
    mask = np.zeros((30, 40), bool)
    mask[5 * i + 3 : 5 * i + 6, 10:13] = True
    Image.fromarray(np.uint8(255 * mask)).save(tmp_path / f"masks/{i}.png")
    np.save(tmp_path / f"good/{i}.npy", np.float32(0.9 * mask + 0.01 * rng.random(mask.shape)))
    np.save(tmp_path / f"bad/{i}.npy", np.float32(0.6 * mask + 0.4 * rng.random(mask.shape)))
  folders = f"{tmp_path / 'good'},{tmp_path / 'bad'}"
  flags = ("--predictions", folders, "--masks", tmp_path / "masks", "--out", tmp_path / "out")
  done = command("--mode", "score", *flags)
  assert done.returncode == 0, done.stderr
  for column in ("IoU", "nIoU", "Pd", "HSE-P", "HSE-T", "HSE"):
    assert column in done.stdout
  metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert metrics["predictions"]["iou"] == 1 and metrics["comparison"]["hse"]["a_is_better"] > 0.9
  assert {"curves.npz", "images.csv", "pr.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
