"""The native kernel and `masked_chain`: both against values by hand, and against each other."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from gating_jax.native import build
from gating_jax.ops import native_kernels

needs_native = pytest.mark.skipif(
  not native_kernels.available(), reason=native_kernels.why_not() or "there"
)
both = pytest.mark.parametrize(
  "implementation", ["jax", pytest.param("native", marks=needs_native)]
)


IMPLEMENTATIONS = {"native": native_kernels.gated_chain, "jax": native_kernels.masked_chain}


def gated_chain(x, kernels, *arguments, implementation="native", **settings):
  """Runs the chain on kernels `[h, w, I, O]`; what is no such kernel stays as it is."""
  pack = lambda kernel: native_kernels.packed(kernel) if jnp.ndim(kernel) == 4 else kernel
  return IMPLEMENTATIONS[implementation](x, list(map(pack, kernels)), *arguments, **settings)


def open_conv(
  x, kernel, bias, shortcut=None, *, in_gates=None, out_gates=None, stride=1, relu=False, **settings
):
  """Runs one convolution."""
  settings = dict(implementation="jax", strides=(stride,), relu=relu) | settings
  return gated_chain(x, (kernel,), (bias,), (in_gates, out_gates), shortcut, **settings)


def open_branch(x, kernel1, bias1, kernel2, bias2, gates, shortcut=None, **settings):
  """Runs two convolutions, with gates between them."""
  kernels, biases = (kernel1, kernel2), (bias1, bias2)
  return gated_chain(x, kernels, biases, (None, gates, None), shortcut, **settings)


LANES = (0, 8, 4)  # the processor's vectors, narrower ones, and the portable ones

# x has two channels, an ascending 3 x 3 image and ones; sums over a 3 x 3 window, by hand.
# What the kernel takes, in every mode of JAX.
zeros, ones, full, array = (
  functools.partial(make, dtype=jnp.float32) for make in (jnp.zeros, jnp.ones, jnp.full, jnp.array)
)
IMAGE = jnp.stack([jnp.arange(9, dtype=jnp.float32).reshape(1, 3, 3), ones((1, 3, 3))], -1)
SUMS = [[8, 15, 12], [21, 36, 27], [20, 33, 24]]
COUNTS = [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
ONES = ones((3, 3, 2, 2))
TABLE = {
  "open": ({}, [np.add(SUMS, COUNTS), np.add(SUMS, COUNTS)]),
  "closed input": ({"in_gates": [[1, 0]]}, [SUMS, SUMS]),
  "closed output": ({"out_gates": [[0, 1]]}, [np.zeros((3, 3)), np.add(SUMS, COUNTS)]),
  "all closed": ({"in_gates": [[0, 0]], "out_gates": [[0, 0]]}, np.zeros((2, 3, 3))),
  "all inputs closed": ({"in_gates": [[0, 0]]}, np.zeros((2, 3, 3))),
  "stride": ({"stride": 2, "in_gates": [[0, 1]]}, [[[4, 4], [4, 4]]] * 2),
}


@both
@pytest.mark.parametrize("case", TABLE)
def test_values_by_hand(case, implementation):
  settings, expected = TABLE[case]
  settings = {
    name: jnp.array(value) if "gates" in name else value for name, value in settings.items()
  }
  y = open_conv(IMAGE, ONES, zeros(2), implementation=implementation, **settings)
  np.testing.assert_array_equal(y[0], np.moveaxis(np.array(expected), 0, -1))


@both
def test_bias_shortcut_and_relu(implementation):
  x, kernel = array([1.0, -2.0]).reshape(1, 1, 2, 1), array([1.0, 3.0]).reshape(1, 1, 1, 2)
  run = functools.partial(
    open_conv,
    x,
    kernel,
    array([0.5, 1.0]),
    full((1, 1, 2, 2), -2.0),
    implementation=implementation,
  )
  np.testing.assert_array_equal(run()[0, 0], [[-0.5, 2], [-3.5, -7]])
  np.testing.assert_array_equal(run(relu=True)[0, 0], [[0, 2], [0, 0]])
  # The shortcut stays.
  np.testing.assert_array_equal(run(out_gates=jnp.array([[0, 1]]))[0, 0], [[-2, 2], [-2, -7]])


@both
def test_a_branch_by_hand(implementation):
  x = array([[[[1.0]]], [[[-1.0]]]])  # two examples of one pixel
  kernel1, kernel2 = (
    zeros((3, 3, 1, 2)).at[1, 1, 0].set(array([2, -3])),
    zeros((3, 3, 2, 1)).at[1, 1, :, 0].set(1.0),
  )
  run = functools.partial(
    open_branch,
    x,
    kernel1,
    array([0.0, 1]),
    kernel2,
    array([10.0]),
    implementation=implementation,
  )
  # hidden (2, -2) and (-2, 4) before ReLU
  assert run(None).ravel().tolist() == [12, 14]
  assert run(jnp.array([[0, 1], [1, 0]])).ravel().tolist() == [10, 10]
  assert run(
    jnp.array([[1, 0], [0, 1]]), full((2, 1, 1, 1), -13.0), relu=False
  ).ravel().tolist() == [-1, 1]


@both
def test_weights_by_hand(implementation):
  """A weight multiplies what its convolution makes, before the shortcut and the last ReLU."""
  x = array([[[[1.0]]], [[[-1.0]]]])
  kernel1, kernel2 = (
    zeros((3, 3, 1, 2)).at[1, 1, 0].set(array([2, -3])),
    zeros((3, 3, 2, 1)).at[1, 1, :, 0].set(1.0),
  )
  run = lambda gates, weighted, shortcut=None: gated_chain(
    x,
    (kernel1, kernel2),
    (array([0.0, 1]), array([10.0])),
    (None, *gates),
    shortcut,
    weighted=weighted,
    implementation=implementation,
  )
  # Hidden (2, -2) and (-2, 4) before ReLU.
  hidden, out = array([[0.5, 3], [2, 1.25]]), array([[1.5], [0.25]])
  assert run((hidden, None), (True, False)).ravel().tolist() == [11, 15]
  assert run((hidden, None), (False, False)).ravel().tolist() == [12, 14]
  assert run((hidden, out), (True, True)).ravel().tolist() == [16.5, 3.75]
  assert run((None, out), (False, True)).ravel().tolist() == [18, 3.5]
  assert run((None, out), None).ravel().tolist() == [12, 14]
  shortcut = full((2, 1, 1, 1), -4.0)
  assert run((hidden, out), (True, True), shortcut).ravel().tolist() == [12.5, 0]
  # Neither 0 nor what is below, nor NaN, is open.
  closed = array([[0, -2], [jnp.nan, -jnp.inf]])
  assert run((closed, None), (True, False)).ravel().tolist() == [10, 10]


@both
def test_nothing_of_closed_channels_is_seen(implementation):
  x = IMAGE.at[..., 1].set(jnp.nan)
  y = open_branch(
    x[..., :1],
    ONES[:, :, :1].at[..., 1].set(jnp.nan),
    zeros(2),
    ONES,
    zeros(2),
    jnp.array([[1, 0]]),
    implementation=implementation,
  )
  assert y[0, 1, 1].tolist() == [np.sum(SUMS)] * 2
  closed = open_conv(x, ONES, zeros(2), in_gates=jnp.array([[1, 0]]), implementation=implementation)
  np.testing.assert_array_equal(closed[0, ..., 0], SUMS)


@both
def test_nan_of_open_channels_is_kept(implementation):
  y = open_conv(
    IMAGE.at[0, 0, 0, 0].set(jnp.nan), ONES, zeros(2), relu=True, implementation=implementation
  )
  assert np.isnan(y[0, :2, :2]).all()
  assert np.isfinite(y[0, 2]).all()


def made(seed, sizes, channels, windows, examples, shares, shortcut, stride):
  """`(x, kernels, biases, gates, shortcut, strides)` of a chain; a share of None is no gate."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape, by=1.0: jnp.asarray(rng.normal(size=shape) / by, jnp.float32)
  x = normal(examples, *sizes, channels[0])
  kernels = [
    normal(w, w, i, o, by=w * i**0.5)
    for w, i, o in zip(windows, channels[:-1], channels[1:], strict=True)
  ]
  gates = [
    None if share is None else jnp.asarray(rng.random((examples, c)) < share)
    for share, c in zip(shares, channels, strict=True)
  ]
  strides = (stride,) + (1,) * (len(windows) - 1)
  strides = strides[::-1] if len(windows) == 3 else strides
  out = native_kernels._shape(x, [native_kernels.packed(kernel) for kernel in kernels], strides)
  return (
    x,
    kernels,
    [normal(c) for c in channels[1:]],
    gates,
    normal(*out) if shortcut else None,
    strides,
  )


