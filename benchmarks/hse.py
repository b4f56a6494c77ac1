"""The metric side by side with the straightforward pipeline of sklearn and skimage."""

import numpy as np


def straightforward(probs, masks, thresholds=None, max_distance=3.0):
  """HSE-P, HSE-T and the conventional metrics as one would first write them.

  One `precision_recall_curve` over all pixels; `label` + `regionprops` at every threshold.
  """
  return {
    **straightforward_pixels(probs, masks),
    **straightforward_targets(probs, masks, thresholds),
  }


def straightforward_pixels(probs, masks):
  """HSE-P, and ROC-AUC, AP, precision, recall, F1 of pixels."""
  from sklearn import metrics as sk

  score = np.concatenate([p.ravel() for p in probs])
  true = np.concatenate([m.ravel() for m in masks])
  precision, recall, _ = sk.precision_recall_curve(true, score)
  positive = score > np.float32(0.5)
  return {
    "hse_p": sk.auc(recall, precision),
    "roc_auc": sk.roc_auc_score(true, score) if not true.all() else np.nan,
    "ap": sk.average_precision_score(true, score),
    "precision": sk.precision_score(true, positive, zero_division=0),
    "recall": sk.recall_score(true, positive),
    "f1": sk.f1_score(true, positive),
    "iou": sk.jaccard_score(true, positive, zero_division=0),
  }


def straightforward_targets(probs, masks, thresholds=None, max_distance=3.0):
  """HSE-T, and Pd, Fa, nIoU at 0.5."""
  from skimage import measure

  if thresholds is None:
    thresholds = [np.float32(k / 20) for k in range(1, 20)]
  points, out = [], {}

  def components(image):
    found = measure.regionprops(measure.label(image, connectivity=2))
    return [(np.array(f.centroid), f.area) for f in found]

  for tau in thresholds:
    hits = total = predicted = 0
    false_pixels, pixels, ious = 0, 0, []
    for prob, mask in zip(probs, masks, strict=True):
      above = prob > tau
      true, left = components(mask), components(above)
      total, predicted = total + len(true), predicted + len(left)
      for centroid, _ in true:
        for i, (other, _) in enumerate(left):
          if np.linalg.norm(other - centroid) < max_distance:
            hits += 1
            del left[i]
            break
      false_pixels += sum(area for _, area in left)
      pixels += mask.size
      union = (above | mask).sum()
      ious.append((above & mask).sum() / union if union else 0)
    points.append((hits / total, hits / predicted if predicted else 1.0))
    if tau == np.float32(0.5):
      out = {"pd": hits / total, "fa": false_pixels / pixels, "niou": np.mean(ious)}
  points.sort(key=lambda point: (point[0], -point[1]))
  points.insert(0, (0.0, points[0][1]))
  recall, precision = np.array(points).T
  out["hse_t"] = np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2)
  return out
