"""Makes and saves figures without a display."""

import pathlib

from fdep_jax.runtime import files


def figure(rows: int, columns: int, size: tuple[float, float], **options):
  """Makes a figure of `size` inches and its axes, as `Figure.subplots` returns them."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(made)
  return made, made.subplots(rows, columns, **options)


def save(made, path: pathlib.Path, dpi: int = 110) -> pathlib.Path:
  """Writes a figure as PNG, whole or not at all; returns `path`."""
  with files.replacing(path) as partial:
    made.savefig(partial, dpi=dpi, format="png")
  return path


def precision_recall(axes, score, label: str = "") -> None:
  """Draws the pixel and the target precision-recall curve of a `hse.Score` into two axes."""
  import numpy as np

  curves = score.curves
  true, false = curves["pixel_true"], curves["pixel_false"]
  recall = np.append(0, true / max(score.target_pixels, 1))
  precision = np.append(1, true / np.maximum(true + false, 1))
  prefix = f"{label}: " if label else ""
  axes[0].plot(recall, precision, lw=1, label=f"{prefix}{100 * score.hse_p:.2f}")
  axes[1].plot(
    curves["target_recall"], curves["target_precision"], lw=1, marker=".",
    label=f"{prefix}{100 * score.hse_t:.2f}",
  )  # fmt: skip
  for axis, title in zip(axes, ("pixels: HSE-P", "targets: HSE-T"), strict=True):
    axis.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
