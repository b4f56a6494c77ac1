"""The trained networks of the package: found by name, used everywhere, as good as their cards."""

import json
import logging
import re

import numpy as np
import pytest
import safetensors
from helpers import ROOT
from PIL import Image
from scipy import ndimage

from fdep_jax import cli, data, detector, export, predict, start, zoo
from fdep_jax.cli import arguments
from fdep_jax.data import frames, synthetic
from fdep_jax.metrics import hse

README = (ROOT / "README.md").read_text()
FRAME = ROOT / "docs/frame.png"
SCENE = (7, 114, 256, 320)  # of FRAME: seed, index, height, width
SETS = ("NUAA-SIRST", "NUDT-SIRST", "IRSTD-1K")
FIRST = 20  # test images of each set that a card scores apart


def card(name: str) -> str:
  return zoo.place(f"zoo:{name}").with_suffix(".md").read_text()


def scores(name: str, chapter: str) -> dict[str, list[float]]:
  """Reads {set: numbers of its row} in a table of a card, without the intervals."""
  text = card(name).split(f"## {chapter}")[1].split("\n## ")[0]
  rows = re.findall(r"^\| (\S+) \| (.*) \|$", text, re.MULTILINE)
  numbers = {key: re.sub(r"\(.*?\)", "", row).split("|") for key, row in rows}
  return {key: [float(n) for n in row] for key, row in numbers.items() if key in (*SETS, "SIRST3")}


@pytest.mark.parametrize("name", zoo.names())
def test_a_network_is_small_and_tells_what_it_is(name):
  file = zoo.place(f"zoo:{name}")
  assert file.stat().st_size <= 3e6
  with safetensors.safe_open(file, framework="numpy") as content:
    about = json.loads(content.metadata()["fdep_jax"])
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


def test_the_best_is_the_one_with_the_highest_held_out_score():
  held_out = {
    name: float(re.search(r"held-out HSE is (\d+\.\d\d)", card(name).replace("\n", " "))[1])
    for name in zoo.names()
  }
  assert zoo.BEST == max(held_out, key=held_out.get)


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
  assert f"taking zoo:{zoo.BEST}, the best of the zoo" in caplog.text
  sample = synthetic.scene(*SCENE)[0]
  np.testing.assert_array_equal(np.asarray(Image.open(FRAME)), sample.image[..., 0])
  label, number = ndimage.label(sample.mask, np.ones((3, 3)))
  content = json.loads((tmp_path / "targets.json").read_text())
  (frame,) = content["frames"]
  hit = {int(label[round(t["row"]), round(t["col"])]) for t in frame["targets"]}
  assert hit == {*range(1, number + 1)} and len(frame["targets"]) == number


def test_a_network_is_the_same_by_every_door():
  one = detector.load("zoo:acm")  # as predict.load
  other = detector.load(None, zoo.place("zoo:acm"))
  begun = start.read("zoo:acm", "acm")
  frame = next(frames.read(FRAME))
  prob = predict.Predictor(one)(frame)
  np.testing.assert_array_equal(predict.Predictor(other)(frame), prob)
  assert begun and {name.partition("/")[0] for name in begun} == {"backbone"}
  assert one.source.startswith("zoo:acm of runs/") and one.branch == "light"


@pytest.mark.parametrize(
  "load, said",
  [
    (lambda: detector.load(None, "zoo:nothing"), r"There is no zoo:nothing. The zoo has zoo:acm"),
    (lambda: detector.load("zoo:nothing"), "The zoo has"),
    (lambda: detector.load(None, "zoo:acm", "main"), "holds the light branch only"),
    (lambda: detector.load("runs/x", "zoo:acm"), "leave --workdir out"),
    (lambda: detector.load_published("zoo:acm", "acm"), "Leave --backbone out"),
    (lambda: start.read("zoo:nothing", "acm"), "init_from=zoo:nothing: .*The zoo has"),
    (lambda: start.read("zoo:acm", "mlcl"), "its network is acm, and model.backbone is mlcl"),
    (lambda: export.export(None, None, "zoo:acm"), "--out DIR"),
    (lambda: detector.load(None), "--checkpoint zoo:"),
  ],
)
def test_a_wrong_name_or_use_is_refused_with_the_right_one(load, said):
  with pytest.raises(ValueError, match=said):
    load()


@pytest.mark.parametrize(
  "words, said",
  [
    (["--mode=predict", "--input=x", "--workdir=zoo:acm"], "Name it so: --checkpoint zoo:acm"),
    (["--mode=eval", "--workdir=zoo:acm"], "Name it so: --checkpoint zoo:acm"),
    (["--mode=sweep", "--config=quickstart", "--workdir=zoo:acm"], "no folder of a run"),
    (["--mode=eval", "--data=x", "--out=y"], "Without a run: --checkpoint zoo:"),
    (["--mode=eval", "--checkpoint=zoo:acm"], "--data and --out"),
  ],
)
def test_a_command_that_names_it_wrongly_is_told_how(words, said, parse):
  with pytest.raises(ValueError, match=said):
    cli.check_given(arguments.mode_of(words), parse(*words))


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
