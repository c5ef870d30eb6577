"""Residual networks with another end: exits at which images leave, or a mixture of experts.

Axes: N examples, X exits before the last, K classes, D channels.
Reference: Teerapittayanon, McDanel and Kung, "BranchyNet: fast inference via early exiting from
deep neural networks", 2016; Jacobs et al., 1991, and Shazeer et al., 2017 (see `layers.experts`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.layers.context import NOTHING_SHARED, Shared
from gating_jax.layers.conv import ConvNorm
from gating_jax.layers.experts import Experts
from gating_jax.layers.mac_trace import kernel_calls, sum_macs
from gating_jax.models.resnets import ResNet, StagePlan
from gating_jax.ops import confidence
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.types import Array, GateRecord, Records


class EarlyExitNet(ResNet):
  """Residual network that answers at the first exit that is sure of its class.

  `[N, H, W, D]` images to `([N, K] float32 logits, records)`: the logits of the exit at which each
  image leaves. Training fits all exits, whose logits are those of the method `all_exits`:

      model.apply(variables, x, train=True, method="all_exits", mutable=["batch_stats"])

  Everything is computed in both cases.

  There is one record for each exit before the last. Its single unit is the part of the network up
  to the next exit, which runs where the gate is open. Gates are never drawn: `logits` say how far
  the entropy of every exit so far is above the threshold (see `ops.confidence.stay_logits`). No
  gradient reaches the network from the records. The parameters are those of the `ResNet` of the
  same name, and `exit1`, `exit2` and so on.

  Attributes:
    threshold: fraction of the largest entropy, in (0, 1), below which an exit is taken.
  Raises:
    TypeError, ValueError: when called, as `ResNet`; or no classes, a single stage, other gates, or
      clips.

  >>> from gating_jax.models.summary import model_summary
  >>> from gating_jax.models.resnets import resnet
  >>> model_summary(resnet("resnet20", 10, kind=EarlyExitNet), (32, 32, 3)).gate_layers
  (('exit1', 1), ('exit2', 1))
  """

  classes: int
  threshold: float = 0.3

  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    answers, records = self.all_exits(x, train)
    stay = jnp.concatenate([record.logits for record in records], axis=1)
    return confidence.first_sure(answers, stay), records

  @nn.compact
  def all_exits(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    """Returns the logits of all exits, `[N, X + 1, K]`, the network's own last, and the records."""
    if self.classes is None or len(self.blocks) < 2 or self.gating != "none" or x.ndim != 4:
      # An exit needs classes and a stage after it; its own gates would be a second kind of record.
      raise ValueError(
        "a network with exits must have classes, two stages, gating='none' and images "
        "[N, H, W, D]; got "
        f"classes {self.classes}, blocks {self.blocks}, gating {self.gating!r}, shape {x.shape}"
      )
    x, answers, macs = self._stem(x, train), [], []
    for stage in self.plan(x):
      # A stage and the exit after it are one unit of cost: both run if the image stays.
      with kernel_calls() as calls:
        x, _ = self._stage(x, train, stage)
        is_last = stage.number == len(self.blocks)
        answers.append(self._head(x) if is_last else self._exit(stage.number)(x, train))
      macs.append(sum_macs(calls))
    answers = jnp.stack(answers, axis=1)
    # The exits are trained by their own losses; a penalty on the records must not change them.
    stay = confidence.stay_logits(jax.lax.stop_gradient(answers[:, :-1]), threshold=self.threshold)
    records = []
    for i, logits in enumerate(jnp.split(stay, stay.shape[1], axis=1), start=1):
      record = GateRecord(
        logits=logits,
        probs=jax.nn.sigmoid(logits),
        gates=threshold_gate(logits),
        # Exit i decides on the stage after it; the first stage always runs.
        macs_per_unit=macs[i],
        gate=(*self.path, f"exit{i}", "classifier"),
      )
      records.append(record)
    return answers, tuple(records)

  def _exit(self, number: int) -> nn.Module:
    """Returns the classifier after a stage."""
    return Exit(
      classes=self.classes,
      features=self._channels(2**number),
      dtype=self.dtype,
      axis_name=self.axis_name,
      group_norm=self.group_norm,
      name=f"exit{number}",
    )


class Exit(nn.Module):
  """Classifier of a feature map: 3x3 convolution of stride 2, ReLU, mean over pixels, dense layer.

  `[N, h, w, D]` to `[N, classes]`.
  """

  classes: int
  features: int
  dtype: jnp.dtype
  axis_name: str | None
  group_norm: bool

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = ConvNorm(
      features=self.features,
      window=3,
      stride=2,
      dtype=self.dtype,
      axis_name=self.axis_name,
      group_norm=self.group_norm,
      name="conv",
    )
    # Logits are float32, whatever the network computes in.
    x = jnp.mean(nn.relu(conv(x, train)).astype(jnp.float32), axis=(1, 2))
    return nn.Dense(self.classes, name="classifier")(x)


class ExpertNet(ResNet):
  """Residual network with several copies of its last stage, weighted by a gate.

  `[N, H, W, D]` images or clips to `([N, classes] float32 logits, records)`, with one record, that
  of the experts. Each expert is a last stage with its own parameters; all experts read the same
  input, the feature map of the stages before.

  Attributes:
    experts: number of experts.
    top_k: number of experts that contribute for an example; None for all.
  Raises:
    TypeError, ValueError: when called, as `ResNet`; or gates of its own.

  >>> from gating_jax.models.summary import model_summary
  >>> from gating_jax.models.resnets import resnet
  >>> model_summary(resnet("resnet20", 10, kind=ExpertNet, experts=3), (32, 32, 3)).gate_layers
  (('stage3', 3),)
  """

  experts: int = 4
  top_k: int | None = None

  def _stage(
    self, x: Array, train: bool, stage: StagePlan, shared: Shared = NOTHING_SHARED
  ) -> tuple[Array, Records]:
    """Runs a stage; the last one is a mixture of experts."""
    if self.gating != "none":
      raise ValueError(f"gating must be none in a network of experts; got {self.gating!r}")
    # Only the last stage has experts; the others are those of `ResNet`.
    if stage.number < len(self.blocks):
      return super()._stage(x, train, stage, shared=shared)
    experts = []
    for _ in range(self.experts):
      # Without a parent, since the blocks belong to the experts and not to this network.
      blocks = [self._block(plan, parent=None, name=None) for plan in stage.blocks]
      experts.append(Chain(tuple(blocks), parent=None))
    mixture = Experts(
      experts=tuple(experts),
      top_k=self.top_k,
      gate=self.gate,
      axis_name=self.axis_name,
      name=f"stage{stage.number}",
    )
    return mixture(x, train)


class Chain(nn.Module):
  """Sequence of ungated blocks, each called as `block(x, train)` and returning `(y, ())`."""

  blocks: tuple[nn.Module, ...]

  def __call__(self, x: Array, train: bool) -> Array:
    for block in self.blocks:
      # Without gates a block's records are empty.
      x, _ = block(x, train)
    return x
