"""Compares our results with the paper's (`--mode table`): Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
import logging
import math
import os
import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from fdep_jax import build, evaluate, forward, report, settings
from fdep_jax.metrics.columns import COSTS, METRICS, csv_text
from fdep_jax.runtime import files
from fdep_jax.tables import experiments, figures, sweep
from fdep_jax.tables.experiments import Row, Table

_PAIRED = ("iou", "pd", "fa_1e6", "hse")  # of METRICS
TIMED_SIZE = 448  # pixels, of `retime`: the paper's crops
_REPORTED = 4  # most runs that a report shows side by side


class Cell(NamedTuple):
  """One number of one row, in the unit of the paper's column."""

  paper: float | None
  values: tuple[float, ...] = ()  # ours, by seed
  why: str = ""  # reason for no or too few values
  same_unit: bool = True  # as the paper's; false for a time on a different machine

  @property
  def mean(self) -> float | None:
    return statistics.fmean(self.values) if self.values else None

  @property
  def std(self) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None

  @property
  def difference(self) -> float | None:
    if None in (self.mean, self.paper) or not self.same_unit:
      return None
    return self.mean - self.paper


class Result(NamedTuple):
  """A row and its finished runs."""

  row: Row
  runs: list[sweep.Run]  # finished ones
  metrics: list[dict]  # content of each run's metrics.json
  why: str  # reason that others are unfinished; "" if none is
  cells: dict[str, Cell]


class Gap(NamedTuple):
  """The difference of a row from its baseline, in the unit of the table."""

  mean: float  # over seeds
  low: float  # of the mean, over images
  high: float
  by_seed: list[float]

  def __str__(self):
    from fdep_jax.metrics import bootstrap

    if not math.isfinite(self.mean):  # in a set without targets
      return "–"
    text = f"{self.mean:+.2f} ({self.low:+.2f} … {self.high:+.2f}"
    if len(self.by_seed) < 2:
      return text + ")"
    low, high = bootstrap.t_interval(self.by_seed)
    each = ", ".join(f"{value:+.2f}" for value in self.by_seed)
    return f"{text}; seeds {low:+.2f} … {high:+.2f}); {each}"


def command(flags) -> None:
  """Runs `--mode table`."""
  if flags.config is not None:
    table, base = experiments.from_flags(flags)
    results = collect(table, base, flags.workdir)
  else:
    table, results = collect_folder(flags.workdir)
  if flags.retime:
    results = retime(results)
  out = pathlib.Path(flags.out or flags.workdir).expanduser()
  print(write(table, results, out))
  for path in figures.write(results, out):
    logging.info("wrote %s", path)
  write_report(results, out)  # logs its path itself


def retime(results: Sequence[Result], repeats: int = 20) -> list[Result]:
  """Times every row with a finished run anew, one after the other in this process.

  The image is `TIMED_SIZE`² pixels, as the paper's crops. The note of a row has the median, which
  shows how much other work on the machine disturbed the time. A method without training has no
  network to time: it keeps the time of its evaluation, and its note says so.
  """
  timed = []
  for result in results:
    if not result.runs:
      timed.append(result)
      continue
    config = result.runs[0].config
    if config.mode == "classical":
      timed.append(_noted(result, "time not taken anew: mean over images of its evaluation"))
      continue
    light = forward.deployed_branch(config.mode) == "light"
    prior = None if light else build.load_prior(config)
    model = build.create_model(config, prior)
    found = evaluate.cost(config, model, prior, repeats, TIMED_SIZE)
    seconds, median = found["seconds_per_image"], found["seconds_median"]
    note = (
      f"time at {TIMED_SIZE}×{TIMED_SIZE}, least of {repeats} runs, all rows in one process; "
      f"median {median:.3f} s"
    )
    logging.info("%s: %.3f s, median %.3f s", result.row.name, seconds, median)
    cells = {**result.cells, "time_s": result.cells["time_s"]._replace(values=(seconds,))}
    timed.append(_noted(result._replace(cells=cells), note))
  return timed


def _noted(result: Result, text: str) -> Result:
  """Adds a text to the note of a row."""
  note = "; ".join(filter(None, (result.row.note, text)))
  return result._replace(row=result.row._replace(note=note))


