"""The trained networks of the package: found by name, used everywhere, as good as their cards."""

import json
import logging
import re

import numpy as np
import pytest
import safetensors
from flax import nnx
from helpers import ROOT, make_folder
from PIL import Image
from scipy import ndimage

from configs import finetune
from fdep_jax import cli, data, detector, export, predict, report, settings, start, zoo
from fdep_jax.cli import arguments
from fdep_jax.data import frames, synthetic
from fdep_jax.metrics import hse
from fdep_jax.runtime import checkpoint
from fdep_jax.tables import figures

README = (ROOT / "README.md").read_text()
FRAME = ROOT / "docs/frame.png"
SCENE = (7, 347, 256, 320)  # of FRAME: seed, index, height, width
SETS = ("NUAA-SIRST", "NUDT-SIRST", "IRSTD-1K")
FIRST = 20  # test images of each set that a card scores apart


def card(name: str) -> str:
  return zoo.place(f"zoo:{name}").with_suffix(".md").read_text()


def exported(name: str) -> dict:
  """Reads what `--mode export` wrote into a network's file."""
  with safetensors.safe_open(zoo.place(f"zoo:{name}"), framework="numpy") as content:
    return json.loads(content.metadata()["fdep_jax"])


def scores(name: str, chapter: str) -> dict[str, list[float]]:
  """Reads {set: numbers of its row} in a table of a card, without the intervals."""
  text = card(name).split(f"## {chapter}")[1].split("\n## ")[0]
  rows = re.findall(r"^\| (\S+) \| (.*) \|$", text, re.MULTILINE)
  numbers = {key: re.sub(r"\(.*?\)", "", row).split("|") for key, row in rows}
  return {key: [float(n) for n in row] for key, row in numbers.items() if key in (*SETS, "SIRST3")}


@pytest.mark.parametrize("name", zoo.names())
def test_a_network_is_small_and_tells_what_it_is(name):
  assert zoo.place(f"zoo:{name}").stat().st_size <= 3e6
  about = exported(name)
  assert about["config"]["model"]["backbone"] == name and about["config"]["mode"] == "fdep"
  assert re.fullmatch(r"runs/[\w/-]+", about["run"])  # no place of one machine
  assert f"seed {about['config']['seed']}" in card(name)
  assert f"{about['step']} steps" in card(name).replace("\n", " ")
  chapters = ("Scores", "A fixed subset", "Weaknesses", "Licences")
  assert [c for c in chapters if f"\n## {c}\n" not in card(name)] == []
  for chapter, columns in (("Scores", 8), ("A fixed subset", 3)):
    assert {len(row) for row in scores(name, chapter).values()} == {columns}
  assert {*scores(name, "Scores")} == {*SETS, "SIRST3"}


def test_the_readme_lists_every_network_with_the_scores_of_its_card():
  rows = re.findall(r"^\| \[`zoo:(\w+)`\].*?\| ([\d.| ]+) \|$", README, re.MULTILINE)
  listed = {name: [float(n) for n in row.split("|")] for name, row in rows}
  assert sorted(listed) == zoo.names()
  for name, numbers in listed.items():
    found = scores(name, "Scores")
    assert numbers == [*(found[key][-1] for key in (*SETS, "SIRST3")), found["SIRST3"][1]]


@pytest.mark.parametrize("name", zoo.names())
def test_a_card_has_the_numbers_of_its_run(name):
  """All scores with their intervals, the held-out score, and what Weaknesses computes of them."""
  metrics = json.loads((run_of(name) / "metrics.json").read_text())
  text = " ".join(card(name).split())
  parts = {part: found["light"] for part, found in metrics["parts"].items()}
  for key, light in ({"SIRST3": metrics["light"]} | parts).items():
    cells = [f"| {key} | {light['images']}"]
    for metric in ("iou", "niou", "pd", "fa", "hse_p", "hse_t", "hse"):
      factor = 1e6 if metric == "fa" else 100
      low, high = light["intervals"][metric]
      cells.append(f"{factor * light[metric]:.2f} ({factor * low:.2f}–{factor * high:.2f})")
    assert " | ".join(cells) + " |" in text
    if key != "SIRST3":
      alarms = light["false_alarms"] / light["pixels"] * 512**2
      assert f"{alarms:.2f} on {key}" in text
  light = metrics["light"]
  right = light["recall"] * light["target_pixels"]
  alarms = light["fa"] * light["pixels"] / (right / light["precision"] - right)
  claim = (
    f"{100 * light['precision']:.0f} % belong to a target; of the others, {100 * alarms:.0f} %"
  )
  assert f"{claim} lie in false alarms." in text
  assert f"Of the targets' pixels it marks {100 * light['recall']:.0f} %" in text
  assert metrics["checkpoint"] == exported(name)["step"]
  assert f"{100 * held_out(name):.2f}" == re.search(r"held-out HSE is (\d+\.\d\d)", text)[1]


