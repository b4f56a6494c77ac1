"""converters.read_torch: both formats of torch.save and safetensors, and what it must refuse.

The files are put together here from pickle's opcodes, because torch is not installed where these
tests run; where it is, real ones are compared too.
"""

import builtins
import os
import pickle
import re
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import (
  KINDS,
  call,
  mapping,
  name,
  tensor,
  value,
  whole,
  write_legacy,
  write_zip,
)

import converters
from converters import torch_file

read_torch = converters.read_torch
# Opcodes. A program is what stands between PROTO and STOP.


FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def write(path, program, storages=None, *, legacy):
  return (write_legacy if legacy else write_zip)(path, program, storages)


# What is read.


@FORMATS
def test_every_type_comes_back_bit_for_bit(tmp_path, legacy):
  rng = np.random.default_rng(0)
  arrays = {kind: (rng.standard_normal((3, 4)) * 9).astype(dtype) for kind, dtype in KINDS.items()}
  program = mapping({k: whole(a, str(i), legacy=legacy) for i, (k, a) in enumerate(arrays.items())})
  path = write(
    tmp_path / "w.pth", program, {str(i): a for i, a in enumerate(arrays.values())}, legacy=legacy
  )
  state = read_torch(path)
  assert list(state) == list(arrays)
  for kind, array in arrays.items():
    assert state[kind].dtype == array.dtype
    np.testing.assert_array_equal(state[kind], array)


@FORMATS
def test_strided_shared_expanded_scalar_and_empty_tensors_are_the_views_they_were(tmp_path, legacy):
  base = np.arange(24, dtype=np.float32)
  views = {
    "transposed": (0, (4, 6), (1, 4), base.reshape(6, 4).T),
    "every_third": (2, (3, 2), (8, 3), base.reshape(3, 8)[:, 2:6:3]),
    "slice": (5, (7,), (1,), base[5:12]),
    "scalar": (7, (), (), base[7]),
    "expanded": (1, (5, 2), (0, 1), np.broadcast_to(base[1:3], (5, 2))),
    "empty": (0, (0, 3), (3, 1), np.zeros((0, 3))),
  }
  program = mapping(
    {
      key: tensor("FloatStorage", "0", 24, offset, shape, strides, legacy=legacy)
      for key, (offset, shape, strides, _) in views.items()
    }
  )
  state = read_torch(write(tmp_path / "w.pth", program, {"0": base}, legacy=legacy))
  for key, (*_, expected) in views.items():
    assert state[key].shape == expected.shape and state[key].flags.c_contiguous
    np.testing.assert_array_equal(state[key], expected)
  assert np.shares_memory(state["slice"], state["scalar"])


def test_a_view_storage_of_old_files_starts_where_it_says(tmp_path):
  base = np.arange(10, dtype=np.float32)
  view = ("view", 4, 3)  # name, offset, length
  program = mapping({"w": tensor("FloatStorage", "0", 10, 1, (2,), (1,), view=view, legacy=True)})
  state = read_torch(write_legacy(tmp_path / "w.pth", program, {"0": base}))
  np.testing.assert_array_equal(state["w"], [5, 6])


@FORMATS
def test_a_training_checkpoint_gives_its_model_alone(tmp_path, legacy):
  w, momentum = np.arange(3, dtype=np.float32), np.ones(3, np.float32)
  optimizer = mapping({"state": mapping({"0": whole(momentum, "1", legacy=legacy)})})
  numpy_type = call("numpy.dtype", value("f8"), value(False), value(True))
  best = call(
    "numpy.core.multiarray.scalar",
    numpy_type + value((3, "<", None, None, None, -1, -1, 0)) + b"b",
    call("_codecs.encode", value("\x00" * 8), value("latin1")),
  )
  program = mapping(
    {
      "optimizer": optimizer,
      "best_iou": best,
      "size": call("torch.Size", value((1, 2))),
      "epoch": value(3),
      "state_dict": mapping({"conv.weight": whole(w, "0", legacy=legacy)}),
    }
  )
  path = write(tmp_path / "c.pth.tar", program, {"0": w, "1": momentum}, legacy=legacy)
  state = read_torch(path)
  assert list(state) == ["conv.weight"]
  np.testing.assert_array_equal(state["conv.weight"], w)


