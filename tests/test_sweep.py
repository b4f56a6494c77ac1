"""Sweeps: each row once, whoever is killed; failures recorded; tables of what there is."""

import contextlib
import csv
import fcntl
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import sweeping
from helpers import command, deep_set, samples_and_maps, toy_config, write_report
from ml_collections import ConfigDict

from fdep_jax import build, data, evaluate, forward, settings
from fdep_jax.metrics import per_image
from fdep_jax.runtime import checkpoint, files
from fdep_jax.tables import experiments, figures, sweep, table
from fdep_jax.tables.experiments import Row, Table

SCRIPT = pathlib.Path(sweeping.__file__)


def start(workdir, compiled, *task) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, str(SCRIPT), str(workdir), str(compiled), *task],
    cwd=SCRIPT.parents[1],
    stdout=open(f"{workdir}.log", "a"),
    stderr=subprocess.STDOUT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
  )


def children(workdir) -> list[int]:
  """Processes that hold a run's lock."""
  found = []
  for path in pathlib.Path(workdir).glob("*/sweep.lock"):
    holder = files.holder(path.parent, path.name)
    found += [int(n) for n in re.findall(r"process (\d+)", holder)]
  return found


def timeless(results) -> dict:
  """The table without what a clock measured."""
  out = table.as_json(sweeping.table(), results)
  for row in out["rows"]:
    row["cells"].pop("time_s")
  return out


def ends(workdir) -> dict[str, int]:
  """How often each run came to its end."""
  return {
    path.parent.name: len(re.findall("test images of .*, step", path.read_text()))
    for path in pathlib.Path(workdir).glob("*/log.txt")
  }


@pytest.mark.slow
def test_six_rows_by_three_processes_and_five_kills_are_each_run_once(toy, tmp_path):
  compiled = tmp_path / "compiled"
  base = sweeping.config(compiled)
  assert start(tmp_path / "alone", compiled).wait(1200) == 0
  rng = random.Random(0)
  together = tmp_path / "together"
  processes = [start(together, compiled) for _ in range(3)]
  for kill in range(5):
    time.sleep(rng.uniform(6, 14))
    victim = rng.choice(processes)
    if kill % 2 and children(together):
      os.kill(rng.choice(children(together)), signal.SIGKILL)  # a training, not its sweep
    victim.kill()
    victim.wait()
    processes[processes.index(victim)] = start(together, compiled)
  for process in processes:
    process.wait(1200)
  assert start(together, compiled).wait(1200) == 0  # what killed trainings left, if anything
  assert len(ends(together)) == 6 and max(ends(together).values()) == 1
  ours, theirs = (
    table.collect(sweeping.table(), base, tmp_path / name) for name in ("together", "alone")
  )
  assert all(len(result.runs) == 2 and not result.why for result in ours)
  assert timeless(ours) == timeless(theirs)


@pytest.mark.slow
def test_a_terminated_sweep_saves_and_goes_on(tmp_path):
  process = start(tmp_path / "runs", tmp_path / "compiled")
  deadline = time.time() + 600
  while not list((tmp_path / "runs").glob("*/checkpoints/*")) and time.time() < deadline:
    time.sleep(0.2)
  process.terminate()
  assert process.wait(120) == 1  # Preempted, which only main.py makes 75
  assert "is saved" in (tmp_path / "runs.log").read_text()
  assert not children(tmp_path / "runs")
  assert not list((tmp_path / "runs").glob("*/failed.json"))


def fake(run: sweep.Run, hse: float, step: int = 12) -> None:
  """The files of a finished run."""
  run.folder.mkdir(parents=True, exist_ok=True)
  settings.claim_workdir(run.folder, run.config)
  branch = forward.deployed_branch(run.config.mode)
  numbers = {"iou": hse / 2, "niou": hse, "pd": 0.9, "fa": 1e-5, "hse_p": 0.9, "hse_t": 0.8}
  metrics = {branch: numbers | {"hse": hse}, "deployed": branch, "params": 12_345}
  metrics |= {"flops": 2e9, "seconds_per_image": 0.25, "last": {"checkpoint": step}}
  files.write_json(run.folder / "metrics.json", metrics)


def six(tmp_path, toy) -> list[sweep.Run]:
  return sweep.runs(sweeping.table(), sweeping.config(""), tmp_path)


