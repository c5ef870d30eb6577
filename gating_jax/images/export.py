"""`--mode=export`: a trained image classifier, pruned and exported to run without this package.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import functools
import itertools
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gating_jax import config_files
from gating_jax.images.build import Experiment
from gating_jax.inference import exits, export, folded, gate_statistics
from gating_jax.inference.analyse import Analysis, analyse
from gating_jax.inference.compiled import compile_conditional
from gating_jax.inference.folded import FoldedNet
from gating_jax.inference.inputs import spread
from gating_jax.inference.kernel_strategies import EXPORTABLE
from gating_jax.inference.pruning import (
  PruningEffect,
  apply_pruning,
  find_static_units,
  pruning_error,
  rate_bound,
)
from gating_jax.inference.quantise import dequantise, quantise
from gating_jax.inference.timings import run_over, spread_batches
from gating_jax.models.resnet_variants import EarlyExitNet
from gating_jax.paths import quoted
from gating_jax.reports import compile_report, conclusion, surroundings
from gating_jax.reports.text import align_columns
from gating_jax.reports.timings import timing_title
from gating_jax.terminal import Advance, say, working
from gating_jax.timing import MASKED, device, race
from gating_jax.training import rundir
from gating_jax.types import Array

_TRAINED, _SLIMMED, _INT8, _SKIPPING = "trained", "slimmed", "slimmed, int8", "slimmed, skipping"
FOLDERS = {_SLIMMED: "export", _INT8: "export_int8", _SKIPPING: "export_conditional"}
# The most images to calibrate on, evenly over the training set.
CALIBRATION = 2_000
# As in --mode=compile, which times the same images: so both agree.
_TIMED_BATCHES, _REPEATS = (1, 64), 20


def run(
  experiment: Experiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]
) -> None:
  """Writes the exports into the run directory, all or none, and prints a summary.

  One has float32 weights, one int8 weights; a third one skips closed units, where that is faster
  for one image at a time. A network with early exits has one export, for one image at a time.

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
    trained = write(experiment, folder, {"config": run_dir.config(), "step": step}, variables)
    cards = {
      name: export.load_exported(folder / name).card
      for name in FOLDERS.values()
      if (folder / name).exists()
    }
  paths = [str(run_dir.path / name) for name in cards]
  say(f"\nwritten: {', '.join(paths)}")
  rows = [(path, _summary(card)) for path, card in zip(paths, cards.values(), strict=True)]
  rows += _as_compiled(run_dir, step, trained)
  say(
    conclusion.text(
      f"Exported the checkpoint of step {step:,}, its times on {device()}.",
      rows,
      [_load_command(paths[0]), *conclusion.following(run_dir.path, ["compile"])],
    )
  )


def _summary(card: Mapping[str, Any]) -> str:
  """Summarises an export in a line."""
  times = [
    f"{spent:.2f} ms" + ("" if size == "1" else f" for {size} images")
    for size, spent in card["milliseconds"].items()
  ]
  return (
    f"{100 * card['accuracy']:.2f} %, {card['executed_macs']:,.0f} MACs per image, "
    f"{', '.join(times)}"
  )


def _load_command(path: str) -> str:
  """Returns a command that runs an export.

  It is the example of the repository, which runs without this package, where that is at hand;
  otherwise it loads the export by this package.
  """
  example = config_files.folder().parent / "docs" / "examples" / "load_exported.py"
  if example.is_file():
    return f"python {quoted(str(example))} {quoted(path)}    (runs it without this package)"
  return (
    f"python -c {shlex.quote(f'import gating_jax; print(gating_jax.load_exported({path!r}))')}    "
    "(loads it)"
  )


