"""Converts DINOv2 weights, with facebookresearch or Hugging Face names, to fdep_jax.priors.dinov2.

  python -m converters.dinov2 IN OUT

writes OUT (.safetensors, facebookresearch names, float32), which also contains the SHA-256 of IN.
Training takes either file.
"""

import hashlib
import math
import os
import pathlib
import re
import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.rules import listing, without_wrappers
from converters.torch_file import is_safetensors, read_torch
from fdep_jax.priors import dinov2
from fdep_jax.runtime import files

FORMAT = "fdep_jax.priors.dinov2/1"  # metadata of a converted file
_HEAD_WIDTH = 64  # of every published DINOv2; the shapes do not show it


class _Rule(NamedTuple):
  ours: str  # path of our parameter
  upstream: str  # facebookresearch name
  hugging_face: tuple[str, ...]  # several are concatenated along their first axis
  axes: tuple[int, ...] = ()  # the source's axes in our order, before reshaping; empty: unchanged


def _layer(ours: str, upstream: str, *hugging_face: str) -> list[_Rule]:
  """Lists the rules of a linear layer."""
  return [
    _Rule(
      f"{ours}/kernel", f"{upstream}.weight", tuple(f"{n}.weight" for n in hugging_face), (1, 0)
    ),
    _Rule(f"{ours}/bias", f"{upstream}.bias", tuple(f"{n}.bias" for n in hugging_face)),
  ]


def _norm(ours: str, upstream: str, hugging_face: str) -> list[_Rule]:
  return [
    _Rule(f"{ours}/scale", f"{upstream}.weight", (f"{hugging_face}.weight",)),
    _Rule(f"{ours}/bias", f"{upstream}.bias", (f"{hugging_face}.bias",)),
  ]


class _Naming(NamedTuple):
  """Names of the arrays whose shapes give the sizes."""

  patch: str
  position: str  # fills two parameters of ours, so it has no rule
  registers: str
  block: str  # prefix, before the number
  gated: str  # of a block
  plain: str


_UPSTREAM = _Naming(
  patch="patch_embed.proj.weight",
  position="pos_embed",
  registers="register_tokens",
  block="blocks.",
  gated="mlp.w12.weight",
  plain="mlp.fc1.weight",
)
_HUGGING_FACE = _Naming(
  patch="embeddings.patch_embeddings.projection.weight",
  position="embeddings.position_embeddings",
  registers="embeddings.register_tokens",
  block="encoder.layer.",
  gated="mlp.weights_in.weight",
  plain="mlp.fc1.weight",
)

_RULES = [
  _Rule("patch_embed/kernel", _UPSTREAM.patch, (_HUGGING_FACE.patch,), (2, 3, 1, 0)),
  _Rule(
    "patch_embed/bias", "patch_embed.proj.bias", ("embeddings.patch_embeddings.projection.bias",)
  ),
  _Rule("class_token", "cls_token", ("embeddings.cls_token",)),
  _Rule("register_tokens", _UPSTREAM.registers, (_HUGGING_FACE.registers,)),
  *_norm("norm", "norm", "layernorm"),
]
_BLOCK_RULES = [  # below blocks.N and encoder.layer.N
  *_norm("norm1", "norm1", "norm1"),
  *_layer("qkv", "attn.qkv", *(f"attention.attention.{n}" for n in ("query", "key", "value"))),
  *_layer("project", "attn.proj", "attention.output.dense"),
  _Rule("scale1", "ls1.gamma", ("layer_scale1.lambda1",)),
  *_norm("norm2", "norm2", "norm2"),
  _Rule("scale2", "ls2.gamma", ("layer_scale2.lambda1",)),
]
_GELU_RULES = [
  *_layer("expand", "mlp.fc1", "mlp.fc1"),
  *_layer("reduce", "mlp.fc2", "mlp.fc2"),
]
_SWIGLU_RULES = [
  *_layer("expand", "mlp.w12", "mlp.weights_in"),
  *_layer("reduce", "mlp.w3", "mlp.weights_out"),
]
_UNUSED = {
  r"(embeddings\.)?mask_token": "stands for masked patches in pretraining only",
  r"(dino_head|ibot_head)\..*": "heads of pretraining",
  r"(classifier|linear_head)\..*": "a classifier on top",
  r"student\..*": "the teacher beside it is used",
  r"\w+_loss\..*": "centres of the losses of pretraining",
}