def compare(arguments, lanes, relu=True, run=gated_chain, of_twin=gated_chain):
  """Asserts that both implementations agree."""
  *arrays, strides = arguments
  twin = functools.partial(of_twin, strides=strides, relu=relu, implementation="jax")
  expected = jax.jit(twin)(*arrays)  # one program; without jit there is one for each operation
  for most in lanes:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(native_kernels, "_LANES", most)
      y = run(*arrays, strides=strides, relu=relu, implementation="native")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)


def with_weights(arguments, weighted, seed=0):
  """The chain with weights from 0.25 to 2 for gates; `weighted` flags, where there are gates."""
  x, kernels, biases, gates, shortcut, strides = arguments
  rng = np.random.default_rng(seed)
  weights = [
    None if gate is None else gate * jnp.asarray(rng.uniform(0.25, 2, gate.shape), jnp.float32)
    for gate in gates
  ]
  flags = tuple(flag and gate is not None for flag, gate in zip(weighted, weights[1:], strict=True))
  run = lambda *arrays, **settings: gated_chain(*arrays, weighted=flags, **settings)
  return (x, kernels, biases, weights, shortcut, strides), run


@pytest.mark.thin(2)
@needs_native
@pytest.mark.parametrize("examples", [1, 9])
@pytest.mark.parametrize(
  ("sizes", "channels", "stride"),
  [((16, 16), (16, 32, 32), 2), ((7, 7), (13, 21, 13), 1), ((8, 8), (16, 24, 16), 1)],
)
def test_weights_agree_with_their_twin(sizes, channels, stride, examples):
  shares = (0.5, 0.5, 0.7)
  arguments = made(7, sizes, channels, (3, 3), examples, shares, True, stride)
  for flags in ((True, False), (False, True), (True, True)):
    arrays, run = with_weights(arguments, flags)
    compare(arrays, LANES, run=run, of_twin=run)


