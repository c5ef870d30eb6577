"""The report of a run that learns from images or scenes: from plain data to the sections of its page.

Axes: M test images, L layers, G gates, K classes.
Reference: Bejnordi et al., 2020, section 4.3 (what gates are open for).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gating_jax.ops.priors import Prior
from gating_jax.reports import gate_pictures, gate_table, image_pictures, page
from gating_jax.reports.lettering import plain, save
from gating_jax.training.diagnosis import ALWAYS_CLOSED, by_layer
from gating_jax.training.evaluation import GateBehaviour, ImageBehaviour

SELECTIVE = 0.1  # of images, at most, open a selective gate
_SELECTIVE_SHOWN, _INFORMED_SHOWN, _MAPPED = 12, 6, 60  # gates
_EXTREMES = 8  # easiest images, and hardest
_DPI, _CSS_WIDTH = 150, 500


@dataclasses.dataclass(frozen=True)
class ImageRun:
  """All that the page shows.

  Attributes:
    title, subtitle: of the page.
    noun: what is tested, `image` or `scene`.
    rows: the result, name and value.
    score: key of the score in a test's numbers, and its name.
    tests: the numbers of each test during training, in order, with their `step`; the last is what the page is about.
    histograms: lines of `histograms.jsonl`, likewise.
    macs: multiply-accumulates of the ungated net.
    images: what became of each.
    gates: what they did; None for an ungated net.
    layers: name and number of gates of each layer.
    class_names: K names; None where an image has no class.
    prior: what open probabilities are pulled to; None where they are not.
    config: name and value of each setting.
    read: pixels `[n, H, W, D]` of test images, by number.
    pictures: further ones, with their captions, as figures.
  """

  title: str
  subtitle: str
  noun: str
  rows: Sequence[tuple[str, str]]
  score: tuple[str, str]
  tests: Sequence[Mapping[str, Any]]
  histograms: Sequence[Mapping[str, Any]]
  macs: int
  images: ImageBehaviour
  gates: GateBehaviour | None
  layers: Sequence[tuple[str, int]]
  class_names: Sequence[str] | None
  prior: Prior | None
  config: Sequence[tuple[str, str]]
  read: Callable[[np.ndarray], np.ndarray]
  pictures: Sequence[tuple[Any, str]] = ()


def write(path: Path, run: ImageRun) -> None:
  """Writes the page, whole or not at all."""
  page.write(path, run.title, sections(run), run.subtitle)


def sections(run: ImageRun) -> list[page.Section]:
  """What the page has, in its order; what makes no sense for the run is left out."""
  found = [page.Section("Result", parts=[page.Table(("", ""), run.rows, numeric=False)]), _score(run)]
  if run.pictures:
    found.append(page.Section(f"Some {run.noun}s", parts=[_picture(*one) for one in run.pictures]))
  if run.gates is None:
    found.append(page.Section("Gates", "This net has no gates: every unit runs for every input."))
  else:
    found += [_by_layer(run), _over_training(run), _selective(run)]
    if run.gates.class_rates is not None and run.gates.diagnosis.class_information is not None:
      found += [_classes(run)]
  return [*found, _extremes(run), page.Section(
      "Settings", parts=[page.Table(("setting", "value"), run.config, numeric=False)])]


def _picture(figure: Any, caption: str) -> page.Picture:
  return page.drawn(lambda file: save(figure, file, dpi=_DPI), caption, _CSS_WIDTH)


def _score(run: ImageRun) -> page.Section:
  key, name = run.score
  steps, scores, ratios = ([test[k] for test in run.tests] for k in ("step", key, "mac_ratio"))
  parts, text = [], ""
  if len(steps) > 1:
    gated = min(ratios) < 1
    spent = ", and the mean multiply-accumulates (MACs) of one, in % of those of the ungated net" if gated else ""
    parts.append(_picture(image_pictures.draw_training(steps, scores, ratios, name),
                          f"On all test {run.noun}s during training{spent}."))
    if gated:
      parts.append(_picture(
          image_pictures.draw_path(steps, scores, ratios, name),
          "The same, against each other: one point for each test, dark ones late. Up is better, left is cheaper."))
  else:
    text = "The run was tested once, so there is no course of training to show (eval_every sets how often). "
  macs, count = run.images.macs, len(run.images.macs)
  if np.ptp(macs) > 0:
    groups = [g for g in np.array_split(np.argsort(macs, kind="stable"), 10 if count >= 1000 else 5) if len(g)]
    values, value_name, turns = (run.images.losses, "mean loss", "rises") if run.images.correct is None else (
        100.0 * run.images.correct, f"{name}, %", "falls")
    parts.append(_picture(
        image_pictures.draw_groups([macs[g].mean() for g in groups], [values[g].mean() for g in groups], value_name),
        f"The {count:,} test {run.noun}s in {len(groups)} equal groups, ordered by the MACs that their gates spend on "
        f"them. A line that {turns} says that more is spent on what is hard."))
  else:
    text += f"Every {run.noun} takes the same multiply-accumulates: {macs[0]:,.0f}."
  return page.Section("Score and multiply-accumulates", text.strip(), parts)


def _by_layer(run: ImageRun) -> page.Section:
  found, names = by_layer(run.gates.diagnosis, run.layers), gate_pictures.layer_names(run.layers)
  header, *rows = gate_table.rows([{**layer, "layer": name} for layer, name in zip(found, names, strict=True)])
  return page.Section(
      "Gates of each layer",
      f"A gate is always open (for more than 99 % of test {run.noun}s), always closed (for less than 1 %), random, "
      "where noise decides as in dropout, or conditional, where the input does. Conditional gates are what one wants.",
      [_picture(gate_pictures.draw_outcomes(found, names), "What became of the gates of each layer, the first on top."),
       page.Table(header, rows)])


def _over_training(run: ImageRun) -> page.Section:
  names, history = gate_pictures.layer_names(run.layers), run.histograms
  left_out = len(names) - len(gate_pictures.shown_layers(len(names)))
  some = f" {left_out} of {len(names)} layers between these are left out." if left_out else ""
  columns = f"one column for each of {len(history)} tests, from step {history[0]['step']:,} to {history[-1]['step']:,}"
  compared = " The dashed line is the prior that they are pulled to early in training." if run.prior else ""
  return page.Section(
      "Gates over training",
      f"Open probabilities of all gates of a layer on {len(run.gates.logits):,} test {run.noun}s, and the share of all "
      f"test {run.noun}s that open each gate.{some}",
      [_picture(gate_pictures.draw_histograms(history, names, "probs"),
                f"Open probabilities, upwards from 0 to 1: {columns}. Dark is where most are: a band at 1 is of gates "
                "that stay open, bands at both ends are of gates that decide."),
       _picture(gate_pictures.draw_histograms(history, names, "open_rates"),
                "Open rates of single gates, upwards from 0 to 1, in the same columns. What lies between the ends is "
                "conditional, or random."),
       _picture(gate_pictures.draw_cdfs(history, names, run.prior),
                f"Share of open probabilities below x (their empirical CDF), at up to four tests.{compared}")])


def _selective(run: ImageRun) -> page.Section:
  title, rates = f"The most selective gates, and the {run.noun}s that open them", run.gates.diagnosis.open_rates
  few, shown = np.count_nonzero((rates > 0) & (rates < SELECTIVE)), _selected(rates)
  if not len(shown):
    return page.Section(title, f"No gate is open for some {run.noun}s and closed for others.")
  parts = []
  for gate in shown:
    images = run.gates.firing[:, gate]
    images = images[images >= 0]
    text = [_class(run, run.images.labels[i]) for i in images] if run.images.labels is not None else [""] * len(images)
    caption = f"{_gate(run, gate)}: open for {100 * rates[gate]:.2g} % of {run.noun}s{_mostly(run, gate)}."
    parts.append(_picture(image_pictures.draw_images(run.read(images), text), caption))
  which = f"{len(shown)} of them" if few else f"the {len(shown)} that are open least"
  return page.Section(
      title, f"Of {len(rates)} gates, {few} are open for some {run.noun}s but fewer than {100 * SELECTIVE:.0f} %. "
      f"Below, {which}, the most selective first, with the {run.noun}s that open them most surely.", parts)


def _selected(rates: np.ndarray) -> np.ndarray:
  """Gates that are open least, those before that are open for 1 % and more; none beside selective ones if there are."""
  some = np.flatnonzero((rates > 0) & (rates < 1))
  selective = some[rates[some] < SELECTIVE]
  some = selective if len(selective) else some
  rare = (rates[some] < ALWAYS_CLOSED) * (1 - rates[some])
  return some[np.lexsort((rates[some], rare))][:_SELECTIVE_SHOWN]


def _mostly(run: ImageRun, gate: int) -> str:
  """The classes whose images open a gate most often."""
  if run.gates.class_rates is None or len(run.class_names) < 2:
    return ""
  rates = np.nan_to_num(run.gates.class_rates[:, gate])
  top = [k for k in np.argsort(-rates, kind="stable")[:2] if rates[k] > 0]
  return "; " + ", ".join(f"{100 * rates[k]:.2g} % of “{_class(run, k)}”" for k in top)


def _classes(run: ImageRun) -> page.Section:
  title, information = "Gates and classes", run.gates.diagnosis.class_information
  known = np.flatnonzero(~np.isnan(run.gates.class_rates).any(axis=1))
  rates, names = run.gates.class_rates[known], [run.class_names[k] for k in known]
  order = np.argsort(-information, kind="stable")
  order = order[information[order] > 0]
  if len(known) < 2 or not len(order):
    return page.Section(title, "No gate tells anything of the class: each is as often open for one as for another.")
  mapped, best = order[:_MAPPED], order[:_INFORMED_SHOWN]
  some = f" of {len(names)} classes, the {gate_pictures.MOST_CLASSES} whose rates differ most" if (
      len(names) > gate_pictures.MOST_CLASSES) else ""
  parts = [_picture(
      gate_pictures.draw_class_map(rates[:, mapped].T, [_short(run, g) for g in mapped], names),
      f"Share of each class's images that open a gate, for the {len(mapped)} gates that tell most of the class{some}. "
      "Gates, as layer:gate, and classes that are alike stand side by side.")]
  titles = [f"{_short(run, g)}: {information[g]:.2f} bits, open for {100 * run.gates.diagnosis.open_rates[g]:.2g} %"
            for g in best]
  parts.append(_picture(
      gate_pictures.draw_class_bars(rates[:, best].T, titles, names),
      f"Open rate on each class, or on those of the highest rates, of the {len(best)} gates that tell most of them."))
  return page.Section(
      title, "What a gate tells of the class is their mutual information in bits, 0 if it is open as often for "
      f"every class, 1 at most. To name one of {len(names)} classes takes {np.log2(len(names)):.1f} bits.", parts)


def _extremes(run: ImageRun) -> page.Section:
  images = run.images
  order = np.argsort(images.losses, kind="stable")

  def picture(chosen, caption):
    texts = []
    for i in chosen:
      cost = f"{images.losses[i]:.2g} · {images.macs[i] / 1e6:.3g} M"
      if images.labels is None:
        texts.append(cost)
        continue
      true, predicted = (_class(run, k) for k in (images.labels[i], images.predicted[i]))
      texts.append(f"{true}\n{'right' if images.correct[i] else '→ ' + predicted}\n{cost}")
    return _picture(image_pictures.draw_images(run.read(chosen), texts), caption)

  half = max(1, min(_EXTREMES, len(order) // 2))
  easy, hard = order[:half], order[::-1][:half]
  macs = f"{images.macs[easy].mean() / 1e6:.3g} and {images.macs[hard].mean() / 1e6:.3g} million"
  what = ("the true class, the predicted one where that is wrong, " if images.labels is not None else "") + (
      "loss, summed over pixels, and MACs" if images.correct is None else "loss and MACs")
  return page.Section(
      f"Easiest and hardest {run.noun}s",
      f"By loss. Below each: {what}. On average these take {macs} MACs.",
      [picture(easy, "Least loss."), picture(hard, "Largest loss.")])


def _class(run: ImageRun, k: int) -> str:
  return plain(run.class_names[k], 15)


def _place(run: ImageRun, gate: int) -> tuple[int, int]:
  """Number of a gate's layer, and of the gate in it."""
  ends = np.cumsum([size for _, size in run.layers])
  layer = int(np.searchsorted(ends, gate, side="right"))
  return layer, int(gate - (ends[layer] - run.layers[layer][1]))


def _gate(run: ImageRun, gate: int) -> str:
  layer, number = _place(run, gate)
  return f"Layer {gate_pictures.layer_names(run.layers)[layer]}, gate {number}"


def _short(run: ImageRun, gate: int) -> str:
  layer, number = _place(run, gate)
  return f"{layer:02d}:{number}"
