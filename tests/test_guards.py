"""Data, files and configs that would spoil a result without a word are refused or made harmless."""

import csv
import importlib
import io
import json
import tracemalloc
import types

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import toy_config
from plain import WIDTH, Plain, loop_of

from configs import base
from fdep_jax import backbones, build, data, evaluate, plan, score, settings, train
from fdep_jax import step as step_lib
from fdep_jax.fdep import FDEP
from fdep_jax.metrics import columns
from fdep_jax.tables import figures, sweep, table
from fdep_jax.tables.experiments import Row, Table


@pytest.mark.parametrize("name", backbones.names())
def test_every_network_trains_with_the_same_settings(name):
  ours = settings.flat(importlib.import_module(f"configs.{name}").get_config())
  theirs = settings.flat(base.get_config()) | {"model.backbone": name}
  if not backbones.network_class(name).top_channels:
    theirs["mode"] = "original"  # there is nothing to attach FDEP to
  assert ours == theirs


# Data that changed.


def changed(samples, part):
  """Inverts the first image, or its mask."""
  first = samples[0]
  new = {"image": 255 - first.image} if part == "image" else {"mask": ~first.mask}
  return [first._replace(**new), *samples[1:]]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("part", ["image", "mask"])
def test_a_run_does_not_continue_on_other_data(tmp_path, split, part):
  config = toy_config(mode="original")
  loop = loop_of(config, tmp_path)
  loop.progress.step = 3
  loop.save()
  loop.checkpoints.close()
  again = loop_of(config, tmp_path)
  again.checkpoints.close()
  assert again.start == 3
  images = loop.images._replace(**{split: changed(getattr(loop.images, split), part)})
  with pytest.raises(ValueError, match=f"was trained with different {split} images or masks"):
    train.Loop(config, tmp_path, loop.mesh, images, None, None, None, again_model(), loop.signals)


def test_a_run_does_not_continue_with_another_teacher(tmp_path):
  config = toy_config(mode="original")
  loop = loop_of(config, tmp_path)
  loop.progress.step = 3
  loop.meta["data_sha256"]["teacher"] = "one"
  loop.save()
  loop.checkpoints.close()
  parts = (config, tmp_path, loop.mesh, loop.images, None, None, None, again_model(), loop.signals)
  identity = train.fingerprints(loop.images)
  with pytest.raises(ValueError, match="with different weights of its teacher than there are now"):
    train.Loop(*parts, identity | {"teacher": "another"})
  same = train.Loop(*parts, identity | {"teacher": "one"})
  same.checkpoints.close()
  assert same.start == 3


def again_model():
  return FDEP(Plain(rngs=nnx.Rngs(1)), WIDTH, 0, bn_stats="shared", rngs=nnx.Rngs(2))


def test_a_run_of_a_version_without_fingerprints_continues(tmp_path):
  config = toy_config(mode="original")
  loop = loop_of(config, tmp_path)
  loop.progress.step = 3
  loop.meta.pop("data_sha256")
  loop.save()
  loop.checkpoints.close()
  again = loop_of(config, tmp_path)
  again.checkpoints.close()
  assert again.start == 3


def test_a_fingerprint_depends_on_every_pixel_and_the_order():
  rng = np.random.default_rng(0)
  samples = [
    data.Sample(str(i), rng.integers(0, 256, (4, 6, 3), np.uint8), rng.random((4, 6)) < 0.5)
    for i in range(2)
  ]
  turned = [s._replace(image=s.image.reshape(6, 4, 3), mask=s.mask.reshape(6, 4)) for s in samples]
  sets = (samples, samples[::-1], samples[:1], turned, changed(samples, "image"))
  found = {data.fingerprint(s) for s in (*sets, changed(samples, "mask"))}
  assert len(found) == 6
  assert data.fingerprint([s._replace(name="x") for s in samples]) == data.fingerprint(samples)


@pytest.mark.parametrize("seen", ["the same", "others", "unknown"])
def test_maps_of_other_test_images_are_not_compared(tmp_path, seen):
  config = toy_config()
  samples = data.scenes(3, 64, seed=2)
  known = {"the same": data.fingerprint(samples), "others": "0" * 64}
  about = {"deployed": "light"} | ({"test_sha256": known[seen]} if seen in known else {})
  (tmp_path / "metrics.json").write_text(json.dumps(about))
  (tmp_path / "probs" / "light").mkdir(parents=True)
  for sample in samples:
    np.save(tmp_path / "probs" / "light" / f"{sample.name}.npy", sample.mask.astype(np.float32))
  run = sweep.Run(None, 0, config, tmp_path, None)
  if seen == "others":
    with pytest.raises(ValueError, match="evaluated on different test images"):
      figures.totals(run)
  else:
    assert figures.totals(run).result().iou == 1