def test_a_run_is_finished_by_its_own_config_at_its_full_length_only(toy, tmp_path):
  run = six(tmp_path, toy)[0]
  crop = run.config.data.crop
  assert sweep.state(run).word == "missing"
  settings.claim_workdir(run.folder, run.config)
  (run.folder / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
  assert str(sweep.state(run)) == "begun step 4 of 12"
  fake(run, 0.5)
  assert str(sweep.state(run)) == "finished HSE 50.00"
  for change, state in (
    ({"train.steps": 13}, "begun step 4 of 13"),  # its schedule is constant: it can go on
    ({"data.crop": 64}, f"of a different config (data.crop: {crop} there, 64 here)"),
  ):
    other = ConfigDict(run.config.to_dict())
    other.update_from_flattened_dict(change)
    assert str(sweep.state(run._replace(config=other))) == state
  fake(run, 0.5, step=4)  # evaluated by hand on its way
  assert str(sweep.state(run)) == "begun step 4 of 12"
  assert not sweep._complete(run.folder)
  (run.folder / "metrics.json").unlink()
  with files.locked(run.folder, "sweep.lock"):
    assert "running step 4 of 12 (process" in str(sweep.state(run))


def test_looking_at_a_run_never_makes_its_start_fail(tmp_path):
  """Somebody who looks at a lock holds it for a moment: here for a third of every second."""
  begin, looks = threading.Event(), []

  def look():
    with open(tmp_path / "lock", "a+") as file:
      while len(looks) < 6:
        fcntl.flock(file, fcntl.LOCK_SH)
        begin.set()
        time.sleep(0.05)
        fcntl.flock(file, fcntl.LOCK_UN)
        looks.append(1)
        time.sleep(0.1)

  thread = threading.Thread(target=look)
  thread.start()
  begin.wait()
  for _ in range(3):
    begin.clear()
    begin.wait()  # the lock is held now
    with files.locked(tmp_path):
      assert re.match(r"process \d+ on", files.holder(tmp_path, "lock"))
  thread.join()
  with files.locked(tmp_path), pytest.raises(files.InUse, match="is in use: process"):
    with files.locked(tmp_path):  # a training holds it for longer than any look
      pass


@pytest.mark.parametrize("vanishes", ["metrics.json", "failed.json"])
def test_a_file_that_a_starting_run_removes_or_replaces_is_no_error_of_the_view(
  toy, tmp_path, monkeypatch, vanishes
):
  """Whatever it has seen before: the file vanishes before every further read of it."""
  runs, read = six(tmp_path, toy), pathlib.Path.read_text
  fake(runs[0], 0.5)
  sweep._record(runs[0].folder, "the first attempt")
  if vanishes == "failed.json":
    (runs[0].folder / "metrics.json").unlink()
  path = runs[0].folder / vanishes
  for allowed in range(3):  # reads that find it
    left = [True] * allowed

    def once(self, *a, left=left, **k):
      if self == path and not left:
        raise FileNotFoundError(2, "No such file or directory", str(self))
      if self == path:
        left.pop()
      return read(self, *a, **k)

    monkeypatch.setattr(pathlib.Path, "read_text", once)
    words = {state.word for state in map(sweep.state, runs)}
    assert words <= {"finished", "failed", "begun", "missing"}
    left[:] = [True] * allowed
    table.collect(sweeping.table(), sweeping.config(""), tmp_path)
    left[:] = [True] * allowed
    with contextlib.suppress(FileNotFoundError):  # "contains no finished run"
      table.collect_folder(tmp_path)


def test_the_end_of_a_run_by_epochs_is_what_its_evaluation_says(toy, tmp_path):
  config = sweeping.config("")
  config.train.steps, config.train.epochs = 0, 2
  run = sweep.Run(None, 0, config, tmp_path / "run", None)
  fake(run, 0.5, step=40)
  path = run.folder / "metrics.json"
  metrics = json.loads(path.read_text())
  for steps, word in ((40, "finished"), (41, "begun"), (None, "begun")):
    files.write_json(path, metrics | {"steps": steps})
    assert sweep.state(run).word == word
  files.write_json(path, metrics)  # of an older version
  assert sweep.state(run).word == "begun"


def test_results_of_a_different_config_are_kept(toy, tmp_path):
  found = sweeping.table()._replace(seeds=(0,), rows=sweeping.table().rows[:1])
  base = sweeping.config(tmp_path / "compiled")
  base.model.backbone = "acm"  # the process does not know the toy
  (run,) = sweep.runs(found, base, tmp_path / "runs")
  fake(run, 0.5)
  before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
  base.data.crop *= 2
  (failed,) = sweep.sweep(found, base, tmp_path / "runs")
  assert "contains a run of a different config" in sweep.failed(failed)["error"]
  assert before.items() <= {p.name: p.read_bytes() for p in run.folder.iterdir()}.items()


def test_a_teacher_is_the_same_wherever_the_work_folder_is(toy, tmp_path, monkeypatch):
  student = Row("s", ("s",), {"mode": "original", "train.labels": "both"}, {}, teacher="toy-fdep")
  rows = (*sweeping.table().rows, student)
  found = sweeping.table()._replace(rows=rows, seeds=(0,))
  absolute = sweep.runs(found, sweeping.config(""), tmp_path)
  for run in absolute:
    fake(run, 0.5)
  monkeypatch.chdir(tmp_path)
  assert all(map(sweep.finished, sweep.runs(found, sweeping.config(""), ".")))


def test_runs_come_stage_by_stage_and_a_row_has_its_own_seeds(toy, tmp_path):
  found = sweeping.table()
  original, alone, both = found.rows
  found = found._replace(rows=(original._replace(stage=1), alone._replace(seeds=(1,)), both))
  names = [run.folder.name for run in sweep.runs(found, sweeping.config(""), tmp_path)]
  first = ["toy-fdep_seed0", "toy-fdep_wo_coisd_seed1", "toy-fdep_seed1"]
  assert names == [*first, "toy-original_seed0", "toy-original_seed1"]
  # With fewer seeds on the command line a row may have none left: it is in the table all the same.
  results = table.collect(found._replace(seeds=(0,)), sweeping.config(""), tmp_path)
  assert [result.row.name for result in results] == [row.name for row in found.rows]
  assert not results[1].runs


WRONG = {  # of a table with one right row a: a change, and what is said
  "rows=Row('a', ('a',), {}, {})": "rows are a tuple of Rows (a comma",
  "rows=('a',)": "rows are a tuple of Rows (a comma",
  "rows=()": "it has no rows",
  "seeds=(0)": "seeds is 0; it must be a tuple",
  "seeds=('0', '1')": "seeds is ('0', '1'); it must be a tuple",
  "seeds=()": "seeds is (); it must be a tuple",
  "seeds=(1, 1)": "seeds is (1, 1); it must be a tuple of different",
  "columns=('iou', 'f1')": "columns: there is no 'f1', but iou, niou, pd",
  "columns='iou'": "columns is 'iou'; it must be a tuple of texts",
  "head=('a', 'b')": "row 'a': its label ('a',) has 1 parts, and head 2",
  "head='a'": "head is 'a'; it must be a tuple of texts",
  "rows=(ROW, ROW)": "row 'a': 2 rows have this name",
  "rows=(ROW, ROW._replace(name='b'))": "row 'b': it has the label ('a',) of row 'a', whose place",
  "rows=(ROW, *(ROW._replace(name=n, side='s') for n in 'bc'))": "and the side 's' of row 'b'",
  "rows=(ROW._replace(name='a b'),)": "its name is that of a folder",
  "rows=(ROW._replace(label=('a')),)": "row 'a': label is 'a'; it must be a tuple of texts",
  "rows=(ROW._replace(label=['a']),)": "row 'a': label is ['a']; it must be a tuple of texts",
  "rows=(ROW._replace(changes=('seed', 1)),)": "row 'a': changes is ('seed', 1); it must be a dict",
  "rows=(ROW._replace(paper={'f1': 1.0}),)": "row 'a': paper has 'f1'; there are iou",
  "rows=(ROW._replace(paper=None),)": "row 'a': paper is None; it must be a dict",
  "rows=(ROW._replace(teacher='b'),)": "row 'a': its teacher is 'b', which is not a row",
  "rows=(ROW._replace(seeds=(0,)), STUDENT)": "row 'b': it runs with every seed, and its teacher",
  "rows=(ROW._replace(seeds=(0,)), STUDENT._replace(seeds=(0, 1)))": "with seeds (0, 1), and its",
  "rows=(ROW._replace(baseline='b'),)": "row 'a': its baseline is 'b', which is not a row",
  "rows=(ROW._replace(seeds=(0, 7)),)": "row 'a': it has seeds [7], which the table has not",
  "rows=(ROW._replace(seeds='0'),)": "row 'a': seeds is '0'; it must be a tuple",
}


def write_table(tmp_path, change: str):
  path = tmp_path / "table.py"
  path.write_text(
    "from fdep_jax.tables.experiments import Row, Table\n"
    "ROW = Row('a', ('a',), {}, {})\n"
    "STUDENT = Row('b', ('b',), {}, {}, teacher='a')\n"
    f"get_table = lambda: Table('', ('a',), ('iou',), (ROW,), (0, 1))._replace({change})\n"
  )
  return path


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_table_is_refused_when_it_is_read(tmp_path, change):
  with pytest.raises(ValueError) as told:
    experiments.load(write_table(tmp_path, change))
  title, *lines = str(told.value).splitlines()
  assert title == f"1 problem in the table {tmp_path / 'table.py'}:"
  (line,) = lines
  assert WRONG[change] in line


def test_all_problems_of_a_table_are_told_at_once(tmp_path):
  assert experiments.load(write_table(tmp_path, "")).seeds == (0, 1)
  right = "rows=(ROW._replace(seeds=(0, 1)), STUDENT._replace(seeds=(1,)))"
  assert len(experiments.load(write_table(tmp_path, right)).rows) == 2
  changes = ", ".join(
    ("seeds=(0)", "columns=('f1',)", "rows=(ROW._replace(paper={'p': 1}, seeds=1),)")
  )
  with pytest.raises(ValueError, match="4 problems") as told:
    experiments.load(write_table(tmp_path, changes))
  assert len(str(told.value).splitlines()) == 5


def test_wrong_settings_of_all_rows_are_told_before_the_first_run(toy, tmp_path):
  wrong = {
    "a": ({"model.backbone": "msdanet"}, "No backbone is called 'msdanet'"),
    "b": ({"data.crop": 30}, "data.crop is 30; toy needs a multiple of 4"),
    "c": ({"train.lr": 1.0}, "changes train.lr, which no config has"),
    "d": ({"train.batch_size": "many"}, "Row d sets train.batch_size to 'many': "),
    "e": ({"log.compile_cache": "{place}"}, "{seed} and {workdir} alone stand for something"),
    "f": ({"model.backbone": "rpcanet"}, "FDEP cannot be attached"),
    "g": ({"train.schedule": "linear"}, "train.schedule is 'linear'; optax has "),
    "h": ({"mode": "both"}, "mode is 'both'; it must be one of"),
  }
  rows = tuple(Row(name, ("a", "b"), changes, {}) for name, (changes, _) in wrong.items())
  found = sweeping.table()._replace(rows=(*sweeping.table().rows, *rows))
  for action in (sweep.sweep, table.collect):
    with pytest.raises(ValueError) as told:
      action(found, sweeping.config(""), tmp_path)
    for name, (_, text) in wrong.items():
      assert re.search(rf"(?m)^{name}: ", str(told.value)) and text in str(told.value), name
    assert "toy-" not in str(told.value)


def test_tasks_share_the_runs_and_keep_students_with_their_teachers(toy, tmp_path):
  everything = six(tmp_path, toy)
  shares = [sweep.part(everything, f"{i}/4") for i in range(4)]
  names = [run.folder.name for share in shares for run in share]
  assert sorted(names) == sorted(run.folder.name for run in everything)
  student = everything[0]._replace(folder=tmp_path / "s", teacher=everything[2].folder)
  shares = [sweep.part([*everything, student], f"{i}/4") for i in range(4)]
  assert student in shares[2] and everything[2] in shares[2]
  for wrong in ("4/4", "1", "a/2", "0/0", "-1/2"):
    with pytest.raises(ValueError, match="must be i/n"):
      sweep.part(everything, wrong)


def test_a_student_waits_for_its_teacher(toy, tmp_path):
  student = Row("s", ("s",), {"mode": "original", "train.labels": "both"}, {}, teacher="toy-fdep")
  rows = (*sweeping.table().rows, student)
  runs = sweep.runs(sweeping.table()._replace(rows=rows), sweeping.config(""), tmp_path)
  teacher, mine = runs[2], runs[3]
  assert mine.config.train.teacher == str(teacher.folder)
  assert str(sweep.state(mine)) == "waiting for toy-fdep_seed0"
  assert not sweep._can_begin(mine, 0)
  fake(teacher, 0.5)
  assert sweep._can_begin(mine, 0) and not sweep._can_begin(teacher, 0)


def test_a_failure_is_recorded_and_is_not_the_end_of_the_others(toy, tmp_path, monkeypatch, capsys):
  began = []

  def pretend(run, signals, view):
    began.append(run.folder.name)
    if run.row.name == "toy-original":
      run.folder.mkdir(parents=True, exist_ok=True)
      return -9  # as a process that the system ends for want of memory
    fake(run, 0.5)
    return 0

  monkeypatch.setattr(sweep, "_train", pretend)
  failed = sweep.sweep(sweeping.table(), sweeping.config(""), tmp_path)
  assert sorted(began) == sorted(run.folder.name for run in six(tmp_path, toy))
  assert [run.folder.name for run in failed] == ["toy-original_seed0", "toy-original_seed1"]
  assert "ended by signal 9" in sweep.failed(failed[0])["error"]
  assert "4 finished" in capsys.readouterr().out
  began.clear()
  sweep.sweep(sweeping.table(), sweeping.config(""), tmp_path)
  assert began == ["toy-original_seed0", "toy-original_seed1"]  # tried again, once


def test_a_training_that_fails_leaves_its_reason(toy, tmp_path):
  found = Table("", ("a", "b"), ("hse",), (sweeping.BROKEN,), (0,))
  failed = sweep.sweep(found, sweeping.config(tmp_path / "compiled"), tmp_path / "runs")
  assert len(failed) == 1
  about = sweep.failed(failed[0])
  assert about["error"].startswith("ValueError: ") and "Traceback" in about["traceback"]
  (result,) = table.collect(found, sweeping.config(""), tmp_path / "runs")
  assert result.why.startswith("failed ValueError: ")


# Tables


def results_of(tmp_path, toy, seeds=2):
  for run in six(tmp_path, toy):
    if run.row.name != "toy-fdep_wo_coisd" and run.seed < seeds:
      fake(run, 0.5 if run.row.name == "toy-original" else 0.6 + 0.02 * run.seed)
  return table.collect(sweeping.table(), sweeping.config(""), tmp_path)


def test_a_table_has_the_papers_numbers_ours_and_the_difference(toy, tmp_path):
  results = results_of(tmp_path / "runs", toy)
  cell = results[2].cells["hse"]  # 60 and 62 against 50
  assert cell.mean == pytest.approx(61) and cell.std == pytest.approx(np.sqrt(2))
  assert cell.difference == pytest.approx(11) and not cell.why
  assert results[0].cells["iou"].paper is None and results[0].cells["iou"].mean == 25
  text = table.write(sweeping.table(), results, tmp_path)
  assert text == (tmp_path / "table.md").read_text()
  assert "| 61.00 ± 1.41 (2) |" in text and "| +11.00 |" in text and "| 50.00 (2) |" in text
  assert "[1] toy-fdep_wo_coisd: not run, seed 0, 1" in text
  assert "| 2.00 | 0.250 |" in text  # GFLOPs, seconds
  tex = (tmp_path / "table.tex").read_text()
  assert r"61.00 $\pm$ 1.41 (2)" in tex and tex.count(r"\\") == 1 + 3 * 3
  lines = list(csv.DictReader((tmp_path / "table.csv").open()))
  (line,) = [r for r in lines if r["row"] == "toy-fdep" and r["column"] == "hse"]
  assert (line["paper"], line["ours"], line["seeds"], line["difference"]) == ("50", "61", "2", "11")
  assert json.loads((tmp_path / "table.json").read_text())["rows"][2]["cells"]["hse"]["ours"]


def test_a_row_with_some_of_its_seeds_says_so_and_parameters_need_no_run(toy, tmp_path):
  results = results_of(tmp_path, toy, seeds=1)
  assert results[0].why == "not run, seed 1" and len(results[0].runs) == 1
  assert results[0].cells["hse"].std is None
  text = table.markdown(sweeping.table(), results)
  assert "50.00 (1) [1]" in text and "[1] toy-original: not run, seed 1" in text
  lines = csv.DictReader(table.as_csv(sweeping.table(), results).splitlines())
  (line,) = [r for r in lines if (r["row"], r["column"]) == ("toy-fdep_wo_coisd", "params_m")]
  assert line["seeds"] == "0" and float(line["ours"]) > 0
  missing = results[1]
  assert not missing.runs and missing.cells["params_m"].values  # counted on the built model
  assert missing.cells["flops_g"].mean is None


def test_sides_stand_beside_each_other(toy, tmp_path):
  rows = tuple(
    Row(f"toy-{side}", ("Toy", "x"), {"data.synthetic_test": n}, {"hse": 10.0 * n}, side=side)
    for n, side in ((3, "A-SIRST"), (4, "B-SIRST"))
  )
  sided = Table("Two.", ("Network", "Scheme"), ("hse",), rows)
  base = sweeping.config("")
  results = table.collect(sided, base, tmp_path)
  text = table.markdown(sided, results)
  assert "| A-SIRST: HSE | B-SIRST: HSE | P (M) |" in text and "| 30.00 | 40.00 |" in text
  assert r"\multicolumn{1}{c}{A-SIRST} & \multicolumn{1}{c}{B-SIRST}" in table.latex(sided, results)


def test_a_folder_of_finished_runs_needs_no_table(toy, tmp_path):
  with pytest.raises(FileNotFoundError, match="no finished run"):
    table.collect_folder(tmp_path)
  results_of(tmp_path, toy)
  found, results = table.collect_folder(tmp_path)
  assert [(r.row.label, len(r.runs)) for r in results] == [
    (("toy-fdep",), 2),
    (("toy-original",), 2),
  ]
  assert "61.00 ± 1.41 (2)" in table.markdown(found, results)


def test_runs_of_other_lengths_or_crops_are_rows_of_their_own(toy, tmp_path):
  def run(name: str, seed: int, hse: float, **changes):
    config = sweeping.config("")
    config.update_from_flattened_dict({"seed": seed, **changes})
    fake(sweep.Run(None, seed, config, tmp_path / name, None), hse)

  run("a_seed0", 0, 0.1)
  run("a_seed1", 1, 0.3)
  run("b_seed0", 0, 0.5, **{"train.steps": 13})
  run("c_seed0", 0, 0.6, **{"data.crop": 64})
  run("c_seed1", 1, 0.7, **{"data.crop": 96})
  run("copy/a_seed1", 1, 0.3)
  _, results = table.collect_folder(tmp_path)
  assert {r.row.name: [round(v) for v in r.cells["hse"].values] for r in results} == {
    "a": [10, 30], "b": [50], "c_seed0": [60], "c_seed1": [70], "copy/a": [30],
  }  # fmt: skip


def test_a_folder_with_two_test_sets_names_them_and_counts_the_deployed_branch(toy, tmp_path):
  config = sweeping.config("")
  fake(sweep.Run(None, 0, config, tmp_path / "a", None), 0.5)
  path = tmp_path / "a/metrics.json"
  files.write_json(path, json.loads(path.read_text()) | {"params_deployed": 4_000})
  found, results = table.collect_folder(tmp_path)
  assert found.head == ("Run",) and results[0].cells["params_m"].values == (0.004,)
  assert "P counts the parameters of the deployed branch." in table.markdown(found, results)
  config = config.copy_and_resolve_references()
  config.data.synthetic_test += 1
  fake(sweep.Run(None, 0, config, tmp_path / "b", None), 0.5)
  found, results = table.collect_folder(tmp_path)
  sets = [r.row.label[1] for r in results]
  assert found.head == ("Run", "Test set") and len(set(sets)) == 2
  assert all(name in table.markdown(found, results) for name in sets)


def test_rows_are_compared_with_the_baseline_that_they_name(toy, tmp_path):
  results = with_maps(tmp_path, toy)
  results = [r._replace(row=r.row._replace(baseline="toy-fdep_wo_coisd")) for r in results]
  assert [name.split(",")[0] for name in table.paired(results, resamples=5)] == [
    "toy-original − toy-fdep_wo_coisd",
    "toy-fdep − toy-fdep_wo_coisd",
  ]
  names = [p.name for p in figures.write(results, tmp_path)]
  assert names == ["training.png", "pr.png", "found_toy-fdep_wo_coisd.png"]


def test_a_curve_of_losses_is_averaged_over_pieces():
  steps, values = [*range(200)], [*range(100), *[5] * 100]
  found = figures._means(steps, values)
  np.testing.assert_allclose(found[0], 1.5 + 4 * np.arange(50))
  np.testing.assert_allclose(found[1], [*(1.5 + 4 * np.arange(25)), *[5] * 25])
  np.testing.assert_allclose(figures._means([3, 7], [1, 2]), [[3, 7], [1, 2]])
  assert figures._means([], []).shape[1] == 0


def with_maps(tmp_path, toy):
  """Two rows whose maps are known: the first finds nothing, the second everything, and one more."""
  for run in six(tmp_path, toy):
    fake(run, 0.5)
    branch = forward.deployed_branch(run.config.mode)
    (run.folder / "probs" / branch).mkdir(parents=True)
    for sample in figures.test_images(run):
      prob = np.full(sample.mask.shape, 0.1, np.float32)
      if run.row.name == "toy-fdep":
        prob[sample.mask] = 0.9
        prob[-1, -1] = 0.7
      np.save(run.folder / "probs" / branch / figures._file(sample), prob)
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "eval": {"light": {"hse": 0.2}}}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "metrics.jsonl").write_text(text)
  return table.collect(sweeping.table(), sweeping.config(""), tmp_path)


