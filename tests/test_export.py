"""Export: files that give the light branch's numbers without this package, and nothing else."""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import Golden
from helpers import ROOT, TOYS, WEIGHTS, make_network, randomise, toy_backbone

import converters
from configs import base
from fdep_jax import backbones, export
from fdep_jax import detector as detector_lib
from fdep_jax.export import onnx
from fdep_jax.fdep import FDEP
from fdep_jax.runtime import checkpoint

SIZES = ((2, 3), (3, 2), (4, 6))  # in strides
BATCHES = (1, 3)
MEAN, STD, STEP = 0.4, 0.2, 7

FAST_FIRST = ["acm"] + [
  pytest.param(name, marks=pytest.mark.slow) for name in backbones.names() if name != "acm"
]
needs_onnx = pytest.mark.skipif(
  not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
  reason="needs the packages of requirements-export.txt",
)


def make_config(name: str, **changes):
  config = base.get_config()
  if not backbones.network_class(name).top_channels:
    config.mode = "original"
  settings = {"model.backbone": name, "data.root": "synthetic", "prior.checkpoint": "random"}
  config.update_from_flattened_dict({**settings, "data.crop": 64, **changes})
  return config


def make_run(folder, name: str) -> FDEP:
  """A run's folder with one checkpoint; returns the model in evaluation mode."""
  config = make_config(name)
  net = make_network(name)
  model = FDEP(net, dino_width=8, num_levels=2 if net.top_channels else 0, rngs=nnx.Rngs(0))
  randomise(model)
  model.eval()
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  _, params, stats, rng = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  checkpoints = checkpoint.Checkpoints(folder)
  meta = {"mean": MEAN, "std": STD, "dino_sha256": "random", "step": STEP, "best": 0.5}
  checkpoints.save(STEP, {"params": params, "stats": stats, "rng": rng}, meta)
  checkpoints.wait()
  checkpoints.close()
  return model


