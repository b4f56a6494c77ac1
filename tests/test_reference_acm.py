"""A public trained ACM, converted: its published figures on the real NUAA and NUDT test sets.

The checkpoint is XinyiYing/LESPS `log/SIRST3/ACM_full.pth.tar`: 1 input channel, BatchNorm in the
fusion blocks, keys with the prefix "model." under "state_dict".
"""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import converters
from fdep_jax import cli, evaluate, predict
from fdep_jax import detector as detector_lib
from fdep_jax.layers import basic
from fdep_jax.metrics import hse

FILE = "weights/reference/acm_sirst3_1channel.pth.tar"
MEAN, STD = 95.010, 41.511  # grey levels; LESPS `get_img_norm_cfg`, SIRST3


@pytest.fixture(scope="module")
def net(shared):
  net = converters.load_backbone("acm", shared / FILE)
  net.eval()
  return net


@pytest.fixture(scope="module")
def probability(net):
  graphdef, variables = nnx.split(net)
  run = jax.jit(lambda v, images: jax.nn.sigmoid(nnx.merge(graphdef, v)(images).final))
  return lambda images: np.asarray(run(variables, jnp.asarray(images)))


def padded_image(folder: pathlib.Path, name: str) -> tuple[np.ndarray, tuple[int, int]]:
  """The image as LESPS feeds it, and its size: grey, normalised, then zero-padded to 32s."""
  with Image.open(folder / "images" / f"{name}.png") as image:
    grey = np.asarray(image.convert("L"), np.float32)
  height, width = grey.shape
  padded = np.pad((grey - MEAN) / STD, ((0, -height % 32), (0, -width % 32)))
  return padded[..., None].astype(np.float32), (height, width)


def score(folder: pathlib.Path, probability, batch_size: int = 4) -> hse.Score:
  """The metrics of the test set; images of one padded shape run together, so it compiles once."""
  names = (folder / "splits" / "test.txt").read_text().split()
  by_shape = collections.defaultdict(list)
  for name in names:
    image, size = padded_image(folder, name)
    by_shape[image.shape].append((name, image, size))
  probs = {}
  for shape, items in by_shape.items():
    # The last batch is filled up with zeros: another batch size would compile again.
    count = min(batch_size, len(items))
    for start in range(0, len(items), count):
      batch = np.zeros((count, *shape), np.float32)
      part = items[start : start + count]
      batch[: len(part)] = [image for _, image, _ in part]
      for (name, _, (height, width)), prob in zip(part, probability(batch), strict=False):
        probs[name] = prob[:height, :width, 0]
  masks = []
  for name in names:
    with Image.open(folder / "masks" / f"{name}.png") as mask:
      masks.append(np.asarray(mask.convert("L")) > 127)
  return hse.score([probs[name] for name in names], masks)


@pytest.mark.parametrize(
  "dataset, iou, pd, targets",
  [
    ("NUDT-SIRST", 57.42, 91.64, 945),
    # 34 padded shapes, each compiled anew: minutes.
    pytest.param("NUAA-SIRST", 64.84, 90.11, 263, marks=pytest.mark.slow),
  ],
)
def test_the_public_checkpoint_is_read_and_scores_as_published(
  shared, net, probability, dataset, iou, pd, targets
):
  # IoU and Pd: what the published code gives for this checkpoint at threshold 0.5.
  state = converters.read_torch(shared / FILE)
  assert len(state) == 297 and sum(array.size for array in state.values()) == 400_392
  assert state["model.stem.1.weight"].shape == (8, 1, 3, 3)
  assert all(np.isfinite(array).all() for array in state.values())
  # The variant is read off the checkpoint.
  assert net.in_channels == 1
  assert not any(isinstance(node, basic.GroupNorm) for _, node in nnx.iter_graph(net))
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == 397_823
  folder = shared / "data" / dataset
  result = score(folder, probability)
  assert result.targets == targets
  assert abs(100 * result.iou - iou) <= 0.1
  assert abs(result.hits - round(pd / 100 * targets)) <= 1
  if dataset == "NUAA-SIRST":  # from an independent evaluation of this checkpoint
    np.testing.assert_allclose(
      [result.hse_p, result.hse_t, result.hse], [0.879, 0.883, 0.776], rtol=0, atol=1e-3
    )


@pytest.mark.slow
def test_predict_of_the_file_is_its_published_protocol(shared, probability):
  found = detector_lib.load_published(shared / FILE, "acm", normalisation="lesps:SIRST3")
  predictor, folder = predict.Predictor(found), shared / "data/NUDT-SIRST"
  for name in (folder / "splits/test.txt").read_text().split()[:2]:
    image, (height, width) = padded_image(folder, name)
    with Image.open(folder / "images" / f"{name}.png") as picture:
      prob = predictor(np.asarray(picture))
    expected = probability(image[None])[0, :height, :width, 0]
    np.testing.assert_allclose(prob, expected, atol=1e-4)


@pytest.mark.slow  # 664 images, and the time of one of 448×448
def test_eval_of_the_file_gives_the_published_figures(shared, parse, tmp_path):
  words = (f"--checkpoint={shared / FILE}", "--backbone=acm", f"--mean={MEAN}", f"--std={STD}")
  words += (f"--data={shared / 'data/NUDT-SIRST'}", f"--out={tmp_path}")
  values = parse("--mode=eval", *words)
  cli.check_given("eval", values)
  evaluate.command(values, detector_lib.config_of("acm"))
  found = json.loads((tmp_path / "NUDT-SIRST/metrics.json").read_text())["light"]
  assert abs(100 * found["iou"] - 57.42) <= 0.01
  assert abs(100 * found["pd"] - 91.64) <= 0.01