def _as_compiled(run_dir: rundir.RunDir, step: int, trained: float) -> list[tuple[str, str]]:
  """Returns the time of one image in the trained network with everything computed.

  It is the time measured here, next to that of `--mode=compile` for the same checkpoint.
  """
  here, times = f"{trained:.2f} ms", surroundings.read_times(run_dir.path)
  # Times of another checkpoint are those of another network.
  rows = []
  if times is not None and times.step == step:
    rows = times.timings.get(timing_title(1, "image"), [])
  there = [row["seconds"] for row in rows if row["part"] is None and row["strategy"] == MASKED]
  return [
    (
      "trained net",
      here + "".join(f"; {1e3 * seconds:.2f} ms by --mode=compile" for seconds in there),
    )
  ]


def _write(
  experiment: Experiment, folder: Path, origin: Mapping[str, Any], variables: Mapping[str, Any]
) -> float:
  """Writes the exports; returns the milliseconds of one image in the trained network."""
  with working("opening the training data", "minutes for large sets"):
    train = experiment.open_train()
  index = spread(len(train), CALIBRATION)
  with working(
    f"measuring open rates of gates on {len(index):,} training images", "up to a minute"
  ):
    analysis = analyse(
      experiment.model, variables, (x for x, _ in _batches(experiment, train, index))
    )
  net, choices, shape = (
    analysis.net,
    find_static_units(analysis.net, analysis.openings),
    analysis.input_shape,
  )
  small = apply_pruning(net, choices)
  with working(
    f"testing the net as trained, slimmed and in int8 on {len(experiment.test):,} images",
    "up to a minute",
  ):
    # On test images: pruning was decided on training images.
    moved = pruning_error(net, choices, (x for x, _ in _batches(experiment, experiment.test)))
    models = {_TRAINED: net, _SLIMMED: small, _INT8: quantise(small)}
    scores = {name: _score(experiment, each) for name, each in models.items()}
  say(f"\ncheckpoint of step {origin['step']}, calibrated on {analysis.images:,} training images\n")
  say("\n".join(_analysis_lines(analysis, [name for name, _ in experiment.counts.gate_layers])))
  say("\n".join(["", *_moved_lines(analysis, moved), ""]))
  with working(
    "compiling and timing programs that skip closed units, one image at a time", "some minutes"
  ) as progress:
    # Strategies are chosen by their times, for a batch of one image.
    images = compile_report.calibration_images(train, experiment.normalise)
    skipping = compile_conditional(
      small,
      input_shape=shape,
      batch_size=1,
      candidates=EXPORTABLE,
      repeats=_REPEATS,
      calibration=images,
      progress=progress,
    )
  programs = {
    # Weights are an argument: as constants, int8 ones would be dequantised while compiling.
    name: functools.partial(jax.jit(lambda net, x: folded.run(dequantise(net), x)), each)
    for name, each in models.items()
  }
  # Where every part is masked, skipping saves no time, and there is no third export.
  if set(skipping.strategies) != {MASKED}:
    models[_SKIPPING], programs[_SKIPPING] = skipping, skipping
    with working(
      f"testing the net that skips closed units on {len(experiment.test):,} images, one at a time",
      "up to a minute",
    ):
      scores[_SKIPPING] = scores[_SLIMMED] | {
        "accuracy": _accuracy(experiment, lambda x: skipping(x)[0])
      }
  with working("timing the nets, one image and many at a time", "up to a minute") as progress:
    # The other half of the images chose the strategies.
    milliseconds = _milliseconds(programs, images[1::2] if len(images) > 1 else images, progress)
  table = [_head(), _row(_TRAINED, scores[_TRAINED], {"milliseconds": milliseconds[_TRAINED]})]
  for name, model in models.items():
    if name == _TRAINED:
      continue
    card = _card(experiment, origin, scores[name]) | {
      "weights": "int8" if name == _INT8 else "float32",
      "accuracy_as_trained": scores[_TRAINED]["accuracy"],
      "executed_macs_as_trained": scores[_TRAINED]["executed_macs"],
      "calibration_images": analysis.images,
      "test_images": moved.images,
      "test_images_affected": moved.affected,
      "milliseconds": milliseconds[name],
      **({"strategies": skipping.strategies} if name == _SKIPPING else {}),
    }
    with working(f"writing the net, {name}", "up to half a minute"):
      path = export.export_model(model, folder / FOLDERS[name], input_shape=shape, card=card)
      # Read back: the export adds the sizes of its files to the card.
      table.append(_row(name, scores[name], export.load_exported(path).card))
  say("\n".join(align_columns(table)))
  if analysis.openings and _SKIPPING not in models:
    say(
      "For one image at a time computing everything is as fast as skipping here: no program that "
      "skips closed units is written."
    )
  return milliseconds[_TRAINED]["1"]


