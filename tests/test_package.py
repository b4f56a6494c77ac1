"""The package as pip installs it: dependencies, data files, version, and the program `fdep`."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

import fdep_jax
from configs import quickstart
from fdep_jax import cli, step

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = ("numpy", "scipy", "pillow")


def pins(name):
  """{package: Requirement} of a requirements file."""
  lines = (ROOT / name).read_text().splitlines()
  parsed = [Requirement(line) for line in lines if line and line[0] not in "#-"]
  return {r.name.lower().replace("_", "-"): r for r in parsed}


@pytest.mark.parametrize(
  "file, extra", [("requirements.txt", "train"), ("requirements-export.txt", "export")]
)
def test_the_tested_versions_are_in_the_declared_ranges(file, extra):
  lines = PROJECT["project"]["dependencies"] if extra == "train" else []
  lines = lines + PROJECT["project"]["optional-dependencies"][extra]
  declared = {r.name.lower().replace("_", "-"): r for r in map(Requirement, lines)}
  declared.pop("fdep-jax", None)  # the extra that this one extends
  tested = pins(file)
  assert declared.keys() == tested.keys()
  for name, requirement in declared.items():
    (pin,) = tested[name].specifier
    assert pin.operator == "==" and requirement.specifier.contains(pin.version), name
    upper = {Version(s.version) for s in requirement.specifier if s.operator == "<"}
    assert upper or name == "pillow", f"{name} has no upper bound"


def test_the_bare_install_is_the_core_requirements():
  names = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
  assert names == set(CORE)


def test_a_shipped_config_is_found_by_name_and_a_file_of_ones_own_comes_first(
  tmp_path, monkeypatch
):
  shipped = str(ROOT / "configs/quickstart.py")
  monkeypatch.chdir(tmp_path)
  for name in ("quickstart", "quickstart.py", "configs/quickstart.py"):
    assert cli.find_config(["fdep", "--config", name]) == ["fdep", "--config", shipped]
    assert cli.find_config(["fdep", f"--config={name}:acm"]) == ["fdep", f"--config={shipped}:acm"]
  table = cli.find_config(["fdep", "--config=tables/table3"])[1]
  assert table == f"--config={ROOT / 'configs/tables/table3.py'}"
  kept = ["fdep", "--config.train.steps=2", "--workdir", "quickstart"]
  assert cli.find_config(kept) == kept
  with pytest.raises(ValueError, match="nowhere.py: there is no such file. Shipped are .*msda"):
    cli.find_config(["fdep", "--config", "nowhere.py"])
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/quickstart.py").write_text("")
  own = ["fdep", "--config", "configs/quickstart.py"]
  assert cli.find_config(own) == own


@pytest.mark.parametrize("steps, warm_up", [(1, 0), (2, 1), (20, 10), (21, 20), (300, 20)])
def test_the_quick_start_may_be_tried_for_fewer_steps_than_its_warm_up(steps, warm_up):
  config = quickstart.get_config()
  schedule = step.make_schedule(config, steps)
  assert float(schedule(warm_up)) == pytest.approx(config.train.learning_rate)
  assert float(schedule(steps)) == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
  """A wheel of the checkout."""
  setuptools = pytest.importorskip("setuptools")
  if Version(setuptools.__version__) < Version("77"):
    pytest.skip("needs setuptools 77 or later (pip install -r requirements-dev.txt)")
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  for name in ("configs", "converters", "fdep_jax"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  command = [
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
  ]
  subprocess.run([*command, "-w", folder, source], check=True, capture_output=True, timeout=300)
  (path,) = folder.glob("*.whl")
  return path


def environment(folder, wheel, packages):
  """An environment with links to these installed packages, and the wheel; returns its folder."""
  venv.create(folder, symlinks=True, with_pip=False)
  (site,) = folder.glob("lib/python*/site-packages")
  for name in packages:
    start = f"{name.replace('-', '_')}-"
    (info,) = (p for p in _installed().glob("*.dist-info") if p.name.lower().startswith(start))
    record = (info / "RECORD").read_text()
    paths = [line.partition(",")[0] for line in record.splitlines()]
    for top in {path.partition("/")[0] for path in paths if not path.startswith(".")}:
      if (_installed() / top).exists() and not (site / top).exists():
        (site / top).symlink_to(_installed() / top)
  if wheel is None:
    return folder
  subprocess.run(
    [
      sys.executable,
      "-m",
      "pip",
      "--python",
      folder / "bin/python",
      "install",
      "--no-index",
      wheel,
    ],
    check=True,  # pip refuses a wheel whose dependencies are not there
    capture_output=True,
    timeout=300,
  )
  return folder


def with_what_they_need(names):
  """The packages that pip installs for these, themselves included, as they declare it."""
  found, waiting = set(), [Requirement(name) for name in names]
  while waiting:
    wanted = waiting.pop()
    name = re.sub(r"[-_.]+", "-", wanted.name).lower()
    if (name, *sorted(wanted.extras)) in found:
      continue
    found.add((name, *sorted(wanted.extras)))
    for line in importlib.metadata.requires(name) or ():
      need = Requirement(line)
      extras = (*wanted.extras, "")
      if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
        waiting.append(need)
  return sorted({name for name, *_ in found})


def _installed():
  return pathlib.Path(np.__file__).parents[1]


def run(folder, *arguments, cwd):
  """Runs a program of an environment, without the checkout and what this process has set."""
  unset = ("PYTHONPATH", "FDEP_DINO", "XLA_FLAGS")
  return subprocess.run(
    [folder / "bin" / arguments[0], *map(str, arguments[1:])],
    cwd=cwd,
    env={k: v for k, v in os.environ.items() if k not in unset},
    capture_output=True,
    text=True,
    timeout=500,
  )


@pytest.fixture(scope="session")
def bare(wheel, tmp_path_factory):
  return environment(tmp_path_factory.mktemp("bare") / "env", wheel, CORE)


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(wheel):
  held = set(zipfile.ZipFile(wheel).namelist())
  for folder in ("configs", "converters", "fdep_jax"):
    for path in (ROOT / folder).rglob("*"):
      if path.is_file() and "__pycache__" not in path.parts:
        assert path.relative_to(ROOT).as_posix() in held
  assert not {name.split("/")[0] for name in held} & {"tests", "benchmarks", "docs", "results"}
  assert wheel.name.split("-")[1] == fdep_jax.__version__


@pytest.mark.slow
def test_the_bare_install_scores_maps_within_a_second_of_starting(bare, tmp_path):
  for name in ("maps", "masks"):
    (tmp_path / name).mkdir()
  mask = np.zeros((30, 40), bool)
  mask[5:8, 10:13] = True
  Image.fromarray(np.uint8(255 * mask)).save(tmp_path / "masks/a.png")
  noise = np.random.default_rng(0).random(mask.shape)
  np.save(tmp_path / "maps/a.npy", np.float32(0.9 * mask + 0.1 * noise))
  flags = ("--predictions", "maps", "--masks", "masks", "--out", "out")
  before = os.times()
  done = run(bare, "fdep", "--mode", "score", *flags, cwd=tmp_path)
  after = os.times()
  assert done.returncode == 0, done.stderr
  # CPU time, since other programs may run at the same time.
  seconds = after.children_user + after.children_system
  assert seconds - before.children_user - before.children_system < 1
  assert "HSE" in done.stdout and "matplotlib is not installed" in done.stdout
  assert {p.name for p in (tmp_path / "out").iterdir()} == {
    "metrics.json", "curves.npz", "images.csv",
  }  # fmt: skip
  code = (
    "import fdep_jax.metrics, sys, importlib.util as u; print([n for n in %r if u.find_spec(n)])"
  )
  heavy = ["jax", "flax", "absl", "ml_collections", "matplotlib", "torch"]
  done = run(bare, "python", "-c", code % heavy, cwd=tmp_path)
  assert done.stdout.split("\n")[0] == "[]", done.stderr


@pytest.mark.parametrize("absent", ["absl", "flax", "orbax"])
def test_each_absent_package_of_the_extra_is_named(absent, tmp_path):
  # As importlib sees a package that is not there.
  code = (
    "import importlib.util as u, sys; find = u.find_spec; "
    f"u.find_spec = lambda name, *a: None if name == {absent!r} else find(name, *a); "
    f"sys.modules[{absent!r}] = None; from fdep_jax import cli; cli.start()"
  )
  flags = ("--config", "quickstart", "--workdir", tmp_path / "run")
  done = run(pathlib.Path(sys.executable).parent.parent, "python", "-c", code, *flags, cwd=ROOT)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert done.stderr.startswith(f"{absent} is not installed, and only --mode score works without")


@pytest.mark.slow
def test_the_bare_install_names_the_extra_that_the_other_modes_need(bare, tmp_path):
  done = run(bare, "fdep", "--config", "quickstart", "--workdir", "run", cwd=tmp_path)
  assert done.returncode == 2 and "the extra [train]" in done.stderr
  assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_installed_package_trains_outside_the_checkout(wheel, tmp_path):
  folder = environment(tmp_path / "env", wheel, CORE)
  (site,) = folder.glob("lib/python*/site-packages")
  # The rest of [train] is taken from the environment of this test; the package itself is not there.
  (site / "train.pth").write_text(f"{_installed()}\n")
  (tmp_path / "elsewhere").mkdir()
  flags = ("--config", "configs/quickstart.py", "--workdir", "run", "--config.train.steps=2")
  done = run(folder, "fdep", *flags, cwd=tmp_path / "elsewhere")
  assert done.returncode == 0, done.stderr
  assert {"metrics.json", "report.html"} <= {p.name for p in (tmp_path / "elsewhere/run").iterdir()}
  where = run(folder, "python", "-c", "import fdep_jax; print(fdep_jax.__file__)", cwd=tmp_path)
  assert where.stdout.startswith(str(folder))
  found = run(folder, "fdep", "--config", "quikstart", "--workdir", "x", cwd=tmp_path / "elsewhere")
  assert found.returncode == 2 and re.search("quikstart", found.stderr)
  assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_export_works_with_the_packages_of_the_quick_start_alone(tmp_path):
  packages = with_what_they_need(map(str, pins("requirements.txt").values()))
  assert "jaxlib" in packages and "onnx" not in packages
  folder = environment(tmp_path / "env", None, packages)
  small = {"train.steps": 2, "data.synthetic_train": 12, "data.synthetic_test": 3}
  small |= {"data.synthetic_size": 64, "data.crop": 32, "log.compile_cache": ""}
  flags = ["--config", "quickstart", *(f"--config.{k}={v}" for k, v in small.items())]
  run_folder = tmp_path / "run"
  for words in (flags, ["--mode", "export"]):
    done = run(folder, "python", "main.py", *words, "--workdir", run_folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
  (line,) = [line for line in done.stderr.splitlines() if "is not written" in line]
  assert line.startswith("light.onnx") and "pip install -r requirements-export.txt" in line
  manifest = json.loads((run_folder / "export/manifest.json").read_text())
  assert [name for name, facts in manifest["files"].items() if not facts] == ["light.onnx"]
  assert {path.name for path in (run_folder / "export").iterdir()} == {
    "light.safetensors", "light.stablehlo", "light_torch.safetensors", "manifest.json",
  }  # fmt: skip