def detector_of(net: backbones.Backbone) -> detector_lib.Detector:
  """As if loaded from a run."""
  name = type(net).__module__.rsplit(".", 1)[-1]
  model = FDEP(net, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  return detector_lib.Detector(
    model, "light", make_config(name), MEAN, STD, None, "memory", pathlib.Path(), STEP
  )


def images(net, sizes=SIZES, batches=BATCHES):
  rng = np.random.default_rng(1)
  side = max(net.stride, 4)
  for batch in batches:
    for rows, columns in sizes:
      yield rng.random((batch, rows * side, columns * side, net.in_channels), np.float32)


def light_branch(model: FDEP):
  """Image -> probabilities, as the evaluation computes them from uint8 images."""
  graphdef, state = nnx.split(model)
  forward = jax.jit(
    lambda state, image: jax.nn.sigmoid(
      nnx.merge(graphdef, state).light((image - MEAN) / STD).final[..., 0]
    )
  )
  return lambda image: np.asarray(forward(state, image))


def in_an_empty_folder(tmp_path, code: str, *arguments) -> str:
  """Returns what a program prints that can import installed packages and nothing of ours."""
  folder = tmp_path / "elsewhere"
  folder.mkdir(exist_ok=True)
  done = subprocess.run(
    [sys.executable, "-I", "-c", code, *map(str, arguments)],
    cwd=folder,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A toy run, exported once: the model, its folder, the export's, the manifest."""
  folder = tmp_path_factory.mktemp("export") / "run"
  with toy_backbone():
    model = make_run(folder, "toy")
    yield model, folder, folder / "export", export.export(folder)


def test_the_manifest_describes_each_file(exported):
  model, folder, out, manifest = exported
  assert manifest == json.loads((out / "manifest.json").read_text())
  assert (manifest["run"], manifest["step"], manifest["threshold"]) == (str(folder), STEP, 0.5)
  assert manifest["metrics"] is None  # the run was not evaluated
  assert not list(out.glob("*.partial"))
  written = {name for name, facts in manifest["files"].items() if facts}
  assert written == {path.name for path in out.iterdir()} - {"manifest.json"}
  assert set(manifest["files"]) - written == set(manifest["absent"])
  assert {"light.safetensors", "light.stablehlo"} <= written
  assert "converters/toy.py" in manifest["absent"]["light_torch.safetensors"]
  for name in written:
    content = (out / name).read_bytes()
    facts = manifest["files"][name]
    assert facts["bytes"] == len(content)
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert facts["largest_difference"] <= 1e-5


def test_the_small_checkpoint_is_the_light_branch_of_the_run(exported):
  model, _, out, _ = exported
  light = detector_lib.load_light(out / "light.safetensors")
  assert (light.branch, light.mean, light.std, light.step) == ("light", MEAN, STD, STEP)
  assert light.config.model.backbone == "toy" and light.config.mode == "fdep"
  expected = checkpoint.flatten(nnx.state(model.backbone, WEIGHTS))
  loaded = checkpoint.flatten(nnx.state(light.model, WEIGHTS))
  assert {f"backbone/{name}" for name in expected} == set(loaded)  # no SAMF, no main statistics
  for name, value in expected.items():
    np.testing.assert_array_equal(loaded[f"backbone/{name}"], value, name)


def test_the_program_takes_every_size_and_batch(exported):
  model, _, out, _ = exported
  program = jax.export.deserialize(bytearray((out / "light.stablehlo").read_bytes()))
  assert program.platforms == ("cpu", "cuda", "tpu")
  expected = light_branch(model)
  for image in images(model.backbone):
    np.testing.assert_allclose(program.call(image), expected(image), atol=1e-5, strict=True)
  with pytest.raises(ValueError, match="remainder 2"):
    program.call(np.zeros((1, 18, 16, 3), np.float32))


def test_the_program_runs_without_this_package(exported, tmp_path):
  model, _, out, _ = exported
  (image,) = images(model.backbone, sizes=[(2, 3)], batches=[2])
  np.save(tmp_path / "image.npy", image)
  code = """
import sys, jax.export, numpy as np
path, image, result = sys.argv[1:]
program = jax.export.deserialize(bytearray(open(path, "rb").read()))
np.save(result, program.call(np.load(image)))
print([name for name in sys.modules if name.startswith(("fdep_jax", "converters", "flax"))])
"""
  files = (out / "light.stablehlo", tmp_path / "image.npy", tmp_path / "result.npy")
  assert in_an_empty_folder(tmp_path, code, *files).strip() == "[]"
  np.testing.assert_allclose(np.load(files[-1]), light_branch(model)(image), atol=1e-5)


def test_a_program_takes_no_more_pixels_than_the_network(toy, tmp_path, monkeypatch):
  net = make_network("toy")
  monkeypatch.setattr(type(net), "max_pixels", 6 * net.stride**2)
  light = export.make_light(detector_of(net))
  program = export._write_stablehlo(None, light, None, tmp_path / "program", {})
  for rows, columns in ((2, 3), (6, 1)):
    shape = (1, rows * net.stride, columns * net.stride)
    assert program(np.zeros((*shape, 3), np.float32)).shape == shape
  with pytest.raises(ValueError, match="refining shapes"):
    program(np.zeros((1, 2 * net.stride, 4 * net.stride, 3), np.float32))


@needs_onnx
def test_the_onnx_file_runs_without_this_package_and_without_jax(exported, tmp_path):
  model, _, out, _ = exported
  arrays = list(images(model.backbone))
  np.savez(tmp_path / "images.npz", *arrays)
  code = """
import sys, onnxruntime, numpy as np
path, images, results = sys.argv[1:]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
images = np.load(images)
run = lambda image: session.run(["probability"], {"image": image.transpose(0, 3, 1, 2)})[0]
np.savez(results, *(run(images[name]) for name in images.files))
print([name for name in sys.modules if name.startswith(("fdep_jax", "converters", "jax"))])
"""
  files = (out / "light.onnx", tmp_path / "images.npz", tmp_path / "results.npz")
  assert in_an_empty_folder(tmp_path, code, *files).strip() == "[]"
  results, expected = np.load(files[-1]), light_branch(model)
  for name, image in zip(results.files, arrays, strict=True):
    np.testing.assert_allclose(results[name][:, 0], expected(image), atol=1e-5, strict=True)


def test_without_onnx_the_rest_is_written_and_the_reason_given(
  exported, tmp_path, monkeypatch, caplog
):
  (tmp_path / "light.onnx").write_text("of an earlier export")
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if "onnx" in n else find(n))
  manifest = export.export(exported[1], tmp_path)
  assert manifest["files"]["light.onnx"] is None
  assert "pip install -r requirements-export.txt" in manifest["absent"]["light.onnx"]
  assert "light.onnx is not written" in caplog.text
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"light.safetensors", "light.stablehlo", "manifest.json"}


