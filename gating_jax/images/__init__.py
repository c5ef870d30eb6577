"""Images: classification, and a class for every pixel."""

from gating_jax.extras import require_extra

# Otherwise a training would end without its report.
require_extra("train")
