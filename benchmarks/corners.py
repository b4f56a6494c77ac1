"""Computes HSE-T of saved maps by the readings that the paper leaves open.

  python main.py --mode eval --workdir RUN --data data/NUAA-SIRST --out DIR \\
      --config.eval.save_probs=True
  python -m benchmarks.corners "ours=DIR/NUAA-SIRST/probs/light:data/NUAA-SIRST" ...

Each argument is NAME=MAPS:DATASET; MAPS has a file for every test image. Prints the table of
docs/metric.md, "Corners of HSE-T".
"""

import argparse
import pathlib

import numpy as np

from fdep_jax import data, score
from fdep_jax.metrics import hse

OURS = "ours: 0.05 … 0.95, first precision at recall 0, trapezoid"


def area(hits, predicted, targets, start="first", rule="trapezoid", ties="higher"):
  """Integrates the target-level points.

  Args:
    hits, predicted: counts at the thresholds.
    targets: number of true targets.
    start: at recall 0, "first" for the first point's precision, "one" for 1, "none" for no point.
    rule: "trapezoid" or "step".
    ties: of points with equal recall, whether the "higher" or the "lower" precision comes first.

  Returns:
    HSE-T in percent.
  """
  precision = np.where(predicted > 0, hits / np.maximum(predicted, 1), 1.0)
  order = np.lexsort((-precision if ties == "higher" else precision, hits))
  recall, precision = hits[order] / targets, precision[order]
  if start != "none":
    recall = np.append(0, recall)
    precision = np.append(1.0 if start == "one" else precision[0], precision)
  height = precision[1:] if rule == "step" else (precision[1:] + precision[:-1]) / 2
  return 100 * float(np.diff(recall) @ height)


def readings(accumulators):
  """Computes {reading: HSE-T in percent} from {step of the thresholds: accumulator}."""
  found = {}
  for step, total in accumulators.items():
    result = total.result()
    hits = result.curves["threshold_hits"]
    predicted = result.curves["threshold_predicted"]
    targets = result.targets
    if step != 0.05:
      found[f"thresholds by {step:g}"] = area(hits, predicted, targets)
      continue
    found[OURS] = area(hits, predicted, targets)
    found["precision 1 at recall 0"] = area(hits, predicted, targets, start="one")
    found["no point at recall 0"] = area(hits, predicted, targets, start="none")
    found["steps"] = area(hits, predicted, targets, rule="step")
    found["lower precision first at equal recall"] = area(hits, predicted, targets, ties="lower")
    kept = ~hse.merging(hits)
    found["without thresholds that merge targets"] = area(hits[kept], predicted[kept], targets)
    found["merging thresholds, number"] = float((~kept).sum())
  return found


def measure(argument):
  """Computes the readings of one NAME=MAPS:DATASET."""
  maps, _, root = argument.partition("=")[2].partition(":")
  paths = [path for path in pathlib.Path(maps).iterdir() if path.suffix in (".npy", ".png")]
  saved = [path for path in paths if path.stem.endswith("_prob")] or paths
  files = {path.stem.removesuffix("_prob"): path for path in saved}
  steps = {0.01: 99, 0.05: 19, 0.1: 9}
  totals = {
    step: hse.Accumulator(thresholds=(np.arange(1, n + 1) * step).astype(np.float32))
    for step, n in steps.items()
  }
  for sample in data.load(root, "test"):
    prob = score.read_prob(files[sample.name.replace("/", "_")])
    for total in totals.values():
      total.update(prob, sample.mask)
  return readings(totals)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("maps", nargs="+", help="NAME=MAPS:DATASET")
  columns = {given.partition("=")[0]: measure(given) for given in parser.parse_args().maps}
  print("| reading | " + " | ".join(columns) + " |")
  print("| --- |" + " ---: |" * len(columns))
  for name in next(iter(columns.values())):
    cells = [f"{c[name]:.0f}" if "number" in name else f"{c[name]:.2f}" for c in columns.values()]
    print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
