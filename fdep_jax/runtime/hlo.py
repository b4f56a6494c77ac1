"""Counts multiply-adds, memory traffic and collectives in the text of a compiled module.

XLA's own `cost_analysis` counts a loop's body only once, counts all additions beside those of
convolutions, and does not separate a TPU's vector memory from HBM. So it can be compared neither
with a network's published multiply-adds nor with a chip's bandwidth. On a GPU, convolutions and
products are calls of cuDNN and cuBLAS; they are counted from their shapes.
"""

import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "token": 0}  # other types contain their number of bits
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
  r"(?:body|calls|to_apply)=%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
# Instructions that move no data themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "iota", "partition-id", "replica-id"}  # fmt: skip
_TARGET = re.compile(r'custom_call_target="(__cu(?:dnn|blas)\$[^"]+)"')
# cuDNN's convolutions: places of input, kernel and output of the forward convolution among the
# result (0) and the operands (1, 2). Window and labels are always those of the forward convolution.
_CUDNN = {
  "__cudnn$convForward": (1, 2, 0),
  "__cudnn$convBiasActivationForward": (1, 2, 0),
  "__cudnn$convBackwardInput": (0, 2, 1),
  "__cudnn$convBackwardFilter": (1, 0, 2),
}
_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
  """One instruction of the module."""

  name: str
  shape: str  # of the result, as text
  op: str
  operands: str  # as text
  attributes: str
  times: int = 1  # executed, in one execution of the module
  trips: int = 1  # of the innermost loop around it
  fused: bool = False  # computed inside a fusion or the like


