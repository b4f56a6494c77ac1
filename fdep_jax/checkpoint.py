"""Checkpoints of a run: the newest ones to continue from, the best to deploy (Orbax).

A checkpoint is a flat dictionary, path -> array, and a small JSON object: it can be read without
this package, on any number of devices, and in part.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_META = "meta"
_STATE = "state"


def flatten(state) -> dict[str, jax.Array]:
  """Path -> array of any pytree; random keys as their bits."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {_name(path): _bits(leaf) for path, leaf in leaves}


def unflatten(flat, like):
  """The inverse of `flatten` for a tree of the structure, shapes and types of `like`.

  Raises:
    ValueError: listing every path that is missing or does not fit.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
  problems = []
  for path, leaf in leaves:
    name, expected = _name(path), jax.eval_shape(_bits, leaf)
    if name not in flat:
      problems.append(f"{name}: missing")
    elif flat[name].shape != expected.shape or flat[name].dtype != expected.dtype:
      problems.append(
        f"{name}: {flat[name].dtype}{flat[name].shape}, but {expected.dtype}{expected.shape} "
        "is needed"
      )
  if problems:
    more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
    raise ValueError("\n  ".join(["the checkpoint does not fit:", *problems[:20], *more]))
  restored = [
    jax.random.wrap_key_data(jnp.asarray(flat[_name(path)])) if _is_key(leaf) else flat[_name(path)]
    for path, leaf in leaves
  ]
  return jax.tree_util.tree_unflatten(treedef, restored)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _is_key(leaf) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bits(leaf):
  return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


class Checkpoints:
  """The checkpoints below one run folder: `checkpoints/` (newest) and `best/` (one).

  Args:
    workdir: of the run.
    keep: newest checkpoints to keep.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    self._newest = _manager(workdir / "checkpoints", keep)
    self._best = _manager(workdir / "best", 1)

  def save(self, step: int, state, meta: dict, *, best: bool = False) -> None:
    """Starts writing; returns as soon as the arrays are copied. A step that exists is kept."""
    manager = self._best if best else self._newest
    if step in manager.all_steps():
      return
    if jax.process_count() > 1:  # two at once would meet at each other's barriers
      self.wait()
    arguments = ocp.args.Composite(
      **{_STATE: ocp.args.StandardSave(flatten(state)), _META: ocp.args.JsonSave(meta)}
    )
    manager.save(step, args=arguments, force=True)

  def steps(self) -> list[int]:
    return sorted(self._newest.all_steps())

  def best_step(self) -> int | None:
    return self._best.latest_step()

  def restore(self, like, step: int | None = None, *, best: bool = False):
    """The state of the structure of `like`, and the JSON object, of a step (default the newest)."""
    manager = self._best if best else self._newest
    step = manager.latest_step() if step is None else step
    flat, meta = _read(manager, step)
    return unflatten(flat, like), meta

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._newest.wait_until_finished()
    self._best.wait_until_finished()

  def close(self) -> None:
    self._newest.close()
    self._best.close()


def _manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for item, handler, save, restore in (
    (_STATE, ocp.StandardCheckpointHandler(), ocp.args.StandardSave, ocp.args.StandardRestore),
    (_META, ocp.JsonCheckpointHandler(), ocp.args.JsonSave, ocp.args.JsonRestore),
  ):
    registry.add(item, save, handler)
    registry.add(item, restore, handler)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, create=True, enable_async_checkpointing=True
  )
  return ocp.CheckpointManager(folder.absolute(), options=options, handler_registry=registry)


def _read(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, np.ndarray], dict]:
  metadata = manager.item_metadata(step)[_STATE]
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
    for name, leaf in dict(getattr(metadata, "tree", metadata)).items()
  }
  arguments = ocp.args.Composite(
    **{_STATE: ocp.args.StandardRestore(target), _META: ocp.args.JsonRestore()}
  )
  restored = manager.restore(step, args=arguments)
  return restored[_STATE], restored[_META]
