"""Rules of the house that a program can check; CONTRIBUTING.md has the others."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Every package imports itself and those before it. The modules right in fdep_jax are one of them.
ORDER = [
  "configs",
  "fdep_jax.layers",
  "fdep_jax.runtime",
  "fdep_jax.zoo",
  "fdep_jax.metrics",
  "fdep_jax.data",
  "fdep_jax.classical",
  "fdep_jax.backbones",
  "fdep_jax.priors",
  "converters",
  "fdep_jax.report",
  "fdep_jax",
  "fdep_jax.predict",
  "fdep_jax.export",
  "fdep_jax.tables",
  "fdep_jax.cli",
  "configs.tables",
  "benchmarks",
  "main",
  "tests.toy_backbones",
  "tests.mutants",
  "tests.toy_priors",
  "tests.toy_priors.converters",
  "tests",
  "tests.golden",
]
FILES = [ROOT / "main.py"]
for _folder in ("configs", "fdep_jax", "converters", "benchmarks", "tests"):
  FILES += sorted(ROOT.glob(f"{_folder}/**/*.py"))
TREES, PACKAGES = {}, {}
for _path in (path.relative_to(ROOT) for path in FILES):
  _module = ".".join(_path.with_suffix("").parts).removesuffix(".__init__")
  TREES[_module] = ast.parse((ROOT / _path).read_text())
  PACKAGES[_module] = ".".join(_path.parent.parts) or _module


def known(name: str) -> str | None:
  """The module of this project that holds a dotted name, or is it."""
  while name:
    for found in (name, f"tests.{name}"):  # tests import their helpers without the folder's name
      if found in TREES:
        return found
    name = name.rpartition(".")[0]
  return None


def imports(module: str) -> list[tuple[str, str]]:
  """(what it imports, under which name), also inside functions."""
  found = []
  for node in ast.walk(TREES[module]):
    if isinstance(node, ast.Import | ast.ImportFrom):
      start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
      found += [(start + name.name, name.asname or name.name) for name in node.names]
  return [(name, alias) for name, alias in found if known(name)]


GRAPH = {module: {known(name) for name, _ in imports(module)} - {module} for module in TREES}


def test_private_names_stay_in_their_package():
  wrong = []
  for module, tree in TREES.items():
    used = [name for name, _ in imports(module)]
    if PACKAGES[module] != "tests":  # which import public names only, but look into what they test
      aliases = {alias: name for name, alias in imports(module) if name in TREES}
      for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
          used.append(f"{aliases[ast.unparse(node.value)]}.{node.attr}")
    for name in used:
      private = any(part.startswith("_") and part[-2:] != "__" for part in name.split("."))
      if private and PACKAGES[known(name)] != PACKAGES[module]:
        wrong.append(f"{module}: {name}")
  assert not wrong


def test_imports_have_no_circle_and_lead_to_earlier_packages():
  graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError
  assert {*PACKAGES.values()} == {*ORDER}, "ORDER has a place for each package, and for no other"
  place = {module: ORDER.index(package) for module, package in PACKAGES.items()}
  assert not [(a, b) for a, others in GRAPH.items() for b in others if place[b] > place[a]]


def test_docstrings_open_with_a_verb_or_a_noun():
  wrong = []
  for module, tree in TREES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        opening = (ast.get_docstring(node) or "").partition("\n")[0]
        if opening.partition(" ")[0].strip(".,:;") in ("What", "Of", "Ours"):
          wrong.append(f"{module}: {opening}")
  assert not wrong


def test_a_function_has_80_lines_at_most():
  """More only if it is a list of cases, which its docstring calls flat."""
  wrong = []
  for module, tree in TREES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 80:
        said = ast.get_docstring(node) or ""
        if "flat dispatch" not in said and "flat list" not in said:
          wrong.append(f"{module}.{node.name}")
  assert not wrong


def test_one_module_replaces_files():
  replace = {
    module
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename")
  }
  assert replace == {"fdep_jax.runtime.files"}


def test_tests_import_no_tests():
  tests = {module.removeprefix("tests.") for module in TREES if module.startswith("tests.test_")}
  wrong = {
    (a, b) for a, others in GRAPH.items() for b in others if b.removeprefix("tests.") in tests
  }
  for module, tree in TREES.items():
    for node in ast.walk(tree):  # also in programs that are strings
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        words = node.value.split()
        wrong |= {
          (module, b)
          for a, b in zip(words, words[1:], strict=False)
          if a in ("from", "import") and b in tests
        }
  assert not wrong


def test_few_tests_of_make_test_need_what_a_bare_clone_lacks():
  """Others take golden samples (`tests/golden`) or made data, or are marked slow."""
  need = []
  for module, tree in TREES.items():
    for node in tree.body if module.startswith("tests.test_") else ():
      if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        if "shared" in [a.arg for a in node.args.args] and "pytest.mark.slow" not in marks:
          need.append(node.name)
  assert 0 < len(need) <= 5, need