@FORMATS
@pytest.mark.parametrize(
  ("beside", "expected"),
  [
    ({"mean": value(101.5), "std": value(34)}, ([101.5], [34.0])),
    ({"img_norm_cfg": value({"mean": 0.4, "std": 0.2})}, ([0.4], [0.2])),
    ({"normalization": value({"mean": (0.1, 0.2, 0.3), "std": [1]})}, ([0.1, 0.2, 0.3], [1.0])),
    ({"norm_cfg": value({"mean": np.array([0.4]), "std": np.array([0.2])})}, ([0.4], [0.2])),
    ({"mean": value(101.5)}, None),
    ({"mean": value("dark"), "std": value("light")}, None),
    ({"mean": value(True), "std": value(True)}, None),
    ({"mean": value([1, 2]), "std": value([1, 2])}, None),
    ({"optimizer": value({"mean": 0.4, "std": 0.2})}, None),
    # Two that differ: neither is known to be the images'.
    ({"img_norm": value({"mean": 0.4, "std": 0.2}), "mean": value(0.5), "std": value(0.2)}, None),
  ],
)
def test_a_mean_and_a_deviation_beside_the_weights_are_read(tmp_path, legacy, beside, expected):
  w = np.arange(3, dtype=np.float32)
  program = mapping({"state_dict": mapping({"w": whole(w, "0", legacy=legacy)}), **beside})
  path = write(tmp_path / "c.pth.tar", program, {"0": w}, legacy=legacy)
  found = torch_file.read_checkpoint(path)
  assert found.normalisation == expected
  assert list(found.arrays) == ["w"]


def test_nested_containers_are_joined_by_dots_and_optimisers_left_out(tmp_path):
  w = np.arange(2, dtype=np.float32)
  program = mapping(
    {
      "encoder": mapping({"a": whole(w, "0")}),
      "heads": b"](" + whole(w, "0") + whole(w, "0") + b"e",
      "optim_g": mapping({"exp_avg": whole(w, "0")}),
      "lr_scheduler": mapping({"last": whole(w, "0")}),
      "up_sample": mapping({"b": whole(w, "0")}),
    }
  )
  state = read_torch(write_zip(tmp_path / "w.pt", program, {"0": w}))
  assert list(state) == ["encoder.a", "heads.0", "heads.1", "up_sample.b"]


def test_a_numpy_array_in_a_checkpoint_is_an_array_too(tmp_path):
  expected = np.asfortranarray(np.arange(6.0).reshape(2, 3))
  program = value({"w": expected, "big": np.array([1, 2], ">i4")})
  state = read_torch(write_zip(tmp_path / "w.pt", program))
  np.testing.assert_array_equal(state["w"], expected)
  np.testing.assert_array_equal(state["big"], [1, 2])
  assert state["big"].dtype == np.int32


def test_safetensors_are_recognised_by_content_and_bfloat16_survives(tmp_path):
  arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, ml_dtypes.bfloat16)}
  safetensors.numpy.save_file(arrays, tmp_path / "w.bin")
  state = read_torch(tmp_path / "w.bin")
  assert state["b"].dtype == ml_dtypes.bfloat16
  for key, array in arrays.items():
    np.testing.assert_array_equal(state[key], array)


# What is refused.


class Evil:
  """Unpickled, it runs a shell command."""

  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["zip", "legacy", "plain"])
def test_a_pickle_that_calls_os_system_is_refused_by_name_and_nothing_runs(
  tmp_path, protocol, where
):
  trace = tmp_path / "it_ran"
  pickled = pickle.dumps(Evil(f"touch {trace}"), protocol)
  path = tmp_path / "evil.pth"
  if where == "plain":
    path.write_bytes(pickled)
  else:
    program = pickled[:-1] if protocol < 2 else pickled[2:-1]
    write(path, program, legacy=where == "legacy")
  with pytest.raises(ValueError, match=r"evil\.pth: (posix|nt)\.system refused"):
    read_torch(path)
  assert not trace.exists()
  pickle.loads(pickled)  # the same bytes do run where they are let
  assert trace.exists()


