"""`--mode=export`: a trained image classifier analysed, slimmed, and written as files that run without this package.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.experiments.build import Experiment
from gating_jax.inference import export, folded, openings
from gating_jax.inference.analyse import Analysis, analyse
from gating_jax.inference.conditional import Conditional, compile_conditional
from gating_jax.inference.folded import Folded
from gating_jax.inference.quantise import dequantise, quantise
from gating_jax.inference.slim import Disagreement, choose, disagreement, rate_bound, take
from gating_jax.reports.lettering import columns
from gating_jax.timing import race
from gating_jax.training import rundir

FOLDERS = ("export", "export_int8", "export_conditional")
CALIBRATION = 2_000  # images at most, evenly over the training set
_TIMED_BATCHES, _REPEATS = (1, 64), 30


def run(experiment: Experiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]) -> None:
  """Writes the exports into the run directory, of float32 and of int8 weights, and of a program that skips what is
  closed, for one image at a time, where anything is gated; and says what they are.

  Raises:
    RunDirError: one of them is there.
    ValueError: a model that cannot be folded.
  """
  for name in FOLDERS:
    if (run_dir.path / name).exists():
      raise rundir.RunDirError(f"{run_dir.path / name} exists; rename it or take it away to export anew")
  train = experiment.open_train()
  index = np.unique(np.linspace(0, len(train) - 1, min(CALIBRATION, len(train))).astype(np.int64))
  analysis = analyse(experiment.model, variables, (x for x, _ in _batches(experiment, train, index)))
  net, choices = analysis.net, choose(analysis.net, analysis.openings)
  small = take(net, choices)
  moved = disagreement(net, choices, (x for x, _ in _batches(experiment, experiment.test)))
  nets = {"trained": net, "slimmed": small, "slimmed, int8": quantise(small)}
  scores = {name: _score(experiment, each) for name, each in nets.items()}
  print(f"checkpoint of step {step}, calibrated on {analysis.images:,} training images\n")
  print("\n".join(_analysis_lines(analysis, [name for name, _ in experiment.counts.gate_layers])))
  print("\n".join(["", *_moved_lines(analysis, moved), ""]))
  table = [["net", "test accuracy", "MACs per image", "executed", "weights, bytes", "program, bytes",
            *(f"ms ({size})" for size in _TIMED_BATCHES)]]
  milliseconds = _milliseconds(nets, analysis.input_shape)
  for folder, name in zip(FOLDERS[:2], list(nets)[1:], strict=True):
    card = _card(experiment, run_dir, step, scores, name, moved, analysis)
    path = export.export_model(nets[name], run_dir.path / folder, input_shape=analysis.input_shape,
                               card=card | {"milliseconds": milliseconds[name]})
    table.append(_score_row(name, scores[name], export.load(path).card))
  table.insert(1, _score_row("trained", scores["trained"], {"milliseconds": milliseconds["trained"]}))
  if skipping := _skipping(small, analysis.input_shape):
    card = _card(experiment, run_dir, step, scores, "slimmed", moved, analysis)
    x = jnp.zeros((1, *analysis.input_shape), jnp.float32)
    spent = {"1": _medians({"slimmed, skipping": functools.partial(skipping, x)})["slimmed, skipping"]}
    path = export.export_model(skipping, run_dir.path / FOLDERS[2], input_shape=analysis.input_shape,
                               card=card | {"strategies": skipping.strategies, "milliseconds": spent})
    table.append(_score_row("slimmed, skipping", scores["slimmed"], export.load(path).card))
  print("\n".join(columns(table)))
  written = [str(run_dir.path / folder) for folder in FOLDERS if (run_dir.path / folder).exists()]
  print(f"\nwritten: {', '.join(written)}")


def _skipping(net: Folded, shape: tuple[int, int, int]) -> Conditional | None:
  """One image at a time, what is closed left out, by plain JAX, which programs hold; None without gates."""
  gated = [part for part in net.parts if part.head is not None]
  if not gated:
    return None
  strategy = "layer_dispatch" if getattr(gated[0], "layer_gate", False) else "switch"
  return compile_conditional(net, input_shape=shape, batch_size=1, strategy=strategy)


def _medians(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
  """Milliseconds of a call, by name, taken in turns."""
  return {name: round(1000 * statistics.median(spent), 3) for name, spent in race(runs, _REPEATS).items()}


def _batches(experiment: Experiment, images: Any, index: np.ndarray | None = None) -> Iterator[tuple[Any, Any]]:
  """Network inputs and labels, of all images or those at `index`."""
  index = np.arange(len(images)) if index is None else index
  for start in range(0, len(index), openings.BATCH):
    pixels, labels = images.read(index[start : start + openings.BATCH])
    yield np.asarray(experiment.normalise(pixels), np.float32), np.asarray(labels)


def _score(experiment: Experiment, net: Folded) -> dict[str, float]:
  """Accuracy on the test set; MACs per image, of every unit and of the open ones."""
  net, labels, correct, executed, images = dequantise(net), [], 0, 0, 0

  def inputs():
    for x, named in _batches(experiment, experiment.test):
      labels.append(named)
      yield x

  for x, outputs, logits in openings.observed(net, inputs()):
    correct += int(np.sum(np.argmax(outputs, axis=1) == labels.pop()))
    executed += np.broadcast_to(folded.macs(net, x.shape[1:], [z > 0 for z in logits]), len(x)).sum()
    images += len(x)
  return {"accuracy": correct / images, "macs": int(folded.macs(net, x.shape[1:])),
          "executed_macs": float(executed) / images}


def _milliseconds(nets: Mapping[str, Folded], shape: tuple[int, int, int]) -> dict[str, dict[str, float]]:
  """Medians over calls of the programs that exports hold, the nets' by turns, by batch size."""
  program = jax.jit(lambda net, x: folded.run(dequantise(net), x))
  found = {name: {} for name in nets}
  for size in _TIMED_BATCHES:
    x = jnp.zeros((size, *shape), jnp.float32)
    for name, spent in _medians({name: functools.partial(program, net, x) for name, net in nets.items()}).items():
      found[name][str(size)] = spent
  return found


