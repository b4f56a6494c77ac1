"""Formats lists of problems for people: all kinds, and at most twenty lines of each."""

import re
from collections import Counter
from collections.abc import Iterable

MOST = 20  # lines of one kind


def shorten(problems: Iterable[str], most: int = MOST) -> list[str]:
  """Keeps the first `most` problems of each kind, and says how many more there are.

  Two problems are of one kind if they agree in the last three of their words of small letters, as
  names and paths mostly stand before them or have other characters.
  """
  problems = list(problems)
  number = Counter(map(_kind, problems))
  seen, lines = Counter(), []
  for problem in problems:
    kind = _kind(problem)
    seen[kind] += 1
    if seen[kind] <= most:
      lines.append(problem)
    elif seen[kind] == number[kind]:
      lines.append(f"… and {number[kind] - most} more of this kind")
  return lines


def _kind(problem: str) -> tuple[str, ...]:
  return tuple(word for word in problem.split() if re.fullmatch("[a-z]+[,;]?", word))[-3:]


def listing(what: str, problems: list[str]) -> str:
  """Formats problems with `what` as the text of one error."""
  number = len(problems)
  title = f"{number} problem{'s' * (number > 1)} with the {what}:"
  return "\n  ".join([title, *shorten(problems)])
