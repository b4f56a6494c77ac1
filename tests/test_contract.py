"""The contract that FDEP has with every file in `backbones/`, on both sides.

Networks are traced with shapes alone; what an output depends on is read off the traced program.
Only the last condition of the contract compiles and runs them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TOYS
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from fdep_jax import backbones
from fdep_jax.backbones import Backbone, Logits
from fdep_jax.fdep import FDEP
from fdep_jax.layers import windows

NETWORKS = backbones.names()
SIZES = ((1, 3), (4, 3))  # rows and columns of an image, in strides
WIDTH, LEVELS = 8, 2  # of a small stand-in for DINOv2

# 10⁹ multiply-adds of convolutions and linear layers at 448×448, batch 1: in `encode`, which a
# training step runs once, and in `decode`, which it runs twice. From the design's count on the
# published networks (to two decimals), but for
# - alcl, ggl: the skips' gates do not depend on the top feature (0.21, 0.03 from decode to encode);
# - alcl, ggl: 1×1 convolutions run before the doubling they follow there (0.31 less in decode);
# - sctransnet, sdsnet: so do those that restore their tokens (0.75 and 0.65 less in encode), whose
#   grouped convolutions are sums here and not counted (0.19 each).
# Products of the attention are counted.
GMAC = {
  "acm": (0.59, 0.46),
  "alcl": (17.20 + 2.06 + 0.21, 1.18 - 0.21 - 0.31),
  "alcnet": (0.77, 0.15),
  "dna": (7.17 + 17.70, 17.79),
  "ggl": (26.61 + 2.06 + 0.03, 1.01 - 0.03 - 0.31),
  "ilnet": (11.97 + 1.72, 51.18),
  "mlcl": (10.26 + 6.99, 4.23),
  "msda": (45.09 + 13.36, 5.60),
  "mtu": (11.02, 8.02),
  "rpcanet": (135.26, 0),
  "sctransnet": (11.60 + 8.17 - 0.75 - 0.19, 12.50),
  "sdsnet": (8.86 + 1.47 + 0.34 - 0.65 - 0.19, 10.18),
  "uiu": (52.25, 114.03),
}


# Networks as shapes, and what the traced programs say.


@functools.cache
def shapes_only(cls: type[Backbone]) -> Backbone:
  return nnx.eval_shape(lambda: cls(rngs=nnx.Rngs(0)))


def image_of(net: Backbone, height: int, width: int, batch: int = 2) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((batch, height, width, net.in_channels), jnp.float32)


@functools.cache
def traced(cls: type[Backbone], height: int, width: int, batch: int = 2):
  """The programs of encode and decode with their results' shapes: encode, decode, top, logits."""
  net = shapes_only(cls)
  graphdef, state = nnx.split(net)
  image = image_of(net, height, width, batch)
  encode, (skips, top) = jax.make_jaxpr(
    lambda state, image: nnx.merge(graphdef, state).encode(image), return_shape=True
  )(state, image)
  decode, logits = jax.make_jaxpr(
    lambda state, skips, top: nnx.merge(graphdef, state).decode(skips, top), return_shape=True
  )(state, skips, top)
  labels = label("parameter", state) + label("skip", skips) + label("top", top)
  return (
    follow(encode, label("parameter", state) + label("image", image)),
    follow(decode, labels),
    top,
    logits,
  )


@functools.cache
def attached(cls: type[Backbone]):
  """FDEP on the network, as shapes: graphdef, parameters, all else, image, levels.

  Of a network without a top feature the light branch alone.
  """
  number = LEVELS if cls.top_channels else 0
  model = nnx.eval_shape(
    lambda: FDEP(cls(rngs=nnx.Rngs(0)), dino_width=WIDTH, num_levels=number, rngs=nnx.Rngs(0))
  )
  model.set_attributes(deterministic=True, raise_if_not_found=False)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  # Of a size whose encode and decode are traced for other conditions already.
  image = image_of(model.backbone, *(strides * step_of(cls) for strides in SIZES[1]))
  levels = [jax.ShapeDtypeStruct((2, 3, 2, WIDTH), jnp.float32)] * LEVELS
  return graphdef, params, rest, image, levels


def step_of(cls: type[Backbone]) -> int:
  """Pixels that images of these tests are multiples of."""
  return cls.stride if cls.stride > 1 else 4


