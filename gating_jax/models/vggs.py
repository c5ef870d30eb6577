"""Chains of convolutions without shortcuts: VGG nets and the SimpleCNN.

Axes: N examples, H and W pixels, D channels.
Reference: Simonyan and Zisserman, 2015 (VGG); Ioffe and Szegedy, 2015; Abati et al., 2020, section
4 (SimpleCNN, used in continual learning).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.context import NOTHING_SHARED, Shared, grid_means, shared_context
from gating_jax.layers.conv import ConvNorm, scaled
from gating_jax.layers.gate import (
  CHANNEL_GATINGS,
  GATE_NAME,
  ChannelGate,
  GatedChannels,
  GateSettings,
  apply_gates,
  check_gate_settings,
  decisions,
)
from gating_jax.ops import arguments
from gating_jax.ops.cpu_convs import max_pool
from gating_jax.ops.macs import channel_macs
from gating_jax.types import Apply, Array, Path, Records

POOL: Final = "pool"
# Names of the dense layers: `hidden1` and so on, then `classifier`.
_HIDDEN, _CLASSIFIER = "hidden", "classifier"
# Channels of each convolution, and `POOL` after those that a max pool follows.
Chain = tuple[int | Literal["pool"], ...]
_VGG16: Chain = (
  *(64, 64, POOL),
  *(128, 128, POOL),
  *(256, 256, 256, POOL),
  *(512, 512, 512, POOL),
  *(512, 512, 512, POOL),
)
VGGS: dict[str, Chain] = {
  "simple_cnn": (100, POOL, 100, POOL, 100),
  "vgg8": (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL),
  "vgg16": _VGG16,
}


class VGG(nn.Module):
  """Chain of convolutions, gated or not, and dense layers.

  `[N, H, W, D]` images, large enough for the chain's pools, to
  `([N, classes] float32 logits, records)`. Every layer is a 3x3 convolution, BatchNorm, ReLU and,
  where the chain says so, a 2x2 max pool; its gate reads the layer's input and switches its output
  channels. The mean over pixels and one dense layer follow, unless `pooled` and `hidden` say
  otherwise.

  Attributes:
    classes: number of outputs; None for the pooled features in place of logits.
    chain: channels of each convolution, before `width`, and `"pool"` after those that a pool
      follows.
    width: multiplies every channel count; each is rounded to the nearest integer, at least 1.
    norm: whether BatchNorm follows each convolution; if not, the convolution has a bias.
    gating: `none` or `channel`.
    gate: settings of the gates.
    dtype, axis_name: as in `ResNet`.
    hidden: widths of dense layers with ReLU before the last one, as (4096, 4096) for ImageNet.
    pooled: parts, along a side, over each of which the last feature map is averaged; 1 for the mean
      over all pixels, 7 for ImageNet. The features of all parts are read as one vector.
    max_map: largest number of pixels, along a side, of the last feature map; None for any. It is 7
      for timm's weights of ImageNet, whose dense layers slide over larger maps.
  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> import jax
  >>> model, x = VGG(classes=10, chain=(8, "pool", 16), gating="channel"), jnp.zeros((2, 8, 8, 3))
  >>> (logits, records), _ = jax.eval_shape(
  ...   lambda: model.init_with_output(jax.random.key(0), x)
  ... )
  >>> logits.shape, [record.gates.shape for record in records]
  ((2, 10), [(2, 8), (2, 16)])
  """

  if TYPE_CHECKING:
    apply: ClassVar[Apply[Array]]

  classes: int | None
  chain: Chain
  width: float = 1.0
  norm: bool = True
  gating: str = "none"
  gate: GateSettings = GateSettings()
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  hidden: tuple[int, ...] = ()
  pooled: int = 1
  max_map: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    arguments.real_array("images", x)
    arguments.whole_number("pooled", self.pooled)
    for width in arguments.items("hidden", self.hidden, "widths of dense layers"):
      arguments.whole_number("each of hidden", width)
    if x.ndim != 4:
      raise ValueError(f"images must be [N, H, W, D]; got shape {x.shape}")
    check_gate_settings("gate", self.gate)
    one_of("gating", self.gating, CHANNEL_GATINGS)
    parts = self.gate.shared_parts if self.gating != "none" else ()
    shared = shared_context(parts, x, train, axis_name=self.axis_name)
    x, records = x.astype(self.dtype), ()
    # `chain` mixes convolutions with pools; layers are numbered by their convolutions alone.
    convs = [(i, channels) for i, channels in enumerate(self.chain) if channels != POOL]
    for number, (i, channels) in enumerate(convs, start=1):
      x, new = VGGLayer(
        features=scaled(channels, self.width),
        pool=POOL in self.chain[i + 1 : i + 2],
        norm=self.norm,
        gating=self.gating,
        gated_input=bool(records),
        readers=self._readers(number, len(convs)),
        gate=self.gate,
        dtype=self.dtype,
        axis_name=self.axis_name,
        name=f"layer{number}",
      )(x, train, shared)
      records += new
    if self.max_map is not None and max(x.shape[1:3]) > self.max_map:
      raise ValueError(
        f"images must leave a last feature map of at most {self.max_map} x {self.max_map} pixels, "
        f"since timm's dense layers slide over larger ones; got {x.shape[1]} x {x.shape[2]}. "
        "model.clone(max_map=None) averages over parts of larger maps, as torchvision does"
      )
    # The mean and the logits are float32, whatever the layers compute in.
    x = x.astype(jnp.float32)
    if self.pooled == 1:
      x = jnp.mean(x, axis=(1, 2))
    else:
      # In full precision also on accelerators, which would round the pixels.
      x = grid_means(x, self.pooled, precision="highest").reshape(x.shape[0], -1)
    return (x if self.classes is None else self._classify(x, self.classes)), records

  @property
  def dense_names(self) -> tuple[str, ...]:
    """Returns the names of the dense layers, in their order; none without classes."""
    if self.classes is None:
      return ()
    return (*(f"{_HIDDEN}{i + 1}" for i in range(len(self.hidden))), _CLASSIFIER)

  def _classify(self, x: Array, classes: int) -> Array:
    """Computes logits from the features, `[N, D]`."""
    *names, last = self.dense_names
    for name, width in zip(names, self.hidden, strict=True):
      x = nn.relu(nn.Dense(width, name=name)(x))
    return nn.Dense(classes, name=last)(x)

  def _readers(self, number: int, last: int) -> tuple[Path, ...]:
    """Returns the paths of the layers that read the output channels of layer `number`."""
    if number < last:
      return ((*self.path, f"layer{number + 1}", "conv", "conv"),)
    # The pooled features are a network's output, which no layer reads; of several parts, each has
    # an input channel of its own.
    if self.classes is None or self.pooled > 1:
      return ()
    return ((*self.path, self.dense_names[0]),)


class VGGLayer(nn.Module):
  """Layer of a `VGG`: 3x3 convolution, BatchNorm, ReLU, pool and gate.

  `[N, H, W, D]` to `([N, H', W', features], records)`.
  """

  features: int
  pool: bool
  norm: bool
  gating: str
  gated_input: bool
  readers: tuple[Path, ...]
  gate: GateSettings
  dtype: jnp.dtype
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Array, train: bool = False, shared: Shared = NOTHING_SHARED
  ) -> tuple[Array, Records]:
    conv = ConvNorm(
      features=self.features,
      window=3,
      dtype=self.dtype,
      axis_name=self.axis_name,
      norm=self.norm,
      name="conv",
    )
    y = nn.relu(conv(x, train))
    # The gate multiplies the pooled map, on fewer pixels: one of 0 or more commutes with a max.
    if self.pool:
      if min(y.shape[1:3]) < 2:
        raise ValueError(
          f"images are too small for the pooling layers: nothing is left after {self.name}, which "
          f"has {y.shape[1]} x {y.shape[2]} pixels; use another model.name or larger images"
        )
      # Odd sides lose their last row or column, as in a pool without padding.
      y = max_pool(y[:, : y.shape[1] // 2 * 2, : y.shape[2] // 2 * 2], (2, 2), (2, 2))
    if self.gating == "none":
      return y, ()
    # With gates, the input channels that are read are those open in the record before.
    inputs = None if self.gated_input else x.shape[-1]
    cost = channel_macs(conv.macs(x.shape), inputs=inputs)
    group = GatedChannels(
      channels=self.features,
      macs_per_channel=cost.alone,
      macs_per_pair=cost.per_pair,
      writers=(conv.writer,),
      readers=self.readers,
    )
    records = ChannelGate((group,), self.gate, self.axis_name, name=GATE_NAME)(x, train, shared)
    return apply_gates(y, records[0].gates), decisions(records, self.gate)


def is_dense_name(name: str) -> bool:
  """Returns whether a module of this name is a dense layer at the end of a network."""
  return name == _CLASSIFIER or name.startswith(_HIDDEN)


def vgg(name: str, classes: int | None, **settings) -> VGG:
  """Builds a named chain: `vgg8`, `vgg16`, or `simple_cnn` with 100 channels a layer.

  Args:
    name: one of `VGGS`.
    classes: number of outputs, or None; see `VGG`.
    **settings: other fields of `VGG`.

  >>> vgg("simple_cnn", 10, width=0.1).chain
  (100, 'pool', 100, 'pool', 100)

  Returns:
    A `VGG`.
  Raises:
    ValueError: an unknown name, or a width that is not positive.
    TypeError: classes, a width or gate settings of another kind.
  """
  one_of("model name", name, VGGS)
  if classes is not None:
    arguments.whole_number("classes", classes)
  arguments.number("width", settings.get("width", 1), "> 0", holds=lambda v: v > 0)
  check_gate_settings("gate", settings.get("gate", GateSettings()))
  return VGG(classes=classes, chain=VGGS[name], **settings)
