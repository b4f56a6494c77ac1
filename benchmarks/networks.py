"""Compares every network's forward pass and train step with the published PyTorch code's.

  python benchmarks/networks.py --reference ../PAL --torch-python ../torch-env/bin/python

`--reference` is your own checkout of github.com/YuChuang1205/PAL. It lacks three networks, which
have a checkout each: `--mtu` (TianhaoWu16/Multi-level-TransUNet-for-Space-based-Infrared-Tiny-ship-
Detection), `--rpcanet` (fengyiwu98/RPCANet) and `--ilnet` (Li-Haoqing/ILNet). `--torch-python` is
an interpreter with torch, torchvision, PyWavelets, einops, ml_collections and thop (by default this
one). Of networks without a checkout only ours runs.

There is one worker process for each framework, controlled over stdin and stdout. So the timings
alternate in one run, and neither framework needs the other installed. Both run on the same two
cores in float32:

* forward in evaluation mode, batch 1, 256×256;
* one train step of the network alone, batch 4, 224×224: AdamW on the binary cross-entropy, averaged
  over pixels and summed over heads.

PyTorch runs eagerly in both memory layouts on two threads, JAX on two host devices that share the
batch. Our networks have the PyTorch network's weights; the table shows how far the logits differ.

`--platform gpu` runs our side on the GPUs, where products of float32 have TF32's precision.
"""

import argparse
import copy
import functools
import importlib
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from typing import NamedTuple

CORES = 2
FORWARD_SHAPE = (1, 256, 256)
TRAIN_SHAPE = (4, 224, 224)
TASKS = {
  "forward": "Forward, batch 1, 256×256",
  "train": "Train step, batch 4, 224×224",
}
# OpenMP's threads spin for a while after their last work, which would slow the next measurement.
SETTLE_SECONDS = 1.0
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
CHECKOUTS = {  # option -> (repository, the package of its networks)
  "reference": ("YuChuang1205/PAL", "model"),
  "mtu": (
    "TianhaoWu16/Multi-level-TransUNet-for-Space-based-Infrared-Tiny-ship-Detection",
    "MTU-Net-code/model",
  ),
  "rpcanet": ("fengyiwu98/RPCANet", "models"),
  "ilnet": ("Li-Haoqing/ILNet", "model"),
}


class Published(NamedTuple):
  """Where the published network is, and what its constructor needs to return all heads."""

  module: str
  name: str
  options: dict = {}
  checkout: str = "reference"
  final: int = -1  # index of the prediction among the heads
  channels: int = 3  # of its input


def of_pal(name, **options):
  return Published(f"model.{name}.{name}_no_sigmoid", f"{name}_No_Sigmoid", options)


PUBLISHED = {
  "acm": of_pal("ACM"),
  "alcl": of_pal("ALCL"),
  "alcnet": of_pal("ALC"),
  "dna": of_pal("DNA", mode="train"),
  "ggl": of_pal("GGL"),
  "ilnet": Published("model.ilnet", "ILNet_L", checkout="ilnet", final=0),
  "mlcl": of_pal("MLCL"),
  "msda": of_pal("MSDA"),
  "mtu": Published(
    "model.MTU_Net",
    "res_UNet",
    {
      "num_classes": 1,
      "input_channels": 3,
      "num_blocks": [2, 2, 2, 2],
      "nb_filter": [16, 32, 64, 128, 256],
    },
    checkout="mtu",
  ),
  "rpcanet": Published("models.deepunfolding", "RPCANet9", checkout="rpcanet", channels=1),
  "sctransnet": of_pal("SCTransNet", mode="train"),
  "sdsnet": of_pal("SDSNet", n_channels=3, mode="train"),
  "uiu": of_pal("UIU", mode="train")._replace(final=0),
}

FIXED_FILTER = re.compile(r"\.w_[lh][lh]$")  # MSDA-Net's Haar filters: buffers, not learned


def arrays(shape, name):
  """Makes images B×H×W×C and sparse masks B×H×W×1, float32, the same in both workers."""
  import numpy as np

  random = np.random.default_rng(0)
  image = random.standard_normal((*shape, PUBLISHED[name].channels), np.float32)
  return image, (random.random((*shape, 1)) < 1e-3).astype(np.float32)


def prepare_machine(platform="cpu"):
  """Sets what workers inherit: two cores (taskset chooses others) and huge pages, as in main.py."""
  if platform != "cpu":
    return
  os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def start_jax(platform):
  """Starts jax in a worker: on a CPU with CORES devices. Returns its version and where it runs."""
  where = f"{CORES} cores"
  if platform == "cpu":
    flag = f"--xla_force_host_platform_device_count={CORES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  import jax

  if platform != "cpu":
    where = jax.devices(platform)[0].device_kind
  return f"jax {jax.__version__} on {where}"