def test_rows_with_maps_are_compared_on_the_same_images(toy, tmp_path):
  results = with_maps(tmp_path, toy)
  found = table.paired(results, resamples=50)
  assert list(found) == [
    "toy-fdep_wo_coisd − toy-original, 2 seeds",
    "toy-fdep − toy-original, 2 seeds",
  ]
  assert found["toy-fdep_wo_coisd − toy-original, 2 seeds"]["pd"] == (0, 0, 0, [0, 0])
  difference, low, high, _ = found["toy-fdep − toy-original, 2 seeds"]["pd"]
  assert difference == low == high == pytest.approx(100)
  difference, low, high, by_seed = found["toy-fdep − toy-original, 2 seeds"]["iou"]
  assert low <= difference <= high and difference > 50
  assert np.mean(by_seed) == pytest.approx(difference)
  assert "Paired over test images" in table.markdown(sweeping.table(), results)


@pytest.mark.parametrize("text", ["7100,8900", "auto"])
def test_maps_of_a_run_with_a_range_are_counted_on_the_images_of_its_evaluation(tmp_path, text):
  config = toy_config(**{"data.root": str(deep_set(tmp_path / "data")), "data.range": text})
  values = (7100.0, 8900.0)  # not what would be measured now
  samples = build.load_test(config, values)
  run = sweep.Run(None, 0, config, tmp_path / "run", None)
  (run.folder / "probs" / "light").mkdir(parents=True)
  for sample in samples:
    np.save(run.folder / "probs" / "light" / figures._file(sample), np.float32(sample.mask))
  about = {"deployed": "light", "test_sha256": data.fingerprint(samples)}
  files.write_json(run.folder / "metrics.json", about)
  if text == "auto":
    with checkpoint.Checkpoints(run.folder) as checkpoints:
      checkpoints.save(1, {"params": np.zeros(1)}, {"range": values})
  assert figures.totals(run).result().iou == 1
  np.testing.assert_array_equal(figures.test_images(run)[1].image, samples[1].image)


