"""Defines the flags and runs a mode: `fdep --config configs/msda.py --workdir runs/msda`.

Imports the core requirements only, so that `--mode score` starts without jax, flax and absl.
"""

import functools
import importlib
import importlib.util
import logging
import os
import pathlib
import sys

from fdep_jax import zoo
from fdep_jax.cli import arguments
from fdep_jax.runtime.signals import Preempted

NEEDS = {  # mode: the flags that it cannot run without
  "train": ("config", "workdir"),
  "eval": ("workdir",),
  "predict": ("input",),
  "export": (),
  "score": ("predictions", "masks"),
  "plan": ("config", "topology"),
  "report": ("runs", "out"),
  "sweep": ("config", "workdir"),
  "table": ("workdir",),
  "validate": ("data",),
}
_FILE = ("backbone", "mean", "std", "normalisation")  # of a published network
TAKES = {  # mode: the flags that it may have besides; it refuses all others
  "train": (),
  "eval": ("method", "checkpoint", *_FILE, "data", "out"),
  "predict": ("workdir", "method", "checkpoint", *_FILE, "branch", "threshold", "range", "out"),
  "export": ("workdir", "checkpoint", *_FILE, "out"),
  "score": ("split", "out"),
  "plan": ("workdir", "out", "thorough"),
  "report": (),
  "sweep": ("task", "seeds"),
  "table": ("config", "seeds", "retime", "out"),
  "validate": ("range", "out"),
}
OF_PUBLISHED = {"eval": ("data", "out"), "predict": ("input",), "export": ("out",)}
USES = {mode: (*NEEDS[mode], *TAKES[mode]) for mode in NEEDS}
OF_RUN = {  # mode: the settings of a trained run that it may change, as a pattern
  "eval": r"data\.(root|synthetic_\w+)|eval\.(batch_size|branches|save_probs)"
  r"|prior\.(checkpoint|shard)|host_devices|distributed|log\.compile_cache",
  "predict": r"prior\.checkpoint|log\.compile_cache",
}
OF_FILE = {  # mode: the settings that it takes for the network of a file
  "eval": r"data\.range|eval\.(batch_size|save_probs)|host_devices|distributed"
  r"|log\.compile_cache",
  "predict": r"log\.compile_cache",
}
COMMANDS = {  # mode: the module whose `command` runs it; imported only then
  "predict": "fdep_jax.predict",
  "export": "fdep_jax.export",
  "score": "fdep_jax.score",
  "plan": "fdep_jax.plan",
  "report": "fdep_jax.report",
  "sweep": "fdep_jax.tables.sweep",
  "table": "fdep_jax.tables.table",
  "validate": "fdep_jax.data.check",
}


_WORDS: list[str] = []  # of the command line that `parse` reads


@functools.cache
def program_flags():
  """Defines the flags once and returns them, an absl `FlagValues`."""
  from absl import flags
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
    "config",
    help_string="settings of a run: a file, or the name of a shipped one (quickstart)",
    sys_argv=_WORDS,
  )
  flags.DEFINE_string("workdir", None, "folder of the run")
  flags.DEFINE_enum("mode", "train", list(NEEDS), "train evaluates too; see README.md")
  flags.DEFINE_string("method", None, "predict, eval: detector without training, fkrw, mpcm, nipps")
  flags.DEFINE_list("data", None, "eval, validate: folders of datasets, A,B,C")
  flags.DEFINE_string("input", None, "predict: a picture or a folder of pictures")
  flags.DEFINE_string(
    "checkpoint", None, "predict, export, eval: best, last, a step, a path, zoo:NAME"
  )
  flags.DEFINE_string("backbone", None, "the same: network of a published file, --checkpoint FILE")
  flags.DEFINE_string("mean", None, "of that network's images: M, or R,G,B")
  flags.DEFINE_string("std", None, "likewise; above 1, both are grey levels of 0 to 255")
  flags.DEFINE_string("normalisation", None, "a known mean and std: imagenet, none, basicirstd:SET")
  flags.DEFINE_enum("branch", None, ("light", "main"), "predict: default the deployed one")
  flags.DEFINE_float("threshold", 0.5, "predict: of masks and targets")
  flags.DEFINE_string("range", None, "predict, validate: black to white: LOW,HIGH, full or auto")
  flags.DEFINE_list("predictions", None, "score: folder of probability maps; A,B compares two")
  flags.DEFINE_string("masks", None, "score: folder of masks, or of a dataset")
  flags.DEFINE_enum("split", None, ("train", "test", "all"), "score: of a dataset; default test")
  flags.DEFINE_string("out", None, "folder to write; report: a file .html")
  flags.DEFINE_list("runs", None, "report: folders of evaluated runs, A,B,C,D")
  flags.DEFINE_string("task", None, "sweep: i/n, the share of this process, 0/n to n−1/n")
  flags.DEFINE_list("seeds", None, "sweep, table: 0,1,2; default the table's")
  flags.DEFINE_bool("retime", False, "table: time every row anew, at 448×448, in this process")
  flags.DEFINE_string("topology", None, "plan: devices, v5e:4x4, rtx4090:1 or cpu:8")
  flags.DEFINE_bool("thorough", False, "plan: optimise as a run does; takes three times as long")
  return flags.FLAGS