def add_platform(parser):
  parser.add_argument("--platform", default="cpu", choices=("cpu", "gpu"), help="of our side")


def check_platform(parser, flags, compared):
  """Refuses PyTorch's side, which runs on the CPU, beside ours on a GPU."""
  if compared and flags.platform != "cpu":
    parser.error("PyTorch's side runs on the CPU only: leave its checkouts or --platform out.")


def seconds_per_call(call):
  """Measures one call's time in a loop, averaged over 0.5 s after a first call."""
  time.sleep(SETTLE_SECONDS)
  call()  # an idle process loses its caches, and on a virtual machine even its memory
  calls, start = 0, time.perf_counter()
  while True:
    call()
    calls += 1
    elapsed = time.perf_counter() - start
    if elapsed > 0.5:
      return elapsed / calls


class JaxWorker:
  """Our networks."""

  variants = ("ours",)

  def __init__(self, platform):
    self.calls = {}
    self.version = start_jax(platform)

  def describe(self):
    from fdep_jax import backbones

    return {"version": self.version, "variants": self.variants, "networks": backbones.names()}

  def prepare(self, name, folder):
    """Compiles both tasks.

    Args:
      folder: has the PyTorch worker's weights and logits; None: new weights are drawn.

    Returns:
      Seconds to trace and compile the train step, and the relative difference of the logits.
    """
    import numpy as np
    from flax import nnx

    import converters
    from fdep_jax import backbones

    self.calls = {}
    difference = None
    if folder is None:
      net = backbones.create(name, rngs=nnx.Rngs(0))
    else:
      net = converters.load_backbone(name, dict(np.load(f"{folder}/weights.npz")))
    net.eval()
    forward = self._forward(net, name)
    if folder is not None:
      theirs = np.load(f"{folder}/logits.npy")[:, 0, :, :, None]
      difference = float(np.linalg.norm(forward().final - theirs) / np.linalg.norm(theirs))
    net.train()
    step, compile_seconds = self._train_step(net, name)
    self.calls = {"forward": forward, "train": step}
    return {"compile": compile_seconds, "difference": difference}

  def _forward(self, net, name):
    import jax
    from flax import nnx

    from fdep_jax import forward

    graphdef, variables = nnx.split(net)
    leaves, tree = jax.tree.flatten(variables)
    run = forward.jit(lambda leaves, image: nnx.merge(graphdef, tree.unflatten(leaves))(image))
    image = jax.device_put(arrays(FORWARD_SHAPE, name)[0], jax.devices()[0])

    def call():
      return jax.block_until_ready(run(leaves, image))

    call()
    return call

  def _train_step(self, net, name):
    import jax
    import optax
    from flax import nnx

    from fdep_jax.runtime import mesh as meshes

    mesh = meshes.make(CORES, TRAIN_SHAPE[0])
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    # Flat lists cross the jit boundary faster than nnx's states.
    leaves, tree = jax.tree.flatten((params, rest, optimizer.init(params)))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=meshes.replicated(mesh))
    def step(leaves, image, mask):
      params, rest, moments = tree.unflatten(leaves)

      def loss_and_rest(params):
        net = nnx.merge(graphdef, params, rest, copy=True)
        losses = [optax.sigmoid_binary_cross_entropy(h, mask).mean() for h in net(image).heads]
        return sum(losses), nnx.state(net, nnx.Not(nnx.Param))

      (loss, rest), grads = jax.value_and_grad(loss_and_rest, has_aux=True)(params)
      updates, moments = optimizer.update(grads, moments, params)
      return jax.tree.leaves((optax.apply_updates(params, updates), rest, moments)), loss

    image, mask = meshes.put_batch(arrays(TRAIN_SHAPE, name), mesh)
    state = meshes.put_replicated(leaves, mesh)

    def call():
      nonlocal state
      state, loss = step(state, image, mask)
      loss.block_until_ready()

    seconds = []
    for _ in range(2):
      start = time.perf_counter()
      call()
      seconds.append(time.perf_counter() - start)
    return call, seconds[0] - seconds[1]

  def measure(self, variant, task):
    return seconds_per_call(self.calls[task])


