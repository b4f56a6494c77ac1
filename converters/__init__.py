"""Converts PyTorch weight files to our parameters and back, without PyTorch."""

import collections
import functools
import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import rules
from converters.torch_file import read_torch
from fdep_jax import backbones, priors
from fdep_jax.priors.dinov2 import DINOv2

__all__ = ["load_backbone", "load_dinov2", "load_prior", "read_torch", "to_torch", "variant"]

PathOrState = str | os.PathLike | dict[str, np.ndarray]


def load_backbone(name: str, path_or_state: PathOrState) -> backbones.Backbone:
  """Loads the network `name` with the weights of a PyTorch checkpoint.

  Args:
    name: one of `backbones.names()`.
    path_or_state: a file for `read_torch`, or PyTorch name -> array. The network may be below any
      one prefix, such as "module.", "model.net." or "ema_state_dict."; it is found by the names.
      The network's variant (input channels, norms) is inferred from names and shapes.

  Returns:
    The network in training mode, float32.

  Raises:
    ValueError: the file is not a checkpoint of this network; the message lists all keys that do not
      fit.
  """
  table = _table(name)
  state = _unwrap(_state(path_or_state), name, table)
  options = _options(table, state)
  # Shapes only: all values come from the file, and drawing initial ones takes seconds.
  net = nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0), **options))
  try:
    rules.fill(net, state, table.rules(net), _dead(table, net), _fixed(table))
  except ValueError as error:
    source = "" if isinstance(path_or_state, dict) else f"{path_or_state}: "
    raise ValueError(f"{source}not a checkpoint of {name}. {error}") from None
  for _, variable in nnx.to_flat_state(nnx.state(net, nnx.RngState)):  # ACM's and ALCNet's dropout
    is_key = jax.dtypes.issubdtype(variable.dtype, jax.dtypes.prng_key)
    variable.set_value(jax.random.key(0) if is_key else jnp.zeros(variable.shape, variable.dtype))
  return net


def variant(name: str, path_or_state: PathOrState) -> dict[str, object]:
  """Infers the keywords of `backbones.create` for a checkpoint; arguments as `load_backbone`.

  Raises:
    ValueError: two networks are in it.
  """
  table = _table(name)
  return _options(table, _unwrap(_state(path_or_state), name, table))


def to_torch(net: backbones.Backbone) -> dict[str, np.ndarray]:
  """Makes the state_dict that the published PyTorch network loads with `strict=True`.

  Returns:
    PyTorch name -> float32 array (int64 for batch counters). Layers that the published code builds
    but never runs have their default initial values.
  """
  table = _table(type(net).__module__.rsplit(".", 1)[-1])
  return rules.unfill(net, table.rules(net), _dead(table, net), _fixed(table))


def load_prior(path_or_state: PathOrState, dtype=jnp.float32, **options) -> priors.Foundation:
  """Loads a foundation model of any kind; see `converters.foundation.load_prior`."""
  # Imported here: its tables are of this package.
  from converters.foundation import load_prior as load

  return load(path_or_state, dtype, **options)


def load_dinov2(path_or_state: PathOrState, dtype=jnp.float32, **options) -> DINOv2:
  """Loads DINOv2 with the weights of a file; see `converters.dinov2.load_dinov2`."""
  # Imported here, or `python -m converters.dinov2` would warn that it is imported already.
  from converters.dinov2 import load_dinov2 as load

  return load(path_or_state, dtype, **options)


def _table(name: str):
  backbones.network_class(name)
  try:
    return importlib.import_module(f"converters.{name}")
  except ModuleNotFoundError:
    raise ValueError(
      f"No converter for {name}: write converters/{name}.py with `rules(net)`, one line a layer "
      "(converters/msda.py is an example)."
    ) from None


def _options(table, state: dict[str, np.ndarray]) -> dict[str, object]:
  return table.options(state) if hasattr(table, "options") else {}


def _dead(table, net) -> list[rules.Dead]:
  return table.dead(net) if hasattr(table, "dead") else []


def _fixed(table) -> dict[str, np.ndarray]:
  return table.fixed() if hasattr(table, "fixed") else {}


def _state(path_or_state: PathOrState) -> dict[str, np.ndarray]:
  if isinstance(path_or_state, dict):
    return path_or_state
  return read_torch(path_or_state)


@functools.lru_cache(16)
def _known_names(name: str, table) -> frozenset[str]:
  """Returns PyTorch's names of the network, of its first variant."""
  net = nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0)))
  return frozenset(f"{layer}.{s}" for layer, _, kind in table.rules(net) for s in kind.names)


def _unwrap(state: dict[str, np.ndarray], name: str, table) -> dict[str, np.ndarray]:
  """Drops the one prefix below which most names are those of the network.

  Raises:
    ValueError: the names are complete below two prefixes.
  """
  state = {rules.without_wrappers(n): array for n, array in state.items()}
  known = _known_names(name, table)
  counts = collections.Counter()
  for found in state:
    parts = found.split(".")
    for i in range(len(parts)):
      if ".".join(parts[i:]) in known:
        counts["".join(f"{part}." for part in parts[:i])] += 1
        break
  if not counts:
    return state
  (prefix, most), *others = counts.most_common(2)
  if others and others[0][1] == most:
    raise ValueError(
      f"there are two networks {name} in it, below {prefix!r} and {others[0][0]!r}. Save one alone."
    )
  return {n.removeprefix(prefix): array for n, array in state.items()}