def _card(experiment, run_dir, step, scores, name, moved: Disagreement, analysis: Analysis) -> dict[str, Any]:
  data, device = experiment.config.data, jax.devices()[0]
  return {
      "config": run_dir.config(), "step": step, "weights": "int8" if "int8" in name else "float32",
      **scores[name], "accuracy_as_trained": scores["trained"]["accuracy"],
      "executed_macs_as_trained": scores["trained"]["executed_macs"],
      "mean": list(data.mean), "std": list(data.std), "class_names": list(experiment.test.class_names),
      "calibration_images": analysis.images, "test_images": moved.images, "test_images_affected": moved.affected,
      "device": f"{device.platform}: {device.device_kind}"}


def _analysis_lines(analysis: Analysis, names: list[str]) -> list[str]:
  rows = analysis.rows()
  ways = [[row["strategy"], f"{row['macs']:,.0f}", f"{100 * row['ratio']:.1f} %"] for row in analysis.mac_rows()]
  lines = columns([["way to run it", "MACs per image", "of ungated"], *ways])
  if not rows:
    return lines
  counted = ("always_open", "always_closed", "conditional", "open_on_all", "closed_on_all")
  head = ["layer", "units", "open", *(name.replace("_", " ") for name in counted), "correlation"]
  return [*columns([head, *([name, str(row["units"]), f"{100 * row['open']:.1f} %", *(str(row[c]) for c in counted),
                             f"{row['correlation']:.3f}"] for name, row in zip(names, rows, strict=True))]), "", *lines]


def _moved_lines(analysis: Analysis, moved: Disagreement) -> list[str]:
  bound = 100 * rate_bound(analysis.images, 0.95)
  worst = max(itertools.chain(moved.opened, moved.closed), default=0.0)
  return [
      f"A unit never seen open opens on at most {bound:.3f} % of images, at 95 % confidence for each.",
      f"On {100 * moved.affected:.2f} % of {moved.images:,} test images a static unit would have moved "
      f"({100 * worst:.2f} % in the layer with most);",
      f"outputs differ by at most {moved.difference[0]:.3g} there, {moved.difference[1]:.1e} elsewhere; "
      f"{100 * moved.changed:.2f} % of images are classified otherwise."]


def _score_row(name: str, score: Mapping[str, float], card: Mapping[str, Any]) -> list[str]:
  files, spent = card.get("files"), card["milliseconds"]
  sizes = [f"{files[file]['bytes']:,}" if files else "" for file in (export.WEIGHTS, export.PROGRAM)]
  return [name, f"{100 * score['accuracy']:.2f} %", f"{score['macs']:,}", f"{score['executed_macs']:,.0f}", *sizes,
          *(f"{spent[str(size)]:.2f}" if str(size) in spent else "" for size in _TIMED_BATCHES)]
