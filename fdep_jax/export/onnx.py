"""Converts a traced detector to an ONNX graph: NCHW, any batch size, height and width.

Needs the package onnx. Translates the traced program (NHWC) operation by operation. Arrays with a
batch axis become rank-4 NCHW tensors; reduced axes stay with size 1, so that no transposition is
needed. Arithmetic on constants is done here, and per-channel factors go into the convolutions.
"""

import contextlib
import dataclasses
import json
import operator
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
from jax.extend import core

from fdep_jax.layers import ops

OPSET, IR_VERSION = 18, 8  # onnxruntime ≥ 1.14

_NCHW = (0, 3, 1, 2)  # for every NCHW axis its NHWC axis
_RANK4 = (0, 1, 2, 3)
_TO_THE_END = np.iinfo(np.int64).max

_ELEMENTWISE = {
  "abs": "Abs", "add": "Add", "add_any": "Add", "div": "Div", "erf": "Erf", "exp": "Exp",
  "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "log": "Log",
  "logistic": "Sigmoid", "lt": "Less", "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg",
  "select_n": "Where", "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip
_OF_SIZES = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "gt": operator.gt}
_CALLS = ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint")
# Functions of `ops` that become ONNX operations as a whole.
_WHOLE = (
  "add_positions", "channel_attention", "conv_transpose", "embed_patches", "embed_phases",
  "grouped_conv", "haar", "max_pool2", "max_pool3_stride2", "pixel_attention", "resize",
  "upsample_nearest2",
)  # fmt: skip


class Tensor(NamedTuple):
  """A value of the graph, where it has rank 4 and NCHW order."""

  name: str
  shape: tuple  # NHWC; a reduced axis has size 1
  axes: tuple[int, ...]  # for every axis of the traced array its NHWC axis


@dataclasses.dataclass
class Node:
  """An operation; inputs are names of values, or constants."""

  op: str
  inputs: list[str | np.ndarray]
  outputs: list[str]
  attributes: dict[str, Any]


def convert(function: Callable, batch, height, width, channels: int, metadata: dict[str, str]):
  """Converts a float32 function from B×H×W×C to B×H×W×1 or B×H×W to an ONNX model.

  Args:
    function: to trace.
    batch, height, width: symbolic sizes (`jax.export.symbolic_shape`).
    channels: C.
    metadata: strings to store in the file.

  Returns:
    An `onnx.ModelProto`: input "image" B×C×H×W, output "probability" B×1×H×W.

  Raises:
    NotImplementedError: the network uses an operation that is not supported here; says which, and
      in which line of the network.
  """
  shape = (batch, height, width, channels)
  with _whole_operations():
    traced = jax.jit(function).trace(jax.ShapeDtypeStruct(shape, np.float32)).jaxpr
  graph = _Graph()
  try:
    (result,) = graph.translate(traced.jaxpr, traced.consts, [Tensor("image", shape, _RANK4)])
  except NotImplementedError as error:
    raise NotImplementedError(
      f"{error}, which fdep_jax/export/onnx.py cannot write yet. What it can: docs/deployment.md."
    ) from error
  return _model(_tidy(graph.nodes, result.name), result.name, channels, metadata)


@contextlib.contextmanager
def _whole_operations():
  """Makes traces within the block keep `_WHOLE` and `jax.image.resize` as single calls."""
  plain = {name: getattr(ops, name) for name in _WHOLE}

  def marked(function, name=None, shown=None):
    def call(*inputs, **options):
      arrays = [value for value in inputs if isinstance(value, jax.Array)]
      others = inputs[len(arrays) :]  # sizes

      def whole(*arrays):
        return function(*arrays, *others, **options)

      # Read by `_Graph._call`.
      whole.__name__ = f"{name or function.__name__} {json.dumps(shown or options)}"
      return jax.jit(whole)(*arrays)

    return call

  resize = jax.image.resize

  def image_resize(image, shape, method="linear", *more, **options):
    kind = str(method).rpartition(".")[2].lower()  # "linear" or ResizeMethod.LINEAR
    return marked(resize, "image_resize", {"method": kind})(image, shape, method, *more, **options)

  for name, function in plain.items():
    setattr(ops, name, marked(function))
  jax.image.resize = image_resize
  try:
    yield
  finally:
    jax.image.resize = resize
    for name, function in plain.items():
      setattr(ops, name, function)


