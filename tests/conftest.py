"""Fixtures: CPU only, ranks never broadcast silently, real data where the folder of evidence is."""

import importlib
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from goldens import SHARED

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
  """A program that several tests run is compiled once, whichever worker runs them."""
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Frees compiled programs, which otherwise fill gigabytes of each worker by the last file."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """Real datasets, weights and golden outputs: $FDEP_SHARED, else ../shared."""
  if not (SHARED / "golden").is_dir():
    pytest.skip("needs the folder of real data and weights ($FDEP_SHARED or ../shared)")
  return SHARED


@pytest.fixture
def toy():
  """The module of a tiny detector, known to `backbones` as a dropped-in file is."""
  import helpers

  with helpers.toy_backbone() as module:
    yield module


@pytest.fixture
def drop_in(tmp_path, monkeypatch):
  """Puts one file into the folder of backbones, for one test."""
  from fdep_jax import backbones

  def drop(name: str, source: str):
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(tmp_path)])
    importlib.invalidate_caches()

  yield drop
  for file in tmp_path.glob("*.py"):
    sys.modules.pop(f"{backbones.__name__}.{file.stem}", None)
    vars(backbones).pop(file.stem, None)


@pytest.fixture
def parse(capsys):
  """Parses words as `main.py` does; returns the flags, or the message of the refusal."""

  from absl import flags

  from fdep_jax import cli

  def parsed(*words):
    values = cli.program_flags()
    for name in [name for name in values if name.startswith("config.")]:
      delattr(values, name)
    values.unparse_flags()
    for name in {name for names in cli.USES.values() for name in names} | {"mode"}:
      values[name].unparse()
    try:
      cli.parse(["main.py", *words])
    except SystemExit as end:
      assert end.code == 2
      return capsys.readouterr().err.strip()
    return values

  yield parsed
  parsed("--mode=export")
  flags.FLAGS.unparse_flags()