def run_of(name: str):
  """The folder of results of a network's training."""
  workdir = exported(name)["run"].split("/")
  return ROOT / "results" / workdir[-2] / "runs" / workdir[-1]


def evaluations(run) -> dict[int, float]:
  """Returns step -> HSE on the held-out images."""
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["eval"]["light"]["hse"] for line in lines if "eval" in line}


def held_out(name: str) -> float:
  found = evaluations(run_of(name))
  assert found[exported(name)["step"]] == max(found.values())
  return max(found.values())


@pytest.mark.parametrize("name", zoo.names())
def test_a_network_is_the_best_seed_on_held_out_images(name):
  row = run_of(name).name.rpartition("_seed")[0]
  runs = sorted(run_of(name).parent.glob(f"{row}_seed*"))
  best = {run: max(evaluations(run).values()) for run in runs}
  assert run_of(name) == max(best, key=best.get)
  text = " ".join(card(name).split())
  assert [f"{100 * score:.2f}" for score in best.values() if f"{100 * score:.2f}" not in text] == []


def test_the_best_is_the_one_with_the_highest_held_out_score():
  assert zoo.BEST == "zoo:" + max(zoo.names(), key=held_out)
  best, acm, alcnet = (f"{100 * held_out(name):.2f}" for name in ("mlcl", "acm", "alcnet"))
  claim = f"on held-out train images ({best}; `zoo:acm` has {acm}, `zoo:alcnet` {alcnet})"
  assert claim in " ".join(README.split())
  flops = {
    name: json.loads((run_of(name) / "metrics.json").read_text())["flops"] for name in zoo.names()
  }
  parts = [round(flops["mlcl"] / flops[name]) for name in ("acm", "alcnet")]
  assert parts == [21, 24]
  assert "`zoo:acm` takes a 21st of its FLOPs, `zoo:alcnet` a 24th." in " ".join(README.split())
  assert "It takes 21 times as many FLOPs as `zoo:acm`." in card("mlcl")


def test_the_card_of_alcnet_compares_it_with_the_study_and_mlcl():
  text, other = (
    " ".join(card("alcnet").split()),
    run_of("alcnet").with_name("alcnet-original_seed0"),
  )
  metrics = json.loads((other / "metrics.json").read_text())
  assert f"ALCNet reached HSE {100 * metrics['light']['hse']:.2f}, so" in text
  mine, mlcl = (scores(name, "Scores") for name in ("alcnet", "mlcl"))
  assert [key for key in mine if mine[key][-1] > mlcl[key][-1]] == ["NUAA-SIRST", "IRSTD-1K"]
  assert "its HSE is higher on NUAA-SIRST and IRSTD-1K, where the intervals overlap" in text
  assert all(mine[key][1] < mlcl[key][1] for key in mine)
  assert "Its IoU is lower on every set." in text
  parts = [
    json.loads((run_of(n) / "metrics.json").read_text())["parts"] for n in ("alcnet", "mlcl")
  ]
  apart = [
    part
    for part in SETS
    if max(found[part]["light"]["intervals"]["hse"][0] for found in parts)
    > min(found[part]["light"]["intervals"]["hse"][1] for found in parts)
  ]
  assert apart == ["NUDT-SIRST"] and "lower on NUDT-SIRST, where they do not" in text


@pytest.mark.slow  # needs the datasets; the other tests of the cards do not
@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("root", SETS)
def test_a_network_scores_what_its_card_says_on_a_fixed_subset(shared, name, root):
  predictor = predict.Predictor(predict.load(f"zoo:{name}"))
  total = hse.Accumulator()
  for sample in data.load(shared / "data" / root, "test")[:FIRST]:
    total.update(predictor(sample.image), sample.mask)
  found = total.result()
  expected = scores(name, "A fixed subset")[root]
  assert [FIRST, 100 * found.iou, 100 * found.hse] == pytest.approx(expected, abs=0.02)


def test_the_shipped_frame_is_a_scene_whose_targets_are_all_found(
  tmp_path, caplog, monkeypatch, parse
):
  """The README's first example, as the program runs it."""
  monkeypatch.setattr(cli.logging, "basicConfig", lambda **_: None)
  caplog.set_level(logging.INFO)
  parse("--mode=predict", f"--input={FRAME}", f"--out={tmp_path}")
  cli.main([])
  assert f"taking {zoo.BEST}, the best of the zoo" in caplog.text
  sample = synthetic.scene(*SCENE)[0]
  np.testing.assert_array_equal(np.asarray(Image.open(FRAME)), sample.image[..., 0])
  label, number = ndimage.label(sample.mask, np.ones((3, 3)))
  content = json.loads((tmp_path / "targets.json").read_text())
  (frame,) = content["frames"]
  hit = {int(label[round(t["row"]), round(t["col"])]) for t in frame["targets"]}
  assert hit == {*range(1, number + 1)} and len(frame["targets"]) == number


