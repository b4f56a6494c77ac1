"""The list of mutants fits the code; `make mutants` runs it."""

import ast
import collections

from helpers import ROOT

from tests.mutants.patches import MUTANTS


def test_every_mutant_fits_its_file_and_changes_it():
  for mutant in MUTANTS:
    text = (ROOT / mutant.file).read_text()
    changed = mutant.applied(text)
    assert changed != text
    ast.parse(changed)


def test_every_mutant_has_a_name_of_its_own_and_tests_that_exist():
  counts = collections.Counter(mutant.name for mutant in MUTANTS)
  assert len(MUTANTS) >= 60 and max(counts.values()) == 1
  for mutant in MUTANTS:
    assert mutant.tests
    for test in mutant.tests:
      path, _, name = test.partition("::")
      text = (ROOT / path).read_text()
      assert not name or f"def {name}(" in text, test
