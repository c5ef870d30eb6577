"""A residual network for images with a classifier after every stage: an image leaves at the first that is sure.

Axes: N examples, X exits before the last, K classes, D channels.
Reference: Teerapittayanon, McDanel and Kung, "BranchyNet: fast inference via early exiting from deep neural networks",
2016.
"""

from __future__ import annotations

from collections.abc import Hashable

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.layers.conv import ConvNorm
from gating_jax.layers.mac_trace import kernel_calls
from gating_jax.models.resnet import ResNet
from gating_jax.ops import confidence
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.types import Array, GateRecord, Records


class EarlyExitNet(ResNet):
  """`[N, H, W, D]` images to `([N, K] float32 logits, records)`, those of the exit at which each image leaves.

  With `train=True` it returns the logits of all exits, `[N, X + 1, K]`, the network's own the last, since training fits
  all of them. Either way all of it is computed, and there is a record for each exit before the last: its one unit is
  what follows up to the next exit, which an open gate runs. Gates are never drawn: `logits` say how far the entropy of
  every exit so far is above the threshold, see `ops.exits.stay_logits`, and no gradient reaches the network from the
  records. Parameters are those of the `ResNet` of the same name, with `exit1` and so on beside them.

  Attributes:
    threshold: share of the largest entropy, in (0, 1), below which an exit is taken.

  >>> from gating_jax.models.summary import count
  >>> from gating_jax.models.resnet import resnet
  >>> count(resnet("resnet20", 10, kind=EarlyExitNet), (32, 32, 3)).gate_layers
  (('exit1', 1), ('exit2', 1))
  """

  threshold: float = 0.3

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    if self.classes is None or len(self.blocks) < 2 or self.gating != "none" or x.ndim != 4:
      raise ValueError(
        "a network with exits must have classes, two stages, gating='none' and images [N, H, W, D]; got "
        f"classes {self.classes}, blocks {self.blocks}, gating {self.gating!r}, shape {x.shape}"
      )
    x, answers, macs = self._stem(x, train), [], []
    for stage, (stride, dilation) in enumerate(zip(*self.resolution(x), strict=True)):
      with kernel_calls() as calls:
        x, _ = self._stage(x, train, stage, stride, dilation)
        last = stage + 1 == len(self.blocks)
        answers.append(self._head(x) if last else self._exit(stage + 1)(x, train))
      macs.append(sum(call.macs for call in calls))
    answers = jnp.stack(answers, axis=1)
    stay = confidence.stay_logits(jax.lax.stop_gradient(answers[:, :-1]), self.threshold)
    records = tuple(
      GateRecord(
        part,
        jax.nn.sigmoid(part),
        threshold_gate(part),
        cost,
        gate=(*self.path, f"exit{i}", "classifier"),
      )
      for i, (part, cost) in enumerate(
        zip(jnp.split(stay, stay.shape[1], axis=1), macs[1:], strict=True), start=1
      )
    )
    return (answers if train else confidence.first_sure(answers, stay)), records

  def _exit(self, number: int) -> nn.Module:
    return Exit(
      self.classes,
      self._channels(2**number),
      self.dtype,
      self.axis_name,
      self.group_norm,
      name=f"exit{number}",
    )


class Exit(nn.Module):
  """A 3x3 convolution of stride 2, ReLU, the mean over pixels and a dense layer: `[N, h, w, D]` to `[N, classes]`."""

  classes: int
  features: int
  dtype: jnp.dtype
  axis_name: Hashable | None
  group_norm: bool

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = ConvNorm(
      self.features, 3, 2, self.dtype, self.axis_name, group_norm=self.group_norm, name="conv"
    )
    x = jnp.mean(nn.relu(conv(x, train)).astype(jnp.float32), axis=(1, 2))
    return nn.Dense(self.classes, name="classifier")(x)
