"""Shows that the fast tests notice faults: mutants, each a line of the package changed.

    python -m tests.mutations [--only NAME,...] [--jobs 2]

Every worker has a copy of the repository. A mutant is written into the copy of its file, the
tests named with it run, and the file is put back. It is killed where a test fails. The script ends
with 1 where a mutant survives, where its run is an error, or where its old text is no longer in
its file exactly once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import QUICK, ROOT

# Each run of pytest is forked from a process that has imported what all of them need.
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["jax", "flax.linen", "optax", "orbax.checkpoint", "ml_collections", "pytest"]
PACKAGE = "gating_jax"
COPIED = (
  PACKAGE,
  "configs",
  "tests",
  "docs",
  "launch",
  "benchmarks",
  "pyproject.toml",
  "README.md",
)
FAST = "not slow"
TIMEOUT = 900  # seconds; the first run, without a mutant, has the tests of all of them
KILLED, SURVIVED, ERROR = "killed", "survived", "error"


class Mutant(NamedTuple):
  """A fault: `old`, which is once in `file` of the package, becomes `new`.

  Attributes:
    tests: files or single tests under `tests`, with spaces between them.
  """

  name: str
  file: str
  old: str
  new: str
  tests: str


class Run(NamedTuple):
  """The status of a run of pytest, and what it said."""

  status: int
  said: str


class Result(NamedTuple):
  """The outcome of a mutant: `said` is the test that killed it, or the error."""

  mutant: Mutant
  outcome: str
  said: str
  seconds: float


# The loss, its ranks and priors.
LOSSES = [
  Mutant(
    "psum_left_out",
    "ops/collectives.py",
    "return lax.all_gather(x, axis_name, axis=0, tiled=True)",
    "return lax.dynamic_update_slice_in_dim(lax.all_gather(lax.stop_gradient(x), axis_name, "
    "tiled=True), x, lax.axis_index(axis_name) * len(x), 0)",
    "ops/test_ecdf_devices.py::test_eight_devices_and_one_give_the_same_value_and_gradient",
  ),
  Mutant(
    "unsort_by_the_permutation",
    "ops/ranking.py",
    "return flat.reshape(-1, n).T.reshape(values.shape)",
    "return take(values, source)",
    "ops/test_ranking.py",
  ),
  Mutant(
    "loss_without_tie_rule",
    "ops/ecdf.py",
    "jnp.any(tied), _level_of_run, lambda level",
    "False, _level_of_run, lambda level",
    "ops/test_ecdf.py::test_equal_gates_move_together",
  ),
  Mutant(
    "sort_without_tie_rule",
    "ops/ranking.py",
    "shared = lax.cond(jnp.any(tied), mean_over_ties, lambda values, _: values, cotangent, tied)",
    "shared = cotangent",
    "ops/test_ranking.py",
  ),
  Mutant(
    "loss_weights_ignored",
    "ops/ecdf.py",
    "part = weights / jnp.where(total == 0, 1, total)",
    "part = 1 / n",
    "ops/test_ecdf.py::test_weights_by_hand_and_one_weight_for_each_value",
  ),
  Mutant(
    "levels_over_n",
    "ops/ecdf.py",
    "level = (before + (in_order + 1) / 2) / (total + 1)",
    "level = (before + (in_order + 1) / 2) / total",
    "ops/test_ecdf.py::test_golden_values_on_probabilities",
  ),
  Mutant(
    "float64_of_numpy_in_the_beta_table",
    "ops/beta_cdf.py",
    "log_lower, log_upper = math.log(a) + log_norm, math.log(b) + log_norm",
    "log_lower, log_upper = np.log(a) + log_norm, np.log(b) + log_norm",
    "ops/test_modes.py::test_values_and_types_are_the_same_in_every_mode",
  ),
  Mutant(
    "noise_floor_of_n",
    "ops/ecdf.py",
    "return 1 / (6 * (n + 1))",
    "return 1 / (6 * n)",
    "ops/test_ecdf.py::test_the_noise_floor_by_hand",
  ),
  Mutant(
    "beta_pdf_without_minus_one",
    "ops/priors.py",
    "return jnp.exp((p - 1) * jnp.log(inside)",
    "return jnp.exp(p * jnp.log(inside)",
    "ops/test_priors.py::test_the_natural_axis_agrees_with_scipy",
  ),
  Mutant(
    "concrete_cdf_mirrored",
    "ops/priors.py",
    "return _positive(t) * z - (jnp.log(m) - jnp.log1p(-m))",
    "return _positive(t) * z + (jnp.log(m) - jnp.log1p(-m))",
    "ops/test_prior_families.py::test_the_relaxed_bernoulli_is_the_binary_concrete",
  ),
  Mutant(
    "devices_draw_alike",
    "ops/collectives.py",
    "first = 0 if axis_name is None else lax.axis_index(axis_name) * n",
    "first = 0",
    "ops/test_collectives.py",
  ),
]

# Gates, and what they cost.
GATES = [
  Mutant(
    "one_draw_for_the_batch",
    "layers/gate.py",
    "return jax.vmap(sample)(keys, logits)",
    "return jax.vmap(sample, (None, 0))(keys[0], logits)",
    "layers/test_gate.py::test_training_draws_gates_from_its_key",
  ),
  Mutant(
    "no_straight_through_gradient",
    "ops/relaxations.py",
    "return threshold_gate(noisy_logits) + (soft - jax.lax.stop_gradient(soft))",
    "return threshold_gate(noisy_logits)",
    "ops/test_relaxations.py",
  ),
  Mutant(
    "l0_sign_flipped",
    "training/objectives.py",
    "return penalties.l0_loss(records)",
    "return -penalties.l0_loss(records)",
    "training/test_objectives.py::test_total_is_cross_entropy_and_weighted_terms",
  ),
  Mutant(
    "budget_on_excess_only",
    "ops/penalties.py",
    "return jnp.square(fraction - budget)",
    "return jnp.square(jnp.maximum(fraction - budget, 0))",
    "ops/test_penalties.py",
  ),
  Mutant(
    "thresholds_of_devices",
    "ops/quantiles.py",
    "return total if axis_name is None else lax.psum(total, axis_name)",
    "return total",
    "ops/test_quantiles.py::test_eight_devices_have_the_threshold_of_one",
  ),
  Mutant(
    "thresholds_of_infinite_logits",
    "ops/quantiles.py",
    "jnp.clip(_largest_with(z, weights, needed, axis_name=axis_name), limits.min, limits.max)",
    "_largest_with(z, weights, needed, axis_name=axis_name)",
    "ops/test_quantiles.py",
  ),
  Mutant(
    "sources_of_one_pixel",
    "models/resnets.py",
    "number = jnp.max(x[..., -1], axis=tuple(range(1, x.ndim - 1)))",
    "number = jnp.min(x[..., -1], axis=tuple(range(1, x.ndim - 1)))",
    "models/test_shared_context.py",
  ),
  Mutant(
    "weights_counted_as_open",
    "ops/penalties.py",
    "return gates / lax.stop_gradient(jnp.maximum(gates, jnp.ones_like(gates)))",
    "return gates",
    "ops/test_penalties.py layers/test_gate_opening.py",
  ),
  Mutant(
    "shut_gates_ranked",
    "layers/gate.py",
    "counts, z = logits != SHUT, logits",
    "counts, z = logits == logits, logits",
    "layers/test_gate_opening.py",
  ),
  Mutant(
    "pairs_counted_once",
    "ops/macs.py",
    "costs.append(open_units[i - 1] * open_units[i] * float(record.macs_per_pair))",
    "costs.append(open_units[i] * float(record.macs_per_pair))",
    "ops/test_macs.py",
  ),
  Mutant(
    "top_k_of_one_more",
    "ops/selection.py",
    "return (valid & (rank < _column(k, valid.shape[0]))).astype(jnp.float32)",
    "return (valid & (rank <= _column(k, valid.shape[0]))).astype(jnp.float32)",
    "ops/test_selection.py",
  ),
  Mutant(
    "an_exit_taken_back",
    "ops/confidence.py",
    "return lax.cummin(jnp.log(fraction) - jnp.log1p(-fraction), axis=1) - _log_odds(threshold)",
    "return jnp.log(fraction) - jnp.log1p(-fraction) - _log_odds(threshold)",
    "ops/test_confidence.py",
  ),
  Mutant(
    "skipped_backward_unguarded",
    "ops/compaction.py",
    "fits = jnp.sum(as_float(gates) > 0) <= capacity",
    "fits = True",
    "ops/test_compaction.py",
  ),
  Mutant(
    "a_chain_that_sees_closed_channels",
    "inference/grafting.py",
    "x if i in starts else made[i - 1]",
    "x",
    "inference/test_grafting.py::test_the_same_outputs_gates_and_macs",
  ),
  Mutant(
    "a_reader_that_sees_closed_channels",
    "layers/gated_model.py",
    "x = self._switch(layer, x)",
    "self._switch(layer, x)",
    "layers/test_gated_model.py",
  ),
  Mutant(
    "foreign_kernels_turned",
    "models/pretrained.py",
    "value.transpose(2, 3, 1, 0)",
    "value.transpose(3, 2, 1, 0)",
    "models/test_pretrained.py",
  ),
]

# Training, evaluation, and what a run directory holds.
TRAINING = [
  Mutant(
    "gates_decay",
    "training/optim.py",
    "jax.tree.map(operator.not_, mark_gates(params))",
    "jax.tree.map(lambda _: True, params)",
    "training/test_optim.py",
  ),
  Mutant(
    "decay_of_gates_on_the_others",
    "training/optim.py",
    "optax.add_decayed_weights(gate_weight_decay, mask=mark_gates)",
    "optax.add_decayed_weights(gate_weight_decay, mask=decayed)",
    "training/test_optim.py",
  ),
  Mutant(
    "thawed_layers_start_at_the_first_rate",
    "training/optim.py",
    "return learning_rate(step + steps)",
    "return learning_rate(step)",
    "training/test_optim.py",
  ),
  Mutant(
    "pictures_lie_on_their_side",
    "data/folders.py",
    "upright=True",
    "upright=False",
    "data/test_folders.py",
  ),
  Mutant(
    "drops_late_by_the_warm_up",
    "training/optim.py",
    "drops[round(fraction * total_steps) - warm] += 1",
    "drops[round(fraction * total_steps)] += 1",
    "training/test_schedules.py",
  ),
  Mutant(
    "all_crops_but_the_last",
    "data/augment.py",
    "top, left = jax.random.randint(where, (2,), 0, 2 * pad + 1)",
    "top, left = jax.random.randint(where, (2,), 0, 2 * pad)",
    "data/test_augment.py",
  ),
  Mutant(
    "union_counts_twice",
    "images/segmentation.py",
    "either = confusion.sum(axis=0) + confusion.sum(axis=1) - both",
    "either = confusion.sum(axis=0) + confusion.sum(axis=1)",
    "images/test_segmentation.py::test_a_class_in_truth_or_prediction_alone_has_iou_zero",
  ),
  Mutant(
    "damaged_checkpoint_accepted",
    "training/checkpoints.py",
    'if _checksum(restored[_STATE]) != restored[_META]["crc32"]:',
    "if False:",
    "training/test_checkpoints.py::test_a_damaged_checkpoint_is_passed_over_and_training_can_go_on",
  ),
  Mutant(
    "half_written_checkpoint_accepted",
    "training/checkpoints.py",
    "error = raised",
    "restored = {_STATE: target}",
    "training/test_checkpoints.py::test_a_damaged_checkpoint_is_passed_over_and_training_can_go_on",
  ),
  Mutant(
    "resume_one_step_late",
    "training/loop.py",
    "k, step = settings.steps_per_dispatch, first_step",
    "k, step = settings.steps_per_dispatch, first_step + (first_step > 0)",
    "training/test_loop.py::test_training_goes_on_from_its_first_step",
  ),
  Mutant(
    "nan_goes_on",
    "training/loop.py",
    "~np.isfinite(value)",
    "np.isinf(value)",
    "training/test_loop.py::test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved",
  ),
  Mutant(
    "padding_counts_in_evaluation",
    "training/evaluation.py",
    "np.asarray(values)[:valid] for name",
    "np.asarray(values) for name",
    "training/test_evaluation.py",
  ),
  Mutant(
    "last_batch_counts_whole",
    "data/image_sets.py",
    "return examples.read(filled), len(index)",
    "return examples.read(filled), len(filled)",
    "data/test_image_sets.py",
  ),
  Mutant(
    "another_config_goes_on",
    "training/rundir.py",
    "_compare(path, run_dir.config(), mine, free=_FREE_IN_TRAINING)\n    else:",
    "pass\n    else:",
    "training/test_rundir.py::test_another_config_is_refused_with_the_difference",
  ),
  Mutant(
    "run_directory_not_locked",
    "training/rundir.py",
    "fcntl.LOCK_EX | fcntl.LOCK_NB",
    "fcntl.LOCK_SH | fcntl.LOCK_NB",
    "training/test_rundir.py::test_a_run_is_held_while_open_and_let_go_after",
  ),
  Mutant(
    "journal_repeats_steps",
    "training/journal.py",
    'kept = [line for line in read_lines(path) if line["step"] <= first_step]',
    "kept = read_lines(path)",
    "training/test_journal.py",
  ),
  Mutant(
    "journal_writes_twice",
    "training/journal.py",
    "self._written.add((step, split))",
    "pass",
    "training/test_journal.py",
  ),
  Mutant(
    "one_warning_silences_others",
    "training/closed_gates.py",
    "if limit not in self._warned:",
    "if not self._warned:",
    "training/test_closed_gates.py::test_of_several_kinds_of_gates_each_has_a_limit",
  ),
  Mutant(
    "resumed_watch_forgets",
    "training/loop.py",
    "for earlier, means in journal.past:",
    "for earlier, means in ():",
    "training/test_loop.py::test_what_the_watch_finds_in_a_line_is_said_after_it",
  ),
]

# Continual learning.
CONTINUAL = [
  Mutant(
    "frozen_filters_move",
    "continual/methods/task_gates.py",
    "lambda update, frozen: jnp.where(frozen, 0, update),",
    "lambda update, frozen: update,",
    "continual/methods/test_task_gates.py::test_updates_of_frozen_filters_are_0_and_all_others_stay",
  ),
  Mutant(
    "relevance_left_out",
    "continual/methods/task_gates.py",
    "if self.settings.shut_gates:",
    "if False:",
    "continual/methods/test_task_gates.py::test_units_that_are_not_relevant_never_open_again",
  ),
  Mutant(
    "frozen_only_if_frozen_before",
    "continual/units.py",
    "flat[*writer, name] |= relevant[place]",
    "flat[*writer, name] &= relevant[place]",
    "continual/methods/test_task_gates.py::"
    "test_filters_of_every_task_so_far_are_frozen_and_what_no_gate_switches",
  ),
  Mutant(
    "norms_shared_by_tasks",
    "continual/shared_net.py",
    "return not self.own_norms",
    "return not is_gate_path(path)",
    "continual/methods/test_task_gates.py::test_every_task_has_its_own_norms_unless_they_are_to_be_shared",
  ),
  Mutant(
    "momentum_of_the_last_task",
    "continual/training.py",
    "opt_state=optimiser.init(learner.params),",
    "opt_state=learner.opt_state,",
    "continual/test_run.py::test_every_task_begins_with_a_fresh_optimiser",
  ),
  Mutant(
    "second_task_compiles_again",
    "continual/build.py",
    "* 2, jnp.nan, jnp.float32)",
    "* 2, jnp.nan)",
    "continual/test_run.py::test_the_training_step_is_one_program_for_all_tasks",
  ),
  Mutant(
    "fisher_not_squared",
    "continual/methods/importance.py",
    "return jax.tree.map(lambda t, g: t + g**2, total, grads), None",
    "return jax.tree.map(lambda t, g: t + g, total, grads), None",
    "continual/methods/test_importance.py::test_fisher_of_softmax_regression_in_closed_form",
  ),
  Mutant(
    "path_integral_not_divided",
    "continual/methods/importance.py",
    "importance + jnp.maximum(path, 0) / ((p - anchor) ** 2 + damping)",
    "importance + jnp.maximum(path, 0)",
    "continual/methods/test_importance.py::test_importance_by_hand_and_never_below_zero",
  ),
  Mutant(
    "agem_without_projection",
    "continual/methods/replay.py",
    "share = jnp.where(along < 0, along / jnp.where(square > 0, square, 1.0), 0.0)",
    "share = 0.0 * along",
    "continual/methods/test_replay_agem.py::test_projection_by_hand",
  ),
  Mutant(
    "replay_keeps_the_newest_tasks",
    "continual/replay_memory.py",
    "chosen = even_choice(offered.labels, slots)",
    "chosen = np.arange(len(offered.labels))[-slots:]",
    "continual/test_replay_memory.py",
  ),
  Mutant(
    "replay_keeps_the_newest_images",
    "continual/replay_memory.py",
    "np.random.default_rng(seed).permutation(len(labels))",
    "np.arange(len(labels))[::-1]",
    "continual/test_replay_memory.py",
  ),
  Mutant(
    "lwf_without_temperature",
    "continual/methods/lwf.py",
    "logits = logits.reshape(len(logits), -1, classes) / temperature",
    "logits = logits.reshape(len(logits), -1, classes)",
    "continual/methods/test_lwf.py::test_value_by_hand",
  ),
  Mutant(
    "hat_frees_by_the_other_end",
    "continual/methods/hat.py",
    "return 1 - jnp.minimum(a_out, a_in[..., None])",
    "return 1 - jnp.maximum(a_out, a_in[..., None])",
    "continual/methods/test_hat.py::test_a_weight_is_as_free_as_the_freer_of_its_two_ends",
  ),
  Mutant(
    "icarl_classes_without_a_mean",
    "continual/methods/icarl.py",
    "return jnp.where(has_mean, -distance, -jnp.inf)",
    "return -distance",
    "continual/methods/test_icarl.py::test_means_and_scores_by_hand",
  ),
]

# Inference, export and videos.
INFERENCE = [
  Mutant(
    "bucket_one_short",
    "ops/compaction.py",
    "return min(size for size in sizes if size >= count)",
    "return min(size for size in sizes if size >= count - 1)",
    "ops/test_compaction.py",
  ),
  Mutant(
    "program_one_short",
    "inference/strategies.py",
    "sum((count > size).astype(jnp.int32) for size in sizes[:-1])",
    "sum((count > size + 1).astype(jnp.int32) for size in sizes[:-1])",
    "inference/test_conditional.py::test_the_program_for_any_number_of_open_examples_holds_them_all",
  ),
  Mutant(
    "overflow_dropped",
    "ops/pallas_kernels.py",
    "fits = jnp.max(jnp.sum(gates > 0, axis=0)) <= capacity",
    "fits = True",
    "ops/test_pallas_kernels.py::test_a_dispatch_of_too_little_capacity_is_masked_and_right",
  ),
  Mutant(
    "folded_without_norm_bias",
    "inference/folding.py",
    'bias = get("bias", 0) - mean * factor',
    "bias = -mean * factor",
    "inference/test_folding.py::test_the_same_outputs_gates_and_macs[basic]",
  ),
  Mutant(
    "shut_gates_normalised",
    "inference/folding.py",
    "moved_bias = np.where(shut, bias, moved_bias) - _shift(flat, part)",
    "moved_bias = moved_bias - _shift(flat, part)",
    "inference/test_folding.py::test_gates_that_are_shut_for_good_stay_shut",
  ),
  Mutant(
    "weight_of_the_moved_threshold",
    "inference/folded.py",
    "2 * jax.nn.sigmoid(z + shift)",
    "2 * jax.nn.sigmoid(z)",
    "inference/test_folding.py::test_folded_thresholds_by_hand",
  ),
  Mutant(
    "prior_in_the_weight",
    "layers/gate.py",
    "return relative, relative if weighing is None else jnp.where(counts, weighing, logits)",
    "return relative, relative",
    "models/test_importance.py",
  ),
  Mutant(
    "static_gates_that_learn",
    "images/start.py",
    "gain = 0.0 if is_static else",
    "gain =",
    "images/test_start.py",
  ),
  Mutant(
    "weighted_unit_loses_its_gate",
    "inference/pruning.py",
    "  if part.weighted:\n",
    "  if False:\n",
    "inference/test_pruning.py::test_weighted_units_that_are_always_open_keep_their_gates",
  ),
  Mutant(
    "bias_of_closed_channels",
    "ops/native_kernels.py",
    "x = _closed(x + step.bias[None, None, None], step.gate)",
    "x = _closed(x, step.gate) + step.bias[None, None, None]",
    "ops/test_native_kernels.py::test_a_branch_by_hand",
  ),
  Mutant(
    "int8_scale_of_zeros",
    "inference/quantising.py",
    "scale = jnp.where(largest > 0, largest, _LARGEST) / _LARGEST",
    "scale = largest / _LARGEST",
    "inference/test_quantising.py::test_values_and_scales_by_hand",
  ),
  Mutant(
    "changed_export_loaded",
    "inference/export.py",
    'if _digest(data) != said["sha256"]:',
    "if False:",
    "inference/test_export.py::test_a_file_of_the_right_size_that_was_changed_is_not_loaded",
  ),
  Mutant(
    "segment_mask_one_long",
    "data/video_features.py",
    "valid=np.arange(self._segments) < own,",
    "valid=np.arange(self._segments) <= own,",
    "data/test_videos.py::"
    "test_features_are_spread_over_longer_videos_and_repeated_over_shorter_ones",
  ),
  Mutant(
    "nan_file_counts",
    "data/video_features.py",
    "if not np.isfinite(features).all():",
    "if False:",
    "data/test_videos.py::test_features_that_cannot_be_used_count_for_nothing_with_the_reason",
  ),
  Mutant(
    "hidden_frames_shown",
    "data/video_files.py",
    "return [entry for entry in entries[first:] if not entry.is_discard]",
    "return entries[first:]",
    "data/test_video_files.py::test_an_edit_list_says_what_is_shown_and_when",
  ),
  Mutant(
    "frames_before_time_zero_shown",
    "data/video_files.py",
    "if container.format.name == _MP4:",
    "if False:",
    "data/test_video_files.py::test_a_film_cut_without_encoding_it_again_begins_where_it_was_cut",
  ),
  Mutant(
    "pictures_mirrored",
    "data/video_files.py",
    "pixels, matrix = pixels.swapaxes(0, 1), matrix[::-1]",
    "pixels = pixels.swapaxes(0, 1)",
    "data/test_video_files.py::test_a_display_matrix_turns_and_mirrors_the_picture",
  ),
  Mutant(
    "length_announced_in_vain",
    "data/video_files.py",
    "if reached < _WHOLE * announced:",
    "if False:",
    "data/test_video_files.py::test_a_film_that_ends_before_the_time_it_announces_is_refused",
  ),
  Mutant(
    "packets_are_frames",
    "data/video_files.py",
    "if _is_by_fields(film, shown):",
    "if False:",
    "data/test_video_files.py::test_frames_of_two_fields_in_a_packet_each_are_one_frame",
  ),
  Mutant(
    "budget_of_open_segments_missed",
    "ops/confidence.py",
    "fractions = least + passed.weight[-1] - passed.weight",
    "fractions = least + (passed.weight[-1] - passed.weight) / 2",
    "ops/test_confidence.py::test_the_threshold_of_open_segments_meets_the_budget_and_no_lower_one"
    "_does",
  ),
  Mutant(
    "damaged_entry_of_a_cache_taken",
    "data/array_cache.py",
    "return arrays if _checksum(arrays) == expected else None",
    "return arrays",
    "data/test_array_cache.py::test_a_damaged_entry_counts_as_missing_and_is_written_again",
  ),
  Mutant(
    "segments_of_a_video_augmented_apart",
    "video/sets.py",
    'videos = clips.reshape(*batch["picked"].shape, *clips.shape[1:])',
    "videos = clips[:, None]",
    "video/test_run.py::test_segments_of_a_video_are_augmented_alike_in_both_trainings",
  ),
  Mutant(
    "unsure_at_the_threshold",
    "ops/confidence.py",
    "sure = _highest_so_far(step_logits, valid_counts, multi_label) >= threshold",
    "sure = _highest_so_far(step_logits, valid_counts, multi_label) > threshold",
    "ops/test_confidence.py",
  ),
]

# Pictures as they are read, counts, the native kernel, and what pages say.
OTHERS = [
  Mutant(
    "levels_cut_off",
    "data/features.py",
    "levels = np.round(pixels.astype(np.float32) * (_WHITE / top))",
    "levels = np.floor(pixels.astype(np.float32) * (_WHITE / top))",
    "data/test_features.py::test_floats_that_round_to_a_level_are_read",
  ),
  Mutant(
    "gate_networks_free",
    "models/summary.py",
    "return self.never_gated_macs + self.gate_macs",
    "return self.never_gated_macs",
    "models/test_summary.py",
  ),
  Mutant(
    "gate_networks_counted_twice",
    "models/summary.py",
    "macs=sum_macs(trace.calls) - gate_macs,",
    "macs=sum_macs(trace.calls),",
    "models/test_summary.py",
  ),
  Mutant(
    "bias_of_another_channel",
    "native/gated_chain.cc",
    "g.bias[j - begin] = conv.bias[o];",
    "g.bias[j - begin] = conv.bias[j];",
    "ops/test_native_kernels.py::test_residual_branches_agree_with_their_twin",
  ),
  Mutant(
    "interval_upside_down",
    "reports/score_parts.py",
    "low, high = format_percent(interval.low, 1), format_percent(interval.high, 1)",
    "low, high = format_percent(interval.high, 1), format_percent(interval.low, 1)",
    "reports/test_score_parts.py",
  ),
  Mutant(
    "text_of_a_page_not_escaped",
    "reports/page.py",
    "autoescape=True,",
    "autoescape=False,",
    "reports/test_page.py::test_every_text_is_escaped",
  ),
]

MUTANTS = [*LOSSES, *GATES, *TRAINING, *CONTINUAL, *INFERENCE, *OTHERS]


def main() -> None:
  """Runs the mutants and prints a table of them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", metavar="NAME,...", help="these mutants alone")
  parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
  arguments = parser.parse_args()
  os.environ.update(QUICK | os.environ)
  FORKSERVER.set_forkserver_preload(PRELOADED)
  began = time.monotonic()
  mutants = sorted(chosen(arguments.only), key=lambda mutant: mutant.tests)
  if stale := [mutant.name for mutant in mutants if not is_fresh(mutant)]:
    sys.exit(f"stale, as the old text is not in its file exactly once: {', '.join(stale)}")
  with tempfile.TemporaryDirectory() as folder:
    copies = [made_copy(Path(folder, str(i))) for i in range(arguments.jobs)]
    if said := failures_without_mutants(copies, mutants):
      sys.exit(f"the tests must pass without a mutant:\n{said}")
    print(f"{time.monotonic() - began:.0f} s: the tests pass without a mutant", flush=True)
    results = run_all(copies, mutants)
  print(table(results))
  count = [result.outcome for result in results].count
  errors = f", {count(ERROR)} errors" if count(ERROR) else ""
  print(f"{time.monotonic() - began:.0f} s")
  print(f"{count(KILLED)} killed, {count(SURVIVED)} survived{errors}")
  sys.exit(count(KILLED) < len(results))


