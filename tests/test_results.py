"""The committed results are what their tables' configs make of their committed runs."""

import importlib
import json
import pathlib
import re
import statistics

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from benchmarks import few_frames
from configs.tables import sirst3_cpu
from fdep_jax import build, data, settings
from fdep_jax.metrics import bootstrap, hse, per_image
from fdep_jax.tables import experiments, figures, sweep, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = [path.parent.name for path in sorted(ROOT.glob("results/*/table.json"))]
TEXT = (ROOT / "results/README.md").read_text()


def collected(name: str) -> tuple[experiments.Table, list[table.Result]]:
  found = experiments.load(ROOT / f"configs/tables/{name}.py")
  start = importlib.import_module(f"configs.tables.{name}").get_config()
  return found, table.collect(found, start, ROOT / "results" / name / "runs")


def chapter(name: str) -> str:
  """Returns what the text says of a table, from its heading on."""
  return TEXT.split(f"## `{name}`")[1].split("\n## ")[0]


def gaps(name: str) -> dict[tuple[str, str], dict]:
  """Returns (comparison, metric) -> the committed difference, if it has seeds enough to test."""
  paired = json.loads((ROOT / "results" / name / "table.json").read_text())["paired"]
  return {
    (comparison, metric): gap
    for comparison, found in paired.items()
    for metric, gap in found.items()
    if len(gap["by_seed"]) > 1
  }


def t_interval(gap: dict) -> tuple[float, float]:
  return bootstrap.t_interval(gap["by_seed"])


def turned(gap: dict) -> dict:
  """Returns the difference the other way round."""
  ends = {"low": -gap["high"], "high": -gap["low"]}
  return {"mean": -gap["mean"], "by_seed": [-value for value in gap["by_seed"]]} | ends


def signed(*values: float) -> str:
  return " … ".join(f"{value:+.2f}".replace("-", "−") for value in values)


