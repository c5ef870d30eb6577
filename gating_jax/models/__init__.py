"""Networks: residual nets, VGG, segment nets, their counts, and the importance of their units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gating_jax.names import lazy_names

__all__ = [
  "EarlyExitNet",
  "ExpertNet",
  "InflatedInception",
  "MobileNet",
  "ModelCounts",
  "ResNet",
  "SegmentClassifier",
  "SegmentNet",
  "Segmenter",
  "UnitImportance",
  "VGG",
  "VideoCounts",
  "find_concepts",
  "heavy_net",
  "light_net",
  "load_pretrained",
  "model_summary",
  "resnet",
  "save_pretrained",
  "select_units",
  "solve_share",
  "unit_importance",
  "vgg",
  "video_summary",
  "with_prior",
]

# Type checkers read the imports, and Python the table.
if TYPE_CHECKING:
  from gating_jax.models.importance import (
    UnitImportance,
    select_units,
    unit_importance,
    with_prior,
  )
  from gating_jax.models.mobilenet import MobileNet
  from gating_jax.models.pretrained import load_pretrained, save_pretrained
  from gating_jax.models.resnet_variants import EarlyExitNet, ExpertNet
  from gating_jax.models.resnets import ResNet, resnet
  from gating_jax.models.segmenter import Segmenter
  from gating_jax.models.summary import (
    ModelCounts,
    VideoCounts,
    model_summary,
    solve_share,
    video_summary,
  )
  from gating_jax.models.timegate import SegmentClassifier, SegmentNet, find_concepts
  from gating_jax.models.vggs import VGG, vgg
  from gating_jax.models.video_backbones import InflatedInception, heavy_net, light_net
else:
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.models.importance": (
        "UnitImportance",
        "select_units",
        "unit_importance",
        "with_prior",
      ),
      "gating_jax.models.mobilenet": ("MobileNet",),
      "gating_jax.models.pretrained": ("load_pretrained", "save_pretrained"),
      "gating_jax.models.resnet_variants": ("EarlyExitNet", "ExpertNet"),
      "gating_jax.models.resnets": ("ResNet", "resnet"),
      "gating_jax.models.segmenter": ("Segmenter",),
      "gating_jax.models.summary": (
        "ModelCounts",
        "VideoCounts",
        "model_summary",
        "solve_share",
        "video_summary",
      ),
      "gating_jax.models.timegate": ("SegmentClassifier", "SegmentNet", "find_concepts"),
      "gating_jax.models.vggs": ("VGG", "vgg"),
      "gating_jax.models.video_backbones": ("InflatedInception", "heavy_net", "light_net"),
    },
  )
