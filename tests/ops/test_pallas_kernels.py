import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from gating_jax.ops import pallas_kernels
from gating_jax.ops.pallas_kernels import Branch, Tiles

FORMS = {
  "kernel": pallas_kernels.gated_branch,
  "masked": pallas_kernels.masked_branch,
  "dispatched": pallas_kernels.dispatched_branch,
  "dispatched to one": functools.partial(pallas_kernels.dispatched_branch, capacity=1),
}
SKIPPING = ("kernel", "dispatched")
# N, H, W, D, C, B, E, stride: partial tiles in pixels and in every kind of channels; N = 1; the
# block sizes of hardware.
SHAPES = {
  "odd": (3, 7, 11, 5, 24, 8, 20, 1),
  "stride 2": (2, 9, 8, 40, 32, 16, 33, 2),
  "blocks of 64": (2, 4, 4, 16, 128, 64, 16, 1),
  "blocks of 128, one example": (1, 3, 3, 8, 256, 128, 130, 1),
  "one pixel, one gate, no power of two": (4, 1, 1, 3, 12, 12, 1, 1),
}


def problem(shape, dtype=jnp.float32, window=3):
  n, h, w, d, c, _, e, _ = shape
  rng = np.random.default_rng(0)
  draw = lambda scale, *shape: jnp.asarray(rng.normal(0, scale, shape), dtype)
  branch = Branch(
    draw((window * window * d) ** -0.5, window, window, d, c),
    draw(1, c),
    draw((window * window * c) ** -0.5, window, window, c, e),
    draw(1, e),
  )
  return branch, draw(1, n, h, w, d)