@pytest.mark.parametrize("name", zoo.names())
def test_a_card_says_how_many_targets_of_synthetic_scenes_are_found(name):
  predictor, kinds = predict.Predictor(predict.load(f"zoo:{name}")), []
  for index in range(120):
    sample = synthetic.scene(SCENE[0], index, *SCENE[2:])[0]
    kinds += [kind for kind, _ in figures.found(predictor(sample.image), sample.mask)]
  hits, targets = kinds.count("hit"), kinds.count("hit") + kinds.count("miss")
  text = " ".join(card(name).split())
  assert "in the 120 scenes `scene(7, i, 256, 320)`, i from 0 to 119" in text
  assert f"it finds {100 * hits / targets:.0f} % of the {targets} targets." in text


@pytest.mark.slow  # 500 frames
@pytest.mark.parametrize("name", zoo.names())
def test_a_card_says_in_how_many_scenes_all_targets_are_found(name):
  predictor, whole = predict.Predictor(predict.load(f"zoo:{name}")), []
  for index in range(500):
    sample = synthetic.scene(SCENE[0], index, *SCENE[2:])[0]
    kinds = [kind for kind, _ in figures.found(predictor(sample.image), sample.mask)]
    if len(kinds) >= 3 and set(kinds) == {"hit"}:
      whole.append(index)
  text = " ".join(card(name).split())
  assert f"`docs/frame.png` is {'' if SCENE[1] in whole else 'not '}one of these." in text
  claim = f"Of the first 500 such scenes, it solves {len(whole)} that have three or more targets"
  assert claim in text