class TorchWorker:
  """The published code, in both memory layouts."""

  variants = ("NCHW", "channels_last")

  def __init__(self, checkouts):
    """`checkouts`: option of CHECKOUTS -> folder."""
    warnings.simplefilter("ignore")  # about functions that newer PyTorch renames
    import torch

    torch.set_num_threads(CORES)
    self.calls = {}
    self.checkouts = checkouts
    self.version = f"torch {torch.__version__} on {CORES} cores"

  def describe(self):
    names = [name for name, network in PUBLISHED.items() if network.checkout in self.checkouts]
    return {"version": self.version, "variants": self.variants, "networks": names}

  def _import(self, network):
    """The network's module; the checkouts have packages of one name."""
    for loaded in list(sys.modules):
      if loaded.partition(".")[0] in ("model", "models"):
        del sys.modules[loaded]
    root = self.checkouts[network.checkout]
    path = str(pathlib.Path(root, CHECKOUTS[network.checkout][1]).parent)
    sys.path.insert(0, path)
    try:
      return importlib.import_module(network.module)
    finally:
      sys.path.remove(path)

  def prepare(self, name, folder):
    """Builds the network in both layouts; leaves its weights and logits in `folder`."""
    import numpy as np
    import torch

    self.calls = {}
    network = PUBLISHED[name]
    module, options = self._import(network), network.options
    if name == "msda":
      # Its hand-written Haar gradients cast the filters to float16, which fails in float32
      # training. In this module alone float16 means float32; the operations are the same.
      module.torch = types.SimpleNamespace(**{**vars(torch), "float16": torch.float32})
    if name == "mtu":
      # Its 64×64 tokens are those of 1024×1024 pixels alone; here they are the image's.
      rearrange = module.rearrange
      module.rearrange = lambda tokens, pattern, **_: rearrange(
        tokens, pattern, x=math.isqrt(tokens.shape[1])
      )
      options = {**options, "block": module.Res_block}
    torch.manual_seed(0)
    net = getattr(module, network.name)(**options)
    weights = {k: v.numpy() for k, v in net.state_dict().items() if not FIXED_FILTER.search(k)}
    np.savez(f"{folder}/weights.npz", **weights)

    formats = (torch.contiguous_format, torch.channels_last)
    for variant, memory_format in zip(self.variants, formats, strict=True):
      self.calls[variant] = self._calls(copy.deepcopy(net), name, memory_format)
    heads = self.calls["NCHW"]["forward"]()
    np.save(f"{folder}/logits.npy", heads[network.final].numpy())

  def _calls(self, net, name, memory_format):
    import torch

    def put(array):
      return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)

    net = net.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    cross_entropy = torch.nn.BCEWithLogitsLoss()
    image = put(arrays(FORWARD_SHAPE, name)[0])
    images, masks = map(put, arrays(TRAIN_SHAPE, name))

    def heads_of(images):
      logits = net(images)
      return list(logits) if isinstance(logits, list | tuple) else [logits]

    def forward():
      net.eval()
      with torch.inference_mode():
        return heads_of(image)

    def train():
      net.train()
      optimizer.zero_grad()
      sum(cross_entropy(head, masks) for head in heads_of(images)).backward()
      optimizer.step()

    return {"forward": forward, "train": train}

  def measure(self, variant, task):
    return seconds_per_call(self.calls[variant][task])


def serve(worker):
  """Answers [method, *arguments] lines on stdin with {"value"} or {"error"} lines on stdout."""
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # other output must not mix with the replies
  for line in sys.stdin:
    method, *arguments = json.loads(line)
    try:
      reply = {"value": getattr(worker, method)(*arguments)}
    except Exception as error:
      traceback.print_exc()
      reply = {"error": f"{type(error).__name__}: {error}"}
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


