"""Every multiplication by a kernel that a network makes, noted while it is traced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn

from gating_jax.ops.macs import conv_macs
from gating_jax.types import Path


class Call(NamedTuple):
  """Of a layer that multiplies: its path, its MACs per example, and the input channels of a convolution's filter, else
  0."""

  path: Path
  macs: int
  inputs: int


@contextlib.contextmanager
def kernel_calls() -> Iterator[list[Call]]:
  """A list to which each call of an `nn.Conv`, `nn.Dense` or `nn.DenseGeneral` within the block is added.

  >>> import jax
  >>> with kernel_calls() as calls:
  ...   _ = jax.eval_shape(nn.Dense(3, name="d").init, jax.random.key(0), jax.ShapeDtypeStruct((5, 4), float))
  >>> calls
  [Call(path=(), macs=12, inputs=0)]
  """
  calls = []

  def note(next_fun, args, kwargs, context):
    y, module = next_fun(*args, **kwargs), context.module
    if isinstance(module, (nn.Conv, nn.Dense)) and context.method_name == "__call__":
      kernel = module.get_variable("params", "kernel").shape
      calls.append(
        Call(
          module.path, conv_macs(kernel, y.shape), kernel[-2] if isinstance(module, nn.Conv) else 0
        )
      )
    if isinstance(module, nn.DenseGeneral):
      calls.append(Call(module.path, math.prod(module.get_variable("params", "kernel").shape), 0))
    return y

  with nn.intercept_methods(note):
    yield calls