def test_a_network_is_the_same_by_every_door(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  one = detector.load("zoo:acm")  # as predict.load
  other = detector.load(None, zoo.place("zoo:acm"))
  frame = next(frames.read(FRAME))
  prob = predict.Predictor(one)(frame)
  np.testing.assert_array_equal(predict.Predictor(other)(frame), prob)
  assert one.source.startswith("zoo:acm of runs/") and one.branch == "light"
  weights = nnx.state(one.model.backbone, nnx.Any(nnx.Param, nnx.BatchStat))
  expected = {f"backbone/{name}": array for name, array in checkpoint.flatten(weights).items()}
  begun = start.read("zoo:acm", "acm")
  assert begun.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(begun[name], array)


def test_a_dataset_is_scored_by_name(tmp_path, parse, monkeypatch):
  monkeypatch.setattr(cli.logging, "basicConfig", lambda **_: None)
  root, out = make_folder(tmp_path / "mine"), tmp_path / "out"
  parse("--mode=eval", "--checkpoint=zoo:acm", f"--data={root}", f"--out={out}")
  cli.main([])
  found = json.loads((out / "mine" / "metrics.json").read_text())
  assert found["inputs"]["network"].startswith("zoo:acm of runs/")
  total, predictor = hse.Accumulator(), predict.Predictor(detector.load("zoo:acm"))
  for sample in data.load(root, "test"):
    total.update(predictor(sample.image), sample.mask)
  expected = total.result()
  assert expected.ap > 0  # so that the comparison says something
  for name in ("ap", "roc_auc", "iou", "hse"):
    assert found["light"][name] == pytest.approx(getattr(expected, name), abs=1e-6)


def test_a_setting_of_the_machine_reaches_prediction(tmp_path, parse, monkeypatch):
  seen = []
  monkeypatch.setattr(predict.mesh, "cache_programs", lambda config: seen.append(config))
  cache = f"--config.log.compile_cache={tmp_path / 'cache'}"
  flags = parse("--mode=predict", "--checkpoint=zoo:acm", f"--input={FRAME}", cache)
  predict._detector(flags)
  assert [config.log.compile_cache for config in seen] == [str(tmp_path / "cache")]


def test_an_export_tells_of_the_run_and_its_scores():
  about = export._about(detector.load("zoo:acm"))
  assert about["run"] == exported("acm")["run"] and about["step"] == exported("acm")["step"]
  assert 100 * about["metrics"]["hse"] == pytest.approx(
    scores("acm", "Scores")["SIRST3"][-1], abs=0.01
  )


@pytest.mark.parametrize(
  "load, said",
  [
    (lambda: detector.load(None, "zoo:ACM"), "There is no zoo:ACM. Do you mean zoo:acm[?]"),
    (lambda: detector.load(None, "zoo:"), "There is no zoo:. Trained networks .*: zoo:acm"),
    (lambda: detector.load("zoo:msda"), "There is no zoo:msda. Trained networks .*: zoo:acm"),
    (lambda: detector.load(None, "zoo/acm"), "Do you mean zoo:acm[?]"),
    (lambda: detector.load(None, "acm"), "Do you mean zoo:acm[?]"),
    (lambda: start.read("acm", "acm"), "init_from=acm: .*Do you mean zoo:acm[?]"),
    (lambda: start.read("zoo:msda", "acm"), "init_from=zoo:msda: There is no"),
    (lambda: start.read("zoo:acm", "mlcl"), "its network is acm, and model.backbone is mlcl"),
    (lambda: detector.load(None, "zoo:acm", "main"), "light branch only. The main branch is in a"),
    (lambda: detector.load("runs/x", "zoo:acm"), "zoo:acm is no run .* Leave runs/x out"),
    (lambda: detector.load("zoo:acm", "best"), "zoo:acm is no run .* Leave best out"),
    (lambda: detector.load_published("zoo:acm", "acm"), "Leave --backbone out"),
    (lambda: export.export(None, None, "zoo:acm"), "--out DIR"),
    (lambda: export.export("zoo:acm"), "--out DIR"),
    (lambda: detector.load(None), f"--checkpoint {zoo.BEST}"),
    (lambda: report.of(["zoo:acm"], "x.html"), "--mode eval --checkpoint FILE"),
  ],
)
def test_a_wrong_name_or_use_is_refused_with_the_right_one(load, said):
  with pytest.raises((ValueError, FileNotFoundError), match=said):
    load()


@pytest.mark.parametrize(
  "words, said",
  [
    (["--mode=predict", "--input=x", "--workdir=zoo:acm"], "so: --checkpoint zoo:acm.$"),
    (["--mode=predict", "--input=x", "--workdir=zoo:msda"], "There is no zoo:msda"),
    (["--mode=eval", "--workdir=zoo:acm"], "so: --checkpoint zoo:acm.$"),
    (["--config=quickstart", "--workdir=zoo:acm"], "init_from=zoo:acm --workdir FOLDER.$"),
    (["--mode=sweep", "--config=quickstart", "--workdir=zoo:acm"], "no folder of a run.$"),
    (["--mode=eval", "--data=x", "--out=y"], f"Without a run: --checkpoint {zoo.BEST} --data"),
    (["--mode=eval", "--checkpoint=zoo:acm"], "^--mode eval needs --data and --out.$"),
    (["--mode=eval", "--checkpoint=acm", "--out=y"], f"is named --checkpoint {zoo.BEST}.$"),
    (["--mode=eval", "--workdir=x", "--checkpoint=zoo:acm"], "needs no run: leave --workdir out"),
    (["--mode=export", "--workdir=x", "--checkpoint=a.safetensors"], "leave --workdir out"),
    (["--mode=export", "--checkpoint=zoo:ACM"], "Do you mean zoo:acm[?]"),
    (["--mode=predict", "--input=x", "--checkpoint=zoo:acm", "--mean=1"], "zoo:NAME know their"),
  ],
)
def test_a_command_that_names_it_wrongly_is_told_how(words, said, parse):
  with pytest.raises(ValueError, match=said):
    cli.check_given(arguments.mode_of(words) or "train", parse(*words))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_onnxruntime_repeats_an_exported_network(tmp_path, name):
  onnxruntime = pytest.importorskip("onnxruntime")
  export.export(None, tmp_path, f"zoo:{name}")
  frame = next(frames.read(FRAME))
  planes = np.repeat(np.float32(frame / 255)[None, None], 3, axis=1)
  session = onnxruntime.InferenceSession(tmp_path / "light.onnx")
  found = session.run(None, {"image": planes})[0][0, 0]
  expected = predict.Predictor(predict.load(f"zoo:{name}"))(frame)
  np.testing.assert_allclose(found, expected, rtol=0, atol=export.TOLERANCE)
  assert (expected > 0.5).any()


@pytest.mark.parametrize("name", zoo.names())
def test_the_config_for_fine_tuning_goes_on_with_a_network_of_the_zoo(name):
  config = finetune.get_config()
  if name != "acm":  # with the flags of docs/training.md
    flags = "--config.model.backbone=NAME --config.train.init_from=zoo:NAME"
    assert flags in (ROOT / "docs/training.md").read_text()
    config.model.backbone, config.train.init_from = name, f"zoo:{name}"
  settings.check(config)
  assert config.train.init_from == f"zoo:{name}"
  assert start.read(config.train.init_from, config.model.backbone)
  before = exported(name)["config"]
  for setting in (
    "model.bn_momentum",
    "data.crop",
    "data.crop_margin",
    "data.augment",
    "data.target_crop_prob",
    "train.batch_size",
  ):
    section, field = setting.split(".")
    assert config[section][field] == before[section][field], setting
