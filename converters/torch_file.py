"""Reads PyTorch weight files into numpy arrays, without PyTorch and without running their code.

A file of `torch.save` has a pickle, which is a small program that may call any function, and the
bytes of the tensors. The interpreter below knows only the few steps that build containers and
tensors. A function or class that the program asks for is never imported: it stays a name here, and
is refused unless it is in `_ADMITTED`. So there is nothing that could be called.
"""

import io
import math
import os
import pathlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
  "torch.DoubleStorage": np.float64,
  "torch.FloatStorage": np.float32,
  "torch.HalfStorage": np.float16,
  "torch.BFloat16Storage": ml_dtypes.bfloat16,
  "torch.LongStorage": np.int64,
  "torch.IntStorage": np.int32,
  "torch.ShortStorage": np.int16,
  "torch.CharStorage": np.int8,
  "torch.ByteStorage": np.uint8,
  "torch.BoolStorage": np.bool_,
  "torch.ComplexFloatStorage": np.complex64,
  "torch.ComplexDoubleStorage": np.complex128,
  "torch.UntypedStorage": np.uint8,
  "torch.storage.UntypedStorage": np.uint8,
}
_DTYPES = {  # of `_rebuild_tensor_v3`, and leaves of some checkpoints
  "torch.float64": np.float64,
  "torch.float32": np.float32,
  "torch.float16": np.float16,
  "torch.bfloat16": ml_dtypes.bfloat16,
  "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "torch.float8_e5m2": ml_dtypes.float8_e5m2,
  "torch.int64": np.int64,
  "torch.int32": np.int32,
  "torch.int16": np.int16,
  "torch.int8": np.int8,
  "torch.uint64": np.uint64,
  "torch.uint32": np.uint32,
  "torch.uint16": np.uint16,
  "torch.uint8": np.uint8,
  "torch.bool": np.bool_,
  "torch.complex64": np.complex64,
  "torch.complex128": np.complex128,
}
_REBUILD_PARAMETER = (
  "torch._utils._rebuild_parameter",
  "torch._utils._rebuild_parameter_with_state",
)
_NUMPY_ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NUMPY_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_ADMITTED = {
  *_STORAGES,
  *_DTYPES,
  *_REBUILD_PARAMETER,
  *_NUMPY_ARRAY,
  *_NUMPY_BUFFER,
  *_NUMPY_SCALAR,
  "torch._utils._rebuild_tensor",
  "torch._utils._rebuild_tensor_v2",
  "torch._utils._rebuild_tensor_v3",
  "torch.Size",
  "torch.device",
  "numpy.dtype",
  "numpy.ndarray",
  "collections.OrderedDict",
  "collections.Counter",  # state of MultiStepLR
  "builtins.set",
  "builtins.bytes",
  "_codecs.encode",  # protocol 2 stores bytes this way
}

# Names of the weights in a training checkpoint, which also has an optimiser and counters; the first
# one present is taken.
_MODEL_KEYS = (
  "state_dict",
  "model_state_dict",
  "model_state",
  "model",
  "net",
  "network",
  "teacher",
  "student",
)
_OTHER_KEYS = re.compile(r".*optim.*|.*sched.*|.*scaler|amp|.*rng.*|.*loss.*|criterion", re.I)

# Dicts in which checkpoints keep how images are normalised.
_NORMALISATION_KEYS = ("img_norm_cfg", "norm_cfg", "img_norm", "normalization", "normalisation")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Bounds that no real checkpoint reaches: a state_dict takes about 40 steps a tensor.
_MAX_STEPS = 4_000_000
_MAX_NODES = 1_000_000
_MAX_DEPTH = 100
_MAX_NAME = 1000  # characters
_MAX_MESSAGE = 5000  # characters

# Messages never quote the program's values: a short program can describe endless text.
# Errors of the interpreter on a damaged or hostile program.
_MALFORMED = (IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error)
# Errors of any part, including zipfile (which seeks to where the file says) and numpy.
_UNREADABLE = (
  ValueError,
  OverflowError,
  zipfile.BadZipFile,
  NotImplementedError,
  OSError,
  EOFError,
)


class Checkpoint(NamedTuple):
  """The content of a file of weights."""

  arrays: dict[str, np.ndarray]  # by name, as `read_torch` returns them
  # The mean and the deviation of the images as the file states them, each one number or three.
  normalisation: tuple[list[float], list[float]] | None = None