def test_a_difference_has_an_interval_over_images_and_one_over_seeds():
  gap = table.Gap(2.0, 1.5, 2.25, [1.0, 2.0, 3.0])  # t with 2 degrees of freedom: 4.303
  assert str(gap) == "+2.00 (+1.50 … +2.25; seeds -0.48 … +4.48); +1.00, +2.00, +3.00"
  assert str(table.Gap(-2.0, -3.0, 0.5, [-2.0])) == "-2.00 (-3.00 … +0.50)"


def test_the_parts_of_a_union_are_compared_by_themselves(toy, tmp_path):
  results = with_maps(tmp_path, toy)
  count = len(figures.totals(results[0].runs[0]))
  parts = {"first": {"images": 2}, "second": {"images": count - 2}}
  for result in results:
    for metrics in result.metrics:
      metrics["parts"] = parts
  found = table.paired(results, resamples=50)
  name = "toy-fdep − toy-original, 2 seeds"
  assert [key for key in found if key.startswith(name)] == [
    name,
    f"{name}, first",
    f"{name}, second",
  ]
  by_name = {result.row.name: figures.totals(result.runs[0]) for result in results}
  places = {"first": range(2), "second": range(2, count)}
  for part in parts:
    ours, theirs = (
      by_name[row].select(list(places[part])).result() for row in ("toy-fdep", "toy-original")
    )
    gaps = found[f"{name}, {part}"]
    assert gaps["iou"].mean == pytest.approx(100 * (ours.iou - theirs.iou))
    assert gaps["fa_1e6"].mean == pytest.approx(1e6 * (ours.fa - theirs.fa))
    assert gaps["hse"].mean == pytest.approx(100 * (ours.hse - theirs.hse))
  assert found[f"{name}, first"] != found[f"{name}, second"]
  # Runs that do not know the parts are compared as a whole alone.
  results[0].metrics[0].pop("parts")
  assert not any(key.endswith("first") for key in table.paired(results, resamples=5))


