"""Habits of users of this field: each is honoured or refused with the reason."""

import fnmatch
import functools
import json
import logging
import re
import socket
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from helpers import ROOT, make_folder, toy_backbone, toy_config, written_run

from configs import base
from fdep_jax import (
  build,
  cli,
  evaluate,
  export,
  losses,
  pseudo,
  report,
  score,
  settings,
  start,
  train,
  untrained,
)
from fdep_jax import detector as detector_lib
from fdep_jax import step as step_lib
from fdep_jax.cli import arguments
from fdep_jax.runtime import checkpoint, files, log, mesh, rendezvous

QUICK = ("--config=quickstart", "--workdir=never")


# Flags.

VALUES = {
  "config": "quickstart", "branch": "main", "threshold": "0.3", "range": "full", "seeds": "0,1",
  "task": "0/2", "topology": "cpu:1", "thorough": "true", "retime": "true", "runs": "a,b",
  "predictions": "a", "split": "test",
}  # fmt: skip
FLAGS = sorted({name for names in cli.USES.values() for name in names})


@pytest.mark.parametrize("mode", cli.USES)
@pytest.mark.parametrize("flag", FLAGS)
def test_every_mode_uses_a_flag_or_refuses_it(mode, flag, parse):
  words = [f"--mode={mode}", f"--{flag}={VALUES.get(flag, 'x')}"]
  if mode == "score":
    try:
      arguments.check(words, cli.USES, cli.OF_RUN)
      found = score.parse(words)
    except ValueError as error:
      found = str(error)
  else:
    found = parse(*words)
  if flag in cli.USES[mode]:
    assert not isinstance(found, str), found
    assert getattr(found, flag)
  else:
    assert found.startswith(f"--mode {mode} does not use --{flag}. ") and "\n" not in found


def test_a_command_line_without_a_word_is_told_what_is_needed(parse):
  with pytest.raises(ValueError, match="^--mode train needs --config and --workdir.$"):
    cli.check_given("train", parse())


def test_help_names_the_flags_of_a_mode_or_of_all():
  every = cli.usage(["--help"])
  assert all(f"\n  {mode} " in every for mode in cli.USES)
  one = cli.usage(["--mode=predict", "--help"])
  assert [line.split()[0] for line in one.splitlines()[1:]] == [
    f"--{flag}" for flag in cli.USES["predict"]
  ]


@pytest.mark.parametrize(
  "text, message",
  [
    ("X = 1", "is no config: it has no function get_config"),
    ("def get_config(:", "line 1: SyntaxError: invalid syntax"),
    ("def get_config():\n  return base.get_config()", "line 2: NameError: name 'base' is not"),
    ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config():\n  raise ValueError('use another')", "line 2: use another"),
  ],
)
def test_a_config_file_that_fails_is_named_with_its_line(
  tmp_path, parse, monkeypatch, text, message
):
  # ml_collections would load it into the module of an earlier config.
  for name in [n for n, m in sys.modules.items() if n.split(".")[-1].startswith("config")]:
    if getattr(sys.modules[name], "get_config", None):
      monkeypatch.delitem(sys.modules, name)
  (tmp_path / "mine.py").write_text(text)
  found = parse(f"--config={tmp_path}/mine.py", "--workdir=never")
  assert message in found and str(tmp_path / "mine.py") in found and "\n" not in found


def test_misspelt_settings_of_a_config_file_are_refused_before_training():
  config = toy_config()
  with config.unlocked():
    config.data.rang, config.train.lr = "auto", 1e-4
  with pytest.raises(ValueError, match="(?s)2 problems.*'data.rang'.* data.range.*'train.lr'") as e:
    settings.check(config)
  assert "nearest are train.learning_rate" in str(e.value)
  settings.check(config, trains=False)  # a run of another version is read


@pytest.mark.parametrize("name", ["train.steps", "train.epochs"])
def test_a_negative_length_is_refused(name):
  with pytest.raises(ValueError, match=f"{name} is -1; it must not be negative"):
    settings.check(toy_config(**{name: -1}))


def test_results_are_not_written_among_the_data(tmp_path, parse):
  data = make_folder(tmp_path / "mine", 4)
  words = ("--config=quickstart", f"--workdir={data}", f"--config.data.root={data}/.")
  with pytest.raises(ValueError, match="is the folder of the data, --config.data.root"):
    cli._check_places(parse(*words))
  with pytest.raises(ValueError, match="is the folder of the data, --input"):
    cli._check_places(parse("--mode=predict", f"--input={data}", f"--out={data}"))


def test_a_comma_at_the_end_names_no_folder(parse):
  assert parse("--mode=validate", "--data=a, b,").data == ["a", "b"]
  assert parse("--mode=eval", "--workdir=r", "--out=o", "--data=a,").data == ["a"]
  with pytest.raises(ValueError, match="--mode validate needs --data"):
    cli.check_given("validate", parse("--mode=validate", "--data=,"))