def collect(table: Table, base: ConfigDict, workdir: str | os.PathLike) -> list[Result]:
  """Collects every row's finished runs below `workdir`."""
  everything = sweep.runs(table, base, workdir)
  results = []
  for row in table.rows:
    mine = [run for run in everything if run.row.name == row.name]
    found = {run.seed: sweep.results(run) for run in mine}
    done = [run for run in mine if found[run.seed] is not None]
    reasons = {
      run.seed: str(sweep.state(run)).replace("missing", "not run")
      for run in mine
      if found[run.seed] is None
    }
    why = "; ".join(
      f"{reason}, seed {', '.join(str(s) for s, r in reasons.items() if r == reason)}"
      for reason in dict.fromkeys(reasons.values())
    )
    unbuilt = None if done else experiments.resolve(base, row, table.seeds[0], workdir)
    metrics = [found[run.seed] for run in done]
    results.append(_result(table, row, done, metrics, why, unbuilt))
  return results


def collect_folder(workdir: str | os.PathLike) -> tuple[Table, list[Result]]:
  """Collects any evaluated runs below a folder; those that differ only in their seed are one row.

  Raises:
    FileNotFoundError: there is no such run.
  """
  workdir = pathlib.Path(workdir).expanduser()
  groups: dict[tuple, list[sweep.Run]] = {}
  metrics = {}
  for path in sorted(workdir.glob("**/metrics.json")):
    try:
      found, config = json.loads(path.read_text()), settings.load(path.parent)
    except FileNotFoundError:  # no run's, or removed by a training that starts
      continue
    metrics[path.parent] = found
    run = sweep.Run(None, config.seed, config, path.parent, None)
    alike = settings.results_of(config) | {"seed": 0}
    alike |= {"train.steps": config.train.steps, "train.epochs": config.train.epochs}
    key = json.dumps(alike, sort_keys=True)
    seen = [other.seed for known, runs in groups.items() if known[0] == key for other in runs]
    # A repeated seed is not a further seed: it gets its own row.
    groups.setdefault((key, seen.count(run.seed)), []).append(run)
  if not groups:
    raise FileNotFoundError(
      f"{workdir} contains no finished run: no metrics.json beside a config.json."
    )
  # The sets are named as soon as there are two: numbers of different images are not comparable.
  sets = {key: _test_set(runs[0].config, metrics[runs[0].folder]) for key, runs in groups.items()}
  mixed = len(set(sets.values())) > 1
  title = f"Runs in {workdir.name or workdir}"
  folders = [runs[0].folder.relative_to(workdir).as_posix() for runs in groups.values()]
  short = [re.sub(r"_seed\d+$", "", name) for name in folders]
  names = [s if short.count(s) == 1 else name for s, name in zip(short, folders, strict=True)]
  labels = [
    (name, sets[key]) if mixed else (name,) for name, key in zip(names, groups, strict=True)
  ]
  rows = tuple(Row(label[0], label, {}, {}) for label in labels)
  head = ("Run", "Test set") if mixed else ("Run",)
  table = Table(title, head, tuple(METRICS), rows, trained_params=False)
  return table, [
    _result(
      table,
      row,
      [run._replace(row=row) for run in runs],
      [metrics[run.folder] for run in runs],
      "",
      None,
    )
    for row, runs in zip(rows, groups.values(), strict=True)
  ]


def _test_set(config: ConfigDict, metrics: dict) -> str:
  """Names a run's test images: the data's folder, and what tells it from another of its name."""
  root = config.data.root
  if root == "synthetic":
    return f"synthetic, {config.data.synthetic_test} of {config.data.synthetic_size} pixels"
  digest = metrics.get("test_sha256", "")[:8]
  name = pathlib.Path(root).name
  return f"{name}, {metrics['images']} images ({digest})" if digest else name


def _result(table, row, runs, metrics, why, unbuilt: ConfigDict | None) -> Result:
  """Makes the cells of a row. Without runs, P is counted on the model of the config `unbuilt`."""
  cells = {}
  for name in table.columns:
    key, factor = METRICS[name][1:3]
    values = [sweep.deployed(m)[key] for m in metrics]
    kept = tuple(v * factor for v in values if v is not None)
    lacks = "no value in a set without targets" if len(kept) < len(values) else why
    cells[name] = Cell(row.paper.get(name), kept, lacks)
  for name, (_, key, factor, _) in COSTS.items():
    more = row.uncounted if name == "params_m" else 0
    if name == "params_m" and not table.trained_params:
      found = [m.get("params_deployed", m[key]) for m in metrics]
    else:
      found = [m[key] for m in metrics]
    values = tuple((value + more) * factor for value in found if value is not None)
    if name == "params_m" and unbuilt is not None and unbuilt.mode != "classical":
      try:
        values = ((build.parameters(unbuilt) + more) * factor,)
      except ValueError as error:
        why = f"{why}; P: {error}"
    cells[name] = Cell(row.paper.get(name), values, why, same_unit=name != "time_s")
  return Result(row, runs, metrics, why, cells)


