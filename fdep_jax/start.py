"""Starts a training from the weights of an earlier one (`train.init_from`), for fine-tuning."""

import logging
import os

import jax
import numpy as np
from flax import nnx

from fdep_jax import detector, settings, zoo
from fdep_jax.runtime import checkpoint

# A model's parts, as the first word of the names of its weights.
_OWN, _FUSION, _MAIN_STATS = "backbone/", "fusion/", "main_stats/"

Weights = dict[str, np.ndarray | jax.Array]  # by the names that `checkpoint.flatten` gives


def read(source: str | os.PathLike, backbone: str) -> Weights:
  """Reads parameters and running statistics, by their names in an `FDEP`.

  Args:
    source: zoo:NAME, a run's folder or a checkpoint in it (RUN, RUN/best, RUN/checkpoints/STEP),
      a light.safetensors of `--mode export`, or a published file for PyTorch.
    backbone: the network that is to start so.

  Raises:
    ValueError, FileNotFoundError: there are no such weights, or they are another network's.
  """
  try:
    path = zoo.place(source)
    if path.is_dir():
      return _of_run(path, backbone)
    if not path.exists():
      raise FileNotFoundError(f"there is no such file or folder.{zoo.hint(path)}")
    if detector.is_exported(path):
      found = detector.load_light(path)
      _check(found.config.model.backbone, backbone)
      net = found.model.backbone
    else:
      import converters

      net = converters.load_backbone(backbone, path)
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(f"train.init_from={source}: {error}") from None
  flat = checkpoint.flatten(nnx.state(net, nnx.Any(nnx.Param, nnx.BatchStat)))
  return {_OWN + name: array for name, array in flat.items()}


def _of_run(path, backbone: str) -> Weights:
  run, which = detector.find_checkpoint(None, path)
  config = settings.load(run)
  _check(config.model.backbone, backbone)
  checkpoints = checkpoint.Checkpoints(run, config.checkpoint.keep)
  try:
    step, best = detector.choose_step(checkpoints, run, which)
    flat, meta = checkpoints.read(step, best=best)
  finally:
    checkpoints.close()
  if best and which == "best" and detector.selection_doubt(meta):
    logging.warning("%s: %s", run, detector.selection_doubt(meta))
  found = {}
  for name, array in flat.items():
    part, _, rest = name.partition("/")
    if part in ("params", "stats"):
      found[rest] = array
  return found


def _check(found: str, backbone: str) -> None:
  if found != backbone:
    raise ValueError(f"its network is {found}, and model.backbone is {backbone}; they must agree")


def fill(model, weights: Weights, source: str) -> None:
  """Gives a new model the weights of `read`, in place.

  Every weight of the network must be there, and no other. SAMF is left as it is if the weights have
  none, as those of a light branch do not. The decoder's running statistics of the main branch are
  then those of the light branch.

  Raises:
    ValueError: weights are missing, left over or of other shapes; the message lists them.
  """
  own = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
  mine = checkpoint.flatten(own)
  weights = dict(weights)
  fused = any(name.startswith(_FUSION) for name in weights)
  new = [name for name in mine if name.startswith(_FUSION)] if not fused else []
  weights |= {name: mine[name] for name in new}
  for name in mine:
    if name.startswith(_MAIN_STATS) and name not in weights:
      weights[name] = weights.get(_OWN + name.removeprefix(_MAIN_STATS), mine[name])
  fuses = any(name.startswith(_FUSION) for name in mine)  # a light branch needs no SAMF
  parts = (_OWN, _FUSION) if fuses else (_OWN,)
  left = [name for name in weights if name.startswith(parts) and name not in mine]
  try:
    if left:
      more = f" and {len(left) - 20} more" if len(left) > 20 else ""
      raise ValueError(f"it has what this network has not: {', '.join(left[:20])}{more}")
    nnx.update(model, checkpoint.unflatten(weights, own))
  except ValueError as error:
    raise ValueError(f"train.init_from={source}: {error}") from None
  logging.info("starting from the weights of %s%s", source, "; SAMF is new" if new else "")