def test_an_empty_setting_that_differs_is_shown():
  lines = settings.differing(toy_config(**{"data.range": "1,2"}), toy_config())
  assert lines == ["data.range: 1,2 there, empty here"]


def test_every_flag_of_the_program_is_in_the_table():
  own = {
    flag.name
    for flag in cli.program_flags().get_flags_for_module("fdep_jax.cli")
    if not flag.name.startswith("config.")
  }
  assert own == {*FLAGS, "mode"}
  assert cli.NEEDS.keys() == cli.TAKES.keys()


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--mode=train", *QUICK, "--checkpoint=OLD"], "A run continues from its own"),
    (["--mode=export", "--workdir=RUN", "--branch=main"], "It writes the light branch"),
    (["--mode=eval", "--workdir=RUN", "--threshold=0.3"], "HSE covers all thresholds"),
    (["--mode=eval", "--workdir=RUN", "--config=quickstart"], "leave --config FILE out"),
    (["--mode=report", "--runs=a", "--out=b", "--config.seed=1"], "does not use --config.seed"),
    (["--input=x", "--out=y"], "Targets in frames are found by --mode predict"),
    (["--mode=export", "--workdir=RUN", "--config.seed=1"], "uses the settings of the run"),
    (["--mode=predict", "--input=x", "--config.prior.checkpoint=x"], "name its folder, --workdir"),
    (["--mode=eval", "--config.prior.checkpoint=x"], "name its folder, --workdir RUN"),
    (["--config.seed=1", "--workdir=RUN"], "name the config, --config FILE"),
    (["--mode=original", *QUICK], "--config.mode=original"),
    (["--mode=evaluate", "--workdir=x"], "no mode of the program. There are .* nearest is eval"),
    (["--config=absent.py", "--workdir=x"], "--config absent.py: there is no such file"),
    ([*QUICK, "--config.log.tensorboard", "False"], "Write --config.log.tensorboard=False"),
    ([*QUICK, "--config.log.tensorboard", "False", "--config.seed=1"], "'False' belongs to no"),
    ([*QUICK, "again", "and", "again"], "3 words belong to no flag: again and again"),
    (["configs/quickstart.py", "--workdir=x"], "Write --config=configs/quickstart.py"),
    (["--mode=eval", "--method=fkrw", "--config.seed=1"], "is no network and has no settings"),
  ],
)  # fmt: skip
def test_a_flag_or_word_without_use_is_refused_with_the_way_that_works(
  words, said, parse, monkeypatch
):
  monkeypatch.chdir(ROOT)
  found = parse(*words)
  assert isinstance(found, str) and re.search(said, found), found
  assert "Traceback" not in found


@pytest.mark.parametrize(
  "words", [["--threshold=0.3"], ["--trheshold=0.3"], ["more"], ["--config.seed=1"]]
)
def test_score_refuses_what_it_does_not_use(words):
  words = ["--mode", "score", "--predictions", "a", "--masks", "b", *words]
  with pytest.raises(ValueError, match="--mode score"):
    cli.run_score(words)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--prediction", "a", "--masks", "b"], "no flag --prediction. The nearest is --predictions."),
    (["--predictions=a", "--mask=b"], "no flag --mask. The nearest is --masks."),
    (["--predictions", "a", "b", "--masks=c"], "'b' belongs to no flag. .*--predictions A,B"),
    (["--quiet"], "no flag --quiet. There are --predictions, --masks, --split, --out."),
  ],
)
def test_score_names_the_flag_that_is_meant(words, said):
  with pytest.raises(ValueError, match=said):
    cli.run_score(["--mode", "score", *words])


def test_flags_that_exclude_each_other_are_refused(parse):
  plan = parse("--mode=plan", "--config=quickstart", "--topology=cpu:1", "--out=a", "--workdir=b")
  with pytest.raises(ValueError, match="Give one"):
    cli.check_given("plan", plan)
  table = parse("--mode=table", "--workdir=a", "--seeds=0,1")
  with pytest.raises(ValueError, match="--seeds"):
    cli.check_given("table", table)


# Settings.


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["mode=original", "prior.bank=4"], "prior.bank has no effect: mode original"),
    (["mode=fdep_wo_coisd", "loss.light_weight=2"], "trains one branch"),
    (["data.root=data/x", "data.synthetic_size=64"], "data.root is not synthetic"),
    (["prior.bank_refresh_epochs=2"], "prior.bank is 0"),
    (["eval.select_on=test", "data.val_fraction=0.2"], "eval.select_on is not val"),
    (["train.schedule_args={'value': 0.1}", "train.learning_rate=1.0"], "no argument of the"),
  ],
)
def test_a_setting_without_effect_is_refused(words, said):
  given = dict(word.split("=", 1) for word in words)
  config = base.get_config()
  for name, value in given.items():
    if name == "train.schedule_args":
      config.train.schedule_args = {"value": 0.1}
      continue
    kind = type(settings.flat(config)[name])
    config.update_from_flattened_dict({name: kind(value)})
  (line,) = settings.idle(config, [words[-1].split("=")[0]])
  assert said in line
  assert settings.idle(base.get_config(), ["data.crop", "prior.checkpoint", "train.epochs"]) == []