class _Graph:
  """Nodes in order of evaluation; `translate` adds them."""

  def __init__(self):
    self.nodes: list[Node] = []
    self._sums: dict[str, tuple] = {}  # name of a sum -> (summed tensor, NCHW axes, number)

  def translate(self, jaxpr, consts, arguments) -> list:
    """Adds a program's nodes; returns its outputs: tensors, arrays or symbolic sizes."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable):
      return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
      inputs = [read(variable) for variable in equation.invars]
      try:
        results = self._equation(equation, inputs)
      except Exception as error:  # of any kind: the network may be anybody's
        raise _located(error, equation) from error
      values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]

  def _equation(self, equation, inputs) -> list:
    name, params = equation.primitive.name, equation.params
    if name == "dim_as_value":
      return [params["dim"]]
    if name in _CALLS:
      return self._call(params, inputs, equation)
    if name == "convert_element_type" and not isinstance(inputs[0], jax.Array | np.ndarray):
      if isinstance(inputs[0], int | float | np.generic):
        return [np.asarray(inputs[0], params["new_dtype"])]
      return inputs  # sizes, and float32 to float32
    if name in ("broadcast_in_dim", "reshape") and not isinstance(inputs[0], Tensor):
      shape = params.get("shape") or params.get("new_sizes")
      if not np.ndim(inputs[0]) and not all(isinstance(size, int) for size in shape or ()):
        return inputs[:1]  # a number, of as many pixels as the image has
    if name in _OF_SIZES and any(map(_is_size, inputs)) and not any(map(_is_array, inputs)):
      return [_OF_SIZES[name](*(x if _is_size(x) else _whole_number(x) for x in inputs))]
    if name == "select_n" and not _is_array(inputs[0]):
      return [inputs[1 + int(inputs[0])]]
    if not any(isinstance(value, Tensor) for value in inputs):
      result = equation.primitive.bind(*inputs, **params)
      return list(result) if equation.primitive.multiple_results else [result]
    if name in _ELEMENTWISE:
      return [self._elementwise(name, inputs)]
    method = getattr(self, f"_{name}", None)
    if method is None:
      raise _unknown(f"the operation {name}")
    return [method(equation, *inputs)]

  def add(self, op: str, inputs: list, shape, axes=_RANK4, **attributes) -> Tensor:
    """Adds a node with one output."""
    name = f"{op}_{len(self.nodes)}"
    inputs = [value.name if isinstance(value, Tensor) else value for value in inputs]
    self.nodes.append(Node(op, inputs, [name], attributes))
    return Tensor(name, tuple(shape), axes)

  def _call(self, params, inputs, equation) -> list:
    closed = params.get("jaxpr") or params["call_jaxpr"]
    name, _, options = params.get("name", "").partition(" ")
    if name in (*_WHOLE, "image_resize") and isinstance(inputs[0], Tensor):
      shapes = [variable.aval.shape for variable in equation.outvars]
      return getattr(self, f"_{name}")(*inputs, shapes, **json.loads(options))
    jaxpr = getattr(closed, "jaxpr", closed)
    return self.translate(jaxpr, getattr(closed, "consts", ()), inputs)

  # Elementwise operations

  def _elementwise(self, name: str, inputs) -> Tensor:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    axes = tensors[0].axes
    if any(tensor.axes != axes for tensor in tensors):
      raise _unknown(f"{name} of arrays that were reduced differently")
    if name == "div" and isinstance(inputs[0], Tensor) and not isinstance(inputs[1], Tensor):
      if mean := self._mean(*inputs):
        return mean
    if name == "select_n":
      inputs = [inputs[0], *inputs[:0:-1]]  # ONNX names the value of true first
    placed, shape = [], [1, 1, 1, 1]
    for value in inputs:
      if isinstance(value, Tensor):
        sizes = value.shape
      else:
        if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int):
          raise _unknown(f"{name} with the image's size")
        value = np.asarray(value, np.float32)
        sizes = (1,) * 4
        if value.ndim:
          sizes = [1] * 4
          for axis, size in zip(axes, value.shape, strict=True):
            sizes[axis] = size
        value = value.reshape(sizes).transpose(_NCHW)
      shape = [b if a == 1 else a for a, b in zip(shape, sizes, strict=True)]
      placed.append(value)
    constants = [value for value in placed if isinstance(value, np.ndarray)]
    if name == "max" and len(constants) == 1 and not constants[0].any():
      return self.add("Relu", tensors, shape, axes)
    return self.add(_ELEMENTWISE[name], placed, shape, axes)

  def _mean(self, total: Tensor, number) -> Tensor | None:
    if total.name not in self._sums:
      return None
    summed, axes, count = self._sums[total.name]
    if isinstance(number, jax.Array | np.ndarray | np.generic):
      number = np.asarray(number).item()
    if not number == count:
      return None
    return self.add("ReduceMean", [summed, np.array(axes)], total.shape, total.axes, keepdims=1)

  def _square(self, _, x: Tensor) -> Tensor:
    return self.add("Mul", [x, x], x.shape, x.axes)

  def _integer_pow(self, equation, x: Tensor) -> Tensor:
    if equation.params["y"] == 2:
      return self._square(equation, x)
    return self.add("Pow", [x, np.float32(equation.params["y"])], x.shape, x.axes)

  def _expm1(self, _, x: Tensor) -> Tensor:
    power = self.add("Exp", [x], x.shape, x.axes)
    return self.add("Sub", [power, np.float32(1)], x.shape, x.axes)

  def _clamp(self, _, low, x: Tensor, high) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor) or np.ndim(low) or np.ndim(high):
      raise _unknown("a clamp whose limits are no numbers")
    return self.add("Clip", [x, np.float32(low), np.float32(high)], x.shape, x.axes)

  def _rsqrt(self, _, x: Tensor) -> Tensor:
    root = self.add("Sqrt", [x], x.shape, x.axes)
    return self.add("Reciprocal", [root], x.shape, x.axes)

  def _stop_gradient(self, _, x: Tensor) -> Tensor:
    return x

  _copy = _copy_p = _stop_gradient

  # Shapes

  def _broadcast_in_dim(self, equation, x: Tensor, *_) -> Tensor:
    shape = equation.params["shape"]
    dimensions = equation.params["broadcast_dimensions"]
    if len(shape) == 4 and tuple(dimensions) == x.axes and tuple(shape) == x.shape:
      return x._replace(axes=_RANK4)
    raise _unknown("repeating an array")

  def _reshape(self, equation, x: Tensor, *_) -> Tensor:
    shape = tuple(equation.params["new_sizes"])
    if shape == x.shape:
      return x._replace(axes=_RANK4)
    kept = tuple(axis for axis in _RANK4 if x.shape[axis] != 1)
    if shape == tuple(x.shape[axis] for axis in kept):
      return x._replace(axes=kept)
    raise _unknown(f"reshaping to {shape}")

  def _squeeze(self, equation, x: Tensor) -> Tensor:
    gone = equation.params["dimensions"]
    return x._replace(axes=tuple(axis for i, axis in enumerate(x.axes) if i not in gone))

  def _concatenate(self, equation, *inputs) -> Tensor:
    if not all(isinstance(x, Tensor) and x.axes == _RANK4 for x in inputs):
      raise _unknown("joining reduced or constant arrays")
    for x, variable in zip(inputs, equation.invars, strict=True):
      self._check_full(x, variable)
    axis = _NCHW.index(equation.params["dimension"])
    return self.add("Concat", list(inputs), equation.outvars[0].aval.shape, axis=axis)

  def _slice(self, equation, x: Tensor) -> Tensor:
    self._check_full(x, equation.invars[0])
    starts, ends, axes, steps = [], [], [], []
    strides = equation.params["strides"] or (1,) * 4
    for axis, size in enumerate(x.shape):
      start, limit = equation.params["start_indices"][axis], equation.params["limit_indices"][axis]
      if (start, limit, strides[axis]) == (0, size, 1):
        continue
      end = _TO_THE_END if limit == size else limit - size if not isinstance(limit, int) else limit
      if not isinstance(start, int) or not isinstance(end, int):
        raise _unknown("a slice whose ends depend on the image's size")
      starts, ends = [*starts, start], [*ends, end]
      axes, steps = [*axes, _NCHW.index(axis)], [*steps, strides[axis]]
    if not axes:
      return x
    bounds = [np.array(values, np.int64) for values in (starts, ends, axes, steps)]
    return self.add("Slice", [x, *bounds], equation.outvars[0].aval.shape)

  def _pad(self, equation, x: Tensor, value) -> Tensor:
    self._check_full(x, equation.invars[0])
    config = [equation.params["padding_config"][axis] for axis in _NCHW]
    if any(interior or low < 0 or high < 0 for low, high, interior in config):
      raise _unknown("padding between or cutting off")
    amounts = np.array([c[0] for c in config] + [c[1] for c in config], np.int64)
    shape = equation.outvars[0].aval.shape
    return self.add("Pad", [x, amounts, np.asarray(value, np.float32)], shape)

  def _check_full(self, x: Tensor, variable) -> None:
    if x.axes != _RANK4 or x.shape != tuple(variable.aval.shape):
      raise _unknown("an array without exactly four axes")

  # Reductions

  def _reduce(self, op: str, equation, x: Tensor) -> Tensor:
    self._check_full(x, equation.invars[0])
    reduced = equation.params["axes"]
    axes = tuple(sorted(_NCHW.index(axis) for axis in reduced))
    shape = [1 if axis in reduced else size for axis, size in enumerate(x.shape)]
    kept = tuple(axis for axis in _RANK4 if axis not in reduced)
    result = self.add(op, [x, np.array(axes)], shape, kept, keepdims=1)
    if op == "ReduceSum":
      count = 1
      for axis in reduced:
        count = count * x.shape[axis]
      self._sums[result.name] = x, axes, count
    return result

  def _reduce_sum(self, equation, x: Tensor) -> Tensor:
    return self._reduce("ReduceSum", equation, x)

  def _reduce_max(self, equation, x: Tensor) -> Tensor:
    return self._reduce("ReduceMax", equation, x)

  def _reduce_min(self, equation, x: Tensor) -> Tensor:
    return self._reduce("ReduceMin", equation, x)

  # Convolutions and the functions of `ops`

  def _conv_general_dilated(self, equation, x: Tensor, kernel) -> Tensor:
    self._check_full(x, equation.invars[0])
    params = equation.params
    numbers = params["dimension_numbers"]
    plain = (
      not isinstance(kernel, Tensor)
      and (numbers.lhs_spec, numbers.rhs_spec) == (_NCHW, (3, 2, 0, 1))
      and params["batch_group_count"] == 1
    )
    if not plain:
      raise _unknown("a convolution that is not NHWC with a constant HWIO kernel")
    if set(params["lhs_dilation"]) != {1}:
      return self._transposed_conv(equation, x, np.asarray(kernel))
    (top, bottom), (left, right) = params["padding"]
    return self.add(
      "Conv",
      [x, np.asarray(kernel).transpose(3, 2, 0, 1)],
      equation.outvars[0].aval.shape,
      strides=list(params["window_strides"]),
      dilations=list(params["rhs_dilation"]),
      pads=[top, left, bottom, right],
      group=params["feature_group_count"],
    )

  def _transposed_conv(self, equation, x: Tensor, kernel: np.ndarray) -> Tensor:
    params, sizes = equation.params, kernel.shape[:2]
    strided = {*params["window_strides"], *params["rhs_dilation"], params["feature_group_count"]}
    # ONNX pads by what is missing of size − 1, and crops; what is beyond that is added at the end.
    (top, bottom), (left, right) = (
      (size - 1 - low, size - 1 - high)
      for size, (low, high) in zip(sizes, params["padding"], strict=True)
    )
    if strided != {1} or top < 0 or left < 0:
      raise _unknown("a transposed convolution with strides, dilation, groups or much padding")
    return self.add(
      "ConvTranspose",
      [x, kernel[::-1, ::-1].transpose(2, 3, 0, 1)],
      equation.outvars[0].aval.shape,
      strides=list(params["lhs_dilation"]),
      pads=[top, left, max(bottom, 0), max(right, 0)],
      output_padding=[max(-bottom, 0), max(-right, 0)],
    )

  def _reduce_window_max(self, equation, x: Tensor) -> Tensor:
    return self.add("MaxPool", [x], equation.outvars[0].aval.shape, **self._window(equation, x))

  def _reduce_window_sum(self, equation, x: Tensor) -> Tensor:
    options, shape = self._window(equation, x), equation.outvars[0].aval.shape
    if options.pop("dilations") != [1, 1]:
      raise _unknown("a sum over a dilated window")
    mean = self.add("AveragePool", [x], shape, count_include_pad=1, **options)
    return self.add("Mul", [mean, np.float32(np.prod(options["kernel_shape"]))], shape)

  def _window(self, equation, x: Tensor) -> dict[str, list[int]]:
    """Returns the attributes of a pooling over H and W."""
    self._check_full(x, equation.invars[0])
    params = equation.params
    sizes, strides, pads, dilations = (
      params[name] for name in ("window_dimensions", "window_strides", "padding", "window_dilation")
    )
    within = all((v[0], v[3]) == (1, 1) for v in (sizes, strides, dilations))
    within &= not any(pads[0] + pads[3]) and {*params["base_dilation"]} == {1}
    if not within or not all(isinstance(n, int) for pair in pads for n in pair):
      raise _unknown("a pooling that is not over height and width, by fixed numbers")
    return {
      "kernel_shape": list(sizes[1:3]),
      "strides": list(strides[1:3]),
      "pads": [pads[1][0], pads[2][0], pads[1][1], pads[2][1]],
      "dilations": list(dilations[1:3]),
    }

  def _dot_general(self, equation, x, matrix) -> Tensor:
    contracted, batched = equation.params["dimension_numbers"]
    if isinstance(matrix, Tensor) or contracted != ((3,), (0,)) or batched != ((), ()):
      raise _unknown("a matrix product that is not B×H×W×C with a constant matrix")
    self._check_full(x, equation.invars[0])
    kernel = np.asarray(matrix).T[:, :, None, None]
    strides, node = [1, 1], self.nodes[-1] if self.nodes else None
    if node and node.op == "Slice" and node.outputs == [x.name]:
      starts, ends, axes, steps = node.inputs[1:]
      if not starts.any() and (ends == _TO_THE_END).all() and axes.tolist() == [2, 3]:
        x, strides = node.inputs[0], steps.tolist()  # the convolution strides instead
    return self.add("Conv", [x, kernel], equation.outvars[0].aval.shape, strides=strides)

  def _max_pool2(self, x: Tensor, shapes) -> list[Tensor]:
    return [self.add("MaxPool", [x], shapes[0], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)]

  def _max_pool3_stride2(self, x: Tensor, shapes) -> list[Tensor]:
    options = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    return [self.add("MaxPool", [x], shapes[0], **options)]

  def _resize(self, x: Tensor, shapes, *, align_corners: bool) -> list[Tensor]:
    mode = "align_corners" if align_corners else "half_pixel"
    return self._resized(x, shapes[0], mode="linear", coordinate_transformation_mode=mode)

  def _image_resize(self, x: Tensor, shapes, *, method: str) -> list[Tensor]:
    (shape,) = shapes
    if method in ("linear", "bilinear") and not any(
      size == factor * new
      for size, new in zip(x.shape, shape, strict=True)
      for factor in (2, 4, 8, 16, 32)
    ):
      return self._resized(x, shape, mode="linear", coordinate_transformation_mode="half_pixel")
    if method == "nearest":
      options = {"coordinate_transformation_mode": "half_pixel"}
      return self._resized(x, shape, mode=method, nearest_mode="round_prefer_ceil", **options)
    raise _unknown(f"jax.image.resize by {method} from {x.shape} to {shape}")

  def _resized(self, x: Tensor, shape, **options) -> list[Tensor]:
    if shape == x.shape:
      return [x]
    if (shape[0], shape[3]) != (x.shape[0], x.shape[3]):
      raise _unknown(f"resizing {x.shape} to {shape}")
    scales = [1.0, 1.0]
    for axis in (1, 2):
      for scale in [2.0**k for k in range(-5, 6)]:
        if scale >= 1 and shape[axis] == int(scale) * x.shape[axis]:
          break
        if scale < 1 and int(1 / scale) * shape[axis] == x.shape[axis]:
          break
      else:
        raise _unknown(f"resizing {x.shape[axis]} to {shape[axis]}")
      scales.append(scale)
    return [self.add("Resize", [x, "", np.array(scales, np.float32)], shape, **options)]

  def _conv_transpose(self, x: Tensor, kernel, shapes) -> list[Tensor]:
    kernel = np.asarray(kernel).transpose(2, 3, 0, 1)
    options = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    return [self.add("ConvTranspose", [x, kernel], shapes[0], **options)]

  def _embed_patches(self, x: Tensor, kernel, shapes) -> list[Tensor]:
    patch = kernel.shape[0]
    kernel = np.asarray(kernel).transpose(3, 2, 0, 1)
    return [self.add("Conv", [x, kernel], shapes[0], strides=[patch, patch])]

  def _grouped_conv(self, x: Tensor, kernel, shapes) -> list[Tensor]:
    rows, columns, group, channels = kernel.shape
    kernel = np.asarray(kernel).transpose(3, 2, 0, 1)
    pads = [rows // 2, columns // 2] * 2
    return [self.add("Conv", [x, kernel], shapes[0], pads=pads, group=channels // group)]

  def _upsample_nearest2(self, x: Tensor, shapes) -> list[Tensor]:
    options = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    inputs = [x, "", np.array([1, 1, 2, 2], np.float32)]
    return [self.add("Resize", inputs, shapes[0], mode="nearest", **options)]

  def _embed_phases(self, x: Tensor, kernel, shapes) -> list[Tensor]:
    patch, _, channels, out_channels = kernel.shape
    # Of what a reshape is told, 0 keeps the axis and −1 takes what is left.
    x = self._transpose(x, 0, 1, 3, 2)
    x = self._transpose(self._reshaped(x, 0, 0, 0, patch, -1), 0, 1, 3, 4, 2)  # B×C×u×h×W
    x = self._transpose(self._reshaped(x, 0, 0, 0, 0, patch, -1), 0, 3, 5, 2, 4, 1)
    x = self._transpose(self._reshaped(x, 0, 0, 0, patch * patch * channels), 0, 3, 1, 2)
    kernel = np.asarray(kernel).reshape(-1, out_channels).T[:, :, None, None]
    return [self.add("Conv", [x, kernel], shapes[0])]

  def _add_positions(self, x: Tensor, table, shapes) -> list[Tensor]:
    flat = self._reshaped(x, 0, 0, -1)
    number = self.add("Shape", [flat], (1,), start=2, end=3)
    rows = np.asarray(table).T[None]
    rows = self.add("Slice", [rows, np.array([0]), number, np.array([2])], ())
    return [self._like(self.add("Add", [flat, rows], ()), x, shapes[0])]

  def _pixel_attention(self, query: Tensor, key, value, first_key, first_value, shapes):
    rows = self._transpose(self._reshaped(query, 0, 0, -1), 0, 2, 1)
    batch = self.add("Shape", [query], (1,), start=0, end=1)
    ones = self.add("Concat", [batch, np.array([1, 1])], (3,), axis=0)
    keys, values = (
      self.add(
        "Concat",
        [
          self.add("Expand", [np.asarray(first).reshape(1, -1, 1), ones], ()),
          self._reshaped(rest, 0, 0, -1),
        ],
        (),
        axis=2,
      )
      for first, rest in ((first_key, key), (first_value, value))
    )
    weights = self.add("Softmax", [self.add("MatMul", [rows, keys], ())], (), axis=-1)
    y = self.add("MatMul", [weights, self._transpose(values, 0, 2, 1)], ())
    return [self._like(self._transpose(y, 0, 2, 1), query, shapes[0])]

  def _channel_attention(self, query: Tensor, key, value, shapes, *, levels) -> list[Tensor]:
    query_map, channels, axes = query, key.shape[3], np.array([1, 2, 3])
    query, key, value = (self._reshaped(x, 0, 1, x.shape[3], -1) for x in (query, key, value))
    normed = []
    for x in (query, key):
      length = self.add("ReduceL2", [x, np.array([3])], (), keepdims=1)
      length = self.add("Max", [length, np.array(1e-12, np.float32)], ())
      normed.append(self.add("Div", [x, length], ()))
    cosine = self.add("MatMul", [normed[0], self._transpose(normed[1], 0, 1, 3, 2)], ())
    cosine = self.add("Mul", [cosine, np.full((1, 1, 1, 1), channels**-0.5, np.float32)], ())
    parts, start = [], 0
    for size in levels:
      bounds = [np.array([n]) for n in (start, start + size, 2)]
      part = self.add("Slice", [cosine, *bounds], ())
      mean = self.add("ReduceMean", [part, axes], (), keepdims=1)
      centred = self.add("Sub", [part, mean], ())
      square = self.add("Mul", [centred, centred], ())
      var = self.add("ReduceMean", [square, axes], (), keepdims=1)
      var = self.add("Add", [var, np.full((1, 1, 1, 1), 1e-5, np.float32)], ())
      parts.append(self.add("Div", [centred, self.add("Sqrt", [var], ())], ()))
      start += size
    weights = self.add("Softmax", [self.add("Concat", parts, (), axis=2)], (), axis=-1)
    y = self.add("MatMul", [weights, value], ())
    return [self._like(y, query_map, shapes[0])]

  def _reshaped(self, x: Tensor, *sizes: int) -> Tensor:
    return self.add("Reshape", [x, np.array(sizes)], ())

  def _transpose(self, x: Tensor, *order: int) -> Tensor:
    return self.add("Transpose", [x], (), perm=list(order))

  def _like(self, x: Tensor, other: Tensor, shape) -> Tensor:
    """x reshaped as `other`."""
    return self.add("Reshape", [x, self.add("Shape", [other], (4,))], shape)

  def _haar(self, x: Tensor, shapes, *, stride: int) -> list[Tensor]:
    channels = x.shape[3]
    signs = {"hh": (1, -1, -1, 1), "hl": (1, -1, 1, -1), "lh": (1, 1, -1, -1), "ll": (1, 1, 1, 1)}
    pad = 1 if stride == 1 else 0
    results = []
    for band in sorted(signs):  # the order of a traced dictionary
      kernel = 0.5 * np.array(signs[band], np.float32).reshape(1, 1, 2, 2)
      results.append(
        self.add(
          "Conv",
          [x, np.repeat(kernel, channels, 0)],
          shapes[0],
          strides=[stride, stride],
          pads=[pad, pad, 0, 0],
          group=channels,
        )
      )
    return results


def _unknown(what: str) -> NotImplementedError:
  return NotImplementedError(f"the network uses {what}")


class _Located(NotImplementedError):
  """An operation that cannot be written, with its place in the network."""


def _located(error: Exception, equation) -> Exception:
  """Names the operation and the line of the network that asks for it.

  Operations within a function of jax may have no line of the network, but its call has.
  """
  if isinstance(error, _Located):
    return error
  place = _place(equation)
  known = isinstance(error, NotImplementedError)
  what = str(error) if known else f"the network uses the operation {equation.primitive.name}"
  if not place:
    return NotImplementedError(what)
  return _Located(f"{what} ({place})")


def _place(equation) -> str:
  """The innermost line that is neither of jax and flax nor of this package's layers."""
  traceback = equation.source_info.traceback
  here = pathlib.Path(__file__).parents[1]
  others = [pathlib.Path(module.__file__).parent for module in (jax, flax, np)]
  others += [here / "export", here / "layers"]
  for frame in traceback.frames if traceback else ():
    path = pathlib.Path(frame.file_name)
    if not any(path.is_relative_to(folder) for folder in others):
      return f"{path.name}, line {frame.line_num}"
  return ""