def test_there_are_results():
  assert "nuaa_cpu" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_of_todays_config_and_in_the_table(name):
  found, results = collected(name)
  reasons = {result.row.name: result.why for result in results if result.why}
  assert not reasons  # no run is of another config, and none is missing
  folder = ROOT / "results" / name
  committed = json.loads((folder / "table.json").read_text())
  comparisons = {
    comparison: {metric: table.Gap(**gap) for metric, gap in metrics.items()}
    for comparison, metrics in committed.pop("paired").items()
  }
  assert committed == json.loads(json.dumps(table.as_json(found, results)))
  # The whole texts: a row or a column in another place is another text.
  assert (folder / "table.md").read_text() == table.markdown(found, results, comparisons)
  assert (folder / "table.csv").read_text() == table.as_csv(found, results)
  assert (folder / "table.tex").read_text() == table.latex(found, results)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_in_the_text_is_in_its_table(name):
  """Every number of two decimals in the chapter on a table is a number of the table."""
  outcome = chapter(name).split("### Outcome")[1]
  committed = (ROOT / "results" / name / "table.json").read_text()
  known = {f"{float(n):.2f}" for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", committed)}
  for gap in gaps(name).values():
    known |= {f"{end:.2f}" for end in t_interval(gap)}
    other = turned(gap)  # a comparison may be read either way
    known |= {f"{n:.2f}" for n in (other["mean"], other["low"], other["high"], *t_interval(other))}
  for row in json.loads(committed)["rows"]:
    known |= {f"{statistics.fmean(v):.2f}" for v in row["main_branch"].values()}
  for path in (ROOT / f"results/{name}/runs").glob("*/metrics.json"):
    newest = json.loads(path.read_text())["last"]
    known |= {f"{100 * newest[b]['hse']:.2f}" for b in ("light", "main") if b in newest}
  if name == "zoo":  # compares itself with the study, and tells its held-out scores
    study_table = json.loads((ROOT / "results/sirst3_cpu/table.json").read_text())
    for row in study_table["rows"]:
      if row["name"] in ("acm-original", "acm-fdep"):
        values = [
          cell for cells in row["cells"].values() for cell in (cells["paper"], *cells["ours"][:1])
        ]
        known |= {f"{value:.2f}" for value in values if value is not None}
    light = json.loads((ROOT / "results/zoo/runs/mlcl-fdep_seed0/metrics.json").read_text())[
      "light"
    ]
    known |= {f"{100 * end:.2f}" for key in ("iou", "hse") for end in light["intervals"][key]}
    known |= {f"{100 * value:.2f}" for value in held_out("zoo/runs/mlcl-fdep_seed0")}
  for path in (ROOT / f"results/{name}/swapped").glob("*/metrics.json"):
    light = json.loads(path.read_text())["light"]
    known |= {f"{100 * light[metric]:.2f}" for metric in ("iou", "hse")}
  for path in (ROOT / f"results/{name}").glob("untuned/metrics.json"):
    before = json.loads(path.read_text())
    known |= {f"{100 * found['light']['hse']:.2f}" for found in (before, before["last"])}
  written = re.findall(r"[+−]?\d+\.\d\d", outcome)
  assert len(written) > 5
  assert {w.lstrip("+").replace("−", "-") for w in written} <= known


def held_out(run: str) -> list[float]:
  """Returns the HSE of each evaluation on held-out images."""
  lines = map(json.loads, (ROOT / f"results/{run}/metrics.jsonl").read_text().splitlines())
  return [line["eval"]["light"]["hse"] for line in lines if "eval" in line]


def test_the_text_says_what_the_training_of_the_zoo_reaches():
  text = " ".join(chapter("zoo").split())
  run = ROOT / "results/zoo/runs/mlcl-fdep_seed0"
  ours, acm = json.loads((run / "metrics.json").read_text())["light"], study("acm-fdep", 0)
  paper = {
    (row["network"], row["mode"]): row
    for row in json.loads((ROOT / "configs/tables/paper.json").read_text())["table1"]
  }
  scales = dict.fromkeys(("iou", "niou", "pd", "fa", "hse_p", "hse_t", "hse"), 100) | {"fa": 1e6}
  theirs = paper["MLCL-Net", "fdep"]
  for label, cells in (
    ("MLCL-Net with FDEP, seed 0", [scale * ours[key] for key, scale in scales.items()]),
    ("ACM with FDEP, seed 0 (`sirst3_cpu`)", [scale * acm[key] for key, scale in scales.items()]),
    ("MLCL-Net with FDEP in the paper", [theirs.get(key, theirs["fa_1e6"]) for key in scales]),
  ):
    assert f"| {label} | {' | '.join(f'{cell:.2f}' for cell in cells)} |" in text
  alone = paper["ACM", "original"]
  low, high = (100 * end for end in ours["intervals"]["iou"])
  claim = f"IoU is {100 * ours['iou']:.2f} ({low:.2f} … {high:.2f} over the test images; the "
  assert f"{claim}paper's ACM alone has {alone['iou']:.2f})" in text
  assert low < alone["iou"] < high
  low, high = (100 * end for end in ours["intervals"]["hse"])
  claim = (
    f"HSE {100 * ours['hse']:.2f} ({low:.2f} … {high:.2f}; the paper's has {alone['hse']:.2f})."
  )
  assert claim in text and high < alone["hse"]
  *first, last = (f"{100 * value:.2f}" for value in held_out("zoo/runs/mlcl-fdep_seed0"))
  assert f"HSE is {', '.join(first)} and {last} after a quarter, a half" in text and len(first) == 3
  assert ours["hse_t"] < acm["hse_t"] and ours["pd"] > acm["pd"]
  assert "HSE-T is below that of ACM, although more targets are found at the threshold 0.5" in text
  assert theirs["hse_t"] - 100 * ours["hse_t"] > theirs["hse_p"] - 100 * ours["hse_p"]
  twice = [
    study("acm-original-twice", s)["hse"] > study("acm-original", s)["hse"] for s in range(3)
  ]
  assert "With ACM alone, twice the steps raised HSE in two of three trainings." in text
  assert twice.count(True) == 2


def test_the_readme_has_the_tables_means():
  readme = " ".join((ROOT / "README.md").read_text().split())
  assert len(re.findall(r"\d+\.\d\d ± \d+\.\d\d", readme)) == 12  # all of them are below
  for name, where, network, of in (
    ("nuaa_cpu", "NUAA-SIRST", "ACM", "`configs/tables/nuaa_cpu.py`"),
    ("sirst3_cpu", "SIRST3", "ACM", "`configs/tables/sirst3_cpu.py`"),
    ("sirst3_cpu", "SIRST3", "ALCNet", "the same table"),
  ):
    rows = json.loads((ROOT / f"results/{name}/table.json").read_text())["rows"]
    alone, fdep = (
      next(row["cells"] for row in rows if row["name"] == f"{network.lower()}-{mode}")
      for mode in ("original", "fdep")
    )
    seeds = len(alone["hse"]["ours"])
    for label, cells, columns in (
      (f"{of}, {network} alone, {seeds} seeds", alone, "{} | –"),
      (f"the same, {network} with FDEP, light branch", fdep, "– | {}"),
    ):
      means = [f"{cells[key]['mean']:.2f} ± {cells[key]['std']:.2f}" for key in ("iou", "hse")]
      paper = columns.format(f"{cells['hse']['paper']:.2f}")
      assert f"| {label} | {where} | {' | '.join(means)} | {paper} |" in readme
  found = gaps("sirst3_cpu")
  gap = found["acm-fdep − acm-original, 5 seeds", "hse"]
  claim = f"FDEP minus ACM alone is HSE {signed(gap['mean'])}, with a 95 % t interval over the five"
  over_images = f"and {signed(gap['low'], gap['high'])} over the test images."
  assert f"{claim} seeds of {signed(*t_interval(gap))}, {over_images}" in readme
  gap = turned(found["acm-fdep-untrained − acm-fdep, 3 seeds", "hse"])
  claim = (
    f"FDEP minus FDEP with an untrained ViT is {signed(gap['mean'])} ({signed(*t_interval(gap))}"
  )
  assert f"{claim} over three seeds)." in readme
  gap = found["alcnet-fdep − alcnet-original, 3 seeds", "hse"]
  claim = (
    f"FDEP minus ALCNet alone is {signed(gap['mean'])} ({signed(*t_interval(gap))}, three seeds)"
  )
  assert claim in readme
  gap = turned(found["acm-original-twice − acm-fdep, 3 seeds", "hse"])
  claim = (
    f"FDEP minus ACM alone with these is {signed(gap['mean'])} ({signed(*t_interval(gap))}, three"
  )
  assert f"{claim} seeds)." in readme
  light = json.loads((ROOT / "results/zoo/runs/mlcl-fdep_seed0/metrics.json").read_text())["light"]
  (row,) = json.loads((ROOT / "results/zoo/table.json").read_text())["rows"]
  paper = f"{row['cells']['hse']['paper']:.2f}"
  scores = f"{100 * light['iou']:.2f} | {100 * light['hse']:.2f} | – | {paper} |"
  assert f"MLCL-Net with FDEP, light branch | SIRST3 | {scores}" in readme


def test_the_rows_of_the_text_are_those_of_the_table():
  rows = {row["name"]: row for row in committed_table()["rows"]}
  written = {
    cells[0]: cells[1:]
    for line in TEXT.splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 6
  }
  for label, name, branch in (
    ("ACM as published", "acm-original", ""),
    ("FDEP w/o CO-ISD (needs DINOv2)", "acm-fdep_wo_coisd", ""),
    ("FDEP, light branch (deployed)", "acm-fdep", ""),
    ("FDEP, main branch (needs DINOv2)", "acm-fdep", "main"),
  ):
    cell = rows[name]["cells"]["hse"]
    values = rows[name]["main_branch"]["hse"] if branch else cell["ours"]
    paper = "" if branch else f"{cell['paper']:.2f}"
    means = [f"{value:.2f}" for value in (*values, statistics.fmean(values))]
    assert written[label] == [*means, paper], label


def test_the_intervals_of_the_text_are_those_of_the_table():
  found = committed_table()["paired"]["acm-fdep − acm-original, 3 seeds"]
  claims = (
    f"{heading} {found[key]['mean']:+.2f} ({found[key]['low']:+.2f} … {found[key]['high']:+.2f})"
    for heading, key in (("HSE", "hse"), ("IoU", "iou"), ("Pd", "pd"))
  )
  assert ", ".join(claims) in " ".join(TEXT.split())


def test_the_t_interval_in_the_text_is_that_of_the_seeds():
  seeds = committed_table()["paired"]["acm-fdep − acm-original, 3 seeds"]["hse"]["by_seed"]
  ends = " … ".join(f"{end:+.0f}" for end in bootstrap.t_interval(seeds)).replace("-", "−")
  claim = f"The 95 % t interval of the mean over the three seeds is {ends} HSE."
  assert claim in " ".join(TEXT.split())


def test_the_newest_checkpoints_of_the_text_are_those_of_the_runs():
  def hse(table, row, which):
    metrics = json.loads((ROOT / f"results/{table}/runs/{row}/metrics.json").read_text())
    branch = metrics["deployed"]
    return f"{100 * (metrics['last'] if which == 'newest' else metrics)[branch]['hse']:.2f}"

  pairs = {
    path.parent.name: [hse("nuaa_cpu", path.parent.name, which) for which in ("newest", "selected")]
    for path in (ROOT / "results/nuaa_cpu/runs").glob("*/metrics.json")
  }
  changed = {row: pair for row, pair in pairs.items() if pair[0] != pair[1]}
  assert len(pairs) == 9 and sorted(changed) == ["acm-fdep_wo_coisd_seed1", "acm-original_seed0"]
  text = " ".join(TEXT.split())
  for (newest, selected), label in (
    (changed["acm-original_seed0"], "(ACM as published, seed 0)"),
    (changed["acm-fdep_wo_coisd_seed1"], "(FDEP w/o CO-ISD, seed 1)"),
  ):
    assert f"{newest} instead of {selected} {label}" in text
  ours, released, shared = (
    hse("nuaa_cpu_choices", f"acm-fdep{choice}_seed0", "newest")
    for choice in ("", "-released", "-shared")
  )
  assert f"the three have {ours}, {released} and {shared}" in text


SHORT = {  # of the rows of sirst3_cpu, in the text
  "acm-original": "ACM alone",
  "acm-fdep_wo_coisd": "FDEP w/o CO-ISD",
  "acm-fdep": "FDEP",
}
CONTROLS = {
  "acm-fdep-untrained": "FDEP with an untrained ViT",
  "acm-original-twice": "ACM alone, twice the steps",
}
ALCNET = {
  "alcnet-original": "ALCNet alone",
  "alcnet-fdep_wo_coisd": "ALCNet with FDEP w/o CO-ISD",
  "alcnet-fdep": "ALCNet with FDEP",
}
PARTS = ("", "NUAA-SIRST", "NUDT-SIRST", "IRSTD-1K")  # the first: the whole union


def study(row: str, seed: int, part: str = "") -> dict:
  """Returns the scores of the deployed branch of a run of sirst3_cpu."""
  path = ROOT / f"results/sirst3_cpu/runs/{row}_seed{seed}/metrics.json"
  metrics = json.loads(path.read_text())
  return (metrics["parts"][part] if part else metrics)[metrics["deployed"]]


def test_the_study_says_the_scores_of_its_runs():
  """From the runs alone, so that the table is checked, too."""
  text = " ".join(chapter("sirst3_cpu").split())
  rows = json.loads((ROOT / "results/sirst3_cpu/table.json").read_text())["rows"]
  paper = {row["name"]: row["cells"]["hse"]["paper"] for row in rows}
  scores = {row: [100 * study(row, seed)["hse"] for seed in range(5)] for row in SHORT}
  scores |= {row: [100 * study(row, seed)["hse"] for seed in range(3)] for row in ALCNET}
  below = [paper[row] - statistics.fmean(values) for row, values in scores.items()]
  for row, values in scores.items():
    cells = [f"{v:.2f}" for v in (*values, statistics.fmean(values), paper[row])]
    cells[-2:-2] = [""] * (7 - len(cells))
    line = " | ".join(cells).replace("  ", " ")
    label = (SHORT | ALCNET)[row]
    assert re.search(rf"\| {re.escape(label)}[^|]* \| {re.escape(line)} \|", text), row
  controls = {row: [100 * study(row, seed)["hse"] for seed in range(3)] for row in CONTROLS}
  for row, values in controls.items():
    cells = " | ".join(f"{value:.2f}" for value in values)
    line = rf"\| {CONTROLS[row]}[^|]* \| {cells} \| \| \| {statistics.fmean(values):.2f} \| \|"
    assert re.search(line, text), row
  assert f"are {min(below):.0f} to {max(below):.0f} points of HSE below the paper's" in text
  pairs = zip(scores["acm-fdep"], scores["acm-original"], strict=True)
  differences = [ours - theirs for ours, theirs in pairs]
  low, high = bootstrap.t_interval(differences)
  verdict = "not decided" if low < 0 < high else "supported" if low > 0 else "contradicted"
  assert f"**Primary outcome: {verdict}.**" in text
  assert f"differs by HSE {signed(statistics.fmean(differences))} on average." in text
  assert f"The 95 % t interval over the five seeds, {signed(low, high)}, holds 0." in text
  assert "narrower than ± 6" in text and (high - low) / 2 < 6
  assert "(from 68.05 to 75.81, " in text and "lies above the interval" in text
  assert high < 75.81 - 68.05
  assert "ahead with four of the five seeds and behind with one" in text
  assert [d > 0 for d in differences].count(True) == 4
  ious = [100 * study(row, seed)["iou"] for row in SHORT for seed in range(5)]
  ious += [100 * study(row, seed)["iou"] for row in CONTROLS for seed in range(3)]
  assert f"No training of ACM failed: the lowest IoU is {min(ious):.2f}" in text
  assert min(ious) > 10


def test_the_study_says_how_many_seeds_would_find_a_gain():
  by_seed = gaps("sirst3_cpu")["acm-fdep − acm-original, 5 seeds", "hse"]["by_seed"]
  spread = np.std(by_seed, ddof=1)

  def power(gain: float, seeds: int) -> float:
    """Returns the chance that the two-sided t test at 5 % finds a true gain."""
    shift, free = gain / spread * seeds**0.5, seeds - 1
    limit = stats.t.ppf(0.975, free)
    return stats.nct.sf(limit, free, shift) + stats.nct.cdf(-limit, free, shift)

  large, small = (next(n for n in range(2, 99) if power(gain, n) > 0.8) for gain in (3, 1.5))
  assert (
    f"spread as these five do (standard deviation {spread:.2f}), finding a true gain of 3 points "
    f"with a chance of 80 % takes {large} seeds, and one of 1.5 points {small} seeds."
  ) in " ".join(chapter("sirst3_cpu").split())


def test_the_study_says_the_differences_of_its_table():
  text, found = chapter("sirst3_cpu"), gaps("sirst3_cpu")
  comparisons = sorted({comparison for comparison, _ in found if comparison.endswith("seeds")})
  assert len(comparisons) == 6
  names_of = SHORT | CONTROLS | ALCNET
  for comparison in comparisons:
    rows = comparison.split(", ")[0].split(" − ")
    places = [f"{comparison}, {part}".removesuffix(", ") for part in PARTS]
    differences = [found[place, "hse"] for place in places]
    if rows[0] in CONTROLS:  # the plan has these the other way round
      rows.reverse()
      differences = [turned(gap) for gap in differences]
    cells = [f"{signed(gap['mean'])} ({signed(*t_interval(gap))})" for gap in differences]
    names, count = [names_of[row] for row in rows], len(differences[0]["by_seed"])
    assert f"| {' − '.join(names)} | {count} | {' | '.join(cells)} |" in text
  text = " ".join(text.split())
  primary = "acm-fdep − acm-original, 5 seeds"
  images = {key: signed(found[primary, key]["low"], found[primary, key]["high"])
            for key in ("hse", "iou", "pd", "fa_1e6")}  # fmt: skip
  assert f"the 95 % interval of the same mean is {images['hse']}." in text
  for label, key in (
    ("HSE (primary)", "hse"),
    ("IoU", "iou"),
    ("Pd", "pd"),
    ("Fa in 10⁻⁶ (more is worse)", "fa_1e6"),
  ):
    gap = found[primary, key]
    cells = (signed(gap["mean"]), signed(*t_interval(gap)), images[key])
    assert f"| {label} | {' | '.join(cells)} |" in text


def test_the_tries_that_troubleshooting_names_are_those_of_the_plan():
  plan = (ROOT / "results/sirst3_cpu/PLAN.md").read_text()
  found = {}
  for momentum, name in (("", "0.9"), ("BatchNorm momentum as published ", "published")):
    row = re.search(rf"\| 2830 \| 3e-3 \| 0.5 \| recipe \| {momentum}\| \S+ \| (\S+) \|", plan)
    found[name] = row[1]
  trouble = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
  assert f"images of {found['0.9']} with it, and of {found['published']} without it" in trouble


def test_the_study_says_what_its_controls_show():
  text, found = " ".join(chapter("sirst3_cpu").split()), gaps("sirst3_cpu")
  untrained, twice = (turned(found[f"{row} − acm-fdep, 3 seeds", "hse"]) for row in CONTROLS)
  low, high = t_interval(untrained)
  assert low < 0 < high and "learnt? Not decided.**" in text
  assert f"FDEP has an HSE lower by {untrained['mean']:.2f} on average" in text
  assert f"advantage over it, {signed(low, high)}, holds 0." in text
  assert f"The same over images is {signed(untrained['low'], untrained['high'])}." in text
  low, high = t_interval(twice)
  assert low < 0 < high and "gradients? Not decided either.**" in text
  assert f"Its HSE is higher than FDEP's by {-twice['mean']:.2f} on average" in text
  assert "FDEP was behind it with two of them and ahead with one" in text
  assert sorted(value > 0 for value in twice["by_seed"]) == [False, False, True]
  assert f"advantage, {signed(low, high)}, is wide" in text
  assert f"Over images it is {signed(twice['low'], twice['high'])}." in text


def test_the_study_says_what_alcnet_shows():
  text, found = " ".join(chapter("sirst3_cpu").split()), gaps("sirst3_cpu")
  fdep, wo = (
    found[f"alcnet-{mode} − alcnet-original, 3 seeds", "hse"] for mode in ("fdep", "fdep_wo_coisd")
  )
  seeds = [signed(value) for value in fdep["by_seed"]]
  mean, (low, high) = signed(fdep["mean"]), t_interval(fdep)
  assert low < 0 < high and "**ALCNet: not decided.**" in text
  assert (
    f"FDEP minus ALCNet alone differs by HSE {mean} on average over three seeds ({seeds[0]}, "
    f"{seeds[1]} and {seeds[2]}). The t interval, {signed(low, high)}, holds 0; over images it is "
    f"{signed(fdep['low'], fdep['high'])}. FDEP w/o CO-ISD minus ALCNet alone is "
    f"{signed(wo['mean'])} ({signed(*t_interval(wo))}; over images "
    f"{signed(wo['low'], wo['high'])})."
  ) in text
  claims = []
  for key, unit in (("iou", ""), ("fa_1e6", "·10⁻⁶")):
    gap = found["alcnet-fdep − alcnet-original, 3 seeds", key]
    ends = f"({signed(*t_interval(gap))}; {signed(gap['low'], gap['high'])})"
    claims.append(f"{signed(gap['mean'])}{unit} {ends}")
  assert f"IoU {claims[0]} and Fa {claims[1]}, over seeds and over images." in text
  assert found["alcnet-fdep − alcnet-original, 3 seeds", "iou"]["mean"] < 0 < fdep["mean"]
  assert f"The largest gain, {signed(max(fdep['by_seed']))}, is that of the failed seed" in text
  assert max(fdep["by_seed"]) == fdep["by_seed"][1]
  assert "FDEP was ahead with two seeds and behind with one; the differences lie ten" in text
  assert sorted(value > 0 for value in fdep["by_seed"]) == [False, True, True]
  assert round(max(fdep["by_seed"]) - min(fdep["by_seed"])) == 10


def test_the_study_says_which_trainings_failed():
  text = " ".join(chapter("sirst3_cpu").split())
  ious = {(row, seed): study(row, seed)["iou"] for row in ALCNET for seed in range(3)}
  failed = [run for run, iou in ious.items() if iou < 0.1]
  assert failed == [(row, 1) for row in ALCNET]
  assert "**Three trainings failed: ALCNet's seed 1, in all three rows.**" in text
  scores, parts, alarms = [], [], []
  for row, seed in failed:
    path = ROOT / f"results/sirst3_cpu/runs/{row}_seed{seed}/counts.npz"
    (found,) = per_image.load(path).values()
    grid = 100 * hse.THRESHOLDS.round(2)
    predicted, hits = found.counts.predicted.sum(0), found.counts.hits.sum(0)
    assert not predicted[grid > 44].any()
    parts.append(100 * hits[grid < 36][-1] / found.counts.targets.sum())
    alarms.append((predicted - hits)[grid < 36][-1])
    scores.append(f"{100 * study(row, seed)['hse']:.2f}")
  assert "At 0.45 and above they predict nothing, so IoU, Pd and Fa at 0.5 are 0." in text
  assert f"At 0.35 they find {min(parts):.0f} to {max(parts):.0f} % of the targets," in text
  others = [study(row, seed)["false_alarms"] for row in ALCNET for seed in (0, 2)]
  claim = f"{min(alarms)} to {max(alarms)} false alarms on the 1079 images (the six other trainings"
  assert f"with {claim} at 0.5: {min(others)} to {max(others)});" in text
  assert f"and is {scores[0]}, {scores[1]} and {scores[2]}." in text
  found = gaps("sirst3_cpu")
  others = (
    statistics.fmean(found[f"{row} − alcnet-original, 3 seeds", "hse"]["by_seed"][::2])
    for row in ("alcnet-fdep", "alcnet-fdep_wo_coisd")
  )
  fdep, wo = map(signed, others)
  claim = f"FDEP minus ALCNet alone is {fdep}, and FDEP w/o CO-ISD minus ALCNet alone {wo}."
  assert f"Over the two other seeds, {claim}" in text
  readme = " ".join((ROOT / "README.md").read_text().split())
  ious = [
    statistics.fmean(100 * study(f"alcnet-{mode}", seed)["iou"] for seed in (0, 2))
    for mode in ("original", "fdep")
  ]
  claim = f"HSE {fdep}, and the mean IoU is {ious[0]:.2f} alone and {ious[1]:.2f} with FDEP."
  assert f"Over the two other seeds the difference is {claim}" in readme


def test_the_failed_seed_begins_with_a_capped_probability():
  config = sirst3_cpu.get_config()
  config.mode, config.model.backbone = "original", "alcnet"
  capped = []
  for config.seed in range(3):
    last = build.create_model(config, None).backbone.head.conv2
    assert last.kernel[...].size == 2
    assert float(last.bias[0]) == pytest.approx(-4.6, abs=0.01)
    capped.append(bool((last.kernel[...] < 0).all()))
  assert capped == [False, True, False]
  lines = (
    (ROOT / "results/sirst3_cpu/runs/alcnet-fdep_seed1/metrics.jsonl").read_text().splitlines()
  )
  ious = [line["eval"]["light"]["iou"] for line in map(json.loads, lines) if "eval" in line]
  assert ious == [0] * 4  # so the held-out images show it
  assert "predicted nothing at 0.5, on the held-out images, too" in " ".join(
    (ROOT / "docs/troubleshooting.md").read_text().split()
  )
  assert "With seed 1 both begin negative, in all three rows" in " ".join(TEXT.split())


def test_the_study_names_every_secondary_interval_without_0():
  text, found = " ".join(chapter("sirst3_cpu").split()), gaps("sirst3_cpu")
  wo, untrained, twice = (
    "acm-fdep_wo_coisd − acm-original, 5 seeds",
    "acm-fdep-untrained − acm-fdep, 3 seeds",
    "acm-original-twice − acm-fdep, 3 seeds",
  )
  sentences = {  # (comparison, metric) -> how the text says it
    (f"{wo}, NUDT-SIRST", "fa_1e6"): "than ACM alone on NUDT-SIRST (Fa {}·10⁻⁶, {})",
    (twice, "pd"): "more targets than FDEP on SIRST3 (Pd {}, {})",
    (f"{twice}, NUAA-SIRST", "pd"): "on NUAA-SIRST (Pd {}, {})",
    (f"{twice}, NUDT-SIRST", "pd"): "on NUDT-SIRST (Pd {}, {})",
    (f"{twice}, NUAA-SIRST", "hse"): "the higher HSE on NUAA-SIRST ({}, {})",
    (f"{untrained}, NUDT-SIRST", "iou"): "lower IoU than FDEP on NUDT-SIRST ({}, {})",
  }
  off = {key for key, gap in found.items() if t_interval(gap)[0] * t_interval(gap)[1] > 0}
  assert off == set(sentences)
  for key, sentence in sentences.items():
    gap = found[key]
    assert sentence.format(signed(gap["mean"]), signed(*t_interval(gap))) in text
  assert f"Six of the {len(found) - 1} secondary intervals over seeds do not hold 0." in text
  # With (a, 0, b) the t statistic is at most 2, and 4.30 is needed.
  cannot = [key for key in found if key[0].startswith("alcnet") and key[1] != "hse"]
  assert {found[key]["by_seed"][1] for key in cannot} == {0} and len(cannot) == 24
  assert all(t_interval(found[key])[0] <= 0 <= t_interval(found[key])[1] for key in cannot)
  assert "24 of the 95 cannot" in text and len(found) - 1 - 24 == 71
  assert "Of the other 71, about four would do so" in text and round(0.05 * 71) == 4


def test_the_differences_of_the_studys_table_are_those_of_its_runs():
  table_json = json.loads((ROOT / "results/sirst3_cpu/table.json").read_text())
  compared, off = 0, []
  for comparison, found in table_json["paired"].items():
    rows, seeds, *part = comparison.split(", ")
    count = int(seeds.split()[0])
    row, baseline = rows.split(" − ")
    for key, gap in found.items():
      metric, factor = ("fa", 1e6) if key == "fa_1e6" else (key, 100)
      for seed, value in enumerate(gap["by_seed"]):
        ours, theirs = (study(name, seed, *part)[metric] for name in (row, baseline))
        # Scores are grouped in the counts, which only HSE notices.
        near = 0.15 if key == "hse" else 1e-6
        assert value == pytest.approx(factor * (ours - theirs), abs=near), (comparison, key)
        off += [abs(value - factor * (ours - theirs))] if key == "hse" else []
        compared += 1
      assert gap["mean"] == pytest.approx(statistics.fmean(gap["by_seed"]))
      assert len(gap["by_seed"]) == count
  assert sorted(off)[-3] < 0.02  # one run, on one part and so on the whole, is further off
  # metrics, the whole and its parts, seeds of two comparisons of ACM, two of ALCNet, two controls
  assert compared == 4 * 4 * (2 * 5 + 2 * 3 + 2 * 3)


@pytest.mark.parametrize("name", ["few_frames", "sirst3_cpu"])
def test_the_differences_of_a_table_are_those_of_its_counts(name):
  results = [result for result in collected(name)[1] if not result.why]
  found = table.paired(results)
  committed = json.loads((ROOT / f"results/{name}/table.json").read_text())["paired"]
  assert found.keys() == committed.keys() and len(found) > 5
  for comparison, differences in found.items():
    for metric, gap in differences.items():
      expected = committed[comparison][metric]
      assert gap.by_seed == pytest.approx(expected["by_seed"], abs=1e-6)
      ends = [gap.mean, gap.low, gap.high]
      assert ends == pytest.approx([expected[key] for key in ("mean", "low", "high")], abs=1e-6)


def test_what_the_text_says_of_few_frames_is_in_its_runs():
  """From the runs alone, but for the differences, which the table has from the counts."""
  text, found = " ".join(chapter("few_frames").split()), gaps("few_frames")
  folder = ROOT / "results/few_frames"
  trainings = {
    "scratch": "From scratch",
    "tuned": "Fine-tuned",
    "tuned_fdep": "Fine-tuned with FDEP",
  }
  untuned = json.loads((folder / "untuned/metrics.json").read_text())["light"]
  scores, runs = {}, {}
  for images in (20, 50, 200):
    for name, label in trainings.items():
      paths = [folder / f"runs/{name}{images}_seed{draw}/metrics.json" for draw in range(3)]
      runs[name, images] = [json.loads(path.read_text())["light"] for path in paths]
      scores[name, images] = [100 * run["hse"] for run in runs[name, images]]
      values = (*scores[name, images], statistics.fmean(scores[name, images]))
      assert f"| {images} | {label} | {' | '.join(f'{v:.2f}' for v in values)} |" in text
  for name, other in (("tuned", "scratch"), ("tuned_fdep", "tuned")):
    cells = []
    for images in (20, 50, 200):
      gap = found[f"{name}{images} − {other}{images}, 3 seeds", "hse"]
      pairs = zip(scores[name, images], scores[other, images], strict=True)
      assert gap["by_seed"] == pytest.approx([a - b for a, b in pairs], abs=0.02)
      assert t_interval(gap)[0] < 0 < t_interval(gap)[1]
      ends = f"({signed(*t_interval(gap))}; {signed(gap['low'], gap['high'])})"
      cells.append(f"{signed(gap['mean'])} {ends}")
    assert f"| {trainings[name]} − {trainings[other]} | {' | '.join(cells)} |" in text
  for images, claim in ((50, "HSE differs by {} on average, and by {}, {} and {} by draw."),
                        (20, "it differs by {}, and by {}, {} and {}.")):  # fmt: skip
    gap = found[f"tuned{images} − scratch{images}, 3 seeds", "hse"]
    assert claim.format(*map(signed, (gap["mean"], *gap["by_seed"]))) in text
  assert "ahead with all three draws" in text
  assert min(found["tuned200 − scratch200, 3 seeds", "hse"]["by_seed"]) > 0
  apart = max(max(values) - min(values) for values in scores.values())
  assert f"lie up to {apart:.0f} points apart" in text
  assert sum(scores["tuned", 20]) < sum(scores["tuned", 50]) < sum(scores["tuned", 200])
  ious = [statistics.fmean(100 * run["iou"] for run in runs["tuned", n]) for n in (20, 50, 200)]
  assert "IoU falls ({:.2f}, {:.2f}, {:.2f})".format(*ious) in text
  assert ious == sorted(ious, reverse=True)
  assert "because they have more false alarms" in text
  fas = [sum(run["fa"] for run in runs["tuned", n]) for n in (20, 50, 200)]
  assert fas == sorted(fas)
  means = [statistics.fmean(scores[name, 20]) for name in trainings]
  start, end = f"{100 * untuned['hse']:.0f}", f"about {statistics.fmean(means):.0f}"
  training = " ".join((ROOT / "docs/training.md").read_text().split())
  assert f"has HSE {start} to 26 on the new camera." in text and f"give HSE {end}, from" in text
  assert f"had HSE {start}, and {end} after training on 20 images" in training


def test_what_the_text_says_of_the_network_before_fine_tuning_is_in_its_files():
  text, folder = " ".join(chapter("few_frames").split()), ROOT / "results/few_frames"
  before = json.loads((folder / "untuned/metrics.json").read_text())
  pretraining = json.loads((folder / "pretraining/metrics.json").read_text())
  paths = sorted(folder.glob("runs/*/metrics.json"))
  metrics = [json.loads(path.read_text()) for path in paths]
  assert {m["test_sha256"] for m in metrics} == {before["test_sha256"]}
  assert before["checkpoint"] == pretraining["checkpoint"] and before["data"] == "data/IRSTD-1K"
  config = sirst3_cpu.get_config()
  config.model.backbone, config.data.root, config.train.steps = "acm", "data/NUAA-NUDT", 2950
  expected = json.loads(json.dumps(settings.as_dict(config)))
  assert json.loads((folder / "pretraining/config.json").read_text()) == expected
  runs = {path.parent.name: m["light"] for path, m in zip(paths, metrics, strict=True)}
  assert len(runs) == 27
  light, scores = before["light"], [run["hse"] for run in runs.values()]
  assert light["hse"] < min(scores) and light["iou"] < min(run["iou"] for run in runs.values())
  last = f"the last one has {100 * before['last']['light']['hse']:.2f})"
  best = f"{100 * light['hse']:.2f} (checkpoint {before['checkpoint']}, the best on its own"
  assert f"{best} held-out images; {last}, the lowest of the 27 is {100 * min(scores):.2f}." in text
  assert [run["pd"] < light["pd"] for run in runs.values()].count(True) == 11
  assert [run["fa"] > light["fa"] for run in runs.values()].count(True) == 6
  assert "eleven of the 27 find fewer targets than it, and six have more false alarms" in text
  much = {name for name, run in runs.items() if run["iou"] < 0.26}
  assert max(runs[name]["iou"] for name in much) < 0.26 and len(much) == 7
  assert min(runs[name]["iou"] for name in {*runs} - much) > 0.3
  with_200 = {f"scratch200_seed{draw}" for draw in range(3)} | {"tuned200_seed1"}
  assert much == with_200 | {f"{kind}50_seed1" for kind in ("scratch", "tuned", "tuned_fdep")}
  assert (
    "Seven of the 27 trainings mark far too much, with an IoU of 25 to 26: the three from" in text
  )


SPOILING = {"XDU601": 149, "XDU774": 446}  # places in the train split of IRSTD-1K
SWAPPED = {  # folder -> what the text says of it
  "scratch50_draw1_without": "XDU601 and XDU774 taken out",
  "tuned50_draw1_without": "XDU601 and XDU774 taken out",
  "scratch50_draw0_XDU601": "XDU601 put in",
  "tuned50_draw0_XDU601": "XDU601 put in",
  "scratch50_draw0_XDU774": "XDU774 put in",
  "scratch50_draw0_XDU325": "XDU325 put in",
  "scratch50_draw0_XDU660": "XDU660 put in",
  "scratch50_draw0_XDU307": "XDU307 put in",
}


def test_the_trainings_that_mark_far_too_much_have_a_spoiling_image():
  count = {True: 0, False: 0}  # has a spoiling image -> trainings
  for path in (ROOT / "results/few_frames/runs").glob("*/metrics.json"):
    images, draw = map(int, re.search(r"(\d+)_seed(\d)", path.parent.name).groups())
    drawn = set(np.random.default_rng(draw).permutation(800)[:images])  # as `data.draw`
    spoilt = not drawn.isdisjoint(SPOILING.values())
    count[spoilt] += 1
    assert spoilt or json.loads(path.read_text())["light"]["iou"] > 0.3
  assert count == {True: 7 + 5, False: 15}
  text = " ".join(chapter("few_frames").split())
  assert "All seven have the image XDU601 or XDU774 in their draw. Five other trainings" in text
  assert "have one too; none of the fifteen without them marks far too much" in text


@pytest.mark.parametrize("name", SWAPPED)
def test_the_text_says_what_exchanged_images_change(name):
  kind, draw, _ = name.split("_")
  folder, seed = ROOT / "results/few_frames", int(draw[-1])
  label = {"scratch50": "From scratch", "tuned50": "Fine-tuned"}[kind]
  before = json.loads((folder / f"runs/{kind}_seed{seed}/metrics.json").read_text())
  after = json.loads((folder / f"swapped/{name}/metrics.json").read_text())
  assert after["test_sha256"] == before["test_sha256"]
  scores = [
    [f"{100 * found['light'][metric]:.2f}" for metric in ("iou", "hse")]
    for found in (before, after)
  ]
  cells = [f"draw {seed}", label, *scores[0], SWAPPED[name], *scores[1]]
  assert f"| {' | '.join(cells)} |" in chapter("few_frames")
  if name[-6:] in ("XDU660", "XDU307"):  # ordinary ones
    drop = 100 * (before["light"]["hse"] - after["light"]["hse"])
    assert round(drop) == {"XDU660": 2, "XDU307": 6}[name[-6:]]
    assert "lowers HSE by 2 and by 6." in chapter("few_frames")
  # Nothing but the images differs.
  ours = json.loads((folder / f"swapped/{name}/config.json").read_text())
  theirs = json.loads((folder / f"runs/{kind}_seed{seed}/config.json").read_text())
  for config in (ours, theirs):
    del config["data"]["root"], config["data"]["train_images"], config["log"]["progress"]
  assert ours == theirs
  if "draw0_XDU601" in name:
    rounded = [f"{float(hse):.0f}" for _, hse in scores]
    training = " ".join((ROOT / "docs/training.md").read_text().split())
    assert f"from {rounded[0]} to {rounded[1]} in a " in training


@pytest.mark.slow  # needs the dataset
@pytest.mark.parametrize("name", SWAPPED)
def test_an_exchanged_list_is_a_draw_but_for_these_images(name, shared):
  split = (shared / "data/IRSTD-1K/splits/train.txt").read_text().split()
  assert {image: split.index(image) for image in SPOILING} == SPOILING and len(split) == 800
  seed = int(name.split("_")[1][-1])
  drawn = [split[i] for i in np.random.default_rng(seed).permutation(800)[:50]]
  ours = (ROOT / f"results/few_frames/swapped/{name}/train.txt").read_text().split()
  assert len({*ours}) == 50
  changed = {*ours} ^ {*drawn}
  meant = {*SPOILING} if name.endswith("without") else {name[-6:]}
  assert meant <= changed and len(changed) == 2 * len(meant)
  assert (meant <= {*drawn}) == name.endswith("without")


@pytest.mark.slow  # needs the dataset
def test_the_text_says_how_large_the_masks_of_the_exchanged_images_are(shared):
  largest = {}
  for sample in data.load(shared / "data/IRSTD-1K", "train"):
    label, _ = ndimage.label(sample.mask, np.ones((3, 3)))
    largest[sample.name] = np.bincount(label.ravel())[1:].max()
  text = " ".join(chapter("few_frames").split())
  assert f"The mask of XDU601 has {largest['XDU601']} pixels" in text
  assert f"that of XDU774 has {largest['XDU774']} and" in text
  assert f"XDU325 has a mask of {largest['XDU325']} pixels" in text
  median = f"{statistics.median(largest.values()):.0f}"
  assert f"median of the 800 train images, the largest target has {median} pixels." in text
  training = " ".join((ROOT / "docs/training.md").read_text().split())
  assert f"has {largest['XDU601']} pixels (the median is {median})" in training


def test_the_figure_of_few_frames_is_drawn_from_its_table(tmp_path):
  folder = ROOT / "results/few_frames"
  (tmp_path / "untuned").mkdir()
  for name in ("table.json", "untuned/metrics.json"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  drawn = few_frames.draw(tmp_path)
  with Image.open(drawn) as ours, Image.open(folder / "curve.png") as committed:
    assert ours.size == committed.size and len(ours.getcolors(1 << 20)) > 10


COUNTED = sorted(ROOT.glob("results/**/counts.npz"))


@pytest.mark.parametrize("path", COUNTED, ids=lambda path: path.parent.name)
def test_the_committed_counts_are_those_of_the_metrics_beside_them(path):
  metrics = json.loads((path.parent / "metrics.json").read_text())
  run = sweep.Run(None, 0, None, path.parent, None)
  found = figures.counts(run)  # refuses a file of another evaluation
  scores = hse.rates({n: v.sum(0) for n, v in vars(found.counts).items()}, found.options)
  for name, value in scores.items():
    assert metrics[metrics["deployed"]][name] == pytest.approx(float(value), rel=1e-12)


def test_committed_intervals_are_computed_again_from_the_counts():
  folder = ROOT / "results/classical/runs/fkrw-published-NUAA-SIRST"
  counts = per_image.load(folder / "counts.npz")["light"]
  printed = json.loads((folder / "metrics.json").read_text())["light"]["intervals"]
  for name, (low, high) in bootstrap.intervals(counts).items():
    assert printed[name] == pytest.approx([low, high], rel=1e-9), name


CLASSICAL = (ROOT / "results/classical/README.md").read_text()
COLUMNS = dict.fromkeys(("iou", "niou", "pd", "fa", "hse_p", "hse_t", "hse"), 100) | {"fa": 1e6}


def classical_rows() -> dict[tuple[str, str], tuple[list[str], list[str]]]:
  """Returns (method, set) -> the cells of the paper's row and of ours, as they are printed."""
  rows = re.findall(
    r"^\| (\w+) \| ([\w-]+) \| paper \| (.*) \|\n\| \| \| ours \| (.*) \|$", CLASSICAL, re.M
  )
  assert len(rows) == 3 * 4
  return {(m, where): (paper.split(" | "), ours.split(" | ")) for m, where, paper, ours in rows}


def test_the_rows_of_the_methods_without_training_are_those_of_their_runs():
  for (method, where), (_, cells) in classical_rows().items():
    name = {"FKRW": "fkrw-published"}.get(method, method.lower())
    path = ROOT / f"results/classical/runs/{name}-{where}/metrics.json"
    found = json.loads(path.read_text())["light"]
    assert cells == [f"{found[key] * scale:.2f}" for key, scale in COLUMNS.items()]


def test_the_papers_rows_of_the_methods_without_training_are_the_papers():
  paper = json.loads((ROOT / "configs/tables/paper.json").read_text())
  known = {("SIRST3", row["method"]): row for row in paper["tableS3"]} | {
    (where, row["method"]): row[where] for row in paper["tableS4"] for where in row if "-" in where
  }
  for (method, where), (cells, _) in classical_rows().items():
    row = known[where, method]
    keys = ("fa_1e6" if key == "fa" else key for key in COLUMNS)
    assert cells == [f"{row[key]:.2f}" if key in row else "" for key in keys], (method, where)


def test_what_the_text_says_of_the_methods_without_training_is_in_their_rows():
  rows = {
    key: {
      column: (float(theirs), float(ours))
      for column, theirs, ours in zip(COLUMNS, paper, cells, strict=True)
      if theirs
    }
    for key, (paper, cells) in classical_rows().items()
  }
  text = " ".join(CLASSICAL.split())

  def gap(where: str, column: str) -> str:
    theirs, ours = rows["NIPPS", where][column]
    return f"{ours - theirs:+.1f}".replace("-", "−")

  assert "Pd is the paper's to the last digit where it is printed above" in text
  assert all(r["pd"][0] == r["pd"][1] for (method, _), r in rows.items() if method == "FKRW")
  mpcm = rows["MPCM", "NUAA-SIRST"]
  assert "IoU and HSE-P are far below the paper's on NUAA-SIRST and HSE-T far above" in text
  gaps = {column: ours - theirs for column, (theirs, ours) in mpcm.items()}
  assert gaps["iou"] < -10 and gaps["hse_p"] < -10 and gaps["hse_t"] > 10
  sets = [where for method, where in rows if method == "NIPPS"]
  found = "; ".join(
    f"{name} {', '.join(gap(where, key) for where in sets)}"
    for name, key in (("IoU", "iou"), ("Pd", "pd"), ("HSE-P", "hse_p"), ("HSE-T", "hse_t"))
  )
  assert f"Ours minus the paper's on {', '.join(sets[:-1])} and {sets[-1]}: {found}." in text


def test_the_readme_says_how_many_targets_the_methods_find():
  def pd(run: str) -> int:
    found = json.loads((ROOT / f"results/{run}/metrics.json").read_text())
    return round(100 * found[found["deployed"]]["pd"])

  methods = [pd(f"classical/runs/{name}-SIRST3") for name in ("fkrw-published", "mpcm", "nipps")]
  readme = " ".join((ROOT / "README.md").read_text().split())
  claim = f"find {min(methods)} to {max(methods)} % of the targets, `zoo:acm` "
  assert f"{claim}{pd('sirst3_cpu/runs/acm-fdep_seed2')} %" in readme


def test_the_text_says_which_runs_have_counts():
  tables = ("few_frames", "sirst3_cpu", "zoo")
  trained = [p.parent for p in COUNTED if p.parents[2].name in tables]
  runs = [p.parent for name in tables for p in ROOT.glob(f"results/{name}/runs/*/config.json")]
  assert trained == sorted(runs)
  others = [p for p in COUNTED if p.parent not in trained]
  assert len(others) == 12 and sum(p.stat().st_size for p in others) < 9e5
  assert max((folder / "counts.npz").stat().st_size for folder in trained) < 3e5
  assert not list(ROOT.glob("results/nuaa_cpu*/**/counts.npz"))
  text = " ".join(TEXT.split())
  assert "The nine trained runs of `nuaa_cpu` and the two others of `nuaa_cpu_choices`" in text


def committed_table() -> dict:
  return json.loads((ROOT / "results/nuaa_cpu/table.json").read_text())
