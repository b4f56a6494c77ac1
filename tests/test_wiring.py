"""The parts of a run are connected as the config says: each setting changes something."""

import contextlib
import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import parts, toy_config
from PIL import Image
from plain import BATCH, LEVELS, SIZE, WIDTH, Plain, images, loop_of

import converters
from configs import base
from fdep_jax import build, data, detector, evaluate, forward, pseudo, settings, start, train
from fdep_jax import step as step_lib
from fdep_jax.data import augment
from fdep_jax.fdep import FDEP
from fdep_jax.layers import basic
from fdep_jax.priors import bank
from fdep_jax.runtime import checkpoint, hlo, log, mesh, rendezvous

# Data.


def keys(samples) -> list[bytes]:
  return [sample.image.tobytes() for sample in samples]


@pytest.fixture
def folder(tmp_path):
  """A dataset of 12 train and 5 test images, all different."""
  rng = np.random.default_rng(0)
  for kind in ("images", "masks", "splits"):
    (tmp_path / "set" / kind).mkdir(parents=True)
  for split, count in (("train", 12), ("test", 5)):
    names = [f"{split}{i}" for i in range(count)]
    (tmp_path / "set" / "splits" / f"{split}.txt").write_text("\n".join(names))
    for name in names:
      mask = np.zeros((16, 16), np.uint8)
      mask[tuple(rng.integers(0, 16, 2))] = 255
      Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(
        tmp_path / "set" / "images" / f"{name}.png"
      )
      Image.fromarray(mask).save(tmp_path / "set" / "masks" / f"{name}.png")
  return tmp_path / "set"


@pytest.mark.parametrize("root", ["synthetic", "folder"])
def test_train_held_out_and_test_images_are_disjoint_and_nothing_is_lost(toy, folder, root):
  config = toy_config(**{"data.root": str(folder) if root == "folder" else "synthetic"})
  found = build.load_images(config)
  train_, val, test = (set(keys(samples)) for samples in found[:3])
  assert (len(train_), len(val)) == (9, 3) and len(test) in (3, 5)
  assert not train_ & val and not train_ & test and not val & test
  config.eval.select_on = "test"
  whole = build.load_images(config)
  assert not whole.val and set(keys(whole.train)) == train_ | val
  # Mean and deviation are of the whole train split, whichever images select.
  grey = [sample.image[..., 0] / 255 for sample in whole.train]
  expected = np.mean([g.mean() for g in grey]), np.mean([g.std() for g in grey])
  for images_ in (found, whole):
    np.testing.assert_allclose((images_.mean, images_.std), expected, rtol=1e-9)


def test_a_run_trains_on_its_train_images_only(tmp_path):
  config = toy_config(**{"mode": "original", "data.augment": "none", "data.crop": SIZE})
  loop = loop_of(config, tmp_path)
  with contextlib.closing(loop._batches()) as batches:
    seen = {image.tobytes() for _ in range(4) for image in next(batches)["image"]}
  loop.checkpoints.close()
  assert seen == set(keys(loop.images.train))


@pytest.mark.parametrize("degrees", [0, 30])
def test_masks_are_warped_by_the_nearest_pixel(degrees):
  rng = np.random.default_rng(0)
  mask = np.zeros((21, 21), bool)
  mask[6:15, 6:15] = rng.random((9, 9)) < 0.3
  angle, shift = np.deg2rad(degrees), np.array([0.3, -0.4])
  matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  image = np.repeat(mask[..., None] * np.uint8(200), 3, 2)
  step = augment.about_centre(augment.WARP, matrix, shift, mask.shape)
  _, ours = augment.apply(image, mask, [step])
  expected = np.zeros_like(mask)
  for y, x in np.ndindex(mask.shape):
    row, column = np.floor(matrix @ ([y - 10, x - 10]) + 10 + shift + 0.5).astype(int)
    if 0 <= row < 21 and 0 <= column < 21:
      expected[y, x] = mask[row, column]
  inner = slice(4, 17)  # beyond it a corner may be mirrored in
  np.testing.assert_array_equal(ours[inner, inner], expected[inner, inner])
  assert 10 < ours.sum() < 60


# The branch that is deployed.


