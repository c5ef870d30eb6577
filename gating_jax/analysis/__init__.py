"""Statistics of gates, and what became of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gating_jax.names import lazy_names

__all__ = [
  "Diagnosis",
  "GateCounter",
  "GateStatistics",
  "OUTCOMES",
  "Tally",
  "UnitImportance",
  "class_information",
  "diagnose",
  "information_floor",
  "mac_spread",
  "open_probs",
  "select_units",
  "tally",
  "unit_importance",
  "with_prior",
]

# Type checkers read the imports, and Python the table.
if TYPE_CHECKING:
  from gating_jax.analysis.outcomes import (
    OUTCOMES,
    Diagnosis,
    Tally,
    class_information,
    diagnose,
    information_floor,
    open_probs,
    tally,
  )
  from gating_jax.analysis.statistics import GateCounter, GateStatistics, mac_spread
  from gating_jax.models.importance import (
    UnitImportance,
    select_units,
    unit_importance,
    with_prior,
  )
else:
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.analysis.outcomes": (
        "Diagnosis",
        "OUTCOMES",
        "Tally",
        "class_information",
        "diagnose",
        "information_floor",
        "open_probs",
        "tally",
      ),
      "gating_jax.analysis.statistics": ("GateCounter", "GateStatistics", "mac_spread"),
      # Moved to `gating_jax.models`; still importable from here.
      "gating_jax.models.importance": (
        "UnitImportance",
        "select_units",
        "unit_importance",
        "with_prior",
      ),
    },
  )
