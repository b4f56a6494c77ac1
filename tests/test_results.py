"""The committed results are what their tables' configs make of their committed runs."""

import importlib
import json
import pathlib
import re
import statistics

import pytest

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


def signed(*values: float) -> str:
  return " … ".join(f"{value:+.2f}".replace("-", "−") for value in values)


def test_there_are_results():
  assert "nuaa_cpu" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_of_todays_config_and_in_the_table(name):
  found, results = collected(name)
  reasons = [result.why for result in results if result.why]
  assert all("not run, seed" in why for why in reasons)  # so no run is of another config
  assert bool(reasons) == ("(under way" in chapter(name).splitlines()[0])
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
  known |= {f"{end:.2f}" for gap in gaps(name).values() for end in t_interval(gap)}
  for row in json.loads(committed)["rows"]:
    known |= {f"{statistics.fmean(v):.2f}" for v in row["main_branch"].values()}
  for path in (ROOT / f"results/{name}/runs").glob("*/metrics.json"):
    newest = json.loads(path.read_text())["last"]
    known |= {f"{100 * newest[b]['hse']:.2f}" for b in ("light", "main") if b in newest}
  written = re.findall(r"[+−]?\d+\.\d\d", outcome)
  assert len(written) > 5
  assert {w.lstrip("+").replace("−", "-") for w in written} <= known


def test_the_readme_has_the_tables_means():
  readme = (ROOT / "README.md").read_text()
  written = re.findall(r"\d+\.\d\d ± \d+\.\d\d", readme)
  assert len(written) == 8
  for name, seeds, means in (("nuaa_cpu", 3, written[:4]), ("sirst3_cpu", 5, written[4:])):
    page = (ROOT / f"results/{name}/table.md").read_text()
    assert all(f"| {mean} ({seeds}) |" in page for mean in means)
  gap = gaps("sirst3_cpu")["acm-fdep − acm-original, 5 seeds", "hse"]
  claim = f"higher by {gap['mean']:.2f}, with a 95 % t interval over the five seeds of "
  assert claim + signed(*t_interval(gap)) in " ".join(readme.split())


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
  "acm-original": "ACM as published",
  "acm-fdep_wo_coisd": "FDEP w/o CO-ISD",
  "acm-fdep": "FDEP",
}


def test_the_study_says_the_scores_of_its_runs():
  """From the runs alone, so that the table is checked, too."""

  def hse_of(row: str, seed: int) -> float:
    path = ROOT / f"results/sirst3_cpu/runs/{row}_seed{seed}/metrics.json"
    metrics = json.loads(path.read_text())
    return 100 * metrics[metrics["deployed"]]["hse"]

  text = " ".join(chapter("sirst3_cpu").split())
  scores = {row: [hse_of(row, seed) for seed in range(5)] for row in SHORT}
  for row, values in scores.items():
    cells = " | ".join(f"{value:.2f}" for value in (*values, statistics.fmean(values)))
    assert re.search(rf"\| {re.escape(SHORT[row])}[^|]* \| {re.escape(cells)} \|", text), row
  pairs = zip(scores["acm-fdep"], scores["acm-original"], strict=True)
  differences = [ours - theirs for ours, theirs in pairs]
  low, high = bootstrap.t_interval(differences)
  assert f"differs by HSE {signed(statistics.fmean(differences))} on average." in text
  assert f"The 95 % t interval over the five seeds, {signed(low, high)}, holds 0." in text
  assert low < 0 < high < 75.81 - 68.05  # the gain of the paper
  assert sum(d > 0 for d in differences) == 4


def test_the_study_says_the_differences_of_its_table():
  text, found = chapter("sirst3_cpu"), gaps("sirst3_cpu")
  comparisons = sorted({comparison for comparison, _ in found if comparison.endswith("seeds")})
  assert comparisons
  for comparison in comparisons:
    row, baseline = comparison.split(", ")[0].split(" − ")
    parts = ("", ", NUAA-SIRST", ", NUDT-SIRST", ", IRSTD-1K")
    differences = [found[comparison + part, "hse"] for part in parts]
    cells = [f"{signed(gap['mean'])} ({signed(*t_interval(gap))})" for gap in differences]
    count = len(differences[0]["by_seed"])
    assert f"| {SHORT[row]} − {SHORT[baseline]} | {count} | {' | '.join(cells)} |" in text
  primary = found["acm-fdep − acm-original, 5 seeds", "hse"]
  image = signed(primary["low"], primary["high"])
  assert f"the 95 % interval of the same mean is {image}." in " ".join(text.split())


def test_the_study_says_which_intervals_hold_0():
  text, found = " ".join(chapter("sirst3_cpu").split()), gaps("sirst3_cpu")
  off = [key for key, gap in found.items() if t_interval(gap)[0] * t_interval(gap)[1] > 0]
  assert off == [("acm-fdep_wo_coisd − acm-original, 5 seeds, NUDT-SIRST", "fa_1e6")]
  ends = signed(*t_interval(found[off[0]]))
  assert f"Of the {len(found)} intervals one does not" in text
  assert f"(Fa {signed(found[off[0]]['mean'])}, {ends})" in text


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


def test_the_text_says_which_runs_have_counts():
  trained = [p.parent for p in COUNTED if "sirst3_cpu" in p.parts]
  assert trained == sorted(p.parent for p in ROOT.glob("results/sirst3_cpu/runs/*/config.json"))
  others = [p for p in COUNTED if p.parent not in trained]
  assert len(others) == 12 and sum(p.stat().st_size for p in others) < 9e5
  assert max((folder / "counts.npz").stat().st_size for folder in trained) < 3e5
  assert not list(ROOT.glob("results/nuaa_cpu*/**/counts.npz"))
  text = " ".join(TEXT.split())
  assert "The nine trained runs of `nuaa_cpu` and the two others of `nuaa_cpu_choices`" in text


def committed_table() -> dict:
  return json.loads((ROOT / "results/nuaa_cpu/table.json").read_text())
