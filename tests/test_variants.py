"""Variants that real checkpoints need: counted, read off a state_dict, kept in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import converters
from fdep_jax import backbones
from fdep_jax.layers import blocks

# Parameters: XinyiYing/BasicIRSTD's ACM, UIU-Net and the executed ones of its ALCNet; its DNA-Net,
# which has one channel for three in a 3×3 and a 1×1 convolution to 16; PAL's small MLCL-Net.
BASIC_IRSTD = {"in_channels": 1, "fusion_norm": "batch"}
VARIANTS = [
  ("acm", BASIC_IRSTD, 397_823),
  ("alcnet", BASIC_IRSTD, 426_961),
  ("dna", {"in_channels": 1}, 4_696_888 - 2 * 16 * (9 + 1)),
  ("uiu", BASIC_IRSTD, 50_540_309),
  ("mlcl", {"small": True}, 559_809),
]


def create(name: str, options: dict) -> backbones.Backbone:
  """A network whose every value differs from its neighbours, without drawing initial ones."""
  net = nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0), **options))
  for i, leaf in enumerate(variables(net)):
    leaf.set_value(jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) + i)
  return net


def variables(net) -> list[nnx.Variable]:
  kept = nnx.Any(nnx.Param, nnx.BatchStat)
  return [leaf for _, leaf in nnx.to_flat_state(nnx.state(net, kept))]


@pytest.mark.parametrize("name, options, parameters", VARIANTS)
def test_a_variant_has_the_published_number_of_parameters(name, options, parameters):
  net = nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0), **options))
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == parameters


@pytest.mark.parametrize("name, options, _", VARIANTS)
def test_a_variant_is_recognised_by_its_state_dict_and_comes_back_bit_identical(name, options, _):
  state = converters.to_torch(create(name, options))
  assert converters._table(name).options(state) == options
  back = converters.to_torch(converters.load_backbone(name, state))
  assert list(back) == list(state)
  for key, array in state.items():
    np.testing.assert_array_equal(back[key], array, key)


@pytest.mark.parametrize("name", ["acm", "alcnet", "uiu"])
def test_an_unknown_fusion_norm_is_refused_with_the_known_ones(name):
  with pytest.raises(ValueError, match='"group" or "batch"'):
    nnx.eval_shape(lambda: backbones.create(name, fusion_norm="layer", rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", ["acm", "alcnet", "uiu"])
def test_a_one_channel_network_refuses_a_three_channel_image(name):
  net = nnx.eval_shape(lambda: backbones.create(name, **BASIC_IRSTD, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="B×H×W×1"):
    net.encode(jnp.zeros((1, 32, 32, 3)))


def test_the_head_drops_a_tenth_in_training_and_nothing_in_evaluation():
  head = blocks.DropoutHead(16, rngs=nnx.Rngs(0))
  ones = jnp.ones((1, 100, 100, 4))
  dropped = np.asarray(head.dropout(ones))
  assert 0.08 < (dropped == 0).mean() < 0.12
  np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.9, rtol=1e-6)
  assert (np.asarray(head.dropout(ones)) != dropped).any()
  head.eval()
  np.testing.assert_array_equal(head.dropout(ones), ones)
