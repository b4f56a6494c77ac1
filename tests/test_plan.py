"""Plans: what is counted is right, the options change no result, and the refusals say why."""

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import ROOT, command, toy_config

from fdep_jax import backbones, build, losses, plan
from fdep_jax import step as step_lib
from fdep_jax.runtime import gpus, hlo, mesh, topology


def slice_config(**changes):
  """A batch that eight devices can share."""
  return toy_config(
    **{"data.synthetic_size": 128, "train.batch_size": 8, "eval.batch_size": 4, **changes}
  )


def conv(x, kernel, stride=1):
  dimensions = ("NHWC", "HWIO", "NHWC")
  pad = [(1, 1), (1, 1)]
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), pad, dimension_numbers=dimensions
  )


def test_flops_are_those_counted_by_hand_padding_apart_and_loops_included():
  def layers(x, kernel1, kernel2, matrix, inner):
    y = conv(conv(x, kernel1), kernel2, 2) @ matrix
    with jax.named_scope("prior"):
      y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ inner), None), y, None, length=7)
    return y

  shapes = (2, 32, 32, 4), (3, 3, 4, 8), (3, 3, 8, 8), (8, 8), (8, 8)
  lowered = jax.jit(layers).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
  # 3·32 − 2 (output, kernel) pairs along an axis meet the input; at stride 2 3·16 − 1.
  first, second, products = 2 * 94**2 * 4 * 8, 2 * 47**2 * 8 * 8, 2 * 16**2 * 8 * 8
  outside, inside = 2.0 * (first + second + products), 2.0 * 7 * products
  compiled = hlo.flops(lowered.compile().as_text(), "prior")
  assert compiled == {"inside": inside, "outside": outside}
  written = hlo.flops(lowered.as_text("hlo"), "prior")  # has no scopes
  assert written == {"inside": 0, "outside": inside + outside}


def test_traffic_reads_one_row_of_a_loops_input_a_run():
  def total(x):
    return jax.lax.scan(lambda c, row: (jnp.sin(c + row), None), jnp.zeros(1000), x)[0]

  text = jax.jit(total).lower(jax.ShapeDtypeStruct((50, 1000), jnp.float32)).compile().as_text()
  once = 4 * 1000
  # A run reads the carry and a row and writes the carry; what else there is, is scalars and a copy.
  assert 50 * 3 * once <= hlo.traffic(text) <= 50 * 5 * once


def test_collectives_have_the_size_of_their_result_and_count_loops():
  the_mesh = mesh.make(4)

  def total(x):
    def body(i, found):
      return found + jnp.sum(x * i, 0)

    return jax.lax.fori_loop(0, 5, body, jnp.zeros(x.shape[1]))

  x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=mesh.split(the_mesh))
  found = hlo.collectives(jax.jit(total).lower(x).compile().as_text())
  assert {c["op"] for c in found} == {"all-reduce"}
  assert sum(c["bytes"] * c["count"] for c in found) in (24, 5 * 24)  # in the loop or moved behind


def test_a_plan_for_cpu_devices_reports_every_column(toy, tmp_path, capsys):
  result = plan.plan(slice_config(), "cpu:4", tmp_path)
  assert result == json.loads((tmp_path / "plan.json").read_text())
  printed = capsys.readouterr().out
  for word in (
    "fits",
    "parameters",
    "optimiser",
    "frozen vit",
    "activations",
    "FLOPs",
    "evaluation",
  ):
    assert word in printed
  parts = plan.abstract(slice_config())
  floats = sum(leaf.size for leaf in jax.tree.leaves(parts.state["params"]))
  held = result["hbm_by_kind"]
  assert held["parameters"] == 4 * floats
  assert held["optimiser"] == 2 * 4 * floats + 2 * 4  # AdamW's moments and two counters
  assert held["batch"] == 8 // 4 * 32 * 32 * (3 + 1)  # uint8 pixels and bool masks of one device
  assert result["hbm_bytes_per_chip"] == sum(held.values())
  assert result["fits"] and result["chips"] == 4
  least = result["flops_minimum_by_part"]["frozen_vit"]
  # More than the blocks: at 32×32 the image and the position embedding are resized.
  assert least <= result["flops_by_part"]["frozen_vit"] <= 1.15 * least
  assert {c["op"] for c in result["collectives"]} == {"all-reduce"}
  # Gradients are the largest thing that is reduced: neither logits nor losses are.
  assert max(c["bytes"] for c in result["collectives"]) <= 4 * floats + 1024
  assert result["evaluation"]["collectives"] == []


