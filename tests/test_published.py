"""Published networks without a run: their normalisation, and eval, predict and export of a file."""

import importlib.util
import json
import re

import jax
import jax.export
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, make_folder, make_network, randomise, toy_config, written_run
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import converters
from converters import normalisation, torch_file
from fdep_jax import build, cli, data, evaluate, export, predict, report
from fdep_jax import detector as detector_lib
from fdep_jax.metrics import hse

GREY = {"in_channels": 1, "fusion_norm": "batch"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# Mean and deviation.


@pytest.mark.parametrize(
  ("words", "expected"),
  [
    (("0.4", "0.2", None), (0.4, 0.2)),
    (("102", "51", None), (0.4, 0.2)),
    (("0", "255", None), (0.0, 1.0)),
    (("0.3,0.4,0.5", "0.2", None), ((0.3, 0.4, 0.5), 0.2)),
    (("51,102,0", "25.5,51,51", None), ((0.2, 0.4, 0.0), (0.1, 0.2, 0.2))),
    (("0.4,0.4,0.4", "0.2,0.2,0.2", None), (0.4, 0.2)),
    ((None, None, "none"), (0.0, 1.0)),
    ((None, None, "ImageNet"), IMAGENET),
    ((None, None, "basicirstd:nudt-sirst"), (107.80905151367188 / 255, 33.02274703979492 / 255)),
    ((None, None, "lesps:SIRST3"), (95.010 / 255, 41.511 / 255)),
  ],
)
def test_a_mean_and_a_deviation_are_fractions_of_white(words, expected):
  found = normalisation.parse(*words)
  assert len(found) == 2
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-15)
    assert isinstance(ours, tuple) == isinstance(theirs, tuple)


def test_without_a_word_there_is_no_normalisation():
  assert normalisation.parse(None, None, None) is None


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("0.4", None, None), "--mean is given without --std"),
    ((None, "0.2", None), "--std is given without --mean"),
    (("0.4", "0.2", "none"), "Leave out --mean and --std"),
    ((None, None, "basicirstd"), "not known. There are none, imagenet, basicirstd:NUAA-SIRST"),
    (("dark", "0.2", None), "--mean dark: it must be a number, or three"),
    (("0.4", "0.2,0.2", None), "--std 0.2,0.2: it must be a number, or three"),
    (("nan", "0.2", None), "--mean nan: it must be a number"),
    (("0.4", "0", None), "a deviation is above 0"),
    (("-0.1", "0.2", None), "a mean is not below"),
    (("99.5", "0.2", None), "Give both as fractions of white"),
    (("0.4", "33.2", None), "Give both as fractions of white"),
    (("20000", "3000", None), "255 at most"),
  ],
)
def test_a_normalisation_that_cannot_be_meant_is_refused(words, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    normalisation.parse(*words)


def test_the_table_in_the_documents_is_that_of_the_program():
  text = (ROOT / "docs/deployment.md").read_text().partition("## A published network")[2]
  rows = re.findall(r"^\| `(.+)` \| (.+) \| .+ \|$", text, re.MULTILINE)
  assert [name for name, _ in rows] == [*normalisation.KNOWN]
  for name, shown in rows:
    mean, std = normalisation.KNOWN[name]
    if name == "imagenet":
      assert all(str(value) in shown for value in (*mean, *std))
    else:
      assert shown == f"{255 * mean:.3f}, {255 * std:.3f}"


def test_the_file_or_the_user_names_the_normalisation_and_not_both():
  one, other = (0.4, 0.2), (0.3, 0.1)
  assert normalisation.choose(True, 3, one, None) == one
  assert normalisation.choose(True, 3, None, other) == other
  assert normalisation.choose(True, 3, IMAGENET, None) == IMAGENET
  assert normalisation.choose(False, 1, None, None) == (0.0, 1.0)
  assert normalisation.choose(False, 1, (0.0, 1.0), other) == (0.0, 1.0)
  for arguments, said in (
    ((True, 3, None, None), "Give --mean M --std S .* --normalisation NAME .*basicirstd:IRSTD-1K"),
    ((True, 3, one, other), "has its own mean and deviation. Leave out"),
    ((False, 1, one, None), "takes grey levels divided by 255 as they are. Leave out"),
    ((True, 1, IMAGENET, None), "one grey channel, and the normalisation is of three"),
  ):
    with pytest.raises(ValueError, match=said):
      normalisation.choose(*arguments)


# The command line.


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["predict", "--input=x"], "needs --checkpoint"),
    (["eval", "--checkpoint=x", "--data=d"], "--backbone acm needs --out"),
    (["eval", "--checkpoint=x", "--out=o"], "--backbone acm needs --data"),
    (["export", "--checkpoint=x"], "--backbone acm needs --out"),
    (["eval", "--checkpoint=x", "--workdir=RUN"], "not of a run. Leave out --workdir"),
    (["predict", "--input=x", "--method=fkrw"], "has no network. Leave out --method"),
    (["predict", "--input=x", "--checkpoint=x", "--branch=main"], "no main branch"),
  ],
)  # fmt: skip
def test_flags_that_do_not_go_with_a_published_network_are_refused(words, said, parse):
  values = parse(f"--mode={words[0]}", "--backbone=acm", *words[1:])
  with pytest.raises(ValueError, match=said):
    cli.check_given(words[0], values)


