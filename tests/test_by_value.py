"""SAMF and one run's steps, computed a second time in plain numpy float64 from the equations.

Nothing here calls the code that it checks: convolution, BatchNorm, resizing, loss and AdamW are
written out below. Gradients are finite differences of these.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import toy_config
from plain import BATCH, LEVELS, SIZE, WIDTH, Plain, loop_of, randomise

from fdep_jax import build, evaluate, forward, samf
from fdep_jax.fdep import FDEP
from fdep_jax.metrics import hse
from fdep_jax.runtime import checkpoint

EPSILON = 1e-5  # of BatchNorm


# Plain numpy.


def conv(p, name, x):
  """Convolution of 1×1 or 3×3 with zeros around."""
  kernel = p[f"{name}/kernel"]
  reach = kernel.shape[0] // 2
  height, width = x.shape[1:3]
  x = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  out = 0
  for row in range(kernel.shape[0]):
    for column in range(kernel.shape[1]):
      out = out + x[:, row : row + height, column : column + width] @ kernel[row, column]
  return out + p.get(f"{name}/bias", 0)


def norm_relu(p, name, x, stats):
  if stats is None:
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  else:
    mean, var = stats[f"{name}/mean"], stats[f"{name}/var"]
  return np.maximum((x - mean) / np.sqrt(var + EPSILON) * p[f"{name}/scale"] + p[f"{name}/bias"], 0)


def bilinear(x, axis, size):
  """Interpolation between the centres of the pixels."""
  place = np.clip((np.arange(size) + 0.5) * x.shape[axis] / size - 0.5, 0, None)
  low = np.floor(place).astype(int)
  high = np.minimum(low + 1, x.shape[axis] - 1)
  part = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
  return np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part


def aligned(p, name, level, top):
  """Equation 1."""
  projected = conv(p, f"{name}align/project", level)
  return bilinear(bilinear(projected, 1, top.shape[1]), 2, top.shape[2])


def plain_samf(p, name, top, level, stats=None):
  """Equations 1 to 6; `stats` None: of the batch."""
  prior = aligned(p, name, level, top)
  gate = 1 / (1 + np.exp(-conv(p, f"{name}gate", prior)))  # eq. 2
  shift = conv(p, f"{name}shift", prior)  # eq. 3
  half = top.shape[-1] // 2
  multiplied = conv(p, f"{name}gated", top[..., :half] * gate)  # eq. 4
  added = conv(p, f"{name}shifted", top[..., half:] + shift)  # eq. 5
  fused = np.concatenate([multiplied, added], -1) + top
  for part in ("refine1", "refine2"):  # eq. 6
    fused = norm_relu(p, f"{name}{part}/norm", conv(p, f"{name}{part}/conv", fused), stats)
  return fused


def plain_add(p, name, top, level, stats=None):
  return top + aligned(p, name, level, top)


PLAIN = {"samf": plain_samf, "add": plain_add}


def cross_entropy(logits, true):
  return -(true * np.log(sigmoid(logits)) + (1 - true) * np.log(sigmoid(-logits)))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def plain_eedm(logits, true, edge_mode):
  """Contours weigh 4 (released: all pixels); the mean of the hardest half of the batch."""
  weight = np.ones(true.shape) * (4.0 if edge_mode == "released" else 1.0)
  for b, row, column in np.ndindex(true.shape):
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
      y, x = row + dy, column + dx
      if 0 <= y < true.shape[1] and 0 <= x < true.shape[2]:
        if true[b, y, x] != true[b, row, column]:
          weight[b, row, column] = 4.0
  values = np.sort((cross_entropy(logits[..., 0], true) * weight).ravel())
  return values[values >= values[len(values) // 2]].mean()


def slopes(value, p, step=1e-5):
  """Computes the gradient of `value(p)` by finite differences, one number of `p` at a time."""
  found = {}
  for name, array in p.items():
    found[name] = np.zeros_like(array)
    for place in np.ndindex(array.shape):
      ends = []
      for sign in (1, -1):
        moved = array.copy()
        moved[place] += sign * step
        ends.append(value({**p, name: moved}))
      found[name][place] = (ends[0] - ends[1]) / (2 * step)
  return found


# SAMF.


def arrays(module, kind):
  flat = nnx.to_flat_state(nnx.state(module, kind))
  return {"/".join(map(str, path)): np.asarray(value[...], np.float64) for path, value in flat}


def fusion_and_inputs(kind, top_size, level_size):
  module = {"samf": samf.SAMF, "add": samf.Add}[kind](6, 5, rngs=nnx.Rngs(3))
  randomise(module)
  rng = np.random.default_rng(1)
  return module, rng.normal(size=(2, *top_size, 6)), rng.normal(size=(2, *level_size, 5))


@pytest.mark.parametrize(
  ("kind", "trained", "sizes"),
  [
    ("samf", True, ((5, 7), (3, 3))),  # the tokens are enlarged
    ("samf", False, ((3, 2), (5, 4))),  # reduced
    ("add", True, ((6, 4), (3, 2))),  # doubled
  ],
)
def test_fusion_has_the_values_of_equations_1_to_6(kind, trained, sizes):
  with jax.enable_x64(True):
    module, top, level = fusion_and_inputs(kind, *sizes)
    p, stats = arrays(module, nnx.Param), arrays(module, nnx.BatchStat)
    module.train() if trained else module.eval()
    ours = np.asarray(module(jnp.asarray(top), jnp.asarray(level)))
  expected = PLAIN[kind](p, "", top, level, None if trained else stats)
  assert (expected > 0).mean() > 0.2
  np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)  # measured: 4e-15


@pytest.mark.parametrize("kind", ["samf", "add"])
def test_fusion_has_the_gradients_of_equations_1_to_6(kind):
  with jax.enable_x64(True):
    module, top, level = fusion_and_inputs(kind, (3, 4), (2, 3))
    module.train()
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    p = arrays(module, nnx.Param)
    weight = np.random.default_rng(2).normal(size=top.shape)

    def value(params, top, level):
      return (nnx.merge(graphdef, params, rest, copy=True)(top, level) * weight).sum()

    grads = jax.grad(value, argnums=(0, 1, 2))(params, jnp.asarray(top), jnp.asarray(level))
    ours = {
      "/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads[0])
    }
    ours |= {"top": np.asarray(grads[1]), "level": np.asarray(grads[2])}
  expected = slopes(
    lambda p: (PLAIN[kind](p, "", p["top"], p["level"]) * weight).sum(),
    {**p, "top": top, "level": level},
  )
  assert ours.keys() == expected.keys()
  for name, slope in expected.items():
    np.testing.assert_allclose(ours[name], slope, rtol=1e-6, atol=1e-7, err_msg=name)


# The steps of a run.


def plain_heads(p, image, levels):
  """Returns (side, final) of each branch."""
  b, h, w, c = image.shape
  top = conv(p, "backbone/down", image.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)))
  fused = top
  for i, level in enumerate(levels):
    fused = plain_samf(p, f"fusion/{i}/", fused, level)
  side = conv(p, "backbone/side", image)
  return {
    branch: (side, conv(p, "backbone/up", x).repeat(2, 1).repeat(2, 2) + side**2)
    for branch, x in (("main", fused), ("light", top))
  }


def plain_loss(p, batch, config, teacher):
  """L_main + λ·L_light + weight·distillation; `teacher`: the main branch's heads, as constants."""
  heads = plain_heads(p, batch["normal"], batch["levels"])
  parts = {
    branch: sum(plain_eedm(head, batch["mask"], config.loss.edge_mode) for head in both)
    for branch, both in heads.items()
  }
  if config.mode == "original":
    return parts["light"]
  if config.mode == "fdep_wo_coisd":
    return parts["main"]
  distilled = 0
  for of_main, of_light in zip(teacher, heads["light"], strict=True):
    q, r = sigmoid(of_main), sigmoid(of_light)
    distilled += (q * np.log(q / r) + (1 - q) * np.log((1 - q) / (1 - r))).mean()
  weighted = config.loss.light_weight * parts["light"] + config.loss.distill_weight * distilled
  return parts["main"] + weighted