@pytest.mark.parametrize(("thorough", "effort"), [(False, "quick"), (True, "thorough")])
def test_a_plan_records_the_compilers_effort(toy, tmp_path, thorough, effort):
  names = {"topology": "cpu:2", "thorough": thorough, "workdir": None, "out": str(tmp_path)}
  config = slice_config(mode="original", **{"log.compile_cache": ""})
  setting, quick = plan.QUICK
  before = getattr(jax.config, setting)
  compiled = []
  try:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(mesh, "start", lambda config: None)  # jax has started with other devices
      original = plan.compile_train

      def spy(*arguments):
        compiled.append(getattr(jax.config, setting))
        return original(*arguments)

      patch.setattr(plan, "compile_train", spy)
      plan.command(types.SimpleNamespace(config=config, **names))
  finally:
    jax.config.update(setting, before)
  assert compiled == [before if thorough else quick]
  assert json.loads((tmp_path / "plan.json").read_text())["effort"] == effort


@pytest.mark.slow
def test_twice_the_devices_with_twice_the_batch_cost_the_same_each(toy, tmp_path):
  small = plan.plan(slice_config(**{"train.batch_size": 4}), "cpu:2", tmp_path)
  large = plan.plan(slice_config(**{"train.batch_size": 8}), "cpu:4", tmp_path)
  for key in ("flops_per_chip", "bytes_per_chip", "hbm_bytes_per_chip"):
    assert large[key] == pytest.approx(small[key], rel=0.05)


@pytest.mark.parametrize("change", [{"train.remat": "products"}, {"prior.shard": True}])
def test_saving_memory_does_not_change_the_step(toy, change):
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
    "mask": rng.random((8, 32, 32)) < 0.05,
  }
  results, sizes = [], []
  for changes in ({}, change):
    config = slice_config(**changes)
    prior = build.load_prior(config)
    model = build.create_model(config, prior)
    optimizer = optax.sgd(0.1)
    the_mesh = mesh.make(8)
    placed = prior.placed(the_mesh, config.prior.shard)
    sizes.append(sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(placed)))
    step = step_lib.make_step(config, model, optimizer, 0.5, 0.2)
    state = mesh.put_replicated(step_lib.init_state(model, optimizer), the_mesh)
    for _ in range(2):
      state, metrics = step(state, placed, mesh.put_batch(batch, the_mesh))
    results.append((jax.device_get(state), float(metrics["loss"])))
  (plain, loss), (other, other_loss) = results
  assert other_loss == pytest.approx(loss, rel=1e-5)
  for kind in ("params", "stats", "rng"):
    for a, b in zip(jax.tree.leaves(plain[kind]), jax.tree.leaves(other[kind]), strict=True):
      if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert sizes[1] < 0.5 * sizes[0] if "prior.shard" in change else sizes[1] == sizes[0]


def test_sharing_out_gathers_one_block_at_a_time(toy):
  config = slice_config(**{"prior.shard": True})
  parts = plan.abstract(config)
  collectives = plan.compile_train(config, parts, mesh.make(4)).collectives
  gathered = [c for c in collectives if c["op"] == "all-gather"]
  whole = max(leaf.size for leaf in jax.tree.leaves(parts.prior))
  assert gathered
  assert max(c["bytes"] for c in gathered) <= 4 * whole / parts.prior.depth


def test_rematerialisation_computes_no_convolution_again(toy):
  flops = []
  for kind in ("none", "products"):
    config = slice_config(mode="original", **{"train.remat": kind})
    flops.append(plan.compile_train(config, plan.abstract(config), mesh.make(1)).flops)
  assert flops[0] == flops[1]