def test_the_counts_of_the_images_give_the_comparison_of_the_maps(toy, tmp_path):
  results = with_maps(tmp_path, toy)
  expected = table.paired(results, resamples=50)
  for run in six(tmp_path, toy):
    branch, path = forward.deployed_branch(run.config.mode), run.folder / "metrics.json"
    total = figures.totals(run)
    per_image.save(run.folder / per_image.FILE, {branch: total})
    metrics = json.loads(path.read_text())
    metrics[branch] |= total.result().as_dict()
    path.write_text(json.dumps(metrics))
    shutil.rmtree(run.folder / "probs")
  found = table.paired(results, resamples=50)
  assert found == expected and len(found) == 2
  # A file that is not of the metrics beside it is refused.
  best, worst = (tmp_path / f"toy-{name}_seed0" / per_image.FILE for name in ("fdep", "original"))
  shutil.copy(worst, best)
  with pytest.raises(ValueError, match="of another evaluation than metrics.json beside it"):
    table.paired(results, resamples=5)


def test_runs_on_different_test_images_are_not_compared(toy, tmp_path):
  results = with_maps(tmp_path, toy)
  runs = [run for run in six(tmp_path, toy) if run.row.name == "toy-fdep"]
  for run in runs:
    samples, maps = samples_and_maps(3)
    total = evaluate.accumulate(enumerate({"light": prob} for prob in maps), samples)["light"]
    per_image.save(run.folder / per_image.FILE, {"light": total})
    path = run.folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["light"] |= total.result().as_dict()
    path.write_text(json.dumps(metrics))
  with pytest.raises(ValueError, match="needs the same images and options"):
    table.paired(results, resamples=5)


