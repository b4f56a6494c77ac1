"""Checks the folder that --out names, before anything is computed."""

import json
import os
import pathlib
from collections.abc import Iterable


def check(
  out: str | os.PathLike, record: dict[str, dict], sources: Iterable[str | os.PathLike] = ()
) -> None:
  """Refuses a folder that cannot be written, or whose results these would replace.

  Results of the same record are replaced.

  Args:
    out: the folder.
    record: what `metrics.json` will say of the inputs, {key: {name: value}}.
    sources: folders that are read, in which nothing may be written.

  Raises:
    ValueError: says to name another folder.
  """
  out = pathlib.Path(out).expanduser()
  place = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.lexists(p))
  if not place.is_dir():
    raise ValueError(f"--out {out}: {place} is a file. Name a folder.")
  if not os.access(place, os.W_OK):
    raise ValueError(f"--out {out}: {place} is not writable. Name a different folder.")
  for source in sources:
    if out.resolve() == pathlib.Path(source).expanduser().resolve():
      raise ValueError(f"--out {out} is a folder that is read. Name a different one for results.")
  found = _read(out / "metrics.json")
  if found is None or all(found.get(key) == value for key, value in _plain(record).items()):
    return
  of = [
    f"{name} {old[name]}"
    for key, new in _plain(record).items()
    if isinstance(old := found.get(key), dict)
    for name in old
    if old[name] != new.get(name)
  ]
  raise ValueError(
    f"--out {out} holds results of {', '.join(of) or 'other inputs'}, which these would replace. "
    "Name a different folder, or remove that one."
  )


def check_table(out: str | os.PathLike, names: Iterable[str]) -> None:
  """Refuses a folder whose `metrics.json` is not a table of some of these names.

  Raises:
    ValueError: says to name another folder.
  """
  path = pathlib.Path(out).expanduser() / "metrics.json"
  lost = sorted((_read(path) or {}).keys() - set(names))
  if lost:
    raise ValueError(
      f"{path} holds {', '.join(lost)}, which these results would replace. Name a different --out."
    )


def _plain(value):
  """Returns a value as JSON gives it back."""
  return json.loads(json.dumps(value))


def _read(path: pathlib.Path) -> dict | None:
  """Returns the content of a JSON file, {} if it is of another form, None if there is none."""
  try:
    found = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}
