"""The check of a GPU (`make gpu`), as far as a CPU can try it."""

import math
import re
import sys

import gpu
import pytest


@pytest.fixture
def check(monkeypatch, capsys):
  """Runs the check with these words; returns what it prints and its exit code."""

  def run(*words):
    for name in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE"):
      monkeypatch.setenv(name, "0")  # or the check would set them beyond this test
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    try:
      gpu.main()
      code = 0
    except SystemExit as end:
      code = end.code
    return capsys.readouterr().out, code

  return run


def test_without_a_gpu_one_sentence_says_what_was_found_and_what_is_needed(check, monkeypatch):
  monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
  said, code = check()
  assert code == 0 and said.count("\n") == 1
  assert re.fullmatch(
    r"Skipped: jax [\d.]+ found only cpu and there is no nvidia-smi; this check needs an NVIDIA "
    r"GPU with its driver, and `\.venv/bin/pip install \"jax\[cuda13\]==[\d.]+\"`\.\n",
    said,
  )


@pytest.mark.parametrize("measured, answer", [(0.01, "yes"), (0.02, "yes"), (0.03, "no")])
def test_a_row_beyond_its_tolerance_ends_the_check_with_code_1(
  check, monkeypatch, measured, answer
):
  rows = [gpu.Row("one", 0, 0), gpu.Row("another", 0.02, measured)]
  monkeypatch.setattr(gpu, "parity", lambda name: rows)
  said, code = check("--platform", "cpu", "--networks", "acm", "--parts", "parity")
  assert "| one | 0 | 0 | yes |" in said
  assert f"| another | 0.02 | {measured} | {answer} |" in said
  assert code == (answer == "no")


def test_what_cannot_be_measured_is_not_ok(capsys):
  def fail():
    raise RuntimeError("out of memory")

  (row,) = gpu.measured({"one": 1e9}, fail)
  assert math.isnan(row.measured) and not row.ok
  assert "out of memory" in capsys.readouterr().err