def _short(text: str) -> bytes:
  return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize(
  ("program", "refused"),
  [
    (call("builtins.eval", value("BOMB")), "builtins.eval"),
    (call("__builtin__.eval", value("BOMB")), "builtins.eval"),
    (_short("builtins") + _short("eval") + b"\x93" + value(("BOMB",)) + b"R", "builtins.eval"),
    (_short("os.path") + _short("os.system") + b"\x93" + value(("x",)) + b"R", "os.path.os.system"),
    (b"(" + value("BOMB") + b"ibuiltins\neval\n", "builtins.eval"),  # INST
    (b"(" + name("builtins.eval") + value("BOMB") + b"o", "builtins.eval"),  # OBJ
    (name("builtins.object") + b")\x81", "builtins.object"),  # NEWOBJ
    (b"(icollections\nOrderedDict\n", "old style"),
    (name("collections.OrderedDict") + b")\x81", "step NEWOBJ"),
    (name("collections.OrderedDict") + b")}\x92", "step NEWOBJ_EX"),
    (b"\x82\x01", "step EXT1"),
    (b"Pmodule\n", "step PERSID"),
    (call("torch.FloatStorage", value(3)), "torch.FloatStorage"),
    (call("numpy.ndarray", value((2,))), "numpy.ndarray"),
    (call("builtins.bytes", value(10**12)), "builtins.bytes"),
    (call("builtins.getattr", value("a"), value("b")), "builtins.getattr"),
    (call("torch._utils._rebuild_sparse_tensor"), "_rebuild_sparse_tensor"),
    (call("torch.hub.load", value("x")), "torch.hub.load"),
    (call("numpy.dtype", value("O")), "numpy type 'O'"),
    (name("torch.FloatStorage") + value({"__setstate__": 1}) + b"b", "a state for _Name"),
    (value(("module", None, "0", "cpu", 1)) + b"Q", "stored module|damaged"),
  ],
)
def test_whatever_builds_something_other_than_tensors_is_refused(
  tmp_path, monkeypatch, program, refused
):
  def never(*args):
    raise AssertionError("code of the file ran")

  b"x".decode("cp437")  # zipfile's, which Python imports when it is first used
  path = write_zip(tmp_path / "w.pth", program)
  for function in ("eval", "__import__"):
    monkeypatch.setattr(builtins, function, never)
  try:
    torch_file.read_torch(path)
  except ValueError as error:
    message = str(error)
  finally:
    monkeypatch.undo()
  assert message.startswith(f"{path}: ")
  assert re.search(refused, message), message


def test_a_stored_module_is_refused(tmp_path):
  program = value("module") + name("torch.FloatStorage") + value("0") + value("cpu") + value(1)
  with pytest.raises(ValueError, match="stored module refused"):
    read_torch(write_zip(tmp_path / "w.pth", b"(" + program + b"tQ"))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "neither"),
    (b"hello, this is text\n" * 50, "neither"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
    (b"PK\x03\x04" + bytes(100), "zip"),
    (pickle.dumps({"w": [1.0, 2.0]}), "neither"),
    (struct.pack("<q", 10) + b'{"a": 1}  ', "safetensors"),
    (struct.pack("<q", 2**60) + b'{"a": 1}  ', "neither"),
  ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
  path = tmp_path / "w.pth"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    read_torch(path)
  assert str(error.value).startswith(f"{path}: ")


def test_a_missing_file_a_folder_another_zip_and_an_empty_state_are_each_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nothing.pth: no such file"):
    read_torch(tmp_path / "nothing.pth")
  with pytest.raises(ValueError, match="not a file"):
    read_torch(tmp_path)
  np.savez(tmp_path / "a.npz", a=np.ones(2))
  with pytest.raises(ValueError, match=r"0 members \*/data.pkl"):
    read_torch(tmp_path / "a.npz")
  with pytest.raises(ValueError, match="no named tensors"):
    read_torch(write_zip(tmp_path / "w.pth", value({"epoch": 3})))
  safetensors.numpy.save_file({}, tmp_path / "w.safetensors")
  with pytest.raises(ValueError, match="no named tensors"):
    read_torch(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
  w = np.arange(50, dtype=np.float32)
  path = tmp_path / "w.pth"
  if kind == "safetensors":
    safetensors.numpy.save_file({"w": w}, path)
  else:
    program = mapping({"w": whole(w, "0", legacy=kind == "legacy")})
    write(path, program, {"0": w}, legacy=kind == "legacy")
  content = path.read_bytes()
  for length in range(0, len(content), 7):
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=str(path)):
      read_torch(path)
  path.write_bytes(content)
  np.testing.assert_array_equal(read_torch(path)["w"], w)


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path):
  w = np.full(50, 1.5, np.float32)
  path = write_zip(tmp_path / "w.pth", mapping({"w": whole(w, "0")}), {"0": w})
  content = path.read_bytes()
  path.write_bytes(content.replace(w[:2].tobytes(), w[:1].tobytes() + b"\x00\x00\xc1\x3f", 1))
  with pytest.raises(ValueError, match="CRC"):
    read_torch(path)


def test_big_endian_files_are_refused(tmp_path):
  w = np.ones(2, np.float32)
  with pytest.raises(ValueError, match="big-endian"):
    read_torch(write_zip(tmp_path / "z", mapping({"w": whole(w, "0")}), {"0": w}, b"big"))
  program = mapping({"w": whole(w, "0", legacy=True)})
  with pytest.raises(ValueError, match="big-endian"):
    read_torch(write_legacy(tmp_path / "l", program, {"0": w}, little_endian=False))