def test_the_command_line_refuses_a_setting_without_effect(parse):
  found = parse(*QUICK, "--config.mode=original", "--config.prior.levels=(1,2)")
  assert found == "prior.levels has no effect: mode original uses no prior. Leave it out."
  plan = ("--mode=plan", "--config=quickstart", "--topology=cpu:1", "--config.host_devices=4")
  assert "host_devices has no effect" in parse(*plan)


def test_eval_changes_what_does_not_change_the_model(parse, tmp_path):
  run = written_run(tmp_path / "run")
  words = ("--mode=eval", f"--workdir={run}")
  values = parse(*words, "--config.data.root=elsewhere", "--config.eval.batch_size=3")
  assert (values.config.data.root, values.config.eval.batch_size) == ("elsewhere", 3)
  assert values.config.model.backbone == "toy"
  found = parse(*words, "--config.seed=1", "--config.data.root=elsewhere")
  assert "cannot change seed" in found and "data.root" in found
  assert "no setting 'evil.batch_size'" in parse(*words, "--config.evil.batch_size=3")
  assert "not the folder of a run" in parse(
    "--mode=eval", f"--workdir={tmp_path}", "--config.data.root=x"
  )


def test_a_run_of_the_quick_start_is_scored_on_other_data(parse, tmp_path, monkeypatch):
  monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # it would stay for other tests
  run, scored = written_run(tmp_path / "run"), []
  monkeypatch.setattr(mesh, "start", lambda config: None)
  monkeypatch.setattr(evaluate, "command", lambda flags, config: scored.append(config.data.root))
  parse("--mode=eval", f"--workdir={run}", "--config.data.root=elsewhere", "--out=x")
  cli.main([])
  assert scored == ["elsewhere"]


def test_the_folder_of_a_method_takes_no_settings(parse, tmp_path, monkeypatch):
  monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
  run = written_run(tmp_path / "run", mode="classical", **{"model.backbone": "mpcm"})
  parse("--mode=eval", f"--workdir={run}", "--config.data.root=elsewhere")  # would overwrite it
  with pytest.raises(ValueError, match="has no settings. .* --mode eval --method mpcm --data A,B"):
    cli.main([])


# Lengths.


def test_epochs_of_the_command_line_win_over_steps_of_the_file(parse, caplog):
  values = parse(*QUICK, "--config.train.epochs=3")
  assert values.config.train.steps == 0 and step_lib.total_steps(values.config, 8) > 0
  assert "train.epochs=3" in caplog.text
  assert "Give one" in parse(*QUICK, "--config.train.epochs=3", "--config.train.steps=7")
  assert parse(*QUICK, "--config.train.steps=7").config.train.steps == 7


def test_a_warm_up_longer_than_the_run_is_shortened_and_said(caplog):
  config = toy_config(**{"train.schedule": "warmup_cosine_decay_schedule"})
  config.train.schedule_args = {
    "init_value": 0.0, "peak_value": "learning_rate", "warmup_steps": 200, "decay_steps": "steps",
  }  # fmt: skip
  step_lib.check_schedule(config, 100)
  assert "warmup_steps is 200, but the run has 100 steps: the warm-up takes 50" in caplog.text
  caplog.clear()
  step_lib.check_schedule(config, 1000)
  assert not caplog.text


