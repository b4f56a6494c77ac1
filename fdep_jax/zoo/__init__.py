"""Light branches trained by this project, ready to use: `--checkpoint zoo:acm`.

Each is a `NAME.safetensors`, as `--mode export` writes light.safetensors, and a card `NAME.md`:
data, settings, scores, known weaknesses.
"""

import pathlib

PREFIX = "zoo:"
BEST = "acm"  # by the HSE of the held-out images, as the cards have it
_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
  """Lists the trained networks."""
  return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def path(name: str) -> pathlib.Path:
  """Returns the file of `zoo:NAME`.

  Raises:
    ValueError: there is no such network.
  """
  name = name.removeprefix(PREFIX)
  if name not in names():
    raise ValueError(f"{PREFIX}{name}: the zoo has {', '.join(names())}.")
  return _FOLDER / f"{name}.safetensors"
