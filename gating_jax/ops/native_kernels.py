"""Chains of gated convolutions on a CPU that compute only the open channels of every example.

Each example has its own channel masks, so nothing is gathered over the batch. The native kernel
(C++ in `gating_jax.native`, through JAX's foreign function interface) reads the open rows of the
weights in place, and keeps the hidden channels of a residual branch compact between its
convolutions. It is an optional extra for CPUs: where it is missing, `why_not()` gives the reason.
`masked_chain` computes the same anywhere, in plain JAX: all channels, masked afterwards.

Gates choose what is computed, as [gate > 0]. Those that are marked as weighted also multiply it,
as all do in `gated_branch` of `ops.pallas_kernels`.

Axes: N examples, H and W pixels, I and O channels. Inference only: nothing here can be
differentiated.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter); Georganas et al., "Anatomy of
  high-performance deep learning convolutions on SIMD architectures", 2018 (register tiles).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from gating_jax.checks import shown
from gating_jax.native import build
from gating_jax.types import Array

_TARGET = "gating_jax_gated_chain"
# Lanes of the widest vectors to use; 0 for those of the processor.
_LANES = 0


def available() -> bool:
  """Returns whether the native kernel can run here.

  The first call on a machine builds it, if it is not built yet.
  """
  return not why_not()


def why_not() -> str:
  """Returns why the native kernel cannot run here, and what would help; empty if it can."""
  return _register()


def gated_chain(
  x: Array,
  kernels: Sequence[Array],
  biases: Sequence[Array],
  gates: Sequence[Array | None],
  shortcut: Array | None = None,
  *,
  strides: Sequence[int] | None = None,
  weighted: Sequence[bool] | None = None,
  relu: bool = True,
) -> Array:
  """Computes convolutions with ReLU between, each on the open channels of each example only.

      h_0 = g_0 x,   h_l = g_l ReLU(conv_l(h_(l-1)) + b_l),
      y = act(g_L (conv_L(h_(L-1)) + b_L) + shortcut)

  with g_l = 0 where `gates[l]` is not above 0; elsewhere 1, or `gates[l]` itself where weighted.
  Closed channels are not computed: neither NaN nor infinity in a closed channel reaches y.
  Convolutions are padded with window // 2 zeros on either side. Inside `shard_map` or `pmap` every
  device computes its own examples; `vmap` is not supported: make N larger instead.

  Args:
    x: `[N, H, W, I]` float32.
    kernels: L of `[O, I, h, w]` float32, as `packed` makes them: the layout of the native kernel.
    biases: L of `[O]` float32.
    gates: L + 1 of `[N, channels]`, of any real dtype: those of x, and of each convolution's
      output; None where all channels are open.
    shortcut: `[N, H', W', O]` of the last convolution, added before the last activation; None for
      none.
    strides: L numbers; None for 1 everywhere.
    weighted: L flags, whether the gates of each convolution's output multiply it; None for none of
      them. Those of x only choose.
    relu: whether the last activation is ReLU, or none.
  Returns:
    `[N, H', W', O]` float32.
  Raises:
    ValueError: arguments that do not fit each other.
    RuntimeError: the native kernel is not available; with the reason.
    TypeError: an argument is no array of real numbers; also on differentiation.
  """
  chain, layers = _checked_chain(
    x, kernels, biases, gates=gates, shortcut=shortcut, strides=strides, weighted=weighted
  )
  if not available():
    raise RuntimeError(f"the native kernel is not available: {why_not()}")
  return _not_differentiable(_native, layers, relu=relu, chain=chain)


def masked_chain(
  x: Array,
  kernels: Sequence[Array],
  biases: Sequence[Array],
  gates: Sequence[Array | None],
  shortcut: Array | None = None,
  *,
  strides: Sequence[int] | None = None,
  weighted: Sequence[bool] | None = None,
  relu: bool = True,
) -> Array:
  """Computes `gated_chain` in JAX: all channels, with closed ones replaced by zeros.

  It runs anywhere. Arguments are as there.
  """
  chain, layers = _checked_chain(
    x, kernels, biases, gates=gates, shortcut=shortcut, strides=strides, weighted=weighted
  )
  return _not_differentiable(_masked, layers, relu=relu, chain=chain)


class _Layers(NamedTuple):
  """Settings of each convolution of a chain: its stride, and whether its gates are weights."""

  strides: tuple[int, ...]
  weighted: tuple[bool, ...]


class _Step(NamedTuple):
  """One convolution of a chain; `gate` is that of its output channels."""

  kernel: Array
  bias: Array
  gate: Array | None
  stride: int
  weighted: bool


class _Chain(NamedTuple):
  """The arrays of `gated_chain`."""

  x: Array
  kernels: tuple[Array, ...]
  biases: tuple[Array, ...]
  gates: tuple[Array | None, ...]
  shortcut: Array | None

  def steps(self, layers: _Layers) -> Iterator[_Step]:
    """Yields the convolutions in their order."""
    # The first gate is that of x.
    for fields in zip(self.kernels, self.biases, self.gates[1:], *layers, strict=True):
      yield _Step(*fields)


def _checked_chain(
  x: Array,
  kernels: Sequence[Array],
  biases: Sequence[Array],
  *,
  gates: Sequence[Array | None],
  shortcut: Array | None,
  strides: Sequence[int] | None,
  weighted: Sequence[bool] | None,
) -> tuple[_Chain, _Layers]:
  """Returns the arguments of `gated_chain` as arrays and as settings; raises as it does."""
  strides = _strides((1,) * len(kernels) if strides is None else strides)
  chain = _Chain(
    x=_array("x", x),
    kernels=_arrays("kernels", kernels),
    biases=_arrays("biases", biases),
    gates=_gates(gates),
    shortcut=None if shortcut is None else _array("shortcut", shortcut),
  )
  _check_rank(chain.kernels)
  _check(chain, strides)
  return chain, _Layers(strides, _checked_flags(weighted, chain.gates[1:]))


def _arrays(name: str, values: Sequence[Array]) -> tuple[Array, ...]:
  return tuple(_array(f"{name}[{i}]", value) for i, value in enumerate(values))


def _gates(values: Sequence[Array | None]) -> tuple[Array | None, ...]:
  """Returns the gates, which may have any real type, in the kernel's float32."""
  gates = []
  for i, value in enumerate(values):
    gates.append(None if value is None else _array(f"gates[{i}]", value, jnp.float32))
  return tuple(gates)