@pytest.mark.parametrize("mode", ["eval", "predict", "export"])
@pytest.mark.parametrize("flag", ["mean", "std", "normalisation"])
def test_a_normalisation_without_a_network_is_refused(mode, flag, parse):
  values = parse(f"--mode={mode}", f"--{flag}=1", "--workdir=RUN")
  with pytest.raises(ValueError, match=f"Leave out --{flag}, or name a published network"):
    cli.check_given(mode, values)


def test_eval_of_a_file_without_its_network_says_what_it_needs(parse):
  with pytest.raises(ValueError, match="needs --backbone NAME, --data and --out"):
    cli.check_given("eval", parse("--mode=eval", "--checkpoint=acm.pth.tar"))


def test_settings_that_do_not_train_may_be_given_for_a_file(parse):
  words = ("--mode=eval", "--backbone=acm", "--checkpoint=x", "--data=d", "--out=o")
  values = parse(*words, "--config.eval.save_probs=True", "--config.data.range=0,4095")
  assert values.config.eval.save_probs and values.config.data.range == "0,4095"
  assert (values.config.mode, values.config.model.backbone) == ("original", "acm")
  for setting in ("train.epochs=3", "prior.checkpoint=x", "data.root=elsewhere"):
    found = parse(*words, f"--config.{setting}")
    assert f"cannot change {setting.partition('=')[0]}" in found and "eval.save_probs" in found


# A network of one grey channel, as BasicIRSTD and LESPS publish them, and one of three.


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
  """A file with the prefix that training adds, and its network."""
  net = make_network("acm", **GREY)
  path = tmp_path_factory.mktemp("grey") / "acm.safetensors"
  save_file({f"model.{name}": array for name, array in converters.to_torch(net).items()}, path)
  return path, net


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
  net = make_network("acm")
  path = tmp_path_factory.mktemp("colour") / "acm.safetensors"
  save_file(converters.to_torch(net), path)
  return path, net


def by_hand(net, levels, mean, std) -> np.ndarray:
  """Probabilities of H×W grey levels, H and W multiples of 32."""
  image = np.repeat(levels[None, ..., None] / 255, net.in_channels, -1)
  normal = ((image - np.array(mean)) / np.array(std)).astype(np.float32)
  return np.asarray(jax.jit(lambda x: jax.nn.sigmoid(net(x).final))(normal))[0, ..., 0]


