"""Golden outputs of the published code: small samples that the project keeps, and the full ones.

`tests/golden/<kind>/<name>.npz` holds of every output its norm and some of its values, beside the
names and shapes of the weights (`tests/golden/make.py`). Where the full outputs are, tests compare
with both.
"""

import json
import os
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests/golden"
SHARED = pathlib.Path(os.environ.get("FDEP_SHARED", ROOT.parent / "shared"))
SAMPLE = 128  # values of each output that are kept


def sample(array: np.ndarray) -> np.ndarray:
  """Returns SAMPLE values of an array, or all if it has fewer; which depends on its size alone."""
  flat = np.asarray(array).ravel()
  if flat.size <= SAMPLE:
    return flat
  return flat[np.random.RandomState(flat.size).choice(flat.size, SAMPLE, replace=False)]


def norm(array: np.ndarray) -> float:
  return float(np.linalg.norm(np.asarray(array, np.float64)))


class Golden:
  """The golden outputs of one network.

  Args:
    kind: "networks", "dinov2" or "priors".
    name: of the file.

  Attributes:
    manifest: {PyTorch name: shape} of its weights.
    facts: small arrays that are kept whole, such as the norms of the gradients.
    keys: names of the outputs.
  """

  def __init__(self, kind: str, name: str):
    with np.load(FOLDER / kind / f"{name}.npz") as data:
      self.facts = {key: data[key] for key in data.files}
    self.manifest = json.loads(self.facts.pop("manifest").tobytes())
    self.keys = self.facts.pop("keys").tolist()
    self._norms = dict(zip(self.keys, self.facts.pop("norms"), strict=True))
    shapes = json.loads(self.facts.pop("shapes").tobytes())
    self.shapes = {key: tuple(shape) for key, shape in zip(self.keys, shapes, strict=True)}
    ends = np.cumsum([min(SAMPLE, int(np.prod(shape))) for shape in shapes])
    self._samples = dict(
      zip(self.keys, np.split(self.facts.pop("samples"), ends[:-1]), strict=True)
    )
    full = SHARED / "golden" / kind / f"{name}.npz"
    self._full = np.load(full) if full.exists() else None

  def error(self, key: str, ours) -> float:
    """Returns the relative error of an output: of the sample, the norm, and all if it is there."""
    ours = np.asarray(ours, np.float64)
    assert ours.shape == self.shapes[key], key
    known, total = self._samples[key].astype(np.float64), self._norms[key]
    typical = total * (len(known) / ours.size) ** 0.5  # the norm of as many values
    errors = [norm(sample(ours) - known) / typical, abs(norm(ours) - total) / total]
    if self._full is not None:
      theirs = self._full[key]
      np.testing.assert_array_equal(sample(theirs), self._samples[key], key)
      errors.append(norm(ours - theirs) / norm(theirs))
    return max(errors)


def load_names(kind: str) -> list[dict]:
  """Loads the rules of `formula.renamed` for "dino" or "dinov3"."""
  return json.loads((FOLDER / "priors" / f"names_{kind}.json").read_text())
