"""Checks the project on a GPU: parity, train steps, the jitted counts, and the benchmarks.

  make gpu                                            # without a GPU it says so, and ends with 0
  python tests/gpu.py --platform cpu --networks acm   # tries the check itself on a CPU

Ends with a table: what was checked, the tolerance, what was measured, and whether that is ok. The
exit code is 1 if a row is not. `--networks` takes some of the networks, `--rounds` is that of the
benchmarks, `--parts` leaves some out. Everything runs on one GPU.
"""

import argparse
import contextlib
import importlib.metadata
import math
import os
import pathlib
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import helpers  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from fdep_jax import backbones, data  # noqa: E402
from fdep_jax import step as step_lib  # noqa: E402
from fdep_jax.metrics import hse, jitted, per_image  # noqa: E402

PARTS = ("parity", "train", "counts", "benchmarks")
# Relative error in bfloat16, in evaluation. Measured on a CPU: 0.021 (acm), 0.018 (rpcanet), 0.014
# (alcnet), 0.012 (msda), 0.011 (alcl, mtu), 0.010 (mlcl); the others were not measured.
BFLOAT16 = 0.05


class Row(NamedTuple):
  """A line of the table."""

  what: str
  tolerance: float
  measured: float

  @property
  def ok(self) -> bool:
    return self.measured <= self.tolerance  # NaN is not


def table(rows: list[Row]) -> str:
  """Formats the rows as Markdown."""
  lines = ["| what | tolerance | measured | ok |", "| --- | ---: | ---: | --- |"]
  for row in rows:
    answer = "yes" if row.ok else "no"
    lines.append(f"| {row.what} | {row.tolerance:.2g} | {row.measured:.2g} | {answer} |")
  return "\n".join(lines)


def missing(platform: str) -> str | None:
  """Says in one sentence what was found if there is no such device; None if there is one."""
  try:
    jax.devices(platform)
    return None
  except RuntimeError:
    found = "nothing"
  with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may name what is not there
    found = "only " + ", ".join(sorted({device.platform for device in jax.devices()}))
  smi = "nvidia-smi is there" if shutil.which("nvidia-smi") else "there is no nvidia-smi"
  version = importlib.metadata.version("jax")
  return (
    f"Skipped: jax {version} found {found} and {smi}; this check needs an NVIDIA GPU with its "
    f'driver, and `.venv/bin/pip install "jax[cuda13]=={version}"`.'
  )


def measured(rows: dict[str, float], measure: Callable[[], Sequence[float]]) -> list[Row]:
  """Makes the rows {what: tolerance} of one measurement; all are NaN if it fails."""
  print(f"{next(iter(rows))} …", file=sys.stderr, flush=True)
  try:
    values = measure()
  except Exception:
    traceback.print_exc()
    values = [math.nan] * len(rows)
  jax.clear_caches()
  return [Row(*row, float(value)) for row, value in zip(rows.items(), values, strict=True)]


def parity(name: str) -> list[Row]:
  """Compares a network with the published one's outputs: the largest relative errors.

  In float32 the bounds are those of `test_networks.py`, and products must not be TF32's. In
  bfloat16 only evaluation is compared: in training, these small maps amplify rounding too much.
  """

  def worst(dtype, *kinds):
    errors = helpers.network_errors(name, dtype, "train" in kinds)
    return [max(e for key, e in errors.items() if key.startswith(kind)) for kind in kinds]

  kinds = ("eval", "train")
  bounds = {f"{name}, float32, {k}": helpers.PARITY.get((name, k), 1e-4) for k in kinds}
  with jax.default_matmul_precision("highest"):
    rows = measured(bounds, lambda: worst(jnp.float32, *kinds))
  bounds = {f"{name}, bfloat16, eval": BFLOAT16}
  return rows + measured(bounds, lambda: worst(jnp.bfloat16, "eval"))


