"""Weights of 8 bits: integer kernels of convolutions and of the classifier, with scales.

Each output channel has a scale:

    kernel ~ values * scale,   scale = max |kernel| / 127 over an output channel

Computation stays in float32: the file and the memory of the weights shrink. Gate networks and
biases are small and keep their bits, so that rounding reaches a gate only through its input.

Axes: O output channels, the last of a kernel.
Reference: Jacob et al., 2018 (symmetric weights, a scale for each channel as in their section 2.1).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gating_jax.inference.folded import Conv, FoldedNet
from gating_jax.ops.arguments import instance
from gating_jax.types import Array

# The range is symmetric: -128 is not used.
_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A kernel as `[..., O]` int8 values and `[O]` float32 scales."""

  values: Array
  scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of the kernel."""
    return self.values.shape

  @property
  def size(self) -> int:
    """Returns the number of the kernel's elements."""
    return self.values.size


def quantise(net: FoldedNet) -> FoldedNet:
  """Returns the network with `Int8` kernels; `dequantise` it to run it.

  Raises:
    ValueError: kernels that are int8 already.
    TypeError: a network that is not folded.

  Args:
    net: a network of `fold` or `prune`, float32.

  >>> from gating_jax.inference.folding import fold
  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> net = quantise(fold(model, model.init(jax.random.key(0), x)))
  >>> net.classifier[0].values.dtype, dequantise(net).classifier[0].dtype
  (dtype('int8'), dtype('float32'))
  """
  check_folded(net)
  check_float(net)
  parts = jax.tree.map(_quantise_conv, net.parts, is_leaf=_is_conv)
  dense = [(_quantise(kernel), bias) for kernel, bias in net.dense]
  # A classifier is the last of them.
  classifier = None if net.classifier is None else dense.pop()
  return dataclasses.replace(net, parts=parts, hidden=tuple(dense), classifier=classifier)


def dequantise(net: FoldedNet) -> FoldedNet:
  """Returns a network of `quantise` in float32, and any other network as it is.

  Args:
    net: a network of `quantise`, or another one.

  >>> net = FoldedNet(parts=(), classifier=(jnp.ones((3, 2)), jnp.zeros(2)))
  >>> dequantise(quantise(net)).classifier[0].round(3)
  Array([[1., 1.],
         [1., 1.],
         [1., 1.]], dtype=float32)
  """
  return jax.tree.map(_dequantise, net, is_leaf=_is_int8)


def _is_conv(leaf: Any) -> bool:
  """Tests for a convolution, as a leaf of a network."""
  return isinstance(leaf, Conv)


def _is_int8(leaf: Any) -> bool:
  """Tests for a kernel that is int8 already."""
  return isinstance(leaf, Int8)


def check_folded(net: Any) -> None:
  """Raises TypeError unless `net` is a `FoldedNet`."""
  instance("net", net, FoldedNet, rule="a folded network, as returned by fold(model, variables)")


def check_float(net: Any) -> None:
  """Raises ValueError for a network with int8 kernels."""
  if any(map(_is_int8, jax.tree.leaves(net, is_leaf=_is_int8))):
    raise ValueError("net must have float32 kernels, as returned by dequantise; got Int8")


def _quantise_conv(leaf: Any) -> Any:
  """Quantises the kernel of a convolution, and leaves other leaves as they are."""
  # Only the kernels of `Conv`: gate networks are other leaves and stay as they are.
  return dataclasses.replace(leaf, kernel=_quantise(leaf.kernel)) if _is_conv(leaf) else leaf


def _quantise(kernel: Any) -> Int8:
  """Quantises a kernel."""
  # `initial`: the kernel of a pruned branch may have no input channels.
  largest = jnp.max(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1)), keepdims=True, initial=0)
  # A channel of zeros gets scale 1: no division by 0.
  scale = jnp.where(largest > 0, largest, _LARGEST) / _LARGEST
  # The rounded values are within 127 of 0 by the choice of the scale.
  return Int8(jnp.round(kernel / scale).astype(jnp.int8), scale.ravel().astype(jnp.float32))


def _dequantise(leaf: Any) -> Any:
  """Converts an `Int8` kernel to float32, and leaves other leaves as they are."""
  if not _is_int8(leaf):
    return leaf
  scale = leaf.scale.reshape([1] * (leaf.values.ndim - 1) + [-1])
  return leaf.values.astype(jnp.float32) * scale
