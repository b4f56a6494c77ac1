"""Compares the documents with the code: choices, files, modes, flags, settings."""

import ast
import collections
import pathlib
import re

from configs import base
from fdep_jax import cli, settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES.append(ROOT / "results/README.md")
TEXT = "\n".join(page.read_text() for page in PAGES)


def test_every_choice_in_the_code_is_listed_and_no_other():
  files = [ROOT / "main.py"]
  for folder in ("configs", "converters", "fdep_jax"):
    files += ROOT.glob(f"{folder}/**/*.py")
  marked = collections.Counter()
  for file in files:
    # Comments and docstrings break lines anywhere; "marked OUR CHOICE" tells of the mark.
    words = re.sub(r"[\s#]+", " ", file.read_text())
    number = len(re.findall(r"(?<!marked )OUR CHOICE", words))
    marked[file.relative_to(ROOT).as_posix()] = number
  listed = re.findall(r"^\| `([^`]+\.py)` \|", (ROOT / "docs/choices.md").read_text(), re.MULTILINE)
  assert +marked == collections.Counter(listed)


def test_links_lead_to_files():
  for page in PAGES:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
      assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)
  for name in re.findall(r"`((?:configs|docs|fdep_jax|tests|benchmarks)/[\w/]+\.\w+)`", TEXT):
    assert (ROOT / name).exists(), name


def test_every_place_that_the_paper_is_compared_with_exists():
  page = (ROOT / "docs/paper.md").read_text()
  rows = [line for line in page.splitlines() if re.match(r"\| (\d|D)", line)]
  assert len(rows) > 30
  for row in rows:
    sentence, here = row.split(" | ")[1:3]
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", here)
    assert sentence and places, row
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", row):
      body = ast.parse((ROOT / file).read_text()).body
      for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        assert found, f"{file}: {name}"
        body = found[0].body
  # Every equation and every section of the method has its row.
  numbered = set()
  for first, last in re.findall(r"^\| 3\.\d, eq\. (\d+)(?:–(\d+))?", page, re.MULTILINE):
    numbered |= set(range(int(first), int(last or first) + 1))
  assert numbered == set(range(1, 13))


def test_modes_flags_and_settings_exist():
  known = set(settings.flat(base.get_config()))
  assert set(re.findall(r"--mode (\w+)", TEXT)) - {"else"} <= set(cli.NEEDS)
  free = "train.schedule_args."  # differ between schedules
  given = {n for n in re.findall(r"--config\.([\w.]+)", TEXT) if not n.startswith(free)}
  assert given and given <= known
  sections = {name.split(".")[0] for name in known if "." in name}
  named = re.findall(rf"`((?:{'|'.join(sections)})\.\w+)(?:=[^`]*)?`", TEXT)
  assert named and {n for n in named if not n.endswith((".py", ".html"))} <= known
  commands = re.findall(r"(?:python main\.py|fdep) (--[^\n]*)", TEXT)
  flags = {f for c in commands for f in re.findall(r"--(\w+)", c)} - {"config"}
  assert commands and flags <= set(cli.program_flags())


def test_results_are_those_of_the_configs_headers():
  rows = re.findall(r"^\| `(configs/\w+\.py)`, (.*\d)", PAGES[0].read_text(), re.MULTILINE)
  assert rows
  for file, row in rows:
    header = (ROOT / file).read_text().split('"""')[1]
    assert set(re.findall(r"\d+\.\d\d", row)) <= set(re.findall(r"\d+\.\d\d", header)), file


def test_the_table_of_flags_is_that_of_the_program():
  text = (ROOT / "docs/training.md").read_text()
  for mode in cli.USES:
    needs, takes = re.search(rf"^\| `{mode}` \| (.*) \| (.*) \|$", text, re.MULTILINE).groups()
    assert re.findall(r"--(\w+)", needs) == [*cli.NEEDS[mode]]
    assert re.findall(r"--(\w+)", takes) == [*cli.TAKES[mode]]
