"""Helpers that several test files share: toy configs, small detectors, data and files."""

import contextlib
import functools
import importlib
import importlib.util
import json
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import formula
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx
from goldens import Golden
from PIL import Image

import converters
from configs import base
from fdep_jax import backbones, build, data, evaluate, priors, report, settings
from fdep_jax import detector as detector_lib
from fdep_jax import step as step_lib
from fdep_jax.backbones import Backbone, Logits
from fdep_jax.fdep import FDEP
from fdep_jax.runtime import checkpoint, files, mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOYS = ROOT / "tests" / "toy_backbones"


def command(*arguments, timeout: float | None = 300) -> subprocess.CompletedProcess:
  """Runs main.py as a user does; at most `timeout` seconds."""
  return subprocess.run(
    [sys.executable, "main.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


@contextlib.contextmanager
def toy_backbone():
  """Makes the toys known to `backbones`, as dropped-in files are; yields the tiny one's module."""
  known = list(backbones.__path__)
  backbones.__path__ = [*known, str(TOYS)]
  try:
    yield importlib.import_module("fdep_jax.backbones.toy")
  finally:
    backbones.__path__ = known
    for file in TOYS.glob("*.py"):
      sys.modules.pop(f"fdep_jax.backbones.{file.stem}", None)
      vars(backbones).pop(file.stem, None)


@contextlib.contextmanager
def toy_prior():
  """Makes a tiny foundation model and its converter known, as dropped-in files are."""
  folders = (
    (priors, ROOT / "tests/toy_priors"),
    (converters, ROOT / "tests/toy_priors/converters"),
  )
  known = [list(package.__path__) for package, _ in folders]
  for (package, folder), before in zip(folders, known, strict=True):
    package.__path__ = [*before, str(folder)]
  try:
    yield importlib.import_module("fdep_jax.priors.toyprior")
  finally:
    for (package, _), before in zip(folders, known, strict=True):
      package.__path__ = before
      sys.modules.pop(f"{package.__name__}.toyprior", None)
      vars(package).pop("toyprior", None)


def make_folder(path: pathlib.Path, count: int = 4) -> pathlib.Path:
  """A small dataset with one target an image."""
  rng = np.random.default_rng(0)
  for part in ("images", "masks", "splits"):
    (path / part).mkdir(parents=True)
  for i in range(count):
    mask = np.zeros((40, 48), np.uint8)
    mask[10 + i : 13 + i, 20:23] = 255
    Image.fromarray(rng.integers(0, 200, (40, 48), np.uint8)).save(path / f"images/{i}.png")
    Image.fromarray(mask).save(path / f"masks/{i}.png")
  half = count // 2
  (path / "splits/train.txt").write_text("\n".join(map(str, range(half))))
  (path / "splits/test.txt").write_text("\n".join(map(str, range(half, count))))
  return path


def deep_set(root: pathlib.Path, low: int = 7000, high: int = 9000) -> pathlib.Path:
  """A dataset of 16-bit images: noise in a narrow range."""
  root = make_folder(root)
  rng = np.random.default_rng(0)
  for path in (root / "images").iterdir():
    counts = rng.integers(low, high, (40, 48)).astype(np.uint16)
    Image.fromarray(counts).save(path)
  return root


# Toy runs.


def deep_tiff(array, planes=False) -> bytes:
  """A TIFF of H×W×C uint16, which Pillow does not write: 3 channels are RGB, 4 are CMYK."""
  height, width, channels = array.shape
  strips = np.moveaxis(array, -1, 0) if planes else array[None]
  size = strips[0].nbytes
  fields = {
    256: [width],
    257: [height],
    258: [16] * channels,
    259: [1],
    262: [2 if channels == 3 else 5],
    273: [],
    277: [channels],
    278: [height],
    279: [size] * len(strips),
    284: [2 if planes else 1],
  }
  start = 8 + 2 + 12 * len(fields) + 4  # of what does not fit into a field
  pixels = start + 4 * (channels + 2 * len(strips))
  fields[273] = [pixels + i * size for i in range(len(strips))]
  entries, long = b"", b""
  for tag, values in fields.items():
    body = struct.pack(f"<{len(values)}I", *values)
    if len(values) > 1:
      long, body = long + body, struct.pack("<I", start + len(long))
    entries += struct.pack("<HHI", tag, 4, len(values)) + body
  head = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + long
  return head.ljust(pixels, b"\0") + strips.astype("<u2").tobytes()


def toy_config(**changes):
  """Synthetic 64×64 scenes, a small random prior, a few steps."""
  config = base.get_config()
  config.update_from_flattened_dict(
    {
      "model.backbone": "toy",
      "data.root": "synthetic",
      "data.crop": 32,
      "data.synthetic_size": 64,
      "data.synthetic_train": 12,
      "data.synthetic_test": 3,
      "data.val_fraction": 0.25,
      "prior.checkpoint": "random",
      "train.batch_size": 4,
      "train.steps": 8,
      "eval.least_steps": 1,
      "checkpoint.every_steps": 4,
      "log.tensorboard": False,
      "log.progress": False,
      **changes,
    }
  )
  return config


def written_run(folder: pathlib.Path, **changes) -> pathlib.Path:
  """A folder that looks like a run's, without a checkpoint."""
  folder.mkdir()
  files.write_json(folder / "config.json", toy_config(**changes).to_dict())
  return folder


def parts(config):
  prior = build.load_prior(config)
  model = build.create_model(config, prior)
  optimizer = step_lib.make_optimizer(config, 1)
  return prior, model, optimizer, step_lib.init_state(model, optimizer)


def batch(size: int = 4, crop: int = 32):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (size, crop, crop, 3), np.uint8)
  return {"image": image, "mask": rng.random((size, crop, crop)) < 0.05}


def parameters(workdir, config) -> dict[str, np.ndarray]:
  prior = build.load_prior(config)
  model = build.create_model(config, prior)
  optimizer = step_lib.make_optimizer(config, 1)
  checkpoints = checkpoint.Checkpoints(workdir)
  state, _ = checkpoints.restore(step_lib.init_state(model, optimizer))
  checkpoints.close()
  return {k: np.asarray(v) for k, v in checkpoint.flatten(state).items()}


def lines(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def take_steps(backbone, devices):
  """Losses and parameters after 5 steps of gradient descent on fixed batches.

  Not of AdamW: it turns the rounding in gradients that are zero (biases before a BatchNorm) into
  whole steps. And not in float32: at this size MSDA-Net's losses part by 2e-3 after one step and
  4e-2 after three, where in float64 five stay within 2e-10.
  """
  config = toy_config(**{"model.backbone": backbone, "train.batch_size": 8})
  config.train.dtype = config.prior.dtype = "float64"
  prior = build.load_prior(config)
  model = build.create_model(config, prior)
  optimizer = optax.sgd(1e-2)
  the_mesh = mesh.make(devices, 8)
  step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
  state = mesh.put_replicated(step_lib.init_state(model, optimizer), the_mesh)
  placed = mesh.put_replicated(prior, the_mesh)
  random = np.random.default_rng(0)
  losses = []
  mine = slice(*(8 * (jax.process_index() + i) // jax.process_count() for i in (0, 1)))
  for _ in range(5):
    mask = np.zeros((8, 32, 32), bool)
    mask[0] = random.random((32, 32)) < 0.3
    batch = {"image": random.integers(0, 256, (8, 32, 32, 3), np.uint8)[mine], "mask": mask[mine]}
    state, metrics = step(state, placed, mesh.put_batch(batch, the_mesh))
    losses.append(float(metrics["loss"]))
  found = {k: np.asarray(v) for k, v in checkpoint.flatten(state["params"]).items()}
  return {"losses": np.array(losses), **found}


# Toy networks.


LEVEL_WIDTH = 12  # width of the toy levels


def toy_levels(count: int = 4, batch: int = 2) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(7), count)
  return [jax.random.normal(key, (batch, 3, 3, LEVEL_WIDTH)) for key in keys]


def toy_model(**options) -> FDEP:
  model = FDEP("toy", dino_width=LEVEL_WIDTH, rngs=nnx.Rngs(0), **options)
  model.set_attributes(deterministic=True, raise_if_not_found=False)
  return model


def count_parameters(module) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def stats(model) -> dict[str, np.ndarray]:
  flat = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
  return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def relative_error(ours, reference) -> float:
  """‖ours − reference‖ / ‖reference‖."""
  return np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)


class Bright(Backbone):
  """Grey levels above 180 are targets."""

  stride = top_stride = 1
  top_channels = 3

  def encode(self, image):
    self.check_image(image)
    return (), image

  def decode(self, skips, top):
    return Logits(50 * (top.mean(-1, keepdims=True) - 180 / 255))


def detector(net: Backbone, mean=0.0, std=1.0) -> detector_lib.Detector:
  model = FDEP(net, num_levels=0, rngs=nnx.Rngs(0))
  model.eval()
  return detector_lib.Detector(model, "light", None, mean, std, None, "a test", None, 0)


def scene(height=40, width=48, dtype=np.uint8, spots=((10, 20),)) -> np.ndarray:
  """Noise around 100 with 3×3 targets of 250."""
  frame = np.random.default_rng(0).integers(90, 110, (height, width)).astype(dtype)
  for row, col in spots:
    frame[row : row + 3, col : col + 3] = 250
  return frame


WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat)


def randomise(module: nnx.Module) -> None:
  """Weights with which activations neither vanish nor explode, different in every variable."""
  rng = np.random.default_rng(0)

  def draw(path, variable):
    shape, kind = variable.shape, path[-1]
    if kind == "kernel":
      values = rng.standard_normal(shape) * np.prod(shape[:-1]) ** -0.5
    elif kind in ("var", "scale"):
      values = rng.uniform(0.6, 1.4, shape)
    else:
      values = 0.1 * rng.standard_normal(shape)
    return variable.replace(jnp.asarray(values, jnp.float32))

  flat = nnx.to_flat_state(nnx.state(module, WEIGHTS))
  nnx.update(module, nnx.from_flat_state([(path, draw(path, v)) for path, v in flat]))


def make_network(name: str, **options) -> Backbone:
  """In evaluation mode; without drawing its initial weights, which takes seconds."""
  net = nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0), **options))
  randomise(net)
  for _, variable in nnx.to_flat_state(nnx.state(net, nnx.RngState)):  # of dropout
    is_key = jax.dtypes.issubdtype(variable.dtype, jax.dtypes.prng_key)
    variable.set_value(jax.random.key(0) if is_key else jnp.zeros(variable.shape, variable.dtype))
  net.eval()
  return net