def _write_exits(
  experiment: Experiment, folder: Path, origin: Mapping[str, Any], variables: Mapping[str, Any]
) -> float:
  """Writes the export of a network with exits; returns the same time as `_write`."""
  with working("opening the training data", "minutes for large sets"):
    train, test = experiment.open_train(), experiment.test
    images, spent = compile_report.calibration_images(train, experiment.normalise), []
  net, shape = exits.fold_exits(experiment.model, variables), test.shape
  with working(
    "compiling and timing programs with early exits, for one image", "a minute or two"
  ) as progress:
    made = exits.compile_exits(
      net, input_shape=shape, batch_size=1, repeats=_REPEATS, calibration=images, progress=progress
    )

  def answer(x: Array) -> Array:
    """Returns logits `[N, K]` of images `[N, H, W, D]`; notes the MACs of each."""
    logits, stay = made(x)
    # An image costs what lies before the exit that it takes.
    spent.append(exits.macs(net, shape, stay))
    return logits

  with working(f"testing the program on {len(test):,} images, one at a time", "up to a minute"):
    accuracy = _accuracy(experiment, answer)
  score = {
    "accuracy": accuracy,
    "macs": int(exits.macs(net, shape)),
    "executed_macs": float(np.mean(np.concatenate(spent))),
  }
  whole = functools.partial(exits.program(), net)
  with working("timing the program and the net, one image at a time", "up to a minute") as progress:
    times = _milliseconds({"exits": made, MASKED: whole}, images, progress, sizes=(1,))
  milliseconds = times["exits"]
  card = _card(experiment, origin, score) | {
    "strategies": [made.strategy],
    "milliseconds": milliseconds,
  }
  with working("writing the net", "up to half a minute"):
    path = export.export_model(made, folder / FOLDERS[_SLIMMED], input_shape=shape, card=card)
  say(f"\ncheckpoint of step {origin['step']}\n")
  say(
    "\n".join(align_columns([_head(), _row(made.strategy, score, export.load_exported(path).card)]))
  )
  return times[MASKED]["1"]


def _batches(
  experiment: Experiment, images: Any, index: np.ndarray | None = None
) -> Iterator[tuple[Any, Any]]:
  """Yields network inputs and labels, of all images or those at `index`."""
  index = np.arange(len(images)) if index is None else index
  for start in range(0, len(index), gate_statistics.BATCH):
    pixels, labels = images.read(index[start : start + gate_statistics.BATCH])
    yield np.asarray(experiment.normalise(pixels), np.float32), np.asarray(labels)


def _score(experiment: Experiment, net: FoldedNet) -> dict[str, float]:
  """Computes accuracy on the test set, and MACs per image: of every unit, and of the open ones."""
  net, labels, correct, executed, images = dequantise(net), [], 0, 0, 0

  def inputs():
    """Yields test images `[N, H, W, D]`; keeps their labels for the scores."""
    for x, named in _batches(experiment, experiment.test):
      labels.append(named)
      yield x

  # Batches are of `BATCH` images, which `observed` takes one by one: labels stay in step.
  for x, outputs, logits in gate_statistics.observed(net, inputs()):
    correct += int(np.sum(np.argmax(outputs, axis=1) == labels.pop()))
    executed += np.broadcast_to(
      folded.macs(net, x.shape[1:], [z > 0 for z in logits]), len(x)
    ).sum()
    images += len(x)
  return {
    "accuracy": correct / images,
    "macs": int(folded.macs(net, x.shape[1:])),
    "executed_macs": float(executed) / images,
  }


