"""Pure functions: gates, the losses and their priors, penalties, MACs, compaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gating_jax.names import lazy_names

__all__ = [
  "Prior",
  "balance_loss",
  "batch_shaping_loss",
  "beta",
  "binary_concrete",
  "bucket_sizes",
  "budget_to_k",
  "capacity_for",
  "cdf_matching_loss",
  "clipped_sigmoid",
  "closed_share",
  "conv_macs",
  "decision_entropy_loss",
  "empirical",
  "empirical_cdf",
  "ensure_one_open",
  "entropy_loss",
  "executed_macs",
  "expected_macs",
  "first_k",
  "first_sure",
  "from_cdf",
  "gated_macs",
  "generalised_batch_shaping_loss",
  "hard_concrete",
  "hard_concrete_mean",
  "hard_concrete_open_prob",
  "indecision_loss",
  "l0_loss",
  "mac_budget_loss",
  "mac_loss",
  "noise_floor",
  "normal",
  "open_backward",
  "open_indices",
  "open_threshold",
  "random_k",
  "relaxed_bernoulli",
  "scatter_back",
  "sort_with_vjp",
  "stay_logits",
  "straight_through",
  "straight_through_gate",
  "symmetric_beta",
  "target_rate_loss",
  "threshold_for_budget",
  "threshold_gate",
  "top_k",
  "uniform",
  "uniform_k",
]

# Type checkers read the imports, and Python the table.
if TYPE_CHECKING:
  from gating_jax.ops.compaction import (
    bucket_sizes,
    capacity_for,
    open_backward,
    open_indices,
    scatter_back,
  )
  from gating_jax.ops.confidence import first_sure, stay_logits, threshold_for_budget
  from gating_jax.ops.ecdf import (
    batch_shaping_loss,
    cdf_matching_loss,
    empirical_cdf,
    generalised_batch_shaping_loss,
    noise_floor,
  )
  from gating_jax.ops.macs import conv_macs, executed_macs, expected_macs, gated_macs
  from gating_jax.ops.penalties import (
    balance_loss,
    closed_share,
    decision_entropy_loss,
    entropy_loss,
    indecision_loss,
    l0_loss,
    mac_budget_loss,
    mac_loss,
    target_rate_loss,
  )
  from gating_jax.ops.priors import (
    Prior,
    beta,
    empirical,
    from_cdf,
    normal,
    relaxed_bernoulli,
    symmetric_beta,
    uniform,
  )
  from gating_jax.ops.quantiles import open_threshold
  from gating_jax.ops.ranking import sort_with_vjp
  from gating_jax.ops.relaxations import (
    binary_concrete,
    clipped_sigmoid,
    hard_concrete,
    hard_concrete_mean,
    hard_concrete_open_prob,
    straight_through,
    straight_through_gate,
    threshold_gate,
  )
  from gating_jax.ops.selection import (
    budget_to_k,
    ensure_one_open,
    first_k,
    random_k,
    top_k,
    uniform_k,
  )
else:
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.ops.compaction": (
        "bucket_sizes",
        "capacity_for",
        "open_backward",
        "open_indices",
        "scatter_back",
      ),
      "gating_jax.ops.confidence": ("first_sure", "stay_logits", "threshold_for_budget"),
      "gating_jax.ops.ecdf": (
        "batch_shaping_loss",
        "cdf_matching_loss",
        "empirical_cdf",
        "generalised_batch_shaping_loss",
        "noise_floor",
      ),
      "gating_jax.ops.macs": ("conv_macs", "executed_macs", "expected_macs", "gated_macs"),
      "gating_jax.ops.penalties": (
        "balance_loss",
        "closed_share",
        "decision_entropy_loss",
        "entropy_loss",
        "indecision_loss",
        "l0_loss",
        "mac_budget_loss",
        "mac_loss",
        "target_rate_loss",
      ),
      "gating_jax.ops.priors": (
        "Prior",
        "beta",
        "empirical",
        "from_cdf",
        "normal",
        "relaxed_bernoulli",
        "symmetric_beta",
        "uniform",
      ),
      "gating_jax.ops.quantiles": ("open_threshold",),
      "gating_jax.ops.ranking": ("sort_with_vjp",),
      "gating_jax.ops.relaxations": (
        "binary_concrete",
        "clipped_sigmoid",
        "hard_concrete",
        "hard_concrete_mean",
        "hard_concrete_open_prob",
        "straight_through",
        "straight_through_gate",
        "threshold_gate",
      ),
      "gating_jax.ops.selection": (
        "budget_to_k",
        "ensure_one_open",
        "first_k",
        "random_k",
        "top_k",
        "uniform_k",
      ),
    },
  )