def forward_backward(config, two_passes=False) -> dict[str, float]:
  """FLOPs of loss and gradients as written, before any compiler, and the least that DESIGN has."""
  parts = plan.abstract(config)
  model, prior = parts.model, parts.prior
  loss = step_lib.make_loss(config, model)
  graphdef, _ = nnx.split(model)

  def passes(params, stats, rng, image, levels, mask):
    total = 0
    for branch in ("main", "light"):
      net = nnx.merge(graphdef, params, stats, rng, copy=True)
      logits = net.main(image, levels) if branch == "main" else net.light(image)
      total += losses.eedm(logits.heads, mask)
    return total, ()

  levels = []
  if prior is not None:
    side = config.data.crop // prior.patch
    level = jax.ShapeDtypeStruct((1, side, side, prior.width), jnp.float32)
    levels = [level] * len(prior.blocks)
  image = jax.ShapeDtypeStruct((1, config.data.crop, config.data.crop, 3), jnp.float32)
  mask = jax.ShapeDtypeStruct(image.shape[:3], jnp.bool_)
  state = [parts.state[name] for name in ("params", "stats", "rng")]
  gradients = jax.jit(jax.value_and_grad(passes if two_passes else loss, has_aux=True))
  lowered = gradients.lower(*state, image, levels, mask)
  return hlo.flops(lowered.as_text("hlo"), "none")["outside"]


def network_config(name):
  return importlib.import_module(f"configs.{name}").get_config()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in backbones.names() if name != "acm"]


@pytest.mark.parametrize("name", ["acm", *SLOW])
def test_a_step_is_within_a_tenth_of_the_least_flops(name):
  config = network_config(name)
  least = plan.minimum(config, plan.abstract(config), 1, True)
  ratio = forward_backward(config) / (least["network"] + least.get("samf", 0))
  assert 0.85 < ratio <= 1.10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["msda", "alcl", "ggl"])
def test_a_step_is_at_most_six_tenths_of_two_passes(name):
  config = network_config(name)
  assert forward_backward(config) <= 0.60 * forward_backward(config, two_passes=True)


def test_the_vits_size_is_read_from_the_name_of_a_file_that_need_not_exist():
  for file, name, value in (
    ("nowhere/dinov2_vitl14_pretrain.pth", "depth", 24),
    ("dinov2_vits14_reg4_pretrain.pth", "registers", 4),
    ("dinov2_vitg14_pretrain.pth", "swiglu", True),
  ):
    assert build.named_model(file)[1][name] == value
  with pytest.raises(ValueError, match="not contain the ViT's size.*dinov2_vitl14_pretrain.pth"):
    build.named_model("weights/prior.pth")


MALFORMED = ["v5e", "v5e:4x4x4", "v4:2x2", "h100:2x4", "rtx4090:0", "rtx4080:1", "cpu:0", "cpu:2x2"]


@pytest.mark.parametrize("name", [*MALFORMED, ""])
def test_a_malformed_topology_is_refused(name):
  with pytest.raises(ValueError, match="--topology is .* v5e:4x4.*a100-40.*rtx4090"):
    topology.parse(name)


