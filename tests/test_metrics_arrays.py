"""Scores the arrays that people have: numpy, jax and torch, single images and batches."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fdep_jax.metrics import hse

RNG = np.random.default_rng(0)
MASKS = np.zeros((3, 20, 24), bool)
MASKS[:, 4:7, 5:8] = True
MASKS[1, 12:14, 15:17] = True
# Values that bfloat16 and float16 hold exactly.
PROBS = np.float32(RNG.integers(0, 129, MASKS.shape) / 256 + MASKS * 0.5).clip(0, 1)
EXPECTED = hse.score(list(PROBS), list(MASKS))


def accumulated(probs, masks):
  total = hse.Accumulator()
  total.update(probs, masks)
  return total.result()


class Tensor:
  """Refuses what a torch tensor refuses: numpy before detach, cpu, and float for bfloat16."""

  def __init__(self, values, grad=True, device="cuda", half=True):
    self.values, self.grad, self.device, self.half = values, grad, device, half
    self.shape, self.ndim = values.shape, values.ndim

  def detach(self):
    return Tensor(self.values, False, self.device, self.half)

  def cpu(self):
    return Tensor(self.values, self.grad, "cpu", self.half)

  def float(self):
    return Tensor(self.values.astype(np.float32), self.grad, self.device, False)

  def is_floating_point(self):
    return self.values.dtype.kind == "f"

  def numpy(self):
    if self.grad or self.device != "cpu" or (self.half and self.is_floating_point()):
      raise TypeError("cannot be converted to numpy")
    return self.values

  def __array__(self, dtype=None, copy=None):
    return self.numpy()

  def __iter__(self):
    return (Tensor(v, self.grad, self.device, self.half) for v in self.values)


KINDS = {
  "numpy": lambda x: x,
  "numpy float64": lambda x: x if x.dtype == bool else x.astype(np.float64),
  "numpy float16": lambda x: x if x.dtype == bool else x.astype(np.float16),
  "jax": jnp.asarray,
  "jax bfloat16": lambda x: jnp.asarray(x) if x.dtype == bool else jnp.asarray(x, jnp.bfloat16),
  "numpy bfloat16": lambda x: x if x.dtype == bool else np.asarray(jnp.asarray(x, jnp.bfloat16)),
  "like torch, on a device, with gradients": Tensor,
}
SHAPES = {
  "B×H×W": lambda x: x,
  "B×1×H×W": lambda x: x[:, None],
  "B×H×W×1": lambda x: x[..., None],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_shape_of_array_scores_the_same(kind, shape):
  probs, masks = KINDS[kind](SHAPES[shape](PROBS)), KINDS[kind](SHAPES[shape](MASKS))
  assert hse.score(probs, masks) == EXPECTED
  assert accumulated(probs, masks).hse == pytest.approx(EXPECTED.hse, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_hold_images_or_batches_of_any_sizes(kind):
  make = KINDS[kind]
  probs = [make(PROBS[0]), make(PROBS[1:, None])]
  masks = [make(MASKS[0]), make(MASKS[1:])]
  assert hse.score(probs, masks) == EXPECTED
  single = hse.score([PROBS[1]], [MASKS[1]])
  for shape in ((20, 24), (1, 20, 24), (20, 24, 1), (1, 1, 20, 24)):
    pair = make(PROBS[1].reshape(shape)), make(MASKS[1].reshape(shape))
    assert hse.score(*pair) == single
    assert accumulated(*pair).hse == pytest.approx(single.hse, abs=1e-12)


def test_a_batch_with_a_bad_image_is_refused_whole():
  total, probs = hse.Accumulator(), PROBS.copy()
  probs[1, 0, 0] = np.nan
  with pytest.raises(ValueError, match="image 1: the map has 1 value NaN"):
    total.update(probs, MASKS)
  assert not len(total)
  with pytest.raises(ValueError, match="3 probability maps and 2 masks"):
    total.update(PROBS, MASKS[:2])
  with pytest.raises(ValueError, match="3×2×20×24"):  # two channels
    total.update(np.stack([PROBS, PROBS], axis=1), MASKS[:1])
  with pytest.raises(ValueError, match="0×20×24"):
    total.update(PROBS[:0], MASKS[:0])
  with pytest.raises(ValueError, match="a single number"):
    total.update(np.float32(0.5), np.bool_(True))


def test_torch_tensors_score_the_same():
  torch = pytest.importorskip("torch")
  masks = torch.from_numpy(MASKS)
  for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    probs = torch.from_numpy(PROBS).to(dtype).requires_grad_()
    assert hse.score(probs[:, None], masks[:, None]) == EXPECTED
    assert hse.score(list(probs), list(masks)) == EXPECTED
    assert accumulated(probs[:, None], masks).hse == pytest.approx(EXPECTED.hse, abs=1e-12)


def test_neither_jax_nor_torch_is_imported():
  code = (
    "import sys, numpy as np; from fdep_jax.metrics import hse; "
    "total = hse.Accumulator(); total.update(np.ones((2, 1, 4, 4)), np.ones((2, 4, 4), bool)); "
    "total.result(); print([m for m in ('jax', 'torch', 'ml_dtypes', 'absl') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
  "kind, way",
  [(np.uint8, "divide it by 255"), (np.uint16, "the value that means 1"), (bool, "thresholded")],
)
def test_maps_of_integers_are_refused_with_a_way_that_gives_the_right_numbers(kind, way):
  with pytest.raises(ValueError, match=f"the map is {np.dtype(kind).name}.*{way}"):
    hse.score([np.ones((8, 8), kind)], [np.ones((8, 8), bool)])
