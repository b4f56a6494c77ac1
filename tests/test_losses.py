"""The EEDM loss by hand and against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdep_jax import losses


def mask(text: str) -> jax.Array:
  """1×H×W bool from rows of # and . separated by blanks."""
  return jnp.array([[[c == "#" for c in row] for row in text.split()]])


def plain_eedm(logits, true, edge, weight):
  """By the definition, with a sort."""
  value = np.log1p(np.exp(-np.abs(logits))) + np.maximum(logits, 0) - logits * true
  value = (value * np.where(edge, weight, 1)).ravel()
  threshold = np.sort(value)[int(0.5 * value.size)]
  return value[value >= threshold].mean()


def test_edges_are_the_pixels_with_a_4_neighbour_of_the_other_class():
  true = mask("...... .##... .##... ...... ......")
  expected = mask(".##... ####.. ####.. .##... ......")
  np.testing.assert_array_equal(losses.edges(true), expected)


def test_edges_leave_a_large_targets_inside_out():
  true = mask("....... .#####. .#####. .#####. .......")
  expected = mask(".#####. ####### ##...## ####### .#####.")
  np.testing.assert_array_equal(losses.edges(true), expected)


def test_the_image_border_is_no_edge():
  np.testing.assert_array_equal(losses.edges(mask("### ### ###")), mask("... ... ..."))
  np.testing.assert_array_equal(losses.edges(mask("##. ##. ...")), mask(".## ### ##."))


@pytest.mark.parametrize("size", [1, 2, 3, 50, 1001])
@pytest.mark.parametrize("ties", [False, True])
def test_order_statistic_equals_a_sort(size, ties):
  rng = np.random.default_rng(size)
  values = np.abs(rng.standard_normal(size)).astype(np.float32) * 10.0 ** rng.integers(-30, 30)
  if ties:
    values[rng.random(size) < 0.7] = rng.choice([0.0, 1e-40, 3.5])
  for k in {0, size // 2, size - 1}:
    assert losses.order_statistic(jnp.asarray(values), k) == np.sort(values)[k]


def test_order_statistic_is_exact_in_float64():
  with jax.enable_x64(True):
    values = np.abs(np.random.default_rng(0).standard_normal(777))
    assert losses.order_statistic(jnp.asarray(values), 388) == np.sort(values)[388]


def test_hard_mean_keeps_ties_at_the_threshold():
  # Ascending: 0 0 0 0 1 2; element 3 is 0, so all six are kept.
  assert losses.hard_mean(jnp.array([0.0, 1, 0, 2, 0, 0])) == 0.5
  # Ascending: 1 2 3 4; element 2 is 3.
  assert losses.hard_mean(jnp.array([4.0, 1, 3, 2])) == 3.5


def test_mining_runs_over_the_whole_batch_not_over_images():
  # Image 0 has all the large losses; per image, two small ones would be kept too.
  values = jnp.array([[9.0, 8, 7, 6], [1, 2, 3, 4]])
  assert losses.hard_mean(values) == 7.5


@pytest.mark.parametrize("mode", ["intended", "released"])
def test_loss_equals_its_definition(mode):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (3, 20, 24)).astype(np.float32)
  true = rng.random((3, 20, 24)) < 0.05
  edge = np.asarray(losses.edges(jnp.asarray(true))) if mode == "intended" else np.ones_like(true)
  ours = losses.eedm([jnp.asarray(logits)[..., None]], jnp.asarray(true), mode)
  np.testing.assert_allclose(ours, plain_eedm(logits, true, edge, 4.0), rtol=1e-6)


def test_heads_are_mined_apart_and_summed():
  rng = np.random.default_rng(1)
  true = jnp.asarray(rng.random((2, 8, 8)) < 0.1)
  heads = [jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32) for _ in range(3)]
  apart = sum(losses.eedm([head], true) for head in heads)
  np.testing.assert_allclose(losses.eedm(heads, true), apart, rtol=1e-6)


def test_only_mined_pixels_have_a_gradient():
  values = jnp.array([4.0, 1, 3, 2])
  np.testing.assert_array_equal(jax.grad(losses.hard_mean)(values), [0.5, 0, 0.5, 0])


def test_extreme_logits_stay_finite():
  logits = jnp.array([1e4, -1e4, 80.0, -80.0]).reshape(1, 2, 2, 1)
  value, grad = jax.value_and_grad(lambda x: losses.eedm([x], jnp.zeros((1, 2, 2), bool)))(logits)
  assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_an_unknown_edge_mode_is_refused():
  with pytest.raises(ValueError, match="intended or released"):
    losses.eedm([jnp.zeros((1, 4, 4, 1))], jnp.zeros((1, 4, 4), bool), "publshed")
