"""Shows why ROC-AUC misleads under extreme imbalance, with two made-up detectors.

Source: paper §4.5, Fig. 4.

  python -m benchmarks.why_not_roc docs/why_not_roc.png

Case I finds every target, but four times as many background pixels as target pixels are equally
bright. Case II has no false alarms, but one target pixel in 25 is as dark as the background.
"""

import pathlib
import sys

import numpy as np


def cases(images=20, size=256, seed=0):
  """Makes both cases: ({"I": maps, "II": maps}, masks)."""
  rng = np.random.default_rng(seed)
  masks, many_false, few_missed = [], [], []
  for _ in range(images):
    mask = blobs(rng, 3, size)
    clutter = blobs(rng, 12, size) & ~mask
    background = rng.random((size, size)) * 0.04
    first, second = background.copy(), background.copy()
    first[mask] = rng.uniform(0.96, 1, mask.sum())
    first[clutter] = rng.uniform(0.96, 1, clutter.sum())
    second[mask] = np.where(
      rng.random(mask.sum()) < 0.04, rng.random(mask.sum()) * 0.04, rng.uniform(0.96, 1, mask.sum())
    )
    masks.append(mask)
    many_false.append(first.astype(np.float32))
    few_missed.append(second.astype(np.float32))
  return {"I": many_false, "II": few_missed}, masks


def blobs(rng, number, size):
  """Draws a mask of `number` discs of radius 1.5 to 3 pixels."""
  row, col = np.ogrid[:size, :size]
  mask = np.zeros((size, size), bool)
  for _ in range(number):
    r, c = rng.integers(5, size - 5, 2)
    mask |= (row - r) ** 2 + (col - c) ** 2 <= rng.uniform(1.5, 3) ** 2
  return mask


def scores():
  """Computes {case: hse.Score}."""
  from fdep_jax.metrics import hse

  maps, masks = cases()
  return {name: hse.score(probs, masks) for name, probs in maps.items()}


def figure(path):
  """Draws an image of each case and its three curves, and returns the scores."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  maps, masks = cases()
  found = scores()
  drawing = Figure(figsize=(12, 6.2), layout="constrained")
  FigureCanvasAgg(drawing)
  axes = drawing.subplots(2, 3)
  for axis, (name, title) in zip(
    axes[0],
    [("I", "Case I: many false alarms"), ("II", "Case II: a few dark pixels")],
    strict=False,
  ):
    axis.imshow(maps[name][0], cmap="gray", vmin=0, vmax=1)
    axis.contour(masks[0], levels=[0.5], colors="tab:red", linewidths=0.7)
    axis.set_title(title)
  axes[0, 2].axis("off")
  lines = [f"{'':10}{'case I':>10}{'case II':>10}"]
  for key, label in (
    ("roc_auc", "ROC-AUC"),
    ("hse_p", "HSE-P"),
    ("hse_t", "HSE-T"),
    ("hse", "HSE"),
    ("iou", "IoU"),
  ):
    lines.append(f"{label:10}" + "".join(f"{getattr(found[n], key):10.4f}" for n in found))
  axes[0, 2].text(0, 0.5, "\n".join(lines), family="monospace", va="center", fontsize=12)
  for name, score in found.items():
    curves = score.curves
    true, false = curves["pixel_true"], curves["pixel_false"]
    recall = np.append(0, true / score.target_pixels)
    label = f"case {name}"
    rate = np.append(0, false / curves["pixel_negatives"])
    axes[1, 0].plot(np.append(rate, 1), np.append(recall, 1), label=label)
    axes[1, 1].plot(recall, np.append(1, true / (true + false)), label=label)
    axes[1, 2].plot(curves["target_recall"], curves["target_precision"], marker=".", label=label)
  axes[1, 0].set(title="ROC, pixels", xlabel="false-positive rate", ylabel="true-positive rate")
  axes[1, 1].set(title="precision-recall, pixels (HSE-P)", xlabel="recall", ylabel="precision")
  axes[1, 2].set(title="precision-recall, targets (HSE-T)", xlabel="recall", ylabel="precision")
  for axis in axes[1]:
    axis.set(xlim=(-0.02, 1.02), ylim=(0, 1.05))
    axis.grid(alpha=0.3)
    axis.legend(loc="center right")
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  drawing.savefig(path, dpi=110)
  return found


def main():
  if len(sys.argv) != 2:
    raise SystemExit("usage: python -m benchmarks.why_not_roc FIGURE.png")
  for name, score in figure(sys.argv[1]).items():
    print(f"case {name}: ROC-AUC {score.roc_auc:.4f}  HSE {score.hse:.4f}  IoU {score.iou:.4f}")


if __name__ == "__main__":
  main()
