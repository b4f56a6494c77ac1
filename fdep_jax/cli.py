"""Defines the flags and runs a mode: `fdep --config configs/msda.py --workdir runs/msda`."""

import importlib
import logging
import os
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from fdep_jax import settings
from fdep_jax.runtime import topology
from fdep_jax.runtime.signals import Preempted

NEEDS = {  # mode: the flags without which it cannot run
  "train": ("config", "workdir"),
  "eval": ("workdir",),
  "predict": ("input",),
  "export": (),
  "score": ("predictions", "masks"),
  "plan": ("config", "topology"),
  "report": ("runs", "out"),
  "sweep": ("config", "workdir"),
  "table": ("workdir",),
}
COMMANDS = {  # mode: the module whose `command` runs it; imported only then
  "predict": "fdep_jax.predict",
  "export": "fdep_jax.export",
  "score": "fdep_jax.score",
  "plan": "fdep_jax.plan",
  "report": "fdep_jax.report",
  "sweep": "fdep_jax.tables.sweep",
  "table": "fdep_jax.tables.table",
}
FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", help_string="settings of a run to train")
flags.DEFINE_string("workdir", None, "folder of the run")
flags.DEFINE_enum("mode", "train", list(NEEDS), "train evaluates, too; README.md has the rest")
flags.DEFINE_string("input", None, "predict: a picture or a folder of pictures")
flags.DEFINE_string("checkpoint", None, "predict, export: best, last, a step, or a path")
flags.DEFINE_enum("branch", None, ("light", "main"), "predict: default the deployed one")
flags.DEFINE_float("threshold", 0.5, "predict: of masks and targets")
flags.DEFINE_string("range", "auto", "predict: values that become black and white: LOW,HIGH, full")
flags.DEFINE_list("predictions", None, "score: folder of probability maps; A,B compares two")
flags.DEFINE_string("masks", None, "score: folder of masks")
flags.DEFINE_string("out", None, "folder to write; report: a file .html")
flags.DEFINE_list("runs", None, "report: folders of evaluated runs, A,B,C,D")
flags.DEFINE_string("task", None, "sweep: i/n, this one's share of the runs, 0/n to n−1/n")
flags.DEFINE_list("seeds", None, "sweep, table: 0,1,2; default the table's")
flags.DEFINE_string("topology", None, "plan: a slice, v5e:4x4 or cpu:8")
flags.DEFINE_bool("thorough", False, "plan: optimise as a run does; takes three times as long")


def main(argv):
  del argv
  logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
  # Orbax logs every file it opens, and the traceback of errors that checkpoint.py explains.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("jax").setLevel(logging.WARNING)  # it logs every absent accelerator
  mode = FLAGS.mode
  missing = [f"--{name}" for name in NEEDS[mode] if not getattr(FLAGS, name)]
  if missing:
    raise ValueError(f"--mode {mode} needs {' and '.join(missing)}.")
  if mode == "plan":
    topology.start(FLAGS.topology)  # before jax starts
  if mode in COMMANDS:
    importlib.import_module(COMMANDS[mode]).command(FLAGS)
    return
  config = FLAGS.config if mode == "train" else settings.load(FLAGS.workdir)
  settings.check(config)
  from fdep_jax import evaluate, train
  from fdep_jax.runtime import mesh

  mesh.start(config)
  if mode == "train":
    train.train(config, FLAGS.workdir)
  else:
    evaluate.evaluate(FLAGS.workdir, config)


def parse(argv):
  """Flags, with a sentence for a setting that no config has."""
  try:
    return FLAGS(argv)
  except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
    sys.exit(_fail(settings.explain_flags(argv, error), 2))


def run_main(argv):
  """Exit codes: 0 done, 2 bad arguments or input, 75 preempted and saved, 1 anything else."""
  try:
    main(argv)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(_fail(error, 2))
  except (FloatingPointError, OSError) as error:
    sys.exit(_fail(error, 1))
  except KeyboardInterrupt:
    sys.exit(_fail("Interrupted.", 1))
  except Preempted as error:
    sys.exit(_fail(error, 75))


def _fail(error, code):
  print(error, file=sys.stderr)
  return code


def use_huge_pages():
  """Starts this program again, in the same process, with large arrays on huge pages.

  XLA takes the memory of a step anew at every step, up to gigabytes; on a CPU mapping it by 4 KiB
  takes a quarter of the time of a step (benchmarks/README.md). glibc reads the setting when a
  program starts. Set GLIBC_TUNABLES yourself, empty for instance, and nothing happens.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start():
  """Runs the program: what `main.py` and the console script `fdep` are."""
  use_huge_pages()
  app.run(run_main, flags_parser=parse)
