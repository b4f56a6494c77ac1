"""Compares the forward pass of the foundation models with the authors' PyTorch code, in one run.

  python benchmarks/priors.py --dino ../dino --dinov2 ../dinov2 --dinov3 ../dinov3 \
      --torch-python EXE

The checkouts are your own of github.com/facebookresearch/{dino,dinov2,dinov3}. A model whose
checkout is not given runs alone. benchmarks/networks.py describes how the two frameworks alternate.

A call computes the four levels that SAMF takes (blocks 2, 5, 8 and 11) of a 448×448 image in
float32. The weights are the same in both: those that PyTorch draws, loaded by
`converters.load_prior`. The table shows how far the levels differ.
"""

import argparse
import os
import pathlib
import sys
import tempfile

import networks as bench
import numpy as np

SIZE = 448
BLOCKS = (2, 5, 8, 11)
MODELS = {  # title -> (our name, our size, checkout)
  "DINOv1 S/16": ("dino", "vits16", "dino"),
  "DINOv2 S/14": ("dinov2", "vits14", "dinov2"),
  "DINOv3 S/16": ("dinov3", "vits16", "dinov3"),
}
BATCHES = (1, 4)


def images(batch):
  random = np.random.default_rng(0)
  return random.standard_normal((batch, SIZE, SIZE, 3), np.float32)


class JaxWorker:
  """Our models."""

  def __init__(self):
    flag = f"--xla_force_host_platform_device_count={bench.CORES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    import jax

    self.version = f"jax {jax.__version__}"

  def describe(self):
    return {"version": self.version}

  def prepare(self, title, batch, folder):
    """Compiles; returns the levels' largest relative difference from PyTorch's in `folder`."""
    import jax
    from flax import nnx

    import converters
    from fdep_jax import priors
    from fdep_jax.runtime import mesh

    weights = pathlib.Path(folder, "weights.npz")
    if weights.exists():
      model = converters.load_prior(dict(np.load(weights)))
    else:
      model = priors.create(*MODELS[title][:2], rngs=nnx.Rngs(0))
    the_mesh = mesh.make(min(bench.CORES, batch), batch)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, image: nnx.merge(graphdef, state).levels(image, BLOCKS))
    state = mesh.put_replicated(state, the_mesh)
    image = mesh.put_batch(images(batch), the_mesh)
    self.call = lambda: jax.block_until_ready(run(state, image))
    ours = self.call()
    if not weights.exists():
      return None
    with np.load(f"{folder}/levels.npz") as theirs:
      pairs = zip(ours, theirs.values(), strict=True)
      return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)

  def measure(self):
    return bench.seconds_per_call(self.call)


class TorchWorker:
  """The authors' models."""

  def __init__(self, checkouts):
    """`checkouts`: name -> folder."""
    import warnings

    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(bench.CORES)
    self.version = f"torch {torch.__version__}"
    sys.path[:0] = [folder for folder in checkouts.values() if folder]

  def describe(self):
    return {"version": self.version}

  def _model(self, title):
    import torch

    torch.manual_seed(0)
    name = MODELS[title][0]
    if name == "dino":
      import vision_transformer

      return vision_transformer.vit_small(patch_size=16)
    if name == "dinov2":
      from dinov2.models import vision_transformer

      return vision_transformer.vit_small(
        patch_size=14, img_size=518, init_values=1.0, block_chunks=0
      )
    from dinov3.models import vision_transformer

    model = vision_transformer.vit_small(
      patch_size=16, layerscale_init=1e-5, n_storage_tokens=4, mask_k_bias=True,
      pos_embed_rope_dtype="fp32", norm_layer="layernormbf16",
    )  # fmt: skip
    model.init_weights()
    return model

  def prepare(self, title, batch, folder):
    """Builds the model; leaves its weights and levels in `folder`."""
    import torch

    model = self._model(title).eval()
    image = torch.from_numpy(images(batch)).permute(0, 3, 1, 2).contiguous()

    def levels():
      if hasattr(model, "prepare_tokens"):  # DINOv1's own call takes the last blocks only
        tokens, outputs = model.prepare_tokens(image), []
        for number, block in enumerate(model.blocks):
          tokens = block(tokens)
          if number in BLOCKS:
            outputs.append(model.norm(tokens)[:, 1:])
        side = SIZE // model.patch_embed.patch_size
        return [x.reshape(batch, side, side, -1).permute(0, 3, 1, 2) for x in outputs]
      return model.get_intermediate_layers(image, n=BLOCKS, reshape=True, norm=True)

    def call():
      with torch.inference_mode():
        return levels()

    self.call = call
    weights = {k: v.float().numpy() for k, v in model.state_dict().items()}
    np.savez(f"{folder}/weights.npz", **weights)
    arrays = [x.permute(0, 2, 3, 1).float().numpy() for x in call()]
    np.savez(f"{folder}/levels.npz", *arrays)

  def measure(self):
    return bench.seconds_per_call(self.call)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name in ("dino", "dinov2", "dinov3"):
    parser.add_argument(f"--{name}", help=f"your checkout of facebookresearch/{name}")
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
  parser.add_argument("--models", default=",".join(MODELS), help="comma-separated; default: all")
  parser.add_argument("--rounds", type=int, default=5, help="timings of each; the median counts")
  parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
  flags = parser.parse_args()
  checkouts = {name: getattr(flags, name) for _, _, name in MODELS.values()}
  if flags.worker:
    return bench.serve(JaxWorker() if flags.worker == "jax" else TorchWorker(checkouts))
  titles = flags.models.split(",")
  if unknown := sorted(set(titles) - set(MODELS)):
    parser.error(f"--models has {', '.join(unknown)}; it takes {', '.join(MODELS)}.")
  bench.prepare_machine()

  here = str(pathlib.Path(__file__))
  ours = bench.Remote(sys.executable, "--worker", "jax", script=here)
  theirs = None
  if given := {name: pathlib.Path(p).resolve() for name, p in checkouts.items() if p}:
    options = [x for name, path in given.items() for x in (f"--{name}", str(path))]
    theirs = bench.Remote(flags.torch_python, "--worker", "torch", *options, script=here)
  print(f"Forward, {SIZE}×{SIZE}, float32, {bench.CORES} cores; milliseconds:\n")
  print("| model | batch | ours | PyTorch | ours / PyTorch | levels differ by |")
  print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
  for title in titles:
    checkout = MODELS[title][2]
    for batch in BATCHES:
      workers = [theirs, ours] if checkout in given else [ours]
      with tempfile.TemporaryDirectory() as folder:
        difference = [worker("prepare", title, batch, folder) for worker in workers][-1]
      seconds = [[] for _ in workers]
      for _ in range(1 + flags.rounds):  # the first warms up
        for worker, times in zip(workers, seconds, strict=True):
          times.append(worker("measure"))
      medians = [1e3 * float(np.median(times[1:])) for times in seconds]
      cells = ["–", "–", "–"]
      if len(workers) > 1:
        cells = [f"{medians[0]:.0f}", f"{medians[1] / medians[0]:.2f}", f"{difference:.0e}"]
      print(f"| {title} | {batch} | {medians[-1]:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