def chosen(names: str) -> list[Mutant]:
  """Returns the mutants of these names, or all without names; exits at an unknown name."""
  wanted = names.split(",") if names else [mutant.name for mutant in MUTANTS]
  if unknown := set(wanted) - {mutant.name for mutant in MUTANTS}:
    sys.exit(f"there is no mutant {', '.join(sorted(unknown))}")
  return [mutant for mutant in MUTANTS if mutant.name in wanted]


def is_fresh(mutant: Mutant) -> bool:
  """Checks that the mutant still fits the package."""
  return (ROOT / PACKAGE / mutant.file).read_text().count(mutant.old) == 1


def made_copy(folder: Path) -> Path:
  """Copies what the tests need."""
  folder.mkdir()
  for name in COPIED:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
    copy(ROOT / name, folder / name)
  return folder


def run_tests(folder: Path, tests: Sequence[str]) -> Run:
  """Runs those of the fast tests in a copy, up to the first that fails.

  Raises:
    TimeoutError: if they take longer than `TIMEOUT`.
  """
  said = folder / "said"
  # Of the run before: a process that dies at once says nothing.
  said.unlink(missing_ok=True)
  process = FORKSERVER.Process(target=_run_pytest, args=(folder, said, tests))
  process.start()
  process.join(TIMEOUT)
  if process.is_alive():
    process.kill()
    process.join()
    raise TimeoutError
  return Run(process.exitcode, said.read_text() if said.exists() else "")