def main(argv):
  """Runs the mode that the parsed flags name."""
  from absl import logging as absl_logging

  from fdep_jax import settings

  del argv
  values = program_flags()
  logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
  # Orbax logs every file it opens, and the traceback of errors that checkpoint.py explains.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("jax").setLevel(logging.WARNING)  # it logs every absent accelerator
  mode = values.mode
  check_given(mode, values)
  _check_places(values)
  if mode == "plan":
    from fdep_jax.runtime import topology

    topology.start(values.topology)  # before jax starts
  if mode in ("predict", "export") or values.retime:
    from fdep_jax.runtime import mesh

    mesh.check_devices()
  if mode in COMMANDS:
    importlib.import_module(COMMANDS[mode]).command(values)
    return
  if mode == "eval" and values.method:
    from fdep_jax import untrained

    untrained.command(values)
    return
  config = values.config or _config(values)
  settings.check(config, trains=mode == "train")
  if config.mode == "classical":
    from fdep_jax import untrained

    _refuse("workdir", values, ("checkpoint", "data", "out"), "The folder is of a method.")
    if mode == "eval" and values.config is not None:
      raise ValueError(
        f"--workdir {values.workdir}: The folder is of a method, which has no settings. Leave "
        f"--config.… out. Other data: --mode eval --method {config.model.backbone} --data A,B "
        "--out DIR."
      )
    untrained.again(mode, values.workdir, config)
    return
  from fdep_jax import evaluate, train
  from fdep_jax.runtime import mesh

  mesh.start(config)
  if mode == "train":
    train.train(config, values.workdir)
  else:
    evaluate.command(values, config)


def _config(values):
  """Returns the config of the run, or of the network of a file, that the flags name."""
  from fdep_jax import detector, settings

  if values.workdir:
    return settings.load(values.workdir)
  return detector.config_of(values.backbone or detector.network_of(values.checkpoint))


def run_score(argv):
  """Runs `--mode score` without absl."""
  from fdep_jax import score

  arguments.check(argv, USES, OF_RUN)
  values = score.parse(argv)
  check_given("score", values)
  score.command(values)


def check_given(mode, values):
  """Raises ValueError if a flag that the mode needs is missing."""
  needs = NEEDS[mode]
  if mode == "eval" and values.method:
    needs = ("data", "out")
    _refuse("method", values, ("workdir", "checkpoint"), "A method needs no trained run.")
  if mode in OF_PUBLISHED:
    needs = _published(mode, values) or needs
  if "workdir" in USES[mode]:
    _check_light(mode, values)
  missing = [f"--{name}" for name in needs if not getattr(values, name)]
  if missing:
    of_file = f" --backbone {values.backbone}" if mode in OF_PUBLISHED and values.backbone else ""
    hint = ""
    if mode == "eval" and not values.backbone and not values.method:
      if not values.checkpoint:
        hint = f" Without a run: --checkpoint {zoo.BEST} --data A,B --out DIR."
      elif not zoo.is_light(values.checkpoint):
        hint = (
          " A published file needs --backbone NAME, --data and --out instead; a trained network of "
          f"this package is named --checkpoint {zoo.BEST}."
        )
    raise ValueError(f"--mode {mode}{of_file} needs {' and '.join(missing)}.{hint}")
  if mode == "plan" and values.out and values.workdir:
    raise ValueError("--out and --workdir both name the folder for plan.json. Give one.")
  if mode == "table" and values.seeds and values.config is None:
    raise ValueError("--seeds chooses runs of a table. Name it (--config), or leave --seeds out.")


