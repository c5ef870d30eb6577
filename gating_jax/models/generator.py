"""Small image generator and its critic, for memories of past tasks.

Axes: N examples, Z latent values, H and W pixels, D colour channels, C feature channels.
Reference: Radford et al., "Unsupervised representation learning with deep convolutional generative
adversarial networks", 2016; Odena et al., "Deconvolution and checkerboard artifacts", 2016
(upsampling before a convolution).
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.gate import (
  CHANNEL_GATINGS,
  GATE_NAME,
  ChannelGate,
  GatedChannels,
  GateSettings,
  apply_gates,
  decisions,
)
from gating_jax.ops.cpu_convs import convolve_doubled, convolve_images
from gating_jax.ops.macs import channel_macs, plain_conv
from gating_jax.types import Array, Path, Records

# Sides from here on are halved; so the smallest map has at least 4, the critic's window.
_SMALLEST_SIDE = 8
# Window of the generator's convolutions.
_WINDOW = (3, 3)
# Without normalisation, only the initial weights keep the features' scale through the ReLUs.
_INITIAL = nn.initializers.he_normal()


class Generator(nn.Module):
  """Generator of images from latent values and labels.

  `[N, Z]` standard normal values and `[N]` labels to `([N, H, W, D] pixels in (-1, 1), records)`:

      h_1 = g_1 ReLU(Dense [z, one-hot label]),   h_(i+1) = g_(i+1) ReLU(conv(up(h_i))),
      pixels = tanh(conv(up(h_last)))

  with 3x3 convolutions and `up` doubling each side. The first map has the sides of the image,
  halved as long as they are even and at least 8: 7 x 7 for 28 x 28, 4 x 4 for 32 x 32. There is no
  normalisation, so a channel depends only on its own filter and on the open channels before it.

  Attributes:
    shape: `(H, W, D)`; H and W are even and at least 8.
    classes: number of labels that the images are conditional on.
    latent: Z.
    width: channels of the last hidden map; they double with each halving.
    gating: `none`, or `channel`: a gate network at every hidden map, which reads the input of the
      map.
    gate: settings of the gates.
    axis_name: mapped device axis over which gates take their statistics and examples are numbered.
  """

  shape: tuple[int, int, int]
  classes: int
  latent: int = 64
  width: int = 16
  gating: str = "none"
  gate: GateSettings = GateSettings()
  axis_name: str | None = None

  @nn.compact
  def __call__(self, z: Array, labels: Array, train: bool = False) -> tuple[Array, Records]:
    if z.ndim != 2 or z.shape[1] != self.latent:
      raise ValueError(f"z must be [N, {self.latent}] to match latent; got shape {z.shape}")
    h = jnp.concatenate([z, jax.nn.one_hot(labels, self.classes, dtype=z.dtype)], axis=-1)
    height, width, colours = self.shape
    maps = _maps(self.shape, self.width)
    records: Records = ()
    for i, size in enumerate(maps, start=1):
      # The pixel layer has no gates: its MACs all belong to the last map's gate.
      pixels = (1, height, width, colours) if i == len(maps) else None
      # Records name the layer that reads the gated channels, as in the tree of parameters.
      reader = (*self.path, "pixels") if i == len(maps) else (*self.path, f"map{i + 1}", "filters")
      hidden = _Hidden(
        size=size,
        pixels=pixels,
        reader=reader,
        gating=self.gating,
        gate=self.gate,
        axis_name=self.axis_name,
        name=f"map{i}",
      )
      h, new = hidden(h, train)
      records += new
    # Real images are scaled to [-1, 1] too.
    return jnp.tanh(_doubling(colours, "pixels")(h)), records


class Critic(nn.Module):
  """Critic that scores images, higher for real ones.

  `[N, H, W, D]` pixels in [-1, 1] and `[N]` labels to `[N]` scores:

      h_1 = LeakyReLU(conv x),  h_(i+1) = LeakyReLU(conv h_i),   score = Dense(h_last)

  with 4x4 convolutions of stride 2. There is no normalisation: an image's score must not depend on
  the others, because of the gradient penalty.

  Attributes:
    classes: number of labels that the score is conditional on, each with its own Dense.
    width: channels of the first map; they double with each halving. There are as many halvings as
      in `Generator`.
  """

  classes: int
  width: int = 16

  @nn.compact
  def __call__(self, x: Array, labels: Array) -> Array:
    for i, (*_, features) in enumerate(reversed(_maps(x.shape[1:], self.width)), start=1):
      # Leaky, so that the generator gets a gradient through every unit of the critic.
      x = nn.leaky_relu(_halving(features, f"conv{i}")(x), 0.2)
    # One output per class; an image is scored by the output of its label.
    scores = nn.Dense(self.classes, name="score")(x.reshape(x.shape[0], -1))
    return jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]


class _Hidden(nn.Module):
  """One hidden map of a `Generator` and its gate.

  Attributes:
    size: height, width and channels of the map.
    pixels: output shape of the pixel layer, where that reads this map; else None.
    reader: path of the layer that reads this map.
  """

  size: tuple[int, int, int]
  pixels: tuple[int, int, int, int] | None
  reader: Path
  gating: str
  gate: GateSettings
  axis_name: str | None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> tuple[Array, Records]:
    one_of("gating", self.gating, CHANNEL_GATINGS)
    height, width, features = self.size
    from_latents = x.ndim == 2
    if from_latents:
      filters = nn.DenseGeneral(self.size, kernel_init=_INITIAL, name="filters")
    else:
      filters = _doubling(features, "filters")
    y = nn.relu(filters(x))
    if self.gating == "none":
      return y, ()
    cost = channel_macs(
      # A dense layer makes every pixel of the first map.
      plain_conv(() if from_latents else _WINDOW, (1, height, width, features)),
      # A channel of the first map reads the latent values, whatever is open; a later one the open
      # channels of the map before, whose record comes just before this one.
      inputs=x.shape[-1] if from_latents else None,
      read=plain_conv(_WINDOW, self.pixels) if self.pixels else None,
      outputs=self.pixels[-1] if self.pixels else None,
    )
    group = GatedChannels(
      channels=features,
      macs_per_channel=cost.alone,
      macs_per_pair=cost.per_pair,
      writers=(filters.path,),
      readers=(self.reader,),
    )
    records = ChannelGate((group,), self.gate, self.axis_name, name=GATE_NAME)(x, train)
    return apply_gates(y, records[0].gates), decisions(records, self.gate)


def _maps(shape: Sequence[int], width: int) -> list[tuple[int, int, int]]:
  """Returns height, width and channels of the hidden maps, smallest first."""
  height, across, _ = shape
  maps = []
  while min(height, across) >= _SMALLEST_SIDE and height % 2 == across % 2 == 0:
    height, across = height // 2, across // 2
    # Collected from the image inwards, so the largest map has `width` channels.
    maps.insert(0, (height, across, width * 2 ** len(maps)))
  if not maps:
    raise ValueError(
      f"images must have even sides of at least {_SMALLEST_SIDE}; got shape {tuple(shape)}"
    )
  return maps


def _doubling(features: int, name: str) -> nn.Conv:
  """Builds a 3x3 convolution of its input enlarged to twice its sides."""

  def convolve(x, kernel, *strides_and_padding, **defaults):
    """Convolves the enlarged map, which is never built: the small one is read."""
    return convolve_doubled(x, kernel)

  return nn.Conv(features, _WINDOW, kernel_init=_INITIAL, conv_general_dilated=convolve, name=name)


def _halving(features: int, name: str) -> nn.Conv:
  """Builds a 4x4 convolution of stride 2."""

  def convolve(x, kernel, strides, padding, **defaults):
    """Convolves, and ignores options of XLA's convolution that have their default."""
    return convolve_images(x, kernel, strides, padding=padding)

  return nn.Conv(
    features,
    (4, 4),
    (2, 2),
    padding=1,
    kernel_init=_INITIAL,
    conv_general_dilated=convolve,
    name=name,
  )
