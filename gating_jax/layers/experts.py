"""A mixture of experts: several networks for one task, and a gate that weighs their outputs.

Axes: N examples, E experts.
Reference: Jacobs et al., "Adaptive mixtures of local experts", 1991; Shazeer et al., "Outrageously
  large neural networks: the sparsely-gated mixture-of-experts layer", 2017; Fedus et al., "Switch
  transformers", 2022 (the softmax before the choice, so that a single chosen expert still has a
  gradient).
"""

from __future__ import annotations

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.layers.gate import GATE_NAME, GateHead, GateSettings
from gating_jax.layers.mac_trace import kernel_calls, sum_macs
from gating_jax.ops import arguments
from gating_jax.types import Array, GateRecord, Records


class Experts(nn.Module):
  """A mixture of experts, `[N, ..., D]` to `(y, records)`.

      y = sum_e g_e expert_e(x),   p = softmax(head(x)),
      g = p, or 0 where p_e is not among the `top_k` largest

  All experts compute all examples; the record says which of them count. Its `probs` are p and its
  `gates` g. If all experts count, its `logits` are the log-odds of p. Otherwise a logit is the
  distance of the expert's score from the middle between the last score that counts and the first
  that does not. Gates are never sampled.

  Attributes:
    experts: modules called as `expert(x, train)`, with outputs of one shape and equal MACs.
    top_k: number of experts that count for an example; None for all.
    gate: settings of the head: `hidden`, and `initial_open`, from which all scores start alike. The
      others act on gates that are drawn.
    axis_name: mapped device axis over which the head's BatchNorm takes its statistics.
  Raises:
    ValueError: experts of different MACs, when called.

  >>> from gating_jax.layers.conv import ConvNorm
  >>> experts, x = Experts((ConvNorm(4, 3), ConvNorm(4, 3)), top_k=1), jnp.ones((2, 8, 8, 3))
  >>> (y, (record,)), _ = jax.eval_shape(lambda: experts.init_with_output(jax.random.key(0), x))
  >>> y.shape, record.gates.shape
  ((2, 8, 8, 4), (2, 2))
  """

  experts: tuple[nn.Module, ...]
  top_k: int | None = None
  gate: GateSettings = GateSettings()
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    count = len(self.experts)
    if self.gate.parts not in ((), ("pooled",)):
      raise ValueError(
        f"gate context must be pooled in a mixture of experts; got {self.gate.context!r}"
      )
    scores = GateHead(count, self.gate, self.axis_name, name=GATE_NAME)(x, train)
    logits, gates = mixture(scores, self.top_k)
    parts, macs = [], []
    for e, expert in enumerate(self.experts):
      # Experts can be any modules, so their MACs are counted while they are traced.
      with kernel_calls() as calls:
        own = expert(x, train)
      macs.append(sum_macs(calls))
      # g_e expert_e(x), one gate per example whatever the output's rank.
      gate = gates[:, e].reshape(-1, *[1] * (own.ndim - 1))
      parts.append(gate.astype(own.dtype) * own)
    # A record has one cost per unit.
    if len(set(macs)) > 1:
      raise ValueError(f"experts must all have the same number of MACs; got {macs}")
    record = GateRecord(
      logits=logits,
      probs=jax.nn.softmax(scores),
      gates=gates,
      macs_per_unit=macs[0],
      gate=(*self.path, GATE_NAME),
    )
    return functools.reduce(operator.add, parts), (record,)


def mixture(scores: Array, top_k: int | None) -> tuple[Array, Array]:
  """Computes the `(logits, gates)` of `Experts`, `[N, E]` each, from the head's scores `[N, E]`.

  >>> logits, gates = mixture(jnp.array([[0.0, 2.0, 1.0]]), 1)
  >>> logits, gates.round(3)
  (Array([[-1.5,  0.5, -0.5]], dtype=float32), Array([[0.   , 0.665, 0.   ]], dtype=float32))
  """
  arguments.real_array("scores", scores, "[N, E]")
  count, probs = scores.shape[-1], jax.nn.softmax(scores)
  if top_k is not None:
    arguments.whole_number("top_k", top_k, 0)
    if not 1 <= top_k <= count:
      raise ValueError(f"top_k must be None or in 1 .. {count}, the number of experts; got {top_k}")
  if top_k is None or top_k == count:
    # log(p_e / (1 - p_e)) = s_e - log sum over the others of exp(s), without forming 1 - p_e.
    others = jnp.where(jnp.eye(count, dtype=bool)[None], -jnp.inf, scores[:, None])
    return scores - jax.nn.logsumexp(others, axis=-1), probs
  # One score more than are chosen: the first that does not count.
  best, index = jax.lax.top_k(scores, top_k + 1)
  chosen = jax.nn.one_hot(index[..., :top_k], count, dtype=scores.dtype).sum(-2)
  return scores - (best[..., top_k - 1, None] + best[..., top_k, None]) / 2, chosen * probs