def _check_light(mode, values):
  """Raises ValueError if --workdir names a light branch, or --checkpoint does beside --workdir."""
  if zoo.named(values.workdir):
    zoo.place(values.workdir)
    uses = {name: f"--checkpoint {values.workdir}" for name in OF_PUBLISHED}
    uses["train"] = f"--config.train.init_from={values.workdir} --workdir FOLDER"
    way = f" Name it so: {uses[mode]}." if mode in uses else ""
    raise ValueError(f"--workdir {values.workdir}: It is no folder of a run.{way}")
  if mode in OF_PUBLISHED and zoo.is_light(values.checkpoint):
    zoo.place(values.checkpoint)
    if values.workdir:
      raise ValueError(
        f"--checkpoint {values.checkpoint} needs no run: leave --workdir out. Results go to --out."
      )


def _check_places(values):
  """Raises ValueError if results would be written among the data."""
  if values.mode == "train":
    flag, source, folder = "workdir", "--config.data.root", values.config.data.root
  elif values.mode == "predict":
    flag, source, folder = "out", "--input", values.input
  else:
    return
  out = getattr(values, flag)
  places = [os.path.realpath(os.path.expanduser(place)) for place in (folder, out or "")]
  if out and os.path.isdir(places[0]) and places[0] == places[1]:
    raise ValueError(f"--{flag} {out} is the folder of the data, {source}. Name another folder.")


def usage(argv):
  """Returns the flags of the mode that a command line names, or of every mode in a line."""
  mode = arguments.mode_of(argv)
  if mode not in USES:
    lines = [f"  {name:<9}" + " ".join(f"--{use}" for use in USES[name]) for name in USES]
    return "\n".join(
      [
        "Usage: python main.py [--mode MODE] FLAGS. The mode is train if none is given.",
        *lines,
        "Add --mode MODE to --help to read what the flags mean. Settings: --config.NAME=VALUE.",
      ]
    )
  found = program_flags()
  lines = [
    f"  --{name:<14}{found[name].help}" + (" (needed)" if name in NEEDS[mode] else "")
    for name in USES[mode]
  ]
  return "\n".join([f"--mode {mode}:", *lines])


def _published(mode, values):
  """Returns the flags that the mode needs for the network of a file; None if there is none.

  Raises:
    ValueError: flags do not go together.
  """
  if not values.backbone:
    given = [f"--{name}" for name in _FILE if getattr(values, name)]
    if given:
      raise ValueError(
        "A run, a light.safetensors and zoo:NAME know their normalisation. Leave out "
        f"{' and '.join(given)}, or name a published network and its file: --backbone NAME "
        "--checkpoint FILE."
      )
    if mode == "eval" and not values.workdir and zoo.is_light(values.checkpoint):
      return ("checkpoint", *OF_PUBLISHED[mode])
    return None
  _refuse("backbone", values, ("workdir",), "The network is that of a file, not of a run.")
  if mode != "export":
    _refuse("backbone", values, ("method",), "A method without training has no network.")
  if mode == "predict" and values.branch == "main":
    raise ValueError("--branch main: a published network has no main branch. Leave --branch out.")
  return ("checkpoint", *OF_PUBLISHED[mode])


def _refuse(flag, values, names, reason):
  """Raises ValueError if flags are given that do not go with `flag`."""
  given = [f"--{name}" for name in names if getattr(values, name)]
  if given:
    value = getattr(values, flag)
    raise ValueError(f"--{flag} {value}: {reason} Leave out {' and '.join(given)}.")