def test_nothing_is_left_if_a_file_gives_other_numbers(exported, tmp_path, monkeypatch):
  right = jax.export.deserialize

  def wrong(content):
    program = right(content)
    return type("Program", (), {"call": staticmethod(lambda image: program.call(image) + 2e-4)})

  monkeypatch.setattr(jax.export, "deserialize", wrong)
  with pytest.raises(RuntimeError, match=r"light\.stablehlo .* 2\.0e-04"):
    export.export(exported[1], tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_all_files_of_an_export_may_be_read_by_those_who_may_read_any(exported):
  with open(exported[2].parent / "usual", "w"):
    pass
  usual = (exported[2].parent / "usual").stat().st_mode
  (exported[2].parent / "usual").unlink()
  assert {path.name: path.stat().st_mode for path in exported[2].iterdir()} == {
    path.name: usual for path in exported[2].iterdir()
  }


def test_a_folder_with_the_export_of_something_else_is_refused(exported, tmp_path):
  manifest = exported[3]
  for change in ({"network": "acm"}, {"run": "runs/other"}):
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match="holds the export of .* Choose a different --out"):
      export.export(exported[1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
  own = {"run": os.path.relpath(exported[1]), "step": 1}
  (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **own}))
  assert export.export(exported[1], tmp_path)["step"] == STEP
  # The run's own folder, moved with it.
  (exported[2] / "manifest.json").write_text(json.dumps({**manifest, "run": "where/it/was"}))
  assert export.export(exported[1])["run"] == str(exported[1])


def test_the_manifest_has_a_hash_of_the_weights(exported):
  from safetensors.numpy import load_file

  found = hashlib.sha256()
  for name, array in sorted(load_file(exported[2] / "light.safetensors").items()):
    found.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
  assert exported[3]["weights_sha256"] == found.hexdigest()


def test_a_run_without_a_light_branch_is_refused(tmp_path):
  config = make_config("acm", mode="fdep_wo_coisd")
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  with pytest.raises(ValueError, match="no light branch"):
    export.export(tmp_path)


@pytest.mark.parametrize("content", ["text", "other", "config", "shape"])
def test_a_file_that_is_no_light_checkpoint_is_refused(exported, tmp_path, content):
  from safetensors import safe_open
  from safetensors.numpy import load_file, save_file

  path, bad = exported[2] / "light.safetensors", tmp_path / "bad.safetensors"
  arrays = load_file(path)
  with safe_open(path, framework="numpy") as file:
    about = json.loads(file.metadata()["fdep_jax"])
  if content == "text":
    bad.write_text("no weights")
  elif content == "other":
    save_file(arrays, bad)
  elif content == "config":
    about["config"]["mode"] = "else"
    save_file(arrays, bad, {"fdep_jax": json.dumps(about)})
  else:
    arrays["head/kernel"] = arrays["head/kernel"][..., :0]
    save_file(arrays, bad, {"fdep_jax": json.dumps(about)})
  with pytest.raises(ValueError) as info:
    detector_lib.load_light(bad)
  assert str(bad) in str(info.value)
  assert {"config": "mode is 'else'", "shape": "head/kernel"}.get(content, "") in str(info.value)


def test_the_manifest_has_the_metrics_of_the_exported_step_only(tmp_path):
  last = {"light": {"hse": 0.2}, "checkpoint": STEP}
  metrics = {"light": {"hse": 0.3}, "checkpoint": STEP - 1, "split": "test", "last": last}
  (tmp_path / "metrics.json").write_text(json.dumps(metrics))
  assert export._metrics(tmp_path, STEP) == {"split": "test", "hse": 0.2}
  assert export._metrics(tmp_path, STEP - 1) == {"split": "test", "hse": 0.3}
  assert export._metrics(tmp_path, STEP + 1) is None


@needs_onnx
def test_an_operation_without_counterpart_leaves_out_the_onnx_file_with_the_reason(toy, tmp_path):
  net = make_network("toy")
  detector = detector_of(net)
  light = export.make_light(detector)._replace(
    apply=lambda weights, image: jnp.cumsum(image, 1)[..., 0]
  )
  with pytest.raises(
    export.Absent, match=r"cumsum \(test_export.py, line \d+\), which .* docs/dep"
  ):
    export.write_onnx(detector, light, None, tmp_path / "light.onnx", {})


