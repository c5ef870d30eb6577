"""Residual network whose last stage is a mixture of experts.

Axes: N examples, D channels.
Reference: Jacobs et al., 1991; Shazeer et al., 2017; see `layers.experts`.
"""

from __future__ import annotations

import flax.linen as nn

from gating_jax.layers.experts import Experts
from gating_jax.models.resnet import ResNet
from gating_jax.types import Array, Records


class ExpertNet(ResNet):
  """Residual network with several copies of its last stage, weighted by a gate.

  `[N, H, W, D]` images or clips to `([N, classes] float32 logits, records)`, with one record, that
  of the experts. Each expert is a last stage with its own parameters; all experts read the same
  input, the feature map of the stages before.

  Attributes:
    experts: number of experts.
    top_k: number of experts that contribute for an example; None for all.

  >>> from gating_jax.models.summary import model_summary
  >>> from gating_jax.models.resnet import resnet
  >>> model_summary(resnet("resnet20", 10, kind=ExpertNet, experts=3), (32, 32, 3)).gate_layers
  (('stage3', 3),)
  """

  experts: int = 4
  top_k: int | None = None

  def _stage(
    self, x: Array, train: bool, stage: int, stride: int, dilation: int
  ) -> tuple[Array, Records]:
    if self.gating != "none":
      raise ValueError(f"gating must be none in a network of experts; got {self.gating!r}")
    # Only the last stage has experts; the others are those of `ResNet`.
    if stage + 1 < len(self.blocks):
      return super()._stage(x, train, stage, stride, dilation)
    # Without a parent, since the blocks belong to the experts and not to this network.
    block = lambda number: self._block(stage, number, stride, dilation, parent=None, name=None)
    experts = tuple(
      Chain(tuple(block(i) for i in range(self.blocks[stage])), parent=None)
      for _ in range(self.experts)
    )
    return Experts(experts, self.top_k, self.gate, self.axis_name, name=f"stage{stage + 1}")(
      x, train
    )


class Chain(nn.Module):
  """Sequence of ungated blocks, each called as `block(x, train)` and returning `(y, ())`."""

  blocks: tuple[nn.Module, ...]

  def __call__(self, x: Array, train: bool) -> Array:
    for block in self.blocks:
      # Without gates a block's records are empty.
      x, _ = block(x, train)
    return x