def test_eval_scores_a_one_channel_file_as_by_hand(grey, parse, tmp_path, monkeypatch, capsys):
  path, net = grey
  root = make_folder(tmp_path / "set")
  for file in root.glob("*/*.png"):  # 64×64 instead of 40×48: nothing is padded
    with Image.open(file) as picture:
      tiled = np.tile(np.asarray(picture), (2, 2))[:64, :64]
    Image.fromarray(tiled).save(file)
  cost = {"flops": 1.0, "seconds_per_image": 0.1, "seconds_median": 0.1}
  monkeypatch.setattr(evaluate, "cost", lambda *_: cost)
  words = (f"--checkpoint={path}", "--backbone=acm", "--normalisation=lesps:SIRST3")
  words += (f"--data={root}", f"--out={tmp_path / 'out'}", "--config.eval.save_probs=True")
  values = parse("--mode=eval", *words)
  evaluate.command(values, values.config)
  total, folder = hse.Accumulator(), tmp_path / "out" / "set"
  for i in (2, 3):
    levels = np.asarray(Image.open(root / f"images/{i}.png"))
    prob = by_hand(net, levels, 95.010 / 255, 41.511 / 255)
    kept = np.load(folder / f"probs/light/{i}.npy")
    np.testing.assert_allclose(kept, prob, atol=1e-5)
    assert prob.std() > 0.01
    total.update(kept, np.asarray(Image.open(root / f"masks/{i}.png")) > 127)
  found = json.loads((folder / "metrics.json").read_text())
  expected = total.result().as_dict()
  assert {name: found["light"][name] for name in expected} == expected
  assert (found["checkpoint"], found["params"], found["images"]) == (None, 397_823, 2)
  assert (found["backbone"], found["options"]) == ("acm", GREY)
  np.testing.assert_allclose([found["mean"] * 255, found["std"] * 255], [95.010, 41.511])
  assert "intervals" in found["light"] and not (folder / "config.json").exists()
  assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"set": found}
  assert "acm on 1 dataset:" in capsys.readouterr().out
  # The report takes the folder, and shows no setting of a training that did not happen.
  page = report.of([folder], tmp_path / "comparison.html").read_text()
  assert "model.backbone" in page and "train.epochs" not in page


def test_eval_warns_of_thresholds_that_merge_targets(grey, parse, tmp_path, monkeypatch, capsys):
  def flooded(apply, state, prior, samples, *_):
    for i, sample in enumerate(samples):
      yield i, {"light": np.where(sample.mask, np.float32(1), np.float32(0.06))}

  cost = {"flops": 1.0, "seconds_per_image": 0.1, "seconds_median": 0.1}
  monkeypatch.setattr(evaluate, "cost", lambda *_: cost)
  monkeypatch.setattr(evaluate, "probabilities", flooded)
  words = (f"--checkpoint={grey[0]}", "--backbone=acm", "--normalisation=lesps:SIRST3")
  words += (f"--data={make_folder(tmp_path / 'set')}", f"--out={tmp_path / 'out'}")
  evaluate.command(parse("--mode=eval", *words), detector_lib.config_of("acm"))
  printed = capsys.readouterr().out
  assert "Warning: light branch: at prob > 0.05 predictions merge with each other" in printed


def test_what_a_file_states_is_taken_unless_another_is_given(colour, monkeypatch, caplog):
  path, net = colour
  stated = torch_file.Checkpoint(converters.to_torch(net), ([102.0], [51.0]))
  monkeypatch.setattr(torch_file, "read_checkpoint", lambda _: stated)
  caplog.set_level("INFO")
  found = detector_lib.load_published(path, "acm")
  assert (found.mean, found.std, found.fill) == (0.4, 0.2, 0.4)
  assert "states mean [102.0] and deviation [51.0] of its images; they are taken" in caplog.text
  found = detector_lib.load_published(path, "acm", "0.5", "0.1")
  assert (found.mean, found.std, found.fill) == (0.5, 0.1, 0.5)
  assert "states mean [102.0] and deviation [51.0] of its images; those given" in caplog.text
  monkeypatch.setattr(torch_file, "read_checkpoint", lambda _: stated._replace(
    normalisation=([102.0], [0.2])
  ))  # fmt: skip
  with pytest.raises(
    ValueError, match="its mean .102.0. and std .0.2.: the mean is of grey levels"
  ):
    detector_lib.load_published(path, "acm")