NO_PROGRAM = {  # in `decode` of a network: which files are left out, and why
  "jnp.sort(top, 1)": {"light.onnx": "the operation sort .mine.py, line 37., which"},
  "jnp.argmax(top, 1, keepdims=True) + top": {"light.onnx": "operation argmax .mine.py, line"},
  "jax.image.resize(top, top.shape, 'cubic')": {"light.onnx": "resize by cubic .* line 37"},
  "nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))(top)": {"light.onnx": "line 37"},
  "top * (1 if top.shape[1] < 7 else 2)": {
    "light.stablehlo": "InconclusiveDimension",
    "light.onnx": "InconclusiveDimension",
  },
}


@needs_onnx
@pytest.mark.parametrize("change", NO_PROGRAM)
def test_a_network_that_a_format_cannot_hold_is_exported_in_the_others(change, drop_in, tmp_path):
  source = (TOYS / "toy.py").read_text()
  marked = "  def decode(self, skips, top):\n"
  assert source.count(marked) == 1
  source = source.replace(marked, f"{marked}    top = {change}\n")
  drop_in("mine", source.replace("import jax\n", "import jax\nimport jax.numpy as jnp\n", 1))
  manifest = export.export_detector(detector_of(make_network("mine")), tmp_path)
  expected = {**NO_PROGRAM[change], "light_torch.safetensors": "converters/mine.py"}
  assert set(manifest["absent"]) == set(expected)
  for name, reason in expected.items():
    assert re.search(reason, manifest["absent"][name]), manifest["absent"][name]
    assert "\n" not in manifest["absent"][name]


def resized(x, rows, columns, method):
  height, width = (
    int(scale) * size if scale >= 1 else size // int(1 / scale)
    for scale, size in ((rows, x.shape[1]), (columns, x.shape[2]))
  )
  return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), method)


OPERATIONS = {
  "leaky_relu": nnx.leaky_relu,
  "elu": nnx.elu,
  "gelu": nnx.gelu,
  "silu": nnx.silu,
  "relu6": nnx.relu6,
  "relu": nnx.relu,
  "sigmoid": nnx.sigmoid,
  "tanh": nnx.tanh,
  "abs, exp": lambda x: jnp.exp(-jnp.abs(x)),
  "log, sqrt": lambda x: jnp.log(jnp.sqrt(x * x + 1)),
  "maximum, minimum": lambda x: jnp.maximum(x, 0.2) + jnp.minimum(x, x.mean(-1, keepdims=True)),
  "sum, mean": lambda x: (
    x / (1 + jnp.abs(x.sum((1, 2), keepdims=True))) + x.mean((1, 2, 3), keepdims=True)
  ),
  "max, min": lambda x: x.max((1, 2), keepdims=True) - x.min((1, 2), keepdims=True) * x,
  "pad, concatenate": lambda x: jnp.concatenate(
    [
      nnx.max_pool(jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0))), (2, 2), (1, 1)),
      2 * x,
    ],
    -1,
  ),
  "Conv": nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)).__call__,
  "BatchNorm": nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)).__call__,
  "clip": lambda x: jnp.clip(x, -0.5, 0.7),
  "where": lambda x: jnp.where(x < 0.3, x**3, 2.0),
  "max_pool": lambda x: nnx.max_pool(x, (2, 2), (2, 2)),
  "max_pool of 3, padded": lambda x: nnx.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))),
  "std": lambda x: x - x.std((1, 2), keepdims=True),
  "var": lambda x: x - x.var(-1, keepdims=True),
  "RMSNorm": nnx.RMSNorm(3, rngs=nnx.Rngs(0)).__call__,
  "LayerNorm": nnx.LayerNorm(3, use_fast_variance=False, rngs=nnx.Rngs(0)).__call__,
  "InstanceNorm": nnx.InstanceNorm(3, rngs=nnx.Rngs(0)).__call__,
  "resize linear": lambda x: resized(x, 2, 4, "linear"),
  "resize bilinear": lambda x: resized(x, 2, 1, jax.image.ResizeMethod.LINEAR),
  "resize nearest": lambda x: resized(x, 4, 2, "nearest"),
  "resize nearest, smaller": lambda x: resized(x, 0.5, 0.25, "nearest"),
  "avg_pool": lambda x: nnx.avg_pool(x, (2, 2), (2, 2)),
  "avg_pool of 3, padded": lambda x: nnx.avg_pool(x, (3, 3), (1, 1), ((1, 0), (0, 1))),
}
for _size, _stride in ((2, 2), (3, 2), (4, 2), (3, 1), (4, 4)):
  for _padding in ("SAME", "VALID"):
    OPERATIONS[f"conv_transpose {_size} by {_stride} {_padding}"] = functools.partial(
      nnx.ConvTranspose(
        3, 4, (_size, _size), (_stride, _stride), padding=_padding, rngs=nnx.Rngs(0)
      ).__call__
    )


