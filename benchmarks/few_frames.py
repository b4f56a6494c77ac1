"""Draws how HSE and IoU grow with the number of labelled images (configs/tables/few_frames.py).

  python -m benchmarks.few_frames results/few_frames

A dot is one draw of the images; a line joins the means of a training. The dashed line is the
network before fine-tuning.
"""

import json
import pathlib
import sys

from fdep_jax.report import plots


def draw(folder: pathlib.Path) -> pathlib.Path:
  """Draws `table.json`, whose labels are (number of images, training), and `untuned/metrics.json`.

  Returns:
    The `curve.png` that it wrote.
  """
  table = json.loads((folder / "table.json").read_text())
  untuned = json.loads((folder / "untuned/metrics.json").read_text())
  made, axes = plots.figure(1, 2, (9, 3.6))
  trainings = list(dict.fromkeys(row["label"][1] for row in table["rows"]))
  for metric, name, axis in zip(("hse", "iou"), ("HSE", "IoU"), axes, strict=True):
    for number, training in enumerate(trainings):
      rows = [row for row in table["rows"] if row["label"][1] == training]
      counts = [int(row["label"][0]) for row in rows]
      cells = [row["cells"][metric] for row in rows]
      axis.plot(counts, [cell["mean"] for cell in cells], color=f"C{number}", label=training)
      for count, cell in zip(counts, cells, strict=True):
        beside = count * 1.04 ** (number - 1)  # so that no training hides another
        axis.plot([beside] * len(cell["ours"]), cell["ours"], ".", color=f"C{number}")
    before = 100 * untuned[untuned["deployed"]][metric]
    axis.axhline(before, color="grey", ls="--", label="Not fine-tuned")
    axis.set(xscale="log", xlabel="labelled images of IRSTD-1K", ylabel=f"{name} (%)")
    ticks = sorted({int(row["label"][0]) for row in table["rows"]})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0)
  axes[0].legend()
  return plots.save(made, folder / "curve.png")


if __name__ == "__main__":
  print(draw(pathlib.Path(sys.argv[1])))
