"""Holds readings of Algorithm 1 against the rows of FKRW, which need no training (Tables S3, S4).

  python -m benchmarks.reading data/NUAA-SIRST data/NUDT-SIRST data/IRSTD-1K

FKRW is computed as its authors' program does it. Readings of HSE-T are searched on NUAA-SIRST and
NUDT-SIRST; those near the paper on both are then tried on IRSTD-1K and on all three together
(SIRST3). Writes results/classical/reading.json and the tables of docs/metric.md.
"""

import argparse
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from configs import tables
from fdep_jax import classical, data
from fdep_jax.metrics import columns, components, hse
from fdep_jax.runtime import files

ROOT = pathlib.Path(__file__).parent.parent
PAGE, RESULT = ROOT / "docs/metric.md", ROOT / "results/classical/reading.json"
METHOD = "fkrw:published"
SEARCH, CONFIRM = ("NUAA-SIRST", "NUDT-SIRST"), ("IRSTD-1K", "SIRST3")
SETS = SEARCH + CONFIRM
EXACT = 0.02  # percent: a reading is adopted if no set differs by more
NEAR = 0.1  # percent: readings this near on both searched sets are tried on the others
SHOWN = 8
TOP = 255  # maps are multiples of 1/255; level k is: value ≥ k

# ---------------------------------------------------------------- what an author may have written

CONNECTIVITY = (8, 4)
DISTANCES = {"< 3": 3.0, "≤ 3": np.nextafter(3.0, 4), "< 4": 4.0, "< 5": 5.0}
SIZES = (1, 2, 3)  # least pixels of a prediction
MATCHING = ("by target", "by component")
AVERAGES = {  # (precision, recall): pooled over the set, or a mean over images
  "pooled": ("pooled", "pooled"),
  "precision by image, none is 0": ("zero", "pooled"),
  "precision by image, none is 1": ("one", "pooled"),
  "precision by image, none is left out": ("nan", "pooled"),
  "both by image, none is 0": ("zero", "image"),
  "both by image, none is 1": ("one", "image"),
  "both by image, none is left out": ("nan", "image"),
}


def grids():
  """{name: thresholds} in [0, 1]."""
  out = {}
  ends = itertools.product((0, 0.05, 0.1, 0.2, 0.3, 0.5), (0.8, 0.9, 0.95, 0.99, 1))
  for (low, high), step in itertools.product(list(ends), (0.01, 0.05, 0.1)):
    values = np.arange(round(low / step), round(high / step) + 1e-9) * step
    if np.isclose(values[-1], high) and np.isclose(values[0], low):
      out[f"{low:g} … {high:g} by {step:g}"] = values
  for number in (10, 11, 20, 21, 50, 51, 100, 101, 200, 255, 256):
    out[f"{number} from 0 to 1"] = np.linspace(0, 1, number)
  return out


def _levels(thresholds, inclusive):
  """Levels that pass each threshold; those that nothing passes are left out."""
  scaled = thresholds * TOP
  level = np.ceil(scaled - 1e-9) if inclusive else np.floor(scaled + 1e-9) + 1
  return level[level <= TOP].astype(int)


def _step(recall, precision):
  return np.diff(recall, prepend=0) @ precision


def _trapezoid(start):
  def area(recall, precision):
    first = precision[0] if start is None else start
    return np.trapezoid(np.append(first, precision), np.append(0, recall))

  return area


def _closed(area):
  """With a last point at recall 1 and precision 0."""
  return lambda recall, precision: area(np.append(recall, 1), np.append(precision, 0))


def _interpolated(number):
  def area(recall, precision):
    highest = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return highest[np.searchsorted(recall, np.linspace(0, 1, number))].mean()

  return area


AREAS = {  # of points sorted by recall, then by falling precision
  "step": _step,
  "trapezoid, first precision at recall 0": _trapezoid(None),
  "trapezoid from (0, 1)": _trapezoid(1.0),
  "trapezoid from (0, 0)": _trapezoid(0.0),
  "trapezoid, first precision at recall 0, to (1, 0)": _closed(_trapezoid(None)),
  "trapezoid from (0, 1) to (1, 0)": _closed(_trapezoid(1.0)),
  "trapezoid without a start": lambda recall, precision: np.trapezoid(precision, recall),
  "interpolated at 11 recalls": _interpolated(11),
  "interpolated at 101 recalls": _interpolated(101),
  "mean of precision · recall": lambda recall, precision: (precision * recall).mean(),
  "mean precision · mean recall": lambda recall, precision: precision.mean() * recall.mean(),
  "mean F1": lambda recall, precision: (
    2 * precision * recall / np.maximum(precision + recall, 1e-12)
  ).mean(),
}