def train_step(name: str, device: jax.Device) -> list[Row]:
  """Compares loss and gradient of a step with those of the CPU; the step must count as finite."""
  changes = {"model.backbone": name}
  if not backbones.network_class(name).top_channels:
    changes |= {"mode": "original"}
  config = helpers.toy_config(**changes)
  rows = {f"{name}, train step, loss": 1e-3, f"{name}, train step, gradient norm": 2e-2}
  rows[f"{name}, train step, skipped"] = 0

  def take(parts, device):
    prior, model, optimizer, state = parts
    step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
    state, prior = jax.device_put((state, prior), device, may_alias=False)  # the step donates
    state, metrics = step(state, prior, jax.device_put(helpers.batch(crop=64), device))
    return float(metrics["loss"]), float(metrics["grad_norm"]), int(state["skipped"]["count"])

  def measure():
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):  # equal initial values: GPUs round other bits
      parts = helpers.parts(config)
    ours, theirs = take(parts, device), take(parts, cpu)
    errors = [abs(a - b) / abs(b) for a, b in zip(ours[:2], theirs[:2], strict=True)]
    return [*errors, ours[2]]

  with jax.default_matmul_precision("highest"):
    return measured(rows, measure)


def counts() -> list[Row]:
  """Evaluates maps by the jitted counts and by numpy: how many images have other counts."""
  samples, maps = helpers.samples_and_maps(20)
  maps = [np.where(prob < 0.4, 0, prob) for prob in maps]  # or noise exceeds the device's slots
  rows = {"images whose jitted counts are not numpy's": 0, "images that numpy had to count": 10}

  def measure():
    plain = hse.Accumulator()
    heights, widths = zip(*data.sizes(samples), strict=True)
    canvas = data.padded_size((max(heights), max(widths)), 32)
    counter = jitted.Counter(hse.Accumulator(), canvas)
    for prob, sample in zip(maps, samples, strict=True):
      plain.update(prob, sample.mask)
      counter.update(prob, sample.mask)
    counter.flush()
    different = sum(
      not same(counter.total.select([i]), plain.select([i])) for i in range(len(samples))
    )
    return [different, counter.slower]

  return measured(rows, measure)


def same(ours: hse.Accumulator, theirs: hse.Accumulator) -> bool:
  ours, theirs = per_image.of(ours), per_image.of(theirs)
  leaves = [jax.tree.leaves((vars(x.counts), x.positives, x.reached)) for x in (ours, theirs)]
  return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def benchmark(script: str, *words: str) -> Row:
  """Runs a benchmark, which prints a table of its own."""
  command = [sys.executable, f"benchmarks/{script}.py", *words]
  # Theirs is the usual share of the memory; this process takes what it needs.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_PREALLOCATE"}
  done = subprocess.run(command, cwd=ROOT, env=environment)
  return Row(f"benchmarks/{script}.py, exit code", 0, done.returncode)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--platform", default="gpu", choices=("gpu", "cpu"))
  parser.add_argument("--networks", help="comma-separated; default: all")
  parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
  parser.add_argument("--rounds", type=int, help="of the benchmarks; default: their own")
  flags = parser.parse_args()
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if sentence := missing(flags.platform):
    print(sentence)
    return
  device = jax.devices(flags.platform)[0]
  names = flags.networks.split(",") if flags.networks else backbones.names()
  rows = []
  for name in names:
    rows += parity(name) if "parity" in flags.parts else []
    rows += train_step(name, device) if "train" in flags.parts else []
  rows += counts() if "counts" in flags.parts else []
  if "benchmarks" in flags.parts:
    words = ["--platform", flags.platform]
    words += ["--rounds", str(flags.rounds)] if flags.rounds else []
    words += ["--networks", flags.networks] if flags.networks else []
    rows += [benchmark(script, *words) for script in ("networks", "step", "deploy")]
  print(f"\njax {jax.__version__} on {device.device_kind}:\n\n{table(rows)}")
  if not all(row.ok for row in rows):
    raise SystemExit(1)


if __name__ == "__main__":
  main()