SHARES = st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])


@pytest.mark.slow
@needs_native
@given(
  data=st.data(),
  length=st.integers(1, 3),
  examples=st.integers(0, 4),
  stride=st.integers(1, 3),
  sizes=st.tuples(st.integers(1, 19), st.integers(1, 19)),
  shortcut=st.booleans(),
  relu=st.booleans(),
)
def test_any_chain_agrees_with_its_twin(data, length, examples, stride, sizes, shortcut, relu):
  channels = data.draw(st.lists(st.integers(1, 37), min_size=length + 1, max_size=length + 1))
  windows = data.draw(st.lists(st.sampled_from([1, 3, 2, 5]), min_size=length, max_size=length))
  shares = data.draw(st.lists(SHARES, min_size=length + 1, max_size=length + 1))
  arguments = made(0, sizes, channels, windows, examples, shares, shortcut, stride)
  compare(arguments, LANES, relu)
  flags = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
  weighted, run = with_weights(arguments, flags)
  compare(weighted, LANES, relu, run=run, of_twin=run)


@pytest.mark.thin(2)
@needs_native
@pytest.mark.parametrize("examples", [1, 9])
@pytest.mark.parametrize(
  ("sizes", "channels", "stride"),
  [
    ((32, 32), (16, 16, 16), 1),
    ((16, 16), (16, 32, 32), 2),
    ((8, 8), (64, 64, 64), 1),
    ((56, 40), (8, 20, 8), 1),
    ((7, 7), (130, 70, 130), 1),
    ((4, 4), (32, 100, 32), 1),
  ],
)
def test_residual_branches_agree_with_their_twin(sizes, channels, stride, examples):
  compare(made(1, sizes, channels, (3, 3), examples, (None, 0.5, None), True, stride), LANES)


