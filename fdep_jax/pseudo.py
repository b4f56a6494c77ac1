"""Makes pseudo-labels with a trained teacher: conventional two-stage distillation (appendix D)."""

import logging
from collections.abc import Sequence

from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import data, detector, evaluate, forward
from fdep_jax.metrics import hse


def relabel(config: ConfigDict, samples: Sequence[data.Sample], the_mesh) -> list[data.Sample]:
  """Replaces the masks of the train images by the predictions of `train.teacher`.

  OUR CHOICE, as the paper gives no details: a mask is the teacher's probability > 0.5, since the
  loss needs hard labels. With train.labels "both", an epoch uses every image twice, once with each
  mask.

  Args:
    config: of the student; train.labels is "pseudo", or "both" to keep the true masks, too.
    samples: with their true masks.
    the_mesh: devices to compute on.

  Raises:
    ValueError, FileNotFoundError: the teacher has no main branch, or is not trained yet.
  """
  teacher = _load(config)
  _, params, stats, rng = nnx.split(teacher.model, nnx.Param, nnx.BatchStat, ...)
  teacher.config.eval.branches = "all"
  apply = forward.make_forward(teacher.config, teacher.model, teacher.mean, teacher.std)
  prior = teacher.prior.placed(the_mesh, teacher.config.prior.shard)
  state = {"params": params, "stats": stats, "rng": rng}
  maps = evaluate.probabilities(apply, state, prior, samples, config.eval.batch_size, the_mesh)
  labelled = list(samples)
  for index, probs in maps:
    labelled[index] = samples[index]._replace(mask=probs["main"] > hse.HALF)
  logging.info(
    "pseudo-labels by %s: %d target pixels; the true masks have %d", teacher.source,
    sum(int(s.mask.sum()) for s in labelled), sum(int(s.mask.sum()) for s in samples),
  )  # fmt: skip
  return [*samples, *labelled] if config.train.labels == "both" else labelled


def fingerprint(config: ConfigDict) -> str:
  """Returns a SHA-256 of the teacher's parameters and statistics; raises as `relabel`."""
  _, params, stats, _ = nnx.split(_load(config).model, nnx.Param, nnx.BatchStat, ...)
  return evaluate.fingerprint({"params": params, "stats": stats})


def _load(config: ConfigDict) -> detector.Detector:
  try:
    return detector.load(config.train.teacher, branch="main")
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(f"train.teacher: {error}") from None