def test_the_operations_that_the_document_lists_are_tried():
  text = (ROOT / "docs/deployment.md").read_text()
  listed = text.split("What `light.onnx` can hold")[1].split("Anything else")[0]
  names = set(re.findall(r"`(?:nnx\.|jnp\.|jax\.image\.)?(\w+)`", listed))
  tried = set(re.findall(r"\w+", " ".join(OPERATIONS))) | {"ConvTranspose"}
  assert len(names) > 25 and not names - tried


@needs_onnx
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_of_jax_and_flax_is_the_same_in_onnx(name):
  import onnxruntime

  def function(image):
    return OPERATIONS[name](image).max(-1)

  batch, height, width = jax.export.symbolic_shape("b, 4*h, 4*w")
  model = onnx.convert(function, batch, height, width, 3, {})
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
  )
  for shape in ((1, 8, 12, 3), (2, 4, 8, 3)):
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (found,) = session.run(None, {"image": image.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found[:, 0], function(image), atol=1e-5)


@needs_onnx
def test_a_unet_of_flaxs_own_layers_is_exported(toy, tmp_path):
  manifest = export.export_detector(detector_of(make_network("flax_unet")), tmp_path)
  # Each file was compared with the network before it was kept; PyTorch needs a table of names.
  assert list(manifest["absent"]) == ["light_torch.safetensors"]
  assert {path.name for path in tmp_path.iterdir()} == {
    "light.safetensors", "light.stablehlo", "light.onnx", "manifest.json",
  }  # fmt: skip


@needs_onnx
@pytest.mark.parametrize("name", FAST_FIRST)
def test_a_networks_programs_equal_its_light_branch(name, tmp_path):
  # Three sizes, two batch sizes, one file each.
  detector = detector_of(make_network(name))
  light = export.make_light(detector)
  forward = jax.jit(light.apply)
  programs = {
    write.__name__: write(detector, light, forward, tmp_path / write.__name__, {})
    for write in (export._write_stablehlo, export.write_onnx)
  }
  found = []
  for image in images(light.net):
    expected = np.asarray(forward(light.weights, image))
    found += [expected.min(), expected.max()]
    for writer, program in programs.items():
      np.testing.assert_allclose(program(image), expected, atol=1e-4, err_msg=writer)
  assert max(found) - min(found) > 0.05  # not saturated


@pytest.mark.parametrize("name", FAST_FIRST)
def test_the_light_branch_costs_what_the_original_network_costs(name):
  net = make_network(name)
  trained = FDEP(net, dino_width=384, num_levels=4 if net.top_channels else 0, rngs=nnx.Rngs(0))
  trained.eval()
  detector = detector_of(trained.backbone)._replace(model=trained)
  light, original = export.make_light(detector), make_network(name)
  shapes = jax.tree.map(jnp.shape, checkpoint.flatten(light.weights))
  assert shapes == jax.tree.map(jnp.shape, checkpoint.flatten(nnx.state(original, WEIGHTS)))
  assert export.flops(light.net, 64) == export.flops(original, 64) > 1e6


@pytest.mark.parametrize("name", FAST_FIRST)
def test_the_pytorch_file_has_the_published_networks_keys(name, tmp_path):
  from safetensors.numpy import load_file

  detector = detector_of(make_network(name))
  light = export.make_light(detector)
  path = tmp_path / "light_torch.safetensors"
  export._write_torch(detector, light, light.apply, path, {"network": name})
  published = Golden("networks", name).manifest
  written = load_file(path)
  # MSDA-Net's Haar filters are constants, which the goldens leave out.
  fixed = getattr(importlib.import_module(f"converters.{name}"), "fixed", dict)()
  shapes = {key: list(array.shape) for key, array in written.items()}
  assert {key: shape for key, shape in shapes.items() if key not in fixed} == published
  net = converters.load_backbone(name, path)
  for key, value in checkpoint.flatten(nnx.state(net, WEIGHTS)).items():
    np.testing.assert_array_equal(value, checkpoint.flatten(light.weights)[key], key)