@needs_native
@pytest.mark.thin(10)
@pytest.mark.parametrize(("rows", "stride"), [(1, 1), (7, 1), (9, 1), (41, 1), (15, 2)])
@pytest.mark.parametrize("window", [(3, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("examples", [1, 9])
def test_rows_of_half_a_vector_agree_with_their_twin(rows, stride, window, lanes, examples):
  x, kernels, *rest, strides = made(
    5, (rows, stride * lanes // 2), (7, 19, 6), (3, 3), examples, (None, 0.5, None), True, stride
  )
  if window != (3, 3):
    kernels = [kernel.reshape(*window, *kernel.shape[2:]) for kernel in kernels]
  compare((x, kernels, *rest, strides), (0, lanes))


@needs_native
def test_a_bottleneck_agrees_with_its_twin():
  compare(made(2, (14, 14), (64, 16, 16, 64), (1, 3, 1), 3, (0.9, 0.5, 0.5, 0.7), True, 2), LANES)


@needs_native
def test_under_jit_and_on_eight_devices():
  arguments = made(4, (8, 8), (16, 24, 16), (3, 3), 16, (None, 0.5, None), True, 1)
  compare(
    arguments,
    (0,),
    run=jax.jit(gated_chain, static_argnames=("strides", "relu", "implementation")),
  )
  mesh, per_example = Mesh(np.array(jax.devices()), "n"), PartitionSpec("n")
  assert mesh.size == 8

  def on_devices(x, kernels, biases, gates, shortcut, **settings):
    run = lambda x, gates, shortcut: gated_chain(x, kernels, biases, gates, shortcut, **settings)
    return jax.jit(
      jax.shard_map(
        run, mesh=mesh, in_specs=(per_example,) * 3, out_specs=per_example, check_vma=False
      )
    )(x, gates, shortcut)

  compare(arguments, (0,), run=on_devices)


@needs_native
def test_concurrent_calls_do_not_disturb_each_other():
  cases = [
    made(seed, (8 + seed, 8), (16, 24, 16), (3, 3), 1 + seed % 3, (None, 0.5, None), True, 1)
    for seed in range(6)
  ]
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    alone = [
      gated_chain(*arrays, strides=strides, implementation="native") for *arrays, strides in cases
    ]
    for _ in range(10):
      runs = [
        pool.submit(gated_chain, *arrays, strides=strides, implementation="native")
        for *arrays, strides in cases
      ]
      for run, expected in zip(runs, alone, strict=True):
        np.testing.assert_array_equal(run.result(), expected)


def test_arguments_that_do_not_fit_are_refused():
  x, kernel, bias = IMAGE, ONES, zeros(2)
  for message, call in {
    "x must be": lambda: open_conv(x[0], kernel, bias),
    "of four axes": lambda: open_conv(x, kernel[0], bias),
    r"match the channels .* \(2,\); got \(3,\)": lambda: open_conv(x, ones((3, 3, 3, 2)), bias),
    r"biases\[0\] must be \[2\]": lambda: open_conv(x, kernel, zeros(3)),
    r"gates\[1\] must be \[1, 2\]": lambda: open_conv(x, kernel, bias, out_gates=ones(2)),
    "shortcut must have": lambda: open_conv(x, kernel, bias, x, stride=2),
    "strides must be": lambda: open_conv(x, kernel, bias, stride=0),
    "strides must be .*; got 2$": lambda: gated_chain(x, [kernel], [bias], [None, None], strides=2),
    "weighted must be 1 flags, True or False; got 1$": lambda: gated_chain(
      x, [kernel], [bias], [None, None], weighted=1
    ),
    "weighted must be 1 flags": lambda: gated_chain(
      x, [kernel], [bias], [None, None], weighted=(True, True)
    ),
    r"weighted\[0\] must be False without gates\[1\]": lambda: gated_chain(
      x, [kernel], [bias], [None, None], weighted=(True,)
    ),
    "need a bias and a stride each": lambda: gated_chain(x, [kernel], [bias], [None]),
    "must be float32": lambda: open_conv(x.astype(jnp.bfloat16), kernel, bias),
    "not be empty": lambda: open_conv(x[:, :0], kernel, bias),
  }.items():
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(TypeError, match=r"^biases\[0\] must be an array of real numbers; got 'bias'"):
    open_conv(x, kernel, "bias")


@both
def test_lists_and_numbers_of_numpy_are_taken(implementation):
  expected = open_conv(IMAGE, ONES, zeros(2), out_gates=ones((1, 2)), stride=2)
  y = open_conv(
    np.asarray(IMAGE),
    np.asarray(ONES),
    np.zeros(2, np.float32),
    out_gates=[[1, 1]],
    stride=np.int64(2),
    implementation=implementation,
  )
  np.testing.assert_array_equal(y, expected)


@both
def test_derivatives_are_refused(implementation):
  run = lambda x: open_conv(x, ONES, zeros(2), implementation=implementation).sum()
  with pytest.raises(TypeError, match="for inference and have no derivatives"):
    jax.grad(run)(IMAGE)


def test_a_build_that_failed_is_the_reason_and_is_not_tried_again(monkeypatch):
  tried = []

  def load():
    tried.append(1)
    raise build.NotBuilt("no compiler")

  monkeypatch.setattr(build, "load", load)
  # Its own memory, so that the kernel of other tests stays registered.
  register = functools.cache(native_kernels._register.__wrapped__)
  assert [register(), register()] == ["no compiler"] * 2
  assert len(tried) == 1


def test_without_the_kernel_the_reason_is_named(monkeypatch):
  monkeypatch.setattr(native_kernels, "_register", lambda: "no compiler")
  assert not native_kernels.available()
  with pytest.raises(RuntimeError, match="native kernel is not available: no compiler"):
    open_conv(IMAGE, ONES, zeros(2), implementation="native")