def test_the_deployed_branch_is_what_is_loaded_and_reported(tmp_path, monkeypatch):
  monkeypatch.setitem(build.RANDOM_PRIOR, "width", 8)
  for mode, branch in (("original", "light"), ("fdep_wo_coisd", "main"), ("fdep", "light")):
    config = toy_config(**{"mode": mode, "train.steps": 1})
    assert forward.deployed_branch(mode) == branch
    prior = build.load_prior(config)
    loop = loop_of(config, tmp_path / mode)
    loop.progress.step = 1
    loop.meta["dino_sha256"] = prior.sha256 if prior else None
    loop.save()
    loop.checkpoints.close()
    with pytest.MonkeyPatch.context() as patch:
      levels = 0 if mode == "original" else LEVELS
      patch.setattr(
        build, "create_model",
        lambda config, prior, n=levels: FDEP(
          Plain(rngs=nnx.Rngs(1)), WIDTH, n, bn_stats="shared", rngs=nnx.Rngs(2)
        ),
      )  # fmt: skip
      assert detector.load(tmp_path / mode).branch == branch
    row = {"params": 7e6, "params_deployed": 3e6, "deployed": branch, "seconds_per_image": 0.123}
    scores = dict.fromkeys(("iou", "niou", "pd", "fa", "hse_p", "hse_t", "hse"), 0.5)
    both = {"light": scores, "main": scores}
    lines = {line.split()[0]: line for line in evaluate.table({**row, **both}).splitlines()[1:]}
    assert {name: "0.123" in line for name, line in lines.items()} == {
      "light": branch == "light",
      "main": branch == "main",
    }
    # P of the deployed branch is that of what is deployed; of the other, of all that was trained.
    assert [" 3.00 " in lines[branch], " 7.00 " in lines[branch]] == [True, False]


# Every setting.


class Stop(Exception):
  """Ends what a test observes, with the observed value."""


