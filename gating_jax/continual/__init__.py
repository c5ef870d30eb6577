"""Continual learning: task-gated networks, baselines, and the metrics for both."""

from gating_jax.extras import require_extra

# Otherwise a training would end without its report.
require_extra("train")