def read_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the weights in a file of `torch.save` (either format) or safetensors, by name.

  The format is recognised by content, not by suffix. Only the weights of a training checkpoint are
  returned: while there are tensors below "state_dict", "model_state_dict", "model_state", "model",
  "net", "network", "teacher" or "student", only the first of these is kept and its name dropped.
  Containers named like optimisers, schedules and losses are left out, and so is all that is no
  array. Names of nested containers are joined by ".".

  Args:
    path: a file.

  Returns:
    Name -> C-contiguous array of the stored type (bfloat16 as `ml_dtypes.bfloat16`). Tensors that
    share a storage share memory.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not a weight file, is damaged, or asks for more than tensors, such as a
      function call; the message names the function. Nothing in the file is ever run.
  """
  return read_checkpoint(path).arrays


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
  """Reads the weights as `read_torch`, and the normalisation if a file of `torch.save` states one.

  It is stated by plain numbers called "mean" and "std", beside the weights or in a dict there of
  a usual name such as "img_norm_cfg".
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f"{path}: no such file. A PyTorch or safetensors weight file is needed."
    )
  if not path.is_file():
    raise ValueError(f"{path}: not a file. A PyTorch or safetensors weight file is needed.")
  with path.open("rb") as file:
    try:
      if file.read(4) == b"PK\x03\x04":
        found = _read_zip(file)
      elif is_safetensors(path) or _like_safetensors(path):
        found = Checkpoint(_read_safetensors(path))
      else:
        found = _read_legacy(file)
    except _UNREADABLE as error:
      # zipfile's messages can quote the file.
      raise ValueError(f"{path}: {str(error)[:_MAX_MESSAGE]}") from None
  if not found.arrays:
    raise ValueError(f"{path}: there are no named tensors in it.")
  return found


def is_safetensors(path: str | os.PathLike) -> bool:
  """Returns whether a file starts like safetensors: the header's length, then a JSON object."""
  with open(path, "rb") as file:
    start = file.read(9)
  return (
    len(start) == 9
    and start[8:] == b"{"
    and int.from_bytes(start[:8], "little") <= os.path.getsize(path) - 8
  )


