"""Settings under the names of earlier versions: `dino.*` is `prior.*` now."""

import json
import pathlib

import pytest
from helpers import command
from ml_collections import ConfigDict

from configs import base
from configs.tables import nuaa_cpu
from fdep_jax import settings
from fdep_jax.tables import experiments

ROOT = pathlib.Path(__file__).resolve().parents[1]
OLD_RUN = ROOT / "results/nuaa_cpu/runs/acm-fdep_seed0"


def test_both_names_are_one_section_also_of_a_copy():
  config = base.get_config()
  config.dino.bank = 3
  config.update_from_flattened_dict({"dino.checkpoint": "x"})
  copy = config.copy_and_resolve_references()
  copy.dino.bank = 4
  assert (config.prior.bank, config.prior.checkpoint, copy.prior.bank) == (3, "x", 4)
  values = settings.flat(config)
  assert values["prior.bank"] == 3 and not any(name.startswith("dino.") for name in values)
  assert "dino" not in settings.as_dict(config)
  settings.check(copy)


def test_a_run_folder_of_an_earlier_version_is_the_same_run(caplog):
  assert "dino" in json.loads((OLD_RUN / "config.json").read_text())
  caplog.set_level("INFO")
  config = settings.load(OLD_RUN)
  assert "dino.*, which are now called prior.*" in caplog.text
  assert config.dino is config.prior and config.prior.normalisation == "model"
  row = next(row for row in nuaa_cpu.get_table().rows if row.name == "acm-fdep")
  today = experiments.resolve(nuaa_cpu.get_config(), row, 0, "runs")
  assert settings.differing(config, today) == []


def test_a_config_object_of_an_earlier_version_is_taken_over():
  config = ConfigDict(json.loads((OLD_RUN / "config.json").read_text()))
  bank = config.dino.bank
  settings.check(config)
  assert config.prior.bank == bank > 0


def test_two_values_of_one_setting_are_refused_and_one_counts():
  config = ConfigDict(settings.as_dict(base.get_config()))
  config.dino = ConfigDict({"bank": 7, "levels": (1, 2)})
  settings.adopt(config)
  assert config.prior.bank == 7 and tuple(config.dino.levels) == (1, 2)
  config = ConfigDict(settings.as_dict(base.get_config()))
  config.prior.bank, config.dino = 5, ConfigDict({"bank": 7})
  with pytest.raises(ValueError, match="dino.bank is 7 and prior.bank is 5.*leave it out"):
    settings.check(config)


def test_rows_of_a_table_may_use_the_old_name():
  row = experiments.Row("a", ("a",), {"dino.bank": 2}, {})
  assert experiments.resolve(base.get_config(), row, 0, "runs").prior.bank == 2


def test_an_old_flag_works_and_one_line_says_its_new_name(tmp_path):
  arguments = ("--config", "configs/acm.py", "--workdir", tmp_path / "run")
  done = command(*arguments, "--config.data.root=nowhere", "--config.dino.checkpoint=nowhere/x.pth")
  assert done.returncode == 2 and "nowhere/x.pth" in done.stderr
  line = "dino.checkpoint: now called prior.checkpoint; the old names still work."
  assert done.stderr.count(line) == 1
