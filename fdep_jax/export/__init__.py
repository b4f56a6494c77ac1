"""Exports the light branch of a run, or a published network, for use elsewhere (`--mode export`).

Writes `light.safetensors` (for `detector.load_light`), `light.stablehlo` (for
`jax.export.deserialize`), `light.onnx`, `light_torch.safetensors` (the published PyTorch network's
state_dict) and `manifest.json`. The light branch is the original detector, without DINOv2 and SAMF.

OUR CHOICE, since the paper deploys nothing: programs take float32 grey levels in [0, 1], so that a
camera's bit depth does not matter, and return probabilities. They compute in float32 on every
platform, since the defaults (TF32 on GPUs, bfloat16 on TPUs) would change the verified numbers.
They contain the operations of `ops` as written there: these need no more multiply-adds than the
plain ones and are faster on CPUs.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdep_jax import build, evaluate, settings
from fdep_jax import detector as detector_lib
from fdep_jax.backbones import Backbone
from fdep_jax.detector import Detector
from fdep_jax.forward import standardise
from fdep_jax.runtime import checkpoint, files, hlo

FILES = ("light.safetensors", "light.stablehlo", "light.onnx", "light_torch.safetensors")
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # largest difference of a file's probabilities from the run's
THRESHOLD = 0.5  # masks of the paper's IoU, nIoU, Pd and Fa are above it


class Absent(Exception):
  """One file cannot be written; the message says why. The others are written."""


def command(flags) -> None:
  """Runs `--mode export`."""
  if flags.backbone:
    network = detector_lib.load_published(
      flags.checkpoint, flags.backbone, flags.mean, flags.std, flags.normalisation
    )
    export_detector(network, flags.out)
  else:
    export(flags.workdir, flags.out, flags.checkpoint)


def export(
  workdir: str | os.PathLike | None,
  out: str | os.PathLike | None = None,
  which: str | int | None = None,
) -> dict:
  """Exports the light branch of a run; checks every file against the run before keeping it.

  Args:
    workdir, which: as for `detector.load` (default: the selected checkpoint).
    out: folder to write; default `export` in the run's folder. A light branch has no run: name it.

  Returns:
    The content of `manifest.json`. A file that cannot be written (ONNX without its packages,
    PyTorch without a converter) is null, with the reason under "absent".

  Raises:
    ValueError, FileNotFoundError: no such run or checkpoint, it has no light branch, or `out`
      cannot be written.
    RuntimeError: a written file gives different numbers than the run.
  """
  light = detector_lib.light_of(workdir, which)
  if light is not None:
    detector = detector_lib.load_light(light)
    if out is None:
      raise ValueError(f"--checkpoint {light} is of no run. Name the folder to write, --out DIR.")
    return export_detector(detector, out)
  run, _ = detector_lib.find_checkpoint(workdir, which)
  if settings.load(run).mode == "fdep_wo_coisd":
    raise ValueError(
      f"{run} has no light branch: it trained the main branch only, which needs DINOv2 at every "
      "frame. Use --mode predict --branch main for this run, or train with --config.mode=fdep, "
      "which trains both."
    )
  detector = detector_lib.load(workdir, which, "light")
  return export_detector(detector, detector.folder / "export" if out is None else out)


def export_detector(detector: Detector, out: str | os.PathLike) -> dict:
  """Writes a light branch's files into a folder, as `export` does.

  Args:
    detector: from `detector.load` or `detector.load_published`.
    out: folder to write.

  Returns:
    The content of `manifest.json`.

  Raises:
    ValueError: `out` cannot be written, or holds the export of something else.
    RuntimeError: a written file gives different numbers than the detector.
  """
  out = files.expand(out)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"{out} cannot be written ({error.strerror}). Choose a different folder."
    ) from None

  about = _about(detector)
  _check_own(out, about)
  light = make_light(detector)
  about["weights_sha256"] = _fingerprint(light.weights)
  apply = jax.jit(light.apply)
  images = list(_random_images(light.net))
  expected = [np.asarray(apply(light.weights, image)) for image in images]
  writers = (_write_light, _write_stablehlo, write_onnx, _write_torch)
  found, absent = {}, {}
  with files.replacing_all([out / name for name in FILES]) as partial:
    for name, path, write in zip(FILES, partial, writers, strict=True):
      logging.info("%s …", name)
      try:
        reread = write(detector, light, apply, path, about)
      except Absent as reason:
        found[name], absent[name] = None, str(reason)
        logging.warning("%s is not written: %s", name, reason)
        path.unlink(missing_ok=True)
        continue
      difference = max(
        float(np.abs(reread(image) - right).max())
        for image, right in zip(images, expected, strict=True)
      )
      if not difference <= TOLERANCE:
        raise RuntimeError(
          f"{name} gives probabilities that differ from the run's by {difference:.1e} on random "
          f"images; at most {TOLERANCE} is allowed. It is not written."
        )
      found[name] = {
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "largest_difference": difference,
      }
    (out / "manifest.json").unlink(missing_ok=True)  # an earlier one describes other files
  manifest = {**about, "files": found, "absent": absent, "versions": _versions()}
  files.write_json(out / "manifest.json", manifest)
  for name, facts in found.items():
    if facts:
      size, difference = facts["bytes"] / 1e6, facts["largest_difference"]
      logging.info("%-23s %8.2f MB, differs by %.0e", name, size, difference)
  logging.info("wrote %s", out)
  return manifest


def _check_own(out: pathlib.Path, about: dict) -> None:
  """Refuses a folder with the export of a different run or network; the same may export again."""
  if out.resolve() == (pathlib.Path(about["run"]) / "export").resolve():
    return  # the run's own, which may have been moved with it
  try:
    theirs = json.loads((out / "manifest.json").read_text())
    found = [(str(m["network"]), os.path.realpath(m["run"])) for m in (theirs, about)]
  except (OSError, ValueError, KeyError, TypeError):  # no manifest of an export
    return
  if found[0] != found[1]:
    raise ValueError(
      f"{out} holds the export of {theirs['network']} from {theirs['run']}; this one is of "
      f"{about['network']} from {about['run']}. Choose a different --out, or remove that folder."
    )


def _fingerprint(weights: nnx.State) -> str:
  """Returns a SHA-256 of the weights: of each in the order of names, its name, shape and bytes."""
  found = hashlib.sha256()
  for name, leaf in sorted(checkpoint.flatten(weights).items()):
    array = np.ascontiguousarray(leaf)
    found.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
  return found.hexdigest()


class Light(NamedTuple):
  """The light branch as a function of its weights."""

  net: Backbone
  weights: nnx.State
  apply: Callable[[nnx.State, jax.Array], jax.Array]  # weights, B×H×W×C -> B×H×W

  def probability(self, image: jax.Array) -> jax.Array:
    """Maps B×H×W×C float32 grey levels in [0, 1] to B×H×W float32; H, W multiples of the stride."""
    return self.apply(self.weights, image)


def make_light(detector: Detector) -> Light:
  """Makes the exported function of a trained light branch."""
  net = detector.model.backbone
  graphdef, weights, rest = nnx.split(net, nnx.Any(nnx.Param, nnx.BatchStat), ...)

  def apply(weights, image):
    normal = standardise(image, detector.mean, detector.std)
    logits = nnx.merge(graphdef, weights, rest)(normal).final
    return jax.nn.sigmoid(logits.astype(jnp.float32).squeeze(-1))

  return Light(net, weights, apply)


def symbolic_sizes(net) -> tuple:
  """Returns batch, height and width as symbols: multiples of the stride, and no more than fit."""
  limit = []
  if net.max_pixels is not None:
    limit = [f"h*w <= {net.max_pixels // net.stride**2}"]
  return jax.export.symbolic_shape(f"batch, {net.stride}*h, {net.stride}*w", constraints=limit)


def flops(net: Backbone, size: int) -> float:
  """Counts the FLOPs of one size×size image, two for a multiply-add, as `evaluate.cost`."""
  graphdef, state = nnx.split(net)
  image = jax.ShapeDtypeStruct((1, size, size, net.in_channels), jnp.float32)
  forward = jax.jit(lambda state, image: nnx.merge(graphdef, state)(image).final)
  return hlo.flops(forward.lower(state, image).as_text("hlo"), "none")["outside"]


@contextlib.contextmanager
def _absent(what: str) -> Iterator[None]:
  """Leaves a file out if the block fails, whatever it raises: the network may be anybody's."""
  try:
    yield
  except NotImplementedError as error:
    raise Absent(str(error)) from error
  except Exception as error:
    text = str(error).strip().splitlines() or [""]
    raise Absent(f"{what} ({type(error).__name__}: {text[0]}).") from error


