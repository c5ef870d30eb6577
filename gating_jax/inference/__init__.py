"""Compiled, pruned and exported forms of a trained network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gating_jax.names import lazy_names

__all__ = [
  "Analysis",
  "CompiledConditional",
  "CompiledExits",
  "CompiledSegments",
  "EXPORTABLE",
  "ExitNet",
  "ExportError",
  "FoldedNet",
  "Loaded",
  "PruneMask",
  "analyse",
  "apply_pruning",
  "compile_conditional",
  "compile_exits",
  "compile_segments",
  "dequantise",
  "export_model",
  "find_static_units",
  "fold",
  "fold_exits",
  "load_exported",
  "load_onnx",
  "prune",
  "pruning_error",
  "quantise",
  "to_onnx",
]

# Type checkers read the imports, and Python the table.
if TYPE_CHECKING:
  from gating_jax.inference.analysing import Analysis, analyse, prune, pruning_error
  from gating_jax.inference.conditional import CompiledConditional, compile_conditional
  from gating_jax.inference.exits import CompiledExits, compile_exits, fold_exits
  from gating_jax.inference.export import ExportError, Loaded, export_model, load_exported
  from gating_jax.inference.folded import ExitNet, FoldedNet
  from gating_jax.inference.folding import fold
  from gating_jax.inference.onnx_export import load_onnx, to_onnx
  from gating_jax.inference.pruning import PruneMask, apply_pruning, find_static_units
  from gating_jax.inference.quantising import dequantise, quantise
  from gating_jax.inference.segments import CompiledSegments, compile_segments
  from gating_jax.inference.strategies import EXPORTABLE
else:
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.inference.analysing": ("Analysis", "analyse", "prune", "pruning_error"),
      "gating_jax.inference.conditional": ("CompiledConditional", "compile_conditional"),
      "gating_jax.inference.exits": ("CompiledExits", "compile_exits", "fold_exits"),
      "gating_jax.inference.export": ("ExportError", "Loaded", "export_model", "load_exported"),
      "gating_jax.inference.folded": ("ExitNet", "FoldedNet"),
      "gating_jax.inference.folding": ("fold",),
      "gating_jax.inference.onnx_export": ("load_onnx", "to_onnx"),
      "gating_jax.inference.pruning": ("PruneMask", "apply_pruning", "find_static_units"),
      "gating_jax.inference.quantising": ("dequantise", "quantise"),
      "gating_jax.inference.segments": ("CompiledSegments", "compile_segments"),
      "gating_jax.inference.strategies": ("EXPORTABLE",),
    },
  )
