"""Untrained ViTs of DINOv2's shapes, as files: a control of what the pretrained weights do.

  python -m converters.untrained vits14 SEED OUT.safetensors

Training takes the file as any other of DINOv2 (`prior.checkpoint`), and records its SHA-256. The
name must contain the size, as the published files' names do: "untrained_vits14_seed0.safetensors".
"""

import os
import pathlib
import sys

import safetensors.numpy
from flax import nnx

from converters.dinov2 import state_dict
from fdep_jax.priors import dinov2
from fdep_jax.runtime import files


def write(size: str, seed: int, out: str | os.PathLike) -> None:
  """Writes a ViT with random weights: facebookresearch names, float32.

  OUR CHOICE: the weights are drawn as `DINOv2` draws them, normal with variance 1/fan_in, and the
  layer scales are 1, so that every block changes what passes it. DINOv2's own initial values pass
  the patch embedding on almost unchanged: its four levels would be one.

  Args:
    size: one of `dinov2.SIZES`.
    seed: of the weights, at least 0.
    out: a .safetensors file, replaced if it exists.

  Raises:
    ValueError: there is no such size, `seed` is negative, or `out` is not named .safetensors.
    FileNotFoundError: there is no folder for `out`.
  """
  out = pathlib.Path(out)
  if size not in dinov2.SIZES:
    raise ValueError(f"size is {size!r}; it must be one of {', '.join(dinov2.SIZES)}.")
  if seed < 0:
    raise ValueError(f"SEED is {seed}; it must be a whole number from 0.")
  if out.suffix != ".safetensors":
    raise ValueError(f"{out}: the file is safetensors; name it {out.stem}.safetensors.")
  if not out.absolute().parent.is_dir():
    raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} to.")
  vit = dinov2.DINOv2(**dinov2.SIZES[size], rngs=nnx.Rngs(seed))
  # One entry: of several the library changes the order, and with it the file's SHA-256.
  about = {"untrained": f"{size}, seed {seed}"}
  with files.replacing(out) as partial:
    safetensors.numpy.save_file(state_dict(vit), partial, about)


def main(argv: list[str]) -> int:
  """Exit code 0: written; 2: bad arguments."""
  if len(argv) != 3 or not argv[1].isdecimal():
    print("Usage: python -m converters.untrained SIZE SEED OUT.safetensors", file=sys.stderr)
    return 2
  try:
    write(argv[0], int(argv[1]), argv[2])
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  print(f"{argv[2]}: {argv[0]} of RANDOM weights, seed {argv[1]}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