# Parity of the networks with the published code.


def published() -> list[str]:
  """The networks that have published PyTorch code: those with a file in `converters/`."""
  return [n for n in backbones.names() if importlib.util.find_spec(f"converters.{n}")]


# Relative errors in float32, where 1e-4 is too little. UIU-Net normalises 2×2 maps here: PyTorch's
# own float32 is 2.8e-4 off in training. In float64 (`test_networks.py`), ours is held to 1e-5.
# ILNet has 130 layers in series, each of which multiplies rounding by about 1.2 there: PyTorch's
# own float32 is 2.7e-4 off.
PARITY = {("uiu", "train"): 1e-3, ("ilnet", "train"): 1e-3}


def nchw(x):
  return x.transpose(0, 3, 1, 2)


def reference_heads(name: str, logits: Logits) -> list[jax.Array]:
  """All heads in the published code's return order: two networks return the prediction first."""
  side = list(logits.side)
  return [logits.final, *side] if name in ("uiu", "ilnet") else [*side, logits.final]


@functools.cache
def golden(name: str) -> tuple[dict[str, np.ndarray], Golden]:
  """The state_dict of a network, and the golden outputs with it."""
  found = Golden("networks", name)
  return formula.weights(found.manifest), found


def golden_image(name: str) -> jax.Array:
  channels = 1 if name == "rpcanet" else 3
  return jnp.asarray(formula.image((2, channels, 64, 64)).transpose(0, 2, 3, 1))