def load_dinov2(
  path_or_state: str | os.PathLike | dict[str, np.ndarray],
  dtype=jnp.float32,
  *,
  heads: int | None = None,
  variable: type[nnx.Variable] = dinov2.Frozen,
) -> dinov2.DINOv2:
  """Loads DINOv2 with the weights of a file.

  Width, depth, registers, MLP and patch are inferred from names and shapes.

  Args:
    path_or_state: a file for `read_torch` (or a converted one), or name -> array. The names are
      those of facebookresearch/dinov2 or of Hugging Face's `Dinov2Model` and
      `Dinov2WithRegistersModel`, also below a prefix such as "backbone." or "teacher.backbone.".
    dtype: of the matrices, as for `DINOv2`.
    heads: of the attention; default width/64, as in every published model.
    variable: `nnx.Param` makes it trainable.

  Raises:
    ValueError: not a DINOv2 checkpoint; the message lists every name that does not fit.
    FileNotFoundError: there is no such file.
  """
  if isinstance(path_or_state, dict):
    return _load(path_or_state, dtype, heads, variable)
  state = read_torch(path_or_state)
  try:
    return _load(state, dtype, heads, variable)
  except ValueError as error:
    raise ValueError(f"{path_or_state}: {error}") from None


def fingerprint(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of a weight file; for a converted file, that of its source."""
  source = _converted_from(path)
  if source is not None:
    return source
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def state_dict(vit: dinov2.DINOv2) -> dict[str, np.ndarray]:
  """Converts back: facebookresearch name -> float32 array, without `mask_token`."""
  ours = _flat(vit)
  state = {}
  for rule, block in _plan(vit):
    array = np.asarray(ours[_target(rule, block)][...], np.float32)
    if block is not None:
      array = array[block]
    if len(rule.axes) == 4:
      array = array.reshape(vit.patch, vit.patch, 3, vit.width)
    if rule.axes:
      array = array.transpose(np.argsort(rule.axes))
    state[_names(rule, block, _UPSTREAM)[0]] = np.ascontiguousarray(array)
  position = [ours[name][...].reshape(1, -1, vit.width) for name in ("class_position", "position")]
  state[_UPSTREAM.position] = np.concatenate([np.asarray(part, np.float32) for part in position], 1)
  return state


def convert(source: str | os.PathLike, out: str | os.PathLike) -> str:
  """Writes `source` to `out` as safetensors, and keeps it only if it loads to the same output.

  Returns:
    The SHA-256 of `source`, which `out` contains.

  Raises:
    ValueError: `source` is not DINOv2, or `out` exists and was not converted from it.
    FileNotFoundError: there is no `source`, or no folder for `out`.
  """
  import safetensors.numpy

  out = pathlib.Path(out)
  if out.suffix != ".safetensors":
    raise ValueError(f"{out}: a converted file is safetensors; name it {out.stem}.safetensors.")
  if not out.absolute().parent.is_dir():
    raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} to.")
  vit = load_dinov2(source)
  sha256 = fingerprint(source)
  if out.exists():
    if not is_safetensors(out) or _converted_from(out) != sha256:
      raise ValueError(f"{out}: exists and was not converted from {source}; remove or rename it.")
    return sha256
  expected = _probe(vit)
  state = state_dict(vit)
  del vit  # ViT-g takes 4.5 GB, and is loaded again below
  with files.replacing(out) as part:
    safetensors.numpy.save_file(state, part, {"format": FORMAT, "sha256": sha256})
    del state
    if not np.array_equal(_probe(load_dinov2(part)), expected):
      raise ValueError(f"{out}: its outputs differ from those of {source}; try again.")
  return sha256


def _converted_from(path: str | os.PathLike) -> str | None:
  import safetensors

  if not is_safetensors(path):
    return None
  try:
    with safetensors.safe_open(path, framework="np") as file:
      metadata = file.metadata() or {}
  except safetensors.SafetensorError:
    return None
  return metadata.get("sha256") if metadata.get("format") == FORMAT else None


def _probe(vit: dinov2.DINOv2) -> np.ndarray:
  """Computes the last block's output for a fixed image."""
  shape = (1, 2 * vit.patch, 3 * vit.patch, 3)
  image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  return np.asarray(vit(image, levels=(vit.depth - 1,))[0])


def _load(state, dtype, heads, variable) -> dinov2.DINOv2:
  state, naming, problems = _strip({without_wrappers(n): array for n, array in state.items()})
  sizes = _sizes(state, naming)
  heads = heads or sizes["width"] // _HEAD_WIDTH
  if not heads or sizes["width"] % heads:
    raise ValueError(f"a width of {sizes['width']} is no multiple of 64; give `heads`.")
  # Shapes only: drawing initial values takes seconds.
  vit = nnx.eval_shape(
    lambda: dinov2.DINOv2(**sizes, heads=heads, dtype=dtype, variable=variable, rngs=nnx.Rngs(0))
  )
  targets = _flat(vit)
  arrays = {}
  left = dict(state)
  for rule, block in _plan(vit):
    names = _names(rule, block, naming)
    parts = {name: np.asarray(left.pop(name)) for name in names if name in left}
    target = _target(rule, block)
    shape = targets[target].shape[block is not None :]
    problems += [f"{name}: missing; it fills {target}" for name in names if name not in parts]
    expected = _source_shape(rule, shape, sizes, len(names))
    bad = [
      f"{name}: {part.dtype}{part.shape} instead of floats {expected}; it fills {target}"
      for name, part in parts.items()
      if part.shape != expected or not _is_float(part)
    ]
    problems += bad
    if bad or len(parts) < len(names):
      continue
    lost = sum(part.size - int(np.isfinite(part).sum()) for part in parts.values())
    if lost:
      problems.append(f"{names[0]}: {lost} values are NaN or infinite; it fills {target}")
    array = np.concatenate(list(parts.values())) if len(parts) > 1 else parts[names[0]]
    if rule.axes:
      array = array.transpose(rule.axes)
    if target not in arrays:
      arrays[target] = np.empty(targets[target].shape, targets[target].dtype)
    arrays[target][... if block is None else block] = array.reshape(shape)
  table = np.asarray(left.pop(naming.position))
  if not _is_float(table):
    problems.append(f"{naming.position}: {table.dtype} instead of floats")
  else:
    table = table.astype(np.float32)
    arrays["class_position"] = table[:, :1]
    arrays["position"] = table[0, 1:].reshape(sizes["grid"], sizes["grid"], -1)
  problems += [
    f"{name}: unknown, no rule takes it"
    for name in left
    if not any(re.fullmatch(pattern, name) for pattern in _UNUSED)
  ]
  if problems:
    count = f"{len(problems)} conversion problem{'s' if len(problems) > 1 else ''}"
    raise ValueError("\n  ".join([f"not a DINOv2 checkpoint. {count}:", *listing(problems)]))
  for target, variable in targets.items():
    variable.set_value(jnp.asarray(arrays.pop(target)))
  return vit


def _strip(state) -> tuple[dict[str, np.ndarray], _Naming, list[str]]:
  """Returns the state below its prefix, its naming, and a problem for each unknown other name."""
  for naming in (_UPSTREAM, _HUGGING_FACE):
    prefixes = [name.removesuffix(naming.patch) for name in state if name.endswith(naming.patch)]
    if prefixes:
      break
  else:
    found = ", ".join(list(state)[:3])
    raise ValueError(
      f"not a DINOv2 checkpoint: neither {_UPSTREAM.patch} nor {_HUGGING_FACE.patch} is in it, but "
      f"{found} …"
    )
  if len(prefixes) > 1:  # a training checkpoint has a student too
    prefixes = [prefix for prefix in prefixes if "teacher." in prefix] or prefixes
  if len(prefixes) > 1:
    raise ValueError(f"several networks in one file, below {', '.join(map(repr, prefixes))}.")
  prefix, stripped, problems = prefixes[0], {}, []
  for name, array in state.items():
    if name.startswith(prefix):
      # Upstream trains in chunks of blocks, "blocks.CHUNK.N.…"; N continues from chunk to chunk.
      name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name.removeprefix(prefix))
      stripped[name] = array
    elif not any(re.fullmatch(rf"(.*\.)?{pattern}", name) for pattern in _UNUSED):
      problems.append(f"{name}: unknown, the network is below {prefix!r}")
  return stripped, naming, problems