def write(table: Table, results: Sequence[Result], out: pathlib.Path) -> str:
  """Writes `table.{md,csv,tex,json}`; returns the Markdown."""
  out.mkdir(parents=True, exist_ok=True)
  comparisons = paired(results)
  content = as_json(table, results) | {"paired": _plain(comparisons)}
  texts = {
    "md": markdown(table, results, comparisons),
    "csv": as_csv(table, results),
    "tex": latex(table, results),
    "json": json.dumps(content, indent=1, allow_nan=False) + "\n",
  }
  for suffix, text in texts.items():
    files.write(out / f"table.{suffix}", text)
  return texts["md"]


def _plain(comparisons: dict[str, dict[str, Gap]]) -> dict:
  return {
    name: {metric: files.finite(gap._asdict()) for metric, gap in found.items()}
    for name, found in comparisons.items()
  }


def write_report(results: Sequence[Result], out: pathlib.Path) -> list[pathlib.Path]:
  """Writes a `report.html` of the first rows with the same test images, one run each."""
  runs = [result.runs[0] for result in results if result.runs]
  alike = [r for r in runs if r.config.data == runs[0].config.data]
  folders = [r.folder for r in alike if (r.folder / "report.html").is_file()]
  if not folders:
    return []
  return [report.of(folders[:_REPORTED], out / "report.html")]


class _Grid(NamedTuple):
  """The cells of a table as texts."""

  sides: list[tuple[str, int]]  # heading, and the number of columns below it
  head: list[str]
  lines: list[list[list[str]]]  # for each label its lines of cells
  notes: list[str]  # in the order of their numbers


def _grid(table: Table, results: Sequence[Result]) -> _Grid:
  """Makes three lines a label: the paper's numbers, ours, and the difference."""
  sides = list(dict.fromkeys(result.row.side for result in results))
  head = [METRICS[name][0] for name in table.columns] * len(sides) + [c[0] for c in COSTS.values()]
  groups: dict[tuple, dict[str, Result]] = {}
  for result in results:
    groups.setdefault(result.row.label, {})[result.row.side] = result
  notes: list[str] = []

  def number(text: str) -> str:
    if text not in notes:
      notes.append(text)
    return f"[{notes.index(text) + 1}]"

  def texts(cell: Cell, decimals: int, missing: str, ours=_ours) -> tuple[str, str, str]:
    paper = "" if cell.paper is None else f"{cell.paper:.{decimals}f}"
    if cell.mean is None:
      return paper, f"– {missing}".strip(), ""
    gap = "" if cell.difference is None else f"{cell.difference:+.{decimals}f}"
    return paper, ours(cell, decimals), gap

  lines = []
  for label, by_side in groups.items():
    columns = []
    for side in sides:
      result = by_side.get(side)
      for name in table.columns:
        if result is None:
          columns.append(("", "", ""))
          continue
        cell = result.cells[name]
        mark = number(f"{result.row.name}: {cell.why}") if cell.why else ""
        paper, ours, gap = texts(cell, METRICS[name][3], mark)
        columns.append((paper, f"{ours} {mark}" if cell.values and mark else ours, gap))
    first = next(iter(by_side.values()))
    for name in COSTS:  # from one side, as the network is the same
      found = next((r.cells[name] for r in by_side.values() if r.metrics), first.cells[name])
      columns.append(texts(found, COSTS[name][3], "", lambda cell, d: f"{cell.mean:.{d}f}"))
    remark = f" {number(first.row.note)}" if first.row.note else ""
    block = []
    for i, which in enumerate(("paper", "ours", "difference")):
      if which == "ours" or any(column[i] for column in columns):
        block.append([*label, which, *(column[i] for column in columns)])
    block[0][len(label)] += remark
    lines.append(block)
  return _Grid(
    [(side, len(table.columns)) for side in sides], [*table.head, "", *head], lines, notes
  )


def _ours(cell: Cell, decimals: int) -> str:
  if cell.mean is None:
    return "–"
  text = f"{cell.mean:.{decimals}f}"
  if cell.std is not None and len(set(cell.values)) > 1:
    text += f" ± {cell.std:.{decimals}f}"
  return f"{text} ({len(cell.values)})"