def network_errors(name: str, dtype=jnp.float32, training=True) -> dict[str, float]:
  """Relative errors of a network's top feature and heads, in evaluation and, if asked, in training.

  `dtype` is that of `train.dtype`: parameters and image have it where a train step gives it them.
  """
  state, reference = golden(name)
  net = converters.load_backbone(name, state)
  net.set_attributes(deterministic=True, raise_if_not_found=False)
  graphdef, params, rest = nnx.split(net, nnx.Param, ...)
  image = golden_image(name)
  if dtype != jnp.float32:
    params = step_lib.cast(params, dtype)
    image = image.astype(dtype) if net.standardised else image

  @jax.jit
  def run(params, rest, image):
    net = nnx.merge(graphdef, params, rest)
    net.set_attributes(use_running_average=True)
    skips, top = net.encode(image)
    outputs = {} if top is None else {"eval_top": top}
    logits = {"eval": net.decode(skips, top)}
    if training:
      net.set_attributes(use_running_average=False)
      logits["train"] = net(image)
    for kind, found in logits.items():
      outputs |= {f"{kind}_head{i}": head for i, head in enumerate(reference_heads(name, found))}
    return outputs

  outputs = run(params, rest, image)
  assert outputs.keys() == {k for k in reference.keys if training or k.startswith("eval")}
  return {key: reference.error(key, nchw(output)) for key, output in outputs.items()}


# Reports.