def test_the_main_branch_of_a_run_that_deploys_the_light_one_is_listed_and_compared(toy, tmp_path):
  with_maps(tmp_path, toy)
  for run in six(tmp_path, toy):
    if run.row.name == "toy-fdep":  # the other branch finds nothing
      path = run.folder / "metrics.json"
      metrics = json.loads(path.read_text())
      metrics["main"] = {k: v / 10 for k, v in metrics["light"].items()}
      path.write_text(json.dumps(metrics))
      shutil.copytree(
        tmp_path / f"toy-original_seed{run.seed}" / "probs" / "light", run.folder / "probs" / "main"
      )
  results = table.collect(sweeping.table(), sweeping.config(""), tmp_path)
  assert list(table.main_branches(results)) == ["toy-fdep"]
  found = table.paired(results, resamples=50)
  assert found["toy-fdep, main branch − toy-original, 2 seeds"]["pd"] == (0, 0, 0, [0, 0])
  assert found["toy-fdep − toy-original, 2 seeds"]["pd"][0] == pytest.approx(100)
  text = table.markdown(sweeping.table(), results)
  assert "| toy-fdep | 2.50 (2) |" in text  # a tenth of IoU 25
  assert table.as_json(sweeping.table(), results)["rows"][2]["main_branch"]["hse"] == [5.0, 5.0]
  # A seed evaluated with eval.branches=deployed has no main branch, whatever maps it keeps.
  run = results[2].runs[1]
  metrics = {name: value for name, value in results[2].metrics[1].items() if name != "main"}
  files.write_json(run.folder / "metrics.json", metrics)
  for saved in (False, True):
    if saved:
      total = figures.totals(run)
      metrics["light"] |= total.result().as_dict()
      files.write_json(run.folder / "metrics.json", metrics)
      per_image.save(run.folder / per_image.FILE, {"light": total})
    found = table.paired(table.collect(sweeping.table(), sweeping.config(""), tmp_path), 5)
    assert [name for name in found if name.startswith("toy-fdep,") or "fdep −" in name] == [
      "toy-fdep − toy-original, 2 seeds",
      "toy-fdep, main branch − toy-original, 1 seed",
    ]