# Each writes a file, reads it back and returns its function from images to probabilities.


def _write_light(detector, light: Light, forward, path, about) -> Callable:
  from safetensors.numpy import save_file

  arrays = {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(light.weights).items()}
  more = {"config": settings.as_dict(detector.config), "mean": detector.mean, "std": detector.std}
  more |= {"range": detector.range, "options": dict(detector.options)}
  save_file(arrays, path, {"fdep_jax": json.dumps({**about, **more})})
  reread = make_light(detector_lib.load_light(path))
  return lambda image: forward(reread.weights, image)


def _write_stablehlo(detector, light: Light, forward, path, about) -> Callable:
  if importlib.util.find_spec("flatbuffers") is None:  # jax does not ask for it
    raise Absent("it needs flatbuffers: `pip install -r requirements.txt` and export again.")
  shape = (*symbolic_sizes(light.net), light.net.in_channels)
  with jax.default_matmul_precision("float32"), _absent("jax.export cannot write the network"):
    make = jax.export.export(jax.jit(light.probability), platforms=PLATFORMS)
    path.write_bytes(make(jax.ShapeDtypeStruct(shape, jnp.float32)).serialize())
  return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def write_onnx(detector, light: Light, forward, path, about) -> Callable:
  needed = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
  if needed:
    raise Absent(
      f"it needs {' and '.join(needed)}: `pip install -r requirements-export.txt` and export again."
    )
  import onnxruntime

  from fdep_jax.export import onnx as writer

  sizes, channels = symbolic_sizes(light.net), light.net.in_channels
  with _absent("ONNX cannot hold the network"):
    model = writer.convert(light.probability, *sizes, channels, {"fdep_jax": json.dumps(about)})
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  return lambda image: session.run(None, {"image": image.transpose(0, 3, 1, 2)})[0][:, 0]