class Array(NamedTuple):
  """An array as an operand or result."""

  dtype: str
  dims: tuple[int, ...]
  near: bool  # in the chip's own memory instead of HBM

  @property
  def bytes(self) -> int:
    bits = int("".join(c for c in self.dtype[:4] if c.isdigit()) or 8)
    return math.prod(self.dims) * _BYTES.get(self.dtype, max(bits // 8, 1))


def arrays(shape: str) -> list[Array]:
  """Reads the arrays from a shape's text; a tuple has several."""
  return [
    Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" in layout)
    for dtype, dims, layout in _SHAPE.findall(shape)
  ]


def instructions(text: str) -> list[Instruction]:
  """Lists all executed instructions, also in fusions and loops, with their number of executions.

  Args:
    text: `compiled.as_text()`, or `lowered.as_text("hlo")` for the program before compilation.

  Raises:
    ValueError: there is no entry computation, or a loop's number of iterations is unknown.
  """
  bodies, entry = _computations(text)
  found = []

  def walk(name: str, times: int, outer: int, fused: bool) -> None:
    for instruction in bodies[name]:
      found.append(instruction._replace(times=times, trips=outer, fused=fused))
      trips = _trips(instruction, bodies) if instruction.op == "while" else 1
      inside = fused or instruction.op not in ("while", "conditional", "call")
      for one, several in _CALLED.findall(instruction.attributes):
        for called in several.replace("%", "").split(",") if several else [one]:
          walk(called.strip(), times * trips, trips, inside)

  walk(entry, 1, 1, False)
  return found


def _trips(loop: Instruction, bodies: dict[str, list[Instruction]]) -> int:
  """Returns a loop's number of iterations: the compiler's, else the bound of its counter."""
  known = _TRIPS.search(loop.attributes)
  if known:
    return int(known.group(1))
  condition = bodies[_CONDITION.search(loop.attributes).group(1)]
  bounds = [i.operands for i in condition if i.op == "constant" and i.shape.startswith("s32[]")]
  if len(bounds) != 1 or not any("direction=LT" in i.attributes for i in condition):
    raise ValueError(f"The iterations of the loop {loop.name} are not known at compile time.")
  return int(bounds[0])


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  bodies, entry, current = {}, None, None
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    header = _COMPUTATION.match(line)
    if header:
      current = bodies.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
    elif current is not None:
      match = _INSTRUCTION.match(line)
      if match:
        current.append(_instruction(*match.groups()))
  if entry is None:
    raise ValueError("This is not an HLO module: it has no ENTRY computation.")
  return bodies, entry


def _instruction(name: str, rest: str) -> Instruction:
  # The shape may be a tuple with layouts; the operation is the word after it, before a "(".
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].strip()
  start = rest.index("(")
  close = _closing(rest, start)
  return Instruction(name, shape, rest[:start], rest[start + 1 : close - 1], rest[close:])


def _closing(text: str, start: int) -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i + 1
  return len(text)


def flops(text: str, scope: str) -> dict[str, float]:
  """Counts the FLOPs of convolutions and matrix products, for one device and one execution.

  A multiply-add is two FLOPs. Padding does not count; work that the compiler added (halos,
  rematerialisation) does.

  Args:
    text: `compiled.as_text()`.
    scope: a `jax.named_scope`.

  Returns:
    {"inside", "outside"} of the scope.

  Raises:
    ValueError: there is a call of cuDNN or cuBLAS that cannot be counted.
  """
  found = instructions(text)
  shapes = {instruction.name: instruction.shape for instruction in found}
  total = {"inside": 0.0, "outside": 0.0}
  for instruction in found:
    library = _library(instruction)
    if instruction.op not in ("convolution", "dot") and not library:
      continue
    left, right = (arrays(shapes[o])[0] for o in _operands(instruction)[:2])
    out = arrays(instruction.shape)[0]
    if instruction.op == "convolution":
      count = _convolution(instruction, left, right, out)
    elif library in _CUDNN:
      count = _convolution(instruction, *((out, left, right)[i] for i in _CUDNN[library]))
    elif instruction.op == "dot" or library in _CUBLAS:
      count = _dot(instruction, left, out)
    else:
      raise ValueError(f"The FLOPs of {library} are not known ({instruction.name}).")
    side = "inside" if f"/{scope}/" in instruction.attributes else "outside"
    total[side] += instruction.times * 2 * count
  return total


def _library(instruction: Instruction) -> str | None:
  """Returns the function of cuDNN or cuBLAS that the instruction calls; None if it calls none."""
  target = _TARGET.search(instruction.attributes) if instruction.op == "custom-call" else None
  return target and target.group(1)


def traffic(text: str) -> float:
  """Counts the bytes that one device reads from and writes to HBM in one execution, at most.

  Every operand and result of an instruction counts once, except those in the chip's own memory. A
  loop over the rows of an array reads one row an iteration.
  """
  found = instructions(text)
  shapes = {instruction.name: instruction.shape for instruction in found}
  total = 0.0
  for instruction in found:
    if instruction.op in _FREE or instruction.fused:
      continue
    taken = [array for o in _operands(instruction) for array in arrays(shapes[o])]
    given = arrays(instruction.shape)
    if _library(instruction) and len(given) > 1:
      given = given[:-1]  # without the library's workspace
    if instruction.op.endswith("-start"):  # its result counts at "-done"
      least = min((array.bytes for array in given if array.dims), default=0)
      moved = least * any(not array.near for array in taken)
    elif instruction.op.endswith("-done"):
      moved = sum(array.bytes for array in given if not array.near)
    else:
      moved = sum(_row(a, instruction.trips) for a in [*taken, *given] if not a.near)
    total += instruction.times * moved
  return total


def _row(array: Array, trips: int) -> float:
  return array.bytes / (trips if trips > 1 and array.dims[:1] == (trips,) else 1)


def _operands(instruction: Instruction) -> list[str]:
  """Returns the operands' names; some printers write a shape before each."""
  return [o.split()[-1].lstrip("%") for o in _split(instruction.operands) if o]


def _split(operands: str) -> list[str]:
  """Splits operands at commas outside brackets."""
  parts, depth, last = [], 0, 0
  for i, c in enumerate(operands):
    depth += (c in "([{") - (c in ")]}")
    if c == "," and depth == 0:
      parts.append(operands[last:i].strip())
      last = i + 1
  return [*parts, operands[last:].strip()]


def _dot(instruction: Instruction, left: Array, out: Array) -> int:
  # XLA writes lhs_contracting_dims={1,2}, cuBLAS "lhs_contracting_dimensions":["1","2"].
  pattern = r"lhs_contracting_dim(?:s=\{|ensions\":\[)([\d,\"]*)[}\]]"
  found = re.search(pattern, instruction.attributes)
  contracted = re.findall(r"\d+", found.group(1)) if found else []
  return math.prod(out.dims) * math.prod(left.dims[int(d)] for d in contracted)


def _convolution(instruction: Instruction, left: Array, kernel: Array, out: Array) -> int:
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  options = dict(part.split("=") for part in window.group(1).split()) if window else {}
  groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
  total = out.dims[labels[2].index("b")] * out.dims[labels[2].index("f")]
  total *= kernel.dims[labels[1].index("i")]
  for d in range(len(labels[1]) - 2):
    axis = str(d)

    def option(name, default, d=d):
      return options[name].split("x")[d] if name in options else default

    low = int(option("pad", "0_0").split("_")[0])
    total *= _valid_pairs(
      left.dims[labels[0].index(axis)],
      kernel.dims[labels[1].index(axis)],
      out.dims[labels[2].index(axis)],
      int(option("stride", 1)),
      low,
      int(option("lhs_dilate", 1)),
      int(option("rhs_dilate", 1)),
    )
  return total // (int(groups.group(1)) if groups else 1)


def _valid_pairs(size, kernel, out, stride, low, lhs_dilate, rhs_dilate) -> int:
  """Counts the (output, kernel) positions along one axis that use an element of the input."""
  count = 0
  for k in range(kernel):
    for o in range(out):
      place = o * stride + k * rhs_dilate - low
      count += place >= 0 and place % lhs_dilate == 0 and place // lhs_dilate < size
  return count


def collectives(text: str) -> list[dict]:
  """Lists the collectives by operation and size, largest total first.

  Returns [{"op", "bytes", "count"}]: bytes of one result, and number of times in one execution of
  the module. Of an asynchronous pair the start counts.
  """
  found: dict[tuple[str, int], int] = {}
  for instruction in instructions(text):
    op = instruction.op.removesuffix("-start")
    if op not in COLLECTIVES:
      continue
    sizes = [array.bytes for array in arrays(instruction.shape)]
    # The start of an all-gather or permute returns its operand and its result.
    pair = instruction.op.endswith("-start") and op not in ("all-reduce", "all-to-all")
    key = op, max(sizes) if pair else sum(sizes)
    found[key] = found.get(key, 0) + instruction.times
  return [
    {"op": op, "bytes": size, "count": count}
    for (op, size), count in sorted(found.items(), key=lambda item: -item[0][1] * item[1])
  ]
