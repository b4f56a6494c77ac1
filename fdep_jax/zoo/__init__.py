"""Light branches trained by this project, ready to use: `--checkpoint zoo:acm`.

Each is a `NAME.safetensors`, as `--mode export` writes light.safetensors, and a card `NAME.md`:
data, settings, scores, known weaknesses.
"""

import os
import pathlib

from fdep_jax.runtime import files

_PREFIX = "zoo:"
BEST = "zoo:mlcl"  # by the HSE of the held-out images, as the cards have it
_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
  """Lists the trained networks, without `zoo:`."""
  return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def named(checkpoint: str | os.PathLike | int | None) -> bool:
  """Tells whether a --checkpoint is `zoo:NAME`."""
  return str(checkpoint).startswith(_PREFIX)


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
  name = str(path).removeprefix(_PREFIX)
  if name not in names():
    raise ValueError(f"There is no {path}.{hint(path)}")
  return _FOLDER / f"{name}.safetensors"


def hint(checkpoint: str | os.PathLike) -> str:
  """Says, for a checkpoint that does not exist, which network of the zoo may be meant."""
  name = pathlib.Path(str(checkpoint).replace(":", "/")).stem.lower()
  if name in names():
    return f" Do you mean {_PREFIX}{name}?"
  return f" Trained networks of this package: {', '.join(_PREFIX + n for n in names())}."
