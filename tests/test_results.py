"""The committed results are what their tables' configs make of their committed runs."""

import importlib
import json
import pathlib
import re
import statistics

import pytest

from fdep_jax.tables import experiments, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = [path.parent.name for path in sorted(ROOT.glob("results/*/table.json"))]
TEXT = (ROOT / "results/README.md").read_text()


def collected(name: str) -> tuple[experiments.Table, list[table.Result]]:
  found = experiments.load(ROOT / f"configs/tables/{name}.py")
  start = importlib.import_module(f"configs.tables.{name}").get_config()
  return found, table.collect(found, start, ROOT / "results" / name / "runs")


def test_there_are_results():
  assert "nuaa_cpu" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_of_todays_config_and_in_the_table(name):
  found, results = collected(name)
  assert not any(result.why for result in results)  # none is missing, none of another config
  committed = json.loads((ROOT / "results" / name / "table.json").read_text())
  comparisons = committed.pop("paired")
  assert committed == json.loads(json.dumps(table.as_json(found, results)))
  page = (ROOT / "results" / name / "table.md").read_text()
  lines = table.markdown(found, results).splitlines()
  assert set(lines) <= set(page.splitlines())
  for comparison, metrics in comparisons.items():
    assert comparison in page and all(f"{gap['mean']:+.2f}" in page for gap in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_number_in_the_text_is_in_its_table(name):
  """Every number of two decimals in the chapter on a table is a number of the table."""
  chapter = TEXT.split(f"## `{name}`")[1].split("\n## ")[0].split("### Outcome")[1]
  committed = (ROOT / "results" / name / "table.json").read_text()
  known = {f"{float(n):.2f}" for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", committed)}
  for row in json.loads(committed)["rows"]:
    known |= {f"{statistics.fmean(v):.2f}" for v in row["main_branch"].values()}
  written = re.findall(r"[+−]?\d+\.\d\d", chapter)
  assert len(written) > 5
  assert {w.lstrip("+").replace("−", "-") for w in written} <= known


def test_the_readme_has_the_tables_means():
  page = (ROOT / "results/nuaa_cpu/table.md").read_text()
  readme = (ROOT / "README.md").read_text()
  written = re.findall(r"\d+\.\d\d ± \d+\.\d\d", readme)
  assert len(written) == 4 and all(f"| {mean} (3) |" in page for mean in written)
