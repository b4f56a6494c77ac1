"""Evaluates every trained branch on whole images with the paper's metrics (§4.2)."""

import hashlib
import logging
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from fdep_jax import backbones, build, data, detector, forward, report, settings
from fdep_jax.metrics import bootstrap, columns, hse, jitted, per_image
from fdep_jax.priors import Prior
from fdep_jax.report import folder as folder_lib
from fdep_jax.runtime import checkpoint, files, hlo, mesh

PAD = 32  # pixels; images are zero-padded to multiples of it, as in the reference
# Whether images are counted by the jitted route; None: on accelerators. Tests set it.
COUNT_JITTED: bool | None = None


def probabilities(
  apply: Callable,
  state: dict,
  prior: Prior | None,
  samples: Sequence[data.Sample],
  batch_size: int,
  the_mesh,
  fill: data.Statistic = 0.0,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yields (place in `samples`, {branch: H×W probabilities}), images of equal shape together.

  Args:
    apply: of `forward.make_forward`.
    state: {"params", "stats", "rng"}, on the devices.
    prior: on the devices, or None.
    samples: images of any size; maps have the same sizes.
    batch_size: images at once, rounded up to a multiple of the devices.
    the_mesh: devices.
    fill: grey level / 255 of the padding.
  """
  devices = the_mesh.devices.size
  batches = data.eval_batches(
    samples,
    PAD,
    -(-batch_size // devices) * devices,
    row_multiple=devices,
    fill=fill,
  )
  for batch in batches:
    image = mesh.put_rows(batch["image"], the_mesh)
    probs = mesh.get(apply(state["params"], state["stats"], state["rng"], prior, image))
    for row, (index, (height, width)) in enumerate(
      zip(batch["indices"], batch["sizes"], strict=True)
    ):
      yield index, {name: prob[row, :height, :width] for name, prob in probs.items()}


def score(
  maps: Iterator[tuple[int, dict[str, np.ndarray]]], samples: Sequence[data.Sample]
) -> dict[str, hse.Score]:
  """Computes the metrics of every branch; `maps` as for `accumulate`."""
  return {name: total.result() for name, total in accumulate(maps, samples).items()}


def accumulate(
  maps: Iterator[tuple[int, dict[str, np.ndarray]]],
  samples: Sequence[data.Sample],
  save: pathlib.Path | None = None,
) -> dict[str, hse.Accumulator]:
  """Accumulates the counts from which the metrics of every branch are computed.

  On accelerators the jitted counts do it (`metrics.jitted`), on a CPU numpy, which is faster there.
  Both give the same integers.

  Args:
    maps: from `probabilities`, every image at most once.
    samples: the images, with their masks.
    save: folder for `<branch>/<name>.npy` (float32), or None.

  Returns:
    {branch: the counts of the images, in the order of `samples`}.
  """
  counters, order = {}, []
  for index, probs in maps:
    order.append(index)
    for name, prob in probs.items():
      if name not in counters:
        counters[name] = _counter(samples)
      counters[name].update(prob, samples[index].mask)
      if save is not None:
        (save / name).mkdir(parents=True, exist_ok=True)
        np.save(save / name / f"{samples[index].name.replace('/', '_')}.npy", prob)
  places = np.argsort(order)
  return {name: _total(counter).select(places) for name, counter in counters.items()}


def _counter(samples: Sequence[data.Sample]):
  """Makes an empty counter of the route that suits the devices."""
  total = hse.Accumulator()
  jit = jax.default_backend() != "cpu" if COUNT_JITTED is None else COUNT_JITTED
  if not jit:
    return total
  heights, widths = zip(*data.sizes(samples), strict=True)
  return jitted.Counter(total, data.padded_size((max(heights), max(widths)), PAD))


def _total(counter) -> hse.Accumulator:
  if isinstance(counter, hse.Accumulator):
    return counter
  counter.flush()
  return counter.total


def cost(
  config: ConfigDict, model, prior: Prior | None, repeats: int = 10, size: int | None = None
) -> dict[str, float]:
  """Measures FLOPs and seconds of the deployed branch on one image on this machine.

  FLOPs are two for every multiply-add of convolutions and matrix products. The time is the least
  of `repeats` runs of the compiled program after a first one, as other work on the machine only
  adds to it; the median shows how much it did.

  Args:
    config: of the run.
    model: its model, with any weights.
    prior: of a deployed main branch.
    repeats: number of timed runs.
    size: height and width of the image, pixels; default data.crop.

  Returns:
    "flops", "seconds_per_image" and "seconds_median".
  """
  size = size or config.data.crop
  model = nnx.clone(model)
  model.eval()
  graphdef, state = nnx.split(model)
  branch = forward.deployed_branch(config.mode)
  if branch == "light":
    prior = None

  @forward.jit
  def deployed(state, prior, image):
    model = nnx.merge(graphdef, state)
    return forward.logits(model, forward.ALONE[branch], image, prior, 0.5, 0.25)[branch].final

  image = jnp.zeros((1, size, size, 3), jnp.uint8)
  lowered = deployed.lower(state, prior, image)
  flops = hlo.flops(lowered.as_text("hlo"), "none")["outside"]
  compiled = lowered.compile()
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(compiled(state, prior, image))
    seconds.append(time.perf_counter() - start)
  return {
    "flops": flops,
    "seconds_per_image": min(seconds[1:]),
    "seconds_median": statistics.median(seconds[1:]),
  }


def results(scores: dict[str, hse.Score]) -> dict[str, dict]:
  """Returns the metrics for JSON: fractions; null if a metric needs targets and has none."""
  return {name: score.as_dict() for name, score in scores.items()}


def table(metrics: dict) -> str:
  """Formats the paper's columns, one row a branch; percent, Fa in 10⁻⁶."""
  shown = {**columns.METRICS, **{n: c for n, c in columns.COSTS.items() if n != "flops_g"}}
  lines = [f"{'':<8}" + "".join(f"{column.heading:>10}" for column in shown.values())]
  for branch in ("main", "light"):
    if branch not in metrics:
      continue
    deployed = branch == metrics["deployed"]
    values = metrics[branch] | {"params": metrics["params_deployed" if deployed else "params"]}
    values["seconds_per_image"] = metrics["seconds_per_image"] if deployed else None
    cells = [column.shown(values[column.key]) for column in shown.values()]
    lines.append(f"{branch:<8}" + "".join(f"{cell:>10}" for cell in cells))
  return "\n".join(lines)


def _examples(samples: Sequence[data.Sample], count: int = 5) -> list[int]:
  """Returns the places of some images with targets, spread over the set."""
  found = [i for i, sample in enumerate(samples) if sample.mask.any()]
  return found[:: max(len(found) // count, 1)][:count]


def _watch(maps, shown: dict[int, dict]):
  """Yields `maps` unchanged and keeps those of the images to show."""
  for index, probs in maps:
    if index in shown:
      shown[index] = probs
    yield index, probs


def fingerprint(state: dict) -> str:
  """Returns a SHA-256 of all parameters and running statistics."""
  digest = hashlib.sha256()
  kept = {"params": state["params"], "stats": state["stats"]}
  for path, leaf in sorted(checkpoint.flatten(kept).items()):
    leaf = np.asarray(leaf)
    digest.update(f"{path} {leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
  return digest.hexdigest()


def command(flags, config: ConfigDict) -> None:
  """Runs `--mode eval`; `config` is the run's, with what the command line changes.

  Without --workdir the network is that of a file: `config` is that of `detector.config_of`.
  """
  if flags.out:
    out = files.expand(flags.out)
    for folder in (out, *(out / name for name in _named(flags.data or []))):
      if (folder / "config.json").exists():
        raise ValueError(
          f"--out {flags.out}: {folder} is the folder of a run. Name a different --out."
        )
  data.check_all(flags.data or [])
  if not flags.workdir:
    network = detector.of_flags(flags)
    _each(
      flags, config, network.source, lambda config: _inputs_of_file(network, config),
      lambda config, out: evaluate_file(network, config, out),
    )  # fmt: skip
    return
  workdir = files.expand(flags.workdir)
  own, values = settings.flat(settings.load(workdir)), settings.flat(config)
  others = [k for k in values if k.startswith("data.") and values[k] != own[k]]
  reasons = [f"{name}={values[name]}" for name in others]
  reasons += [f"--data {','.join(flags.data)}"] if flags.data else []
  reasons += [f"--checkpoint {flags.checkpoint}"] if flags.checkpoint else []
  if flags.data and "data.root" in others:
    raise ValueError("--data and --config.data.root both name the data. Give one.")
  if reasons and not flags.out:
    raise ValueError(
      f"The results with {' and '.join(reasons)} are not those of the run: name a folder for them, "
      "--out DIR."
    )
  if not flags.data:
    evaluate(workdir, config, which=flags.checkpoint, out=flags.out)
    return
  _each(
    flags, config, workdir, lambda config: _inputs_of_run(workdir, flags.checkpoint, config),
    lambda config, out: evaluate(workdir, config, which=flags.checkpoint, out=out),
  )  # fmt: skip


def _each(flags, config: ConfigDict, source, inputs_of, score_one: Callable[..., dict]) -> None:
  """Scores the datasets of --data, each into its folder below --out, and prints one table."""
  out, configs, found = files.expand(flags.out), {}, {}
  for name, root in _named(flags.data).items():
    configs[name] = config.copy_and_resolve_references()
    configs[name].data.root = root
  folder_lib.check_table(out, configs)
  for name, own in configs.items():
    folder_lib.check(out / name, {"inputs": inputs_of(own)}, [own.data.root])
  for name, own in configs.items():
    found[name] = score_one(own, out / name)
  if mesh.writes():
    files.write_json(out / "metrics.json", found)
    print(f"{source} on {columns.counted(len(found), 'dataset')}:")
    print(parts_table(found))


def _named(roots: Sequence[str]) -> dict[str, str]:
  """Returns {name for results: root}, by the folders' own names where these differ."""
  paths = [files.expand(root.removeprefix("tfds:")) for root in roots]
  names = [os.path.basename(os.path.abspath(path)) for path in paths]  # "." has none of its own
  if len(set(names)) < len(names):
    names = [f"{i}_{name}" for i, name in enumerate(names, 1)]
  return dict(zip(names, roots, strict=True))


def _inputs_of_run(workdir: pathlib.Path, which: str | int | None, config: ConfigDict) -> dict:
  """Returns what is scored, for `metrics.json` outside of the run's folder."""
  return {"run": os.path.abspath(workdir), "checkpoint": str(which or "best"), **_place(config)}


def _inputs_of_file(network: detector.Detector, config: ConfigDict) -> dict:
  return {
    "network": network.source,
    "mean": network.mean,
    "std": network.std,
    "range": config.data.range,
    **_place(config),
  }


def _place(config: ConfigDict) -> dict[str, str]:
  root = config.data.root
  if root == "synthetic":
    scenes = columns.counted(config.data.synthetic_test, "scene")
    root = f"{scenes} of {config.data.synthetic_size} pixels"
  elif not root.startswith("tfds:"):
    root = os.path.abspath(files.expand(root))
  return {"data": root}


def evaluate(
  workdir: str | os.PathLike,
  config: ConfigDict | None = None,
  loaded=None,
  which: str | int | None = None,
  out: str | os.PathLike | None = None,
) -> dict:
  """Scores the best and the newest checkpoint on the test split.

  Writes `metrics.json`, `counts.npz`, `report.html` and `examples.png`, and prints the table.
  Images are normalised as the run's were, also those of other data.

  Args:
    workdir: folder of a run.
    config: of the run; default its config.json.
    loaded: (images, prior, model) if the caller has them.
    which: scores this checkpoint only: "best", "last", a step, or a path in the run's folder. It
      needs `out`.
    out: folder to write; default the run's.

  Returns:
    The content of `metrics.json`.

  Raises:
    FileNotFoundError: the run, its checkpoint, its data or its weights do not exist.
    ValueError: there is no such checkpoint, the prior's weights are not those of the training, or
      `out` holds results of other inputs, or `which` is given and `out` is the run's folder.
  """
  workdir = files.expand(workdir)
  out = workdir if out is None else files.expand(out)
  own = out.resolve() == workdir.resolve()
  if own and which is not None:
    raise ValueError(
      f"The results of checkpoint {which} are not those of {workdir}, whose metrics.json they "
      "would replace. Name a folder for them, out=DIR, or leave which out."
    )
  config = config or settings.load(workdir)
  settings.adopt(config)
  record = {}
  if not own:
    record["inputs"] = _inputs_of_run(workdir, which, config)
    folder_lib.check(out, record, [config.data.root])
  images = None
  if loaded is None:
    _check_checkpoint(workdir, which, config)
    build.check_inputs(config)
    prior = build.load_prior(config)
    model = build.create_model(config, prior)
  else:
    images, prior, model = loaded
  _, params, stats, rng = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  like = {"params": params, "stats": stats, "rng": rng}
  (best_state, best), (last_state, last) = _restore(workdir, which, config, like)
  images = images or _load_images(workdir, config, prior, best)
  _warn_of_sizes(config, images)
  maps_of = _maps_of(config, images, prior, model)
  newest = None
  if best["step"] != last["step"]:
    newest = results(score(maps_of(last_state), images.test)) | {"checkpoint": last["step"]}
  scored = _score_images(config, images, maps_of(best_state), out)
  metrics = {
    **_with_intervals(scored.totals),
    "checkpoint": best["step"],
    **_facts(config, images, model, prior, scored),
    "selected_on": config.eval.select_on if which in (None, "best") else None,
    "steps": last.get("steps"),
    **record,
  }
  if which is None:
    chosen = {name: metrics[name] for name in (*scored.totals, "checkpoint")}
    metrics["last"] = newest or chosen
  if mesh.writes():
    words = _words(config, which, best)
    about = _about(config, images, best_state, words)
    about["prior, SHA-256 of its file"] = best["dino_sha256"] or "none"
    name = workdir.resolve().name + (f" ({words}, {config.data.root})" if not own else "")
    _write(out, name, config, images, scored, metrics, about)
    doubt = detector.selection_doubt(best) if which is None and best["best_step"] else ""
    _print(config, metrics, words, newest, [doubt, *_merging(scored)])
  return metrics


def evaluate_file(
  network: detector.Detector, config: ConfigDict, out: str | os.PathLike
) -> dict[str, object]:
  """Scores the network of a file on the test split, and writes what `evaluate` writes.

  Args:
    network: from `detector.load_published` or `detector.load_light`.
    config: of `detector.config_of`, with the data's place.
    out: folder to write.

  Returns:
    The content of `metrics.json`: the network's numbers under "light"; "checkpoint" is None.

  Raises:
    FileNotFoundError: the data do not exist.
    ValueError: the data cannot be used, or `out` holds results of other inputs.
  """
  out = files.expand(out)
  record = {"inputs": _inputs_of_file(network, config)}
  folder_lib.check(out, record, [config.data.root])
  build.check_inputs(config)
  values = build.grey_range(config) or network.range
  test = build.load_test(config, values)
  images = build.Images([], [], test, network.mean, network.std, values)
  _, params, stats, rng = nnx.split(network.model, nnx.Param, nnx.BatchStat, ...)
  state = {"params": params, "stats": stats, "rng": rng}
  maps = _maps_of(config, images, None, network.model, network.fill)(state)
  scored = _score_images(config, images, maps, out)
  metrics = {
    **_with_intervals(scored.totals),
    "checkpoint": None,
    **_facts(config, images, network.model, None, scored),
    "selected_on": None,
    "steps": None,
    "file": str(network.folder),
    "backbone": config.model.backbone,
    "options": dict(network.options),
    "mean": network.mean,
    "std": network.std,
    **record,
  }
  if mesh.writes():
    words = f"{network.folder.name}, {config.model.backbone}"
    about = _about(config, images, state, str(network.folder))
    _write(out, f"{words} ({config.data.root})", config, images, scored, metrics, about)
    _print(config, metrics, words, None, _merging(scored))
  return metrics


class _Scored(NamedTuple):
  """The metrics of the test images, and what their report shows."""

  totals: dict[str, hse.Accumulator]  # by branch
  recorder: report.Recorder
  shown: dict[int, dict]  # place of an example -> its maps by branch


def _score_images(config: ConfigDict, images: build.Images, maps, out: pathlib.Path) -> _Scored:
  """Scores the maps of the test images once; saves them if `eval.save_probs` is set."""
  shown = {i: {} for i in _examples(images.test)}
  recorder = report.Recorder(images.test)
  maps = _watch(maps, shown)
  save = out / "probs" if config.eval.save_probs and mesh.writes() else None
  totals = accumulate(recorder.watch(maps) if mesh.writes() else maps, images.test, save)
  return _Scored(totals, recorder, shown)


def _facts(config: ConfigDict, images: build.Images, model, prior, scored: _Scored) -> dict:
  """Returns what `metrics.json` holds beside the metrics, of any network."""
  return {
    "params": build.count_parameters(nnx.state(model, nnx.Param)),
    "params_deployed": build.count_deployed(config, model),
    "deployed": forward.deployed_branch(config.mode),
    **cost(config, model, prior),
    "split": "test",
    "images": len(images.test),
    "test_sha256": data.fingerprint(images.test),
    "data": config.data.root,
    **_parts(config.data.root, scored.totals, len(images.test)),
  }


def _warn_of_sizes(config: ConfigDict, images: build.Images) -> None:
  """Tells of test images whose size the network was not trained for, where that matters."""
  if config.model.on_dino != "no":
    return
  network = backbones.network_class(config.model.backbone)
  sizes = {data.padded_size(size, PAD) for size in data.sizes(images.test)}
  cautions = {network.caution(size, config.data.crop) for size in sizes} - {""}
  if cautions:
    logging.warning("%s (%d of %d sizes)", min(cautions), len(cautions), len(sizes))


def _print(config: ConfigDict, metrics: dict, words: str, newest: dict | None, warnings) -> None:
  """Prints the tables, and the newest checkpoint's if the selection is in doubt."""
  print(f"{columns.counted(metrics['images'], 'test image')} of {config.data.root}, {words}")
  print(table(metrics))
  if "parts" in metrics:
    print(f"The parts of {config.data.root}:")
    print(parts_table(metrics["parts"]))
  for warning in filter(None, warnings):
    print(f"Warning: {warning}")
  if newest and warnings[0]:  # the selection is in doubt
    print(f"The newest checkpoint, step {newest['checkpoint']}:")
    print(table(metrics | newest))


def _merging(scored: _Scored) -> list[str]:
  """Lists the branches of which some thresholds merge targets."""
  said = {n: hse.warning_of_merging(total.result()) for n, total in scored.totals.items()}
  return [f"{name} branch: {text}" for name, text in said.items() if text]


def _load_images(workdir, config: ConfigDict, prior: Prior | None, saved: dict) -> build.Images:
  """Loads the test images, with the normalisation and the range of a checkpoint's training."""
  build.check_prior(prior.sha256 if prior else None, saved, workdir, config)
  values = saved.get("range", "")
  values = tuple(values) if isinstance(values, list) else values
  test = build.load_test(config, values)
  return build.Images([], [], test, saved["mean"], saved["std"], values)


def _parts(root: str, totals: dict[str, hse.Accumulator], count: int) -> dict[str, dict]:
  """Scores the parts of a union, such as SIRST3, apart.

  Args:
    root: of the dataset.
    totals: of every branch.
    count: number of its test images.

  Returns:
    {"parts": {part: {"images": number, branch: metrics with "intervals"}}}; {} if it is no union.
  """
  counts = data.parts(root, "test")
  if sum(counts.values()) != count or len(counts) < 2:
    return {}
  found, start = {}, 0
  for part, number in counts.items():
    places = range(start, start + number)
    found[part] = _with_intervals({name: total.select(places) for name, total in totals.items()})
    found[part]["images"] = number
    start += number
  return {"parts": found}


def _with_intervals(totals: dict[str, hse.Accumulator]) -> dict[str, dict]:
  found = results({name: total.result() for name, total in totals.items()})
  for name, total in totals.items():
    found[name]["intervals"] = report.intervals(total)
  return found


def parts_table(parts: dict[str, dict]) -> str:
  """Formats the paper's columns, one row a part and branch, with the 95 % intervals below.

  In percent, Fa in 10⁻⁶.
  """
  shown = columns.METRICS.values()
  width = max(20, *map(len, parts)) + 1
  notes = []
  lines = [f"{'':<{width + 7}}" + "".join(f" {c.heading:>15}" for c in shown)]
  for part, found in parts.items():
    for branch in ("main", "light"):
      if branch in found:
        values, spans = found[branch], found[branch]["intervals"]
        cells = [c.shown(values[c.key]) for c in shown]
        lines.append(f"{part:<{width}}{branch:<7}" + "".join(f" {cell:>15}" for cell in cells))
        cells = [c.interval(spans.get(c.key)) for c in shown]
        lines.append(f"{'  95 %':<{width + 7}}" + "".join(f" {cell:>15}" for cell in cells))
        if note := bootstrap.note(spans, {c.key: c.heading for c in shown}):
          notes.append(f"Note: {part}, {branch}: {note}")
  return "\n".join([*lines, *notes])


def _check_checkpoint(workdir: pathlib.Path, which: str | int | None, config: ConfigDict) -> None:
  """Raises as `evaluate` if the checkpoint does not exist, before anything is loaded."""
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  if which is not None:
    run, which = detector.find_checkpoint(workdir, which)
    detector.choose_step(checkpoints, run, which)
  elif not checkpoints.steps():
    raise FileNotFoundError(f"{workdir} has no checkpoint yet. Train first (--mode train).")


def _restore(workdir: pathlib.Path, which: str | int | None, config: ConfigDict, like: dict):
  """Returns (state, JSON object) of the checkpoint to score, and those of the newest.

  Reads both now, as a training in progress replaces them.
  """
  _check_checkpoint(workdir, which, config)
  with checkpoint.Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
    if which is not None:
      step, best = detector.choose_step(checkpoints, *detector.find_checkpoint(workdir, which))
      chosen = checkpoints.restore(like, step, best=best)
      return chosen, chosen
    last = checkpoints.restore(like)
    if checkpoints.best_step() is None:
      return last, last
    return checkpoints.restore(like, best=True), last


def _maps_of(
  config: ConfigDict,
  images: build.Images,
  prior: Prior | None,
  model,
  fill: data.Statistic = 0.0,
) -> Callable:
  """Makes the function that yields the test images' maps for a state."""
  the_mesh = mesh.make(config.host_devices)
  apply = forward.make_forward(config, model, images.mean, images.std)
  prior = prior.placed(the_mesh, config.prior.shard) if prior else None

  def maps(state: dict):
    state = mesh.put_replicated(state, the_mesh)
    size = config.eval.batch_size
    return probabilities(apply, state, prior, images.test, size, the_mesh, fill)

  return maps


def _words(config: ConfigDict, which: str | int | None, best: dict) -> str:
  """Says which checkpoint is scored and why."""
  if which not in (None, "best"):
    return f"step {best['step']} (--checkpoint {which})"
  if best["best_step"] is None:
    return f"step {best['step']}, the newest, as none is selected"
  return f"step {best['step']}, the best on {config.eval.select_on}"


def _about(config: ConfigDict, images: build.Images, state: dict, words: str) -> dict:
  """Describes the scored checkpoint for the report."""
  mean, std = (", ".join(f"{v:.6f}" for v in np.ravel(x)) for x in (images.mean, images.std))
  return {
    "checkpoint": words,
    "its parameters and statistics, SHA-256": fingerprint(state),
    "normalisation": f"mean {mean}, standard deviation {std}",
    "data": f"{config.data.root}, {columns.counted(len(images.test), 'test image')}",
  }


def _write(out, name, config, images, scored: _Scored, metrics: dict, about: dict) -> None:
  """Writes `counts.npz`, `metrics.json`, `examples.png` and `report.html` of `name` into `out`."""
  out.mkdir(parents=True, exist_ok=True)
  per_image.save(out / per_image.FILE, scored.totals)
  files.write_json(out / "metrics.json", metrics)
  step = metrics["checkpoint"]
  if scored.shown:
    source = "no prior" if config.mode == "original" else f"prior: {config.prior.checkpoint}"
    caption = f"{config.model.backbone}, {config.mode}, {source}, step {step}"
    if step is None:
      caption = f"{config.model.backbone}, {about['checkpoint']}"
    samples = [images.test[i] for i in scored.shown]
    report.examples(out / "examples.png", samples, list(scored.shown.values()), caption)
  path = out / "report.html"
  flat = settings.flat(config)
  if step is None:  # the base config's other settings did not train this network
    flat = {
      k: v for k, v in flat.items() if re.match(r"mode|model\.backbone|data\.(root|range)", k)
    }
  report.write(path, name, images.test, scored.recorder, scored.totals, metrics, flat, about)
  logging.info("wrote %s", path)
  logging.info("wrote %s", out / "metrics.json")