def files_agree(out, net, mean, std, predictor):
  """Compares each exported program with a network by hand and with the prediction."""
  levels = np.random.default_rng(0).integers(0, 256, (32, 64)).astype(np.uint8)
  prob = by_hand(net, levels, mean, std)
  np.testing.assert_allclose(predictor(levels, "full"), prob, atol=1e-5)
  image = np.repeat(np.float32(levels / 255)[None, ..., None], net.in_channels, -1)
  program = jax.export.deserialize(bytearray((out / "light.stablehlo").read_bytes()))
  np.testing.assert_allclose(program.call(image)[0], prob, atol=1e-5)
  if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "light.onnx")
    (found,) = session.run(None, {"image": image.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found[0, 0], prob, atol=1e-5)
  light = detector_lib.load(None, out / "light.safetensors")
  np.testing.assert_allclose(predict.Predictor(light)(levels, "full"), prob, atol=1e-5)
  return light


def test_a_one_channel_network_is_exported_to_every_format(grey, parse, tmp_path):
  path, net = grey
  words = (f"--checkpoint={path}", "--backbone=acm", "--mean=102", "--std=51", f"--out={tmp_path}")
  values = parse("--mode=export", *words)
  cli.check_given("export", values)
  export.command(values)
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  assert manifest["files"]["light_torch.safetensors"] and manifest["files"]["light.stablehlo"]
  assert manifest["input"]["shape"]["light.stablehlo"] == ["batch", "height", "width", 1]
  assert (manifest["input"]["mean"], manifest["input"]["std"]) == (0.4, 0.2)
  assert (manifest["step"], manifest["metrics"], manifest["run"]) == (None, None, str(path))
  # What was exported needs no normalisation again, and goes back bit for bit.
  file = tmp_path / "light_torch.safetensors"
  again = detector_lib.load_published(file, "acm")
  assert (again.mean, again.std, again.fill, again.options) == (0.4, 0.2, 0.4, GREY)
  light = files_agree(tmp_path, net, 0.4, 0.2, predict.Predictor(again))
  assert (light.options, light.step, light.fill) == (GREY, None, 0.4)
  for name, array in load_file(file).items():
    np.testing.assert_array_equal(converters.to_torch(net)[name], array, name)
  for words, said in (
    ((file, "dna"), "is of acm. Give --backbone acm"),
    ((file, "acm", "0.4", "0.2"), "has its own mean and deviation"),
    ((tmp_path / "light.safetensors", "acm"), "names its network. Leave --backbone out"),
  ):
    with pytest.raises(ValueError, match=said):
      detector_lib.load_published(*words)


def test_a_light_branch_is_scored_and_exported_without_its_run(toy, parse, tmp_path, monkeypatch):
  config = toy_config(mode="original")
  model = build.create_model(config, None)
  randomise(model)
  model.eval()
  own = detector_lib.Detector(
    model, "light", config, 0.4, 0.2, None, "a run, step 3", tmp_path / "run", 3
  )
  export.export_detector(own, tmp_path / "first")
  file, root = tmp_path / "first" / "light.safetensors", make_folder(tmp_path / "set")
  cost = {"flops": 1.0, "seconds_per_image": 0.1, "seconds_median": 0.1}
  monkeypatch.setattr(evaluate, "cost", lambda *_: cost)
  words = (f"--checkpoint={file}", f"--data={root}", f"--out={tmp_path / 'out'}")
  values = parse("--mode=eval", *words, "--config.eval.save_probs=True")
  cli.check_given("eval", values)
  assert values.config.model.backbone == cli._config(values).model.backbone == "toy"
  evaluate.command(values, values.config)
  predictor = predict.Predictor(own)
  for i in (2, 3):
    levels = np.asarray(Image.open(root / f"images/{i}.png"))
    kept = np.load(tmp_path / f"out/set/probs/light/{i}.npy")
    np.testing.assert_allclose(kept, predictor(levels, "full"), atol=1e-5)
    assert kept.std() > 0.01
  words = ("--mode=export", f"--checkpoint={file}")
  with pytest.raises(ValueError, match="is of no run. Name the folder to write, --out DIR"):
    export.command(parse(*words))
  export.command(parse(*words, f"--out={tmp_path / 'again'}"))
  found, expected = load_file(tmp_path / "again" / "light.safetensors"), load_file(file)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array)


