"""Every network against the published PyTorch code's outputs, gradients and initialisation."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import converters
from converters import _rules
from fdep_jax import backbones

# PyTorch's executed parameters (YuChuang1205/PAL e89262f); the paper's Table 1 in millions.
PARAMETERS = {
  "acm": 397_971,
  "alcl": 5_668_145,
  "alcnet": 427_109,
  "dna": 4_696_888,
  "ggl": 8_988_093,
  "mlcl": 657_249,
  "msda": 4_791_041,
  "uiu": 50_541_461,
}


def reference_heads(name: str, logits: backbones.Logits) -> list[jax.Array]:
  """All heads in the published code's return order: only UIU-Net returns the prediction first."""
  side = list(logits.side)
  return [logits.final, *side] if name == "uiu" else [*side, logits.final]


def relative_error(ours, reference) -> float:
  return np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)


def nchw(x) -> np.ndarray:
  return np.asarray(x).transpose(0, 3, 1, 2)


def shapes_only(name: str):
  return nnx.eval_shape(lambda: backbones.create(name, rngs=nnx.Rngs(0)))


def count(module) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.fixture(scope="module")
def golden(shared, formula):
  @functools.cache
  def load(name: str):
    folder = shared / "golden" / "networks"
    state = formula.weights(formula.load_manifest(folder / f"{name}.json"))
    return state, np.load(folder / f"{name}.npz")

  return load


def golden_image(formula) -> jax.Array:
  return jnp.asarray(formula.image((2, 3, 64, 64)).transpose(0, 2, 3, 1))


def test_every_network_has_its_parameter_count_in_the_table():
  assert sorted(PARAMETERS) == backbones.names()


@pytest.mark.parametrize("name", backbones.names())
def test_parameters_equal_the_executed_ones_of_the_published_network(name):
  assert count(shapes_only(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", backbones.names())
def test_evaluation_equals_the_published_network(name, golden, formula):
  state, reference = golden(name)
  net = converters.load_backbone(name, state)
  net.eval()
  graphdef, variables = nnx.split(net)

  @jax.jit
  def run(variables, image):
    net = nnx.merge(graphdef, variables)
    skips, top = net.encode(image)
    return top, net.decode(skips, top)

  top, logits = run(variables, golden_image(formula))
  assert relative_error(nchw(top), reference["eval_top"]) <= 1e-4
  heads = reference_heads(name, logits)
  assert f"eval_head{len(heads)}" not in reference
  for i, head in enumerate(heads):
    assert relative_error(nchw(head), reference[f"eval_head{i}"]) <= 1e-4, i


@pytest.mark.parametrize("name", backbones.names())
def test_training_equals_the_published_network(name, golden, formula):
  # Heads, gradient norms and running statistics of one training forward.
  state, reference = golden(name)
  net = converters.load_backbone(name, state)
  net.train()
  net.set_attributes(deterministic=True, raise_if_not_found=False)
  graphdef, params, rest = nnx.split(net, nnx.Param, ...)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss_and_rest(params, rest, image):
    net = nnx.merge(graphdef, params, rest)
    heads = reference_heads(name, net(image))
    loss = sum(
      jnp.mean(head * jnp.asarray(formula.cotangent(nchw_shape(head), i).transpose(0, 2, 3, 1)))
      for i, head in enumerate(heads)
    )
    return loss, (heads, nnx.state(net, nnx.Not(nnx.Param)))

  def nchw_shape(x):
    return (x.shape[0], x.shape[3], x.shape[1], x.shape[2])

  (loss, (heads, rest)), grads = jax.jit(loss_and_rest)(params, rest, golden_image(formula))
  for i, head in enumerate(heads):
    assert relative_error(nchw(head), reference[f"train_head{i}"]) <= 1e-4, i
  np.testing.assert_allclose(loss, reference["loss"], rtol=1e-3, atol=1e-5)

  paths = torch_paths(name, net)
  norms = {path: float(np.linalg.norm(g)) for path, g in by_path(grads).items()}
  known = reference["grad_norm_names"].tolist()
  assert {paths[name_] for name_ in known if name_ in paths} == set(norms)
  bound = 1e-6 * reference["grad_norms"].max()
  for name_, norm in zip(known, reference["grad_norms"], strict=True):
    if name_ in paths:
      assert abs(norms[paths[name_]] - norm) <= 1e-3 * norm + bound, name_

  stats = by_path(rest.filter(nnx.BatchStat))
  assert {paths[name_] for name_ in reference["stat_names"]} == set(stats)
  for name_, total in zip(reference["stat_names"], reference["stat_sums"], strict=True):
    stat = np.asarray(stats[paths[name_]], np.float64)
    assert abs(stat.sum() - total) <= 1e-4 * stat.size, name_


@pytest.mark.parametrize("name", backbones.names())
def test_there_and_back_is_bit_identical(name, golden):
  state, _ = golden(name)
  net = converters.load_backbone(name, state)
  back = converters.to_torch(net)
  assert set(back) == set(state)  # what strict=True of PyTorch asks for
  dead = {entry.layer for entry in converters._dead(converters._table(name), net)}
  for key, array in state.items():
    assert back[key].shape == array.shape and back[key].dtype == array.dtype, key
    if key.rsplit(".", 1)[0] not in dead:
      np.testing.assert_array_equal(back[key], array, key)


@pytest.mark.parametrize("name", backbones.names())
def test_initial_values_have_the_published_spread(name, shared):
  expected = json.loads((shared / "golden" / "init_rms.json").read_text())[name]
  net = jax.jit(lambda: nnx.state(backbones.create(name, rngs=nnx.Rngs(0)), nnx.Param))()
  ours = by_path(net)
  paths = torch_paths(name, shapes_only(name))
  checked = 0
  for key, rms in expected.items():
    array = np.asarray(ours[paths[key]])
    if array.size >= 500:
      assert abs(np.sqrt(np.mean(array**2)) - rms) <= 0.1 * rms, key
      checked += 1
  assert checked > 10


def torch_paths(name: str, net) -> dict[str, str]:
  """PyTorch name -> our path, from the converter's table."""
  rules = importlib.import_module(f"converters.{name}").rules(net)
  return {
    f"{layer}.{suffix}": f"{path}/{ours}"
    for layer, path, kind in rules
    for suffix, ours in kind.names.items()
    if f"{path}/{ours}" in _rules.flat_variables(net)
  }


def by_path(state) -> dict[str, np.ndarray]:
  return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(state)}