class Reading(NamedTuple):
  """One reading of HSE-T."""

  neighbours: int
  distance: str
  least_size: int
  matching: str
  average: str
  thresholds: str
  inclusive: bool
  area: str

  def __str__(self):
    sign = "≥" if self.inclusive else ">"
    return (
      f"{self.neighbours} neighbours, {self.distance} pixels, at least {self.least_size}, matched "
      f"{self.matching}, {self.average}, prob {sign} {self.thresholds}, {self.area}"
    )


OURS = Reading(
  8, "< 3", 1, "by target", "pooled", "0.05 … 0.95 by 0.05", False,
  "trapezoid, first precision at recall 0",
)  # fmt: skip


# ----------------------------------------------------------------------------------- the counting


def count(pairs, neighbours):
  """Counts of one set by (distance, least size, matching).

  Returns:
    {key: (true positives of precision, predictions, found targets)}, each images × levels 0 … 255,
    and the targets of each image.
  """
  number, sizes = len(pairs), [mask.shape for _, mask in pairs]
  indices = [np.flatnonzero(prob) for prob, _ in pairs]
  values = [
    np.rint(p.ravel()[i] * TOP).astype(np.int16) for (p, _), i in zip(pairs, indices, strict=True)
  ]
  true = [np.flatnonzero(mask) for _, mask in pairs]
  ones = [np.ones(len(i), np.int16) for i in true]
  targets = components.find(true, ones, sizes, 1, neighbours)[0]
  out = {
    (distance, size, how): np.zeros((3, number, TOP + 1))
    for distance, size, how in itertools.product(DISTANCES, SIZES, MATCHING)
  }
  per_image = lambda image: np.bincount(image, minlength=number)  # noqa: E731
  widest = max(DISTANCES.values())
  for level, found in enumerate(components.find(indices, values, sizes, TOP, neighbours), 1):
    target, component, distance = components.near(targets, found, widest)
    for size in SIZES:
      predicted = per_image(found.image[found.area >= size])
      for name, pixels in DISTANCES.items():
        keep = (distance < pixels) & (found.area[component] >= size)
        pairs_of = target[keep], component[keep]
        once, near_target, near_component = _first(*pairs_of), *map(np.unique, pairs_of)
        hits = per_image(targets.image[once])
        by_component = per_image(found.image[near_component])
        out[name, size, "by target"][:, :, level] = hits, predicted, hits
        found_targets = per_image(targets.image[near_target])
        out[name, size, "by component"][:, :, level] = by_component, predicted, found_targets
  for counts in out.values():
    counts[1, :, 0] = 1  # at prob ≥ 0 the whole image is one prediction, far from any target
  return out, per_image(targets.image)


def _first(target, component):
  """Targets that claim a component, each the first free one, as `components.match` does."""
  claimed, taken = [], set()
  last = -1
  for t, c in zip(target.tolist(), component.tolist(), strict=True):
    if t != last and c not in taken:
      claimed.append(t)
      taken.add(c)
      last = t
  return np.array(claimed, int)


def averages(counts, targets):
  """{average: (recall, precision)} at every level."""
  true, predicted, found = counts
  precision = {"pooled": true.sum(0) / np.maximum(predicted.sum(0), 1)}
  each = true / np.maximum(predicted, 1)
  some = predicted > 0
  precision["zero"] = each.mean(0)
  precision["one"] = np.where(some, each, 1).mean(0)
  precision["nan"] = np.where(some, each, 0).sum(0) / np.maximum(some.sum(0), 1)
  holds = targets > 0
  recall = {
    "pooled": found.sum(0) / targets.sum(),
    "image": (found[holds] / targets[holds, None]).mean(0),
  }
  return {name: (recall[r], precision[p]) for name, (p, r) in AVERAGES.items()}


