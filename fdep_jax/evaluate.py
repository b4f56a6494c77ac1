"""Evaluation: whole images at their own sizes, every trained branch, the paper's columns (§4.2)."""

import hashlib
import json
import logging
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import checkpoint, data, hlo, mesh, report, run, settings
from fdep_jax.metrics import hse

COLUMNS = ("IoU", "nIoU", "Pd", "Fa·1e6", "HSE-P", "HSE-T", "HSE", "P(M)", "time (s)")
PAD = 32  # pixels; reported images are zero-padded to multiples of it, as the reference does


def make_forward(config: ConfigDict, model, prior, mean: float, std: float) -> Callable:
  """A jitted (params, stats, rng, vit_state, image) → {branch: B×H×W float32 probabilities}.

  `image` is B×H×W×3 uint8. Everything is in evaluation mode.
  """
  model = nnx.clone(model)
  model.eval()
  graphdef, _ = nnx.split(model)
  vit_graphdef = nnx.split(prior.vit)[0] if prior else None

  @jax.jit
  def forward(params, stats, rng, vit_state, image):
    model = nnx.merge(graphdef, params, stats, rng)
    levels = run.frozen_levels(prior, vit_state, vit_graphdef, image) if prior else []
    logits = run.branches(model, config.mode, run.normalise(image, mean, std), levels)
    return {
      name: jax.nn.sigmoid(branch.final[..., 0].astype(jnp.float32))
      for name, branch in logits.items()
    }

  return forward


