"""`--mode=export`: a trained image classifier, pruned and exported to run without this package.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import quoted
from gating_jax.images.build import Experiment
from gating_jax.images.model_card import hub_files, without_folders
from gating_jax.inference import costs, exits, export, folded
from gating_jax.inference.analysing import (
  BATCH_SIZE,
  Analysis,
  PruningEffect,
  analyse,
  observe,
  pruning_error,
)
from gating_jax.inference.compiled import (
  count_pieces,
  run_over,
  spread_batches,
  spread_indices,
)
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.folded import FoldedNet, Gates
from gating_jax.inference.onnx_export import load_onnx, to_onnx
from gating_jax.inference.pruning import apply_pruning, find_static_units, rate_bound
from gating_jax.inference.quantising import dequantise, quantise
from gating_jax.inference.strategies import EXPORTABLE
from gating_jax.models.resnet_variants import EarlyExitNet
from gating_jax.reports import conclusion, measured_times, timings
from gating_jax.reports.text import align_columns, format_percent
from gating_jax.terminal import say, working
from gating_jax.timing import MASKED, ReportProgress, device, race
from gating_jax.training import rundir
from gating_jax.types import Array

# Rows of tables, which are keys of files too.
_TRAINED, _PRUNED, _INT8, _SKIPPING = "trained", "pruned", "pruned, int8", "pruned, skipping"
_ONNX, ONNX_FILE = "pruned, onnxruntime", "model.onnx"
# Why a network with early exits has none.
_NO_ONNX = "not written: in an ONNX model every image would pass through all stages"
_WITHOUT_ONNX = 'not written, since onnx is missing: pip install "gating-jax[export]"'
FOLDERS = {_PRUNED: "export", _INT8: "export_int8", _SKIPPING: "export_conditional"}
# The most images to calibrate on, evenly over the training set.
CALIBRATION = 2_000
# As in --mode=compile, which times the same images: so both agree.
_TIMED_BATCHES, _REPEATS = (1, 64), 20


class _ExportCandidate(NamedTuple):
  """A network that is timed and, unless it is the one as trained, exported.

  Attributes:
    model: the network or program, as `export_model` takes it.
    program: computes the outputs and the gate logits of images `[N, H, W, D]`.
    score: its accuracy and MACs, as `_score` returns them.
  """

  model: Any
  program: Callable[[Any], Any]
  score: Mapping[str, float]


def export_run(
  experiment: Experiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]
) -> None:
  """Writes the exports into the run directory, all or none, and prints a summary.

  One has float32 weights, and an ONNX model where the package `onnx` is installed, which is tested
  and timed where `onnxruntime` is; one int8 weights; a third one skips closed units, where that is
  faster for one image at a time. A network with early exits has one export, for one image at a
  time. Each has the files of a model hub.

  Args:
    experiment: the experiment of the run.
    run_dir: the run directory.
    step: the step of the checkpoint.
    variables: its parameters and statistics.
  Raises:
    RunDirError: one of the exports is there, or is being written.
    ValueError: the model cannot be folded.
  """
  # An interrupted export leaves nothing half-written.
  with rundir.staged(run_dir.path, tuple(FOLDERS.values())) as folder:
    write = _write_exits if isinstance(experiment.model, EarlyExitNet) else _write
    # An export may be published: it names no folders of this machine.
    origin = {"config": without_folders(run_dir.config()), "step": step}
    trained = write(experiment, folder, origin, variables)
    paths, rows = [], []
    for name in FOLDERS.values():
      if not (folder / name).exists():
        continue
      card, path = export.load_exported(folder / name).card, run_dir.path / name
      paths.append(path)
      rows.append((str(path), _summary(card)))
      if (folder / name / ONNX_FILE).exists():
        rows.append((str(path / ONNX_FILE), _onnx_summary(card)))
  say(f"\nwritten: {', '.join(map(str, paths))}")
  if isinstance(experiment.model, EarlyExitNet):
    rows.append((ONNX_FILE, _NO_ONNX))
  elif not _has_onnx():
    rows.append((ONNX_FILE, _WITHOUT_ONNX))
  rows.append(("trained net", _as_compiled(run_dir, step, trained)))
  say(
    conclusion.closing_text(
      f"Exported the checkpoint of step {step:,}, its times on {device()}.",
      rows,
      [
        _load_command(paths[0], experiment.config.model.sources),
        *conclusion.next_commands(run_dir.path, ["compile"]),
      ],
    )
  )


def _has_onnx() -> bool:
  """Returns whether the package that writes ONNX models is installed."""
  return importlib.util.find_spec("onnx") is not None


def _summary(card: Mapping[str, Any]) -> str:
  """Summarises an export in a line."""
  macs = f"{card['executed_macs']:,.0f} MACs per image"
  return ", ".join([format_percent(card["accuracy"], 2), macs, *_times(card)])


def _onnx_summary(card: Mapping[str, Any]) -> str:
  """Summarises the ONNX model of an export in a line."""
  measured = card.get("onnx")
  if measured is None:
    return "neither tested nor timed, since onnxruntime is not installed"
  accuracy = format_percent(measured["accuracy"], 2)
  return f"{', '.join([accuracy, *_times(measured)])} in onnxruntime"


def _times(measured: Mapping[str, Any]) -> list[str]:
  """Returns the times of each batch size as text."""
  times = []
  for size, time in measured["milliseconds"].items():
    times.append(f"{time:.2f} ms" + ("" if size == "1" else f" for {size} images"))
  return times


def _load_command(path: Path, sources: int | None) -> str:
  """Returns a command that runs an export, of a union of so many sets, on an image file."""
  number = "--set=NUMBER " if sources else ""
  script = quoted(str(path / "load.py"))
  return f"python {script} {number}IMAGE    # its class, without this package"


def _as_compiled(run_dir: rundir.RunDir, step: int, trained: float) -> str:
  """Describes the time of one image in the trained network with everything computed.

  It is the time measured here, in milliseconds, next to that of `--mode=compile` for the same
  checkpoint.
  """
  times, found = measured_times.read_times(run_dir.path), [f"{trained:.2f} ms"]
  # Times of another checkpoint are those of another network.
  if times is not None and times.step == step:
    for row in times.timings.get(measured_times.timing_title(1, "image"), []):
      if row["part"] is None and row["strategy"] == MASKED:
        found.append(f"{1e3 * row['seconds']:.2f} ms by --mode=compile")
  return "; ".join(found)


def _write(
  experiment: Experiment, folder: Path, origin: Mapping[str, Any], variables: Mapping[str, Any]
) -> float:
  """Writes the exports; returns the milliseconds of one image in the trained network."""
  with working("opening the training data", "minutes for large sets"):
    train = experiment.open_train()
  analysis = _analyse(experiment, variables, train)
  effect, candidates = _prune(experiment, analysis)
  layers = [name for name, _ in experiment.counts.gate_layers]
  say(f"\ncheckpoint of step {origin['step']}, calibrated on {analysis.images:,} training images\n")
  say("\n".join(_analysis_lines(analysis, layers)))
  say("\n".join(["", *_pruning_lines(analysis, effect), ""]))
  images = timings.calibration_images(train, experiment.normalise)
  skipping = _skipping_candidate(experiment, candidates[_PRUNED], images)
  if skipping is not None:
    candidates[_SKIPPING] = skipping
  onnx = None
  if _has_onnx():
    with working("making the ONNX model", "up to half a minute"):
      onnx = to_onnx(candidates[_PRUNED].model, analysis.input_shape)
    if importlib.util.find_spec("onnxruntime") is not None:
      candidates[_ONNX] = _onnx_candidate(experiment, candidates[_PRUNED], onnx)
  milliseconds = _time_candidates(candidates, images)
  trained, in_onnx = candidates.pop(_TRAINED).score, candidates.pop(_ONNX, None)
  table = [_head(), _row(_TRAINED, trained, {"milliseconds": milliseconds[_TRAINED]})]
  for name, candidate in candidates.items():
    card = _card(experiment, origin, candidate.score) | {
      "weights": "int8" if name == _INT8 else "float32",
      "accuracy_as_trained": trained["accuracy"],
      "executed_macs_as_trained": trained["executed_macs"],
      "calibration_images": analysis.images,
      "test_images": effect.images,
      "test_images_affected": effect.affected,
      "milliseconds": milliseconds[name],
    }
    if name == _SKIPPING:
      card["strategies"] = candidate.model.strategies
    files = {}
    if name == _PRUNED and onnx is not None:
      files[ONNX_FILE] = onnx
      if in_onnx is not None:
        card["onnx"] = {
          "accuracy": in_onnx.score["accuracy"],
          "milliseconds": milliseconds[_ONNX],
          "runtime": f"onnxruntime {importlib.metadata.version('onnxruntime')}",
        }
    with working(f"writing the net, {name}", "up to half a minute"):
      path = export.export_model(
        candidate.model,
        folder / FOLDERS[name],
        input_shape=analysis.input_shape,
        card=card,
        files=files | hub_files(card, analysis.input_shape, has_onnx=ONNX_FILE in files),
      )
      # Read back: the export adds the sizes of its files to the card.
      table.append(_row(name, candidate.score, export.load_exported(path).card))
  if in_onnx is not None:
    table.append(_row(_ONNX, in_onnx.score, {"milliseconds": milliseconds[_ONNX]}))
  say("\n".join(align_columns(table)))
  if analysis.gate_statistics and skipping is None:
    say(
      "For one image at a time computing everything is as fast as skipping here: no program that "
      "skips closed units is written."
    )
  return milliseconds[_TRAINED]["1"]


def _prune(
  experiment: Experiment, analysis: Analysis
) -> tuple[PruningEffect, dict[str, _ExportCandidate]]:
  """Prunes the network; tests it as trained, pruned and in int8.

  Returns:
    the effect of pruning on test images, and the three networks by name.
  """
  net = analysis.net
  static = find_static_units(net, analysis.gate_statistics)
  with working(
    f"testing the net as trained, pruned and in int8 on {len(experiment.test):,} images",
    "up to a minute",
  ):
    # On test images: pruning was decided on training images.
    effect = pruning_error(net, static, _inputs(experiment, experiment.test))
    pruned = apply_pruning(net, static)
    return effect, {
      _TRAINED: _candidate(experiment, net),
      _PRUNED: _candidate(experiment, pruned),
      _INT8: _candidate(experiment, quantise(pruned)),
    }


def _time_candidates(
  candidates: Mapping[str, _ExportCandidate], images: np.ndarray
) -> dict[str, dict[str, float]]:
  """Measures milliseconds per batch, by name and batch size.

  Args:
    candidates: the networks, by name.
    images: `[M, H, W, D]`, the calibration images.
  """
  programs = {name: candidate.program for name, candidate in candidates.items()}
  with working("timing the nets, one image and many at a time", "up to a minute") as progress:
    # The other half of the images chose the strategies.
    timed = images[1::2] if len(images) > 1 else images
    return _milliseconds(programs, timed, progress)


def _analyse(experiment: Experiment, variables: Mapping[str, Any], train: Any) -> Analysis:
  """Folds the network and measures how often its gates are open, on training images."""
  index = spread_indices(len(train), CALIBRATION)
  with working(
    f"measuring open rates of gates on {len(index):,} training images", "up to a minute"
  ):
    return analyse(experiment.model, variables, _inputs(experiment, train, index))


def _candidate(experiment: Experiment, net: FoldedNet) -> _ExportCandidate:
  """Tests a network that computes every unit."""
  return _ExportCandidate(net, functools.partial(_run_net, net), _score(experiment, net))


@jax.jit
def _run_net(net: FoldedNet, x: Array) -> tuple[Array, Gates]:
  """Computes outputs and gate logits of images `[N, H, W, D]`, with float32 or int8 weights."""
  # Weights are an argument: as constants, int8 ones would be dequantised while compiling.
  return folded.run_net(dequantise(net), x)


def _skipping_candidate(
  experiment: Experiment, pruned: _ExportCandidate, images: np.ndarray
) -> _ExportCandidate | None:
  """Compiles and tests a program that skips closed units; None where skipping saves no time.

  Args:
    experiment: the experiment of the run.
    pruned: the network to compile.
    images: `[M, H, W, D]`, the calibration images.
  """
  with working(
    "compiling and timing programs that skip closed units, one image at a time", "some minutes"
  ) as progress:
    # Strategies are chosen by their times, for a batch of one image.
    program = compile_conditional(
      pruned.model,
      input_shape=images.shape[1:],
      batch_size=1,
      candidates=EXPORTABLE,
      repeats=_REPEATS,
      calibration=images,
      progress=progress,
    )
  # Where every part is masked, nothing is skipped.
  if set(program.strategies) == {MASKED}:
    return None
  with working(
    f"testing the net that skips closed units on {len(experiment.test):,} images, one at a time",
    "up to a minute",
  ):
    accuracy = _accuracy(experiment, lambda x: program(x)[0])
  return _ExportCandidate(program, program, {**pruned.score, "accuracy": accuracy})


def _onnx_candidate(
  experiment: Experiment, pruned: _ExportCandidate, data: bytes
) -> _ExportCandidate:
  """Tests the ONNX model of the pruned network in onnxruntime."""
  program = load_onnx(data)
  with working(f"testing the ONNX model on {len(experiment.test):,} images", "up to a minute"):
    accuracy = _accuracy(experiment, lambda x: program(x)[0])
  return _ExportCandidate(data, program, {**pruned.score, "accuracy": accuracy})


def _write_exits(
  experiment: Experiment, folder: Path, origin: Mapping[str, Any], variables: Mapping[str, Any]
) -> float:
  """Writes the export of a network with exits; returns the same time as `_write`."""
  with working("opening the training data", "minutes for large sets"):
    images = timings.calibration_images(experiment.open_train(), experiment.normalise)
  net, shape = exits.fold_exits(experiment.model, variables), experiment.test.shape
  with working(
    "compiling and timing programs with early exits, for one image", "a minute or two"
  ) as progress:
    made = exits.compile_exits(
      net, input_shape=shape, batch_size=1, repeats=_REPEATS, calibration=images, progress=progress
    )
  score = _score_exits(experiment, net, made)
  whole = functools.partial(exits.make_program(), net)
  with working("timing the program and the net, one image at a time", "up to a minute") as progress:
    times = _milliseconds({"exits": made, MASKED: whole}, images, progress, sizes=(1,))
  card = _card(experiment, origin, score) | {
    "strategies": [made.strategy],
    "milliseconds": times["exits"],
  }
  with working("writing the net", "up to half a minute"):
    path = export.export_model(
      made,
      folder / FOLDERS[_PRUNED],
      input_shape=shape,
      card=card,
      files=hub_files(card, shape),
    )
  say(f"\ncheckpoint of step {origin['step']}\n")
  table = [_head(), _row(made.strategy, score, export.load_exported(path).card)]
  say("\n".join(align_columns(table)))
  return times[MASKED]["1"]


def _score_exits(
  experiment: Experiment, net: exits.ExitNet, made: exits.CompiledExits
) -> dict[str, float]:
  """Computes test accuracy, and MACs per image: of the whole net, and up to the exits taken."""
  test, macs = experiment.test, []

  def answer(x: Array) -> Array:
    """Returns logits `[N, K]` of images `[N, H, W, D]`; notes the MACs of each."""
    logits, stay = made(x)
    # An image costs what lies before the exit that it takes.
    macs.append(costs.exit_macs(net, test.shape, stay))
    return logits

  with working(f"testing the program on {len(test):,} images, one at a time", "up to a minute"):
    accuracy = _accuracy(experiment, answer)
  return {
    "accuracy": accuracy,
    "macs": int(costs.exit_macs(net, test.shape)),
    "executed_macs": float(np.mean(np.concatenate(macs))),
  }


def _batches(
  experiment: Experiment, images: Any, index: np.ndarray | None = None
) -> Iterator[tuple[Any, Any]]:
  """Yields network inputs and labels, of all images or those at `index`."""
  index = np.arange(len(images)) if index is None else index
  for start in range(0, len(index), BATCH_SIZE):
    pixels, labels = images.read(index[start : start + BATCH_SIZE])
    yield np.asarray(experiment.normalise(pixels), np.float32), np.asarray(labels)


def _inputs(
  experiment: Experiment, images: Any, index: np.ndarray | None = None
) -> Iterator[np.ndarray]:
  """Yields the network inputs of `_batches` alone."""
  for x, _ in _batches(experiment, images, index):
    yield x


def _score(experiment: Experiment, net: FoldedNet) -> dict[str, float]:
  """Computes accuracy on the test set, and MACs per image: of every unit, and of the open ones."""
  net, shape = dequantise(net), experiment.test.shape
  correct, executed, labels = 0, 0, []

  def inputs():
    """Yields test images `[N, H, W, D]`; keeps their labels for the scores."""
    for x, of_batch in _batches(experiment, experiment.test):
      labels.append(of_batch)
      yield x

  # Batches are of `BATCH_SIZE` images, which `observe` takes one by one: labels stay in step.
  for x, outputs, logits in observe(net, inputs()):
    correct += _count_right(experiment, outputs, labels.pop())
    macs = costs.macs(net, shape, [z > 0 for z in logits])
    # A network without gates has one number for all images.
    executed += np.broadcast_to(macs, len(x)).sum()
  images = len(experiment.test)
  return {
    "accuracy": correct / images,
    "macs": int(costs.macs(net, shape)),
    "executed_macs": float(executed) / images,
  }


def _accuracy(experiment: Experiment, answer: Callable[[Any], Any]) -> float:
  """Computes the accuracy of the answers for all test images."""
  right = 0
  for x, labels in _batches(experiment, experiment.test):
    right += _count_right(experiment, answer(x), labels)
  return right / len(experiment.test)


def _count_right(experiment: Experiment, outputs: Any, labels: Any) -> int:
  """Counts the images that are classified rightly, among the classes that compete in tests."""
  competing = experiment.competing(jnp.asarray(outputs), jnp.asarray(labels))
  return int(np.sum(np.argmax(np.asarray(competing), axis=1) == np.asarray(labels)))


def _milliseconds(
  programs: Mapping[str, Callable[[Any], Any]],
  images: np.ndarray,
  progress: ReportProgress,
  *,
  sizes: Sequence[int] = _TIMED_BATCHES,
) -> dict[str, dict[str, float]]:
  """Measures milliseconds per batch: medians over calls, by program and batch size.

  All programs run in turns. One that skips is timed for one image alone.

  Args:
    programs: the programs, by name.
    images: `[N, H, W, D]` network inputs.
    progress: takes the timings done and their total.
    sizes: the batch sizes.
  """
  runs, batches, total = {}, {}, 0
  for size in sizes:
    batches[size] = [(x,) for x in spread_batches(images, size)]
    runs[size] = {}
    for name, program in programs.items():
      # The program that skips is compiled for a batch of one.
      if size == 1 or name != _SKIPPING:
        runs[size][name] = functools.partial(run_over, program, batches[size])
        total += 1
  found, on_start = {name: {} for name in programs}, count_pieces(progress, total)
  for size in sizes:
    # By turns, so that a slow spell of the machine hits all programs.
    for name, times in race(runs[size], _REPEATS, on_start=on_start).items():
      seconds = statistics.median(times) / len(batches[size])
      found[name][str(size)] = round(1000 * seconds, 3)
  return found


def _card(
  experiment: Experiment, origin: Mapping[str, Any], score: Mapping[str, float]
) -> dict[str, Any]:
  """Returns what every export says of itself: its scores, and how its images are prepared."""
  data = experiment.config.data
  # Pixels must be normalised as in training, by whoever runs the export.
  return {
    **origin,
    **score,
    "mean": list(data.mean),
    "std": list(data.std),
    "class_names": list(experiment.test.class_names),
    "device": device(),
  }


def _analysis_lines(analysis: Analysis, names: list[str]) -> list[str]:
  """Returns a table of the gated layers, if there are any, and one of the ways to run the net."""
  ways = [["way to run it", "MACs per image", "of ungated"]]
  for row in analysis.mac_rows():
    ways.append([row["strategy"], f"{row['macs']:,.0f}", format_percent(row["ratio"], 1)])
  counted = ("always_open", "always_closed", "varies", "open_on_all", "closed_on_all")
  titles = [key.replace("_", " ") for key in counted]
  head = ["layer", "units", "open", *titles, "correlation"]
  layers = [head]
  for name, row in zip(names, analysis.rows(), strict=True):
    counts = [str(row[key]) for key in counted]
    share, correlation = format_percent(row["open"], 1), f"{row['correlation']:.3f}"
    layers.append([name, str(row["units"]), share, *counts, correlation])
  if len(layers) == 1:
    return align_columns(ways)
  return [*align_columns(layers), "", *align_columns(ways)]


def _pruning_lines(analysis: Analysis, effect: PruningEffect) -> list[str]:
  """Describes how much the pruning of static units changes the network on test images."""
  # An upper confidence bound: not seeing a unit open does not prove that it never opens.
  bound = 100 * rate_bound(analysis.images, 0.95)
  worst = max((*effect.opened, *effect.closed), default=0.0)
  return [
    f"A unit never seen open opens on at most {bound:.3f} % of images, at 95 % confidence for "
    "each.",
    f"On {format_percent(effect.affected, 2)} of {effect.images:,} test images a static unit would "
    f"have moved ({format_percent(worst, 2)} in the layer with the most);",
    f"outputs differ by at most {effect.difference[0]:.3g} there, {effect.difference[1]:.1e} "
    f"elsewhere; {format_percent(effect.changed, 2)} of images are classified differently.",
  ]


def _head() -> list[str]:
  """Returns the head of the table of exports."""
  times = [f"ms ({size})" for size in _TIMED_BATCHES]
  sizes = ["weights, bytes", "program, bytes"]
  return ["net", "test accuracy", "MACs per image", "executed", *sizes, *times]


def _row(name: str, score: Mapping[str, float], card: Mapping[str, Any]) -> list[str]:
  """Returns the row of a network; the one as trained has no files, and no card but its times."""
  row = [
    name,
    format_percent(score["accuracy"], 2),
    f"{score['macs']:,}",
    f"{score['executed_macs']:,.0f}",
  ]
  files, times = card.get("files"), card["milliseconds"]
  for file in (export.WEIGHTS, export.PROGRAM):
    row.append(f"{files[file]['bytes']:,}" if files else "")
  # A program for a batch of one has no time for larger ones.
  for size in _TIMED_BATCHES:
    row.append(f"{times[str(size)]:.2f}" if str(size) in times else "")
  return row