def test_a_schedule_that_does_not_fit_the_length_is_refused_before_data_is_read(
  toy, tmp_path, monkeypatch
):
  config = own_config(make_folder(tmp_path / "data"))
  config.train.schedule = "cosine_decay_schedule"
  config.train.schedule_args = {"init_value": "learning_rate", "decay_steps": 0}
  monkeypatch.setattr(build, "load_images", None)
  with pytest.raises(ValueError, match="train.schedule_args do not fit cosine_decay_schedule"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_what_may_change_in_a_begun_run(tmp_path):
  config = toy_config(**{"train.steps": 4})
  settings.claim_workdir(tmp_path, config)
  settings.check_workdir(tmp_path, toy_config(**{"train.steps": 9}))  # the rate is constant
  moved = toy_config(**{"data.root": "elsewhere"})
  with pytest.raises(ValueError, match="data.root"):
    settings.check_workdir(tmp_path, moved)
  settings.check_workdir(tmp_path, moved, moved=True)  # then the checkpoint's statistics decide

  def stretched(steps):
    config = toy_config(**{"train.steps": steps, "train.schedule": "cosine_decay_schedule"})
    config.train.schedule_args = {"init_value": "learning_rate", "decay_steps": "steps"}
    return config

  settings.claim_workdir(tmp_path / "stretched", stretched(4))
  with pytest.raises(ValueError, match="stretches with the length.*other learning rates"):
    settings.check_workdir(tmp_path / "stretched", stretched(9))


def test_the_documents_list_what_may_change_in_a_begun_run():
  text = (ROOT / "docs/training.md").read_text().partition("## What may change in a begun run")[2]
  listed = re.findall(r"`([\w.*]+)`", text.partition("Also the places")[0])
  named = ["train.steps", "train.epochs", *listed]  # the length, by the section above
  for name in settings.flat(base.get_config()):
    free = bool(settings._FREE.fullmatch(name))
    assert free == any(fnmatch.fnmatch(name, pattern) for pattern in named), name


# A toy run on a folder, and what is done with it.


def own_config(root, **changes):
  own = {"mode": "original", "data.root": str(root), "data.val_fraction": 0.5}
  own |= {"train.batch_size": 2, "train.steps": 4, "checkpoint.every_steps": 2}
  own |= {"prior.checkpoint": "unused.pth", "log.compile_cache": ""}
  return toy_config(**own | changes)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A finished run of four steps, its data, and other data."""
  folder = tmp_path_factory.mktemp("begun")
  data, other = make_folder(folder / "data", 8), make_folder(folder / "other", 6)
  with toy_backbone():
    train.train(own_config(data), folder / "run")
    yield folder / "run", data, other


def test_a_start_that_fails_before_its_first_step_does_not_claim(
  toy, tmp_path, monkeypatch, caplog
):
  config = own_config(make_folder(tmp_path / "data", 8))

  def fail(*_):
    raise OSError("no memory")

  with monkeypatch.context() as patch:
    patch.setattr(step_lib, "make_step", lambda *_: fail)
    with pytest.raises(OSError, match="no memory"):
      train.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
  other = own_config(tmp_path / "data", **{"train.steps": 3, "seed": 3, "log.every_steps": 100})
  monkeypatch.setattr(train, "Minutes", functools.partial(log.Minutes, every=0))
  with caplog.at_level(logging.INFO):
    train.train(other, tmp_path / "run")  # the folder is free
  _, best = checkpoint.Checkpoints(tmp_path / "run").restore({}, best=True)
  scored = [text for text in caplog.messages if "val HSE" in text]  # the last is of the last step
  assert re.fullmatch(rf"val HSE \d+.\d\d at step 3; the best is step {best['step']}", scored[-1])
  # Redirected output gets its lines however many steps lie between two of metrics.jsonl.
  for step in (1, 2, 3):
    assert re.search(rf"step {step} of 3, loss \d.* images/s, .* left", caplog.text)
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  assert [line["step"] for line in map(json.loads, lines) if "loss" in line] == [1, 3]
  assert settings.load(tmp_path / "run").seed == 3


def test_a_run_cannot_be_made_shorter(begun):
  run, data, _ = begun
  before = sorted(p.name for p in run.iterdir())
  with pytest.raises(ValueError, match="has done 4 steps, and this config asks for 3. .*shorter"):
    train.train(own_config(data, **{"train.steps": 3}), run)
  assert sorted(p.name for p in run.iterdir()) == before
  assert settings.load(run).train.steps == 4


def test_a_finished_run_says_that_it_only_evaluates(begun, caplog):
  run, data, _ = begun
  with caplog.at_level(logging.INFO):
    train.train(own_config(data), run)
  assert "all 4 steps are done; evaluating again" in caplog.text


def test_a_begun_run_goes_on_with_moved_data_and_not_with_other_data(begun, tmp_path):
  run, data, other = begun
  with pytest.raises(ValueError, match="was trained on different images"):
    train.train(own_config(other), run)
  assert settings.load(run).data.root == str(data)
  (tmp_path / "moved").symlink_to(data)
  train.train(own_config(tmp_path / "moved"), run)
  assert settings.load(run).data.root == str(tmp_path / "moved")


def eval_flags(parse, run, *words):
  values = parse("--mode=eval", f"--workdir={run}", *words)
  assert not isinstance(values, str), values
  return values, values.config or settings.load(run)


def test_results_of_another_set_or_checkpoint_need_a_folder(begun, parse):
  run, _, other = begun
  before = (run / "metrics.json").read_bytes()
  for word in (f"--config.data.root={other}", "--checkpoint=last"):
    with pytest.raises(ValueError, match="not those of the run: .*--out DIR"):
      evaluate.command(*eval_flags(parse, run, word))
    with pytest.raises(ValueError, match="is the folder of a run"):
      evaluate.command(*eval_flags(parse, run, word, f"--out={run}"))
  with pytest.raises(ValueError, match="is the folder of a run"):  # DIR/NAME, of one dataset
    evaluate.command(*eval_flags(parse, run, f"--data=data/{run.name}", f"--out={run.parent}"))
  assert (run / "metrics.json").read_bytes() == before


def test_eval_scores_another_set_with_the_runs_normalisation(begun, parse, tmp_path, capsys):
  run, data, other = begun
  before = (run / "metrics.json").read_bytes()
  words = (f"--config.data.root={other}", f"--out={tmp_path / 'out'}")
  seen = []
  make_forward = evaluate.forward.make_forward

  def spy(config, model, mean, std):
    seen.append((mean, std))
    return make_forward(config, model, mean, std)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate.forward, "make_forward", spy)
    evaluate.command(*eval_flags(parse, run, *words))
  _, meta = checkpoint.Checkpoints(run).restore({})
  assert seen == [(meta["mean"], meta["std"])]
  found = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert found["data"] == str(other) and found["images"] == 3
  assert (tmp_path / "out" / "report.html").exists()
  assert (run / "metrics.json").read_bytes() == before
  assert f"3 test images of {other}" in capsys.readouterr().out


def test_eval_scores_the_checkpoint_that_is_named(begun, parse, tmp_path):
  run, *_ = begun
  for which, step in (("3", 3), ("last", 4), (str(run / "checkpoints" / "3"), 3)):
    out = tmp_path / which.replace("/", "_")
    evaluate.command(*eval_flags(parse, run, f"--checkpoint={which}", f"--out={out}"))
    found = json.loads((out / "metrics.json").read_text())
    assert found["checkpoint"] == step and "last" not in found and found["selected_on"] is None
  with pytest.raises(ValueError, match="no step 7; it has"):
    evaluate.command(*eval_flags(parse, run, "--checkpoint=7", f"--out={tmp_path / 'x'}"))
  assert not (tmp_path / "x").exists()


def test_the_results_of_a_checkpoint_do_not_replace_those_of_the_run(tmp_path):
  run = written_run(tmp_path / "run")
  for out in (None, run, tmp_path / "run" / ".." / "run"):
    with pytest.raises(ValueError, match="checkpoint 3 are not those of .* Name .* out=DIR"):
      evaluate.evaluate(run, which=3, out=out)


def test_a_checkpoint_of_another_run_is_refused(begun, tmp_path):
  run, *_ = begun
  with pytest.raises(ValueError, match="Leave --workdir out"):
    detector_lib.load(written_run(tmp_path / "other"), run / "best")
  with pytest.raises(ValueError, match="is no run and has one checkpoint. Leave .*run out"):
    detector_lib.load(run, "light.safetensors")


def test_a_path_names_the_checkpoint_of_its_step_and_a_run_of_any_name(tmp_path):
  for name in ("best", "best/5", "checkpoints"):
    run = written_run(tmp_path / name)
    for part in ("best/5", "best/20", "checkpoints/20", "checkpoints/25"):
      (run / part).mkdir(parents=True)
    for part, which, chosen in (
      ("", "best", (None, True)),
      ("best", "best", (None, True)),
      ("best/5", 5, (5, True)),
      ("best/20", 20, (20, False)),
      ("checkpoints", "last", (None, False)),
      ("checkpoints/25", 25, (25, False)),
    ):
      found = detector_lib.find_checkpoint(None, run / part)
      assert found == (run, which)
      assert detector_lib.choose_step(checkpoint.Checkpoints(run), *found) == chosen
  with pytest.raises(ValueError, match=r"no step 7; it has \[20, 25\], and best/ has \[5, 20\]"):
    detector_lib.choose_step(checkpoint.Checkpoints(run), run, 7)
  (run / "best" / "x").mkdir()
  with pytest.raises(FileNotFoundError, match="best/x is not the folder of a run"):
    detector_lib.find_checkpoint(None, run / "best" / "x")


def test_a_run_of_the_main_branch_alone_is_not_exported_with_a_way_that_works(tmp_path):
  run = written_run(tmp_path / "run", mode="fdep_wo_coisd")
  with pytest.raises(ValueError, match="--mode predict --branch main"):
    export.export(run)


def test_a_path_that_is_relative_is_shown_as_it_is_looked_up(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = base.get_config()
  with pytest.raises(FileNotFoundError) as info:
    build.check_inputs(config)
  assert f"data/SIRST3 (here: {tmp_path}/data/SIRST3)" in str(info.value)
  assert f"(here: {tmp_path}/{config.prior.checkpoint})" in str(info.value)
  assert "--config.data.root=PATH" in str(info.value) and "--out DIR" in str(info.value)


class Stop(Exception):
  pass


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home folder with a dataset, a weight file that is none, and a run of both."""
  monkeypatch.setenv("HOME", str(tmp_path))
  make_folder(tmp_path / "data", 4)
  (tmp_path / "dinov2_vits14.pth").write_text("x")
  places = {"data.root": "~/data", "prior.checkpoint": "~/dinov2_vits14.pth"}
  written_run(tmp_path / "run", **places)
  return tmp_path


def test_a_tilde_in_a_setting_is_the_home_folder(home, toy, monkeypatch):
  config = settings.load("~/run")
  build.check_inputs(config)
  assert len(build.load_images(config).test) == len(untrained._test_images(config)) == 2
  assert evaluate._place(config) == {"data": str(home / "data")}
  read = f"{home}/dinov2_vits14.pth: .*"  # and refused
  with pytest.raises(ValueError, match=read):
    build.load_prior(config)
  with pytest.raises(ValueError, match=read):
    detector_lib.load("~/run", branch="main")
  config.train.teacher = "~/run"
  with pytest.raises(ValueError, match=f"train.teacher: {read}"):
    pseudo.fingerprint(config)
  with pytest.raises(ValueError, match="its network is toy"):
    start.read("~/run", "acm")
  config.data.range = "auto"
  with pytest.raises(ValueError, match="have 8 bits"):
    build.grey_range(config)

  def made(folder, *_, **__):
    raise Stop(folder)

  monkeypatch.setattr(train.bank, "Bank", made)
  config = toy_config(**{"prior.bank": 1, "prior.bank_folder": "~/bank"})
  monkeypatch.setattr(build, "load_prior", lambda config: types.SimpleNamespace(sha256=""))
  with pytest.raises(Stop, match=f"^{home}/bank$"):
    train.train(config, home / "new")


def test_a_tilde_in_a_flag_is_the_home_folder(home, parse):
  (home / "own.py").write_text("from configs.quickstart import get_config as get_config\n")
  words = ("--config=~/own.py", "--workdir=~/data", "--config.data.root=~/data")
  with pytest.raises(ValueError, match="is the folder of the data, --config.data.root"):
    cli._check_places(parse(*words))
  values = parse("--mode=eval", "--workdir=~/run", "--data=a,~/data", "--out=o")
  assert values.data == ["a", str(home / "data")] and cli._config(values).data.root == "~/data"


def test_a_tilde_of_a_user_that_does_not_exist_is_part_of_the_name(tmp_path):
  assert str(files.expand("~no_such_user/x")) == "~no_such_user/x"


# Several processes.


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def meet(port, count, *indices, late=()):
  """The ends of processes that meet, by place; `late` ones come once another was refused."""
  found = {}

  def go(place, index):
    try:
      rendezvous.meet(f"127.0.0.1:{port}", count, index)
      found[place] = "met"
    except (ValueError, OSError) as error:
      found[place] = str(error)

  pairs = [*enumerate((*indices, *late))]
  threads = [threading.Thread(target=go, args=pair) for pair in pairs]
  for thread in threads[: len(indices)]:
    thread.start()
  while late and not found:
    time.sleep(0.05)
  for thread in threads[len(indices) :]:
    thread.start()
  for thread in threads:
    thread.join()
  return [found[place] for place, _ in pairs]


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(rendezvous, "PATIENCE", 1.5)
  monkeypatch.setattr(rendezvous, "EVERY", 0.3)


def test_processes_meet_in_any_order():
  assert meet(free_port(), 3, 2, 0, 1) == ["met"] * 3


def test_a_process_says_whom_it_waits_for_and_gives_up_in_a_sentence(impatient, caplog):
  port = free_port()
  alone, other = meet(port, 3, 0, 2)
  # Process 2 gives up at the same time, and may be missing by then.
  assert re.search("still waiting for process(es)? 1(, 2)? of 0 to 2", alone)
  assert "Start every process" in alone
  assert "waiting for process 1 of 0 to 2" in caplog.text and caplog.text.count("waiting for") > 3
  assert "still waiting" in other
  (lost,) = meet(port, 2, 1)
  assert f"still waiting for process 0 at 127.0.0.1:{port}" in lost


def test_processes_that_do_not_fit_together_are_told():
  zero, *ones, two = meet(free_port(), 3, 0, 1, 1, late=(2,))
  assert zero == two == "met" and sorted(ones) == [
    "The processes do not fit together: two processes have the index 1.",
    "met",
  ]


def test_a_cluster_that_is_not_there_and_one_that_breaks_are_one_sentence(monkeypatch):
  monkeypatch.setattr(mesh, "cache_programs", lambda _: None)
  for error, kind, said in (
    (ValueError("coordinator_address should be defined."), ValueError, "HOST:PORT,COUNT,INDEX"),
    (RuntimeError("DEADLINE_EXCEEDED: x\ny"), OSError, "could not be joined: DEADLINE_EXCEEDED: x"),
  ):

    def fail(*_, error=error):
      raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(kind, match=said):
      mesh.start(toy_config(distributed="auto"))


def test_a_batch_that_devices_cannot_share_gets_a_size_that_they_can():
  with pytest.raises(ValueError, match="batch_size is 5, which 2 host devices .* Use 6, or"):
    settings.check(toy_config(**{"train.batch_size": 5, "host_devices": 2}))


# Training as people run it.


def test_redirected_output_gets_a_line_a_minute(caplog, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
  values = {"loss": 0.5, "loss_light": 0.2, "loss_main": 0.3, "images_per_second": 12.34}
  with caplog.at_level(logging.INFO):
    minutes = log.Minutes(100, 20, shown=False)
    for second in range(0, 121, 10):
      now[0] = second
      minutes.tell(21 + second // 10, values, "val HSE 43.21 at step 20" if second else "")
    log.Minutes(100, 20, shown=True).tell(30, values, "")
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 3
  assert said[1] == (
    "step 27 of 100, loss 0.5000 (light 0.2000, main 0.3000), 12.3 images/s, 10 min left, "
    "val HSE 43.21 at step 20"
  )


@pytest.mark.parametrize(
  ("step", "best", "said"),
  [(50, 0.001, "has HSE 0.10"), (10, 0.5, "first tenth"), (11, 0.5, ""), (11, None, "")],
)
def test_a_selection_by_chance_is_said(step, best, said):
  found = detector_lib.selection_doubt({"step": step, "best": best, "steps": 100})
  assert said in found and bool(found) == bool(said)


def test_predict_and_export_repeat_the_doubt_and_eval_shows_the_newest(
  begun, monkeypatch, caplog, capsys
):
  run, *_ = begun
  monkeypatch.setattr(detector_lib, "selection_doubt", lambda saved: "it is chance.")
  detector_lib.load(run)
  assert "it is chance." in caplog.text
  caplog.clear()
  detector_lib.load(run, "last")
  assert not caplog.text
  metrics = evaluate.evaluate(run)
  out = capsys.readouterr().out
  assert "Warning: it is chance." in out
  assert ("The newest checkpoint" in out) == (
    metrics["last"]["checkpoint"] != metrics["checkpoint"]
  )


def test_small_sets_are_not_evaluated_every_epoch():
  assert base.get_config().eval.least_steps == 20
  assert settings._ADDED["eval.least_steps"] == 1  # as earlier runs were trained


@pytest.mark.parametrize(
  ("heads", "mask", "said"),
  [
    (np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8), bool), r"\[logits\] for one"),
    ([], np.zeros((2, 8, 8), bool), "must be a list of logits"),
    ([np.zeros((2, 8, 8, 1))], np.zeros((2, 8, 8), np.uint8), "must be bool"),
    ([np.zeros((2, 8, 8, 1))], np.zeros((2, 8, 8, 1), bool), "must be bool, B×H×W"),
    ([np.zeros((2, 8, 8, 2))], np.zeros((2, 8, 8), bool), r"they must be \(2, 8, 8, 1\)"),
    ([np.zeros((2, 4, 4, 1))], np.zeros((2, 8, 8), bool), r"they must be \(2, 8, 8, 1\)"),
  ],
)
def test_the_loss_refuses_what_it_would_sum_wrongly(heads, mask, said):
  with pytest.raises(ValueError, match=said):
    losses.eedm(heads, mask)
  if isinstance(heads, list) and heads:  # a network's own supervision calls this alone
    with pytest.raises(ValueError, match=said):
      losses.criterion(mask)(heads[0])


# Other data.


def test_a_union_always_reports_its_parts(begun, parse, tmp_path, capsys):
  run, data, other = begun
  union = tmp_path / "union"
  union.mkdir()
  (union / "NUAA-SIRST").symlink_to(data)
  (union / "more").symlink_to(other)
  words = (f"--data={union},{other}", f"--out={tmp_path / 'out'}")
  evaluate.command(*eval_flags(parse, run, *words))
  both = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert both.keys() == {"union", "other"} and "parts" not in both["other"]
  found = json.loads((tmp_path / "out" / "union" / "metrics.json").read_text())
  assert found == both["union"] and found["images"] == 7
  assert {name: part["images"] for name, part in found["parts"].items()} == {
    "NUAA-SIRST": 4, "more": 3,
  }  # fmt: skip
  assert found["parts"]["more"]["light"] == both["other"]["light"]
  assert "intervals" in found["parts"]["NUAA-SIRST"]["light"]
  images = report._read(tmp_path / "out" / "union" / "report.html")["images"]  # filtered by part
  assert [image["part"] for image in images] == ["NUAA-SIRST"] * 4 + ["more"] * 3
  out = capsys.readouterr().out
  assert re.search(r"more +light +\d", out) and "on 2 datasets" in out


def test_a_table_of_datasets_has_a_row_and_its_intervals_for_each_branch():
  scores = dict.fromkeys(("iou", "niou", "pd", "fa", "hse_p", "hse_t", "hse"), 0.5)
  spans = dict.fromkeys(scores, [0.4, 0.61]) | {"hse": [None, None]}
  both = dict.fromkeys(("light", "main"), {**scores, "intervals": spans})
  text = evaluate.parts_table({"NUAA-SIRST": both, "B": {"light": both["light"]}})
  head, *rows = text.splitlines()
  assert head.split() == ["IoU", "nIoU", "Pd", "Fa·1e6", "HSE-P", "HSE-T", "HSE"]
  assert [row.split()[:3] for row in rows[::2]] == [
    ["NUAA-SIRST", "main", "50.00"], ["NUAA-SIRST", "light", "50.00"], ["B", "light", "50.00"],
  ]  # fmt: skip
  ends = "95 % 40.00–61.00 40.00–61.00 40.00–61.00 400000.00–610000.00 40.00–61.00 40.00–61.00 -"
  assert [row.split() for row in rows[1::2]] == [ends.split()] * 3
  names = [f"a_dataset_with_a_long_name_{i}" for i in (1, 2)]
  rows = evaluate.parts_table(dict.fromkeys(names, both)).splitlines()[1::4]
  assert [row.split()[0] for row in rows] == names


def test_all_datasets_are_looked_for_before_one_is_scored(begun, parse, tmp_path, monkeypatch):
  run, _, other = begun
  monkeypatch.setattr(evaluate, "evaluate", None)  # would fail
  monkeypatch.setattr(untrained, "evaluate", None)
  (tmp_path / "empty").mkdir()
  words = f"--data={other},nope,{tmp_path / 'empty'}", f"--out={tmp_path / 'out'}"
  said = r"^--data nope: there is no such folder.*\n--data .*empty: this folder is empty"
  with pytest.raises(FileNotFoundError, match=said) as error:
    evaluate.command(*eval_flags(parse, run, *words))
  assert "--config" not in str(error.value)
  with pytest.raises(FileNotFoundError, match=said):
    untrained.command(parse("--mode=eval", "--method=mpcm", *words))
  assert not (tmp_path / "out").exists()
  (tmp_path / "file").write_text("")
  words = f"--data={other}", f"--out={tmp_path / 'file'}"
  with pytest.raises(ValueError, match="file is a file. Name a folder"):
    untrained.command(parse("--mode=eval", "--method=mpcm", *words))


def test_eval_does_not_replace_the_results_of_other_inputs(begun, parse, tmp_path, monkeypatch):
  run, data, other = begun
  cost = {"flops": 1.0, "seconds_per_image": 0.1, "seconds_median": 0.1}
  monkeypatch.setattr(evaluate, "cost", lambda *_: cost)
  out = tmp_path / "out"
  first = (f"--config.data.root={other}", f"--out={out}")
  evaluate.command(*eval_flags(parse, run, *first))
  before = (out / "metrics.json").read_bytes()
  for words, said in (
    ((f"--config.data.root={data}",), f"holds results of data {other}, which"),
    ((*first, "--checkpoint=last"), "holds results of checkpoint best, which"),
    ((f"--data={data}",), "which these results would replace"),
  ):
    with pytest.raises(ValueError, match=said):
      evaluate.command(*eval_flags(parse, run, *words, f"--out={out}"))
  assert (out / "metrics.json").read_bytes() == before
  evaluate.command(*eval_flags(parse, run, *first))  # the same again
  assert (out / "metrics.json").read_bytes() == before
  assert json.loads(before)["inputs"] == {
    "run": str(run), "checkpoint": "best", "data": str(other),
  }  # fmt: skip
  table = tmp_path / "table"
  evaluate.command(*eval_flags(parse, run, f"--data={other}", f"--out={table}"))
  with pytest.raises(ValueError, match="metrics.json holds other, which these results"):
    evaluate.command(*eval_flags(parse, run, f"--data={data}", f"--out={table}"))
  for folder, root in ((other.parent, other), (data / "images/0.png", other)):
    with pytest.raises(ValueError, match="other is a folder that is read|0.png is a file"):
      evaluate.command(*eval_flags(parse, run, f"--data={root}", f"--out={folder}"))


def test_data_is_given_once(begun, parse):
  run, _, other = begun
  words = (f"--data={other}", f"--config.data.root={other}", "--out=x")
  with pytest.raises(ValueError, match="both name the data"):
    evaluate.command(*eval_flags(parse, run, *words))
  with pytest.raises(ValueError, match="--data .* are not those of the run: .*--out DIR"):
    evaluate.command(*eval_flags(parse, run, f"--data={other}"))
