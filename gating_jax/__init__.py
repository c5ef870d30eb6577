"""Pure functions and Flax modules for conditional computation by learnt gates.

The README gives a tour; each name is documented where it is defined. A name is imported when it is
first used, so that `import gating_jax` takes no time and loads no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gating_jax.names import lazy_names

__version__ = "0.1.0"

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

__all__ = [
  "Analysis",
  "BasicBlock",
  "Bottleneck",
  "ChannelGate",
  "GateHead",
  "GateRecord",
  "GateSettings",
  "GatedChannels",
  "GatedModel",
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
  "find_pairs",
  "find_static_units",
  "fold",
  "from_cdf",
  "from_nnx",
  "gated_macs",
  "generalised_batch_shaping_loss",
  "hard_concrete",
  "hard_concrete_mean",
  "hard_concrete_open_prob",
  "heavy_net",
  "l0_loss",
  "light_net",
  "load_exported",
  "load_pretrained",
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
  "save_pretrained",
  "scatter_back",
  "shift_thresholds",
  "sort_with_vjp",
  "straight_through_gate",
  "symmetric_beta",
  "target_rate_loss",
  "threshold_gate",
  "to_onnx",
  "uniform",
  "value_and_grad_over_devices",
  "vgg",
  "video_summary",
]

# Type checkers read the imports, and Python the table.
if TYPE_CHECKING:
  from gating_jax import analysis as analysis
  from gating_jax import inference as inference
  from gating_jax import layers as layers
  from gating_jax import models as models
  from gating_jax import ops as ops
  from gating_jax import testing as testing
  from gating_jax.inference.analysing import Analysis, analyse, prune, pruning_error
  from gating_jax.inference.conditional import compile_conditional
  from gating_jax.inference.exits import compile_exits
  from gating_jax.inference.export import export_model, load_exported
  from gating_jax.inference.folding import fold
  from gating_jax.inference.onnx_export import to_onnx
  from gating_jax.inference.pruning import find_static_units
  from gating_jax.inference.quantising import quantise
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
  from gating_jax.layers.gated_model import GatedModel
  from gating_jax.layers.nnx_bridge import from_nnx
  from gating_jax.layers.pair_search import find_pairs
  from gating_jax.layers.segment_gate import SegmentGate, SegmentGateSettings
  from gating_jax.loading import load_run
  from gating_jax.models.pretrained import load_pretrained, save_pretrained
  from gating_jax.models.resnets import ResNet, resnet
  from gating_jax.models.summary import ModelCounts, VideoCounts, model_summary, video_summary
  from gating_jax.models.timegate import SegmentNet, find_concepts
  from gating_jax.models.vggs import VGG, vgg
  from gating_jax.models.video_backbones import heavy_net, light_net
  from gating_jax.ops.compaction import bucket_sizes, capacity_for, open_indices, scatter_back
  from gating_jax.ops.ecdf import (
    batch_shaping_loss,
    cdf_matching_loss,
    empirical_cdf,
    generalised_batch_shaping_loss,
    noise_floor,
  )
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
    straight_through_gate,
    threshold_gate,
  )
  from gating_jax.training.devices import value_and_grad_over_devices
  from gating_jax.types import GateRecord
else:
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.inference.analysing": ("Analysis", "analyse", "prune", "pruning_error"),
      "gating_jax.inference.conditional": ("compile_conditional",),
      "gating_jax.inference.exits": ("compile_exits",),
      "gating_jax.inference.export": ("export_model", "load_exported"),
      "gating_jax.inference.folding": ("fold",),
      "gating_jax.inference.onnx_export": ("to_onnx",),
      "gating_jax.inference.pruning": ("find_static_units",),
      "gating_jax.inference.quantising": ("quantise",),
      "gating_jax.inference.segments": ("compile_segments",),
      "gating_jax.layers.blocks": ("BasicBlock", "Bottleneck"),
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
      "gating_jax.layers.pair_search": ("find_pairs",),
      "gating_jax.layers.segment_gate": ("SegmentGate", "SegmentGateSettings"),
      "gating_jax.loading": ("load_run",),
      "gating_jax.models.pretrained": ("load_pretrained", "save_pretrained"),
      "gating_jax.models.resnets": ("ResNet", "resnet"),
      "gating_jax.models.summary": ("ModelCounts", "VideoCounts", "model_summary", "video_summary"),
      "gating_jax.models.timegate": ("SegmentNet", "find_concepts"),
      "gating_jax.models.vggs": ("VGG", "vgg"),
      "gating_jax.models.video_backbones": ("heavy_net", "light_net"),
      "gating_jax.ops.compaction": ("bucket_sizes", "capacity_for", "open_indices", "scatter_back"),
      "gating_jax.ops.ecdf": (
        "batch_shaping_loss",
        "cdf_matching_loss",
        "empirical_cdf",
        "generalised_batch_shaping_loss",
        "noise_floor",
      ),
      "gating_jax.ops.macs": ("executed_macs", "expected_macs", "gated_macs"),
      "gating_jax.ops.penalties": (
        "closed_share",
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
        "straight_through_gate",
        "threshold_gate",
      ),
      "gating_jax.training.devices": ("value_and_grad_over_devices",),
      "gating_jax.types": ("GateRecord",),
    },
    RENAMED,
    submodules=("analysis", "inference", "layers", "models", "ops", "testing"),
  )