# Files.


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_a_csv_file_is_run_as_a_formula(tmp_path, start):
  text = f"{start}HYPERLINK(1)"
  safe = f"'{text}".replace("\r", " ")
  assert columns.csv_text(text) == safe and columns.csv_text("a=1") == "a=1"
  assert columns.csv_text("") == ""
  row = Row(text, (text,), {}, {}, side=text)
  cells = {"iou": table.Cell(50.0, (40.0,), why=text)}
  made = table.as_csv(
    Table("T", ("Run",), ("iou",), (row,)), [table.Result(row, [], [], "", cells)]
  )
  (line,) = csv.DictReader(io.StringIO(made, newline=""))
  assert {line[k] for k in ("row", "Run", "side", "why")} == {safe}
  assert line["difference"] == "-10"  # a number stays one
  if start in "=+-@":
    for kind in ("maps", "masks"):
      (tmp_path / kind).mkdir()
      np.save(tmp_path / kind / f"{text}.npy", np.eye(8) * (0.9 if kind == "maps" else 1))
    score.run(tmp_path / "maps", tmp_path / "masks", tmp_path / "out", resamples=0)
    (line,) = csv.DictReader((tmp_path / "out" / "images.csv").open())
    assert line["file"] == f"'{text}"


def test_a_small_file_that_unpacks_to_a_huge_array_is_refused_before_it_is_unpacked(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(score, "MAX_BYTES", 10**6)
  np.savez_compressed(tmp_path / "map.npz", np.zeros((4000, 2000), np.uint8))
  assert (tmp_path / "map.npz").stat().st_size < 10**5
  tracemalloc.start()
  with pytest.raises(ValueError, match="unpacks to 0.0 GiB; at most"):
    score.read_prob(tmp_path / "map.npz")
  assert tracemalloc.get_traced_memory()[1] < 10**6
  tracemalloc.stop()
  np.savez_compressed(tmp_path / "map.npz", np.zeros((40, 20), np.uint8))
  assert score.read_prob(tmp_path / "map.npz").shape == (40, 20)


# Plans of the ablations.


@pytest.mark.parametrize(
  "changes",
  [
    {"mode": "fdep"},
    {"mode": "fdep", "model.share": "encoder"},
    {"mode": "fdep", "model.share": "decoder"},
    {"mode": "fdep_wo_coisd", "model.on_dino": "plain"},
    {"mode": "fdep_wo_coisd", "prior.unfreeze": True},
    {"mode": "fdep_wo_coisd", "model.on_dino": "plain", "prior.unfreeze": True},
  ],
)
def test_a_plan_is_of_the_parameters_that_a_run_trains(toy, monkeypatch, changes):
  monkeypatch.setitem(build.RANDOM_PRIOR, "width", 8)
  config = toy_config(**changes)
  settings.check(config)
  parts = plan.abstract(config)

  def of_a_run():
    model = build.create_model(config, build.load_prior(config))
    return step_lib.init_state(model, step_lib.make_optimizer(config, 1))

  expected = jax.eval_shape(of_a_run)
  shapes = [
    sorted(str((leaf.shape, leaf.dtype)) for leaf in jax.tree.leaves(state[name]))
    for state in (parts.state, expected)
    for name in ("params", "opt")
  ]
  assert shapes[:2] == shapes[2:]
  least = plan.minimum(config, parts, 2, training=True)
  trained = bool(changes.get("prior.unfreeze"))
  assert ("trained_vit" in least, "frozen_vit" in least) == (trained, not trained)
  assert ("samf" in least) == ("model.on_dino" not in changes)
  if trained:
    frozen = config.copy_and_resolve_references()
    frozen.prior.unfreeze = False
    other = plan.abstract(frozen)
    size = lambda state: sum(leaf.size for leaf in jax.tree.leaves(state["params"]))  # noqa: E731
    of_vit = sum(leaf.size for leaf in jax.tree.leaves(other.prior.weights))
    assert size(parts.state) - size(other.state) == of_vit
    once = plan.minimum(frozen, other, 2, training=True)["frozen_vit"]
    assert least["trained_vit"] == 3 * once


# Times.


def test_rows_are_timed_anew_at_the_papers_size_in_one_process(monkeypatch):
  ran = []

  def cost(config, model, prior, repeats, size):
    ran.append((config.mode, model, prior, size))
    return {"flops": 1.0, "seconds_per_image": 0.5 + len(ran), "seconds_median": 9.0}

  monkeypatch.setattr(evaluate, "cost", cost)
  monkeypatch.setattr(build, "load_prior", lambda config: "prior")
  monkeypatch.setattr(build, "create_model", lambda config, prior: f"model of {config.mode}")
  results = []
  for mode in ("original", "fdep_wo_coisd", "fdep", "none", "classical"):
    row = Row(mode, (mode,), {}, {}, note="before" if mode == "fdep" else "")
    cells = {"time_s": table.Cell(0.1, (7.0, 8.0), same_unit=False)}
    runs = [types.SimpleNamespace(config=toy_config(mode=mode))] if mode != "none" else []
    results.append(table.Result(row, runs, [], "", cells))
  timed = table.retime(results, repeats=3)
  assert [(mode, prior, size) for mode, _, prior, size in ran] == [
    ("original", None, 448), ("fdep_wo_coisd", "prior", 448), ("fdep", None, 448),
  ]  # fmt: skip
  assert [r.cells["time_s"].values for r in timed] == [
    (1.5,), (2.5,), (3.5,), (7.0, 8.0), (7.0, 8.0),
  ]  # fmt: skip
  assert "448×448, least of 3" in timed[0].row.note and "median 9.000 s" in timed[0].row.note
  assert timed[2].row.note.startswith("before; ") and timed[3] is results[3]
  assert "not taken anew" in timed[4].row.note  # without training: no network