@FORMATS
@pytest.mark.parametrize(
  ("count", "offset", "shape", "strides", "message"),
  [
    (8, 0, (9,), (1,), "leave its storage"),
    (8, 5, (4,), (1,), "leave its storage"),
    (8, 0, (2, 2), (7, 1), "leave its storage"),
    (8, 0, (2**40,), (1,), "bytes in a file of"),
    (8, 0, (2**40,), (0,), "bytes in a file of"),  # one element, spread over 4 TB
    (8, 0, (2, 2), (1,), "2 axes with 1 strides"),
    (8, 0, (-1,), (1,), "no natural number"),
    (8, 0, (2,), (-1,), "no natural number"),
    (8, -1, (2,), (1,), "no natural number"),
    (8, 0, (2**70, 0), (1, 1), "no natural number"),
    (8, 0, (2**61, 0), (1, 1), "."),
    (9, 0, (2,), (1,), "storage 0|data/0"),
    (2**50, 0, (2,), (1,), "storage 0|data/0"),
  ],
)
def test_tensors_that_leave_their_storage_or_grow_without_bound_are_refused(
  tmp_path, legacy, count, offset, shape, strides, message
):
  program = mapping(
    {"w": tensor("FloatStorage", "0", count, offset, shape, strides, legacy=legacy)}
  )
  path = write(tmp_path / "w.pth", program, {"0": np.zeros(8, np.float32)}, legacy=legacy)
  with pytest.raises(ValueError, match=message):
    read_torch(path)


def test_a_compressed_member_is_refused_before_it_unfolds(tmp_path):
  w = np.zeros(2**20, np.float32)
  program = mapping({"w": whole(w, "0")})
  path = write_zip(tmp_path / "w.pth", program, {"0": w}, compression=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 10_000
  with pytest.raises(ValueError, match="compressed"):
    read_torch(path)


def _doubling(pair: bytes, depth: int, first: bytes) -> bytes:
  """first, then `depth` times a container that holds the one before twice."""
  program = first
  for _ in range(depth):
    program += b"q\x010" + pair
  return program


@pytest.mark.parametrize(
  ("program", "message"),
  [
    (b"]q\x00h\x00a", "nested without end"),  # a list within itself
    (b"](" * 5000 + b"e" * 5000, "nested without end"),
    (_doubling(b"]h\x01ah\x01a", 60, b"]"), "nested without end"),  # 2⁶⁰ leaves
    (_doubling(b"h\x01h\x01\x86", 90, b")") + b"q\x010}h\x01K\x01s", "damaged"),  # a key's hash
    (b"N" * 4_000_001, "steps"),
    (b"Nr\xff\xff\xff\xff0}", "no named tensors"),  # a memo index of 2³²
    (b"\x8d" + struct.pack("<Q", 2**62) + b"x", "."),  # a text of 2⁶² characters
    (b"\x96" + struct.pack("<Q", 2**40) + b"x", "."),  # bytes likewise
    (b"I" + b"9" * 100_000 + b"\n", "."),
    (value({"x" * 2000: 0}), "a name of 2000 characters"),
    (b"0", "damaged"),
    (b"u", "damaged"),
    (b"\x86", "damaged"),
    (b"h\x07", "damaged"),
    (b"\xff", "."),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
@FORMATS
def test_hostile_programs_end_soon_in_a_sentence(tmp_path, legacy, program, message):
  path = write(tmp_path / "w.pth", program, legacy=legacy)
  with pytest.raises(ValueError, match=message) as error:
    read_torch(path)
  assert len(str(error.value)) < 1000


# The real thing.


def test_files_of_torch_itself_are_read_alike(tmp_path):
  torch = pytest.importorskip("torch")
  net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  optimizer = torch.optim.AdamW(net.parameters())
  sum(p.sum() for p in net.parameters()).backward()
  optimizer.step()
  base = torch.randn(5, 8)
  weights = {**net.state_dict(), "view": base.t()[2:, ::2], "half": base.half(), "none": base[:0]}
  checkpoint = {"state_dict": weights, "optimizer": optimizer.state_dict(), "iou": np.float64(0.5)}
  for legacy in (False, True):
    torch.save(checkpoint, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    state = read_torch(tmp_path / "c.pth")
    assert list(state) == list(weights)
    for key, expected in weights.items():
      np.testing.assert_array_equal(state[key], expected.numpy())
