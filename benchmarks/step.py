"""Compares our FDEP train step with two full passes, of ours and of PyTorch, in one run.

  python benchmarks/step.py --reference ../PAL --dinov2 ../dinov2 --torch-python EXE

`--reference` and `--dinov2` are your own checkouts of github.com/YuChuang1205/PAL and of
github.com/facebookresearch/dinov2; without them only our steps run. benchmarks/networks.py
describes how the two frameworks alternate.

Both train both branches on the EEDM loss with AdamW in float32, batch 4, 224×224, with a frozen
ViT-S/14 of random weights (its time does not depend on them) and four SAMFs:

* step: encode once, decode twice, as `--mode train` runs it;
* two passes: the same step, but each branch runs the whole network;
* levels: the step with ready-made DINOv2 levels, no ViT in the program;
* bank: the step with levels that a prior bank reads from disk;
* PyTorch: the published network run twice, eagerly, in both memory layouts.

`--vit vitl14` measures our steps with a larger DINOv2; "step / bank" shows the prior bank's gain.
"""

import argparse
import pathlib
import sys
import tempfile

import networks as bench
import numpy as np

CROP, BATCH = 224, 4
OURS = ("step", "two passes", "levels", "bank")
LAYOUTS = ("NCHW", "channels_last")
# Modules of the published networks that output the top feature, alone or as the last of a list.
TOP = {"alcl": "stage", "dna": "conv4_0", "msda": "stage"}


class JaxWorker:
  """Our steps, and our DINOv2."""

  def __init__(self, vit, platform):
    self.version = bench.start_jax(platform)
    from flax import nnx

    from fdep_jax import priors
    from fdep_jax.priors import dinov2

    vit = dinov2.DINOv2(**dinov2.SIZES[vit], rngs=nnx.Rngs(0))
    self.prior = priors.from_module(vit, dinov2.quarter_levels(vit.depth), "random")
    self.calls = {}

  def describe(self):
    return {"version": self.version, "variants": OURS}

  def prepare(self, name, folder, variants):
    """Compiles the variants; each has its own state."""
    from configs import base
    from fdep_jax import data
    from fdep_jax.priors import bank
    from fdep_jax.runtime import mesh

    self.calls = {}
    config = base.get_config()
    config.model.backbone = name
    config.data.crop, config.train.batch_size = CROP, BATCH
    the_mesh = mesh.make(bench.CORES, BATCH)
    crops = data.CropBank(data.scenes(BATCH, 256, seed=1), per_image=1, size=CROP, seed=0)
    levels = bank.Bank(pathlib.Path(folder), crops, self.prior)
    levels.prepare(0, BATCH, the_mesh, progress=False)
    image, mask = (np.stack(x) for x in zip(*map(crops.crop, range(BATCH)), strict=True))
    batch = {"image": image, "mask": mask}
    ready = levels.levels(range(BATCH))
    batches = {
      "step": lambda: batch,
      "two passes": lambda: batch,
      "levels": lambda: {**batch, "levels": ready},
      "bank": lambda: {**batch, "levels": levels.levels(range(BATCH))},
    }
    for variant in variants:
      self.calls[variant] = self._step(config, the_mesh, batches[variant], variant == "two passes")

  def _step(self, config, the_mesh, next_batch, two_passes):
    import jax

    from fdep_jax import build
    from fdep_jax import step as step_lib
    from fdep_jax.runtime import mesh

    model = build.create_model(config, self.prior)
    if two_passes:
      model.__class__ = _two_passes()
    optimizer = step_lib.make_optimizer(config, 1)
    step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
    state = mesh.put_replicated(step_lib.init_state(model, optimizer), the_mesh)
    placed = mesh.put_replicated(self.prior, the_mesh)

    def call():
      nonlocal state
      state, metrics = step(state, placed, mesh.put_batch(next_batch(), the_mesh))
      jax.block_until_ready(metrics)

    call()
    return call

  def measure(self, variant):
    return bench.seconds_per_call(self.calls[variant])


def _two_passes():
  from fdep_jax.fdep import FDEP

  class TwoPasses(FDEP):
    def __call__(self, image, levels):
      return self.main(image, levels), self.light(image)

  return TwoPasses


