"""Contexts of gates: the numbers about an example from which a gate network decides.

    context = [part_1, part_2, ...],   such as "glance+pooled"

The parts `pooled`, `moments` and `grid` describe the map that a gate reads. The parts `glance` and
`told` describe the whole example: a network computes them once, and passes them to its gates.

Axes: N examples, H and W pixels, D channels, S sources of images.
Reference: Verelst and Tuytelaars, 2020, and Hussein et al., 2020 (a light view of the input decides
  what to run); Hu et al., "Squeeze-and-excitation networks", 2018 (pooled).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.ops import arguments
from gating_jax.types import Array

# Parts of the map that a gate reads, and parts that the network computes once for all gates.
MAP_PARTS = ("pooled", "moments", "grid")
SHARED_PARTS = ("glance", "told")
PARTS = (*MAP_PARTS, *SHARED_PARTS)
# Name of the module `Glance` in a network: its parameters belong to the gates.
GLANCE_NAME = "glance"
# Sides of the grid of means and of a glance's thumbnail, and channels of a glance.
GRID, THUMBNAIL, _FEATURES = 2, 8, 8
# Numbers that each part of the map has for a channel. The first numbers of all channels come first,
# then the second ones.
NUMBERS_PER_CHANNEL = {"pooled": 1, "moments": 2, "grid": GRID**2}
# Keep deviations of flat maps away from 0, where a square root has no slope.
LEAST_VARIANCE, LEAST_DEVIATION = 1e-4, 0.1
# The deviation that `moments` has for a map of equal values.
FLAT_DEVIATION = LEAST_VARIANCE**0.5

# The parts that a network has computed, `[N, ...]` each, by name.
Shared = Mapping[str, Array]
NOTHING_SHARED: Shared = MappingProxyType({})


def context_of(x: Array, parts: Sequence[str], shared: Shared = NOTHING_SHARED) -> Array:
  """Computes the context of the gates that read a map.

      pooled    mean over pixels
      moments   mean and standard deviation over pixels, sqrt(variance + 1e-4)
      grid      means of the four quarters of the map
      glance, told    as the network has computed them

  Args:
    x: `[N, ..., D]` float32 features.
    parts: some of `PARTS`.
    shared: the parts that the network has computed.
  Returns:
    `[N, context]`, the parts one after the other.
  Raises:
    ValueError: a map without pixels has no quarters, or the network has not computed a part.
  """
  pixels, found = tuple(range(1, x.ndim - 1)), []
  for part in parts:
    if x.ndim < 4 and part in ("moments", "grid"):
      raise ValueError(f"gate context {part!r} needs maps [N, ..., H, W, D]; got shape {x.shape}")
    if part in SHARED_PARTS:
      found.append(shared_part(shared, part))
    elif part == "grid":
      found.append(grid_means(image_of(x), GRID).reshape(x.shape[0], -1))
    else:
      mean = jnp.mean(x, axis=pixels)
      found.append(mean)
      if part == "moments":
        variance = jnp.mean(jnp.square(x - jnp.expand_dims(mean, pixels)), axis=pixels)
        found.append(jnp.sqrt(variance + np.float32(LEAST_VARIANCE)))
  return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


def shared_part(shared: Shared, part: str) -> Array:
  """Returns a part of the context that the network computes once for all gates, `[N, ...]`.

  Raises:
    ValueError: the network has not computed it.
  """
  if part not in shared:
    raise ValueError(
      f"gate context {part!r} must be computed by the network that has the gates; this one does not"
    )
  return shared[part]


class Glance(nn.Module):
  """A light look at the whole example, `[N, H, W, D]` images or clips to `[N, 8]`.

      t = thumbnail of 8 x 8 pixels, (t - mean) / (deviation + 0.1)
      glance = mean over pixels of ReLU(BN(conv t)),   3 x 3, stride 2, D to 8 channels

  Means are per channel, and the deviation from them is over all pixels and channels. Images may
  have any size; a clip is the mean of its frames. Computed in float32.
  """

  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    arguments.real_array("x", x)
    if x.ndim not in (4, 5):
      raise ValueError(f"a glance needs images or clips; got shape {x.shape}")
    h = nn.Conv(_FEATURES, (3, 3), (2, 2), padding=1, use_bias=False, name="conv")(
      standardised_thumbnail(x)
    )
    h = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm"
    )(h)
    return jnp.mean(nn.relu(h), axis=(1, 2))


def standardised_thumbnail(x: Array) -> Array:
  """Computes t of `Glance`, `[N, 8, 8, D]` in float32, of images or clips."""
  # A decision must not depend on the rounding of bfloat16.
  thumbnail = grid_means(image_of(x.astype(jnp.float32)), THUMBNAIL)
  centred = thumbnail - jnp.mean(thumbnail, axis=(1, 2), keepdims=True)
  # A flat thumbnail has no deviation; the square root's slope there is infinite.
  variance = jnp.mean(jnp.square(centred), axis=(1, 2, 3), keepdims=True)
  deviation = jnp.sqrt(variance + np.float32(LEAST_VARIANCE))
  return centred / (deviation + np.float32(LEAST_DEVIATION))


def shared_context(
  parts: Sequence[str],
  x: Array,
  train: bool,
  *,
  source: Array | None = None,
  sources: int = 0,
  axis_name: str | None = None,
) -> Shared:
  """Computes the parts of its gates' context that a network computes once, inside its `__call__`.

  Args:
    parts: parts of the context; those of `MAP_PARTS` are ignored.
    x: the network's input, `[N, H, W, D]` images or clips.
    train: as of the network.
    source: `[N]` int32, the number of each example's source; None where the network does not know.
    sources: S.
    axis_name: mapped device axis over which BatchNorm takes its statistics.
  Raises:
    ValueError: `told` is among the parts, and there is no source.
  """
  shared = {}
  if "glance" in parts:
    shared["glance"] = Glance(axis_name, name=GLANCE_NAME)(x, train)
  if "told" in parts:
    if source is None:
      raise ValueError("gate context 'told' needs a network with sources; got sources 0")
    shared["told"] = jax.nn.one_hot(source, sources, dtype=jnp.float32)
  return shared


def image_of(x: Array) -> Array:
  """Returns images as they are, and clips `[N, F, H, W, D]` as the mean of their frames."""
  return jnp.mean(x, axis=1) if x.ndim == 5 else x


def grid_means(x: Array, side: int, *, precision: str | None = None) -> Array:
  """Computes the means of `[N, h, w, D]` over the cells of a grid, `[N, side, side, D]`.

  Cell i of h rows covers rows `floor(i h / side)` to `ceil((i + 1) h / side) - 1`, as in torch's
  adaptive average pooling; no cell is empty. `precision` is that of `jax.lax.Precision`.

  >>> grid_means(jnp.arange(3.0).reshape(1, 1, 3, 1), 2)[0, 0, :, 0]
  Array([0.5, 1.5], dtype=float32)
  """
  rows = jnp.asarray(cell_weights(x.shape[1], side), x.dtype)
  columns = jnp.asarray(cell_weights(x.shape[2], side), x.dtype)
  return jnp.einsum("nhwd,ih,jw->nijd", x, rows, columns, precision=precision)


def cell_weights(size: int, side: int) -> np.ndarray:
  """Returns `[side, size]`: the weight of each pixel in each cell's mean."""
  i, at = np.arange(side)[:, None], np.arange(size)
  # -(-a // b) is the ceiling of a / b.
  inside = (at >= i * size // side) & (at < -(-(i + 1) * size // side))
  return inside / inside.sum(axis=1, keepdims=True)