_LEGEND = (
  "Ours: mean ± standard deviation (number of seeds) of the deployed branch on the test split; "
  "percent. {} FLOPs (two for a multiply-add) and time are for one crop-sized image and the "
  "deployed branch; the time is on the machine that evaluated, the paper's on an RTX 4090. "
  "The images that select the checkpoint are the set's own validation split or, without one, held "
  "out of the train split (data.val_fraction); with eval.select_on=test they are the test split."
)
_PAIRED_LEGEND = (
  "Paired over test images, percent: mean over seeds (95 % interval over images; 95 % t interval "
  "over seeds); each seed:"
)
_P = {  # by Table.trained_params
  True: "P counts all trained parameters, SAMF included.",
  False: "P counts the parameters of the deployed branch.",
}


def markdown(table: Table, results: Sequence[Result], comparisons: dict | None = None) -> str:
  """Formats the table as Markdown; `comparisons` default to those of `paired`."""
  grid = _grid(table, results)
  head = list(grid.head)
  if len(grid.sides) > 1:
    place = len(table.head) + 1
    for side, count in grid.sides:
      head[place] = f"{side}: {head[place]}"
      place += count
  lines = [f"### {table.title}", "", _line(head), _line(["---"] * len(head))]
  for block in grid.lines:
    for i, cells in enumerate(block):
      lines.append(_line(cells if not i else [""] * len(table.head) + cells[len(table.head) :]))
  lines += ["", _LEGEND.format(_P[table.trained_params]), ""]
  lines += [f"[{i}] {note}  " for i, note in enumerate(grid.notes, 1)]
  others = main_branches(results)
  if others:
    lines += ["", "The main branch of the same runs, which needs DINOv2 and is not deployed:", ""]
    lines += [_line(["", *(METRICS[n][0] for n in METRICS)]), _line(["---"] * (1 + len(METRICS)))]
    for name, cells in others.items():
      lines.append(_line([name, *(_ours(cells[n], METRICS[n][3]) for n in METRICS)]))
  comparisons = paired(results) if comparisons is None else comparisons
  if comparisons:
    names = list(next(iter(comparisons.values())))
    lines += ["", _PAIRED_LEGEND, ""]
    lines += [_line(["", *(METRICS[n][0] for n in names)]), _line(["---"] * (1 + len(names)))]
    lines += [_line([name, *map(str, gaps.values())]) for name, gaps in comparisons.items()]
  return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_TEX = {
  "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "{": r"\{",
  "}": r"\}", "$": r"\$", "±": r"$\pm$", "–": "--", "·": r"$\cdot$", "✓": r"$\checkmark$",
  "−": "$-$", "^": r"\^{}", "~": r"\~{}", "…": r"\ldots{}",
}  # fmt: skip


def latex(table: Table, results: Sequence[Result]) -> str:
  """Formats the table as a LaTeX tabular; needs booktabs, and amssymb for the ticks."""
  grid = _grid(table, results)

  def tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)

  def line(cells) -> str:
    return " & ".join(map(tex, cells)) + r" \\"

  left = len(table.head) + 1
  lines = [
    f"% {table.title} Needs the packages booktabs and amssymb.",
    r"\begin{tabular}{" + "l" * left + "r" * (len(grid.head) - left) + "}",
    r"\toprule",
  ]
  if len(grid.sides) > 1:
    over = [rf"\multicolumn{{{count}}}{{c}}{{{tex(side)}}}" for side, count in grid.sides]
    lines.append(" & " * left + " & ".join(over) + " &" * len(COSTS) + r" \\")
  lines += [line(grid.head), r"\midrule"]
  for block in grid.lines:
    for i, cells in enumerate(block):
      lines.append(line(cells if not i else [""] * len(table.head) + cells[len(table.head) :]))
  lines += [r"\bottomrule", r"\end{tabular}"]
  lines += [f"% [{i}] {note}" for i, note in enumerate(grid.notes, 1)]
  return "\n".join(lines) + "\n"


def as_csv(table: Table, results: Sequence[Result]) -> str:
  """Formats the table as CSV, one line for each row and column."""
  buffer = io.StringIO()
  fields = ("row", *table.head, "side", "column", "paper", "ours", "std", "seeds", "difference")
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow((*fields, "why"))
  for result in results:
    for name, cell in result.cells.items():
      seeds = len(cell.values) if result.runs else 0  # P is counted without a run
      values = (cell.paper, cell.mean, cell.std, seeds, cell.difference, csv_text(cell.why))
      writer.writerow(
        tuple(map(csv_text, (result.row.name, *result.row.label, result.row.side, name)))
        + tuple("" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values)
      )
  return buffer.getvalue()


def as_json(table: Table, results: Sequence[Result]) -> dict:
  """Returns the table and its runs for JSON."""
  return {
    "title": table.title,
    "columns": [*table.columns, *COSTS],
    "rows": [
      {
        "name": result.row.name,
        "label": list(result.row.label),
        "side": result.row.side,
        "note": result.row.note,
        "missing": result.why,
        "runs": [{"seed": run.seed, "folder": run.folder.name} for run in result.runs],
        "main_branch": {
          name: list(cell.values)
          for cells in main_branches([result]).values()
          for name, cell in cells.items()
        },
        "cells": {
          name: {
            "paper": cell.paper,
            "ours": list(cell.values),
            "mean": cell.mean,
            "std": cell.std,
            "difference": cell.difference,
            "why": cell.why,
          }
          for name, cell in result.cells.items()
        },
      }
      for result in results
    ],
  }


def main_branches(results: Sequence[Result]) -> dict[str, dict[str, Cell]]:
  """Returns {row: {column: cell}} of the main branch, for rows that deploy the light one."""
  found = {}
  for result in results:
    both = [m for m in result.metrics if m["deployed"] == "light" and "main" in m]
    if both:
      found[result.row.name] = {
        name: Cell(None, tuple(m["main"][k] * f for m in both if m["main"][k] is not None))
        for name, (_, k, f, _) in METRICS.items()
      }
  return found


def paired(results: Sequence[Result], resamples: int = 1000) -> dict[str, dict[str, Gap]]:
  """Compares each row with its baseline (`experiments.baselines`) on the same resampled images.

  Needs the runs' `counts.npz`, or of older runs the maps (eval.save_probs). In every resample of
  the test images the differences of all seeds are averaged, so `low` and `high` are over images,
  not over trainings. If a row deploys the light branch, its main branch is compared, too. The parts
  of a union, such as SIRST3, are also compared by themselves.

  Returns:
    {"ROW − BASELINE, seeds": {metric: gap}}, and "…, PART" for every part.

  Raises:
    ValueError: the two were evaluated on different images.
  """
  import numpy as np

  from fdep_jax.metrics import bootstrap

  found: dict[str, dict[str, Gap]] = {}
  baselines = experiments.baselines([result.row for result in results])
  by_name = {result.row.name: result for result in results}
  for result in results:
    other = by_name[baselines[result.row.name]]
    if other is result:
      continue
    ours, theirs = ({run.seed: run for run in r.runs} for r in (result, other))
    for branch in ("", "main") if main_branches([result]) else ("",):
      pairs = [
        (figures.counts(ours[s], branch), figures.counts(theirs[s])) for s in ours if s in theirs
      ]
      pairs = [pair for pair in pairs if None not in pair]
      if not pairs:
        continue
      for pair in pairs:
        bootstrap.check_pair(*pair)
      name = result.row.name + (", main branch" if branch else "")
      name += f" − {other.row.name}, {len(pairs)} seed" + "s" * (len(pairs) > 1)
      metrics = [*result.metrics, *other.metrics]
      for part, weights in _weights(metrics, len(pairs[0][0]), resamples).items():
        each = [[bootstrap.samples(total, weights) for total in pair] for pair in pairs]
        gaps = {}
        for metric in _PAIRED:
          _, key, factor, _ = METRICS[metric]
          by_seed = factor * np.array([left[key] - right[key] for left, right in each])
          spread = by_seed[:, 1:].mean(0)
          spread = spread[~np.isnan(spread)]
          ends = np.quantile(spread, [0.025, 0.975]) if len(spread) else np.full(2, np.nan)
          low, high = ends.tolist()
          gaps[metric] = Gap(float(by_seed[:, 0].mean()), low, high, by_seed[:, 0].tolist())
        found[", ".join(filter(None, (name, part)))] = gaps
  return found


def _weights(metrics: Sequence[dict], images: int, resamples: int) -> dict:
  """Draws how often each image counts, 1 + resamples × images; the first row is the images once.

  Returns:
    {"": weights of all images, part: weights of a union's part, if all metrics have these parts}.
  """
  import numpy as np

  from fdep_jax.metrics import bootstrap

  def drawn(count):
    return np.concatenate([np.ones((1, count)), bootstrap.draw(count, resamples, 0)])

  found, start = {"": drawn(images)}, 0
  sizes = [{name: part["images"] for name, part in m.get("parts", {}).items()} for m in metrics]
  if all(size == sizes[0] for size in sizes):
    for name, size in sizes[0].items():
      found[name] = np.zeros((1 + resamples, images))
      found[name][:, start : start + size] = drawn(size)
      start += size
  return found
