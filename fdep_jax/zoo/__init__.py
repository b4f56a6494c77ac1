"""Light branches trained by this project, ready to use: `--checkpoint zoo:acm`.

Each is a `NAME.safetensors`, as `--mode export` writes light.safetensors, and a card `NAME.md`:
data, settings, scores, known weaknesses.
"""

import os
import pathlib

from fdep_jax.runtime import files

PREFIX = "zoo:"
BEST = "acm"  # by the HSE of the held-out images, as the cards have it
_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
  """Lists the trained networks."""
  return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def named(checkpoint: str | os.PathLike | int | None) -> bool:
  """Tells whether a --checkpoint is `zoo:NAME`."""
  return str(checkpoint).startswith(PREFIX)


def is_light(checkpoint: str | os.PathLike | int | None) -> bool:
  """Tells whether a --checkpoint names a light branch alone: zoo:NAME, or a light.safetensors."""
  return named(checkpoint) or str(checkpoint).endswith(".safetensors")


def place(path: str | os.PathLike) -> pathlib.Path:
  """Returns the file that `zoo:NAME` means, or any other path with its ~ resolved.

  Raises:
    ValueError: the zoo has no such network.
  """
  if not named(path):
    return files.expand(path)
  name = str(path).removeprefix(PREFIX)
  if name not in names():
    known = ", ".join(PREFIX + name for name in names())
    raise ValueError(f"There is no {path}. The zoo has {known}.")
  return _FOLDER / f"{name}.safetensors"