def _run_pytest(folder: Path, said: Path, tests: Sequence[str]) -> None:
  """Runs pytest in a copy and ends this process, which is a fork that has imported JAX."""
  with said.open("w") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  os.chdir(folder)
  os.environ["PYTHONPATH"] = str(folder)
  sys.path[:] = [str(folder), *(path for path in sys.path if Path(path) != ROOT)]
  for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
    del sys.modules[name]
  found = importlib.import_module(PACKAGE).__file__
  if Path(found).parent != folder / PACKAGE:
    sys.exit(f"tests in {folder} would import {found}")
  options = ("-x", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", FAST)
  status = pytest.main([*options, *[f"tests/{test}" for test in tests]])
  sys.stdout.flush()
  sys.exit(status)


def failures_without_mutants(copies: Sequence[Path], mutants: Sequence[Mutant]) -> str:
  """Returns the output of pytest on the unmutated package if not all mutants' tests pass."""
  tests = sorted(set(" ".join(mutant.tests for mutant in mutants).split()))
  files = sorted({file_of(test) for test in tests})

  def failures(copy: Path) -> str:
    own = files[copies.index(copy) :: len(copies)]
    share = [test for test in tests if file_of(test) in own]
    run = run_tests(copy, share) if share else None
    return run.said if run and run.status else ""

  with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
    return "".join(pool.map(failures, copies))


def file_of(test: str) -> str:
  """Returns the file of a test."""
  return test.partition("::")[0]


def run_all(copies: Sequence[Path], mutants: Sequence[Mutant]) -> list[Result]:
  """Runs each mutant in a free copy, and prints its outcome at once."""
  free = queue.SimpleQueue()
  for copy in copies:
    free.put(copy)

  def run(mutant: Mutant) -> Result:
    copy = free.get()
    try:
      result = run_mutant(copy, mutant)
    finally:
      free.put(copy)
    print(f"{result.outcome:8}  {mutant.name}", flush=True)
    return result

  with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
    return list(pool.map(run, mutants))


def run_mutant(folder: Path, mutant: Mutant) -> Result:
  """Runs the mutant's tests with its fault in the copy, and puts the file back."""
  began, file = time.monotonic(), folder / PACKAGE / mutant.file
  right = file.read_text()
  file.write_text(right.replace(mutant.old, mutant.new))
  try:
    run = run_tests(folder, mutant.tests.split())
    outcome, said = judged(run.status, run.said)
  except TimeoutError:
    outcome, said = ERROR, f"no end within {TIMEOUT} s"
  finally:
    file.write_text(right)
  return Result(mutant, outcome, said, time.monotonic() - began)


def judged(status: int, output: str) -> tuple[str, str]:
  """Returns the outcome and the test that failed; an error of fixtures or imports is no failure."""
  failed = re.search(r"^FAILED (.+?)(?: - .*)?$", output, re.MULTILINE)
  if status == 1 and failed:
    return KILLED, failed[1].removeprefix("tests/")
  if status == 0:
    return SURVIVED, "no test failed"
  lines = output.splitlines()
  said = [line for line in lines if line.startswith("ERROR ")] or lines[-1:]
  return ERROR, f"pytest ended with {status}: {' '.join(said)}"


def table(results: Sequence[Result]) -> str:
  """Formats the results in columns."""
  rows = [("mutant", "file", "killed by", "seconds")]
  for result in results:
    said = result.said if result.outcome == KILLED else f"{result.outcome.upper()}: {result.said}"
    rows.append((result.mutant.name, result.mutant.file, said, f"{result.seconds:.1f}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
  ]
  return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
  main()
