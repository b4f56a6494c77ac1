"""Applies each mutant to a copy of the repository and runs the tests that must notice it.

  make mutants                              # all; leaves mutants.json
  python tests/mutants/run.py losses.py     # those whose name or file contains a word

The named tests first run on the unchanged copy, where they must pass. A mutant is killed if one of
its tests fails. A survivor is a gap in the tests: write the test, or show that the mutant changes
nothing and remove it.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from tests.mutants.patches import MUTANTS, Mutant  # noqa: E402

TIMEOUT = 900  # seconds for the tests of one mutant; a mutant that hangs is noticed, too


def copy(folder: pathlib.Path) -> pathlib.Path:
  """Copies every file that git knows or does not ignore."""
  listed = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "-z"],
    cwd=ROOT, check=True, capture_output=True, text=True,
  )  # fmt: skip
  for name in filter(None, listed.stdout.split("\0")):
    if (ROOT / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, folder / name)
  return folder


def run_tests(folder: pathlib.Path, tests) -> str:
  """Runs tests in a copy; returns "passed", "failed", "timeout", or the end of the output."""
  # Compiled files are recognised by their time in seconds, which two mutants may share.
  shared = os.environ.get("FDEP_SHARED", str(ROOT.parent / "shared"))
  environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "FDEP_SHARED": shared}
  command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
  try:
    done = subprocess.run(
      [*command, *tests], cwd=folder, env=environment, capture_output=True, text=True,
      timeout=TIMEOUT,
    )  # fmt: skip
  except subprocess.TimeoutExpired:
    return "timeout"
  return {0: "passed", 1: "failed"}.get(done.returncode, (done.stdout + done.stderr)[-800:])


def judge(mutant: Mutant, folder: pathlib.Path) -> str:
  """Returns "killed", "survived", "timeout", or the reason why its tests could not run."""
  path = folder / mutant.file
  text = path.read_text()
  path.write_text(mutant.applied(text))
  try:
    found = run_tests(folder, mutant.tests)
  finally:
    path.write_text(text)
  return {"failed": "killed", "passed": "survived"}.get(found, found)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("words", nargs="*", help="only mutants with one of these in name or file")
  parser.add_argument("--jobs", type=int, default=2, help="mutants at once, each in its own copy")
  parser.add_argument("--out", default="mutants.json", help="the verdicts")
  options = parser.parse_args()
  chosen = [
    m for m in MUTANTS if not options.words or any(w in f"{m.name} {m.file}" for w in options.words)
  ]
  verdicts = {}
  with tempfile.TemporaryDirectory() as temporary:
    copies = queue.Queue()
    for i in range(options.jobs):
      copies.put(copy(pathlib.Path(temporary) / str(i)))
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    print(f"{len(tests)} tests on the unchanged code …", flush=True)
    folder = copies.get()
    before = run_tests(folder, tests)
    copies.put(folder)
    if before != "passed":
      print(f"They must pass before anything is changed:\n{before}")
      return 2

    def one(mutant: Mutant) -> tuple[str, float]:
      folder, begin = copies.get(), time.time()
      try:
        return judge(mutant, folder), time.time() - begin
      finally:
        copies.put(folder)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
      for mutant, (verdict, seconds) in zip(chosen, pool.map(one, chosen), strict=True):
        verdicts[mutant.name] = verdict
        print(f"{verdict.splitlines()[0][:40]:<10} {seconds:5.0f} s  {mutant.name}", flush=True)
  pathlib.Path(options.out).write_text(json.dumps(verdicts, indent=1) + "\n")
  left = [name for name, verdict in verdicts.items() if verdict not in ("killed", "timeout")]
  print(f"{len(verdicts)} mutants, {len(left)} not killed", *left, sep="\n  ")
  return 1 if left else 0


if __name__ == "__main__":
  sys.exit(main())