def map_and_mask(rng, height=60, width=70):
  """A map and a mask with targets found, missed, displaced and touching, and false alarms."""
  mask, prob = np.zeros((height, width), bool), np.zeros((height, width), np.float32)
  for _ in range(rng.integers(0, 6)):
    row, col = rng.integers(0, height - 4), rng.integers(0, width - 4)
    size = rng.integers(1, 5)
    mask[row : row + size, col : col + size] = True
    down, right = np.maximum(0, [row, col] + rng.integers(-3, 4, 2))
    prob[down : down + size, right : right + size] = rng.choice(report.THRESHOLDS)
  prob = np.maximum(prob, np.float32(0.6) * rng.random((height, width), np.float32) ** 8)
  return prob, mask


def samples_and_maps(count=10, seed=0):
  rng = np.random.default_rng(seed)
  samples, maps = [], []
  for i in range(count):
    # The last one is crowded: everything touches, also across the ends of rows.
    prob, mask = map_and_mask(rng, 60 + i, 70 - 2 * i)
    if i == count - 1:
      prob, mask = rng.random(mask.shape, np.float32), rng.random(mask.shape) < 0.1
    grey = np.uint8(np.clip(40 + 120 * mask + rng.normal(0, 8, mask.shape), 0, 255))
    samples.append(data.Sample(f"scene_{i}", np.repeat(grey[..., None], 3, 2), mask))
    maps.append(prob)
  return samples, maps


def write_report(folder, samples, maps, parts=None, **branches) -> pathlib.Path:
  """A run folder with a report of these maps as its light branch; parts: {name: images}."""
  config = settings.flat(base.get_config())
  recorder = report.Recorder(samples)
  branches = {"light": maps, **branches}
  probs = [{name: m[i] for name, m in branches.items()} for i in range(len(samples))]
  totals = evaluate.accumulate(recorder.watch(enumerate(probs)), samples)
  metrics = evaluate.results({name: total.result() for name, total in totals.items()})
  for name, total in totals.items():
    metrics[name]["intervals"] = report.intervals(total)
  metrics |= {"params": 4_791_041, "params_deployed": 390_000, "deployed": "light"}
  metrics |= {"seconds_per_image": 0.123, "split": "test"}
  metrics |= {"checkpoint": 7, "selected_on": "val", "flops": float("nan")}
  metrics |= {"parts": {name: {"images": n} for name, n in (parts or {}).items()}}
  folder.mkdir(exist_ok=True)
  path = folder / "report.html"
  report.write(path, folder.name, samples, recorder, totals, metrics, config, {"note": "<b>"})
  return path


# Files of torch.save, put together from pickle's opcodes. A program stands between PROTO and STOP.


KINDS = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "ComplexFloatStorage": np.complex64,
}


def value(x) -> bytes:
  return pickle.dumps(x, 2)[2:-1]


def name(dotted: str) -> bytes:
  module, attribute = dotted.rsplit(".", 1)
  return f"c{module}\n{attribute}\n".encode()


def call(function: str, *args: bytes) -> bytes:
  return name(function) + b"(" + b"".join(args) + b"tR"


def mapping(entries: dict[str, bytes]) -> bytes:
  return b"}(" + b"".join(value(key) + entry for key, entry in entries.items()) + b"u"


def storage(kind: str, key: str, count: int, view=None, *, legacy=False) -> bytes:
  parts = [value("storage"), name(f"torch.{kind}"), value(key), value("cpu"), value(count)]
  return b"(" + b"".join(parts) + (value(view) if legacy else b"") + b"tQ"


def tensor(kind, key, count, offset, shape, strides, **options) -> bytes:
  return call(
    "torch._utils._rebuild_tensor_v2",
    storage(kind, key, count, **options),
    *map(value, (offset, shape, strides, False)),
    call("collections.OrderedDict"),
  )


def whole(array: np.ndarray, key: str, **options) -> bytes:
  """A tensor that is its storage."""
  kind = next(kind for kind, dtype in KINDS.items() if array.dtype == dtype)
  strides = tuple(stride // array.itemsize for stride in array.strides)
  return tensor(kind, key, array.size, 0, array.shape, strides, **options)


def write_zip(path, program: bytes, storages=None, byteorder=b"little", compression=0):
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
    archive.writestr("archive/byteorder", byteorder)
    for key, array in (storages or {}).items():
      archive.writestr(f"archive/data/{key}", np.asarray(array).tobytes())
    archive.writestr("archive/version", b"3\n")
  return path


def write_legacy(path, program: bytes, storages=None, little_endian=True):
  system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
  with open(path, "wb") as file:
    for head in (0x1950A86A20F9469CFC6C, 1001, system):
      pickle.dump(head, file, 2)
    file.write(b"\x80\x02" + program + b".")
    pickle.dump(sorted(storages or {}), file, 2)
    for key in sorted(storages or {}):
      array = np.asarray(storages[key])
      file.write(struct.pack("<q", array.size) + array.tobytes())
  return path
