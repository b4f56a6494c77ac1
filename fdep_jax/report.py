"""Pictures of what a model finds."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from fdep_jax.data import Sample


def examples(
  path: pathlib.Path,
  samples: Sequence[Sample],
  maps: Sequence[dict[str, np.ndarray]],
  caption: str,
) -> None:
  """A PNG with a row an image: image, truth, and each branch's probability map.

  Args:
    path: to write.
    samples: the images.
    maps: for each of them {branch: H×W probabilities}.
    caption: a line below.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  names = [name for name in ("light", "main") if name in maps[0]]
  titles = ["image", "truth", *(f"{name} branch" for name in names)]
  figure = Figure(figsize=(2.2 * len(titles), 2.2 * len(samples) + 0.4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(len(samples), len(titles), squeeze=False)
  for row, sample, probs in zip(axes, samples, maps, strict=True):
    row[0].imshow(sample.image)
    row[1].imshow(sample.mask, cmap="gray", vmin=0, vmax=1)
    for axis, name in zip(row[2:], names, strict=True):
      axis.imshow(probs[name], cmap="gray", vmin=0, vmax=1)
  for row in axes:
    for axis in row:
      axis.set_xticks([])
      axis.set_yticks([])
  for axis, title in zip(axes[0], titles, strict=True):
    axis.set_title(title, fontsize=9)
  figure.supxlabel(caption, fontsize=8)
  partial = path.with_suffix(".partial")
  figure.savefig(partial, dpi=110, format="png")
  os.replace(partial, path)
