"""Defines the paper's columns for every table and report: headings, units and decimals."""

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
  """One column of a table."""

  heading: str
  key: str  # name in metrics.json, where metrics are fractions
  factor: float  # from metrics.json's unit to the column's
  decimals: int

  def shown(self, value: float | None) -> str:
    """Formats a value in metrics.json's unit; "-" if there is none."""
    return "-" if value is None else f"{value * self.factor:.{self.decimals}f}"

  def interval(self, ends: Sequence[float | None] | None) -> str:
    """Formats the two ends of an interval; "-" if there is none."""
    low, high = ends or (None, None)
    return "-" if low is None else f"{self.shown(low)}–{self.shown(high)}"


def counted(number: int, noun: str) -> str:
  """Returns "1 target", "2 targets"; the noun's plural ends in s."""
  return f"{number} {noun}{'s' * (number != 1)}"


def csv_text(text: str) -> str:
  """Returns a text that no spreadsheet runs as a formula, with an apostrophe in front if needed.

  Carriage returns become spaces: Python's csv writer does not quote them, so they would end a line.
  """
  mark = "'" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else ""
  return mark + text.replace("\r", " ")


METRICS = {  # by their names in the paper's tables (configs/tables/paper.json)
  "iou": Column("IoU", "iou", 100, 2),
  "niou": Column("nIoU", "niou", 100, 2),
  "pd": Column("Pd", "pd", 100, 2),
  "fa_1e6": Column("Fa·1e6", "fa", 1e6, 2),
  "hse_p": Column("HSE-P", "hse_p", 100, 2),
  "hse_t": Column("HSE-T", "hse_t", 100, 2),
  "hse": Column("HSE", "hse", 100, 2),
}
COSTS = {
  "params_m": Column("P (M)", "params", 1e-6, 2),
  "flops_g": Column("GFLOPs", "flops", 1e-9, 2),
  "time_s": Column("Time (s)", "seconds_per_image", 1, 3),
}