def adamw(p, grads, state, count, rate, decay):
  """PyTorch's AdamW: b1 0.9, b2 0.999, eps 1e-8, decay times the rate on every parameter."""
  moved = {}
  for name, g in grads.items():
    m, v = state.get(name, (0, 0))
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    state[name] = m, v
    step = (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
    moved[name] = p[name] - rate * (step + decay * p[name])
  return moved


LINEAR = {"init_value": "learning_rate", "end_value": 0.0, "transition_steps": "steps"}
CASES = {
  "the defaults": {},
  "all changed": {
    "loss.light_weight": 0.3,
    "loss.distill_weight": 0.7,
    "loss.edge_mode": "released",
    "train.learning_rate": 0.02,
    "train.weight_decay": 0.3,
    "train.schedule": "linear_schedule",
  },
  "the detector alone": {"mode": "original", "loss.light_weight": 0.3},
  "the main branch alone": {"mode": "fdep_wo_coisd", "loss.light_weight": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_the_steps_of_a_run_are_those_computed_by_hand(tmp_path, case):
  config = toy_config(**{"train.batch_size": BATCH, "train.steps": 4, **CASES[case]})
  config.train.dtype = "float64"
  rate, steps = config.train.learning_rate, 4
  if config.train.schedule == "linear_schedule":
    config.train.schedule_args = LINEAR
    rates = [rate * (1 - i / steps) for i in range(steps)]
  else:
    rates = [rate] * steps
  with jax.enable_x64(True):
    loop = loop_of(config, tmp_path)
    p = params_of(loop.state)
    moments = {}
    for count in (1, 2, 3):
      batch = batch_of(count, config)
      given = {name: batch[name] for name in ("image", "mask")}
      if config.mode != "original":
        given["levels"] = [jnp.asarray(level) for level in batch["levels"]]
      loop.state, metrics = loop.take_step(loop.state, None, given)
      teacher = plain_heads(p, batch["normal"], batch["levels"])["main"]
      value = plain_loss(p, batch, config, teacher)
      grads = slopes(lambda p, b=batch, t=teacher: plain_loss(p, b, config, t), p)
      np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
      p = adamw(p, grads, moments, count, rates[count - 1], config.train.weight_decay)
      ours = params_of(loop.state)
      assert ours.keys() == p.keys()
      for name in p:
        # AdamW divides by the gradient's size, so one that is zero but for rounding (a constant
        # that a norm subtracts again) moves its parameter at random.
        felt = np.abs(grads[name]) > 1e-6
        assert felt.any() or name.endswith(("gated/bias", "shifted/bias", "shift/bias")), name
        np.testing.assert_allclose(ours[name][felt], p[name][felt], rtol=1e-5, atol=1e-7)
        p[name] = ours[name]  # also where it moved at random
    loop.checkpoints.close()


def params_of(state) -> dict[str, np.ndarray]:
  flat = checkpoint.flatten({"params": state["params"]})
  return {path.removeprefix("params/"): np.array(leaf, np.float64) for path, leaf in flat.items()}


def batch_of(seed, config):
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
  count = 0 if config.mode == "original" else LEVELS
  return {
    "image": image,
    "mask": rng.random((BATCH, SIZE, SIZE)) < 0.15,
    "levels": [rng.normal(size=(BATCH, 3, 3, WIDTH)) for _ in range(count)],
    "normal": (image / 255 - 0.4) / 0.2,
  }


# What a run selects, scores and times.


@pytest.mark.parametrize(("select_on", "select_by"), [("val", "hse"), ("test", "iou")])
@pytest.mark.parametrize("mode", ["original", "fdep_wo_coisd", "fdep"])
def test_the_deployed_branch_selects_on_the_images_of_the_config(
  tmp_path, mode, select_on, select_by
):
  config = toy_config(
    **{
      "mode": mode,
      "train.batch_size": 2,
      "eval.select_on": select_on,
      "eval.select_by": select_by,
    }
  )
  loop = loop_of(config, tmp_path)
  of_main, of_light = (lambda image: image / 255), (lambda image: 1 - image / 400)

  def fake(params, stats, rng, prior, image):
    grey = np.asarray(image, np.float32)[..., 0]
    both = {"main": of_main(grey), "light": of_light(grey)}
    names = {"original": ("light",), "fdep_wo_coisd": ("main",), "fdep": ("main", "light")}[mode]
    return {name: jnp.asarray(both[name], jnp.float32) for name in names}

  loop.forward = fake
  loop.progress.step = 1
  with loop.signals:
    loop._select()
  loop.checkpoints.close()
  samples = loop.images.val if select_on == "val" else loop.images.test
  deployed = of_main if mode == "fdep_wo_coisd" else of_light
  maps = [deployed(s.image[..., 0].astype(np.float32)).astype(np.float32) for s in samples]
  expected = getattr(hse.score(maps, [s.mask for s in samples]), select_by)
  assert expected > 0 and loop.progress.best == pytest.approx(expected, abs=1e-9)
  assert loop.progress.best_step == 1 and loop.checkpoints.best_step() == 1


@pytest.mark.parametrize(
  ("mode", "branch"), [("original", "light"), ("fdep_wo_coisd", "main"), ("fdep", "light")]
)
def test_the_branch_that_is_timed_and_counted_is_the_deployed_one(monkeypatch, mode, branch):
  config = toy_config(**{"mode": mode, "data.crop": 16})
  prior = build.load_prior(config)
  width, levels = (prior.width, len(prior.blocks)) if prior else (0, 0)
  model = FDEP(Plain(rngs=nnx.Rngs(1)), width, levels, rngs=nnx.Rngs(2))
  ran = []
  run = forward.branches
  monkeypatch.setattr(
    forward, "branches", lambda *a: ran.append((set(found := run(*a)), a[1])) or found
  )
  cost = evaluate.cost(config, model, prior, repeats=2)
  assert ran == [({branch}, forward.ALONE[branch])] and cost["seconds_per_image"] > 0
  # 8×8 places of 3→2 and 2→1 channels, 16×16 of 3→1.
  alone = 2 * (64 * (3 * 2 + 2) + 256 * 3)
  assert cost["flops"] == alone if branch == "light" else cost["flops"] > 100 * alone


def test_what_is_timed_is_one_run_of_the_deployed_program(monkeypatch):
  ticks = iter([0.0, 0.1, 10.0, 10.5, 20.0, 20.2, 30.0, 30.3])  # the first run is a warm-up
  monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
  config = toy_config(**{"mode": "original", "data.crop": 16})
  model = FDEP(Plain(rngs=nnx.Rngs(1)), num_levels=0, rngs=nnx.Rngs(2))
  cost = evaluate.cost(config, model, None, repeats=3)
  assert cost["seconds_per_image"] == pytest.approx(0.2)
  assert cost["seconds_median"] == pytest.approx(0.3)
