"""Pure functions and Flax modules for conditional computation by learned gates.

The README gives a tour; each name is documented where it is defined.
"""

import warnings

# The public API: everything listed in `__all__` stays importable from the top level.
from gating_jax.inference.analyse import Analysis, analyse, prune
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.exits import compile_exits
from gating_jax.inference.export import export_model, load_exported
from gating_jax.inference.folding import fold
from gating_jax.inference.pruning import find_static_units, pruning_error
from gating_jax.inference.quantise import quantise
from gating_jax.inference.segments import compile_segments
from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.layers.gate import ChannelGate, GatedChannels, GateHead, GateSettings, apply_gates
from gating_jax.layers.segment_gate import SegmentGate, SegmentGateSettings
from gating_jax.loading import load_run
from gating_jax.models.resnet import ResNet, resnet
from gating_jax.models.summary import ModelCounts, VideoCounts, model_summary, video_summary
from gating_jax.models.timegate import SegmentNet
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
from gating_jax.video.concepts import find_concepts

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
  "prune",
  "pruning_error",
  "quantise",
  "relaxed_bernoulli",
  "resnet",
  "scatter_back",
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


def __getattr__(name: str):
  """Returns the value of a former name, with a DeprecationWarning that says the name of today."""
  if name not in RENAMED:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  today = RENAMED[name]
  warnings.warn(
    f"gating_jax.{name} is now called gating_jax.{today}", DeprecationWarning, stacklevel=2
  )
  return globals()[today]