def _write_torch(detector, light: Light, forward, path, about) -> Callable:
  from safetensors.numpy import save_file

  import converters

  name = about["network"]
  if importlib.util.find_spec(f"converters.{name}") is None:
    raise Absent(f"there is no converters/{name}.py, which would map the PyTorch names.")
  with _absent(f"converters/{name}.py does not fit the network"):
    arrays = converters.to_torch(light.net)
  save_file(arrays, path, {"fdep_jax": json.dumps(about)})
  reread = nnx.state(converters.load_backbone(name, path), nnx.Any(nnx.Param, nnx.BatchStat))
  return lambda image: forward(reread, image)


def _random_images(net) -> Iterator[np.ndarray]:
  """Yields random images of two sizes and two batch sizes."""
  rng = np.random.default_rng(0)
  for batch, rows, columns in ((1, 2, 3), (2, 3, 2)):
    shape = (batch, rows * net.stride, columns * net.stride, net.in_channels)
    yield rng.random(shape, np.float32)


def _about(detector: Detector) -> dict:
  """Makes the part of the manifest that does not depend on the files."""
  net, config = detector.model.backbone, detector.config
  size = config.data.crop
  multiple = f"height and width multiples of {net.stride}"
  return {
    "network": config.model.backbone,
    "run": detector.exported.get("run", str(detector.folder)),
    "mode": config.mode,
    "step": detector.step,
    "parameters": build.count_parameters(nnx.state(net, nnx.Param)),
    "flops": {"height": size, "width": size, "value": flops(net, size)},
    "input": {
      "name": "image",
      "type": "float32",
      "values": "grey levels in [0, 1] (8 bits: divided by 255)"
      + ("" if net.in_channels == 1 else ", a grey frame repeated in all channels")
      + "; the programs normalise",
      "shape": {
        "light.stablehlo": ["batch", "height", "width", net.in_channels],
        "light.onnx": ["batch", net.in_channels, "height", "width"],
      },
      "sizes": f"any batch; {multiple}: pad frames with `fill` at the right and the bottom (the "
      f"evaluation pads to multiples of {evaluate.PAD}) and crop the result",
      # In the unit of the frames, becomes 0 to 1 in steps of 1/255, as in training; "": 8 bits.
      "range": detector.range,
      "fill": detector.fill,
      "mean": detector.mean,
      "std": detector.std,
    },
    "output": {
      "name": "probability",
      "type": "float32",
      "values": "probability of target in [0, 1]",
      "shape": {
        "light.stablehlo": ["batch", "height", "width"],
        "light.onnx": ["batch", 1, "height", "width"],
      },
    },
    "threshold": THRESHOLD,
    "metrics": detector.exported.get("metrics") or _metrics(detector.folder, detector.step),
  }


def _metrics(folder: pathlib.Path, step: int | None) -> dict | None:
  """Reads the light branch's test metrics if the run was evaluated at this step."""
  try:
    metrics = json.loads((folder / "metrics.json").read_text())
  except (OSError, ValueError):  # `folder` is the file of a published network
    return None
  for candidate in (metrics, metrics.get("last", {})):
    if candidate.get("checkpoint") == step and "light" in candidate:
      return {"split": metrics.get("split"), **candidate["light"]}
  return None


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str | None]:
  def version(name):
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      return None

  return {name: version(name) for name in ("jax", "flax", "safetensors", "onnx", "onnxruntime")}
