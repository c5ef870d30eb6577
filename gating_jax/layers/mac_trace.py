"""Recording of the MACs of every convolution and dense layer while a network is traced.

A mixed kernel costs one MAC for each number of all its kernels, and then those of one convolution.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import flax.linen as nn

from gating_jax.layers.conv import MixedConv
from gating_jax.ops.macs import conv_macs
from gating_jax.types import Path


class Call(NamedTuple):
  """One call of a layer with a kernel.

  Attributes:
    path: of the layer.
    macs: MACs per example.
    inputs: input channels of a convolution's filter; 0 for a dense layer.
  """

  path: Path
  macs: int
  inputs: int


def kernel_shape(module: nn.Module) -> tuple[int, ...]:
  """Returns the shape of the kernel of a layer that runs or has run."""
  # It may be in a box that says how it is partitioned over devices.
  return nn.meta.unbox(module.get_variable("params", "kernel")).shape


# Whether calls of layers are collected.
_counts: contextvars.ContextVar[bool] = contextvars.ContextVar("counts", default=True)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
  """Keeps calls in the block out of any list of `kernel_calls`, also of one around it."""
  before = _counts.set(False)
  try:
    yield
  finally:
    _counts.reset(before)


@contextlib.contextmanager
def kernel_calls() -> Iterator[list[Call]]:
  """Yields a list that collects each call of an `nn.Conv`, `nn.Dense`, `nn.DenseGeneral`.

  Those of a `MixedConv` are among them.

  It collects the calls within the `with` block.

  >>> import jax
  >>> with kernel_calls() as calls:
  ...   x = jax.ShapeDtypeStruct((5, 4), float)
  ...   _ = jax.eval_shape(nn.Dense(3, name="d").init, jax.random.key(0), x)
  >>> calls
  [Call(path=(), macs=12, inputs=0)]
  """
  calls = []

  def note(next_fun, args, kwargs, context):
    """Calls a module's method and appends a `Call` for every Conv and Dense."""
    # After the call, the kernel exists and the output's shape is known.
    y, module = next_fun(*args, **kwargs), context.module
    if not _counts.get():
      return y
    if isinstance(module, (nn.Conv, nn.Dense)) and context.method_name == "__call__":
      kernel = kernel_shape(module)
      inputs = kernel[-2] if isinstance(module, nn.Conv) else 0
      calls.append(Call(module.path, conv_macs(kernel, y.shape), inputs))
    if isinstance(module, MixedConv) and context.method_name == "__call__":
      kernels = kernel_shape(module)
      macs = math.prod(kernels) + conv_macs(kernels[1:], y.shape)
      calls.append(Call(module.path, macs, kernels[-2]))
    if isinstance(module, nn.DenseGeneral):
      kernel = kernel_shape(module)
      # It may have any number of axes; every entry is one multiplication per example.
      calls.append(Call(module.path, conv_macs(kernel, (1, 1)), 0))
    return y

  with nn.intercept_methods(note):
    yield calls


def sum_macs(calls: Iterable[Call], where: Callable[[Path], bool] | None = None) -> int:
  """Returns the MACs per example of the calls, or of those whose path fulfils a condition.

  >>> calls = [Call(("conv",), macs=12, inputs=3), Call(("dense",), macs=8, inputs=0)]
  >>> sum_macs(calls), sum_macs(calls, lambda path: path == ("dense",))
  (20, 8)
  """
  return sum(call.macs for call in calls if where is None or where(call.path))
