"""A public trained RPCANet, converted: its IoU on the NUDT-SIRST test set by its authors' protocol.

The checkpoint is fengyiwu98/RPCANet `result/ISTD/NUDT-SIRST/RPCANet.pkl` (MIT), a plain state_dict.
The protocol: grey levels / 255, images of 256×256, which NUDT-SIRST's are as they come; a pixel is
found where its logit is above 0; masks at half of their range.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import converters
from fdep_jax.metrics import hse

FILE = "weights/reference/rpcanet/rpcanet_NUDT.pkl"


def load(shared):
  net = converters.load_backbone("rpcanet", shared / FILE)
  net.eval()
  return net


def score(net, folder, batch_size: int = 4, watch=iter) -> hse.Score:
  """The metrics of a set of images of one size."""
  graphdef, variables = nnx.split(net)
  run = jax.jit(lambda v, x: jax.nn.sigmoid(nnx.merge(graphdef, v)(x).final[..., 0]))
  names = (folder / "splits" / "test.txt").read_text().split()
  total = hse.Accumulator()

  def read(kind: str, name: str) -> np.ndarray:
    with Image.open(folder / kind / f"{name}.png") as picture:
      return np.asarray(picture.convert("L"))

  for start in watch(range(0, len(names), batch_size)):
    part = names[start : start + batch_size]
    images = np.stack([read("images", name) for name in part])[..., None]
    probs = np.asarray(run(variables, jnp.asarray(images, jnp.float32) / 255))
    for name, prob in zip(part, probs, strict=True):
      total.update(prob, read("masks", name) > 127)
  return total.result()


@pytest.mark.slow
def test_the_file_is_the_networks_and_goes_back_bit_for_bit(shared):
  state = converters.read_torch(shared / FILE)
  back = converters.to_torch(load(shared))
  assert set(back) == set(state)
  for key, array in state.items():
    np.testing.assert_array_equal(back[key], array if array.ndim else 0 * array, key)


@pytest.mark.slow  # 44 GMAC an image: ten minutes on two idle cores
def test_the_public_checkpoint_scores_as_its_authors_print(shared):
  # 89.31 in their table; here 89.376 on 664 images.
  result = score(load(shared), shared / "data" / "NUDT-SIRST")
  assert result.targets == 945
  assert abs(100 * result.iou - 89.31) <= 0.1