def test_figures_show_the_runs_that_exist(toy, tmp_path):
  results = results_of(tmp_path / "bare", toy)
  assert [p.name for p in figures.write(results, tmp_path)] == ["training.png"]
  results = with_maps(tmp_path / "full", toy)
  written = figures.write(results, tmp_path)
  assert [p.name for p in written] == ["training.png", "pr.png", "found_toy-original.png"]
  assert all(p.stat().st_size > 5000 for p in written)


def test_a_table_leaves_a_report_of_its_first_rows(toy, tmp_path):
  results = results_of(tmp_path, toy)
  out = tmp_path / "tables"
  assert table.write_report(results, out) == []
  samples, maps = samples_and_maps(3)
  for result in results:
    for run in result.runs:
      write_report(run.folder, samples, maps)
  assert table.write_report(results, out) == [out / "report.html"]
  page = (out / "report.html").read_text()
  first = [result.runs[0].folder.name for result in results if result.runs]
  assert len(first) > 1 and all(name in page for name in first)


@pytest.mark.filterwarnings("error")
def test_a_set_without_targets_has_no_gap_and_no_detections_to_draw(toy, tmp_path, monkeypatch):
  results, load = with_maps(tmp_path, toy), figures._test_images
  empty = lambda *key: [s._replace(mask=np.zeros_like(s.mask)) for s in load(*key)]  # noqa: E731
  monkeypatch.setattr(figures, "_test_images", empty)
  text = table.write(sweeping.table(), results, tmp_path)
  assert "nan" not in text and text.splitlines()[-1].split(" | ")[2::2] == ["–", "– |"]  # Pd, HSE
  found = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
  gaps = found["paired"]["toy-fdep − toy-original, 2 seeds"]
  assert gaps["hse"] == {"mean": None, "low": None, "high": None, "by_seed": [None, None]}
  assert gaps["fa_1e6"]["mean"] > 0
  assert figures.grid(tmp_path / "grid.png", results) is None


