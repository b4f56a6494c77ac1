"""Compares our metrics with a straightforward pipeline of sklearn and skimage, in one run.

  python -m benchmarks.hse --data DATA --checkpoint acm_sirst3_1channel.pth.tar --maps maps
  python -m benchmarks.hse --maps MAPS --masks MASKS

The first makes the maps with a public ACM (XinyiYing/LESPS) for the test splits of
DATA/NUAA-SIRST and DATA/NUDT-SIRST and keeps them in --maps. The second takes any maps and masks,
matched by stem. --jitted adds the jitted route on a canvas, --tpu v5e:2x2 its cost compiled for a
TPU (needs libtpu). Prints one figure a line; --out writes them as JSON.
"""

import argparse
import json
import pathlib
import statistics
import time
import tracemalloc

import numpy as np


def straightforward(probs, masks, thresholds=None, max_distance=3.0):
  """Computes HSE-P, HSE-T and the conventional metrics in the most direct way.

  One `precision_recall_curve` over all pixels; `label` + `regionprops` at every threshold.
  """
  return {
    **straightforward_pixels(probs, masks),
    **straightforward_targets(probs, masks, thresholds),
  }


def straightforward_pixels(probs, masks):
  """Computes HSE-P, and ROC-AUC, AP, precision, recall, F1 and IoU of pixels."""
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
  """Computes HSE-T, and Pd, Fa, nIoU at 0.5."""
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


def straightforward_hse_p(probs, masks):
  """Computes HSE-P alone."""
  from sklearn import metrics as sk

  score = np.concatenate([p.ravel() for p in probs])
  true = np.concatenate([m.ravel() for m in masks])
  precision, recall, _ = sk.precision_recall_curve(true, score)
  return sk.auc(recall, precision)


def make_maps(data, checkpoint, folder, limit=None):
  """Writes an ACM's maps of the test splits as NPY files; the ACM has one input channel.

  `limit`: number of images of each set; None: all.
  """
  import jax
  from flax import nnx
  from PIL import Image

  import converters

  net = converters.load_backbone("acm", checkpoint)
  net.eval()
  graph, state = nnx.split(net)

  @jax.jit
  def predict(state, image):
    net = nnx.merge(graph, state)
    skips, top = net.encode(image)
    return jax.nn.sigmoid(net.decode(skips, top).final)[0, ..., 0]

  for name in ("NUAA-SIRST", "NUDT-SIRST"):
    root = pathlib.Path(data) / name
    (folder / name).mkdir(parents=True, exist_ok=True)
    for stem in next((root / "splits").glob("test*")).read_text().split()[:limit]:
      path = folder / name / f"{stem}.npy"
      if path.exists():
        continue
      gray = Image.open(next((root / "images").glob(f"{stem}.*"))).convert("L")
      image = (np.asarray(gray, np.float32) - 95.010) / 41.511  # LESPS, SIRST3
      height, width = image.shape
      image = np.pad(image, ((0, -height % 32), (0, -width % 32)))
      np.save(path, np.asarray(predict(state, image[None, :, :, None]))[:height, :width])


def read(maps, masks):
  """Reads (probs, masks) from two folders, matched by the stems of the maps."""
  from fdep_jax import score

  probs, truth = [], []
  for path in sorted(p for p in pathlib.Path(maps).iterdir() if p.suffix in score.READABLE):
    probs.append(score.read_prob(path))
    truth.append(score.read_mask(next(pathlib.Path(masks).glob(f"{path.stem}.*"))))
  return probs, truth


def large_map(components=1000, size=4096):
  """Makes a map with `components` components, and its mask."""
  rng = np.random.default_rng(0)
  mask = np.zeros((size, size), bool)
  cells = rng.permutation(64 * 64)[:components]
  for row, col in zip(cells // 64 * (size // 64) + 20, cells % 64 * (size // 64) + 20, strict=True):
    height, width = rng.integers(1, 9, 2)
    mask[row : row + height, col : col + width] = True
  prob = rng.random((size, size), dtype=np.float32) * np.float32(0.04)
  prob[mask] = rng.random(mask.sum(), dtype=np.float32)
  return prob, mask


def timed(function, probs, masks, repeats):
  """Returns (median seconds, result); every repeat gets fresh arrays."""
  seconds = []
  for _ in range(repeats):
    fresh = [p.copy() for p in probs], [m.copy() for m in masks]
    start = time.perf_counter()
    result = function(*fresh)
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds), result


def peak(function, probs, masks):
  """Measures the most bytes that a call holds beyond its input."""
  tracemalloc.start()
  function(probs, masks)
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return most


def ours_hse_t(probs, masks):
  """Computes HSE-T alone, by our code."""
  from fdep_jax.metrics import hse

  options = hse.Options()
  counter = hse.Counter(options)
  for prob, mask in zip(probs, masks, strict=True):
    counter.add(prob, mask)
  counts, (at, _) = counter.counts(), options.of_grid()
  sums = (getattr(counts, n).sum(0) for n in ("hits", "predicted", "targets"))
  hits, predicted, targets = sums
  return hse.target_curve(hits[at], predicted[at], targets, options)[2]