def by_loops(branch, x, gates, stride):
  """Computes the branch in numpy's float64, pixel by pixel."""

  def conv(x, kernel, stride):
    top, left = (size // 2 for size in kernel.shape[:2])
    padded = np.pad(x, [(0, 0), (top, top), (left, left), (0, 0)])
    rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    at = lambda i, j: padded[:, i : i + kernel.shape[0], j : j + kernel.shape[1]]
    return np.stack(
      [np.stack([np.einsum("nhwd,hwde->ne", at(i, j), kernel) for j in columns], 1) for i in rows],
      1,
    )

  kernel1, bias1, kernel2, bias2, x, gates = (
    np.asarray(a, np.float64) for a in (*branch, x, gates)
  )
  per_channel = np.repeat(gates, len(bias1) // gates.shape[1], axis=1)[:, None, None, :]
  return conv(per_channel * np.maximum(conv(x, kernel1, stride) + bias1, 0), kernel2, 1) + bias2


def drawn_gates(shape, seed=1):
  """Makes open and closed gates, not only 0 and 1; the first example has both."""
  n, _, _, _, c, b, _, _ = shape
  rng = np.random.default_rng(seed)
  gates = np.float32(rng.integers(0, 2, (n, c // b)) * rng.uniform(0.2, 1, (n, c // b)))
  gates[0, :1], gates[0, 1:2] = 0.5, 0
  return gates


@functools.cache
def compiled(form, stride):
  return jax.jit(functools.partial(FORMS[form], stride=stride))


# One example of 1 x 2 pixels, the second -1 times the first; two hidden blocks of two channels. By
# hand, h of the blocks at pixel 0 is ReLU(2 - 1, 2 + 1), ReLU(4 - 1, -2 + 1) = (1, 3), (3, 0), and
# at pixel 1 (0, 0), (0, 3);
# y adds 1 h1 + 10 h2 + 100 h3 + 1000 h4 to 0.5.
array = functools.partial(jnp.array, dtype=jnp.float32)
HAND = Branch(
  array([[[[2.0, 2, 4, -2]]]]),
  array([-1.0, 1, -1, 1]),
  array([[[[1.0], [10], [100], [1000]]]]),
  array([0.5]),
)
VALUES = {
  (0.0, 0.0): (0.5, 0.5),
  (1.0, 0.0): (31.5, 0.5),
  (0.0, 1.0): (300.5, 3000.5),
  (1.0, 1.0): (331.5, 3000.5),
  (0.5, 1.0): (316.0, 3000.5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", VALUES)
def test_values_by_hand(form, gates):
  y = compiled(form, 1)(HAND, array([[[[1.0], [-1.0]]]]), array([gates]))
  np.testing.assert_allclose(y.ravel(), VALUES[gates], rtol=1e-6)


@pytest.mark.thin(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_are_those_of_loops(form, shape):
  (branch, x), gates = problem(shape), drawn_gates(shape)
  expected = by_loops(branch, x, gates, shape[-1])
  assert np.abs(expected - by_loops(branch, x, np.ones_like(gates), shape[-1])).max() > 0.01
  y = compiled(form, shape[-1])(branch, x, gates)
  assert (y.shape, y.dtype) == (expected.shape, jnp.float32)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@given(st.data())
@pytest.mark.parametrize("form", [form for form in FORMS if form != "masked"])
@pytest.mark.parametrize("name", ["odd", "blocks of 64", "blocks of 128, one example"])
def test_any_gates_give_what_masking_gives(form, name, data):
  shape = SHAPES[name]
  branch, x = problem(shape)
  n, blocks = shape[0], shape[4] // shape[5]
  some = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=n * blocks, max_size=n * blocks)
  gates = data.draw(st.one_of(st.sampled_from([[0.0] * n * blocks, [1.0] * n * blocks]), some))
  gates = np.float32(gates).reshape(n, blocks)
  np.testing.assert_allclose(
    compiled(form, 1)(branch, x, gates),
    compiled("masked", 1)(branch, x, gates),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["odd", "stride 2"])
def test_bfloat16_sums_in_float32(form, name):
  shape = SHAPES[name]
  (branch, x), gates = problem(shape, jnp.bfloat16), drawn_gates(shape)
  y = compiled(form, shape[-1])(branch, x, gates)
  assert y.dtype == jnp.bfloat16
  # bfloat16 has 8 bits: h and y are rounded, and in the dispatched form each block's share of y.
  np.testing.assert_allclose(
    y.astype(np.float32), by_loops(branch, x, gates, shape[-1]), rtol=2**-6, atol=2**-6
  )


@pytest.mark.parametrize("form", FORMS)
def test_without_jit(form):
  (branch, x), gates = problem(SHAPES["odd"]), drawn_gates(SHAPES["odd"])
  np.testing.assert_allclose(
    FORMS[form](branch, x, gates), compiled(form, 1)(branch, x, gates), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("form", FORMS)
def test_windows_of_one_pixel(form):
  branch, x = problem(SHAPES["odd"], window=1)
  gates = drawn_gates(SHAPES["odd"])
  np.testing.assert_allclose(
    compiled(form, 1)(branch, x, gates), by_loops(branch, x, gates, 1), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("form", SKIPPING)
def test_what_is_closed_is_not_looked_at(form):
  """The weights of a block that no example opens are NaN; interpreted, unwritten memory is too."""
  shape = SHAPES["blocks of 64"]
  branch, x = problem(shape)
  gates = np.float32([[0, 1], [0, 0.5]])
  spoilt = branch._replace(
    kernel1=branch.kernel1.at[..., :64].set(jnp.nan),
    bias1=branch.bias1.at[:64].set(jnp.nan),
    kernel2=branch.kernel2.at[:, :, :64].set(jnp.nan),
  )
  y = compiled(form, 1)(spoilt, x, gates)
  np.testing.assert_allclose(y, by_loops(branch, x, gates, 1), rtol=1e-4, atol=1e-5)
  assert np.isnan(compiled("masked", 1)(spoilt, x, gates)).any()


def test_a_dispatch_of_too_little_capacity_is_masked_and_right():
  (branch, x), gates = problem(SHAPES["odd"]), np.ones((3, 3), np.float32)
  run = lambda capacity: jax.jit(
    functools.partial(pallas_kernels.dispatched_branch, capacity=capacity)
  )
  for capacity in (1, 2, 3):
    np.testing.assert_allclose(
      run(capacity)(branch, x, gates), by_loops(branch, x, gates, 1), rtol=1e-4, atol=1e-5
    )
  gates[1:, 0] = (
    0  # the others still overflow 1 and 2, but a capacity of 1 would do for the first block
  )
  np.testing.assert_allclose(
    run(1)(branch, x, gates), by_loops(branch, x, gates, 1), rtol=1e-4, atol=1e-5
  )
  conv_sizes = run(2).lower(branch, x, gates).as_text()
  # It is the gathered examples that the blocks' convolutions see.
  assert "tensor<2x7x11x5xf32>" in conv_sizes


@pytest.mark.parametrize(
  "tiles", [Tiles(pixels=16), Tiles(outputs=4, inputs=2), Tiles(128, 64, 64, 8, 2)]
)
def test_tiles_change_nothing_but_rounding(tiles):
  (branch, x), gates = problem(SHAPES["odd"]), drawn_gates(SHAPES["odd"])
  y = jax.jit(functools.partial(pallas_kernels.gated_branch, tiles=tiles))(branch, x, gates)
  np.testing.assert_allclose(y, by_loops(branch, x, gates, 1), rtol=1e-4, atol=1e-5)


# From jax 0.11 on.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_kernel_lowers_to_triton_without_a_gpu(dtype, stride):
  """Without a GPU the test only checks that Triton supports every operation of the kernel."""
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  branch = Branch(shape(3, 3, 40, 256), shape(256), shape(3, 3, 256, 100), shape(100))
  run = jax.jit(functools.partial(pallas_kernels.gated_branch, interpret=False, stride=stride))
  gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
    lowered = run.trace(
      branch, shape(8, 15, 15, 40), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    ).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("__gpu$xla.gpu.triton") == 2


def test_errors_name_the_argument():
  branch, x = problem(SHAPES["odd"])
  gates = jnp.ones((3, 3))
  for message, form, (b, x_, g), options in (
    (
      r"out_gates must be \[N, channels / B\].* 24 ch.* got \(3, 5\)",
      "kernel",
      (branch, x, gates[:, [0] * 5]),
      {},
    ),
    (r"out_gates .*got \(2, 3\)", "masked", (branch, x, gates[:2]), {}),
    (r"x must be .*int32", "kernel", (branch, x.astype(jnp.int32), gates), {}),
    (
      r"kernel must be .*\(3, 3, 5, 24\), x \(3, 7, 11, 4\)",
      "masked",
      (branch, x[..., :4], gates),
      {},
    ),
    (
      r"kernel must be .*\(2, 3",
      "kernel",
      (branch._replace(kernel1=branch.kernel1[:2]), x, gates),
      {},
    ),
    (r"bias must be \[E\]", "masked", (branch._replace(bias2=branch.bias1), x, gates), {}),
    (r"kernel and bias must have x's dtype", "kernel", (branch, x.astype(jnp.bfloat16), gates), {}),
    (
      r"capacity must be from 1 to the 3 examples of x; got 4",
      "dispatched",
      (branch, x, gates),
      {"capacity": 4},
    ),
    (r"tiles must be powers of two", "kernel", (branch, x, gates), {"tiles": Tiles(pixels=48)}),
    (
      r"multiple of 16 channels per gate on a GPU; got 8",
      "kernel",
      (branch, x, gates),
      {"interpret": False},
    ),
  ):
    with pytest.raises(ValueError, match=message):
      FORMS[form](b, x_, g, **options)
