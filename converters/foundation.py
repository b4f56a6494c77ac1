"""Loads, recognises and converts the weight files of foundation models.

`converters/<name>.py` has a `TABLE` for each file of `fdep_jax/priors`; what they share is here.
"""

import hashlib
import importlib
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.rules import listing, without_wrappers
from converters.torch_file import is_safetensors, read_torch
from fdep_jax import priors
from fdep_jax.layers.transformer import Frozen
from fdep_jax.priors import Foundation
from fdep_jax.runtime import files

HEAD_WIDTH = 64  # of every model covered but DINOv3's largest; the shapes do not show it
_FORMAT = re.compile(r"fdep_jax\.priors\.\w+/1")  # metadata of a converted file

# Names that tell what a file is that no prior can be, and how messages call it.
_OTHERS = {
  r"(.*\.)?(downsample_layers|stages)\.\d+\..*(dwconv|depthwise_conv|gamma|pwconv).*|"
  r"(.*\.)?downsample_layers\.\d+\..*": "a ConvNeXt, a pyramid of convolutions without tokens",
  r"(.*\.)?(cls_attn_blocks\..*|pos_embeder\..*|attn\.temperature|local_mp\..*)": "an XCiT",
  r"(.*\.)?layer[1-4]\.\d+\.(conv|bn|downsample).*|(.*\.)?stages\.\d+\.layers\.\d+\.layer\..*|"
  r"(.*\.)?fc\.weight": "a ResNet",
  r"(.*\.)?(text_model|text_backbone|token_embedding|text_projection|resblocks)(\..*)?": (
    "a model with a text tower"
  ),
  r"(.*\.)?(rel_pos_h|rel_pos_w|mask_decoder\..*)": "a SAM",
  r"(.*\.)?(class_embedding|pre_layrnorm\..*)|vision_model\..*": "a CLIP or SigLIP",
  r"(.*\.)?(decoder_embed|decoder_pred|decoder_blocks)\..*": "a masked autoencoder",
  r"(.*\.)?(reg_token|gamma_[12]|attn\.q_bias|mlp\.fc1_[gx]\..*)": (
    "timm's own naming, which is not covered: take the file of its authors or of Hugging Face"
  ),
}
_HEADS = {
  r"(dino_head|ibot_head|head\.mlp|head\.last_layer)(\..*)?": "heads of pretraining",
  r"(classifier|linear_head|pooler)\..*": "a classifier or pooler on top",
  r"student\..*": "the teacher beside it is used",
  r"\w+_loss\..*": "centres of the losses of pretraining",
}


class Kind(NamedTuple):
  """How an array of a file becomes one of ours, and back."""

  shape: Callable[[Foundation, tuple[int, ...]], tuple[int, ...]]  # of the source, from ours
  read: Callable[[np.ndarray], np.ndarray] = lambda array: array  # before reshaping to ours
  write: Callable[[Foundation, np.ndarray], np.ndarray] = lambda model, array: array


PLAIN = Kind(lambda model, shape: tuple(shape))
MATRIX = Kind(lambda model, shape: tuple(shape[::-1]), np.transpose, lambda model, a: a.T)
PATCHES = Kind(
  lambda model, shape: (model.width, 3, model.patch, model.patch),
  lambda array: array.transpose(2, 3, 1, 0),
  lambda model, a: a.reshape(model.patch, model.patch, 3, -1).transpose(3, 2, 0, 1),
)

Column = str | tuple[str | None, ...]


class Rule(NamedTuple):
  """One array of ours and its names, a column for each naming.

  Several names are parts along the first axis; None is a part of zeros that the naming leaves out.
  """

  ours: str  # path, below `blocks/` in the rules of a block
  names: tuple[Column, ...]
  kind: Kind = PLAIN
  # If given, all names may be absent: our shape → values.
  default: Callable[[tuple[int, ...]], np.ndarray] | None = None


def matrix(ours: str, *columns: Column) -> list[Rule]:
  """Lists the rules of a linear layer."""
  return [
    Rule(f"{ours}/kernel", tuple(_with(column, ".weight") for column in columns), MATRIX),
    Rule(f"{ours}/bias", tuple(_with(column, ".bias") for column in columns)),
  ]


def norm(ours: str, *columns: Column) -> list[Rule]:
  """Lists the rules of a LayerNorm."""
  return [
    Rule(f"{ours}/scale", tuple(_with(column, ".weight") for column in columns)),
    Rule(f"{ours}/bias", tuple(_with(column, ".bias") for column in columns)),
  ]