def compare(probs, masks, repeats, slow_repeats):
  """Compares seconds, peak bytes and every metric with the straightforward pipeline's."""
  from fdep_jax.metrics import hse, pixels

  pairs = {
    "hse": (hse.score, lambda p, m: (straightforward_hse_p(p, m), straightforward_targets(p, m))),
    "hse_p": (lambda p, m: pixels.curve(list(zip(p, m, strict=True))), straightforward_hse_p),
    "hse_t": (ours_hse_t, straightforward_targets),
  }
  hse.score(probs[:8], masks[:8])  # imports
  straightforward(probs[:8], masks[:8])
  out = {}
  for name, (ours, theirs) in pairs.items():
    fast, _ = timed(ours, probs, masks, repeats)
    slow, _ = timed(theirs, probs, masks, slow_repeats)
    out[name] = {"seconds": fast, "straightforward_seconds": slow, "ratio": slow / fast}
  memory = [peak(f, probs, masks) for f in pairs["hse"]]
  out["peak_bytes"] = {"ours": memory[0], "straightforward": memory[1]}
  score, expected = hse.score(probs, masks), straightforward(probs, masks)
  out["largest_difference"] = max(abs(getattr(score, k) - v) for k, v in expected.items())
  total = hse.Accumulator()
  out["streaming_seconds"], _ = timed(
    lambda p, m: [total.update(*x) for x in zip(p, m, strict=True)], probs, masks, 1
  )
  out["streaming_difference"] = abs(total.result().hse_p - score.hse_p)
  out["score"] = score.as_dict()
  return out


def jitted_route(probs, masks, batch=4):
  """Counts a whole set on one canvas: seconds, compiles, images on the CPU's route, equality."""
  from fdep_jax.metrics import hse, jitted

  canvas = [-(-max(m.shape[axis] for m in masks) // 32) * 32 for axis in (0, 1)]
  plain, device = hse.Accumulator(), hse.Accumulator()
  slower, before, start = 0, jitted.count_batch._cache_size(), time.perf_counter()
  for i in range(0, len(masks), batch):
    held = np.zeros((2, batch, *canvas), np.float32)
    sizes = np.ones((batch, 2), np.int32)
    part = list(zip(probs[i : i + batch], masks[i : i + batch], strict=True))
    for j, (prob, mask) in enumerate(part):
      sizes[j] = mask.shape
      held[:, j, : mask.shape[0], : mask.shape[1]] = prob, mask
    chosen = slice(None) if len(part) == batch else slice(len(part))
    slower += jitted.add(device, held[0], held[1] > 0, sizes, keep=chosen)
  seconds = time.perf_counter() - start
  for prob, mask in zip(probs, masks, strict=True):
    plain.update(prob, mask)
  ours, theirs = vars(device.counts()), vars(plain.counts())
  return {
    "canvas": canvas,
    "seconds": seconds,
    "compiles": jitted.count_batch._cache_size() - before,
    "images_on_the_cpu_route": slower,
    "counts_equal": all((ours[n] == theirs[n]).all() for n in ours),
    "score_equal": device.result().as_dict() == plain.result().as_dict(),
  }


def tpu_cost(topology, size=512):
  """Counts FLOPs and bytes of one image at 19 thresholds on a TPU; a loop's body counts once."""
  import functools

  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from fdep_jax.metrics import hse, jitted

  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  where = jax.sharding.SingleDeviceSharding(device)
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=where)
  options = hse.Options()
  compiled = jitted.count_batch.lower(
    shape((1, size, size), jnp.float32),
    shape((1, size, size), jnp.bool_),
    shape((1, 2), jnp.int32),
    shape((len(options.grid),), jnp.int32),
    half=options.of_grid()[1],
    max_distance=options.max_distance,
    connectivity=options.connectivity,
    budget=jitted.Budget(),
  ).compile()
  cost = compiled.cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  memory = compiled.memory_analysis()
  return {
    "topology": topology,
    "flops": cost.get("flops"),
    "bytes": cost.get("bytes accessed"),
    "hbm_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--maps", type=pathlib.Path, required=True)
  parser.add_argument("--masks", type=pathlib.Path)
  parser.add_argument("--data", type=pathlib.Path)
  parser.add_argument("--checkpoint", type=pathlib.Path)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--slow_repeats", type=int, default=1)
  parser.add_argument("--jitted", action="store_true")
  parser.add_argument("--tpu")
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  if args.data:
    if args.checkpoint:
      make_maps(args.data, args.checkpoint, args.maps)
    names = ("NUAA-SIRST", "NUDT-SIRST")
    sets = [read(args.maps / name, args.data / name / "masks") for name in names]
  elif args.masks:
    sets = [read(args.maps, args.masks)]
  else:
    parser.error("give --masks, or --data with the datasets")
  probs, masks = (sum(parts, []) for parts in zip(*sets, strict=True))
  results = {"images": len(masks), **compare(probs, masks, args.repeats, args.slow_repeats)}
  from fdep_jax.metrics import hse

  prob, mask = large_map()
  seconds, score = timed(hse.score, [prob], [mask], args.repeats)
  results["4096x4096"] = {"seconds": seconds, "components": score.targets}
  if args.jitted:
    results["jitted"] = jitted_route(probs, masks)
  if args.tpu:
    results["tpu"] = tpu_cost(args.tpu)
  for name, value in results.items():
    print(f"{name}: {value}")
  if args.out:
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  main()
