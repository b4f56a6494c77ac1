"""Pseudo-labels of a trained teacher: conventional two-stage distillation (appendix D)."""

import logging
from collections.abc import Sequence

from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import data, detector, evaluate, forward
from fdep_jax.metrics import hse


def relabel(config: ConfigDict, samples: Sequence[data.Sample], the_mesh) -> list[data.Sample]:
  """The train images with what `train.teacher` finds in them as masks.

  OUR CHOICE, as the paper does not say how: the masks are the teacher's probabilities > 0.5, since
  the loss is made for hard labels; together with the true ones means that every image is trained on
  twice an epoch, once with each.

  Args:
    config: train.labels "pseudo", or "both" for the true ones, too.
    samples: with their true masks.
    the_mesh: to compute on.

  Raises:
    ValueError, FileNotFoundError: the teacher is no run with a main branch, or not trained yet.
  """
  try:
    teacher = detector.load(config.train.teacher, branch="main")
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(f"train.teacher: {error}") from None
  _, params, stats, rng = nnx.split(teacher.model, nnx.Param, nnx.BatchStat, ...)
  apply = forward.make_forward(teacher.config, teacher.model, teacher.mean, teacher.std)
  prior = teacher.prior.placed(the_mesh, teacher.config.dino.shard)
  state = {"params": params, "stats": stats, "rng": rng}
  maps = evaluate.probabilities(apply, state, prior, samples, config.eval.batch_size, the_mesh)
  labelled = list(samples)
  for index, probs in maps:
    labelled[index] = samples[index]._replace(mask=probs["main"] > hse.HALF)
  logging.info(
    "pseudo-labels by %s: %d target pixels, true are %d", teacher.source,
    sum(int(s.mask.sum()) for s in labelled), sum(int(s.mask.sum()) for s in samples),
  )  # fmt: skip
  return [*samples, *labelled] if config.train.labels == "both" else labelled
