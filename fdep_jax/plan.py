"""Estimates the cost of a run on TPUs or GPUs without any, by compiling only (`--mode plan`)."""

import dataclasses
import logging
import math
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fdep_jax import ablations, build, forward, priors, settings
from fdep_jax import step as step_lib
from fdep_jax.priors import Prior
from fdep_jax.runtime import files, gpus, hlo, mesh, topology

# GMAC of convolutions, linear layers and products of attention for one 448×448 image, counted on
# the published networks: first the part that does not depend on the top feature's fusion, then the
# part that does.
GMAC = {
  "acm": (0.59, 0.46),
  "alcnet": (0.77, 0.15),
  "mlcl": (17.25, 4.23),
  "alcl": (19.26, 1.18),
  "dna": (24.87, 17.79),
  "ggl": (28.67, 1.01),
  "uiu": (52.25, 114.03),
  "msda": (58.45, 5.60),
  "mtu": (11.02, 8.02),
  "sctransnet": (19.77, 12.50),
  "sdsnet": (10.67, 10.18),
  "rpcanet": (135.26, 0),
  "ilnet": (13.69, 51.18),
}
TRAIN_IMAGES = 1676  # of SIRST3; gives epochs per hour
# The TPU compiler's lowest effort: a third of the time to compile. On ACM the fusions, FLOPs and
# all-reduces are the same, and memory is within 4 %. It does not place or prefetch arrays in a
# chip's own memory, so all traffic counts as HBM traffic.
QUICK = ("jax_exec_time_optimization_effort", -1.0)
if not hasattr(jax.config, QUICK[0]):  # jax 0.12 has levels instead; its plans were not compared
  QUICK = ("jax_optimization_level", "O1")
JAX_SHARE = 0.75  # of a GPU's memory, which JAX takes if XLA_PYTHON_CLIENT_MEM_FRACTION is not set
CONTEXT = 2**30  # bytes of it that the fraction which a plan names leaves to the CUDA context


class Parts(NamedTuple):
  """The prior, model and state of a step, as shapes only."""

  prior: Prior | None
  model: nnx.Module
  state: dict


class Cost(NamedTuple):
  """The cost of one compiled program, per device."""

  hbm: dict[str, int]  # bytes by kind
  flops: float  # outside the prior
  prior_flops: float
  traffic: float  # bytes through HBM
  collectives: list[dict]
  seconds: float  # compile time
  optimal_seconds: float | None  # the compiler's own estimate of an execution


class DoesNotFitError(Exception):
  """The program needs more memory than a device has."""

  def __init__(self, needed: float, seconds: float):
    super().__init__(f"needs {needed / 2**30:.2f} GiB")
    self.needed, self.seconds = needed, seconds


def abstract(config: ConfigDict) -> Parts:
  """Builds prior, model and state as shapes only, without memory or weights."""
  prior, model = build.abstract(config)
  optimizer = step_lib.make_optimizer(config, 1000)
  state = jax.eval_shape(lambda: step_lib.init_state(build.random_model(config, prior), optimizer))
  return Parts(prior, model, state)


def compile_train(config: ConfigDict, parts: Parts, the_mesh: Mesh) -> Cost:
  """Compiles the train step for a slice."""
  prior, model, state = parts
  optimizer = step_lib.make_optimizer(config, 1000)
  step = step_lib.make_step(config, model, optimizer, 0.5, 0.25, the_mesh)
  batch = _batch(config, prior, the_mesh)
  return _compile(step, _placed(state, the_mesh), _placed_prior(config, prior, the_mesh), batch)


def compile_eval(config: ConfigDict, parts: Parts, the_mesh: Mesh) -> Cost:
  """Compiles the evaluation step for a slice, at the size of a train crop."""
  prior, model, state = parts
  apply = forward.make_forward(config, model, 0.5, 0.25)
  devices = the_mesh.devices.size
  rows = _eval_rows(config, devices)
  state = _placed({name: state[name] for name in ("params", "stats", "rng")}, the_mesh)
  image = _rows(rows, config.data.crop, the_mesh)["image"]
  return _compile(apply, state, _placed_prior(config, prior, the_mesh), {"image": image})


