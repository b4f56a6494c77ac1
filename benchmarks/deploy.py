"""Compares light.onnx with PyTorch eager, and FDEP's light branch with the original network.

  python benchmarks/deploy.py --reference ../PAL --torch-python ../torch-env/bin/python

Needs requirements-export.txt. benchmarks/networks.py describes `--reference`, `--torch-python` and
how the two sides alternate; without these flags only our side runs. Forward passes, batch 1,
256×256, float32, on the same two cores:

* `light.onnx` in onnxruntime with two threads (with normalisation and sigmoid);
* the published network in PyTorch (without them) with the same weights;
* in JAX, the light branch of an FDEP model and the network alone, each compiled by itself.

With `--platform gpu` our side runs on the GPU; onnxruntime takes TensorRT or else CUDA if it has
them (the package onnxruntime-gpu), which the column "provider" says.
"""

import argparse
import pathlib
import sys
import tempfile

import networks as bench
import numpy as np

OURS = ("onnxruntime", "light", "original")
MEAN, STD = 0.4, 0.2
PROVIDERS = {"cpu": (), "gpu": ("TensorrtExecutionProvider", "CUDAExecutionProvider")}


class Worker:
  """Our side: the ONNX file and the two JAX networks."""

  def __init__(self, platform):
    import onnxruntime

    self.version = f"onnxruntime {onnxruntime.__version__}, {bench.start_jax(platform)}"
    self.providers = [p for p in PROVIDERS[platform] if p in onnxruntime.get_available_providers()]
    if self.providers:
      onnxruntime.preload_dlls()  # CUDA and cuDNN of pip's packages
    self.calls = {}

  def describe(self):
    from fdep_jax import backbones

    return {"version": self.version, "variants": OURS, "networks": backbones.names()}

  def prepare(self, name, folder):
    """Exports and compiles a network.

    Args:
      folder: has the PyTorch worker's weights and logits; without weights, new ones are drawn.

    Returns:
      Parameters and FLOPs of the light branch / the original's, onnxruntime's provider, and the
      largest difference of the ONNX file's probabilities from PyTorch's (None without PyTorch).
    """
    from flax import nnx

    import converters
    from configs import base
    from fdep_jax import backbones, build, export
    from fdep_jax import detector as detector_lib
    from fdep_jax.fdep import FDEP

    weights = pathlib.Path(folder, "weights.npz")
    if weights.exists():
      net = converters.load_backbone(name, dict(np.load(weights)))
    else:
      net = backbones.create(name, rngs=nnx.Rngs(0))
    levels = 4 if net.top_channels else 0
    model = FDEP(net, dino_width=384, num_levels=levels, rngs=nnx.Rngs(0))
    model.eval()
    original = backbones.create(name, rngs=nnx.Rngs(0))
    original.eval()

    config = base.get_config()
    config.model.backbone = name
    place = pathlib.Path(folder)
    detector = detector_lib.Detector(model, "light", config, MEAN, STD, None, "", place, 0)
    light, path = export.make_light(detector), place / "light.onnx"
    export.write_onnx(detector, light, None, path, {})
    session = self._session(path)
    normal = bench.arrays(bench.FORWARD_SHAPE, name)[0]
    image = np.ascontiguousarray((normal * STD + MEAN).transpose(0, 3, 1, 2))
    self.calls = {
      "onnxruntime": lambda: session.run(None, {"image": image}),
      "light": self._forward(model, lambda model, x: model.light(x).final, normal),
      "original": self._forward(original, lambda net, x: net(x).final, normal),
    }
    difference, logits = None, pathlib.Path(folder, "logits.npy")
    if logits.exists():
      theirs = 1 / (1 + np.exp(-np.load(logits).astype(np.float64)))
      difference = float(np.abs(self.calls["onnxruntime"]()[0] - theirs).max())
    counts = [build.count_parameters(nnx.state(n, nnx.Param)) for n in (light.net, original)]
    flops = [export.flops(n, 256) for n in (light.net, original)]
    return {
      "parameters": counts[0] / counts[1],
      "flops": flops[0] / flops[1],
      "difference": difference,
      "provider": session.get_providers()[0].removesuffix("ExecutionProvider"),
    }

  def _session(self, path):
    """Opens a file with the first provider that starts; some may lack their libraries."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bench.CORES
    for provider in (*self.providers, "CPUExecutionProvider"):
      wanted = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
      session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
      if session.get_providers()[0] == provider:
        return session

  def _forward(self, module, function, image):
    import jax
    from flax import nnx

    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    run = jax.jit(lambda leaves, x: function(nnx.merge(graphdef, tree.unflatten(leaves)), x))

    def call():
      jax.block_until_ready(run(leaves, image))

    call()
    return call

  def measure(self, variant, task):
    del task
    return bench.seconds_per_call(self.calls[variant])


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--reference", help="your checkout of YuChuang1205/PAL")
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
  parser.add_argument("--networks", help="comma-separated; default: all")
  parser.add_argument("--rounds", type=int, default=9, help="timings of each; the median counts")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  bench.add_platform(parser)
  flags = parser.parse_args()
  if flags.worker:
    return bench.serve(Worker(flags.platform))
  bench.check_platform(parser, flags, flags.reference)
  bench.prepare_machine(flags.platform)
  words = ("--worker", "--platform", flags.platform)
  ours = bench.Remote(sys.executable, *words, script=str(pathlib.Path(__file__)))
  theirs, layouts = None, []
  if flags.reference:
    reference = str(pathlib.Path(flags.reference).resolve())
    theirs = bench.Remote(flags.torch_python, "--worker", "torch", "--reference", reference)
    layouts = theirs.about["variants"]
  versions = " and ".join(worker.about["version"] for worker in (ours, theirs) if worker)
  print(f"{versions}, {bench.TASKS['forward']}; milliseconds.\n")
  columns = ["provider", "onnxruntime", *layouts, *(f"onnxruntime / {v}" for v in layouts)]
  columns += ["differ by", "light", "original", "light / original", "parameters", "FLOPs"]
  print(f"| network | {' | '.join(columns)} |\n| --- |" + " ---: |" * len(columns), flush=True)
  for name in flags.networks.split(",") if flags.networks else ours.about["networks"]:
    with tempfile.TemporaryDirectory() as folder:
      if theirs:
        theirs("prepare", name, folder)
      facts = ours("prepare", name, folder)
      contenders = [(ours, v) for v in OURS] + [(theirs, v) for v in layouts]
      seconds = {variant: [] for _, variant in contenders}
      for _ in range(1 + flags.rounds):  # the first warms up
        for worker, variant in contenders:
          seconds[variant].append(worker("measure", variant, "forward"))
    s = {variant: float(np.median(values[1:])) for variant, values in seconds.items()}
    cells = [facts["provider"], *(f"{1e3 * s[v]:.1f}" for v in ("onnxruntime", *layouts))]
    cells += [f"{s['onnxruntime'] / s[v]:.2f}" for v in layouts]
    cells.append("–" if facts["difference"] is None else f"{facts['difference']:.0e}")
    cells += [f"{1e3 * s[v]:.1f}" for v in ("light", "original")]
    cells += [f"{s['light'] / s['original']:.2f}"]
    cells += [f"{facts[fact]:.2f}" for fact in ("parameters", "flops")]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