def area(curve, levels, name):
  """The area of one curve, percent."""
  recall, precision = (values[levels] for values in curve)
  order = np.lexsort((-precision, recall))
  return 100 * float(AREAS[name](recall[order], precision[order]))


def curves_of(sets):
  """{set: {(neighbours, distance, least size, matching): averages}} of the sets and of SIRST3."""
  out = {name: {} for name in SETS}
  for neighbours in CONNECTIVITY:
    parts = {name: count(pairs, neighbours) for name, pairs in sets.items()}
    for key in itertools.product(DISTANCES, SIZES, MATCHING):
      for name, (counts, targets) in parts.items():
        out[name][neighbours, *key] = averages(counts[key], targets)
      joined = np.concatenate([counts[key] for counts, _ in parts.values()], axis=1)
      targets = np.concatenate([targets for _, targets in parts.values()])
      out["SIRST3"][neighbours, *key] = averages(joined, targets)
  return out


def search(curves, paper):
  """How many readings there are, and those within NEAR on the searched sets, nearest first."""
  number, near = 0, []
  passing = {
    (name, inclusive): _levels(values, inclusive)
    for name, values in grids().items()
    for inclusive in (False, True)
  }
  for key in curves[SEARCH[0]]:
    for average, (grid, levels), name in itertools.product(AVERAGES, passing.items(), AREAS):
      number += 1
      worst = 0.0
      for place in SEARCH:
        worst = max(worst, abs(area(curves[place][key][average], levels, name) - paper[place]))
        if worst > NEAR:
          break
      else:
        near.append((worst, Reading(*key, average, *grid, name)))
  return number, [reading for _, reading in sorted(near)]


def value(curves, reading, place):
  """HSE-T of a set by one reading, percent."""
  key = reading[:4]
  levels = _levels(grids()[reading.thresholds], reading.inclusive)
  return area(curves[place][key][reading.average], levels, reading.area)


# --------------------------------------------------------------------- the other columns, the page

STORED = {  # how the map may have been stored before it was scored
  "8 bits, rounded (ours)": lambda values: np.rint(values * 255) / 255,
  "8 bits, cut": lambda values: np.floor(values * 255) / 255,
  "floats": lambda values: values,
}


def paper_numbers():
  """{set: FKRW's row} in the paper's units."""
  row = next(r for r in tables.paper("tableS4") if r["method"] == "FKRW")
  union = next(r for r in tables.paper("tableS3") if r["method"] == "FKRW")
  return {**{name: row[name] for name in tables.DATASETS}, "SIRST3": tables.numbers(union)}


def scored(sets):
  """{stored: {set: {column: value}}} by `hse.score`."""
  out = {}
  for name, change in STORED.items():
    totals = {}
    for place, pairs in sets.items():
      totals[place] = hse.Accumulator()
      for prob, mask in pairs:
        totals[place].update(np.float32(change(prob)), mask)
    totals["SIRST3"] = hse.Accumulator()
    for place in sets:
      totals["SIRST3"].merge(totals[place])
    out[name] = {place: _columns(total.result()) for place, total in totals.items()}
    by_area = hse.Accumulator(false_alarm="area")
    by_area.update_counts(
      totals["SIRST3"].counts(), totals["SIRST3"].positives, totals["SIRST3"].negatives
    )
    out[name]["SIRST3"]["fa_by_area"] = 1e6 * by_area.result().fa
  return out


def _columns(score):
  return {name: getattr(score, c.key) * c.factor for name, c in columns.METRICS.items()}


def evaluate(sets):
  """All that the page shows, from {set: [(map, mask)]} with maps of floats in [0, 1]."""
  paper = paper_numbers()
  rounded = {
    name: [(STORED["8 bits, rounded (ours)"](prob), mask) for prob, mask in pairs]
    for name, pairs in sets.items()
  }
  curves, targets = curves_of(rounded), {name: paper[name]["hse_t"] for name in SETS}
  number, near = search(curves, targets)
  off = {r: max(abs(value(curves, r, p) - targets[p]) for p in SETS) for r in near}
  exact = [r for r in near if off[r] <= EXACT]
  best = min(off, key=off.get, default=None)
  shown = [OURS, *near[:SHOWN], *([best] if off else [])]
  return {
    "method": METHOD,
    "paper": paper,
    "scored": scored(sets),
    "readings": number,
    "near_on_searched_sets": len(near),
    "exact_on_all_sets": [str(r) for r in exact],
    "least_worst_on_all_sets": off.get(best),
    "hse_t": [{"reading": str(r), **{p: value(curves, r, p) for p in SETS}} for r in shown],
  }