class TorchWorker:
  """The published networks and DINOv2, with the SAMF of fdep_jax/samf.py."""

  def __init__(self, reference, dinov2):
    sys.path[:0] = [reference, dinov2]
    import warnings

    warnings.simplefilter("ignore")
    import torch
    from dinov2.models import vision_transformer

    torch.set_num_threads(bench.CORES)
    self.version = f"torch {torch.__version__} on {bench.CORES} cores"
    self.vit = vision_transformer.vit_small(
      patch_size=14, img_size=518, init_values=1.0, block_chunks=0
    ).eval()
    self.calls = {}

  def describe(self):
    return {"version": self.version, "variants": LAYOUTS}

  def prepare(self, name):
    import torch

    formats = (torch.contiguous_format, torch.channels_last)
    self.calls = {v: self._step(name, f) for v, f in zip(LAYOUTS, formats, strict=True)}

  def _step(self, name, memory_format):
    import importlib
    import types

    import torch
    from torch import nn
    from torch.nn import functional

    published = bench.PUBLISHED[name]
    module = importlib.import_module(published.module)
    if name == "msda":  # see networks.py
      module.torch = types.SimpleNamespace(**{**vars(torch), "float16": torch.float32})
    net = getattr(module, published.name)(**published.options).train()
    channels = {"msda": 64}.get(name, 256)

    def block(size):
      conv = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
      return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

    class Samf(nn.Module):
      def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(384, channels, 1)
        self.gate, self.shift = (nn.Conv2d(channels, channels // 2, 1) for _ in range(2))
        self.gated, self.shifted = (nn.Conv2d(channels // 2, channels // 2, 1) for _ in range(2))
        self.refine = nn.Sequential(block(1), block(3))

      def forward(self, top, level):
        prior = functional.interpolate(self.project(level), top.shape[2:], mode="bilinear")
        multiply, add = top.chunk(2, 1)
        multiply = self.gated(multiply * self.gate(prior).sigmoid())
        add = self.shifted(add + self.shift(prior))
        return self.refine(torch.cat([multiply, add], 1) + top)

    fusion = nn.ModuleList(Samf() for _ in range(4))
    levels = None

    def fuse(module, inputs, output):
      if levels is None:
        return output
      top = output[-1] if isinstance(output, list) else output
      for samf, level in zip(fusion, levels, strict=True):
        top = samf(top, level)
      return [*output[:-1], top] if isinstance(output, list) else top

    net.get_submodule(TOP[name]).register_forward_hook(fuse)
    whole = nn.ModuleList([net, fusion]).to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(whole.parameters(), 1e-3, weight_decay=0.01)
    image, mask = bench.arrays((BATCH, CROP, CROP), name)
    image, mask = (
      torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
      for x in (image, mask)
    )

    def loss(heads):
      heads = heads if isinstance(heads, list | tuple) else [heads]
      total = 0
      for head in heads:
        each = functional.binary_cross_entropy_with_logits(head, mask, reduction="none") * 4
        threshold = each.flatten().sort()[0][each.numel() // 2]
        total = total + each[each >= threshold].mean()
      return total

    def call():
      nonlocal levels
      with torch.no_grad():
        levels = self.vit.get_intermediate_layers(image, [2, 5, 8, 11], reshape=True, norm=True)
      optimizer.zero_grad()
      main = loss(net(image))
      levels = None
      (main + loss(net(image))).backward()
      optimizer.step()

    call()
    return call

  def measure(self, variant):
    return bench.seconds_per_call(self.calls[variant])


def medians(contenders, rounds):
  """Measures {variant: median seconds} of (worker, variant) pairs, which alternate."""
  seconds = {variant: [] for _, variant in contenders}
  for _ in range(1 + rounds):  # the first warms up
    for worker, variant in contenders:
      seconds[variant].append(worker("measure", variant))
  return {variant: float(np.median(values[1:])) for variant, values in seconds.items()}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--reference", help="your checkout of YuChuang1205/PAL")
  parser.add_argument("--dinov2", help="your checkout of facebookresearch/dinov2")
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
  parser.add_argument("--networks", default=",".join(TOP), help="comma-separated")
  parser.add_argument("--vit", default="vits14", choices=("vits14", "vitb14", "vitl14"))
  parser.add_argument("--ours", default=",".join(OURS), help="which of ours; each takes memory")
  parser.add_argument("--rounds", type=int, default=5, help="timings of each; the median counts")
  parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
  bench.add_platform(parser)
  flags = parser.parse_args()
  if flags.worker == "jax":
    return bench.serve(JaxWorker(flags.vit, flags.platform))
  if flags.worker == "torch":
    return bench.serve(TorchWorker(flags.reference, flags.dinov2))
  if bool(flags.reference) != bool(flags.dinov2):
    parser.error("PyTorch's step needs both --reference and --dinov2.")
  if flags.reference and flags.vit != "vits14":
    parser.error("PyTorch's step has a ViT-S/14; leave --reference out.")
  if unknown := sorted(set(flags.ours.split(",")) - set(OURS)):
    parser.error(f"--ours has {', '.join(unknown)}; it takes {', '.join(OURS)}.")
  names = flags.networks.split(",")
  if flags.reference and (unknown := sorted(set(names) - set(TOP))):
    parser.error(f"PyTorch's step exists for {', '.join(TOP)}, not for {', '.join(unknown)}.")
  bench.check_platform(parser, flags, flags.reference)
  bench.prepare_machine(flags.platform)

  here = str(pathlib.Path(__file__))
  worker = ("--worker", "jax", "--vit", flags.vit, "--platform", flags.platform)
  ours, theirs = bench.Remote(sys.executable, *worker, script=here), None
  if flags.reference:
    paths = [str(pathlib.Path(p).resolve()) for p in (flags.reference, flags.dinov2)]
    theirs = bench.Remote(
      flags.torch_python, "--worker", "torch", "--reference", paths[0], "--dinov2", paths[1],
      script=here,
    )  # fmt: skip
  versions = " and ".join(worker.about["version"] for worker in (ours, theirs) if worker)
  setting = f"batch {BATCH}, {CROP}×{CROP}, {flags.vit}, {versions}"
  print(f"Train step, {setting}; milliseconds:\n")
  mine = flags.ours.split(",")
  variants = [*mine, *(LAYOUTS if theirs else ())]
  ratios = [("two passes", "step"), ("bank", "levels"), ("step", "bank")]
  ratios += [(layout, "step") for layout in LAYOUTS]
  ratios = [pair for pair in ratios if set(pair) <= set(variants)]
  print(f"| network | {' | '.join([*variants, *(f'{a} / {b}' for a, b in ratios)])} |")
  print("| --- |" + " ---: |" * (len(variants) + len(ratios)), flush=True)
  for name in names:
    with tempfile.TemporaryDirectory() as folder:
      contenders = [(ours, variant) for variant in mine]
      ours("prepare", name, folder, mine)
      if theirs:
        theirs("prepare", name)
        contenders += [(theirs, variant) for variant in LAYOUTS]
      s = medians(contenders, flags.rounds)
    cells = [f"{1e3 * s[v]:.0f}" for v in variants]
    cells += [f"{s[a] / s[b]:.2f}" for a, b in ratios]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
