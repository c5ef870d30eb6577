"""Flax Linen modules; gated ones return `(y, records)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gating_jax.names import lazy_names

__all__ = [
  "BasicBlock",
  "Bottleneck",
  "ChannelGate",
  "ConvNorm",
  "Experts",
  "FactorisedConvNorm",
  "FoundPairs",
  "GateHead",
  "GateSettings",
  "GatedChannels",
  "GatedModel",
  "SegmentGate",
  "SegmentGateSettings",
  "apply_gates",
  "deterministic_record",
  "find_pairs",
  "from_nnx",
  "shift_thresholds",
]

# Type checkers read the imports, and Python the table.
if TYPE_CHECKING:
  from gating_jax.layers.blocks import BasicBlock, Bottleneck
  from gating_jax.layers.conv import ConvNorm, FactorisedConvNorm
  from gating_jax.layers.experts import Experts
  from gating_jax.layers.gate import (
    ChannelGate,
    GatedChannels,
    GateHead,
    GateSettings,
    apply_gates,
    shift_thresholds,
  )
  from gating_jax.layers.gated_model import GatedModel
  from gating_jax.layers.nnx_bridge import from_nnx
  from gating_jax.layers.pair_search import FoundPairs, find_pairs
  from gating_jax.layers.segment_gate import SegmentGate, SegmentGateSettings, deterministic_record
else:
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.layers.blocks": ("BasicBlock", "Bottleneck"),
      "gating_jax.layers.conv": ("ConvNorm", "FactorisedConvNorm"),
      "gating_jax.layers.experts": ("Experts",),
      "gating_jax.layers.gate": (
        "ChannelGate",
        "GateHead",
        "GateSettings",
        "GatedChannels",
        "apply_gates",
        "shift_thresholds",
      ),
      "gating_jax.layers.gated_model": ("GatedModel",),
      "gating_jax.layers.nnx_bridge": ("from_nnx",),
      "gating_jax.layers.pair_search": ("FoundPairs", "find_pairs"),
      "gating_jax.layers.segment_gate": (
        "SegmentGate",
        "SegmentGateSettings",
        "deterministic_record",
      ),
    },
  )
