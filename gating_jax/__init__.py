"""Pure functions and Flax modules for conditional computation by learned gates.

The README gives a tour; each name is documented where it is defined. A name is imported when it is
first used, so that `import gating_jax` takes no time and loads no JAX.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

# Type checkers do not run `__getattr__`.
if TYPE_CHECKING:
  from gating_jax.inference.analyse import Analysis, analyse, prune, pruning_error
  from gating_jax.inference.conditional import compile_conditional
  from gating_jax.inference.exits import compile_exits
  from gating_jax.inference.export import export_model, load_exported
  from gating_jax.inference.folding import fold
  from gating_jax.inference.pruning import find_static_units
  from gating_jax.inference.quantise import quantise
  from gating_jax.inference.segments import compile_segments
  from gating_jax.layers.blocks import BasicBlock, Bottleneck
  from gating_jax.layers.gate import (
    ChannelGate,
    GatedChannels,
    GateHead,
    GateSettings,
    apply_gates,
    shift_thresholds,
  )
  from gating_jax.layers.segment_gate import SegmentGate, SegmentGateSettings
  from gating_jax.loading import load_run
  from gating_jax.models.resnet import ResNet, resnet
  from gating_jax.models.summary import ModelCounts, VideoCounts, model_summary, video_summary
  from gating_jax.models.timegate import SegmentNet, find_concepts
  from gating_jax.models.vgg import VGG, vgg
  from gating_jax.models.video_backbones import heavy_net, light_net
  from gating_jax.ops.compaction import bucket_sizes, capacity_for, open_indices, scatter_back
  from gating_jax.ops.ecdf import (
    batch_shaping_loss,
    cdf_matching_loss,
    empirical_cdf,
    generalised_batch_shaping_loss,
    noise_floor,
  )
  from gating_jax.ops.empirical import empirical
  from gating_jax.ops.macs import executed_macs, expected_macs, gated_macs
  from gating_jax.ops.penalties import (
    closed_share,
    l0_loss,
    mac_budget_loss,
    mac_loss,
    target_rate_loss,
  )
  from gating_jax.ops.priors import (
    Prior,
    beta,
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
    straight_through_gate,
    threshold_gate,
  )
  from gating_jax.training.devices import value_and_grad_over_devices
  from gating_jax.types import GateRecord

# The public API: everything listed here stays importable from the top level.
__all__ = [
  "Analysis",
  "BasicBlock",
  "Bottleneck",
  "ChannelGate",
  "GateHead",
  "GateRecord",
  "GateSettings",
  "GatedChannels",
  "ModelCounts",
  "Prior",
  "ResNet",
  "SegmentGate",
  "SegmentGateSettings",
  "SegmentNet",
  "VGG",
  "VideoCounts",
  "analyse",
  "apply_gates",
  "batch_shaping_loss",
  "beta",
  "binary_concrete",
  "bucket_sizes",
  "capacity_for",
  "cdf_matching_loss",
  "clipped_sigmoid",
  "closed_share",
  "compile_conditional",
  "compile_exits",
  "compile_segments",
  "empirical",
  "empirical_cdf",
  "executed_macs",
  "expected_macs",
  "export_model",
  "find_concepts",
  "find_static_units",
  "fold",
  "from_cdf",
  "gated_macs",
  "generalised_batch_shaping_loss",
  "hard_concrete",
  "hard_concrete_mean",
  "hard_concrete_open_prob",
  "heavy_net",
  "l0_loss",
  "light_net",
  "load_exported",
  "load_run",
  "mac_budget_loss",
  "mac_loss",
  "model_summary",
  "noise_floor",
  "normal",
  "open_indices",
  "open_threshold",
  "prune",
  "pruning_error",
  "quantise",
  "relaxed_bernoulli",
  "resnet",
  "scatter_back",
  "shift_thresholds",
  "sort_with_vjp",
  "straight_through_gate",
  "symmetric_beta",
  "target_rate_loss",
  "threshold_gate",
  "uniform",
  "value_and_grad_over_devices",
  "vgg",
  "video_summary",
]

# The module of each public name.
_MODULES = {
  "Analysis": "gating_jax.inference.analyse",
  "BasicBlock": "gating_jax.layers.blocks",
  "Bottleneck": "gating_jax.layers.blocks",
  "ChannelGate": "gating_jax.layers.gate",
  "GateHead": "gating_jax.layers.gate",
  "GateRecord": "gating_jax.types",
  "GateSettings": "gating_jax.layers.gate",
  "GatedChannels": "gating_jax.layers.gate",
  "ModelCounts": "gating_jax.models.summary",
  "Prior": "gating_jax.ops.priors",
  "ResNet": "gating_jax.models.resnet",
  "SegmentGate": "gating_jax.layers.segment_gate",
  "SegmentGateSettings": "gating_jax.layers.segment_gate",
  "SegmentNet": "gating_jax.models.timegate",
  "VGG": "gating_jax.models.vgg",
  "VideoCounts": "gating_jax.models.summary",
  "analyse": "gating_jax.inference.analyse",
  "apply_gates": "gating_jax.layers.gate",
  "batch_shaping_loss": "gating_jax.ops.ecdf",
  "beta": "gating_jax.ops.priors",
  "binary_concrete": "gating_jax.ops.relaxations",
  "bucket_sizes": "gating_jax.ops.compaction",
  "capacity_for": "gating_jax.ops.compaction",
  "cdf_matching_loss": "gating_jax.ops.ecdf",
  "clipped_sigmoid": "gating_jax.ops.relaxations",
  "closed_share": "gating_jax.ops.penalties",
  "compile_conditional": "gating_jax.inference.conditional",
  "compile_exits": "gating_jax.inference.exits",
  "compile_segments": "gating_jax.inference.segments",
  "empirical": "gating_jax.ops.empirical",
  "empirical_cdf": "gating_jax.ops.ecdf",
  "executed_macs": "gating_jax.ops.macs",
  "expected_macs": "gating_jax.ops.macs",
  "export_model": "gating_jax.inference.export",
  "find_concepts": "gating_jax.models.timegate",
  "find_static_units": "gating_jax.inference.pruning",
  "fold": "gating_jax.inference.folding",
  "from_cdf": "gating_jax.ops.priors",
  "gated_macs": "gating_jax.ops.macs",
  "generalised_batch_shaping_loss": "gating_jax.ops.ecdf",
  "hard_concrete": "gating_jax.ops.relaxations",
  "hard_concrete_mean": "gating_jax.ops.relaxations",
  "hard_concrete_open_prob": "gating_jax.ops.relaxations",
  "heavy_net": "gating_jax.models.video_backbones",
  "l0_loss": "gating_jax.ops.penalties",
  "light_net": "gating_jax.models.video_backbones",
  "load_exported": "gating_jax.inference.export",
  "load_run": "gating_jax.loading",
  "mac_budget_loss": "gating_jax.ops.penalties",
  "mac_loss": "gating_jax.ops.penalties",
  "model_summary": "gating_jax.models.summary",
  "noise_floor": "gating_jax.ops.ecdf",
  "normal": "gating_jax.ops.priors",
  "open_indices": "gating_jax.ops.compaction",
  "open_threshold": "gating_jax.ops.quantiles",
  "prune": "gating_jax.inference.analyse",
  "pruning_error": "gating_jax.inference.analyse",
  "quantise": "gating_jax.inference.quantise",
  "relaxed_bernoulli": "gating_jax.ops.priors",
  "resnet": "gating_jax.models.resnet",
  "scatter_back": "gating_jax.ops.compaction",
  "shift_thresholds": "gating_jax.layers.gate",
  "sort_with_vjp": "gating_jax.ops.ranking",
  "straight_through_gate": "gating_jax.ops.relaxations",
  "symmetric_beta": "gating_jax.ops.priors",
  "target_rate_loss": "gating_jax.ops.penalties",
  "threshold_gate": "gating_jax.ops.relaxations",
  "uniform": "gating_jax.ops.priors",
  "value_and_grad_over_devices": "gating_jax.training.devices",
  "vgg": "gating_jax.models.vgg",
  "video_summary": "gating_jax.models.summary",
}

# Former public names, which still import, and what each is called today.
RENAMED = {
  "Switched": "GatedChannels",
  "count": "model_summary",
  "count_video": "video_summary",
  "disagreement": "pruning_error",
  "Skipping": "compile_segments",
  "put_back": "scatter_back",
  "slim": "prune",
  "static_units": "find_static_units",
}


def __getattr__(name: str) -> Any:
  """Imports a public name at its first use; a former one warns with the name of today."""
  if name in RENAMED:
    today = RENAMED[name]
    warnings.warn(
      f"gating_jax.{name} is now called gating_jax.{today}", DeprecationWarning, stacklevel=2
    )
    return _imported(today)
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return _imported(name)


def __dir__() -> list[str]:
  """Returns the names of the module, with those that are not imported yet."""
  return sorted({*globals(), *__all__})


def _imported(name: str) -> Any:
  """Imports the value of a public name, and keeps it as an attribute of this module."""
  if name not in globals():
    globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
  return globals()[name]