def page(result):
  """{marker: Markdown} of docs/metric.md."""
  paper, scored_ = result["paper"], result["scored"]
  lines = ["| set | map | " + " | ".join(c.heading for c in columns.METRICS.values()) + " |"]
  lines.append("| --- " * (2 + len(columns.METRICS)) + "|")
  for place in SETS:
    rows = {"paper": paper[place], **{name: found[place] for name, found in scored_.items()}}
    for name, row in rows.items():
      cells = [f"{row[c]:.2f}" if row.get(c) is not None else "" for c in columns.METRICS]
      lines.append(f"| {place} | {name} | " + " | ".join(cells) + " |")
  hse_t = ["| reading of HSE-T | " + " | ".join(SETS) + " |", "| --- " * (1 + len(SETS)) + "|"]
  hse_t.append("| paper | " + " | ".join(f"{paper[p]['hse_t']:.2f}" for p in SETS) + " |")
  for i, row in enumerate(result["hse_t"]):
    cells = [f"{row[p]:.2f} ({row[p] - paper[p]['hse_t']:+.2f})" for p in SETS]
    last = i > 0 and i == len(result["hse_t"]) - 1
    title = "ours: " if i == 0 else "best on all four: " if last else ""
    hse_t.append(f"| {title}{row['reading']} | " + " | ".join(cells) + " |")
  exact = len(result["exact_on_all_sets"])
  found = (
    f"{result['readings']:,} readings of HSE-T were computed on NUAA-SIRST and NUDT-SIRST. "
    f"{result['near_on_searched_sets']} of them are within {NEAR} of the paper on both. "
    f"{exact or 'None'} of these {'is' if exact < 2 else 'are'} within {EXACT} on all four sets."
  )
  if result["least_worst_on_all_sets"] is not None:
    found += (
      " Below are ours, those nearest on the two searched sets, and the one of them that is best "
      f"on all four, where it is within {result['least_worst_on_all_sets']:.2f}."
    )
  return {"scored": "\n".join(lines), "found": found, "hse_t": "\n".join(hse_t)}


def fill(text, parts):
  """Replaces what is between `<!-- NAME -->` and `<!-- end -->`."""
  for name, content in parts.items():
    before, rest = text.split(f"<!-- {name} -->\n", 1)
    after = rest.split("<!-- end -->", 1)[1]
    text = f"{before}<!-- {name} -->\n{content}\n<!-- end -->{after}"
  return text


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("data", nargs=3, help="folders of NUAA-SIRST, NUDT-SIRST, IRSTD-1K")
  parser.add_argument("--maps", help="folder that keeps the maps as floats")
  options = parser.parse_args()
  sets = {}
  for name, root in zip(tables.DATASETS, options.data, strict=True):
    samples = data.load(root, "test")
    sets[name] = [
      (prob, sample.mask)
      for prob, sample in zip(_maps(name, samples, options.maps), samples, strict=True)
    ]
  result = evaluate(sets)
  RESULT.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(RESULT, result)
  parts = page(result)
  files.write(PAGE, fill(PAGE.read_text(), parts))
  print(*parts.values(), sep="\n\n")


def _maps(name, samples, folder):
  """Maps of a set as floats, in order; kept in `folder` if there is one."""
  path = pathlib.Path(folder, f"{name}.npz") if folder else None
  if path is not None and path.exists():
    with np.load(path) as kept:
      return [kept[str(i)] for i in range(len(samples))]
  found = [None] * len(samples)
  for one in classical.maps(METHOD, enumerate(s.image for s in samples)):
    # As `classical.probability`, but float64: from float32 some levels would be rounded twice.
    values = np.maximum(one.values, 0)
    found[one.key] = values / (values.max() or 1)
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{str(i): prob for i, prob in enumerate(found)})
  return found


if __name__ == "__main__":
  main()