def _placed(tree, the_mesh: Mesh):
  def place(leaf):
    sharding = mesh.replicated(the_mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, tree)


def _placed_prior(config: ConfigDict, prior: Prior | None, the_mesh: Mesh):
  if prior is None or not prior.frozen:  # a trained one is part of the state
    return prior and dataclasses.replace(prior, weights=None)
  place = mesh.shared_out if config.prior.shard else lambda the_mesh, _: mesh.replicated(the_mesh)
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(the_mesh, a.shape)),
    prior,
  )


def _batch(config: ConfigDict, prior: Prior | None, the_mesh: Mesh) -> dict:
  batch = _rows(config.train.batch_size, config.data.crop, the_mesh)
  if prior and config.prior.bank:  # the levels come with the batch
    side = -(-config.data.crop // prior.patch)
    shape = (config.train.batch_size, side, side, prior.width)
    level = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=mesh.split(the_mesh))
    batch["levels"] = [level] * len(prior.blocks)
  return batch


def _rows(count: int, size: int, the_mesh: Mesh) -> dict:
  split = mesh.split(the_mesh)
  return {
    "image": jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8, sharding=split),
    "mask": jax.ShapeDtypeStruct((count, size, size), jnp.bool_, sharding=split),
  }


def _compile(function, state: dict, prior: Prior | None, batch: dict) -> Cost:
  begin = time.perf_counter()
  if "opt" in state:
    lowered = function.lower(state, prior, batch)
  else:
    lowered = function.lower(*state.values(), prior, batch["image"])
  held = {
    "parameters": _bytes(state["params"]),
    "optimiser": _bytes(state.get("opt")),
    "batch_statistics": _bytes(state["stats"]),
    "frozen_vit": _bytes(prior),
    "batch": _bytes(batch),
  }
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = needed_bytes(str(error), sum(held.values()))
    if needed is None:
      raise
    raise DoesNotFitError(needed, time.perf_counter() - begin) from None
  seconds = time.perf_counter() - begin
  memory, text = compiled.memory_analysis(), compiled.as_text()
  analysis = compiled.cost_analysis() or {}
  optimal = analysis.get("optimal_seconds", -1)
  flops = hlo.flops(text, priors.SCOPE)
  arguments = memory.argument_size_in_bytes
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Cost(
    hbm={
      **held,
      # A TPU pads arrays to its tiles. Below 0: jax leaves out arrays that the program ignores.
      "padding": arguments - sum(held.values()),
      "activations": memory.temp_size_in_bytes + max(fresh, 0),
      "program": memory.generated_code_size_in_bytes,
    },
    flops=flops["outside"],
    prior_flops=flops["inside"],
    traffic=hlo.traffic(text),
    collectives=hlo.collectives(text),
    seconds=seconds,
    optimal_seconds=optimal if optimal > 0 else None,
  )


def needed_bytes(message: str, held: int) -> float | None:
  """Reads the bytes of HBM that a program needs from the TPU compiler's error.

  Args:
    message: of the error.
    held: bytes of the arguments; the message excludes them if the temporaries alone are too large.

  Returns:
    The bytes, or None if the error has a different reason.
  """
  size = r"([\d.]+)([KMGT])"
  whole = re.search(rf"Used {size} of {size} hbm", message)
  temporaries = re.search(rf"HLO temporaries \({size}\) exceeds available HBM", message)
  found = whole or temporaries
  if found is None:
    return None
  value = float(found.group(1)) * 2 ** (10 * (1 + "KMGT".index(found.group(2))))
  return value if whole else value + held


def _bytes(tree) -> int:
  """Counts a tree's bytes on one device, without padding."""
  leaves = jax.tree.leaves(tree)
  shards = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  return sum(size * leaf.dtype.itemsize for size, leaf in zip(shards, leaves, strict=True))