def probabilities(
  forward: Callable,
  state: dict,
  vit_state,
  samples: Sequence[data.Sample],
  batch_size: int,
  the_mesh,
  canvas: tuple[int, int] | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """(place in `samples`, {branch: H×W probabilities}) at the images' own sizes, shape by shape."""
  devices = the_mesh.devices.size
  batches = data.eval_batches(
    samples,
    PAD,
    -(-batch_size // devices) * devices,
    canvas=canvas,
    row_multiple=devices,
  )
  for batch in batches:
    image = mesh.put_rows(batch["image"], the_mesh)
    probs = mesh.get(forward(state["params"], state["stats"], state["rng"], vit_state, image))
    for row, (index, (height, width)) in enumerate(
      zip(batch["indices"], batch["sizes"], strict=True)
    ):
      yield index, {name: prob[row, :height, :width] for name, prob in probs.items()}


def score(
  maps: Iterator[tuple[int, dict[str, np.ndarray]]], samples: Sequence[data.Sample]
) -> dict[str, hse.Score]:
  """The metrics of every branch; `maps` as `accumulate`."""
  return {name: total.result() for name, total in accumulate(maps, samples).items()}


def accumulate(
  maps: Iterator[tuple[int, dict[str, np.ndarray]]],
  samples: Sequence[data.Sample],
  save: pathlib.Path | None = None,
) -> dict[str, hse.Accumulator]:
  """The counts of every branch, from which its metrics follow.

  Args:
    maps: what `probabilities` yields.
    save: folder for `<branch>/<name>.npy` (float32), or None.
  """
  totals: dict[str, hse.Accumulator] = {}
  for index, probs in maps:
    for name, prob in probs.items():
      totals.setdefault(name, hse.Accumulator()).update(prob, samples[index].mask)
      if save is not None:
        (save / name).mkdir(parents=True, exist_ok=True)
        np.save(save / name / f"{samples[index].name.replace('/', '_')}.npy", prob)
  return totals


def count_parameters(params) -> int:
  """P of the paper: all parameters without DINOv2, also where that is trained."""
  flat = nnx.to_flat_state(params)
  return sum(leaf.size for path, leaf in flat if path[0] != "vit")


def deployed_branch(mode: str) -> str:
  """The branch that selection looks at and users deploy."""
  return "main" if mode == "fdep_wo_coisd" else "light"


def cost(config: ConfigDict, model, prior, repeats: int = 5) -> dict[str, float]:
  """FLOPs and seconds of the deployed branch on one crop-sized image (batch 1, this machine).

  FLOPs are two for every multiply-add of convolutions and matrix products.
  """
  model = nnx.clone(model)
  model.eval()
  graphdef, state = nnx.split(model)
  vit = nnx.split(prior.vit) if prior and config.mode == "fdep_wo_coisd" else (None, None)

  @jax.jit
  def deployed(state, vit_state, image):
    model = nnx.merge(graphdef, state)
    normal = run.normalise(image, 0.5, 0.25)
    if vit_state is None:
      return model.light(normal).final
    return model.main(normal, run.frozen_levels(prior, vit_state, vit[0], image)).final

  image = jnp.zeros((1, config.data.crop, config.data.crop, 3), jnp.uint8)
  lowered = deployed.lower(state, vit[1], image)
  flops = hlo.flops(lowered.as_text("hlo"), "none")["outside"]
  compiled = lowered.compile()
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(compiled(state, vit[1], image))
    seconds.append(time.perf_counter() - start)
  return {"flops": flops, "seconds_per_image": statistics.median(seconds[1:])}


def results(scores: dict[str, hse.Score]) -> dict[str, dict]:
  """Metrics as JSON: fractions, null where a set without targets has none."""
  return {name: score.as_dict() for name, score in scores.items()}


def table(metrics: dict) -> str:
  """The paper's columns, a row a branch; percent, Fa in 10⁻⁶."""
  lines = [f"{'':<8}" + "".join(f"{c:>10}" for c in COLUMNS)]
  for branch in ("main", "light"):
    if branch not in metrics:
      continue
    m = metrics[branch]

    def shown(key, factor, m=m):
      return "-" if m[key] is None else f"{m[key] * factor:.2f}"

    cells = [shown(k, 100) for k in ("iou", "niou", "pd")] + [shown("fa", 1e6)]
    cells += [shown(k, 100) for k in ("hse_p", "hse_t", "hse")]
    cells.append(f"{metrics['params'] / 1e6:.2f}")
    deployed = branch == metrics["deployed"]
    cells.append(f"{metrics['seconds_per_image']:.3f}" if deployed else "-")
    lines.append(f"{branch:<8}" + "".join(f"{cell:>10}" for cell in cells))
  return "\n".join(lines)


def _examples(samples: Sequence[data.Sample], count: int = 5) -> list[int]:
  """Places of images with targets, spread over the set."""
  found = [i for i, sample in enumerate(samples) if sample.mask.any()]
  return found[:: max(len(found) // count, 1)][:count]


def _watch(maps, shown: dict[int, dict]):
  """Passes `maps` on and keeps those of the images to be shown."""
  for index, probs in maps:
    if index in shown:
      shown[index] = probs
    yield index, probs


def _fingerprint(state: dict) -> str:
  """Of parameters and running statistics: paths, types, shapes and bytes."""
  digest = hashlib.sha256()
  kept = {"params": state["params"], "stats": state["stats"]}
  for path, leaf in sorted(checkpoint.flatten(kept).items()):
    leaf = np.asarray(leaf)
    digest.update(f"{path} {leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
  return digest.hexdigest()


def write_json(path: pathlib.Path, value) -> None:
  """Writes the whole file or nothing."""
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(value, indent=2) + "\n")
  os.replace(partial, path)


def evaluate(workdir: str | os.PathLike, config: ConfigDict | None = None, loaded=None) -> dict:
  """Scores the best and the newest checkpoint on the test split; writes and prints the table.

  Args:
    workdir: of a run.
    config: of the run; default its config.json.
    loaded: (images, prior, model) where the caller has them.

  Returns:
    What `metrics.json` holds; `report.html` and `examples.png` show it.

  Raises:
    FileNotFoundError: no run, no checkpoint, or its data or weights are gone.
  """
  workdir = run.run_folder(workdir)
  config = config or settings.load(workdir)
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  if not checkpoints.steps():
    raise FileNotFoundError(f"{workdir} has no checkpoint yet. Train first (--mode train).")
  if loaded is None:
    run.check_inputs(config)
    prior = run.load_prior(config)
    loaded = run.load_images(config), prior, run.create_model(config, prior)
  images, prior, model = loaded
  the_mesh = mesh.make(config.host_devices)
  forward = make_forward(config, model, prior, images.mean, images.std)
  vit_state = run.place_prior(config, prior, the_mesh)
  _, params, stats, rng = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  like = {"params": params, "stats": stats, "rng": rng}

  # Both are read now: a training that is under way replaces them.
  last_state, last = checkpoints.restore(like)
  best_state, best = (
    checkpoints.restore(like, best=True)
    if checkpoints.best_step() is not None
    else (last_state, last)
  )

  def maps_of(state: dict):
    state = mesh.put_replicated(state, the_mesh)
    return probabilities(forward, state, vit_state, images.test, config.eval.batch_size, the_mesh)

  newest = None
  if best["step"] != last["step"]:
    newest = results(score(maps_of(last_state), images.test)) | {"checkpoint": last["step"]}
  shown = {i: {} for i in _examples(images.test)}
  recorder = report.Recorder(images.test)
  maps = _watch(maps_of(best_state), shown)
  save = workdir / "probs" if config.eval.save_probs and mesh.writes() else None
  totals = accumulate(recorder.watch(maps) if mesh.writes() else maps, images.test, save)
  chosen = results({name: total.result() for name, total in totals.items()})
  for name, total in totals.items():
    chosen[name]["intervals"] = report.intervals(total)
  chosen["checkpoint"] = best["step"]
  metrics = {
    **chosen,
    "params": count_parameters(params),
    "deployed": deployed_branch(config.mode),
    **cost(config, model, prior),
    "split": "test",
    "selected_on": config.eval.select_on,
    "images": len(images.test),
    "last": newest or chosen,
    "steps": last.get("steps"),
  }
  checkpoints.close()
  if not mesh.writes():
    return metrics
  write_json(workdir / "metrics.json", metrics)
  if shown:
    source = "no prior" if prior is None else f"prior: {config.dino.checkpoint}"
    caption = f"{config.model.backbone}, {config.mode}, {source}, step {metrics['checkpoint']}"
    chosen_samples = [images.test[i] for i in shown]
    report.examples(workdir / "examples.png", chosen_samples, list(shown.values()), caption)
  about = {
    "checkpoint": f"step {best['step']}, "
    + ("the newest" if best is last else f"the best on {config.eval.select_on}"),
    "its parameters and statistics, SHA-256": _fingerprint(best_state),
    "DINOv2, SHA-256 of its file": best["dino_sha256"] or "none",
    "normalisation": f"mean {images.mean:.6f}, standard deviation {images.std:.6f}",
    "data": f"{config.data.root}, {len(images.test)} test images",
  }
  flat = settings.flat(config)
  path = workdir / "report.html"
  report.write(path, workdir.resolve().name, images.test, recorder, totals, metrics, flat, about)
  logging.info("wrote %s", path)
  logging.info("wrote %s", workdir / "metrics.json")
  print(
    f"{len(images.test)} test images, step {metrics['checkpoint']} "
    f"(best on {config.eval.select_on})"
  )
  print(table(metrics))
  return metrics
