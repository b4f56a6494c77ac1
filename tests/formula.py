"""Makes the weights and inputs of the golden outputs from names alone, so that no weights are kept.

An entry's stream of random numbers is seeded with its name. `RandomState` is frozen by numpy.
"""

import re
import zlib

import numpy as np

_TOKENS = ("cls_token", "pos_embed", "mask_token", "register_tokens")


def entry(name: str, shape, seed: int = 0) -> np.ndarray:
  """Draws one array of a PyTorch state_dict; activations stay of order one.

  Kernels have the variance 1/fan_in; scales of norms and running variances lie in [0.5, 1.5],
  LayerScales in [0.1, 0.5]; tokens have the deviation 0.2, all else 0.1.
  """
  random = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % 2**32)
  shape, kind = tuple(shape), name.rpartition(".")[2]
  if kind == "num_batches_tracked":
    return np.zeros(shape, np.int64)
  if kind == "gamma":
    return random.uniform(0.1, 0.5, shape).astype(np.float32)
  if kind == "running_var" or kind == "weight" and len(shape) == 1:
    return random.uniform(0.5, 1.5, shape).astype(np.float32)
  if kind == "weight":
    deviation = np.sqrt(1.0 / np.prod(shape[1:]))
  else:
    deviation = 0.2 if kind in _TOKENS else 0.1
  return (random.standard_normal(shape) * deviation).astype(np.float32)


def weights(manifest: dict[str, list[int]], seed: int = 0) -> dict[str, np.ndarray]:
  """Returns the state_dict {PyTorch name: array} of {PyTorch name: shape}."""
  return {name: entry(name, shape, seed) for name, shape in manifest.items()}


def image(shape, seed: int = 0) -> np.ndarray:
  """Returns a normal random NCHW input, float32."""
  return np.random.RandomState(1000 + seed).standard_normal(shape).astype(np.float32)


def cotangent(shape, seed: int = 0) -> np.ndarray:
  """Returns what a head's NCHW logits are multiplied by in the loss of the golden gradients."""
  return np.random.RandomState(2000 + seed).standard_normal(shape).astype(np.float32)


# DINOv1 and DINOv3.


def prior_weights(manifest: dict[str, list[int]], round_periods: bool = False):
  """Returns `weights` with DINOv3's two buffers that are not free.

  `bias_mask` is 1, 0, 1 over query, key and value; `periods` are 100^(k/count), rounded to bfloat16
  if `round_periods`.
  """
  state = weights(manifest)
  for name, shape in manifest.items():
    if name.endswith("bias_mask"):
      state[name] = np.repeat(np.float32([1, 0, 1]), shape[0] // 3)
    elif name.endswith("rope_embed.periods"):
      periods = (100.0 ** (np.arange(shape[0]) / shape[0])).astype(np.float32)
      state[name] = _bfloat16(periods) if round_periods else periods
  return state


def _bfloat16(values: np.ndarray) -> np.ndarray:
  import ml_dtypes

  return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def renamed(state: dict[str, np.ndarray], rules: list[dict], column: str) -> dict:
  """Gives a state_dict the names of Hugging Face's file, or of transformers 5 in memory.

  Args:
    state: with upstream's names.
    rules: `names_*.json`. N stands for a block's number. Several names share the array out along
      its first axis; null drops a part, no name the whole; "lead" adds a first axis.
    column: "hub" or "memory5".
  """
  out = {}
  for name, array in state.items():
    patterns = (re.escape(rule["upstream"]).replace("N", r"(\d+)") for rule in rules)
    matches = [re.fullmatch(pattern, name) for pattern in patterns]
    place = next(i for i, match in enumerate(matches) if match)
    rule, match = rules[place], matches[place]
    targets = rule[column]
    for target, part in zip(targets, np.split(array, len(targets) or 1), strict=False):
      if target is not None:
        key = target.replace("N", match[1]) if match.groups() else target
        out[key] = part[None] if rule.get("lead") else part
  return out