def _with(column: Column, suffix: str) -> tuple[str, ...]:
  return tuple(name + suffix for name in _tuple(column))


def _tuple(column: Column) -> tuple[str | None, ...]:
  return (column,) if isinstance(column, str) else column


class Naming(NamedTuple):
  """How one source names the arrays whose shapes give the sizes."""

  column: int  # of the rules
  patch: str
  block: str = ""  # prefix, before the number
  mark: str = ""  # of a block; no other naming of the model has it
  position: str = ""  # learnt position table; it fills two arrays of ours, so it has no rule
  registers: str = ""
  gated: str = ""  # of a block, in a gated MLP only
  packed: bool = False  # whether it is gate and value in one
  plain: str = ""  # of a block, in an ungated MLP


class Table(NamedTuple):
  """Everything that tells one kind of prior from another in a file."""

  model: type[Foundation]
  namings: tuple[Naming, ...]  # the first is the one that is written
  sizes: Callable[[dict, Naming], dict]  # keyword arguments of `model`
  rules: Callable[[Foundation], list[Rule]]
  recognises: Callable[["Names"], bool]  # among files of all priors
  block_rules: Callable[[Foundation], list[Rule]] = lambda model: []
  unused: dict[str, str] = {}  # pattern of names → why they are left out

  @property
  def title(self) -> str:
    return self.model.title


class Names:
  """The names of a file, whatever their prefix."""

  def __init__(self, state: dict[str, np.ndarray]):
    self._state = state

  def has(self, *endings: str) -> bool:
    """Tells whether any name ends so, after a dot or as a whole."""
    return any(f".{name}".endswith(f".{end}") for name in self._state for end in endings)

  def shape(self, ending: str) -> tuple[int, ...]:
    """Returns the shape of the first array whose name ends so; () if there is none."""
    for name, array in self._state.items():
      if f".{name}".endswith(f".{ending}"):
        return np.shape(array)
    return ()


def tables() -> Iterator[tuple[str, Table]]:
  """Yields the table of each kind of prior that has one, by name."""
  for name in priors.names():
    try:
      found = table(name)
    except ValueError:  # a new kind without a table keeps none of the others from loading
      continue
    yield name, found


def table(name: str) -> Table:
  """Returns the table of a kind of prior.

  Raises:
    ValueError: there is no such prior, or no table for it.
  """
  priors.model_class(name)
  try:
    return importlib.import_module(f"converters.{name}").TABLE
  except ModuleNotFoundError:
    raise ValueError(
      f"No converter for the prior {name}: write converters/{name}.py with a TABLE "
      "(converters/dino.py is an example)."
    ) from None


def load_prior(
  path_or_state: str | os.PathLike | dict[str, np.ndarray],
  dtype=jnp.float32,
  *,
  kind: str | None = None,
  heads: int | None = None,
  variable: type[nnx.Variable] = Frozen,
) -> Foundation:
  """Loads a foundation model; which one it is, is seen from names and shapes.

  Args:
    path_or_state: a file for `read_torch` (or a converted one), or name -> array. The names are
      those of the authors, or of Hugging Face's files and of transformers 4 and 5 in memory, also
      below a prefix such as "backbone." or "teacher.backbone.".
    dtype: of the matrices.
    kind: accept this one only, a name of `priors.names()`; default any.
    heads: of the attention; default width/64, or what the file says.
    variable: `nnx.Param` makes it trainable.

  Raises:
    ValueError: the file is none of the models; the message says what it looks like, or lists every
      name that does not fit.
    FileNotFoundError: there is no such file.
  """
  if isinstance(path_or_state, dict):
    return _load(path_or_state, dtype, kind, heads, variable)
  state = read_torch(path_or_state)
  try:
    model = _load(state, dtype, kind, heads, variable)
    _check_depth(model)
    return model
  except ValueError as error:
    raise ValueError(f"{path_or_state}: {error}") from None


def recognise(state: dict[str, np.ndarray]) -> str | None:
  """Returns the kind of prior that a state_dict is; None if it is none."""
  names = Names(state)
  if _other(state):
    return None
  return next((name for name, found in tables() if found.recognises(names)), None)


