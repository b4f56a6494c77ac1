"""Saves and restores checkpoints: the newest to continue from, the best to deploy (Orbax).

A checkpoint is a flat dictionary, path -> array, and a small JSON object. It can be read without
this package, on any number of devices, and in part.
"""

import json
import logging
import pathlib
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

_META = "meta"
_STATE = "state"
_CRC = "crc32"
_DEPLOYED = ("params/", "stats/", "rng/")  # content of a best checkpoint: no optimiser


class Damaged(ValueError):
  """A checkpoint cannot be read, or differs from what was written."""


class NotSaved(OSError):
  """A checkpoint could not be written; earlier ones are whole."""


def flatten(state) -> dict[str, jax.Array]:
  """Returns path -> array of any pytree; random keys become their bits."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {_name(path): _bits(leaf) for path, leaf in leaves}


def unflatten(flat, like):
  """Inverts `flatten` for a tree with the structure, shapes and types of `like`.

  Raises:
    ValueError: paths are missing or do not fit; the message lists them.
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
    jax.random.wrap_key_data(jnp.asarray(flat[_name(path)]))
    if _is_key(leaf)
    else jnp.asarray(flat[_name(path)])
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
  """The checkpoints below one run folder: `checkpoints/` (newest) and `best/`.

  Writes and creates nothing before the first `save`, so that a running, finished or read-only
  folder can be read. A checkpoint that a killed process left half-written is not named as a step,
  so it is never read. `best/` keeps one more than `checkpoints/`, so that every kept checkpoint
  still has the best one at its time; the newest in `best/` is the best.

  Args:
    workdir: of the run.
    keep: number of newest checkpoints to keep.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    self.workdir = workdir
    self._keep = {"checkpoints": keep, "best": keep + 1}
    self._managers: dict[str, ocp.CheckpointManager] = {}
    self._writing: dict[str, int] = {}

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    try:
      self.close()
    except NotSaved as failure:
      if error is None:
        raise
      logging.warning("%s", failure)

  def save(self, step: int, state, meta: dict, *, best: bool = False) -> None:
    """Starts writing; returns once the arrays are copied. Does nothing if the step exists.

    Raises:
      NotSaved: this checkpoint, or an earlier one still being written, cannot be written.
    """
    name = "best" if best else "checkpoints"
    flat = flatten(state)
    if best:
      flat = {path: leaf for path, leaf in flat.items() if path.startswith(_DEPLOYED)}
    else:  # bests of earlier steps must be on disk first
      self._wait("best")
    try:
      manager = self._manager(name)
      if step in manager.all_steps():
        return
      self._wait(name)
      if jax.process_count() > 1:  # two writes at once would mix up their barriers
        self.wait()
      self._writing[name] = step
      items = {
        _STATE: ocp.args.StandardSave(flat),
        _META: ocp.args.JsonSave({**meta, _CRC: _checksum(flat, meta)}),
      }
      manager.save(step, args=ocp.args.Composite(**items), force=True)
    except NotSaved:
      raise
    except Exception as error:  # also ValueError and RuntimeError, from Orbax's libraries
      raise self._not_saved(name, error) from error

  def steps(self, *, best: bool = False) -> list[int]:
    """Lists the steps on disk, ascending."""
    folder = self.workdir / ("best" if best else "checkpoints")
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())

  def best_step(self) -> int | None:
    return max(self.steps(best=True), default=None)

  def restore(self, like, step: int | None = None, *, best: bool = False):
    """Reads the state, with the structure of `like`, and the JSON object.

    Args:
      like: a tree with the shapes and types to read.
      step, best: as for `read`.

    Raises:
      Damaged: no checkpoint is whole.
      ValueError: the checkpoint does not fit `like`.
    """
    flat, meta = self.read(step, best=best)
    return unflatten(flat, like), meta

  def read(
    self, step: int | None = None, *, best: bool = False
  ) -> tuple[dict[str, np.ndarray], dict]:
    """Reads every array, by its name, and the JSON object.

    Args:
      step: of the checkpoint; default the newest whole one. Logs each damaged one.
      best: read from `best/`.

    Raises:
      Damaged: no checkpoint is whole.
    """
    folder = self.workdir / ("best" if best else "checkpoints")
    steps = self.steps(best=best) if step is None else [step]
    for found in reversed(steps):
      try:
        return _read(folder / str(found))
      except Damaged as error:
        if step is None and not (folder / str(found)).exists():
          return self.read(best=best)  # a training in progress has just replaced it
        logging.warning("%s", error)
    if step is not None:
      raise Damaged(f"{folder / str(step)} is damaged. There are {self.steps(best=best)}.")
    advice = (
      f"Remove {folder} to use the newest checkpoint."
      if best
      else f"Put back a copy of one of them, or remove {self.workdir} to train from the start."
    )
    raise Damaged(f"No checkpoint in {folder} is whole (there are {steps}). {advice}")

  def rewind(self, step: int) -> None:
    """Sets the folder back to `step`: moves later checkpoints to `damaged/`, removes later bests.

    Later ones are damaged, or were written just before the run was killed.
    """
    for late in self.steps():
      if late > step:
        aside = self.workdir / "damaged" / str(late)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (self.workdir / "checkpoints" / str(late)).rename(aside)
    for late in self.steps(best=True):
      if late > step:
        shutil.rmtree(self.workdir / "best" / str(late))

  def wait(self) -> None:
    """Waits until everything is on disk.

    Raises:
      NotSaved: a checkpoint cannot be written.
    """
    for name in self._managers:
      self._wait(name)

  def close(self) -> None:
    """Waits as `wait` does, then ends the writing threads."""
    try:
      self.wait()
    finally:
      while self._managers:
        _, manager = self._managers.popitem()
        try:
          manager.close()
        except Exception:  # already raised by wait()
          pass

  def _wait(self, name: str) -> None:
    if name in self._managers:
      try:
        self._managers[name].wait_until_finished()
      except Exception as error:  # of the writing thread
        raise self._not_saved(name, error) from error

  def _not_saved(self, name: str, error: Exception) -> NotSaved:
    for partial in (self.workdir / name).glob("*.orbax-checkpoint-tmp"):
      shutil.rmtree(partial, ignore_errors=True)  # frees the disk for the next start
    whole = [s for s in self.steps(best=name == "best") if s != self._writing.get(name)]
    kept = f"step {whole[-1]} is kept" if whole else "there is none before it"
    return NotSaved(
      f"{self.workdir / name}: the checkpoint of step {self._writing.get(name)} cannot be written "
      f"({_first_line(error)}); {kept}. Make room or make the folder writable, then repeat the "
      "command."
    )

  def _manager(self, name: str) -> ocp.CheckpointManager:
    if name not in self._managers:
      self._managers[name] = _make_manager(self.workdir / name, self._keep[name])
    return self._managers[name]


def _make_manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for item, handler, save, restore in (
    (_STATE, ocp.StandardCheckpointHandler(), ocp.args.StandardSave, ocp.args.StandardRestore),
    (_META, ocp.JsonCheckpointHandler(), ocp.args.JsonSave, ocp.args.JsonRestore),
  ):
    registry.add(item, save, handler)
    registry.add(item, restore, handler)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    create=True,
    enable_async_checkpointing=True,
    cleanup_tmp_directories=True,  # of a killed process
  )
  return ocp.CheckpointManager(folder.absolute(), options=options, handler_registry=registry)


def _read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """Reads arrays and JSON object; raises Damaged if anything is missing or changed.

  Reads with TensorStore, which Orbax writes with: for a damaged file Orbax's own reader prints a
  dozen tracebacks.
  """
  try:
    meta = json.loads((folder / _META / "metadata").read_text())
    written = meta.pop(_CRC)
    # Not as a URL, in which #, % and ? have a meaning.
    base = {"driver": "file", "path": f"{(folder / _STATE).absolute()}/"}
    store = {"driver": "ocdbt", "base": base}
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    names = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
    arrays = {n: ts.open({"driver": "zarr", "kvstore": {**store, "path": n}}) for n in names}
    reads = {name: array.result().read() for name, array in arrays.items()}
    flat = {name: np.asarray(read.result()) for name, read in reads.items()}
    found = _checksum(flat, meta)
  except (PermissionError, MemoryError):
    raise
  except Exception as error:  # of any kind: the libraries do not check what they read
    raise Damaged(f"The checkpoint {folder} is damaged ({_first_line(error)}).") from error
  if found != written:
    raise Damaged(f"The checkpoint {folder} is damaged (its checksum is wrong).")
  return flat, meta


def _checksum(flat: dict[str, jax.Array | np.ndarray], meta: dict) -> int:
  """Computes the CRC-32 of everything, since Orbax does not detect flipped bits in an array."""
  crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
  for name in sorted(flat):
    array = flat[name]
    crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
    if isinstance(array, jax.Array):  # a cached view would block donation
      array = array.addressable_data(0)
    crc = zlib.crc32(np.asarray(array).tobytes(), crc)
  return crc


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