def test_a_batch_that_the_slice_cannot_share_is_refused(toy, tmp_path):
  with pytest.raises(ValueError, match="batch_size is 6, which 4 devices cannot share.*Use 8"):
    plan.plan(slice_config(**{"train.batch_size": 6}), "cpu:4", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_without_the_tpu_compiler_one_sentence_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  with pytest.raises(FileNotFoundError, match="needs the TPU compiler.*requirements-tpu.txt"):
    topology.start("v5e:4x4")


@pytest.mark.slow
def test_what_does_not_fit_names_the_options_that_help_and_the_largest_batch(
  toy, tmp_path, monkeypatch
):
  config = slice_config()
  need = {rows: _needs(slice_config(**{"train.batch_size": rows})) for rows in (4, 8)}
  limit = (need[4] + need[8]) / 2
  monkeypatch.setattr(topology, "host_memory", lambda: 4 * limit)
  result = plan.plan(config, "cpu:4", tmp_path)
  assert not result["fits"] and result["hbm_bytes_per_chip"] == need[8]
  assert result["largest_batch"] == 4
  assert result["helps"][0]["options"] == {"train.remat": "products"}
  assert all(h["fits"] == (h["hbm_bytes_per_chip"] <= limit) for h in result["helps"])


@pytest.mark.parametrize("refused", [False, True])
def test_an_evaluation_that_does_not_fit_gets_a_smaller_batch(
  toy, tmp_path, monkeypatch, capsys, refused
):
  # 10 GiB to train, 5 for each image of a device to evaluate, of 16.
  gib = 2**30

  def cost(size):
    return plan.Cost({"parameters": size * gib}, 1e9, 0, 1e6, [], 1.0, None)

  def compile_eval(config, parts, the_mesh):
    size = 5 * config.eval.batch_size // 2
    if refused and size > 16:  # as the TPU's compiler does, but no other
      raise plan.DoesNotFitError(size * gib, 1.0)
    return cost(size)

  monkeypatch.setattr(plan, "compile_train", lambda *_: cost(10))
  monkeypatch.setattr(plan, "compile_eval", compile_eval)
  monkeypatch.setattr(topology, "host_memory", lambda: 2 * 16 * gib)
  result = plan.plan(slice_config(**{"eval.batch_size": 16}), "cpu:2", tmp_path)
  assert not result["fits"] and result["hbm_bytes_per_chip"] == 10 * gib
  assert not result["evaluation"]["fits"]
  assert result["evaluation"]["hbm_bytes_per_chip"] == 40 * gib
  option = {"eval.batch_size": 6}
  assert result["helps"] == [{"options": option, "fits": True, "hbm_bytes_per_chip": 15 * gib}]
  assert result["largest_batch"] == 8
  printed = capsys.readouterr().out
  assert "THE EVALUATION DOES NOT FIT: 40.00 of 16.00 GiB" in printed
  assert "--config.eval.batch_size=6: fits, 15.00 GiB" in printed
  assert result == json.loads((tmp_path / "plan.json").read_text())
  assert plan.plan(slice_config(**{"eval.batch_size": 4}), "cpu:2", tmp_path)["evaluation"]["fits"]


def test_both_refusals_of_the_tpu_compiler_are_understood():
  gib = 2**30
  whole = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
  part = "the total memory required for HLO temporaries (16.77G) exceeds available HBM (15.75G)."
  assert plan.needed_bytes(whole, gib) == 20.5 * gib
  assert plan.needed_bytes(part, gib) == pytest.approx(17.77 * gib)
  assert plan.needed_bytes("INTERNAL: something else", gib) is None


def _needs(config) -> int:
  cost = plan.compile_train(config, plan.abstract(config), mesh.make(4))
  return sum(cost.hbm.values())


@pytest.mark.slow
def test_the_tpu_compiler_plans_a_small_network(tmp_path):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs libtpu (requirements-tpu.txt)")
  flags = ["--mode", "plan", "--config", "configs/tpu.py:acm", "--topology", "v5e:2x2"]
  changes = ("mode=original", "train.batch_size=4", "data.crop=64")
  flags += ["--out", tmp_path, *(f"--config.{change}" for change in changes)]
  done = command(*flags, timeout=None)  # the compiler takes minutes
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "plan.json").read_text())
  assert result["fits"] and result["chips"] == 4 and result["roofline"]["images_per_second"] > 0
  assert {c["op"] for c in result["collectives"]} == {"all-reduce"}


# A program as XLA's GPU compiler writes it: 32×32 pixels, 8 and 16 channels.
CUDNN = """
ENTRY %main (x: bf16[4,32,32,8]) -> bf16[4,32,32,8] {
  %x = bf16[4,32,32,8]{3,2,1,0} parameter(0)
  %kernel = bf16[16,3,3,8]{3,2,1,0} parameter(1)
  %grouped = bf16[16,3,3,4]{3,2,1,0} parameter(2)
  %bias = bf16[16]{0} parameter(3)
  %small = bf16[4,16,16,16]{3,2,1,0} parameter(4)
  %forward = (bf16[4,16,16,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %kernel), \
window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp()/conv"}
  %biased = (bf16[4,32,32,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %grouped, %bias), \
window={size=3x3 pad=2_2x2_2 rhs_dilate=2x2}, dim_labels=b01f_o01i->b01f, feature_group_count=2, \
custom_call_target="__cudnn$convBiasActivationForward", metadata={op_name="jit(step)/prior/conv"}
  %to-x = (bf16[4,32,32,8]{3,2,1,0}, u8[0]{0}) custom-call(%small, %kernel), \
window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput"
  %to-kernel = (bf16[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %small), \
window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  ROOT %out = bf16[4,32,32,8]{3,2,1,0} get-tuple-element(%to-x), index=0
}
"""


