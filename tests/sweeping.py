"""A sweep of toy rows as a process: `python tests/sweeping.py WORKDIR COMPILED [TASK]`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from fdep_jax import backbones
from fdep_jax.tables import experiments, sweep

# Also in the processes that train, which import this file as their main module; not in tests, which
# have a fixture for it.
if __name__ in ("__main__", "__mp_main__"):
  backbones.__path__.append(str(pathlib.Path(__file__).resolve().parent / "toy_backbones"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

MODES = ("original", "fdep_wo_coisd", "fdep")
ABSENT = {"data.root": "absent", "prior.checkpoint": "absent"}  # told when its turn comes
BROKEN = experiments.Row("broken", ("Toy", "broken"), ABSENT, {})


def table(seeds=(0, 1)) -> experiments.Table:
  """Three rows, two seeds: six runs."""
  rows = tuple(
    experiments.Row(f"toy-{mode}", ("Toy", mode), {"mode": mode}, {"hse": 50.0, "params_m": 0.01})
    for mode in MODES
  )
  return experiments.Table("Toys.", ("Network", "Scheme"), ("iou", "hse"), rows, seeds)


def config(compiled: str):
  """Synthetic scenes, a small random prior, 12 steps with a checkpoint at every second."""
  from helpers import toy_config

  return toy_config(
    **{
      "train.steps": 12,
      "checkpoint.every_steps": 2,
      "log.every_steps": 1,
      "eval.save_probs": True,
      "log.compile_cache": str(compiled),
    }
  )


if __name__ == "__main__":
  workdir, compiled, *task = sys.argv[1:]
  sys.exit(bool(sweep.sweep(table(), config(compiled), workdir, *task)))