def minimum(config: ConfigDict, parts: Parts, rows: int, training: bool) -> dict[str, float]:
  """Computes the least FLOPs for `rows` images, by part; no "network" if it is not in GMAC.

  A backward pass costs twice the forward pass; the frozen prior has none. The decoders on DINOv2
  (model.on_dino) are not in GMAC, and a trained prior is counted with what is trained.
  """
  crop, model = config.data.crop, parts.model
  model = model.model if isinstance(model, ablations.Unfrozen) else model
  passes = 2 * rows * (3 if training else 1)
  least, on_dino = {}, config.model.on_dino != "no"
  if config.model.backbone in GMAC and not on_dino:
    once, top = GMAC[config.model.backbone]
    branches = 2 if config.mode == "fdep" else 1
    least["network"] = passes * (once + branches * top) * 1e9 * (crop / 448) ** 2
  if parts.prior:
    vit = parts.prior.model
    tokens = (-(-crop // vit.patch)) ** 2
    if not on_dino:
      channels = model.backbone.top_channels
      places = (crop // model.backbone.top_stride) ** 2
      project = vit.width * channels * tokens
      inside = 11.5 * channels**2 if config.model.fusion == "samf" else 0
      least["samf"] = passes * len(parts.prior.blocks) * (project + inside * places)
    side = -(-crop // vit.patch)
    macs = vit.macs(side, side, parts.prior.blocks)
    if parts.prior.frozen:
      least["frozen_vit"] = 2 * rows * macs
    else:
      least["trained_vit"] = passes * macs
  return least


def command(flags) -> None:
  """Runs `--mode plan`; call `topology.start` before."""
  out = flags.out or flags.workdir
  if not out:
    raise ValueError("--mode plan needs --out or --workdir, the folder for plan.json.")
  kind, sides = topology.parse(flags.topology)
  config = flags.config
  config.host_devices, config.distributed = sides[0] if kind == "cpu" else 1, "off"
  # No cache: compile times are reported, and reading a cached TPU program needs a TPU.
  config.log.compile_cache = ""
  if not flags.thorough:
    jax.config.update(*QUICK)
  mesh.start(config)
  plan(config, flags.topology, out)


def plan(config: ConfigDict, name: str, out: str | os.PathLike) -> dict:
  """Compiles the train and evaluation steps for a slice, writes `plan.json`, prints a table.

  Args:
    config: of a run; its data and weights need not exist.
    name: of the slice, see `topology.parse`.
    out: folder for `plan.json`.

  Returns:
    The content of `plan.json`. FLOPs and bytes of a step are summed over all devices; memory,
    collectives and `…_per_chip` are for one device. "fits" is of both steps, "fits" in "evaluation"
    of that step. If one does not fit, "helps" are the options for it.

  Raises:
    ValueError: the config or the slice is wrong, or the folder cannot be written.
  """
  settings.check(config)
  build.check_network(config)
  out = files.expand(out)
  devices = topology.devices(name)
  the_mesh = mesh.over(devices, config.train.batch_size)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"{out} cannot be written ({error.strerror}). Choose a different folder."
    ) from None
  kind, _ = topology.parse(name)
  chip = topology.CHIPS.get(kind)
  limit = chip.hbm if chip else topology.host_memory() / len(devices)
  parts = abstract(config)
  result = {
    "topology": name,
    "chips": len(devices),
    "backbone": config.model.backbone,
    "mode": config.mode,
    "batch_size": config.train.batch_size,
    "crop": config.data.crop,
    "dtype": config.train.dtype,
    "remat": config.train.remat,
    "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.state["params"])),
    "effort": "quick" if getattr(jax.config, QUICK[0]) == QUICK[1] else "thorough",
    "hbm_limit_bytes": limit,
  }
  gpu = gpus.GPUS.get(kind)
  logging.info("compiling the train step for %s", name)
  try:
    cost = compile_train(config, parts, the_mesh)
    if sum(cost.hbm.values()) > limit:
      result |= {"hbm_by_kind": cost.hbm} if gpu else {}
      raise DoesNotFitError(sum(cost.hbm.values()), cost.seconds)
    result |= {"fits": True, **_report(config, parts, cost, chip, len(devices), True)}
    logging.info("compiling the evaluation step")
    result |= _evaluation(config, parts, the_mesh, chip, limit)
  except DoesNotFitError as error:
    result |= {"fits": False, "hbm_bytes_per_chip": error.needed, "compile_seconds": error.seconds}
    result |= _ways_out(config, parts, the_mesh, limit, error.needed, gpu is not None)
  if gpu:
    result |= _of_gpu(gpu, result)
  print(table(result))
  files.write_json(out / "plan.json", result)
  logging.info("wrote %s", out / "plan.json")
  return result


def _evaluation(config, parts: Parts, the_mesh: Mesh, chip, limit: float) -> dict:
  """Returns what a plan says of the evaluation step; if it does not fit, the batch that does."""
  devices = the_mesh.devices.size
  try:
    cost = compile_eval(config, parts, the_mesh)
    report = _report(config, parts, cost, chip, devices, False)
  except DoesNotFitError as error:  # of the TPU compiler; the others compile any size
    report = {"hbm_bytes_per_chip": error.needed, "compile_seconds": error.seconds}
  needed = report["hbm_bytes_per_chip"]
  report = {"fits": needed <= limit, **report}
  if report["fits"]:
    return {"evaluation": report}
  helps, rows = [], _eval_rows(config, devices)
  rows = min(int(rows * limit / needed), rows - 1)
  rows -= rows % devices
  while rows > 0 and not helps:
    option = {"eval.batch_size": rows}
    tried = _attempt(config, parts, the_mesh, option)
    if tried <= limit:
      helps.append({"options": option, "fits": True, "hbm_bytes_per_chip": tried})
    rows -= devices
  largest = config.train.batch_size  # the train step fits
  return {"fits": False, "helps": helps, "largest_batch": largest, "evaluation": report}


def _eval_rows(config: ConfigDict, devices: int) -> int:
  """Returns the images of an evaluation step: the batch size, rounded up to share evenly."""
  return -(-config.eval.batch_size // devices) * devices


def _report(config, parts: Parts, cost: Cost, chip, devices: int, training: bool) -> dict:
  rows = config.train.batch_size
  if not training:
    rows = _eval_rows(config, devices)
  least = minimum(config, parts, rows, training)
  whole = "network" in least
  flops = cost.flops + cost.prior_flops
  own = sum(least.get(part, 0) for part in ("network", "samf", "trained_vit"))
  report = {
    "hbm_bytes_per_chip": sum(cost.hbm.values()),
    "hbm_by_kind": cost.hbm,
    "flops_per_step": flops * devices,
    "flops_minimum": sum(least.values()) if whole else None,
    "flops_by_part": {
      "network_and_samf": cost.flops * devices,
      "frozen_vit": cost.prior_flops * devices,
    },
    "flops_minimum_by_part": least,
    "flops_over_minimum": cost.flops * devices / own if whole else None,  # without the prior
    "bytes_per_step": cost.traffic * devices,
    "flops_per_chip": flops,
    "bytes_per_chip": cost.traffic,
    "collectives": cost.collectives,
    "compile_seconds": cost.seconds,
    "optimal_seconds": cost.optimal_seconds,
  }
  if chip:
    peak, of_prior = (_peak(chip, dtype) for dtype in (config.train.dtype, config.prior.dtype))
    compute, memory = cost.flops / peak + cost.prior_flops / of_prior, cost.traffic / chip.bandwidth
    seconds = max(compute, memory)
    report["roofline"] = {
      "peak_flops": peak,
      "peak_type": "bfloat16" if peak == chip.flops else "float32, as TF32",
      "peak_bandwidth": chip.bandwidth,
      "seconds_compute": compute,
      "seconds_memory": memory,
      "images_per_second": rows / seconds,
    }
    if training:
      report["roofline"]["epochs_per_hour"] = 3600 * rows / seconds / TRAIN_IMAGES
  return report


def _peak(chip: topology.Chip, dtype: str) -> float:
  """Returns the FLOP/s of products of that type; a TPU's are always of bfloat16."""
  return chip.flops_float32 if chip.flops_float32 and dtype == "float32" else chip.flops


def _of_gpu(gpu: gpus.Gpu, result: dict) -> dict:
  """Says what the compiler's figure for a GPU leaves out, and the setting that it needs."""
  share = None
  small = result["hbm_bytes_per_chip"] + topology.SPARE <= JAX_SHARE * gpu.memory
  if not (result["fits"] and small):
    share = math.floor(100 * (1 - CONTEXT / gpu.memory)) / 100
  return {
    "device": f"NVIDIA {gpu.name}",
    "device_memory_bytes": gpu.memory,
    "compared_with_a_card": False,
    "not_counted": ["cuDNN's workspace", "the CUDA context", "autotuning"],
    "XLA_PYTHON_CLIENT_MEM_FRACTION": share,
  }


def _ways_out(
  config: ConfigDict, parts: Parts, the_mesh: Mesh, limit, needed, gpu: bool = False
) -> dict:
  """Finds options that make the step fit, and the largest batch without them, by compiling each."""
  options = [{"train.remat": kind} for kind in step_lib.REMAT if kind != config.train.remat]
  if parts.prior and not config.prior.shard and the_mesh.devices.size > 1:
    options += [{"prior.shard": True}, {**options[-1], "prior.shard": True}]
  half = {"train.dtype": "bfloat16", "prior.dtype": "bfloat16"}
  if gpu and config.train.dtype != "bfloat16":
    options.append(half)
    if config.train.remat != "products":
      options.append({**half, "train.remat": "products"})
  helps = []
  for option in options:
    if option.get("train.remat") == "none":
      continue
    tried = _attempt(config, parts, the_mesh, option)
    helps.append({"options": option, "fits": tried <= limit, "hbm_bytes_per_chip": tried})
    if tried <= limit:
      break
  # Activations grow with the batch: starts at the proportional size and goes down until one fits.
  devices = the_mesh.devices.size
  rows = min(int(config.train.batch_size * limit / needed), config.train.batch_size - 1)
  rows -= rows % devices
  while rows > 0:
    if _attempt(config, parts, the_mesh, {"train.batch_size": rows}) <= limit:
      break
    rows -= devices
  # Weights do not grow with the batch, so a larger one may fit as well.
  while gpu and rows and rows + devices < config.train.batch_size:
    if _attempt(config, parts, the_mesh, {"train.batch_size": rows + devices}) > limit:
      break
    rows += devices
  return {"helps": helps, "largest_batch": rows}


def _attempt(config, parts: Parts, the_mesh: Mesh, changes: dict) -> float:
  """Returns the bytes that the step needs with some settings of training or evaluation changed."""
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(changes)
  logging.info("compiling with %s", ", ".join(f"{k}={v}" for k, v in changes.items()))
  if "prior.dtype" in changes:
    parts = abstract(changed)
  try:
    compile_step = compile_eval if "eval.batch_size" in changes else compile_train
    return sum(compile_step(changed, parts, the_mesh).hbm.values())
  except DoesNotFitError as error:
    return error.needed


def table(result: dict) -> str:
  """Formats a plan as text."""
  gib = 2**30
  evaluation = result.get("evaluation", {"fits": True})
  if evaluation["fits"]:
    judged, verdict = result, "fits" if result["fits"] else "DOES NOT FIT"
  else:
    judged, verdict = evaluation, "THE EVALUATION DOES NOT FIT"
  lines = [
    f"{result['backbone']}, {result['mode']}, on {result['topology']} ({result['chips']} devices): "
    f"batch {result['batch_size']}, {result['crop']}×{result['crop']}, {result['dtype']}, "
    f"remat {result['remat']}, {result['effort']}",
    f"  {verdict}: "
    f"{judged['hbm_bytes_per_chip'] / gib:.2f} of {result['hbm_limit_bytes'] / gib:.2f} GiB each",
    *_gpu_lines(result),
  ]
  memory = "memory traffic" if "device" in result else "HBM traffic"
  if not result["fits"]:
    lines += _memory_lines(judged.get("hbm_by_kind", {}))
    for helped in result["helps"]:
      settings_ = " ".join(f"--config.{k}={v}" for k, v in helped["options"].items())
      verdict = "fits" if helped["fits"] else "does not fit"
      lines.append(
        f"  {settings_}: {verdict}, {helped['hbm_bytes_per_chip'] / gib:.2f} GiB (compiled)"
      )
    if judged is result:
      lines.append(f"  largest batch that fits: {result['largest_batch']} (compiled)")
    elif not result["helps"]:
      lines.append("  no eval.batch_size fits (compiled)")
    return "\n".join(lines)
  for title, part in (("train step", result), ("evaluation step", result["evaluation"])):
    lines.append(f"  {title}, compiled in {part['compile_seconds']:.0f} s")
    lines += _memory_lines(part["hbm_by_kind"])
    lines.append(f"    {'FLOPs':<18}{part['flops_per_step'] / 1e12:9.3f} T a step")
    for kind, count in part["flops_by_part"].items():
      lines.append(f"      {kind.replace('_', ' '):<16}{count / 1e12:9.3f} T")
    for kind, count in part["flops_minimum_by_part"].items():
      lines.append(f"      at least {kind.replace('_', ' '):<10}{count / 1e12:6.3f} T")
    if part["flops_over_minimum"]:
      lines.append(f"      {part['flops_over_minimum']:.3f} × the minimum, without the ViT")
    lines.append(f"    {memory:<18}{part['bytes_per_step'] / 1e9:9.1f} GB a step")
    moved = sum(c["bytes"] * c["count"] for c in part["collectives"])
    kinds = sorted({c["op"] for c in part["collectives"]})
    lines.append(f"    {'collectives':<18}{moved / 1e6:9.2f} MB a device ({', '.join(kinds)})")
    if part["optimal_seconds"]:
      lines.append(f"    {'compiler says':<18}{part['optimal_seconds'] * 1e3:9.1f} ms")
    if "roofline" in part:
      roof = part["roofline"]
      lines.append(
        f"    {'roofline':<18}{roof['images_per_second']:9.1f} images/s "
        f"(a chip's {roof['peak_flops'] / 1e12:.0f} TFLOP/s {roof['peak_type']}: "
        f"{roof['seconds_compute'] * 1e3:.1f} ms; {roof['peak_bandwidth'] / 1e9:.0f} GB/s: "
        f"{roof['seconds_memory'] * 1e3:.1f} ms)"
      )
      if "epochs_per_hour" in roof:
        lines.append(f"    {'':<18}{roof['epochs_per_hour']:9.1f} epochs/hour of SIRST3")
  return "\n".join(lines)


def _memory_lines(kinds: dict[str, int]) -> list[str]:
  return [
    f"    {kind.replace('_', ' '):<18}{size / 2**30:9.3f} GiB a device"
    for kind, size in kinds.items()
  ]


def _gpu_lines(result: dict) -> list[str]:
  """Formats what a plan for GPUs says beside the others."""
  if "device" not in result:
    return []
  lines = [
    f"  {result['device']}: {result['device_memory_bytes'] / 2**30:.2f} GiB, of which "
    f"{topology.SPARE / 2**30:g} stay free for what is not counted: "
    f"{', '.join(result['not_counted'])}",
    "  This plan was never compared with a card.",
  ]
  share = result["XLA_PYTHON_CLIENT_MEM_FRACTION"]
  if share:
    lines.append(
      f"  Set XLA_PYTHON_CLIENT_MEM_FRACTION={share}: JAX takes {JAX_SHARE:.0%} of a card's memory "
      "unless told otherwise."
    )
  return lines