def _like_safetensors(path: pathlib.Path) -> bool:
  """Returns whether a file begins like safetensors whose header is longer than the file."""
  with path.open("rb") as file:
    start = file.read(10)
  return start[8:] == b'{"' and 8 < int.from_bytes(start[:8], "little") < 2**27


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors

  try:
    with safetensors.safe_open(path, framework="np") as file:
      return {name: file.get_tensor(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"not a whole safetensors file ({error}). Copy or download it again."
    ) from None


def _read_zip(file: BinaryIO) -> Checkpoint:
  """Reads the format since torch 1.6: an uncompressed zip of data.pkl and one member a storage."""
  size = file.seek(0, io.SEEK_END)
  if not zipfile.is_zipfile(file):
    raise ValueError("a zip file of torch.save that is cut off. Copy or download it again.")
  with zipfile.ZipFile(file) as archive:
    members = {info.filename: info for info in archive.infolist()}
    programs = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(programs) != 1:
      raise ValueError(
        f"a zip file with {len(programs)} members */data.pkl, so not one of torch.save."
      )
    root = programs[0].removesuffix("data.pkl")

    def member(name: str, num_bytes: int | None = None) -> bytearray:
      info = members.get(root + name)
      if info is None:
        raise ValueError(f"there is no {root}{name} in it. Copy or download it again.")
      if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{root}{name} is compressed or encrypted; torch.save only stores.")
      if info.file_size > size:
        raise ValueError(f"{root}{name} claims {info.file_size} bytes in a file of {size}.")
      if num_bytes is not None and info.file_size != num_bytes:
        raise ValueError(f"{root}{name} has {info.file_size} bytes, its tensors need {num_bytes}.")
      data = bytearray(info.file_size)
      with archive.open(info) as stream:
        if stream.readinto(data) != len(data):
          raise ValueError(f"{root}{name} is cut off. Copy or download it again.")
      return data

    if root + "byteorder" in members and member("byteorder") != b"little":
      raise ValueError("big-endian tensors; save it again on a little-endian machine.")
    interpreter = _Interpreter(io.BytesIO(member("data.pkl")))
    content = interpreter.run()
    tensors = _weights(content)
    loaded: dict[str, bytearray] = {}

    def storage_bytes(storage: _Storage) -> bytearray:
      if storage.key not in loaded:
        loaded[storage.key] = member(f"data/{storage.key}", storage.total * storage.dtype.itemsize)
      return loaded[storage.key]

    return Checkpoint(_arrays(tensors, storage_bytes, size), _normalisation(content))


def _read_legacy(file: BinaryIO) -> Checkpoint:
  """Reads the format before torch 1.6: five pickles, then each storage's length and bytes."""
  size = file.seek(0, io.SEEK_END)
  file.seek(0)
  try:
    magic = _Interpreter(file).run()
  except _RefusedError:
    raise
  except ValueError:
    magic = None
  if magic != _LEGACY_MAGIC:
    raise ValueError("neither a file of torch.save nor safetensors.")
  protocol, system = _Interpreter(file).run(), _Interpreter(file).run()
  if protocol != _LEGACY_PROTOCOL:
    raise ValueError(f"a format other than {_LEGACY_PROTOCOL}, the only one known.")
  if not isinstance(system, dict) or not system.get("little_endian"):
    raise ValueError("big-endian tensors; save it again on a little-endian machine.")
  interpreter = _Interpreter(file)
  content = interpreter.run()
  tensors = _weights(content)
  keys = _Interpreter(file).run()
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
    raise ValueError("its list of storages is damaged.")
  wanted = {tensor.storage.key for tensor in tensors.values() if isinstance(tensor, _Tensor)}
  loaded: dict[str, bytearray] = {}
  for key in keys:
    storage = interpreter.storages.get(key)
    if storage is None:
      raise ValueError(f"storage {key} belongs to no tensor.")
    head = file.read(8)
    num_bytes = storage.total * storage.dtype.itemsize
    if len(head) != 8 or num_bytes > size - file.tell():
      raise ValueError(f"it ends within storage {key}. Copy or download it again.")
    if int.from_bytes(head, "little", signed=True) != storage.total:
      raise ValueError(f"storage {key} does not have the length that its tensors need.")
    if key in wanted:
      loaded[key] = bytearray(num_bytes)
      file.readinto(loaded[key])
    else:
      file.seek(num_bytes, io.SEEK_CUR)
  if wanted - set(loaded):
    raise ValueError(f"storage {min(wanted - set(loaded))} is missing.")
  arrays = _arrays(tensors, lambda storage: loaded[storage.key], size)
  return Checkpoint(arrays, _normalisation(content))


class _RefusedError(ValueError):
  """Raised if the program names a function or class that is no part of a tensor."""


class _Name(str):
  """The name of a function or class in the program; never the function or class itself."""


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  total: int  # elements in the file
  start: int  # first element of this view of it
  count: int  # elements of this view


class _Tensor(NamedTuple):
  storage: _Storage
  dtype: np.dtype
  offset: int  # in elements of `dtype`, like the strides
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _NumpyType:
  """A numpy type; the program makes it first and sets its byte order later."""

  def __init__(self, code: str):
    if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,4})", code):
      raise ValueError(f"numpy type {code!r} refused: only plain numbers and text are read.")
    self.dtype = np.dtype(code)


class _NumpyArray:
  """A numpy array; the program makes it empty first and fills it later."""

  array: np.ndarray | None = None  # None: never filled


class _Program:
  """A file for pickletools that never allocates more than its size, whatever length it states."""

  def __init__(self, file: BinaryIO):
    self._file = file
    start = file.tell()
    self._size = file.seek(0, io.SEEK_END)
    file.seek(start)
    self.tell, self.readline = file.tell, file.readline

  def read(self, num_bytes: int) -> bytes:
    # Each step reads one byte, and `tell` would double the time for it.
    if num_bytes > 1:
      num_bytes = min(num_bytes, self._size - self._file.tell())
    return self._file.read(num_bytes)