def test_a_setting_that_ends_as_a_light_branch_does_names_none(parse):
  found = parse("--mode=eval", "--config.prior.checkpoint=vit.safetensors")
  assert "name its folder, --workdir RUN" in found


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--checkpoint=a.safetensors", "--data=d"], "needs --out"),
    (["--checkpoint=a.safetensors", "--out=d"], "needs --data"),
    (["--checkpoint=best"], "needs --workdir"),
  ],
)
def test_eval_of_a_light_branch_says_what_it_needs(words, said, parse):
  with pytest.raises(ValueError, match=said):
    cli.check_given("eval", parse("--mode=eval", *words))


def test_three_channels_may_each_have_their_mean(colour, tmp_path):
  path, net = colour
  detector = detector_lib.load_published(path, "acm", normalisation="imagenet")
  export.export_detector(detector, tmp_path)
  light = files_agree(tmp_path, net, *IMAGENET, predict.Predictor(detector))
  assert (light.mean, light.std) == IMAGENET
  with safe_open(tmp_path / "light_torch.safetensors", framework="numpy") as file:
    about = json.loads(file.metadata()["fdep_jax"])
  assert about["input"]["mean"] == list(IMAGENET[0])


def test_a_network_that_takes_grey_levels_as_they_are_needs_no_normalisation(tmp_path):
  net = make_network("rpcanet")
  save_file(converters.to_torch(net), tmp_path / "rpcanet.safetensors")
  for name in (None, "none"):
    found = detector_lib.load_published(
      tmp_path / "rpcanet.safetensors", "rpcanet", None, None, name
    )
    assert (found.mean, found.std) == (0.0, 1.0)
  with pytest.raises(ValueError, match="as they are"):
    detector_lib.load_published(tmp_path / "rpcanet.safetensors", "rpcanet", "0.4", "0.2")


def test_predict_finds_targets_with_a_published_file(grey, parse, tmp_path):
  path, _ = grey
  Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "frame.png")
  words = (f"--checkpoint={path}", "--backbone=acm", "--mean=0.4", "--std=0.2")
  predict.command(
    parse("--mode=predict", *words, f"--input={tmp_path / 'frame.png'}", f"--out={tmp_path / 'o'}")
  )
  found = json.loads((tmp_path / "o" / "targets.json").read_text())
  assert found["detector"] == f"{path}, acm" and found["branch"] == "light"
  with Image.open(tmp_path / "o" / "frame_prob.png") as picture:
    prob = np.asarray(picture) / 65535
  np.testing.assert_allclose(prob, by_hand(grey[1], np.zeros((32, 32)), 0.4, 0.2), atol=1e-5)


