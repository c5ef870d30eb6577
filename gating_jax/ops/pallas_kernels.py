"""Convolutions that skip closed blocks of channels per example: a Pallas kernel and two JAX twins.

One function in three forms, for inference: *masked*, dense and multiplied by the gates, which
defines the result; *dispatched*, which gathers each block's examples; and *gated*, the kernel,
which has no gradient.

The kernel is for Pallas' Triton backend on GPUs, which has what it needs and TPUs lack: masked
loads at computed places, and a closed block whose loads are skipped together with its dots. (JAX
deprecates that backend from 0.11 on; 0.12 has it.) No patches are formed in memory: each tap of a
window is a dot of shifted rows (implicit im2col). Without a GPU the kernel is interpreted, slowly:
use the dispatched form there.

Axes: N examples, H and W pixels, D input and E output channels, C hidden ones, B adjacent channels
per gate.
Reference: Tillet et al., "Triton: an intermediate language and compiler for tiled neural network
  computations", 2019; Riquelme et al., "Scaling vision with sparse mixture of experts", 2021
  (dispatch with static capacity).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from gating_jax.ops import arguments
from gating_jax.ops.compaction import open_indices
from gating_jax.types import Array

# Smallest side of a dot in Triton.
_SMALLEST_DOT = 16


class Branch(NamedTuple):
  """The branch of a residual block, with BatchNorm folded into its two convolutions.

  Attributes:
    kernel1, bias1: `[h, w, D, C]` with odd h and w, and `[C]`.
    kernel2, bias2: `[h, w, C, E]` and `[E]`.
  """

  kernel1: Array
  bias1: Array
  kernel2: Array
  bias2: Array


class Tiles(NamedTuple):
  """The part of the output that one program of the kernel computes.

  All numbers but `stages` are powers of two. Other tiles give the same results up to rounding. Of
  the seven that `benchmarks/kernels.py` tries, the defaults were fastest most often on an H200, in
  bfloat16.

  Attributes:
    pixels: of one example.
    outputs, inputs: channels at most, since a gate's channels are whole tiles.
    warps, stages: of Triton.
  """

  pixels: int = 64
  outputs: int = 128
  inputs: int = 64
  warps: int = 4
  stages: int = 3


DEFAULT_TILES = Tiles()


def gated_branch(
  branch: Branch,
  x: Array,
  gates: Array,
  *,
  stride: int = 1,
  precision: lax.PrecisionLike = None,
  tiles: Tiles = DEFAULT_TILES,
  interpret: bool | None = None,
) -> Array:
  """Computes the branch of a block with gated hidden channels, by the kernel.

      y = conv2(h) + bias2,   h = g * ReLU(conv1(x) + bias1)

  Closed channels are not computed, written or read.

  Args:
    branch: of x's dtype.
    x: `[N, H, W, D]`, float32 or bfloat16; sums are in float32.
    gates: `[N, C / B]`, each of B adjacent hidden channels. A block is open where its gate is above
      0, and multiplied by it.
    stride: of the first convolution. Both have symmetric padding.
    precision: of the dots, as in `jax.lax.dot`. For float32 on a GPU the default is TF32, as for
      XLA's convolutions.
    tiles: see `Tiles`.
    interpret: None for interpret mode wherever there is no GPU.
  Returns:
    `[N, H', W', E]`, of x's dtype.
  Raises:
    ValueError: shapes that do not fit together, or blocks too small for a GPU's dots.
    TypeError: an argument of another kind.

  >>> branch = Branch(jnp.ones((1, 1, 2, 4)), jnp.zeros(4), jnp.ones((1, 1, 4, 1)), jnp.ones(1))
  >>> gated_branch(branch, jnp.ones((2, 1, 1, 2)), jnp.array([[1.0, 0.0], [0.0, 0.0]])).ravel()
  Array([5., 1.], dtype=float32)
  """
  branch, x, gates = _checked_branch(branch, x, gates)
  call = functools.partial(_gated_conv, precision=precision, tiles=tiles, interpret=interpret)
  # Closed hidden blocks hold whatever was in memory: the second call does not read them.
  hidden = call(x, branch.kernel1, branch.bias1, out_gates=gates, stride=stride, relu=True)
  return call(hidden, branch.kernel2, branch.bias2, in_gates=gates, stride=1, relu=False)


def masked_branch(
  branch: Branch, x: Array, gates: Array, *, stride: int = 1, precision: lax.PrecisionLike = None
) -> Array:
  """Computes `gated_branch` by dense convolutions, with hidden channels multiplied by their gates.

  Arguments are as there.
  """
  branch, x, gates = _checked_branch(branch, x, gates)
  hidden = _masked_conv(
    x, branch.kernel1, branch.bias1, out_gates=gates, stride=stride, relu=True, precision=precision
  )
  return _masked_conv(hidden, branch.kernel2, branch.bias2, precision=precision)


def dispatched_branch(
  branch: Branch,
  x: Array,
  gates: Array,
  *,
  capacity: int | None = None,
  stride: int = 1,
  precision: lax.PrecisionLike = None,
) -> Array:
  """Computes `gated_branch` in plain JAX, block by block on the examples that open it.

      y_n = bias2 + sum over blocks b with g_nb > 0 of conv2_b(g_nb ReLU(conv1_b(x_n) + bias1_b))

  A mixture of experts works in the same way.

  Args:
    branch, x, gates, stride, precision: as there.
    capacity: number of examples, from 1 to N, that are gathered and computed per block; None for N.
      If more examples open a block, `masked_branch` computes everything, so the result is always
      right.
  Raises:
    ValueError, TypeError: as there, or a capacity out of range.
  """
  branch, x, gates = _checked_branch(branch, x, gates)
  capacity = len(x) if capacity is None else capacity
  arguments.whole_number("capacity", capacity, 0)
  if not 1 <= capacity <= len(x):
    raise ValueError(f"capacity must be from 1 to the {len(x)} examples of x; got {capacity}")
  dispatch = functools.partial(_dispatch, capacity=capacity, stride=stride, precision=precision)
  # No block can have more open examples, so the check at run time is not needed.
  if capacity == len(x):
    return dispatch(branch, x, gates)
  masked = functools.partial(masked_branch, stride=stride, precision=precision)
  fits = jnp.max(jnp.sum(gates > 0, axis=0)) <= capacity
  return lax.cond(fits, dispatch, masked, branch, x, gates)


def _masked_conv(
  x: Array,
  kernel: Array,
  bias: Array,
  *,
  out_gates: Array | None = None,
  stride: int = 1,
  relu: bool = False,
  precision: lax.PrecisionLike = None,
) -> Array:
  """Computes one convolution on all channels.

  y = g_out * act(conv(x) + bias),   act = ReLU or identity
  """
  y = _conv(x, kernel, stride=stride, precision=precision)
  y = y + bias.astype(jnp.float32)[None, None, None]
  y = jnp.maximum(y, 0) if relu else y
  if out_gates is not None:
    y = y * _per_channel(jnp.where(out_gates > 0, out_gates, 0).astype(jnp.float32), y.shape[-1])
  return y.astype(x.dtype)


# The sum over blocks of `dispatched_branch`, where no block has more than `capacity` open examples.
def _dispatch(
  branch: Branch, x: Array, gates: Array, *, capacity: int, stride: int, precision
) -> Array:
  blocks = gates.shape[1]

  def split(a, axis):
    """Cuts an axis into the blocks' parts, `[blocks, ...]`."""
    parts = (*a.shape[:axis], blocks, a.shape[axis] // blocks, *a.shape[axis + 1 :])
    return jnp.moveaxis(a.reshape(parts), axis, 0)

  def add_block(y, block):
    """Adds a block's output on its open examples to y `[N, H, W, C]`, as `lax.scan` needs it."""
    kernel1, bias1, kernel2, of_examples = block
    # The examples that open this block; the padding is dropped below.
    index, taken = open_indices(of_examples, capacity=capacity)
    hidden = _masked_conv(
      x[index],
      kernel1,
      bias1,
      out_gates=of_examples[index, None],
      stride=stride,
      relu=True,
      precision=precision,
    )
    place = jnp.where(taken, index, len(x))
    return y.at[place].add(_conv(hidden, kernel2, precision=precision), mode="drop"), None

  height, width = _out_size(x, stride)
  # Sums are in float32 and begin with bias2, as in the equation.
  start = jnp.broadcast_to(
    branch.bias2.astype(jnp.float32), (len(x), height, width, len(branch.bias2))
  )
  # A scan and not a loop in Python: the program's size does not grow with the blocks.
  of_blocks = split(branch.kernel1, 3), split(branch.bias1, 0), split(branch.kernel2, 2), gates.T
  y, _ = lax.scan(add_block, start, of_blocks)
  return y.astype(x.dtype)


class _Statics(NamedTuple):
  """Numbers and functions that a program of the kernel is compiled for.

  Attributes:
    size: H and W of x.
    out_width: W'.
    window: height and width.
    stride, relu, precision: as in `_gated_conv`.
    pixels, inputs, outputs: of a tile.
    pixel_tiles: of one example.
    tiles_per_gate: tiles of output channels that share a gate.
    load, store: of the backend.
  """

  size: tuple[int, int]
  out_width: int
  window: tuple[int, int]
  stride: int
  relu: bool
  precision: lax.PrecisionLike
  pixels: int
  inputs: int
  outputs: int
  pixel_tiles: int
  tiles_per_gate: int
  load: Callable
  store: Callable


def _gated_conv(
  x,
  kernel,
  bias,
  *,
  in_gates=None,
  out_gates=None,
  stride,
  relu,
  precision,
  tiles,
  interpret,
):
  """Computes one convolution by the kernel, on open blocks only.

      y = g_out * act(conv(x) + bias),   x taken as 0 where g_in is closed, act = ReLU or identity

  Closed input blocks are not read, and closed output blocks are not written. `in_gates` choose what
  is read and multiply nothing, since x is a gated layer's output.
  """
  # Imported here: the other forms work with a JAX that lacks this backend.
  from jax.experimental.pallas import triton

  if any(value < 1 or value & (value - 1) for value in tiles[:4]):
    raise ValueError(f"tiles must be powers of two; got {tiles}")
  interpret = jax.default_backend() != "gpu" if interpret is None else interpret
  (n, h, w, d), e = x.shape, kernel.shape[-1]
  height, width = _out_size(x, stride)
  inputs = _tile("in_gates", in_gates, channels=d, most=tiles.inputs, interpret=interpret)
  outputs = _tile("out_gates", out_gates, channels=e, most=tiles.outputs, interpret=interpret)
  if out_gates is None:
    out_gates = jnp.ones((n, 1), jnp.float32)
  # Tiles of input channels: open ones come first in the order in which a program reads them.
  open_tiles = jnp.ones((n, pl.cdiv(d, inputs)), bool)
  if in_gates is not None:
    open_tiles = jnp.repeat(in_gates > 0, d // in_gates.shape[1] // inputs, axis=1)
  pixel_tiles, out_tiles = pl.cdiv(height * width, tiles.pixels), pl.cdiv(e, outputs)
  statics = _Statics(
    size=(h, w),
    out_width=width,
    window=kernel.shape[:2],
    stride=stride,
    relu=relu,
    precision=precision,
    pixels=tiles.pixels,
    inputs=inputs,
    outputs=outputs,
    pixel_tiles=pixel_tiles,
    tiles_per_gate=out_tiles // out_gates.shape[1],
    load=functools.partial(triton.load, other=0.0),
    store=triton.store,
  )
  y = pl.pallas_call(
    functools.partial(_program, statics=statics),
    jax.ShapeDtypeStruct((n, height * width, e), x.dtype),
    grid=(n * pixel_tiles, out_tiles),
    interpret=interpret,
    name="gated_conv",
    # Interpret mode takes no parameters of Triton.
    compiler_params=None
    if interpret
    else triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
  )(
    jnp.sum(open_tiles, axis=1, dtype=jnp.int32),
    _open_first(open_tiles),
    out_gates.astype(jnp.float32),
    # Pixels on one axis, and taps on one axis: the kernel addresses both by one number.
    x.reshape(n, h * w, d),
    kernel.reshape(-1, d, e),
    bias,
  )
  return y.reshape(n, height, width, e)


def _program(
  count_ref, order_ref, gates_ref, x_ref, kernel_ref, bias_ref, y_ref, *, statics: _Statics
):
  """Computes one tile of pixels of one example and one tile of its output channels."""
  s = statics
  (h, w), (_, d, e) = s.size, kernel_ref.shape
  n = _quotient(pl.program_id(0), s.pixel_tiles)
  first = _remainder(pl.program_id(0), s.pixel_tiles) * s.pixels
  pixel = first + jnp.arange(s.pixels, dtype=jnp.int32)
  channel = pl.program_id(1) * s.outputs + jnp.arange(s.outputs, dtype=jnp.int32)
  # The input pixel in the middle of the window of each output pixel.
  row = _quotient(pixel, s.out_width) * s.stride
  column = _remainder(pixel, s.out_width) * s.stride
  gate = gates_ref[n, _quotient(pl.program_id(1), s.tiles_per_gate)]
  taps = s.window[0] * s.window[1]
  # The last tiles may reach beyond the image and the channels, so every access is masked.
  place = y_ref.at[n, pixel[:, None], channel[None, :]]
  inside = (pixel < y_ref.shape[1])[:, None] & (channel < e)[None, :]

  def add_tap(i, total):
    """Adds to the tile's sum `[pixels, outputs]` step i: one tap and one open input block."""
    # Taps are innermost, since they read the same rows up to a shift.
    step, tap = _quotient(i, taps), _remainder(i, taps)
    k = order_ref[n, step] * s.inputs + jnp.arange(s.inputs, dtype=jnp.int32)
    y = row + _quotient(tap, s.window[1]) - s.window[0] // 2
    x = column + _remainder(tap, s.window[1]) - s.window[1] // 2
    # Zeros outside the image are the symmetric padding.
    in_image = (y >= 0) & (y < h) & (x >= 0) & (x < w) & (pixel < y_ref.shape[1])
    rows = s.load(
      x_ref.at[n, (y * w + x)[:, None], k[None, :]], mask=in_image[:, None] & (k < d)[None, :]
    )
    weights = s.load(
      kernel_ref.at[tap, k[:, None], channel[None, :]],
      mask=(k < d)[:, None] & (channel < e)[None, :],
    )
    return total + jnp.dot(rows, weights, preferred_element_type=jnp.float32, precision=s.precision)

  # A closed block's loads and dots are skipped, not masked: this is where time is saved.
  @pl.when(gate > 0)
  def _():
    start = jnp.zeros((s.pixels, s.outputs), jnp.float32)
    total = lax.fori_loop(0, count_ref[n] * taps, add_tap, start)
    total += s.load(bias_ref.at[channel], mask=channel < e).astype(jnp.float32)[None, :]
    total = (jnp.maximum(total, 0) if s.relu else total) * gate
    s.store(place, total.astype(y_ref.dtype), mask=inside)


def _quotient(number: Array, by: int) -> Array:
  """Divides int32 numbers that are not negative.

  `//` would handle signs as well.
  """
  return lax.div(number, np.int32(by))


def _remainder(number: Array, by: int) -> Array:
  return lax.rem(number, np.int32(by))


def _open_first(open_tiles: Array) -> Array:
  """Returns the numbers of the tiles, `[N, T]`, with open ones first.

  It compares all pairs, which XLA fuses; a sort would need further kernels.
  """
  number = jnp.arange(open_tiles.shape[1], dtype=jnp.int32)
  # Unique keys: all open tiles before all closed ones, each in their order.
  key = jnp.where(open_tiles, number, number + len(number))
  rank = jnp.sum(key[:, :, None] > key[:, None, :], axis=2, dtype=jnp.int32)
  of_rank = jnp.where(rank[:, :, None] == number[None, None], number[:, None], 0)
  return jnp.sum(of_rank, axis=1, dtype=jnp.int32)


def _tile(name: str, gates: Array | None, *, channels: int, most: int, interpret: bool) -> int:
  """Returns the channels of a tile.

  It is a power of two that divides the gates' blocks, or that covers ungated channels.
  """
  if gates is None:
    return min(most, max(_SMALLEST_DOT, pl.next_power_of_2(channels)))
  block = channels // gates.shape[1]
  # `block & -block` is the largest power of two that divides the block.
  tile = min(most, block & -block)
  if tile < _SMALLEST_DOT and not interpret:
    raise ValueError(
      f"{name} must have a multiple of {_SMALLEST_DOT} channels per gate on a GPU; got {block}"
    )
  return tile


def _conv(
  x: Array, kernel: Array, *, stride: int = 1, precision: lax.PrecisionLike = None
) -> Array:
  y = lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(size // 2, size // 2) for size in kernel.shape[:2]],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision,
  )
  return y.astype(jnp.float32)


def _out_size(x: Array, stride: int) -> tuple[int, int]:
  return -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _per_channel(gates: Array, channels: int) -> Array:
  return jnp.repeat(gates, channels // gates.shape[1], axis=1)[:, None, None, :]


def _checked_branch(branch, x, gates):
  arguments.instance(
    "branch", branch, Branch, rule="a Branch: the kernels and biases of two convolutions"
  )
  for name, array in (("x", x), ("gates", gates)):
    arguments.real_array(name, array)
  branch, x = jax.tree.map(jnp.asarray, (branch, x))
  gates = jnp.asarray(gates, jnp.float32)
  _check_conv(x, branch.kernel1, branch.bias1, out_gates=gates)
  # Only the hidden features' shape and type are checked; nothing is computed.
  hidden = jax.ShapeDtypeStruct((*x.shape[:-1], len(branch.bias1)), x.dtype)
  _check_conv(hidden, branch.kernel2, branch.bias2, in_gates=gates)
  return branch, x, gates


def _check_conv(x, kernel, bias, *, in_gates=None, out_gates=None) -> None:
  if x.ndim != 4 or not x.size or x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
      f"x must be [N, H, W, D], not empty, float32 or bfloat16; got {x.shape}, {x.dtype}"
    )
  if (
    kernel.ndim != 4
    or kernel.shape[2] != x.shape[-1]
    or not all(size % 2 for size in kernel.shape[:2])
  ):
    raise ValueError(
      f"kernel must be [h, w, D, E], h and w odd, D as in x; got {kernel.shape}, x {x.shape}"
    )
  if bias.shape != kernel.shape[-1:] or not kernel.dtype == bias.dtype == x.dtype:
    raise ValueError(
      f"bias must be [E], and kernel and bias must have x's dtype; got {bias.shape}, "
      f"kernel {kernel.shape}, {bias.dtype}, {kernel.dtype}, x {x.dtype}"
    )
  for name, gates, channels in (
    ("in_gates", in_gates, x.shape[-1]),
    ("out_gates", out_gates, kernel.shape[-1]),
  ):
    if gates is not None and (
      gates.ndim != 2 or gates.shape[0] != x.shape[0] or not gates.size or channels % gates.shape[1]
    ):
      raise ValueError(
        f"{name} must be [N, channels / B] for x {x.shape} and {channels} channels; "
        f"got {gates.shape}"
      )