class Seen:
  """Observes parts of a run; each method returns a value that a setting must change."""

  def __init__(self, tmp_path, monkeypatch):
    self.folder, self.patch, self.loops = tmp_path, monkeypatch, []

  def loop(self, config, prior=None):
    config.mode = "original"
    self.loops.append(loop_of(config, self.folder / "run", prior))
    return self.loops[-1]

  def close(self):
    for loop in self.loops:
      loop.checkpoints.close()

  def stopped(self, owner, name, what):
    def stop(*arguments, **named):
      raise Stop(what(*arguments, **named))

    self.patch.setattr(owner, name, stop)

  def until_stop(self, function, *arguments):
    with pytest.raises(Stop) as found:
      function(*arguments)
    return found.value.args[0]

  # Data.

  def batches(self, config):
    """The arguments with which a run makes its batches."""
    found = {}

    def iterator(samples, **named):
      found.update(named)
      return types.SimpleNamespace(set_state=lambda state: None)

    self.patch.setattr(data, "train_iterator", iterator)
    self.loop(config)._batches()
    return {name: value for name, value in found.items() if name != "bank"}

  def crops(self, config):
    """The crops of a prior bank."""
    found = train._crop_bank(config, images(1, 8))
    return len(found), found.refresh_steps

  def loaded(self, config):
    found = build.load_images(config)
    return [[sample.mask.shape for sample in samples] for samples in found[:3]]

  def root(self, config):
    self.stopped(data, "load", lambda *arguments, **named: (arguments, named))
    config.data.root = "one" if config.data.root == "synthetic" else config.data.root
    return self.until_stop(build.load_images, config)

  # Model and prior.

  def model(self, config):
    """Kind, parameters and statistics of the model."""
    _, model = build.abstract(config)
    shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.state(model))
    return type(model).__name__, str(shapes)

  def initial(self, config):
    config.mode = "original"
    model = build.create_model(config, None)
    head = model.backbone.head
    return float(head.kernel[...].sum()), float(head.bias[...].sum())

  def blocks(self, config):
    return build.abstract(config)[0].blocks

  def prior_type(self, config):
    prior, _ = build.abstract(config)
    image = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.uint8)
    jaxpr = jax.make_jaxpr(lambda p, image: p.levels(image))(prior, image)
    return "bf16" in str(jaxpr)

  def prepared(self, config):
    prior, _ = build.abstract(config)
    return prior.prepare(jnp.zeros((1, 14, 14, 3)))[0, 0, 0]

  def frozen(self, config):
    config.mode = "fdep_wo_coisd"
    self.patch.setitem(build.RANDOM_PRIOR, "width", 8)
    return build.load_prior(config).frozen

  def weights(self, config):
    self.stopped(converters, "load_prior", lambda path, **_: path)
    config.prior.checkpoint = config.prior.checkpoint.replace("random", "one")
    return self.until_stop(build.load_prior, config)

  def shard(self, config):
    found = []
    prior = types.SimpleNamespace(
      sha256="x", blocks=(0,), placed=lambda the_mesh, shard: found.append(shard)
    )
    self.loop(config, prior)
    return found

  def bank_folder(self, config):
    config.prior.bank = 2
    self.patch.setattr(build, "load_prior", lambda config: types.SimpleNamespace(sha256=""))
    self.stopped(bank, "Bank", lambda folder, *_, keep_old: (folder.name, keep_old))
    return self.until_stop(train.train, config, self.folder / "a_run")

  # Training.

  def loss(self, config):
    config.mode = "fdep"
    model = FDEP(Plain(rngs=nnx.Rngs(1)), WIDTH, 1, "add", "shared", rngs=nnx.Rngs(2))
    _, params, stats, rng = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    random = np.random.default_rng(0)
    image = jnp.asarray(random.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
    levels = [jnp.asarray(random.normal(size=(BATCH, 4, 4, WIDTH)), jnp.float32)]
    mask = jnp.asarray(random.random((BATCH, SIZE, SIZE)) < 0.2)
    return jax.jit(step_lib.make_loss(config, model))(params, stats, rng, image, levels, mask)[0]

  def traced(self, config):
    """Whether the loss computes in bfloat16, and whether it is computed a second time."""
    config.mode = "original"
    model = FDEP(Plain(rngs=nnx.Rngs(1)), num_levels=0, rngs=nnx.Rngs(2))
    _, params, stats, rng = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    loss = step_lib.make_loss(config, model)
    image, mask = jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros((1, SIZE, SIZE), bool)
    text = str(jax.make_jaxpr(lambda p: loss(p, stats, rng, image, [], mask)[0])(params))
    return "bf16" in text, "checkpoint" in text or "remat" in text

  def steps(self, config):
    return step_lib.total_steps(config, 100)

  def update(self, config):
    optimizer = step_lib.make_optimizer(config, 10)
    params, value = {"p": jnp.ones(())}, []
    state = optimizer.init(params)
    for _ in range(2):
      change, state = optimizer.update({"p": jnp.ones(())}, state, params)
      params = optax.apply_updates(params, change)
      value.append(float(params["p"]))
    return value

  def start(self, config):
    self.stopped(start, "read", lambda source, network: (source, network))
    self.stopped(build, "load_prior", lambda config: "drawn from the seed")
    return self.until_stop(train.train, config, self.folder / "a_run")

  def momentum(self, config):
    model = build.create_model(config, None)
    return {m.momentum for _, m in nnx.iter_graph(model) if isinstance(m, basic.BatchNorm)}

  def labels(self, config):
    self.stopped(build, "load_prior", lambda config: "true")
    self.patch.setattr(pseudo, "fingerprint", lambda config: "a teacher")
    self.stopped(pseudo, "relabel", lambda config, samples, _: (config.train.labels, len(samples)))
    return self.until_stop(train.train, config, self.folder / "a_run")

  def teacher(self, config):
    config.train.labels = "pseudo"
    config.train.teacher = config.train.teacher or "one"
    self.stopped(detector, "load", lambda path, branch: (path, branch))
    return self.until_stop(pseudo.relabel, config, [], None)

  def nonfinite(self, config):
    loop = self.loop(config)
    loop.state["skipped"] = {"count": 1, "first": 1}
    try:
      loop._check_finite()
    except FloatingPointError:
      return "stopped"
    return "went on"

  # Evaluation, checkpoints and logs.

  def every_eval(self, config):
    return self.loop(config).every_eval

  def selection(self, config):
    return [sample.name for sample in self.loop(config).selection]

  def selected_by(self, config):
    loop = self.loop(config)
    scores = {"light": types.SimpleNamespace(hse=0.25, iou=0.75)}
    self.patch.setattr(evaluate, "score", lambda *arguments: scores)
    self.patch.setattr(evaluate, "results", dict)
    loop.save = lambda to_best=False: None
    loop._select()
    return loop.progress.best

  def eval_batch(self, config):
    self.stopped(evaluate, "probabilities", lambda *arguments: arguments[4])
    return self.until_stop(self.loop(config)._select)

  def scored_branches(self, config):
    prior, model, _, state = parts(config)
    apply = forward.make_forward(config, model, 0.5, 0.2)
    image = np.zeros((1, 32, 32, 3), np.uint8)
    return sorted(apply.eval_shape(state["params"], state["stats"], state["rng"], prior, image))

  def saved_maps(self, config):

    class Fake(contextlib.nullcontext):
      def __enter__(self):
        return self

      def steps(self):
        return [1]

      def best_step(self):
        return None

      def restore(self, like):
        return like, {"step": 1}

    self.patch.setattr(checkpoint, "Checkpoints", lambda *_: Fake())
    self.stopped(evaluate, "accumulate", lambda maps, samples, save: save)
    model = FDEP(Plain(rngs=nnx.Rngs(1)), num_levels=0, rngs=nnx.Rngs(2))
    config.mode = "original"
    loaded = build.Images(images(1, 2), images(2, 2), images(3, 2), 0.5, 0.2), None, model
    return self.until_stop(evaluate.evaluate, self.folder, config, loaded)

  def saves(self, config):
    loop = self.loop(config)
    loop.every_eval, found = 10**9, []
    self.patch.setattr(loop, "save", lambda: found.append(loop.progress.step))
    for step in range(1, 8):
      loop.progress.step = step
      loop._after(step, None, None)
    return found

  def dispatches(self, config):
    loop = self.loop(config)
    loop.every_eval = 10**9
    return list(map(len, loop._dispatches()))

  def kept(self, config):
    self.stopped(checkpoint, "Checkpoints", lambda folder, keep: keep)
    return self.until_stop(self.loop, config)

  def logged(self, config):
    """The logged steps, and whether there is a progress bar."""
    found = []
    config.mode, config.train.steps = "original", 12
    loop = loop_of(config, self.folder / "logged")
    bar = train.tqdm
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # elsewhere no bar is shown
    self.patch.setattr(train.sys, "stderr", terminal)
    self.patch.setattr(
      train, "tqdm", lambda **named: found.append(named["disable"]) or bar(**named | {"disable": 1})
    )
    self.patch.setattr(loop, "_batches", lambda: (x for x in range(100)))
    self.patch.setattr(loop, "_step", lambda batches: {})
    self.patch.setattr(loop, "_after", lambda *_: None)
    self.patch.setattr(loop, "_log", lambda *_: found.append("line"))
    self.patch.setattr(loop, "_tell", lambda *_: None)
    loop.train()
    return found

  def board(self, config):
    return log.Log(self.folder, config, 0)._board is None

  def traced_steps(self, config):
    found = []
    self.patch.setattr(jax.profiler, "start_trace", lambda *_, **__: found.append("start"))
    self.patch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    profile = log.Profile(self.folder, config)
    for step in (1, 2, 3):
      profile.before(range(step, step + 1))
      profile.after(range(step, step + 1), {})
    return found

  def branches(self, config):
    return build.abstract(config)[0] is None, forward.deployed_branch(config.mode)

  def started(self, config):
    """The calls that configure jax and join processes."""
    found = []
    self.patch.setattr(jax.config, "update", lambda *arguments: found.append(arguments))
    self.patch.setattr(rendezvous, "meet", lambda *arguments: None)
    self.patch.setattr(jax.distributed, "initialize", lambda *a: found.append(a))
    mesh.start(config)
    return found

  def devices(self, config):
    self.stopped(mesh, "make", lambda *arguments: arguments)
    return self.until_stop(train.train, config, self.folder / "a_run")


# Setting → another value than the toy config's, and what must differ then.
EFFECTS = {
  "seed": [(1, "batches"), (1, "initial")],
  "mode": [("original", "branches"), ("fdep_wo_coisd", "branches")],
  "host_devices": [(2, "started"), (2, "devices")],
  "distributed": [("localhost:1234,2,0", "started")],
  "profile_steps": [("2-3", "traced_steps")],
  "model.backbone": [("acm", "model")],
  "model.fusion": [("add", "model")],
  "model.bn_stats": [("shared", "model")],
  "model.share": [("encoder", "model"), ("decoder", "model")],
  "model.on_dino": [("plain", "model"), ("msda", "model")],
  "model.start_prob": [(0.01, "initial")],
  "model.bn_momentum": [(0.5, "momentum")],
  "data.root": [("another", "root")],
  "data.range": [("0,100", "root")],
  "data.crop": [(16, "batches")],
  "data.augment": [("none", "batches")],
  "data.target_crop_prob": [(0.5, "batches")],
  "data.crop_margin": [(8, "batches")],
  "data.val_fraction": [(0.5, "loaded")],
  "data.train_images": [(8, "loaded")],
  "data.threads": [(3, "batches")],
  "data.on_device": [(True, "batches")],
  "data.lazy": [(True, "root")],
  "data.synthetic_size": [(72, "loaded")],
  "data.synthetic_train": [(10, "loaded")],
  "data.synthetic_test": [(4, "loaded")],
  "prior.checkpoint": [("vits14.pth", "weights")],
  "prior.normalisation": [("satellite", "prepared")],
  "prior.levels": [((1, 2), "blocks")],
  "prior.dtype": [("bfloat16", "prior_type")],
  "prior.unfreeze": [(True, "frozen")],
  "prior.shard": [(True, "shard")],
  "prior.bank": [(3, "crops")],
  "prior.bank_refresh_epochs": [(2.0, "crops")],
  "prior.bank_folder": [("elsewhere", "bank_folder")],
  "loss.light_weight": [(0.5, "loss")],
  "loss.distill_weight": [(0.5, "loss")],
  "loss.edge_mode": [("released", "loss")],
  "train.batch_size": [(2, "batches")],
  "train.epochs": [(7, "steps")],
  "train.steps": [(5, "steps")],
  "train.learning_rate": [(0.5, "update")],
  "train.weight_decay": [(0.5, "update")],
  "train.schedule": [("exponential_decay", "update")],
  "train.schedule_args.value": [(0.5, "update")],
  "train.init_from": [("elsewhere", "start")],
  "train.labels": [("pseudo", "labels")],
  "train.teacher": [("another", "teacher")],
  "train.nonfinite": [("skip", "nonfinite")],
  "train.dtype": [("bfloat16", "traced")],
  "train.remat": [("products", "traced")],
  "train.steps_per_dispatch": [(2, "dispatches")],
  "eval.every_epochs": [(9.0, "every_eval")],
  "eval.least_steps": [(50, "every_eval")],
  "eval.select_on": [("test", "selection"), ("test", "loaded")],
  "eval.select_by": [("iou", "selected_by")],
  "eval.branches": [("deployed", "scored_branches")],
  "eval.batch_size": [(3, "eval_batch")],
  "eval.save_probs": [(True, "saved_maps")],
  "checkpoint.every_steps": [(2, "saves")],
  "checkpoint.keep": [(5, "kept")],
  "log.every_steps": [(3, "logged")],
  "log.tensorboard": [(True, "board")],
  "log.progress": [(True, "logged")],
  "log.compile_cache": [("elsewhere", "started")],
}
# Other settings that the observation needs.
BESIDE = {
  "model.on_dino": {"mode": "fdep_wo_coisd"},
  "train.epochs": {"train.steps": 0},
  "prior.bank_refresh_epochs": {"prior.bank": 2},
  "train.labels": {"train.teacher": "one"},
}


def test_the_deployed_branch_alone_is_scored_alike_and_without_the_prior(toy):
  config = toy_config()
  prior, model, _, state = parts(config)
  image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
  maps, flops = {}, {}
  for which, mode in (("all", "fdep"), ("deployed", "fdep"), ("alone", "original")):
    config.eval.branches, config.mode = which.replace("alone", "all"), mode
    apply = forward.make_forward(config, model, 0.5, 0.2)
    inputs = state["params"], state["stats"], state["rng"], prior, image
    maps[which] = apply(*inputs)
    flops[which] = sum(hlo.flops(apply.lower(*inputs).compile().as_text(), "none").values())
  assert maps["all"].keys() == {"light", "main"} and maps["deployed"].keys() == {"light"}
  np.testing.assert_allclose(maps["deployed"]["light"], maps["all"]["light"], atol=1e-6)
  assert flops["deployed"] == flops["alone"] < flops["all"] / 2


def test_every_setting_is_in_the_table_of_effects():
  assert EFFECTS.keys() == settings.flat(base.get_config()).keys()


@pytest.mark.parametrize(
  ("name", "value", "view"),
  [(name, value, view) for name, effects in EFFECTS.items() for value, view in effects],
)
def test_every_setting_has_an_effect(toy, tmp_path, name, value, view):
  found = []
  for changes in ({}, {name: value}):
    config = toy_config(**BESIDE.get(name, {}))
    if name == "train.schedule" and changes:
      config.train.schedule_args = {
        "init_value": "learning_rate", "transition_steps": 1, "decay_rate": 0.1,
      }  # fmt: skip
    config.update_from_flattened_dict(changes)
    if name == "train.labels" and not changes:
      config.train.teacher = ""
    folder = tmp_path / str(len(found))
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
      with contextlib.closing(Seen(folder, patch)) as seen:
        found.append(getattr(seen, view)(config))
  assert str(found[0]).replace("/0/", "/1/") != str(found[1])