def test_no_json_file_holds_what_json_lacks(tmp_path):
  for value in (math.nan, math.inf):
    with pytest.raises(ValueError, match="not JSON compliant"):
      files.write_json(tmp_path / "a.json", {"a": [value]})
    config = toy_config(**{"loss.distill_weight": value})
    with pytest.raises(ValueError, match=f"loss.distill_weight is {value}; it must be a finite"):
      settings.check(config)
  assert not list(tmp_path.iterdir())


def test_hits_misses_and_false_alarms_are_distinguished():
  mask, prob = np.zeros((20, 20), bool), np.zeros((20, 20), np.float32)
  mask[3:5, 3:5] = mask[15, 15] = True
  prob[3:5, 3:5] = prob[3, 16] = 0.8
  marks = figures.found(prob, mask)
  assert marks == [("hit", (3.5, 3.5)), ("miss", (15, 15)), ("false alarm", (3, 16))]


def test_a_config_of_one_run_is_no_table_also_if_it_takes_an_argument():
  done = command("--mode", "sweep", "--config", "configs/tpu.py:acm", "--workdir", "never")
  assert done.returncode == 2 and "configs/tpu.py is the config of one run" in done.stderr
  assert "Traceback" not in done.stderr


def test_settings_that_rows_vary_are_refused_on_the_command_line():
  config = "configs/tables/table1.py"
  done = command("--mode", "sweep", "--config", config, "--workdir", "never", "--config.mode=fdep")
  assert done.returncode == 2 and "set mode themselves" in done.stderr
  assert "Traceback" not in done.stderr
  assert not experiments.pathlib.Path("never").exists()