def test_convolutions_of_cudnn_cost_what_the_forward_convolution_does():
  # At stride 2, 3·16 − 1 (output, kernel) pairs along an axis meet the input; dilated by 2,
  # 3·32 − 4. A gradient has the products of the forward pass. Groups halve the inputs.
  strided, dilated = 4 * 47**2 * 8 * 16, 4 * 92**2 * 4 * 16
  assert hlo.flops(CUDNN, "prior") == {"outside": 2.0 * 3 * strided, "inside": 2.0 * dilated}


CUBLAS = """
%body (p: f32[6,20,8]) -> f32[6,20,8] {
  %p = f32[6,20,8]{2,1,0} parameter(0)
  %w = f32[6,20,30]{2,1,0} constant({...})
  %gemm = (f32[6,8,30]{2,1,0}, s8[4194304]{0}) custom-call(%p, %w), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}
  ROOT %same = f32[6,20,8]{2,1,0} bitcast(%p)
}
%condition (c: f32[6,20,8]) -> pred[] {
  ROOT %c = pred[] constant(true)
}
ENTRY %main (x: f32[6,20,8]) -> f32[6,20,8] {
  %x = f32[6,20,8]{2,1,0} parameter(0)
  ROOT %loop = f32[6,20,8]{2,1,0} while(%x), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
}
"""


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_products_of_cublas_are_counted_and_their_workspace_is_no_traffic(target):
  text = CUBLAS.replace("__cublas$lt$matmul", target)
  assert hlo.flops(text, "prior") == {"outside": 2.0 * 7 * 6 * 8 * 30 * 20, "inside": 0.0}
  assert hlo.traffic(text) == 7 * 4 * 6 * (20 * 8 + 20 * 30 + 8 * 30)


def test_a_library_call_that_cannot_be_counted_is_no_zero():
  text = CUDNN.replace("__cudnn$convForward", "__cudnn$fmhaSoftmax")
  with pytest.raises(ValueError, match="FLOPs of __cudnn.fmhaSoftmax are not known"):
    hlo.flops(text, "prior")


def test_a_card_is_described_by_its_own_figures():
  text = gpus.target("rtx4090")
  for line in (
    "cuda_compute_capability { major: 8 minor: 9 feature_extension: NONE }",
    "core_count: 128",
    "shared_memory_per_block_optin: 101376",
    "memory_bandwidth: 1008000000000",
  ):
    assert line in text
  assert text.count("{") == text.count("}")
  for gpu in gpus.GPUS.values():  # tensor cores are twice as fast in bfloat16
    assert gpu.bfloat16 == pytest.approx(2 * gpu.float32, rel=0.01)


OTHER_VERSION = {"jax-cuda12-pjrt": "0.0.1", "nvidia-cuda-nvcc-cu12": "12.9.86"}


@pytest.mark.parametrize("installed", [{}, OTHER_VERSION])
def test_without_the_gpu_compiler_one_sentence_says_how_to_get_it(monkeypatch, installed):
  def version(package):
    if package not in installed | {"jax": jax.__version__}:
      raise importlib.metadata.PackageNotFoundError(package)
    return installed.get(package, jax.__version__)

  monkeypatch.setattr(importlib.metadata, "version", version)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  wanted = f"needs XLA's GPU compiler for jax {jax.__version__}, .*requirements-gpu-plan.txt"
  with pytest.raises(FileNotFoundError, match=wanted) as refusal:
    topology.start("rtx4090:1")
  assert "\n" not in str(refusal.value)