def _whole_number(value) -> int:
  if int(value) != value:
    raise _unknown("the image's size with a fraction")
  return int(value)


def _is_array(value) -> bool:
  return isinstance(value, Tensor) or getattr(value, "ndim", 0) > 0


def _is_size(value) -> bool:
  return not isinstance(value, Tensor) and jax.export.is_symbolic_dim(value)


def _tidy(nodes: list[Node], result: str) -> list[Node]:
  """Merges affine functions of channels into the convolution before; drops unused nodes."""
  uses = {result: 1}
  kept = []
  for node in reversed(nodes):
    if uses.get(node.outputs[0]):
      kept.insert(0, node)
      for value in node.inputs:
        if isinstance(value, str):
          uses[value] = uses.get(value, 0) + 1
  producer = {node.outputs[0]: node for node in kept}
  tidied = []
  for node in kept:
    if affine := _affine(node):
      name, factor, offset = affine
      source = last = producer.get(name)
      alone = last is not None and uses[name] == 1
      # Commutes with a resize, whose weights sum to 1.
      while alone and source.op == "Resize":
        alone, source = uses[source.inputs[0]] == 1, producer.get(source.inputs[0])
        alone = alone and source is not None
      if alone and _absorb(source, factor, offset):
        last.outputs = node.outputs
        producer[node.outputs[0]] = last
        continue
      node.op, node.inputs = "Affine", [name, factor, offset]
    tidied.append(node)
  return tidied