def label(name: str, tree) -> list[frozenset[str]]:
  return [frozenset([name])] * len(jax.tree.leaves(tree))


def owners(state) -> list[frozenset[str]]:
  """The first part of every leaf's path: "backbone", "fusion", "main_stats"."""
  return [frozenset([str(path[0])]) for path, _ in nnx.to_flat_state(state)]


def paths(state) -> list[str]:
  return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


class Program:
  """The labels of inputs on which each output and operation of a traced program depends."""

  def __init__(self):
    self.outputs = []
    self.operations = []  # (name, labels it depends on)
    self.products = []  # (multiply-adds, labels) of convolutions and matrix products of data

  @property
  def gmac(self) -> float:
    return sum(count for count, _ in self.products) / 1e9


def follow(closed: ClosedJaxpr, labels: list[frozenset[str]]) -> Program:
  program = Program()
  program.outputs = _follow(closed.jaxpr, labels, program)
  return program


def _follow(jaxpr: Jaxpr, labels, program: Program) -> list[frozenset[str]]:
  known = dict(zip(jaxpr.invars, labels, strict=True))

  def read(atom) -> frozenset[str]:
    return frozenset() if isinstance(atom, Literal) else known.get(atom, frozenset())

  for eqn in jaxpr.eqns:
    inputs = [read(atom) for atom in eqn.invars]
    depends = frozenset().union(*inputs)
    assert eqn.primitive.name not in ("scan", "while", "cond"), "not followed"
    if eqn.primitive.name in ("jit", "custom_jvp_call", "custom_vjp_call"):
      inner = next(value for value in eqn.params.values() if isinstance(value, ClosedJaxpr))
      outputs = _follow(inner.jaxpr, inputs, program)
    else:
      if takes_all(eqn, inputs):
        depends |= {f"all of the frame ({eqn.primitive.name})"}
      outputs = [depends] * len(eqn.outvars)
      program.operations.append((eqn.primitive.name, depends))
      # A product with a constant is an interpolation, not a layer.
      if eqn.primitive.name in ("conv_general_dilated", "dot_general") and all(inputs):
        program.products.append((multiply_adds(eqn), depends))
    known.update(zip(eqn.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def multiply_adds(eqn) -> int:
  """Output elements times the terms of each."""
  left, right = (atom.aval for atom in eqn.invars)
  if eqn.primitive.name == "conv_general_dilated":
    out_channels = right.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return eqn.outvars[0].aval.size * right.size // out_channels
  (contracted, _), _ = eqn.params["dimension_numbers"]
  return eqn.outvars[0].aval.size * int(np.prod([left.shape[axis] for axis in contracted]))


def filled(state, seed: int = 0):
  """A state of shapes with numbers in it; drawn by numpy, as nothing must compile."""
  rng = np.random.default_rng(seed)

  def draw(path, variable):
    shape, kind = variable.shape, path[-1]
    if not jnp.issubdtype(variable.dtype, jnp.floating):  # of dropout, which is off
      is_key = jax.dtypes.issubdtype(variable.dtype, jax.dtypes.prng_key)
      return jax.random.key(0) if is_key else np.zeros(shape, variable.dtype)
    values = rng.standard_normal(shape, np.float32)
    if kind == "kernel":
      return values * np.float32((2 / np.prod(shape[:-1])) ** 0.5)
    return (1 if kind in ("scale", "var") else 0) + 0.1 * values

  flat = [
    (path, variable.replace(draw(path, variable))) for path, variable in nnx.to_flat_state(state)
  ]
  return nnx.from_flat_state(flat)


# The contract: functions of a class, so that they hold for a network that a test drops in, too.


def logits_have_the_images_size(cls: type[Backbone]):
  for rows, columns in SIZES:
    height, width = rows * step_of(cls), columns * step_of(cls)
    _, _, _, logits = traced(cls, height, width)
    assert isinstance(logits, Logits)
    for head in logits.heads:
      assert head.shape == (2, height, width, 1)
      assert head.dtype == jnp.float32


def top_is_what_the_class_says(cls: type[Backbone]):
  for rows, columns in SIZES:
    height, width = rows * step_of(cls), columns * step_of(cls)
    _, _, top, _ = traced(cls, height, width)
    if not cls.top_channels:
      assert top is None
      continue
    assert top.shape == (2, height // cls.top_stride, width // cls.top_stride, cls.top_channels)


def images_that_do_not_fit_are_refused(cls: type[Backbone]):
  # Nothing can have been compiled or computed: the network holds shapes only.
  net = shapes_only(cls)
  graphdef, state = nnx.split(net)
  s, channels = step_of(cls), net.in_channels

  def evaluate(image):
    return jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, image)

  sizes = ((s + 1, 2 * s, f"{2 * s}×{2 * s}"), (3 * s, 2 * s - 1, f"{3 * s}×{2 * s}"))
  for height, width, padded in sizes if cls.stride > 1 else ():
    with pytest.raises(ValueError) as error:
      evaluate(image_of(net, height, width))
    assert f"{height}×{width}" in str(error.value)
    assert f"multiples of {s}" in str(error.value)
    assert f"Pad it with zeros to {padded}" in str(error.value)
  for shape in ((2, s, s, channels + 1), (2, channels, s, s), (s, s, channels)):
    with pytest.raises(ValueError, match=f"needs B×H×W×{channels}.*[Tt]ranspose") as error:
      evaluate(jax.ShapeDtypeStruct(shape, jnp.float32))
    assert "×".join(map(str, shape)) in str(error.value)


def decode_repeats_nothing_of_encode(cls: type[Backbone]):
  _, decode, _, _ = traced(cls, 4 * step_of(cls), 3 * step_of(cls))
  assert bool(decode.products) == bool(cls.top_channels)
  repeated = [count for count, depends in decode.products if "top" not in depends]
  assert not repeated, f"{len(repeated)} layers of decode do not depend on `top`"
  # Nor anything else but views of what encode hands over.
  views = {"broadcast_in_dim", "concatenate", "reshape", "slice", "squeeze", "transpose"}
  others = {name for name, on in decode.operations if "skip" in on and "top" not in on} - views
  assert not others, others


def deployment_needs_the_backbone_alone(cls: type[Backbone]):
  graphdef, params, rest, image, levels = attached(cls)
  program = follow(
    jax.make_jaxpr(lambda params, rest, image: nnx.merge(graphdef, params, rest).light(image))(
      params, rest, image
    ),
    owners(params) + owners(rest) + label("image", image),
  )
  assert frozenset().union(*program.outputs) == {"backbone", "image"}
  # And its state is that of the network on its own, name by name.
  backbone = nnx.merge(graphdef, params, rest).backbone
  alone, inside = nnx.state(shapes_only(cls)), nnx.state(backbone)
  assert paths(alone) == paths(inside)
  assert [x.shape for x in jax.tree.leaves(alone)] == [x.shape for x in jax.tree.leaves(inside)]


def every_parameter_reaches_its_losses(cls: type[Backbone]):
  # The gradient's program, not its value: many gradients are zero by accident (units that are off)
  # or but for rounding (biases before a BatchNorm), but those depend on the loss; what is cut off
  # gets a constant. The backbone must feel both branches' losses, the fusion the main one's alone.
  graphdef, params, rest, image, levels = attached(cls)

  def heads(params, rest, image, levels):
    model = nnx.merge(graphdef, params, rest, copy=True)
    if not cls.top_channels:
      return (), model.light(image).heads
    main, light = model(image, levels)
    return main.heads, light.heads

  def pull_back(params, rest, image, levels, main, light):
    _, pull = jax.vjp(lambda params: heads(params, rest, image, levels), params)
    return pull((main, light))[0]

  _, _, _, logits = traced(cls, *image.shape[1:3])
  main, light = logits.heads if cls.top_channels else (), logits.heads
  program = follow(
    jax.make_jaxpr(pull_back)(params, rest, image, levels, main, light),
    label("model", (params, rest, image, levels)) + label("main", main) + label("light", light),
  )
  reached = dict(zip(paths(params), program.outputs, strict=True))
  assert set(reached) == set(paths(params))
  both = {"main", "light"} if cls.top_channels else {"light"}
  expected = {path: {"main"} if path.startswith("fusion/") else both for path in reached}
  assert {path: on - {"model"} for path, on in reached.items()} == expected


def fdep_needs_a_top_feature(cls: type[Backbone]):
  if cls.top_channels:
    assert not cls.no_top
    cls.require_top()
    return
  assert cls.no_top and not cls.top_stride
  # As shapes alone: it is refused before anything is compiled or computed.
  with pytest.raises(ValueError, match=f"FDEP cannot be attached to {cls.paper_name}") as error:
    nnx.eval_shape(lambda: FDEP(cls(rngs=nnx.Rngs(0)), WIDTH, LEVELS, rngs=nnx.Rngs(0)))
  assert cls.no_top in str(error.value) and "mode=original" in str(error.value)


def fdep_encodes_once_and_decodes_twice(cls: type[Backbone]):
  if not cls.top_channels:
    return
  graphdef, params, rest, image, levels = attached(cls)
  labels = owners(params) + owners(rest) + label("image", image) + label("level", levels)

  def program(method: str) -> Program:
    def run(params, rest, image, levels):
      return getattr(nnx.merge(graphdef, params, rest), method)(image, levels)

    return follow(jax.make_jaxpr(run)(params, rest, image, levels), labels)

  main, both = program("main"), program("__call__")
  _, decode, _, logits = traced(cls, *image.shape[1:3])
  assert np.isclose(both.gmac, main.gmac + decode.gmac, rtol=1e-9)
  main_final, light = both.outputs[0], both.outputs[len(logits.heads) :]
  assert {"fusion", "level"} <= main_final
  assert not {"fusion", "level"} & frozenset().union(*light)


def both_branches_are_finite_and_different(cls: type[Backbone]):
  graphdef, params, rest, image, levels = attached(cls)
  rng = np.random.default_rng(0)

  # Half of the compile time goes into making it fast, which one run does not need.
  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def run(params, rest, image, levels):
    model = nnx.merge(graphdef, params, rest, copy=True)
    if not cls.top_channels:
      return None, model.light(image)
    return model(image, levels)

  draw = functools.partial(jax.tree.map, lambda x: rng.standard_normal(x.shape, np.float32))
  main, light = run(filled(params), filled(rest), draw(image), draw(levels))
  for head in (*(main.heads if main else ()), *light.heads):
    assert np.isfinite(head).all()
    assert np.std(head) > 0
  if main is None:
    return
  difference = np.linalg.norm(main.final - light.final) / np.linalg.norm(light.final)
  assert difference > 1e-2


class Told(windows.Window):
  """A window that is told the statistics of its frame, so that it need not be seen whole."""

  def _statistic(self, kind, share, local):
    return jnp.zeros_like(local)


PRIMES = (61, 67)  # rows and columns in strides: no other axis is a multiple of these


def takes_all(eqn, inputs: list[frozenset[str]]) -> bool:
  """Whether an operation puts together pixels from the whole height or width of the image."""
  if "image" not in frozenset().union(*inputs[:1]):
    return False
  name, shape = eqn.primitive.name, eqn.invars[0].aval.shape
  if name == "dot_general":  # a product with a constant is an interpolation
    axes = eqn.params["dimension_numbers"][0][0] if all("image" in on for on in inputs) else ()
  elif name == "sort":
    axes = (eqn.params["dimension"],)
  elif name.startswith("cum"):
    axes = (eqn.params["axis"],)
  elif name == "fft":
    axes = range(len(shape))
  else:
    axes = eqn.params.get("axes", ()) if name.startswith(("reduce_", "arg")) else ()
  return any(shape[i] % prime == 0 for i in axes for prime in PRIMES)


def a_large_frame_can_be_computed_by_windows_unless_the_class_says_why_not(cls: type[Backbone]):
  if cls.whole_frame:
    return
  size = tuple(prime * step_of(cls) for prime in PRIMES)
  net = nnx.clone(shapes_only(cls))
  net.eval()
  graphdef, state = nnx.split(net)
  frame, zero = np.array(size, np.int32), np.zeros(2, np.int32)

  def forward(state, image):
    with windows.active(Told(size, frame, zero, np.stack([zero, frame], 1))):
      return nnx.merge(graphdef, state)(image).final

  program = jax.make_jaxpr(forward)(state, image_of(net, *size, batch=1))
  found = follow(program, label("parameter", state) + [frozenset(["image"])])
  (on,) = found.outputs
  assert not {name for name in on if name.startswith("all of")}, (
    f"a pixel of the result depends on {' and '.join(sorted(on - {'image', 'parameter'}))}. Large "
    f"frames are computed window by window, so they would get other results. Set whole_frame of "
    f"{cls.__name__} to the reason, a clause; or take means and maxima over the image from "
    "fdep_jax.layers.ops (spatial_mean, spatial_max), and GroupNorm from fdep_jax.layers.basic."
  )


CONTRACT = (
  logits_have_the_images_size,
  top_is_what_the_class_says,
  images_that_do_not_fit_are_refused,
  decode_repeats_nothing_of_encode,
  deployment_needs_the_backbone_alone,
  every_parameter_reaches_its_losses,
  fdep_needs_a_top_feature,
  fdep_encodes_once_and_decodes_twice,
  both_branches_are_finite_and_different,
  a_large_frame_can_be_computed_by_windows_unless_the_class_says_why_not,
)


# The condition that compiles and the one that traces most are slow for the networks that take
# longest; their forward passes are compared with the published networks in every run of the tests.
LONG = ("dna", "ilnet", "msda", "sdsnet", "uiu")
LONG_CONDITIONS = (
  both_branches_are_finite_and_different,
  a_large_frame_can_be_computed_by_windows_unless_the_class_says_why_not,
)
CASES = [
  pytest.param(
    condition,
    name,
    marks=[pytest.mark.slow] * (condition in LONG_CONDITIONS and name in LONG),
    id=f"{condition.__name__}-{name}",
  )
  for name in NETWORKS  # one network after the other, as its traced programs are kept
  for condition in CONTRACT
]


@pytest.mark.parametrize(("condition", "name"), CASES)
def test_every_network_keeps_the_contract(condition, name):
  condition(backbones.network_class(name))


def test_every_network_has_its_cost_in_the_table():
  assert sorted(GMAC) == NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_costs_what_the_published_one_does(name):
  encode, decode, _, _ = traced(backbones.network_class(name), 448, 448, batch=1)
  if name not in GMAC:  # a new one; `test_every_network_has_its_cost_in_the_table` asks for it
    pytest.skip(f"no costs of {name} in GMAC; encode {encode.gmac:.2f}, decode {decode.gmac:.2f}")
  # 0.005 for each figure of the sums above.
  np.testing.assert_allclose([encode.gmac, decode.gmac], GMAC[name], rtol=0.02, atol=0.01)


# Adding a network.

TOY = '''
"""A network of three layers."""

from fdep_jax.layers import basic
from fdep_jax.backbones import Backbone, Logits


class Toy(Backbone):
  stride = 2
  top_stride = 2
  top_channels = 8
  paper_name = "Toy"

  def __init__(self, *, rngs):
    self.skip = basic.Conv(3, 1, rngs=rngs)
    self.down = basic.ConvNormRelu(3, 8, stride=2, rngs=rngs)
    self.up = basic.ConvTranspose(8, 1, rngs=rngs)

  def encode(self, image):
    self.check_image(image)
    return self.skip(image), self.down(image)

  def decode(self, skips, top):
    return Logits(self.up(top) + skips)
'''


def test_a_file_is_all_that_a_new_network_needs(drop_in):
  drop_in("toy", TOY)
  assert backbones.names() == sorted([*NETWORKS, "toy"])
  model = nnx.eval_shape(lambda: FDEP("toy", WIDTH, LEVELS, rngs=nnx.Rngs(0)))
  assert type(model.backbone) is backbones.network_class("toy")
  for condition in CONTRACT:
    condition(type(model.backbone))


def test_the_costs_of_a_new_network_are_shown_for_the_table(drop_in):
  drop_in("toy", TOY)
  with pytest.raises(pytest.skip.Exception, match=r"no costs of toy in GMAC; encode 0\.0"):
    test_a_network_costs_what_the_published_one_does("toy")


def test_a_unet_of_flaxs_own_layers_keeps_the_contract(drop_in):
  drop_in("plainunet", (TOYS / "flax_unet.py").read_text())
  for condition in CONTRACT:
    condition(backbones.network_class("plainunet"))


BREAKS = [
  (logits_have_the_images_size, {"Logits(self.up(top) + skips)": "Logits(top[..., :1])"}),
  (top_is_what_the_class_says, {"top_channels = 8": "top_channels = 16"}),
  (top_is_what_the_class_says, {"top_stride = 2": "top_stride = 1"}),
  (top_is_what_the_class_says, {"top_channels = 8": "top_channels = 0"}),
  (fdep_needs_a_top_feature, {"top_channels = 8": "top_channels = 0"}),
  (fdep_needs_a_top_feature, {"top_channels = 8": "top_channels = 8\n  no_top = 'none'"}),
  (images_that_do_not_fit_are_refused, {"self.check_image(image)": "raise ValueError('size')"}),
  (
    decode_repeats_nothing_of_encode,
    {"return self.skip(image)": "return image", "(top) + skips": "(top) + self.skip(skips)"},
  ),
  (decode_repeats_nothing_of_encode, {"(top) + skips": "(top) + jax.nn.relu(skips)"}),
  (every_parameter_reaches_its_losses, {"(top) + skips": "(top)"}),
  (every_parameter_reaches_its_losses, {"+ skips": "+ jax.lax.stop_gradient(skips)"}),
  (both_branches_are_finite_and_different, {"self.up(top) + skips": "skips"}),
  (both_branches_are_finite_and_different, {"self.up(top)": "self.up(top) / 0"}),
  *(
    (a_large_frame_can_be_computed_by_windows_unless_the_class_says_why_not, {"self.up(top)": gate})
    for gate in (
      "self.up(top) * jax.nn.sigmoid(top.mean((1, 2, 3), keepdims=True))",
      "self.up(top * jax.numpy.max(top, (1, 2), keepdims=True))",
      "self.up(nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))(top))",
      "self.up(nnx.InstanceNorm(8, rngs=nnx.Rngs(0))(top))",
      "self.up(jax.numpy.sort(top, 2))",
      "self.up(jax.numpy.cumsum(top, 1))",
      "self.up(jax.numpy.einsum('bhwc,bhwd,bhwd->bhwc', top, jax.nn.softmax(top, 2), top))",
    )
  ),
]


@pytest.mark.parametrize("condition, edits", BREAKS)
def test_the_contract_is_broken_by_a_network_that_breaks_it(condition, edits, drop_in):
  source = TOY.replace("from fdep_jax", "import jax\nfrom flax import nnx\n\nfrom fdep_jax", 1)
  for right, wrong in edits.items():
    assert source.count(right) == 1
    source = source.replace(right, wrong)
  drop_in("toy", source)
  # AssertionError, or pytest's own where no error was raised.
  with pytest.raises((AssertionError, pytest.fail.Exception)):
    condition(backbones.network_class("toy"))


@pytest.mark.parametrize(
  "edits",
  [
    {"self.up(top)": "self.up(top) * top.mean((1, 2, 3), keepdims=True)",
     'paper_name = "Toy"': 'paper_name = "Toy"\n  whole_frame = "its gate is a mean"'},
    {"self.up(top)": "self.up(top * ops.spatial_mean(top))"},
    {"self.up(top)": "self.up(basic.GroupNorm(8)(top))"},
    {"self.up(top)": "self.up(nnx.LayerNorm(8, rngs=nnx.Rngs(0))(top))"},
  ],
)  # fmt: skip
def test_a_network_that_looks_all_over_the_frame_may_say_so_or_be_told_its_statistics(
  edits, drop_in
):
  source = TOY.replace("import basic", "import basic, ops").replace(
    '"""\n', '"""\nfrom flax import nnx\n', 1
  )
  for right, wrong in edits.items():
    assert source.count(right) == 1
    source = source.replace(right, wrong)
  drop_in("toy", source)
  a_large_frame_can_be_computed_by_windows_unless_the_class_says_why_not(
    backbones.network_class("toy")
  )


def test_the_contract_names_what_looks_all_over_the_frame(drop_in):
  drop_in("toy", TOY.replace("self.up(top)", "self.up(top * top.mean((1, 2), keepdims=True))"))
  with pytest.raises(AssertionError, match=r"\(reduce_sum\).*Set whole_frame of Toy to the reason"):
    a_large_frame_can_be_computed_by_windows_unless_the_class_says_why_not(
      backbones.network_class("toy")
    )


def test_an_unknown_network_is_refused_with_those_that_exist():
  with pytest.raises(ValueError, match="(?s)'msdanet'.*acm.*msda"):
    backbones.create("msdanet", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("source, count", [("", 0), (TOY + TOY.replace("Toy(", "Two("), 2)])
def test_a_file_without_exactly_one_network_is_refused(source, count, drop_in):
  drop_in("toy", source)
  with pytest.raises(ValueError, match=f"toy must define one Backbone, not {count}"):
    backbones.create("toy", rngs=nnx.Rngs(0))
