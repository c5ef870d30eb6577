"""Importance of a trained network's units: what a start of gates, or static pruning, goes by.

    importance of unit c = mean activity of c * norm of what reads c

The activity is what the reading layers see, with every gate open; the norm is that of their
kernels' weights for this input channel. From these numbers `with_prior` begins gates that choose
the same units for all examples, and `select_units` takes the most important units of a network into
a narrower one.

Axes: M images, U units of a record, D input channels, O output channels.
Reference: Li et al., "Pruning filters for efficient ConvNets", 2017 (norms of kernels); Hu et al.,
  "Network trimming", 2016 (activity); Blom, "Statistical estimates and transformed beta-variables",
  1958 (normal scores).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.scipy import special

from gating_jax.layers.gate import GAIN, PRIOR, THRESHOLD, ChannelGate
from gating_jax.ops import arguments
from gating_jax.ops.quantiles import open_threshold
from gating_jax.types import AnyArray, Array, Path, Records

# Factor of normal scores in a prior.
SCALE = 2.0
# Images of one forward pass.
_BATCH = 64


class UnitImportance(NamedTuple):
  """The importance of the units of one record.

  Attributes:
    gate, writers, readers: paths, as in `GateRecord`.
    values: `[U]`, 0 or more.

  >>> UnitImportance(("block1", "gate"), (), (), np.array([0.5, 2.0])).most(1)
  array([1])
  """

  gate: Path
  writers: tuple[Path, ...]
  readers: tuple[Path, ...]
  values: np.ndarray

  def most(self, count: int) -> np.ndarray:
    """Returns the indices of the `count` most important units, ascending; earlier ones of equals.

    Raises:
      ValueError: there are fewer units.
    """
    if not 0 <= count <= len(self.values):
      raise ValueError(f"count must be in 0 .. {len(self.values)}; got {count}")
    return np.sort(np.argsort(-self.values, kind="stable")[:count])


def unit_importance(
  model: nn.Module, variables: Mapping[str, Any], images: AnyArray
) -> tuple[UnitImportance, ...]:
  """Computes the importance of the units of a gated network, one entry for each record.

      importance_c = sum over readers of (mean over images and pixels |x_c|) * ||W_c||_2

  Args:
    model: a network with gates of channels, called as `model(x)`.
    variables: its variables; those of its gates do not count.
    images: `[M, ...]`, as the network reads them.
  Returns:
    A `UnitImportance` for each record, whose values are `[U]` for its U units.
  Raises:
    ValueError: gates without a layer that reads their units, as of whole blocks or of block
      outputs; no images; or a network without gates.

  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4, 5), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> found = unit_importance(model, jax.jit(model.init)(jax.random.key(0), x), x)
  >>> [(unit.gate, unit.values.shape) for unit in found]
  [(('layer1', 'gate'), (4,)), (('layer2', 'gate'), (5,))]
  """
  arguments.real_array("images", images)
  if not len(images):
    raise ValueError("images must hold at least one image; got none")
  described = describe_units(model, variables, images)
  run = jax.jit(lambda variables, x: _pass(model, variables, x)[1])
  # Sums, since the last batch may be smaller.
  sums: dict[Path, np.ndarray] = collections.defaultdict(lambda: np.zeros(()))
  for first in range(0, len(images), _BATCH):
    batch = jnp.asarray(images[first : first + _BATCH])
    for path, activity in run(variables, batch).items():
      sums[path] = sums[path] + len(batch) * np.asarray(activity, np.float64)
  found = []
  for units in described:
    total = np.zeros(())
    for reader in units.readers:
      kernel = _kernel(variables, reader)
      total = total + sums[reader] / len(images) * np.sqrt(np.sum(kernel**2, axis=_other(kernel)))
    # The channels of a gate are adjacent.
    each = total.reshape(len(units.values), -1).sum(axis=1)
    found.append(units._replace(values=each))
  return tuple(found)


def describe_units(
  model: nn.Module, variables: Mapping[str, Any], images: Any
) -> tuple[UnitImportance, ...]:
  """Returns the units of a gated network as if all had the importance 1; computes nothing.

  Args:
    model, variables: as in `unit_importance`; arrays or their shapes.
    images: images, or their shape as a `jax.ShapeDtypeStruct`.
  Raises:
    ValueError: as in `unit_importance`.
  """
  one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
  records, _ = jax.eval_shape(lambda variables, x: _pass(model, variables, x), variables, one)
  if not records:
    raise ValueError("model must have gates of channels; got one without gates")
  found = []
  for record in records:
    if not record.readers:
      raise ValueError(
        "model must have gates of channels that certain layers read; those of "
        f"{'/'.join(record.gate)} are read by none"
      )
    ones = np.ones(record.gates.shape[-1])
    found.append(UnitImportance(record.gate, record.writers, record.readers, values=ones))
  return tuple(found)


def with_prior(
  variables: Mapping[str, Any],
  importance: Sequence[UnitImportance],
  *,
  scale: float = SCALE,
  gain: float = 0.0,
  share: float = 1.0,
) -> dict[str, Any]:
  """Returns variables whose gates begin as static pruning by importance would be.

      prior = scale * Phi^-1((rank - 1/2) / U),   ranks 1 to U of a record, most important last

  The normal scores of a layer do not depend on how its importance is distributed. Thresholds that
  are quantiles begin where they open that fraction by the prior alone. The argument is not changed.

  Args:
    variables: those of a network whose gates have `prior=True`.
    importance: of its units.
    scale: of the scores, > 0; the larger, the further most gates are from changing their mind.
    gain: that of the gates at first, >= 0. With 0 they are the same for all examples.
    share: fraction in (0, 1] that is open at first.
  Raises:
    ValueError: a number out of range, or gates without a prior.

  >>> from gating_jax.layers.gate import GateSettings
  >>> from gating_jax.models.vggs import VGG
  >>> gate = GateSettings(prior=True, threshold="quantile", share=0.5, noise_scale=0.0)
  >>> model, x = VGG(3, (4,), gating="channel", gate=gate), jnp.ones((2, 6, 6, 1))
  >>> variables = jax.jit(model.init)(jax.random.key(0), x)
  >>> found = unit_importance(model, variables, x)
  >>> begun = with_prior(variables, found, share=0.5)
  >>> (record,) = jax.jit(model.apply)(begun, x)[1]
  >>> bool((record.gates[0] > 0).nonzero()[0].tolist() == found[0].most(2).tolist())
  True
  """
  arguments.number("scale", scale, "> 0", holds=lambda v: v > 0)
  arguments.number("gain", gain, ">= 0", holds=lambda v: v >= 0)
  flat: dict[Path, Any] = traverse_util.flatten_dict(dict(variables))
  # The records of one gate network are a part of its units each.
  priors: dict[Path, list[np.ndarray]] = collections.defaultdict(list)
  for units in importance:
    priors[units.gate].append(scale * _normal_scores(units.values))
  for gate, parts in priors.items():
    prior = np.concatenate(parts).astype(np.float32)
    own = ("params", *gate)
    if (*own, PRIOR) not in flat or flat[*own, PRIOR].shape != prior.shape:
      raise ValueError(
        f"variables must have a prior for each of {len(prior)} gates at {'/'.join(gate)}, those of "
        "prior=True"
      )
    flat[*own, PRIOR] = jnp.asarray(prior)
    flat[*own, GAIN] = jnp.full(prior.shape, gain, jnp.float32)
    if ("batch_stats", *gate, THRESHOLD) in flat:
      flat["batch_stats", *gate, THRESHOLD] = open_threshold(jnp.asarray(prior)[None], share=share)
  return traverse_util.unflatten_dict(flat)


def select_units(
  variables: Mapping[str, Any], importance: Sequence[UnitImportance], narrower: Any
) -> dict[str, Any]:
  """Returns the variables of a narrower network: the most important units of a wider one.

  This is static pruning: each layer keeps as many units as the narrower network has.

  Args:
    variables: those of the wider network; gates may be among them, and are left out.
    importance: of its units.
    narrower: variables of the narrower network, without gates, or their shapes.
  Returns:
    variables with the tree of `narrower`.
  Raises:
    ValueError: the networks differ in more than the numbers of these units; the message names the
      first variable.

  >>> from gating_jax.models.vggs import VGG
  >>> x = jnp.ones((2, 6, 6, 1))
  >>> wide = VGG(classes=3, chain=(4,), gating="channel")
  >>> variables = jax.jit(wide.init)(jax.random.key(0), x)
  >>> shapes = jax.eval_shape(VGG(classes=3, chain=(2,)).init, jax.random.key(0), x)
  >>> kept = select_units(variables, unit_importance(wide, variables, x), shapes)
  >>> kept["params"]["layer1"]["conv"]["conv"]["kernel"].shape
  (3, 3, 1, 2)
  """
  flat: dict[Path, Any] = traverse_util.flatten_dict(dict(variables))
  wanted: dict[Path, Any] = traverse_util.flatten_dict(dict(narrower))
  for units in importance:
    channels, count = None, None
    for writer in units.writers:
      # The convolution and the normalisation that follows it have the same parent.
      for path in flat:
        if path[1 : len(writer)] == writer[:-1] and path in wanted:
          width = flat[path].shape[-1]
          if channels is None:
            size = width // len(units.values)
            count = wanted[path].shape[-1] // size
            channels = _channels(units.most(min(count, len(units.values))), size)
          flat[path] = flat[path][..., channels]
    for reader in units.readers:
      path = ("params", *reader, "kernel")
      if channels is not None and path in flat:
        flat[path] = flat[path][..., channels, :]
  kept = {}
  for path, leaf in wanted.items():
    got = flat[path].shape if path in flat else "none"
    if got != leaf.shape:
      raise ValueError(
        f"the narrower network must differ in units alone; {'/'.join(path)} has shape {leaf.shape} "
        f"there, and {got} is left here"
      )
    kept[path] = jnp.asarray(flat[path])
  return traverse_util.unflatten_dict(kept)


def _pass(
  model: nn.Module, variables: Mapping[str, Any], x: Array
) -> tuple[Records, dict[Path, Array]]:
  """Runs a network with every gate open.

  Returns:
    its records, and the mean activity `[D]` of the input channels of each layer, by path.
  """
  activities = {}

  def note(next_fun, args, kwargs, context):
    """Opens gates, and keeps the activity of what convolutions and dense layers read."""
    module = context.module
    if context.method_name == "__call__":
      if isinstance(module, ChannelGate):
        records = next_fun(*args, **kwargs)
        return tuple(dataclasses.replace(r, gates=jnp.ones_like(r.gates)) for r in records)
      if isinstance(module, (nn.Conv, nn.Dense)) and args:
        inputs = jnp.asarray(args[0]).astype(jnp.float32)
        activities[module.path] = jnp.mean(jnp.abs(inputs), axis=tuple(range(inputs.ndim - 1)))
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(note):
    outputs: Any = model.apply(variables, x)
  return outputs[1], activities


def _kernel(variables: Mapping[str, Any], layer: Path) -> np.ndarray:
  """Returns the kernel of a layer, `[..., D, O]`, in float64."""
  node: Any = variables["params"]
  for name in (*layer, "kernel"):
    node = node[name]
  return np.asarray(node, np.float64)


def _other(kernel: np.ndarray) -> tuple[int, ...]:
  """Returns the axes of a kernel but that of its input channels, the last but one."""
  return tuple(axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2)


def _normal_scores(values: np.ndarray) -> np.ndarray:
  """Returns Phi^-1((rank - 1/2) / U) of `[U]` values; equal ones rank by their place, first best.

  The best of equals are those that `UnitImportance.most` takes.
  """
  order = np.argsort(-values, kind="stable")
  ranks = np.empty(len(values))
  ranks[order] = np.arange(len(values), 0, -1)
  return np.asarray(special.ndtri(jnp.asarray((ranks - 0.5) / len(values), jnp.float32)))


def _channels(units: np.ndarray, size: int) -> np.ndarray:
  """Returns the channels of units of `size` adjacent ones, in their order."""
  return (units[:, None] * size + np.arange(size)).reshape(-1)