def _affine(node: Node) -> tuple[str, np.ndarray, np.ndarray] | None:
  """Returns (input, factor, offset), float64, if a node is affine in each channel, else None."""
  constants = [v for v in node.inputs if isinstance(v, np.ndarray)]
  names = [v for v in node.inputs if isinstance(v, str)]
  if len(constants) != 1 or len(names) != 1 or node.op not in ("Add", "Sub", "Mul", "Div"):
    return None
  constant = constants[0].astype(np.float64)
  if constant.size != constant.shape[1]:  # 1×C×1×1
    return None
  constant, one, zero = constant.ravel(), np.ones(1), np.zeros(1)
  first = isinstance(node.inputs[0], np.ndarray)
  if node.op == "Add":
    return names[0], one, constant
  if node.op == "Sub":
    return (names[0], -one, constant) if first else (names[0], one, -constant)
  if node.op == "Mul":
    return names[0], constant, zero
  return None if first else (names[0], 1 / constant, zero)


def _absorb(node: Node, factor: np.ndarray, offset: np.ndarray) -> bool:
  """Applies factor·y + offset to the result y of a convolution or affine node, if possible."""
  if node.op == "Affine":
    name, before, shift = node.inputs
    node.inputs = [name, factor * before, factor * shift + offset]
    return True
  if node.op not in ("Conv", "ConvTranspose") or node.attributes.get("group", 1) != 1:
    return False
  name, kernel, *bias = node.inputs
  axis = 0 if node.op == "Conv" else 1
  shape = [-1 if i == axis else 1 for i in range(4)]
  zero = np.zeros(kernel.shape[axis])
  bias = factor * (bias[0] if bias else zero) + offset
  node.inputs = [name, kernel * (zero + factor).reshape(shape), bias]
  return True