def parse(argv):
  """Parses the flags; exits with one sentence if a setting does not exist."""
  from fdep_jax import settings

  try:
    arguments.check(argv[1:], USES, OF_RUN)
    _WORDS[:] = argv = _config_of_run(find_config(argv))
    values = program_flags()
    left = values(argv)
    arguments.check_words(left[1:], argv)
    if values.data:  # a comma at the end names no folder
      roots = (root.strip() for root in values.data)
      values.data = [os.path.expanduser(root) for root in roots if root]
    settings.check_flags(values, OF_RUN if values.workdir else OF_FILE)
  except Exception as error:  # also whatever somebody's own config raises
    sys.exit(_fail(settings.explain_flags(argv, error), 2))
  renamed = settings.old_flags(argv)
  if renamed:
    print(renamed, file=sys.stderr)
  return left


def find_config(argv):
  """Returns the arguments with the path of a shipped config in place of its name.

  A file that exists is taken as it is. Otherwise `quickstart` and `configs/quickstart.py` both name
  the config of this package, wherever the program runs.

  Raises:
    ValueError: there is neither a file nor a shipped config of that name.
  """
  argv = list(argv)
  for i, argument in enumerate(argv):
    name, equals, value = argument.partition("=")
    if name not in ("--config", "-config"):
      continue
    if equals:
      argv[i] = f"{name}={_shipped(value)}"
    elif i + 1 < len(argv):
      argv[i + 1] = _shipped(argv[i + 1])
  return argv


def _config_of_run(argv):
  """Returns the arguments with the config whose settings they change without naming it.

  It is --config=of_run.py:RUN, or without --workdir of_file.py:NETWORK or of_file.py:CHECKPOINT.
  """
  words = arguments.given(argv[1:], ["config"])
  if arguments.mode_of(argv[1:]) not in OF_RUN or "config" in words or not words:
    return argv
  values = {flag: arguments.values(argv, flag) for flag in ("backbone", "workdir", "checkpoint")}
  flag = next((flag for flag, found in values.items() if found), None)
  if flag is None:
    return argv
  file = pathlib.Path(__file__).with_name("of_run.py" if flag == "workdir" else "of_file.py")
  return [argv[0], f"--config={file}:{values[flag][-1]}", *argv[1:]]


def _shipped(value):
  import configs

  value = os.path.expanduser(value)  # no shell does it in --config=~/FILE
  path, colon, argument = value.partition(":")
  name = path.removeprefix("configs/").removesuffix(".py")
  folder = pathlib.Path(configs.__path__[0])
  file = folder / f"{name}.py"
  if not path or os.path.isfile(path):
    return value
  if not file.is_file():
    names = sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base"))
    raise ValueError(f"--config {path}: there is no such file. Shipped are {', '.join(names)}.")
  return f"{file}{colon}{argument}"


def run_main(argv, run=main):
  """Runs `run(argv)`. Exit codes: 0 done, 2 bad input, 75 preempted and saved, 1 anything else."""
  try:
    run(argv)
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

  XLA allocates the memory of a step anew at every step, up to gigabytes. On a CPU, mapping it in
  pages of 4 KiB takes a quarter of the time of a step (benchmarks/README.md). glibc reads the
  setting only when a program starts. A GLIBC_TUNABLES that is set, even to nothing, is kept.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _check_installed():
  """Raises ModuleNotFoundError if a package that every mode but score needs is absent."""
  for name in ("absl", "ml_collections", "jax", "flax", "optax", "orbax", "tqdm", "safetensors"):
    if importlib.util.find_spec(name) is None:
      raise ModuleNotFoundError(name=name)


def start():
  """Runs the program: `main.py` and the console script `fdep` call this."""
  if arguments.mode_of(sys.argv[1:]) == "score":
    run_main(sys.argv[1:], run_score)
    return
  try:
    if {"-h", "-help", "--help"} & {*sys.argv[1:]}:
      print(usage(sys.argv[1:]))
      return
    _check_installed()
    from absl import app

    program_flags()
  except ModuleNotFoundError as error:
    sys.exit(
      _fail(
        f"{error.name} is not installed, and only --mode score works without it. The other modes "
        'need the extra [train]: `pip install ".[train]"` in the folder of the source.',
        2,
      )
    )
  use_huge_pages()
  app.run(run_main, flags_parser=parse)
