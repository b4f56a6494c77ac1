"""The eight detectors, found by file name: `create("msda", rngs=nnx.Rngs(0))`."""

import importlib
import pkgutil

from flax import nnx

from fdep_jax.backbones._base import Backbone, Logits

__all__ = ["Backbone", "Logits", "create", "names", "network_class"]


def names() -> list[str]:
  """Every network's name: the files of this folder that do not start with an underscore."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_"))


def network_class(name: str) -> type[Backbone]:
  """The one `Backbone` that `backbones/<name>.py` defines."""
  if name not in names():
    raise ValueError(f"No backbone is called {name!r}; there are {', '.join(names())}.")
  module = importlib.import_module(f"{__name__}.{name}")
  classes = [
    value
    for value in vars(module).values()
    if isinstance(value, type)
    and issubclass(value, Backbone)
    and value.__module__ == module.__name__
  ]
  if len(classes) != 1:
    raise ValueError(f"{module.__name__} must define one Backbone, not {len(classes)}.")
  return classes[0]


def create(name: str, *, rngs: nnx.Rngs, **options) -> Backbone:
  """A freshly initialised network; `options` are the keywords of its class."""
  return network_class(name)(rngs=rngs, **options)