def _model(nodes: list[Node], result: str, channels: int, metadata: dict[str, str]):
  from onnx import TensorProto, checker, helper, numpy_helper

  constants: dict[tuple, str] = {}
  initializers, written = [], []

  def name_of(value) -> str:
    if isinstance(value, str):
      return "probability" if value == result else value
    value = np.asarray(value)
    value = np.ascontiguousarray(value, np.float32 if value.dtype.kind == "f" else np.int64)
    key = (value.dtype.str, value.shape, value.tobytes())
    if key not in constants:
      constants[key] = f"constant_{len(constants)}"
      initializers.append(numpy_helper.from_array(value, constants[key]))
    return constants[key]

  def write(op, inputs, outputs, attributes):
    inputs, outputs = [name_of(v) for v in inputs], [name_of(v) for v in outputs]
    written.append(helper.make_node(op, inputs, outputs, **attributes))

  for node in nodes:
    if node.op != "Affine":
      write(node.op, node.inputs, node.outputs, node.attributes)
      continue
    name, factor, offset = node.inputs
    scaled = node.outputs[0] if not offset.any() else f"{node.outputs[0]}_scaled"
    write("Mul", [name, factor.reshape(1, -1, 1, 1)], [scaled], {})
    if offset.any():
      write("Add", [scaled, offset.reshape(1, -1, 1, 1)], node.outputs, {})
  sizes = ("batch", channels, "height", "width"), ("batch", 1, "height", "width")
  image, probability = (
    helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    for name, shape in zip(("image", "probability"), sizes, strict=True)
  )
  graph = helper.make_graph(written, "light", [image], [probability], initializers)
  model = helper.make_model(
    graph,
    producer_name="fdep_jax",
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=IR_VERSION,
  )
  helper.set_model_props(model, metadata)
  checker.check_model(model, full_check=True)
  return model