class Remote:
  """A worker in its own process; a call raises RuntimeError if the worker reports an error."""

  def __init__(self, python, *arguments, script=__file__):
    self.process = subprocess.Popen(
      [python, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.about = self("describe")

  def __call__(self, method, *arguments):
    try:
      self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
      self.process.stdin.flush()
    except BrokenPipeError:
      pass
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"{self.process.args[0]} stopped (code {self.process.wait()}); see above.")
    reply = json.loads(line)
    if "error" in reply:
      raise RuntimeError(reply["error"])
    return reply["value"]


def time_network(name, ours, theirs, rounds):
  """Times a network: our facts, {task: {variant: median seconds}}, and a line for each failure."""
  facts, failures, contenders = {}, [], []
  with tempfile.TemporaryDirectory() as folder:
    for worker in (theirs, ours):
      if worker is None:
        continue
      try:
        weights = folder if worker is theirs or contenders else None
        facts |= worker("prepare", name, weights) or {}
        contenders += [(worker, variant) for variant in worker.about["variants"]]
      except RuntimeError as error:
        failures.append(f"{name}, {worker.about['version']}: {error}")
  medians = {}
  for task in TASKS:
    seconds = {contender: [] for contender in contenders}
    for _ in range(1 + rounds):  # the first warms up
      for contender in list(seconds):
        worker, variant = contender
        try:
          seconds[contender].append(worker("measure", variant, task))
        except RuntimeError as error:
          failures.append(f"{name}, {variant}, {task}: {error}")
          del seconds[contender]
    medians[task] = {variant: statistics.median(s[1:]) for (_, variant), s in seconds.items()}
  return facts, medians, failures


def table(task, rows, layouts):
  """Formats one task's milliseconds and ratios as Markdown.

  Args:
    rows: name -> (facts, {task: {variant: seconds}}).
    layouts: PyTorch's variants.
  """
  extra = {"forward": "difference", "train": "compile"}[task]
  columns = ["ours ms", *(f"{v} ms" for v in layouts), *(f"ours / {v}" for v in layouts)]
  if layouts or extra == "compile":
    columns.append({"difference": "logits differ by", "compile": "our compile s"}[extra])
  lines = [f"{TASKS[task]}:", "", f"| network | {' | '.join(columns)} |"]
  lines.append("| --- |" + " ---: |" * len(columns))
  ratios = {variant: [] for variant in layouts}
  for name, (facts, medians) in rows.items():
    seconds = medians[task]
    cells = [f"{1e3 * seconds[v]:.1f}" if v in seconds else "–" for v in ("ours", *layouts)]
    for variant in layouts:
      if variant in seconds and "ours" in seconds:
        ratios[variant].append(seconds["ours"] / seconds[variant])
        cells.append(f"{ratios[variant][-1]:.2f}")
      else:
        cells.append("–")
    value = facts.get(extra)
    cells.append(
      "–" if value is None else f"{value:.1e}" if extra == "difference" else f"{value:.1f}"
    )
    lines.append(f"| {name} | {' | '.join(cells[: len(columns)])} |")
  if any(ratios.values()):
    medians = [f"{statistics.median(r):.2f}" if r else "–" for r in ratios.values()]
    blanks = [""] * (1 + len(layouts))
    lines.append(f"| median | {' | '.join([*blanks, *medians, ''])} |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for option, (repository, _) in CHECKOUTS.items():
    parser.add_argument(f"--{option}", help=f"your checkout of {repository}")
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
  parser.add_argument("--networks", help="comma-separated; default: all")
  parser.add_argument("--rounds", type=int, default=7, help="timings of each; the median counts")
  parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
  add_platform(parser)
  flags = parser.parse_args()
  checkouts = {o: str(pathlib.Path(p).resolve()) for o in CHECKOUTS if (p := getattr(flags, o))}
  if flags.worker:
    serve(JaxWorker(flags.platform) if flags.worker == "jax" else TorchWorker(checkouts))
    return
  check_platform(parser, flags, checkouts)
  for option, root in checkouts.items():
    repository, inside = CHECKOUTS[option]
    if not pathlib.Path(root, inside).is_dir():
      parser.error(
        f"--{option} {root} has no folder {inside}: give the root of a checkout of "
        f"github.com/{repository}."
      )
  prepare_machine(flags.platform)
  ours = Remote(sys.executable, "--worker", "jax", "--platform", flags.platform)
  theirs = None
  if checkouts:
    options = [text for option, root in checkouts.items() for text in (f"--{option}", root)]
    theirs = Remote(flags.torch_python, "--worker", "torch", *options)
  known = ours.about["networks"]
  names = flags.networks.split(",") if flags.networks else known
  if unknown := sorted(set(names) - set(known)):
    parser.error(f"--networks has {', '.join(unknown)}; there are {', '.join(known)}.")

  rows, failures = {}, []
  for name in names:
    print(f"{name} …", file=sys.stderr, flush=True)
    rival = theirs if theirs and name in theirs.about["networks"] else None
    facts, medians, failed = time_network(name, ours, rival, flags.rounds)
    rows[name] = (facts, medians)
    failures += failed
  versions = " and ".join(worker.about["version"] for worker in (ours, theirs) if worker)
  print(f"{versions}, float32, medians of {flags.rounds} alternating rounds.\n")
  layouts = theirs.about["variants"] if theirs else []
  print("\n\n".join(table(task, rows, layouts) for task in TASKS))
  if failures:
    raise SystemExit("\n" + "\n".join(f"Failed: {line}" for line in failures))


if __name__ == "__main__":
  main()
