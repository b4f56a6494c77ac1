"""Makes the golden files of this folder from the full outputs of the published code.

  python tests/golden/make.py

reads `golden/` of $FDEP_SHARED or ../shared. Those outputs were computed in float64 by the
published PyTorch code on the weights and inputs of `tests/formula.py`, which are made from names
alone. Of each output its norm and a sample of its values is kept (`tests/goldens.py`); of each
network also the names and shapes of its weights, the norms of its gradients, the sums of its
running statistics, and the spread of its initial values.
"""

import io
import json
import pathlib
import sys

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]

from goldens import FOLDER, SHARED, norm, sample  # noqa: E402

FACTS = ("loss", "grad_norm_names", "grad_norms", "stat_names", "stat_sums", "levels")
FACTS += ("blocks_kept", "embedding_scale")


def reduce(outputs, manifest: dict, more: dict | None = None) -> bytes:
  """Returns the content of a file: `outputs` reduced, with the manifest and further facts."""
  keys = [key for key in outputs if key not in FACTS]
  arrays = {
    "manifest": _text(manifest),
    "keys": np.array(keys),
    "shapes": _text([outputs[key].shape for key in keys]),
    "norms": np.array([norm(outputs[key]) for key in keys]),
    "samples": np.concatenate([sample(outputs[key]) for key in keys]),
    **{key: outputs[key] for key in FACTS if key in outputs},
    **(more or {}),
  }
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  return content.getvalue()


def _text(value) -> np.ndarray:
  return np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8)


def main() -> None:
  source = SHARED / "golden"
  spread = {}
  for name in ("init_rms.json", "init_rms_more.json"):
    spread |= json.loads((source / name).read_text())
  for kind in ("networks", "dinov2", "priors"):
    (FOLDER / kind).mkdir(exist_ok=True)
    for path in sorted((source / kind).glob("*.npz")):
      name = path.stem.removesuffix("_small").removesuffix("_bf16periods")
      manifest = path.with_name(f"{name}.json")
      if not manifest.exists():  # of pretrained weights, which are not made by a formula
        continue
      more = {}
      if kind == "networks":
        names, values = zip(*spread[name].items(), strict=True)
        more = {"init_names": np.array(names), "init_rms": np.array(values)}
      content = reduce(dict(np.load(path)), json.loads(manifest.read_text()), more)
      (FOLDER / kind / path.name).write_bytes(content)
  for path in sorted((source / "priors").glob("names_*.json")):
    rules = json.loads(path.read_text())
    lines = ",\n".join(json.dumps(rule) for rule in rules)
    (FOLDER / "priors" / path.name).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
  main()
