"""Converts a PyTorch state_dict to our parameters and back by an explicit table of layers.

A table lists every PyTorch layer once: `("stem.0", "stem/conv1/conv", CONV)`. It is read both
ways, so a network converted here and back is bit-identical. A name on either side that the table
does not have is an error.
"""

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx


class Kind(NamedTuple):
  """Arrays that a type of PyTorch layer stores, with our names and axis orders for them."""

  names: dict[str, str]  # PyTorch suffix -> ours
  to_ours: tuple[int, ...] = ()  # axes of `weight` in our order; empty: unchanged
  optional: tuple[str, ...] = ()  # suffixes that may be absent on both sides
  counters: tuple[str, ...] = ()  # suffixes without a counterpart, int64 scalars
  ones: int = 0  # axes of length 1 at the end of PyTorch's arrays, which ours does not have


CONV = Kind({"weight": "kernel", "bias": "bias"}, (2, 3, 1, 0), optional=("bias",))
CONV_TRANSPOSE = Kind({"weight": "kernel", "bias": "bias"}, (2, 3, 0, 1), optional=("bias",))
LINEAR = Kind({"weight": "kernel", "bias": "bias"}, (1, 0), optional=("bias",))
# Our networks have a 1×1 convolution in place of a linear layer on pooled features.
LINEAR_AS_CONV = Kind({"weight": "kernel", "bias": "bias"}, (1, 0), optional=("bias",))
CONV1D = Kind({"weight": "kernel"}, (2, 1, 0))
NORM = Kind({"weight": "scale", "bias": "bias"})
PIXEL_NORM = Kind({"weight": "scale", "bias": "bias"}, ones=2)  # a LayerNorm of (C, 1, 1)
BATCH_NORM = Kind(
  {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"},
  # PyTorch uses this count only if momentum=None, as in no network here; written back as 0.
  counters=("num_batches_tracked",),
)

Rule = tuple[str, str, Kind]  # PyTorch layer, our path ("a/b/0"), kind


class Dead(NamedTuple):
  """A layer that the published code builds but never runs; our networks leave it out."""

  layer: str
  kind: Kind
  shapes: dict[str, tuple[int, ...]]  # PyTorch suffix -> shape
  reason: str


def dead_conv(layer: str, shape: tuple[int, ...], reason: str, *, bias: bool) -> Dead:
  """Makes the entry of a dead convolution (or linear layer) with a weight of `shape`."""
  return Dead(layer, CONV, {"weight": shape, **({"bias": shape[:1]} if bias else {})}, reason)


def dead_norm(layer: str, channels: int, reason: str) -> Dead:
  """A dead LayerNorm."""
  return Dead(layer, NORM, {"weight": (channels,), "bias": (channels,)}, reason)


def dead_batch_norm(layer: str, channels: int, reason: str) -> Dead:
  """Makes the entry of a dead BatchNorm."""
  suffixes = ("weight", "bias", "running_mean", "running_var")
  return Dead(layer, BATCH_NORM, {suffix: (channels,) for suffix in suffixes}, reason)


def conv_norm(layers: tuple[str, str] | str, ours: str) -> list[Rule]:
  """Lists the rules of a convolution and its BatchNorm; one name has children `.conv` and `.bn`."""
  conv, norm = layers if isinstance(layers, tuple) else (f"{layers}.conv", f"{layers}.bn")
  return [(conv, f"{ours}/conv", CONV), (norm, f"{ours}/norm", BATCH_NORM)]


def leaky_block(layer: str, ours: str, *, shortcut: bool) -> list[Rule]:
  """Rules of a `LeakyBlock`; `shortcut`: whether its channels change."""
  table = conv_norm((f"{layer}.conv1", f"{layer}.bn1"), f"{ours}/conv1")
  table += conv_norm((f"{layer}.conv2", f"{layer}.bn2"), f"{ours}/conv2")
  if shortcut:
    table += conv_norm((f"{layer}.shortcut.0", f"{layer}.shortcut.1"), f"{ours}/shortcut")
  return table


def without_wrappers(name: str) -> str:
  """Drops the marks that torch.compile and FSDP leave anywhere in a name."""
  return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def listing(problems: list[str], most: int = 17) -> list[str]:
  """Shortens a list of problems to `most` lines that show both sides: lacking and unknown names."""
  if len(problems) <= most:
    return problems
  unknown = [line for line in problems if ": unknown, " in line]
  others = [line for line in problems if ": unknown, " not in line]
  half = most // 2
  first = others[: max(half, most - len(unknown))]
  shown = first + unknown[: most - len(first)]
  return [*shown, f"… and {len(problems) - most} more"]


def flat_variables(module: nnx.Module) -> dict[str, nnx.Variable]:
  """Returns our parameters and running statistics by path, such as "a/b/0/kernel"."""
  state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
  return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def fill(
  module: nnx.Module,
  state: dict[str, np.ndarray],
  rules: list[Rule],
  dead: list[Dead] = (),
  fixed: dict[str, np.ndarray] | None = None,
) -> list[str]:
  """Writes a state_dict into `module`, in place.

  Args:
    module: our network; its values may be abstract (`nnx.eval_shape`).
    state: PyTorch name -> array.
    rules: rules of all layers of `module`, each once.
    dead: layers of the published code that our network leaves out; may be absent from `state`.
    fixed: constants that the published code stores and our code computes, name -> value; may be
      absent from `state`.

  Returns:
    A line for each name that was left out, with the reason.

  Raises:
    ValueError: a name, a shape or a type does not fit; the message lists every problem.
  """
  targets = flat_variables(module)
  left = dict(state)
  arrays, problems, skipped = {}, [], []
  for layer, path, kind in rules:
    for suffix, ours in kind.names.items():
      name, target = f"{layer}.{suffix}", f"{path}/{ours}"
      if target not in targets:
        if suffix not in kind.optional:
          problems.append(f"{target}: in the rules, but our network has no such parameter")
        continue
      if target in arrays:
        problems.append(f"{target}: filled a second time, by {name}")
      if name not in left:
        problems.append(f"{name}: missing; it fills {target}")
        continue
      array = np.asarray(left.pop(name))
      order = kind.to_ours if suffix == "weight" else ()
      expected = targets[target].shape
      if kind is LINEAR_AS_CONV and suffix == "weight":
        expected = expected[2:]
      expected = (*expected, *[1] * kind.ones)
      if array.ndim != len(expected) or tuple(
        array.shape[axis] for axis in (order or range(array.ndim))
      ) != tuple(expected):
        problems.append(f"{name}: shape {array.shape}, but {target} is {targets[target].shape}")
        continue
      if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
        problems.append(f"{name}: type {array.dtype}, but {target} holds floats")
        continue
      array = array.astype(np.float32)
      bad = array.size - int(np.isfinite(array).sum())
      if bad:
        problems.append(f"{name}: {bad} of {array.size} values are NaN or infinite")
      arrays[target] = (array.transpose(order) if order else array).reshape(targets[target].shape)
    for suffix in kind.counters:
      left.pop(f"{layer}.{suffix}", None)
  for entry in dead:
    for suffix in (*entry.shapes, *entry.kind.counters):
      if left.pop(f"{entry.layer}.{suffix}", None) is not None:
        skipped.append(f"{entry.layer}.{suffix}: unused, {entry.reason}")
  for name, constant in (fixed or {}).items():
    given = left.pop(name, constant)
    if np.shape(given) != constant.shape or not np.allclose(given, constant, atol=1e-3):
      problems.append(f"{name}: differs from the network's constant {constant.ravel().tolist()}")
  problems += [f"{name}: unknown, no rule takes it" for name in left]
  missing_targets = set(targets) - {
    f"{path}/{ours}" for _, path, kind in rules for ours in kind.names.values()
  }
  problems += [f"{target}: no rule fills it" for target in sorted(missing_targets)]
  if problems:
    count = f"{len(problems)} conversion problem{'s' if len(problems) > 1 else ''}"
    raise ValueError("\n  ".join([f"{count}:", *listing(problems)]))
  for target, array in arrays.items():
    targets[target].set_value(jax.numpy.asarray(array))
  nnx.update(module, _unflatten(module, targets))
  return skipped


def _unflatten(module: nnx.Module, targets: dict[str, nnx.Variable]):
  state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
  return nnx.from_flat_state(
    [(path, targets["/".join(map(str, path))]) for path, _ in nnx.to_flat_state(state)]
  )


def unfill(
  module: nnx.Module,
  rules: list[Rule],
  dead: list[Dead] = (),
  fixed: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Converts back to a state_dict that the published PyTorch network loads with `strict=True`.

  Dead layers get PyTorch's default initial values, drawn from a fixed seed.
  """
  sources = flat_variables(module)
  state = {}
  for layer, path, kind in rules:
    for suffix, ours in kind.names.items():
      if f"{path}/{ours}" not in sources:
        continue
      array = np.asarray(sources[f"{path}/{ours}"][...], np.float32)
      array = array.reshape(*array.shape, *[1] * kind.ones)
      if suffix == "weight" and kind.to_ours:
        if kind is LINEAR_AS_CONV:
          array = array[0, 0]
        array = array.transpose(np.argsort(kind.to_ours))
      state[f"{layer}.{suffix}"] = np.ascontiguousarray(array)
    for suffix in kind.counters:
      state[f"{layer}.{suffix}"] = np.zeros((), np.int64)
  state |= fixed or {}
  rng = np.random.default_rng(0)
  for entry in dead:
    for suffix, shape in entry.shapes.items():
      state[f"{entry.layer}.{suffix}"] = _initial(entry, suffix, shape, rng)
    for suffix in entry.kind.counters:
      state[f"{entry.layer}.{suffix}"] = np.zeros((), np.int64)
  return state


def _initial(entry: Dead, suffix: str, shape, rng) -> np.ndarray:
  if entry.kind in (BATCH_NORM, NORM):
    return np.full(shape, 1.0 if suffix in ("weight", "running_var") else 0.0, np.float32)
  if "weight" not in entry.shapes:  # parameters of no layer
    return np.zeros(shape, np.float32)
  bound = float(np.prod(entry.shapes["weight"][1:])) ** -0.5
  return rng.uniform(-bound, bound, shape).astype(np.float32)