def _sizes(state, naming: _Naming) -> dict[str, int | bool]:
  """Infers the keyword arguments of `DINOv2`."""
  kernel, table = np.shape(state[naming.patch]), np.shape(state.get(naming.position, ()))
  if len(kernel) != 4 or kernel[1] != 3 or kernel[2] != kernel[3]:
    raise ValueError(
      f"not a DINOv2 checkpoint: {naming.patch} is {kernel}, not (width, 3, patch, patch)."
    )
  width = kernel[0]
  grid = math.isqrt(max(table[1] - 1, 0)) if len(table) == 3 else 0
  if not grid or table != (1, 1 + grid**2, width):
    found = table if naming.position in state else "missing"
    raise ValueError(
      f"not a DINOv2 checkpoint: {naming.position} is {found}, not (1, 1 + n², {width})."
    )
  pattern = re.escape(naming.block) + r"(\d{1,3})\..*"
  blocks = [int(match[1]) for name in state if (match := re.fullmatch(pattern, name))]
  if not blocks:
    raise ValueError(f"not a DINOv2 checkpoint: there is no {naming.block}0.")
  first = f"{naming.block}{min(blocks)}."
  known = {size["depth"] for size in dinov2.SIZES.values() if size["width"] == width}
  if known and max(blocks) + 1 not in known:
    raise ValueError(
      f"it has {max(blocks) + 1} blocks, and a DINOv2 of width {width} has {known.pop()}: it is "
      "cut off, or not a whole model. Copy or download it again."
    )
  swiglu = first + naming.gated in state
  hidden = np.shape(state.get(first + (naming.gated if swiglu else naming.plain), (0,)))[0]
  return {
    "width": width,
    "depth": max(blocks) + 1,
    "registers": (0, 0, *np.shape(state.get(naming.registers, ())))[-2],
    "swiglu": swiglu,
    "hidden": hidden // 2 if swiglu else hidden,
    "patch": kernel[2],
    "grid": grid,
  }