def _accuracy(experiment: Experiment, answer: Callable[[np.ndarray], Any]) -> float:
  """Computes the accuracy of the answers for all test images."""
  right = sum(
    int(np.sum(np.argmax(np.asarray(answer(x)), axis=1) == labels))
    for x, labels in _batches(experiment, experiment.test)
  )
  return right / len(experiment.test)


def _milliseconds(
  programs: Mapping[str, Callable[[Any], Any]],
  images: np.ndarray,
  progress: Advance = lambda done, total: None,
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
  # The program that skips is compiled for a batch of one.
  timed = {size: [name for name in programs if size == 1 or name != _SKIPPING] for size in sizes}
  found, done, total = (
    {name: {} for name in programs},
    itertools.count(1),
    sum(map(len, timed.values())),
  )
  for size, names in timed.items():
    batches = [(x,) for x in spread_batches(images, size)]
    runs = {name: functools.partial(run_over, programs[name], batches) for name in names}
    # By turns, so that a slow spell of the machine hits all programs.
    for name, spent in race(runs, _REPEATS, on_start=lambda: progress(next(done), total)).items():
      found[name][str(size)] = round(1000 * statistics.median(spent) / len(batches), 3)
  return found


def _card(
  experiment: Experiment, origin: Mapping[str, Any], score: Mapping[str, float]
) -> dict[str, Any]:
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
  rows = analysis.rows()
  ways = [
    [row["strategy"], f"{row['macs']:,.0f}", f"{100 * row['ratio']:.1f} %"]
    for row in analysis.mac_rows()
  ]
  lines = align_columns([["way to run it", "MACs per image", "of ungated"], *ways])
  if not rows:
    return lines
  counted = ("always_open", "always_closed", "conditional", "open_on_all", "closed_on_all")
  head = ["layer", "units", "open", *(name.replace("_", " ") for name in counted), "correlation"]
  return [
    *align_columns(
      [
        head,
        *(
          [
            name,
            str(row["units"]),
            f"{100 * row['open']:.1f} %",
            *(str(row[c]) for c in counted),
            f"{row['correlation']:.3f}",
          ]
          for name, row in zip(names, rows, strict=True)
        ),
      ]
    ),
    "",
    *lines,
  ]


def _moved_lines(analysis: Analysis, moved: PruningEffect) -> list[str]:
  # An upper confidence bound: not seeing a unit open does not prove that it never opens.
  bound = 100 * rate_bound(analysis.images, 0.95)
  worst = max(itertools.chain(moved.opened, moved.closed), default=0.0)
  return [
    f"A unit never seen open opens on at most {bound:.3f} % of images, at 95 % confidence for "
    "each.",
    f"On {100 * moved.affected:.2f} % of {moved.images:,} test images a static unit would have "
    f"moved ({100 * worst:.2f} % in the layer with the most);",
    f"outputs differ by at most {moved.difference[0]:.3g} there, {moved.difference[1]:.1e} "
    f"elsewhere; {100 * moved.changed:.2f} % of images are classified differently.",
  ]


def _head() -> list[str]:
  return [
    "net",
    "test accuracy",
    "MACs per image",
    "executed",
    "weights, bytes",
    "program, bytes",
    *(f"ms ({size})" for size in _TIMED_BATCHES),
  ]


def _row(name: str, score: Mapping[str, float], card: Mapping[str, Any]) -> list[str]:
  files, spent = card.get("files"), card["milliseconds"]
  sizes = [
    f"{files[file]['bytes']:,}" if files else "" for file in (export.WEIGHTS, export.PROGRAM)
  ]
  return [
    name,
    f"{100 * score['accuracy']:.2f} %",
    f"{score['macs']:,}",
    f"{score['executed_macs']:,.0f}",
    *sizes,
    *(f"{spent[str(size)]:.2f}" if str(size) in spent else "" for size in _TIMED_BATCHES),
  ]