class _Interpreter:
  """Runs one pickle to its end without importing or calling anything that it names.

  Args:
    file: positioned at the start of the pickle; after `run`, at its end.
  """

  def __init__(self, file: BinaryIO):
    self._program = _Program(file)
    self.storages: dict[str, _Storage] = {}
    self._steps = 0

  def run(self) -> object:
    """Returns the object that the pickle describes."""
    try:
      return self._run()
    except _MALFORMED as error:
      raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error}).") from None

  def _spend(self, steps: int) -> None:
    self._steps += steps
    if self._steps > _MAX_STEPS:
      raise ValueError(f"its pickle takes more than {_MAX_STEPS} steps; not a file of weights.")

  def _run(self) -> object:
    """Executes the program: a flat dispatch on its opcodes."""
    stack, outer, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(self._program):
      self._spend(1)
      match opcode.name:
        case "PROTO" | "FRAME":
          pass
        case "STOP":
          return stack.pop()
        case "MARK":
          outer.append(stack)
          stack = []
        case "POP_MARK":
          stack = outer.pop()
        case "POP":
          if stack:
            stack.pop()
          else:
            stack = outer.pop()
        case "DUP":
          stack.append(stack[-1])
        case "PUT" | "BINPUT" | "LONG_BINPUT":
          memo[arg] = stack[-1]
        case "MEMOIZE":
          memo[len(memo)] = stack[-1]
        case "GET" | "BINGET" | "LONG_BINGET":
          stack.append(memo[arg])
        case "NONE":
          stack.append(None)
        case "NEWTRUE" | "NEWFALSE":
          stack.append(opcode.name == "NEWTRUE")
        case name if name in _LITERALS:
          stack.append(arg)
        case "EMPTY_TUPLE":
          stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
          size = int(opcode.name[-1])
          if len(stack) < size:
            raise IndexError("too few values for a tuple")
          stack[-size:] = [tuple(stack[-size:])]
        case "EMPTY_LIST" | "EMPTY_SET":
          stack.append([])
        case "EMPTY_DICT":
          stack.append({})
        case "TUPLE" | "LIST" | "FROZENSET" | "DICT":
          items, stack = stack, outer.pop()
          match opcode.name:
            case "TUPLE":
              stack.append(tuple(items))
            case "DICT":
              stack.append({})
              _set_items(stack[-1], items)
            case _:
              stack.append(items)
        case "APPEND":
          item = stack.pop()
          _expect(stack[-1], list).append(item)
        case "APPENDS" | "ADDITEMS":
          items, stack = stack, outer.pop()
          _expect(stack[-1], list).extend(items)
        case "SETITEM":
          value, key = stack.pop(), stack.pop()
          _set_items(stack[-1], [key, value])
        case "SETITEMS":
          items, stack = stack, outer.pop()
          _set_items(stack[-1], items)
        case "GLOBAL":
          stack.append(_admit(arg.replace(" ", ".", 1)))
        case "STACK_GLOBAL":
          name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
          stack.append(_admit(f"{module}.{name}"))
        case "BINPERSID":
          stack.append(self._storage(stack.pop()))
        case "REDUCE":
          args, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Name)
          stack.append(self._call(function, args))
        case "BUILD":
          state = stack.pop()
          self._set_state(stack[-1], state)
        case "INST":
          _admit(arg.replace(" ", ".", 1))
          raise ValueError("an object of old style refused: only tensors are read.")
        case name:
          raise ValueError(
            f"step {name} refused: the file asks to build objects other than tensors. "
            "Save `model.state_dict()` alone."
          )
    raise ValueError("its pickle has no end.")

  def _storage(self, reference: object) -> _Storage:
    kind, storage_type, key, _, total, *view = _expect(reference, tuple)
    if kind != "storage" or str(_expect(storage_type, _Name)) not in _STORAGES:
      raise ValueError("a stored module refused: only storages of tensors are read.")
    key, total = str(_expect(key, str | int)), _natural(total)
    start, count = 0, total
    if view and view[0] is not None:
      _, start, count = view[0]
      start, count = _natural(start), _natural(count)
      if start + count > total:
        raise ValueError(f"a view leaves storage {key}.")
    storage = _Storage(key, np.dtype(_STORAGES[storage_type]), total, start, count)
    first = self.storages.setdefault(key, storage)
    if (first.dtype, first.total) != (storage.dtype, storage.total):
      raise ValueError(f"storage {key} is used with two types or lengths.")
    return storage

  def _call(self, function: _Name, args: tuple) -> object:
    """Returns the object that `function(*args)` describes."""
    match str(function):
      case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, strides, *rest = args
        if len(rest) > 2 and rest[2]:
          raise ValueError("a conjugated or negated view refused: save it resolved.")
        return _tensor(storage, offset, shape, strides, _expect(storage, _Storage).dtype)
      case "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, strides, _, _, dtype, *_ = args
        return _tensor(storage, offset, shape, strides, np.dtype(_DTYPES[_expect(dtype, _Name)]))
      case name if name in _REBUILD_PARAMETER:
        return _expect(args[0], _Tensor)
      case "collections.OrderedDict" | "collections.Counter":
        result = {}
        if args and isinstance(args[0], dict):
          self._spend(len(args[0]))
          result.update(args[0])
        elif args:
          self._spend(len(_expect(args[0], list)))
          for key, value in args[0]:
            _set_items(result, [key, value])
        return result
      case "builtins.set":
        return _expect(args[0], list) if args else []
      case "builtins.bytes" if not args:
        return b""
      case "torch.Size":
        return _expect(args[0], tuple) if args else ()
      case "torch.device":
        return None
      case "_codecs.encode":
        return self._bytes(args[0])
      case "numpy.dtype":
        return _NumpyType(_expect(args[0], str))
      case name if name in _NUMPY_SCALAR:
        return np.frombuffer(self._bytes(args[1]), _expect(args[0], _NumpyType).dtype, 1)[0]
      case name if name in _NUMPY_ARRAY:
        return _NumpyArray()
      case name if name in _NUMPY_BUFFER:
        data, numpy_type, shape, order = args
        array = _NumpyArray()
        self._set_state(array, (None, shape, numpy_type, order == "F", data))
        return array
      case name:
        raise ValueError(f"{name} refused: the file asks to call it.")

  def _set_state(self, target: object, state: object) -> None:
    """Does the work of `__setstate__` for the types of object that exist here."""
    match target:
      case _NumpyType():
        if state[1] in ("<", ">"):
          target.dtype = target.dtype.newbyteorder(state[1])
      case _NumpyArray():
        _, shape, numpy_type, column_major, data = state
        array = np.frombuffer(self._bytes(data), _expect(numpy_type, _NumpyType).dtype)
        target.array = array.reshape(shape, order="F" if column_major else "C")
      case dict() | _Tensor():
        pass  # `_metadata` of a state_dict, attributes of a tensor
      case _:
        raise ValueError(f"a state for {type(target).__name__} refused.")

  def _bytes(self, value: object) -> bytes:
    if not isinstance(value, str):
      return _expect(value, bytes | bytearray)
    # Python 2 wrote bytes as text. Encoding copies it, and a short program can ask for many copies.
    self._spend(len(value) // 100)
    return value.encode("latin-1")


_LITERALS = {
  *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
  *("STRING", "BINSTRING", "SHORT_BINSTRING"),
  *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
  *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _admit(name: str) -> _Name:
  name = re.sub(r"^__builtin__\.", "builtins.", name)
  if name not in _ADMITTED:
    raise _RefusedError(
      f"{name:.200} refused: the file asks for code that is no part of a tensor. If you trust "
      "where it comes from, load it with PyTorch and save `model.state_dict()` alone."
    )
  return _Name(name)


def _expect(value, kind):
  if not isinstance(value, kind):
    raise TypeError(f"{type(value).__name__} instead of {kind}")
  return value


def _natural(value) -> int:
  if not isinstance(value, int) or not 0 <= value < 2**62:
    raise ValueError("a size, stride or offset is no natural number of 62 bits.")
  return value


def _set_items(target, items: list) -> None:
  _expect(target, dict)
  if len(items) % 2:
    raise IndexError("a key without a value")
  for key, value in zip(items[::2], items[1::2], strict=True):
    # Weights have no other keys, and hashing nested tuples can take forever.
    target[_expect(key, str | int | float | None)] = value


def _tensor(storage, offset, shape, strides, dtype: np.dtype) -> _Tensor:
  shape = tuple(map(_natural, _expect(shape, tuple)))
  strides = tuple(map(_natural, _expect(strides, tuple)))
  if len(shape) != len(strides) or len(shape) > 64:
    raise ValueError(f"a tensor of {len(shape)} axes with {len(strides)} strides.")
  return _Tensor(_expect(storage, _Storage), dtype, _natural(offset), shape, strides)


def _weights(root: object) -> dict[str, _Tensor | np.ndarray]:
  """Collects the model's tensors from the containers of a checkpoint, by joined name."""
  leaves: dict[tuple[str, ...], _Tensor | np.ndarray] = {}
  num_nodes = 0

  def collect(node, path):
    nonlocal num_nodes
    num_nodes += 1
    if num_nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
      raise ValueError("its containers are nested without end; not a file of weights.")
    if isinstance(node, _NumpyArray):
      node = node.array
    if isinstance(node, _Tensor | np.ndarray):
      leaves[path] = node
    elif isinstance(node, dict | list) or type(node) is tuple:
      items = node.items() if isinstance(node, dict) else enumerate(node)
      for key, value in items:
        if len(str(key)) > _MAX_NAME:
          raise ValueError(f"a name of {len(str(key))} characters; not a file of weights.")
        collect(value, (*path, str(key)))

  collect(root, ())
  leaves.pop((), None)  # a single tensor has no name
  while key := next((k for k in _MODEL_KEYS if any(p[0] == k and p[1:] for p in leaves)), None):
    leaves = {path[1:]: leaf for path, leaf in leaves.items() if path[0] == key and path[1:]}
  named: dict[str, _Tensor | np.ndarray] = {}
  for path, leaf in leaves.items():
    if len(path) > 1 and _OTHER_KEYS.fullmatch(path[0]):
      continue
    name = ".".join(path)
    if name in named:
      raise ValueError(f"{name}: there are two tensors of this name.")
    named[name] = leaf
  return named


def _normalisation(root: object) -> tuple[list[float], list[float]] | None:
  """Returns the one mean and deviation of a checkpoint's plain numbers; None if there is no one."""
  if not isinstance(root, dict):
    return None
  pairs = []
  for place in (root, *(root.get(key) for key in _NORMALISATION_KEYS)):
    if isinstance(place, dict):
      pair = _numbers(place.get("mean")), _numbers(place.get("std"))
      if all(pair) and pair not in pairs:
        pairs.append(pair)
  return pairs[0] if len(pairs) == 1 else None


def _numbers(value: object) -> list[float]:
  """Returns one number or three as a list; [] for anything else."""
  if isinstance(value, _NumpyArray):
    value = value.array
  if isinstance(value, np.ndarray):
    value = value.ravel().tolist() if value.size <= 3 else []
  values = list(value) if isinstance(value, list | tuple) else [value]
  plain = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
  return [float(v) for v in values] if plain and len(values) in (1, 3) else []


def _arrays(
  tensors: dict[str, _Tensor | np.ndarray],
  storage_bytes: Callable[[_Storage], bytearray],
  file_size: int,
) -> dict[str, np.ndarray]:
  """Returns the tensors' values; refuses tensors outside their storage or far too large."""
  total = 0
  for name, tensor in tensors.items():
    total += math.prod(tensor.shape) * tensor.dtype.itemsize
    # A tensor of stride 0 is larger than its storage; a few such are fine.
    if total > 4 * file_size + 2**26:
      raise ValueError(f"{name}: tensors of {total} bytes in a file of {file_size}.")
  arrays = {}
  for name, tensor in tensors.items():
    if isinstance(tensor, np.ndarray):
      arrays[name] = np.array(tensor, tensor.dtype.newbyteorder("="), order="C")
      continue
    try:
      arrays[name] = _strided(tensor, storage_bytes)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from None
  return arrays


def _strided(tensor: _Tensor, storage_bytes: Callable[[_Storage], bytearray]) -> np.ndarray:
  if 0 in tensor.shape:
    return np.empty(tensor.shape, tensor.dtype)
  storage = tensor.storage
  width = storage.dtype.itemsize
  data = memoryview(storage_bytes(storage))[storage.start * width :][: storage.count * width]
  strides = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
  offset = tensor.offset * tensor.dtype.itemsize
  try:
    view = np.ndarray(tensor.shape, tensor.dtype, data, offset, strides)
  except (ValueError, OverflowError):
    raise ValueError(
      f"shape {tensor.shape}, strides {tensor.strides}, offset {tensor.offset} leave its storage."
    ) from None
  return np.asarray(view, order="C")