def _plan(vit: dinov2.DINOv2) -> list[tuple[_Rule, int | None]]:
  """Lists every rule of this network with its block; None: outside the blocks."""
  block_rules = _BLOCK_RULES + (_SWIGLU_RULES if vit.blocks.swiglu else _GELU_RULES)
  rules = [rule for rule in _RULES if rule.ours != "register_tokens" or vit.registers]
  return [(rule, None) for rule in rules] + [
    (rule, block) for block in range(vit.depth) for rule in block_rules
  ]


def _names(rule: _Rule, block: int | None, naming: _Naming) -> tuple[str, ...]:
  names = rule.hugging_face if naming is _HUGGING_FACE else (rule.upstream,)
  prefix = "" if block is None else f"{naming.block}{block}."
  return tuple(prefix + name for name in names)


def _target(rule: _Rule, block: int | None) -> str:
  return rule.ours if block is None else f"blocks/{rule.ours}"


def _source_shape(rule: _Rule, shape, sizes, count: int) -> tuple[int, ...]:
  """Returns the shape of each of the `count` source arrays that form our `shape`."""
  if len(rule.axes) == 4:
    return (sizes["width"], 3, sizes["patch"], sizes["patch"])
  shape = tuple(shape[axis] for axis in rule.axes) if rule.axes else tuple(shape)
  return (shape[0] // count, *shape[1:])


def _flat(vit: dinov2.DINOv2) -> dict[str, nnx.Variable]:
  return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(vit))}


def _is_float(array: np.ndarray) -> bool:
  return np.issubdtype(array.dtype, np.floating) or array.dtype == jnp.bfloat16


def main(argv: list[str]) -> int:
  """Runs the command; returns 0 if OUT is written or exists already, 2 for bad input."""
  if len(argv) != 2:
    print("Usage: python -m converters.dinov2 IN OUT.safetensors", file=sys.stderr)
    return 2
  try:
    sha256 = convert(*argv)
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  print(f"{argv[1]}: DINOv2 of {argv[0]} (SHA-256 {sha256})")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
