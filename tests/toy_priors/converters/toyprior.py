"""Names of the toy foundation model's weights."""

import re

import numpy as np

from converters.foundation import PATCHES, Naming, Rule, Table, matrix
from fdep_jax.priors import toyprior


def _sizes(state, naming):
  width, _, patch, _ = np.shape(state[naming.patch])
  layers = [name for name in state if re.fullmatch(r"layers\.\d+\.weight", name)]
  return {"width": width, "depth": len(layers), "patch": patch}


TABLE = Table(
  toyprior.Toy,
  (Naming(0, patch="toy_embed.weight"),),
  _sizes,
  lambda model: [
    Rule("embed/kernel", ("toy_embed.weight",), PATCHES),
    Rule("embed/bias", ("toy_embed.bias",)),
    *(rule for i in range(model.depth) for rule in matrix(f"layers/{i}", f"layers.{i}")),
  ],
  lambda names: names.has("toy_embed.weight"),
)
