"""Defines the paper's columns for every table and report: headings, units and decimals."""

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