def _other(state: dict[str, np.ndarray]) -> str:
  """Says what a state_dict is that no prior can be; "" if that is not seen."""
  for pattern, reason in _OTHERS.items():
    match = next((name for name in state if re.fullmatch(pattern, name)), None)
    if match:
      return f"{reason} ({match[:200]})"
  return ""


def _load(state, dtype, kind, heads, variable) -> Foundation:
  state = {without_wrappers(name): array for name, array in state.items()}
  found = recognise(state)
  if kind is None and found is None:
    known = ", ".join(each.title for _, each in tables())
    other = _other(state)
    seen = f"it looks like {other}" if other else f"its names are {', '.join(list(state)[:3])} …"
    raise ValueError(f"not a foundation model that is covered ({known}): {seen}.")
  try:
    return _fill(table(kind or found), state, dtype, heads, variable)
  except ValueError as error:
    if kind is not None and found != kind:
      other = _other(state) or (found and f"{table(found).title}; use converters.load_prior")
      if other:
        raise ValueError(f"{error}\nIt looks like {other}.") from None
    raise


def _fill(the_table: Table, state, dtype, heads, variable) -> Foundation:
  title = the_table.title
  state, naming, problems = _strip(the_table, state)
  sizes = the_table.sizes(state, naming)
  if "heads" in sizes:
    sizes["heads"] = heads or sizes["heads"]
    if not sizes["heads"] or sizes["width"] % sizes["heads"]:
      raise ValueError(f"a width of {sizes['width']} is no multiple of 64; give `heads`.")
  # Shapes only: drawing initial values takes seconds.
  model = nnx.eval_shape(
    lambda: the_table.model(**sizes, dtype=dtype, variable=variable, rngs=nnx.Rngs(0))
  )
  targets = _flat(model)
  arrays, used = {}, set()
  for rule, block in _plan(the_table, model):
    names = _names(rule, block, naming)
    target = _target(rule, block)
    shape = targets[target].shape[block is not None :]
    expected = rule.kind.shape(model, shape)
    expected = (expected[0] // max(len(names), 1), *expected[1:])
    parts = {name: np.asarray(state[name]) for name in names if name in state}
    used |= parts.keys()
    if rule.default and not parts:
      value = rule.default(shape)
    else:
      missing = [f"{n}: missing; it fills {target}" for n in names if n and n not in parts]
      bad = [
        f"{name}: {part.dtype}{part.shape} instead of floats {expected}; it fills {target}"
        for name, part in parts.items()
        if part.shape != expected or not _is_float(part)
      ]
      problems += missing + bad
      if bad or missing:
        continue
      zeros = np.zeros(expected, np.float32)
      for name, part in parts.items():
        problems += _lost(name, part, target)
      pieces = [parts[name] if name else zeros for name in names]
      value = rule.kind.read(np.concatenate(pieces) if len(pieces) > 1 else pieces[0])
    if target not in arrays:
      arrays[target] = np.empty(targets[target].shape, targets[target].dtype)
    arrays[target][... if block is None else block] = value.reshape(shape)
  if naming.position:
    used.add(naming.position)
    problems += _fill_position(arrays, np.asarray(state[naming.position]), naming, sizes["grid"])
  problems += [
    f"{name}: unknown, no rule takes it"
    for name in state
    if name not in used and not _is_unused(the_table, name)
  ]
  if problems:
    count = f"{len(problems)} conversion problem{'s' if len(problems) > 1 else ''}"
    raise ValueError("\n  ".join([f"not a {title} checkpoint. {count}:", *listing(problems)]))
  for target, leaf in targets.items():
    leaf.set_value(jnp.asarray(arrays.pop(target)))
  return model


def _check_depth(model: Foundation) -> None:
  """Raises ValueError if no published model of this width has this number of blocks.

  A file that ends early is a whole model of fewer blocks.
  """
  published = getattr(model, "sizes", {}).values()
  known = sorted({size["depth"] for size in published if size["width"] == model.width})
  if known and model.depth not in known:
    raise ValueError(
      f"it has {model.depth} blocks, and a {model.title} of width {model.width} has "
      f"{' or '.join(map(str, known))}: it is cut off, or not a whole model. Copy or download it "
      "again."
    )


def _lost(name: str, stored: np.ndarray, target: str) -> list[str]:
  """Says how many values of an array are not finite; [] if all are."""
  count = stored.size - int(np.isfinite(stored).sum())
  return [f"{name}: {count} values are NaN or infinite; it fills {target}"] if count else []


def _fill_position(arrays, stored: np.ndarray, naming: Naming, grid: int) -> list[str]:
  if not _is_float(stored):
    return [f"{naming.position}: {stored.dtype} instead of floats"]
  if lost := _lost(naming.position, stored, "position"):
    return lost
  stored = stored.astype(np.float32)
  arrays["class_position"] = stored[:, :1]
  arrays["position"] = stored[0, 1:].reshape(grid, grid, -1)
  return []


def _strip(the_table: Table, state) -> tuple[dict[str, np.ndarray], Naming, list[str]]:
  """Returns the state below its prefix, its naming, and a problem for each unknown other name."""
  found = []
  for naming in the_table.namings:
    prefixes = [name.removesuffix(naming.patch) for name in state if _ends(name, naming.patch)]
    start, end = naming.block, naming.mark
    marked = any(n.startswith(p + start) and n.endswith(end) for n in state for p in prefixes)
    if prefixes:
      found.append((naming, prefixes, marked))
  if not found:
    names, wanted = list(state)[:3], [naming.patch for naming in the_table.namings]
    nor = " nor ".join(dict.fromkeys(wanted))
    raise ValueError(
      f"not a {the_table.title} checkpoint: neither {nor} is in it, but {', '.join(names)} …"
    )
  naming, prefixes, _ = next((each for each in found if each[2]), found[0])
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
    elif not _is_unused(the_table, name, below=True):
      problems.append(f"{name}: unknown, the network is below {prefix!r}")
  return stripped, naming, problems


def _ends(name: str, ending: str) -> bool:
  return name == ending or name.endswith(f".{ending}")


def _is_unused(the_table: Table, name: str, below: bool = False) -> bool:
  start = r"(.*\.)?" if below else ""
  return any(re.fullmatch(start + pattern, name) for pattern in {**_HEADS, **the_table.unused})


def vit_sizes(title: str, state, naming: Naming) -> dict[str, int | bool]:
  """Infers the keyword arguments of a vision transformer from shapes.

  Raises:
    ValueError: they are not those of one.
  """
  kernel = np.shape(state[naming.patch])
  if len(kernel) != 4 or kernel[1] != 3 or kernel[2] != kernel[3] or not kernel[0] * kernel[2]:
    raise ValueError(
      f"not a {title} checkpoint: {naming.patch} is {kernel}, not (width, 3, patch, patch)."
    )
  width, sizes = kernel[0], {}
  if naming.position:
    stored = np.shape(state.get(naming.position, ()))
    grid = math.isqrt(max(stored[1] - 1, 0)) if len(stored) == 3 else 0
    if not grid or stored != (1, 1 + grid**2, width):
      found = stored if naming.position in state else "missing"
      raise ValueError(
        f"not a {title} checkpoint: {naming.position} is {found}, not (1, 1 + n², {width})."
      )
    sizes["grid"] = grid
  pattern = re.escape(naming.block) + r"(\d{1,3})\..*"
  blocks = [int(match[1]) for name in state if (match := re.fullmatch(pattern, name))]
  if not blocks:
    raise ValueError(f"not a {title} checkpoint: there is no {naming.block}0.")
  if max(blocks) >= 4 * len(set(blocks)):  # would take memory for blocks that are not there
    raise ValueError(
      f"not a {title} checkpoint: it has {len(set(blocks))} blocks, one of them {naming.block}"
      f"{max(blocks)}."
    )
  if naming.registers:
    sizes["registers"] = (0, 0, *np.shape(state.get(naming.registers, ())))[-2]
  first = f"{naming.block}{min(blocks)}."
  hidden = naming.plain
  if naming.gated:
    sizes["swiglu"] = first + naming.gated in state
    hidden = naming.gated if sizes["swiglu"] else naming.plain
  sizes["hidden"] = (*np.shape(state.get(first + hidden, (0,))), 0)[0]
  if sizes.get("swiglu") and naming.packed:
    sizes["hidden"] //= 2
  sizes |= {"width": width, "depth": max(blocks) + 1, "heads": width // HEAD_WIDTH}
  return {**sizes, "patch": kernel[2]}


def state_dict(model: Foundation) -> dict[str, np.ndarray]:
  """Converts back: name of the first naming (the authors') -> float32 array.

  Arrays that are left out in loading, such as `mask_token`, are not in it.
  """
  the_table = table(_name(model))
  ours, naming = _flat(model), the_table.namings[0]
  state = {}
  for rule, block in _plan(the_table, model):
    array = np.asarray(ours[_target(rule, block)][...], np.float32)
    array = rule.kind.write(model, array if block is None else array[block])
    names = _names(rule, block, naming)
    for name, part in zip(names, np.split(array, len(names)) if names else (), strict=True):
      state[name] = np.ascontiguousarray(part)
  if naming.position:
    tokens = [
      ours[name][...].reshape(1, -1, model.width) for name in ("class_position", "position")
    ]
    tokens = [np.asarray(part, np.float32) for part in tokens]
    state[naming.position] = np.concatenate(tokens, 1)
  return state


def fingerprint(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of a weight file; for a converted file, that of its source."""
  source = _converted_from(path)
  if source is not None:
    return source
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def convert(
  source: str | os.PathLike,
  out: str | os.PathLike,
  load: Callable[..., Foundation] = load_prior,
  write: Callable[[Foundation], dict[str, np.ndarray]] = state_dict,
) -> str:
  """Writes `source` to `out` as safetensors, and keeps it only if it loads to the same output.

  Args:
    source: a weight file.
    out: *.safetensors.
    load, write: of one kind of prior, if only that is to be accepted.

  Returns:
    The SHA-256 of `source`, which `out` contains.

  Raises:
    ValueError: `source` does not load, or `out` exists and was not converted from it.
    FileNotFoundError: there is no `source`, or no folder for `out`.
  """
  import safetensors.numpy

  out = pathlib.Path(out)
  if out.suffix != ".safetensors":
    raise ValueError(f"{out}: a converted file is safetensors; name it {out.stem}.safetensors.")
  if not out.absolute().parent.is_dir():
    raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} to.")
  model = load(source)
  sha256 = fingerprint(source)
  if out.exists():
    if not is_safetensors(out) or _converted_from(out) != sha256:
      raise ValueError(f"{out}: exists and was not converted from {source}; remove or rename it.")
    return sha256
  expected, about = _probe(model), {"format": f"fdep_jax.priors.{_name(model)}/1", "sha256": sha256}
  state = write(model)
  del model  # ViT-g takes 4.5 GB, and is loaded again below
  with files.replacing(out) as part:
    safetensors.numpy.save_file(state, part, about)
    del state
    if not np.array_equal(_probe(load(part)), expected):
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
  return metadata.get("sha256") if _FORMAT.fullmatch(metadata.get("format", "")) else None


def _probe(model: Foundation) -> np.ndarray:
  """Computes the last block's output for a fixed image."""
  shape = (1, 2 * model.patch, 3 * model.patch, 3)
  image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  return np.asarray(model(image, levels=(model.depth - 1,))[0])


def _plan(the_table: Table, model: Foundation) -> list[tuple[Rule, int | None]]:
  """Lists every rule of this model with its block; None: outside the blocks."""
  block_rules = the_table.block_rules(model)
  return [(rule, None) for rule in the_table.rules(model)] + [
    (rule, block) for block in range(model.depth if block_rules else 0) for rule in block_rules
  ]


def _names(rule: Rule, block: int | None, naming: Naming) -> tuple[str | None, ...]:
  prefix = "" if block is None else f"{naming.block}{block}."
  return tuple(name and prefix + name for name in _tuple(rule.names[naming.column]))


def _target(rule: Rule, block: int | None) -> str:
  return rule.ours if block is None else f"blocks/{rule.ours}"


def _flat(model: Foundation) -> dict[str, nnx.Variable]:
  return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def _name(model: Foundation) -> str:
  return type(model).__module__.rsplit(".", 1)[-1]


def _is_float(array: np.ndarray) -> bool:
  return np.issubdtype(array.dtype, np.floating) or array.dtype == jnp.bfloat16


def main(argv: Iterable[str], module: str = "converters", run: Callable[..., str] = convert) -> int:
  """Runs the command; returns 0 if OUT is written or exists already, 2 for bad input."""
  argv = list(argv)
  if len(argv) != 2:
    print(f"Usage: python -m {module} IN OUT.safetensors", file=sys.stderr)
    return 2
  try:
    sha256 = run(*argv)
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  print(f"{argv[1]}: converted from {argv[0]} (SHA-256 {sha256})")
  return 0