def _array(name: str, value: Array, dtype: DTypeLike | None = None) -> Array:
  try:
    return jnp.asarray(value, dtype)
  # Such as a text, or rows of unequal lengths.
  except (TypeError, ValueError):
    raise TypeError(f"{name} must be an array of real numbers; got {shown(value)}") from None


def packed(kernel: Array) -> Array:
  """Returns a kernel `[h, w, I, O]` as `[O, I, h, w]`, for `gated_chain`.

  Under `jit`, a kernel that is a constant is transposed once, when the program is compiled; one
  that is an argument, in every call.
  """
  return jnp.transpose(kernel, (3, 2, 0, 1))


# Both refuse in the same words, although `masked_chain` could be differentiated.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _not_differentiable(compute, layers, relu, chain):
  return compute(layers, relu, chain)


@_not_differentiable.defjvp
def _refuse(compute, layers, relu, primals, tangents):
  raise TypeError(
    "gated_chain and masked_chain are for inference and have no derivatives; train with "
    "gating_jax.layers, which multiply by the gates"
  )


def _masked(layers, relu, chain):
  """Computes all channels in JAX, with closed ones replaced by zeros."""
  x, last = _closed(chain.x, chain.gates[0]), len(chain.kernels) - 1
  for i, step in enumerate(chain.steps(layers)):
    pads = [(size // 2,) * 2 for size in step.kernel.shape[2:]]
    x = lax.conv_general_dilated(
      x,
      step.kernel,
      (step.stride, step.stride),
      pads,
      dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    # The gate comes before the shortcut and ReLU after it, as in the equation of y.
    x = _closed(x + step.bias[None, None, None], step.gate)
    if step.weighted:
      # Closed channels are 0 already; their gates, of any value, do not count.
      x = x * jnp.where(step.gate > 0, step.gate, 0)[:, None, None, :]
    if i == last and chain.shortcut is not None:
      x += chain.shortcut
    x = jax.nn.relu(x) if i < last or relu else x
  return x


def _closed(x: Array, gates: Array | None) -> Array:
  # A choice and not a product, which would let NaN through a closed channel.
  return x if gates is None else jnp.where(gates[:, None, None, :] > 0, x, 0)


def _native(layers, relu, chain):
  """Calls the native kernel."""
  shape = _shape(chain.x, chain.kernels, layers.strides)
  call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(shape, jnp.float32))
  return call(
    # Without the gates and shortcuts that are None: the call takes arrays only.
    *jax.tree.leaves(chain),
    strides=np.array(layers.strides, np.int64),
    # Flags say which of them are there.
    gated=np.array([gate is not None for gate in chain.gates], np.int64),
    weighted=np.array(layers.weighted, np.int64),
    relu=np.int64(relu),
    shortcut=np.int64(chain.shortcut is not None),
    isa=np.int64(_LANES),
  )


def _shape(x, kernels, strides) -> tuple[int, ...]:
  """Returns the shape of the output."""
  n, height, width, _ = x.shape
  for kernel, stride in zip(kernels, strides, strict=True):
    height = _places(height, kernel.shape[2], stride)
    width = _places(width, kernel.shape[3], stride)
  return (n, height, width, kernels[-1].shape[0])


def _places(size: int, window: int, stride: int) -> int:
  """Returns the places of a window along an axis padded by window // 2 on either side."""
  return (size + window // 2 * 2 - window) // stride + 1


def _strides(strides) -> tuple[int, ...]:
  try:
    found = tuple(map(operator.index, strides))
  except TypeError:
    # A value that fails the check below, with its message.
    found = (0,)
  if min(found, default=1) < 1:
    raise ValueError(f"strides must be integers >= 1; got {strides}")
  return found


def _checked_flags(weighted, gates) -> tuple[bool, ...]:
  """Returns a flag for the gates of each convolution's output."""
  if weighted is None:
    return (False,) * len(gates)
  try:
    flags = tuple(weighted)
  except TypeError:
    # A value that fails the check below, with its message.
    flags = ()
  are_flags = all(isinstance(flag, (bool, np.bool_)) for flag in flags)
  if len(flags) != len(gates) or not are_flags:
    raise ValueError(f"weighted must be {len(gates)} flags, True or False; got {shown(weighted)}")
  for i, (flag, gate) in enumerate(zip(flags, gates, strict=True)):
    if flag and gate is None:
      raise ValueError(f"weighted[{i}] must be False without gates[{i + 1}]; got True")
  return tuple(map(bool, flags))


def _check_rank(kernels) -> None:
  if not kernels or any(jnp.ndim(kernel) != 4 for kernel in kernels):
    raise ValueError(
      f"kernels must be one or more of four axes; got shapes {list(map(jnp.shape, kernels))}"
    )


def _check(chain: _Chain, strides: tuple[int, ...]) -> None:
  """Raises an error unless the arguments fit each other."""
  x, kernels, biases, gates, shortcut = chain
  if jnp.ndim(x) != 4:
    raise ValueError(f"x must be [N, H, W, I]; got shape {jnp.shape(x)}")
  count = len(kernels)
  if (len(biases), len(gates), len(strides)) != (count, count + 1, count):
    raise ValueError(
      f"{count} kernels need a bias and a stride each, and {count + 1} gates (or None each); "
      f"got {len(biases)} biases, {len(gates)} gates, {len(strides)} strides"
    )
  # Channels between the steps of the chain: those of x, then the outputs of every kernel.
  shapes = [kernel.shape for kernel in kernels]
  channels = (x.shape[3], *(outputs for outputs, *_ in shapes))
  if (inputs := tuple(inputs for _, inputs, *_ in shapes)) != channels[:-1]:
    raise ValueError(
      "input channels of kernels must match the channels of x and of the kernel before, "
      f"{channels[:-1]}; got {inputs}"
    )
  if 0 in x.shape[1:] or any(0 in shape for shape in shapes):
    raise ValueError(f"x and kernels must not be empty; got {x.shape}, {shapes}")
  out = _shape(x, kernels, strides)
  for i, bias in enumerate(biases):
    size = channels[i + 1]
    if jnp.shape(bias) != (size,):
      raise ValueError(f"biases[{i}] must be [{size}]; got shape {jnp.shape(bias)}")
  for i, gate in enumerate(gates):
    size = channels[i]
    if gate is not None and jnp.shape(gate) != (x.shape[0], size):
      raise ValueError(
        f"gates[{i}] must be [{x.shape[0]}, {size}] or None; got shape {jnp.shape(gate)}"
      )
  if shortcut is not None and jnp.shape(shortcut) != out:
    raise ValueError(f"shortcut must have the output's shape {out}; got {jnp.shape(shortcut)}")
  others = {}
  # Gates have been converted already.
  for name, tree in chain._replace(gates=())._asdict().items():
    for leaf in jax.tree.leaves(tree):
      if leaf.dtype != jnp.float32:
        others[name] = str(leaf.dtype)
  if others:
    raise ValueError(f"x, kernels, biases and shortcut must be float32; got {others}")


# Remembers a failure too: a build that failed is not tried again in this process.
@functools.cache
def _register() -> str:
  """Makes the kernel known to JAX, once; returns the reason if that is not possible."""
  try:
    library = build.load()
  except build.NotBuilt as error:
    return str(error)
  jax.ffi.register_ffi_target(
    _TARGET, jax.ffi.pycapsule(library.gating_jax_gated_chain), platform="cpu"
  )
  return ""