def test_a_plan_for_gpus_says_what_its_figures_leave_out(toy, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(topology, "devices", lambda name: jax.devices("cpu")[:2])  # as the compiler
  totals = []
  compiled = jax.stages.Compiled.memory_analysis
  monkeypatch.setattr(
    jax.stages.Compiled, "memory_analysis", lambda self: totals.append(compiled(self)) or totals[-1]
  )
  changes = {"train.dtype": "float32", "prior.dtype": "bfloat16"}
  result = plan.plan(slice_config(**changes), "rtx4090:2", tmp_path)
  printed = capsys.readouterr().out
  for words in (
    "fits: ",
    " of 21.65 GiB each",
    "23.65 GiB, of which 2 stay free for what is not counted: cuDNN's workspace, the CUDA context",
    "never compared with a card",
    "83 TFLOP/s float32, as TF32",
  ):
    assert words in printed
  assert result["compared_with_a_card"] is False and "MEM_FRACTION" not in printed
  for part, total in zip((result, result["evaluation"]), totals, strict=True):
    fresh = total.output_size_in_bytes - total.alias_size_in_bytes
    own = total.argument_size_in_bytes + fresh + total.temp_size_in_bytes
    own += total.generated_code_size_in_bytes
    assert sum(part["hbm_by_kind"].values()) == part["hbm_bytes_per_chip"] == own
  network, prior = (
    result["flops_by_part"][part] / 2 for part in ("network_and_samf", "frozen_vit")
  )
  assert result["roofline"]["seconds_compute"] == pytest.approx(
    network / 82.6e12 + prior / 165.2e12
  )


def test_what_needs_more_than_jaxs_share_of_a_card_names_the_setting():
  gpu, gib = gpus.GPUS["rtx4090"], 2**30
  name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  for size, share in ((15.7, None), (15.8, 0.95)):  # 75 % of 23.65 GiB, less the 2 to spare
    said = plan._of_gpu(gpu, {"fits": True, "hbm_bytes_per_chip": size * gib})
    assert said[name] == share
  said = plan._of_gpu(gpu, {"fits": False, "hbm_bytes_per_chip": 25 * gib})
  assert said[name] == 0.95
  assert any(f"Set {name}=0.95" in line for line in plan._gpu_lines(said))


def test_a_gpu_that_is_too_small_gets_the_largest_batch_and_the_dtype_that_helps(monkeypatch):
  # GiB of MSDA-Net's step by batch, and with an option; not in proportion to the batch.
  needs = {12: 17.0, 13: 19.1, 14: 20.6, 15: 22.4}
  tried = []

  def attempt(config, parts, the_mesh, changes):
    tried.append(changes)
    if "train.batch_size" in changes:
      return needs[changes["train.batch_size"]]
    return 17.8 if changes.get("train.dtype") == "bfloat16" else 27.4

  monkeypatch.setattr(plan, "_attempt", attempt)
  parts = plan.Parts(None, None, None)
  found = plan._ways_out(network_config("msda"), parts, mesh.make(1), 21.65, 25.9, gpu=True)
  assert found["largest_batch"] == 14
  half = {"train.dtype": "bfloat16", "prior.dtype": "bfloat16"}
  assert [helped["options"] for helped in found["helps"]] == [{"train.remat": "products"}, half]
  assert [helped["fits"] for helped in found["helps"]] == [False, True]
  assert {"train.batch_size": 15} in tried


TOY_STEP = """
from fdep_jax.runtime import hlo, topology
topology.start("KIND:2")
import jax, jax.numpy as jnp
from fdep_jax.runtime import mesh

the_mesh = mesh.over(topology.devices("KIND:2"))

def step(kernel, matrix, x):
  def loss(kernel, matrix):
    y = jax.lax.conv_general_dilated(
      x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean((jax.nn.relu(y) @ matrix) ** 2)
  return jax.tree.map(lambda a, b: a - b, (kernel, matrix), jax.grad(loss, (0, 1))(kernel, matrix))

def shape(*sizes, place=mesh.replicated):
  return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place(the_mesh))

arguments = shape(3, 3, 8, 64), shape(64, 64), shape(8, 64, 64, 8, place=mesh.split)
compiled = jax.jit(step).lower(*arguments).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
print(hlo.flops(text, "none")["outside"], hlo.traffic(text), memory.argument_size_in_bytes)
print({c["op"] for c in hlo.collectives(text)})
"""


def test_the_gpu_compiler_compiles_a_toy_step_for_cards_that_are_not_there():
  for package in ("jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"):
    try:
      importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pytest.skip(f"needs {package} (requirements-gpu-plan.txt)")
  # Half of the images: a convolution and its kernel's gradient, a product and its two gradients.
  flops = 2.0 * (2 * 4 * 95**2 * 8 * 64 + 3 * 4 * 32**2 * 64 * 64)
  held = 2 * (3 * 3 * 8 * 64 + 64 * 64 + 4 * 64 * 64 * 8)
  for kind in gpus.GPUS:
    program = [sys.executable, "-c", TOY_STEP.replace("KIND", kind)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{kind}: {done.stderr}"
    figures, collectives = done.stdout.splitlines()
    counted, traffic, arguments = map(float, figures.split())
    assert (counted, arguments) == (flops, held), kind
    assert traffic > 2 * held
    assert collectives == "{'all-reduce'}"