def test_a_published_network_is_padded_with_its_mean(grey, tmp_path):
  path, net = grey
  found = detector_lib.load_published(path, "acm", "102", "51")
  levels = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)
  padded = np.full((64, 64), 102.0)
  padded[:40, :60] = levels
  expected = by_hand(net, padded, 0.4, 0.2)[:40, :60]
  np.testing.assert_allclose(predict.Predictor(found)(levels, "full"), expected, atol=1e-5)
  black = predict.Predictor(found._replace(fill=0.0))(levels, "full")
  assert np.abs(black - expected).max() > 1e-3  # as a run's
  sample = data.Sample("a", np.repeat(levels[..., None], 3, 2), np.zeros((40, 60), bool))
  (batch,) = data.eval_batches([sample], fill=found.fill)
  np.testing.assert_allclose(batch["image"][0, ..., 0], padded, atol=1e-4)
  (batch,) = data.eval_batches([sample])
  assert batch["image"].dtype == np.uint8 and not batch["image"][0, 40:].any()
  about = {"network": "acm", "input": {"mean": 0.4, "std": 0.2}}  # of a run
  save_file(load_file(path), tmp_path / "run.safetensors", {"fdep_jax": json.dumps(about)})
  assert detector_lib.load_published(tmp_path / "run.safetensors", "acm").fill == 0


def test_a_file_that_does_not_fit_is_refused_with_both_sides(grey, tmp_path):
  path, _ = grey
  with pytest.raises(ValueError, match="(?s)not a checkpoint of mlcl.*missing.*unknown") as error:
    detector_lib.load_published(path, "mlcl", normalisation="none")
  lines = str(error.value).splitlines()
  assert len(lines) <= 20 and "of a different network, give its name: --backbone" in lines[-1]
  folder = tmp_path / "downloads"
  folder.mkdir()
  (folder / "best.pkl").write_bytes(b"")
  with pytest.raises(ValueError, match="is a folder, and no run.*The folder holds best.pkl"):
    detector_lib.load_published(folder, "acm")
  with pytest.raises(FileNotFoundError, match="is not the folder of a run.*holds best.pkl.*NAME"):
    detector_lib.load(None, folder)
  with pytest.raises(ValueError, match="No backbone is called 'amc'; there are acm"):
    detector_lib.load_published(path, "amc")
  with pytest.raises(ValueError, match="does not say how its images are normalised. Give --mean"):
    detector_lib.load_published(path, "acm")
  run = written_run(tmp_path / "run")
  for name in (run, "best", "last", "500"):
    with pytest.raises(ValueError, match="is of a run, whose config names its network"):
      detector_lib.load_published(name, "acm")
  with pytest.raises(FileNotFoundError, match="there is no such file"):
    detector_lib.load_published(tmp_path / "absent.pth.tar", "acm")


def test_the_crop_of_a_published_training_is_not_known(grey, monkeypatch):
  path, net = grey
  monkeypatch.setattr(type(net), "caution", classmethod(lambda cls, size, crop: f"at {crop}"))
  published = detector_lib.load_published(path, "acm", normalisation="none")
  assert predict.Predictor(published)._caution((32, 32)) == ""
  assert predict.Predictor(published._replace(step=3))._caution((32, 32)) == "at 448"


def test_a_file_keeps_the_range_that_became_its_grey_levels(grey, tmp_path):
  about = {"network": "acm", "input": {"mean": 0.4, "std": 0.2, "range": [0.0, 4095.0]}}
  save_file(load_file(grey[0]), tmp_path / "a.safetensors", {"fdep_jax": json.dumps(about)})
  assert detector_lib.load_published(tmp_path / "a.safetensors", "acm").range == (0.0, 4095.0)


def test_the_weights_are_those_of_the_file(grey):
  path, net = grey
  found = detector_lib.load_published(path, "acm", normalisation="none")
  kept = nnx.Any(nnx.Param, nnx.BatchStat)
  for ours, theirs in zip(
    jax.tree.leaves(nnx.state(found.model.backbone, kept)),
    jax.tree.leaves(nnx.state(net, kept)),
    strict=True,
  ):
    np.testing.assert_array_equal(ours, theirs)
