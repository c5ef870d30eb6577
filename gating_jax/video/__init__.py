"""The programme for long videos: its networks, training, test, scores and report."""

from gating_jax.extras import require_extra

# Otherwise a training would end without its report.
require_extra("train")
