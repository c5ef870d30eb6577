"""The report of an image or scene run: from a test and the journal to the sections of its page.

Axes: M test images, L layers, G gates, K classes.
Reference: Bejnordi et al., 2020, section 4.3 (what gates are open for).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gating_jax import programmes
from gating_jax.analysis.outcomes import ALWAYS_CLOSED, by_layer
from gating_jax.images.build import Experiment
from gating_jax.images.compile import check_compilable
from gating_jax.ops.priors import Prior
from gating_jax.reports import conclusion, frame, page, predictions, score_parts, tables
from gating_jax.reports import gates as gate_pictures
from gating_jax.reports import images as image_pictures
from gating_jax.reports.text import format_count, plain
from gating_jax.training import evaluation, rundir
from gating_jax.training.evaluation import Evaluation, GateBehaviour, ImageBehaviour
from gating_jax.training.journal import HISTOGRAMS_FILE, METRICS_FILE, numbers, read_lines
from gating_jax.training.rundir import RunDir

# A gate is selective where it is open for less than this fraction of images.
SELECTIVE = 0.1
# The most gates to show: selective ones, informative ones, and rows of the map of classes.
_SELECTIVE_SHOWN, _INFORMED_SHOWN, _MAPPED = 12, 6, 60
# The most easy images, and hard ones, to show.
_EXTREMES = 8


@dataclasses.dataclass(frozen=True)
class ImageRun:
  """All data of the page.

  Attributes:
    title, subtitle: title and subtitle of the page.
    noun: the name of an example, `image` or `scene`.
    rows: the result, name and value.
    score: key of the score in a test's numbers, and its name.
    tests: the numbers of each test during training, in order, with their `step`; the page is about
      the last one.
    histograms: lines of `histograms.jsonl`, for the same tests.
    macs: multiply-accumulates of the ungated net.
    images: results of the test for each image.
    gates: results for the gates; None for an ungated net.
    layers: name and number of gates of each layer.
    class_names: K names; None where an image has no class.
    file_names: of the test images; none where they have no file of their own.
    prior: the prior of open probabilities; None where they have none.
    config: name and value of each setting.
    read: pixels `[n, H, W, D]` of test images, by number.
    pictures: further figures, with their captions.
    confusions: sections on the sets of a union, and on classes that are taken for others.
    around: surroundings of the run, beyond the result.
    how: human-readable instructions to train an ungated baseline.
    notice: the first line of the page, such as that the run has failed; empty where there is none.
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
  file_names: Sequence[str] = ()
  pictures: Sequence[tuple[Any, str]] = ()
  confusions: Sequence[page.Section] = ()
  around: frame.Surroundings = frame.Surroundings()
  how: str = "gates=none"
  notice: str = ""

  @property
  def gated(self) -> GateBehaviour:
    """Returns the results for each gate, for the sections of networks that have some."""
    if self.gates is None:
      raise ValueError("the network has no gates")
    return self.gates

  @property
  def layer_sizes(self) -> list[int]:
    """Returns the number of gates of each layer."""
    return [size for _, size in self.layers]

  @property
  def layer_names(self) -> list[str]:
    """Returns number and name of each layer, as figures show them."""
    return gate_pictures.layer_names(self.layers)


def write_report(path: Path, run: ImageRun) -> None:
  """Writes the page, whole or not at all."""
  page.write_page(
    path, run.title, make_sections(run), subtitle=run.subtitle, opening=make_opening(run)
  )


def describe_run(
  run_dir: RunDir,
  experiment: Experiment,
  evaluated: Evaluation,
  *,
  step: int,
  rows: Sequence[tables.Row],
  score: tuple[str, str],
  class_names: Sequence[str] | None,
  pictures: Sequence[tuple[Any, str]] = (),
  notice: str = "",
) -> ImageRun:
  """Gathers the data of the page of a run, from a test and from the files of the run.

  Args:
    run_dir: the run directory.
    experiment: the experiment of the run.
    evaluated: the test.
    step: the step of the state that was tested.
    rows, score, class_names, pictures, notice: as in `ImageRun`.
  """
  config, layers = experiment.config, experiment.counts.gate_layers
  result, images, gates = evaluated
  noun = programmes.PROGRAMMES[config.experiment].noun
  total, shaping = experiment.settings.total_steps, config.loss.batch_shaping
  # The page shows a prior only where it acts on the gates.
  shaped = config.loss.regulariser == "batch_shaping" and shaping.coefficient > 0
  # Pixels of scenes have classes, too.
  example = "pixel" if class_names is None else noun
  confusions = score_parts.confusion_section(result, experiment.test.class_names, example)
  return ImageRun(
    title=f"{config.model.name} on {config.data.name}",
    subtitle=f"{run_dir.path.name}, step {step:,} of {total:,}, gates: {config.model.gating}",
    noun=noun,
    rows=rows,
    score=score,
    tests=_list_tests(run_dir, {"step": step, **result}, score[0]),
    histograms=_list_histograms(run_dir, step, gates, layers=layers),
    macs=experiment.counts.macs,
    images=images,
    gates=gates,
    layers=layers,
    class_names=class_names,
    file_names=getattr(experiment.test, "file_names", ()),
    prior=experiment.objective.prior if shaped else None,
    config=[(name, str(value)) for name, value in rundir.flatten(config).items()],
    read=lambda index: experiment.test.read(index)[0],
    pictures=pictures,
    confusions=[*score_parts.sets_section(result), *confusions],
    around=frame.read_surroundings(
      run_dir,
      config,
      step=step,
      not_compiled=conclusion.refusal(check_compilable, experiment.model),
    ),
    how=programmes.PROGRAMMES[config.experiment].how,
    notice=notice,
  )


def _list_tests(run_dir: RunDir, last: Mapping[str, Any], score: str) -> list[Mapping[str, Any]]:
  """Returns the tests of the journal that have a score and MACs, and the last one.

  Outside training the journal does not have the last one.
  """
  found: list[Mapping[str, Any]] = []
  for line in _tests_before(last["step"], run_dir.path / METRICS_FILE):
    if {score, "mac_ratio"} <= numbers(line).keys():
      found.append(line)
  return [*found, last]


def _list_histograms(
  run_dir: RunDir, step: int, gates: GateBehaviour | None, *, layers: Sequence[tuple[str, int]]
) -> list[dict[str, Any]]:
  """Returns the histograms of this test and of earlier ones that count the same.

  Layers have numbers.
  """
  last = evaluation.histograms(gates, layers) if gates is not None else {}
  measures = _measures(last)
  found = []
  for line in _tests_before(step, run_dir.path / HISTOGRAMS_FILE):
    if _measures(line) == measures:
      found.append(line)
  # Names of modules are long, so figures number the layers.
  names = [name for name, _ in layers]
  return [_numbered(names, line) for line in (*found, {"step": step, **last})]


def _tests_before(step: int, file: Path) -> list[dict[str, Any]]:
  """Returns the lines of a journal's file on tests of earlier steps.

  The journal may have later tests than a checkpoint, written after it.
  """
  return [line for line in read_lines(file) if line["split"] == "test" and line["step"] < step]


def _measures(line: Mapping[str, Any]) -> list[tuple[str, int]]:
  """Returns what a line of `histograms.jsonl` counts, sorted, and in how many bins each.

  A line of the same network has the same, whatever its layers are called, unless it is damaged.
  """
  found = []
  for name, counts in line.items():
    is_list = isinstance(counts, (list, np.ndarray))
    if is_list and all(isinstance(count, (int, np.integer)) for count in counts):
      found.append((name.rpartition("/")[2], len(counts)))
  return sorted(found)


def _numbered(names: Sequence[str], line: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a line of `histograms.jsonl` with the number of each layer in place of its name.

  Figures use this form, and older runs have it.
  """
  renamed = {}
  for key, value in line.items():
    group, _, rest = key.partition("/")
    layer, _, measure = rest.rpartition("/")
    renamed[f"{group}/layer{names.index(layer):02d}/{measure}" if layer in names else key] = value
  return renamed


def make_opening(run: ImageRun) -> page.Opening:
  """Returns the opening of the page: the large numbers, and the picture of gate outcomes."""
  key, name = run.score
  result, around = run.tests[-1], run.around
  meaning = _SCORES.get(key, "").format(count=len(run.images.macs), noun=run.noun)
  numbers = [
    frame.score_number(f"test {name}", result[key], key=key, around=around, meaning=meaning),
    frame.macs_number(
      result["mac_ratio"], executed=result["macs"], dense=run.macs, noun=run.noun, around=around
    ),
    frame.run_time_number(run.noun, around),
  ]
  text = frame.why_no_baseline(around, run.how)
  picture = None if run.gates is None else _outcomes(run)
  if picture is None:
    text = f"{text} This network has no gates: every unit is computed for every {run.noun}.".strip()
  return page.Opening(numbers, picture, text, notice=run.notice)


_SCORES = {
  "accuracy": "Fraction of the {count:,} test {noun}s whose most likely class is the true one.",
  "mean_iou": "Intersection over union of predicted and true pixels, mean over classes, on "
  "{count:,} test {noun}s.",
}


def make_sections(run: ImageRun) -> list[page.Section]:
  """Returns the sections after the opening, in order.

  Sections without meaning for the run are left out.
  """
  result = page.Section("Result", parts=[tables.defined_table(run.rows)])
  found = [result, *run.confusions, _score(run)]
  if run.pictures:
    parts = [page.embed_figure(figure, caption, photo=True) for figure, caption in run.pictures]
    found.append(page.Section(f"Some {run.noun}s", parts=parts))
  if run.gates is not None:
    found += [_by_layer(run), _over_training(run), _selective(run)]
    # Scenes have no class of their own, so gates have no information on it.
    if run.gates.class_rates is not None and run.gates.diagnosis.class_information is not None:
      found += [_classes(run)]
  return [
    *found,
    _extremes(run),
    *_predictions(run),
    frame.run_times_section(run.noun, run.around),
    frame.settings_section(run.config),
    frame.about_section(run.around),
  ]


def _score(run: ImageRun) -> page.Section:
  """Returns the section on the score and its cost, over training and over images."""
  text, parts = _over_tests(run)
  macs = run.images.macs
  if np.ptp(macs) > 0:
    text += _on_hard(run)
    parts.append(_quarters_picture(run))
  else:
    text += f"Every {run.noun} takes the same multiply-accumulates: {macs[0]:,.0f}."
  return page.Section("Score and multiply-accumulates", text.strip(), parts)


def predict_images(
  images: ImageBehaviour, class_names: Sequence[str], file_names: Sequence[str] = ()
) -> predictions.Predictions | None:
  """Returns the prediction for each test image; None where an image has no class.

  Args:
    images: the test images.
    class_names: one per class.
    file_names: of the images; without them they are numbered.
  """
  if images.predicted is None or images.labels is None:
    return None
  more = {
    "loss": [f"{loss:.4f}" for loss in images.losses],
    "MACs": [f"{macs:.0f}" for macs in images.macs],
  }
  return predictions.of_classes(
    "image",
    images.labels,
    images.predicted,
    class_names=class_names,
    names=file_names,
    more=more,
  )


def _predictions(run: ImageRun) -> list[page.Section]:
  """Returns the section of predictions, or nothing where an image has no class."""
  found = None
  if run.class_names is not None:
    found = predict_images(run.images, run.class_names, run.file_names)
  return [] if found is None else [predictions.make_section(found, run.noun)]


def _over_tests(run: ImageRun) -> tuple[str, list[page.EmbeddedPicture]]:
  """Draws the tests during training; where there was one alone, says so instead."""
  if len(run.tests) == 1:
    text = (
      "The run was tested once, so there is no curve to show (eval_every sets how often it is "
      "tested). "
    )
    return text, []
  key, name = run.score
  steps = [test["step"] for test in run.tests]
  scores = [test[key] for test in run.tests]
  ratios = [test["mac_ratio"] for test in run.tests]
  step = ("training step", "updates of the parameters so far")
  score = (name, f"on all test {run.noun}s, in %")
  macs = (
    "MACs",
    f"multiply-accumulates per {run.noun}, mean over the test set, in % of those of the ungated "
    "network",
  )
  # Without gates every test costs the same, so only the score has a course.
  gated = min(ratios) < 1
  curves = page.embed_figure(
    image_pictures.draw_training(steps, scores, ratios, score_name=name),
    "Tests during training.",
    terms=[step, score, macs] if gated else [step, score],
  )
  if not gated:
    return "", [curves]
  path = page.embed_figure(
    image_pictures.draw_trajectory(steps, scores, ratios, score_name=name),
    "The same tests, score against cost, one point each. Higher is better, left is cheaper.",
    terms=[macs, score, ("colour", "the training step of the test")],
  )
  return "", [curves, path]


def _quarters_picture(run: ImageRun) -> page.EmbeddedPicture:
  """Draws the MACs of easy and hard images."""
  macs = run.images.macs
  return page.embed_figure(
    image_pictures.draw_quarters(macs, _quarters(run), run.noun),
    f"MACs of easy and hard {run.noun}s: the mean of each quarter (point), and its range from "
    "the 10th to the 90th percentile (bar).",
    terms=[
      (
        "quarters",
        f"the {len(macs):,} test {run.noun}s in equal parts, ordered by their loss: easy "
        "ones have the least, hard ones the largest",
      ),
      (
        "MACs",
        f"multiply-accumulates of a {run.noun} of the quarter, in millions, gate networks included",
      ),
    ],
  )


def _quarters(run: ImageRun) -> list[np.ndarray]:
  """Returns the image numbers of each quarter by loss, easiest first.

  The quarters are those of `analysis.statistics.mac_spread`.
  """
  losses = run.images.losses
  return np.array_split(np.argsort(losses, kind="stable"), min(4, len(losses)))


def _on_hard(run: ImageRun) -> str:
  """Describes whether hard images take more MACs than easy ones."""
  quarters = _quarters(run)
  easy, hard = run.images.macs[quarters[0]].mean(), run.images.macs[quarters[-1]].mean()
  change = 100 * (hard / easy - 1)
  what = f"{abs(change):.1f} % {'more' if change > 0 else 'fewer'} MACs than"
  # Below the digit that is shown.
  if abs(change) < 0.05:
    what = "as many MACs as"
  return (
    f"The hardest quarter of {run.noun}s takes {what} the easiest ({format_count(hard)} and "
    f"{format_count(easy)}). On this page, easy and hard refer to the loss."
  )


def _outcomes(run: ImageRun) -> page.EmbeddedPicture:
  """Draws how many test images each gate is open for, by layer."""
  return page.embed_figure(
    gate_pictures.draw_outcomes(run.gated.diagnosis, run.layer_sizes, run.layer_names),
    "Gates of each layer, the first on top, by how many of the "
    f"{len(run.images.macs):,} test {run.noun}s they are open for.",
    terms=[
      ("gates of the layer", "all gates of a layer are 100 %"),
      (
        "conditional",
        f"from 1 to 99 %: the {run.noun} decides, as intended; gates that are open least save most",
      ),
      ("always closed", "these units can be removed"),
      ("always open", "these units are always computed"),
      ("random", f"noise, not the {run.noun}, decides in training, as in dropout"),
    ],
  )


def _by_layer(run: ImageRun) -> page.Section:
  """Returns the table of the gates of each layer."""
  # Layers have the numbers that the figures give them.
  layers = list(zip(run.layer_names, run.layer_sizes, strict=True))
  header, *rows = tables.gate_rows(by_layer(run.gated.diagnosis, layers))
  columns = [tables.GATE_COLUMNS[name] for name in header]
  titles = [title for title, _ in columns]
  return page.Section("Gates of each layer", parts=[page.Table(titles, rows, terms=columns)])


def _over_training(run: ImageRun) -> page.Section:
  """Returns the figures of how gates changed over the training."""
  names, history = run.layer_names, run.histograms
  # The panels of a deep network would not fit on a page.
  left_out = len(names) - len(gate_pictures.shown_layers(len(names)))
  some = f" {left_out} of {len(names)} layers between these are left out." if left_out else ""
  columns = (
    f"a column for each of {len(history)} tests, from step {history[0]['step']:,} to "
    f"{history[-1]['step']:,}"
  )
  probability = f"that a gate is open for a test {run.noun}, from 0 to 1"
  cdf_terms = [
    ("probability", probability),
    ("below it", "fraction of the layer's probabilities that are smaller"),
  ]
  if run.prior:
    dashed = ("dashed line", "the prior that shapes the probabilities early in training")
    cdf_terms.append(dashed)
  return page.Section(
    "Gates over training",
    f"A panel for each gated layer.{some}",
    [
      page.embed_figure(
        gate_pictures.draw_histograms(history, names, "probs"),
        f"Open probabilities of the gates of each layer, on {len(run.gated.logits):,} test "
        f"{run.noun}s. A band at 1 shows gates that stay open; bands at both ends show "
        "gates that decide.",
        terms=[
          ("test at step", columns),
          ("probability", probability),
          ("colour", "darker where more of the layer's probabilities lie"),
        ],
      ),
      page.embed_figure(
        gate_pictures.draw_histograms(history, names, "open_rates"),
        "Open rates of single gates. Gates between the ends are conditional or random.",
        terms=[
          ("test at step", columns),
          ("open rate", f"fraction of all test {run.noun}s that open a gate"),
          ("colour", "darker where more of the layer's gates have this rate"),
        ],
      ),
      page.embed_figure(
        gate_pictures.draw_cdfs(history, names, run.prior),
        "Empirical cumulative distribution of the open probabilities, at up to four tests.",
        terms=cdf_terms,
      ),
    ],
  )


def _selective(run: ImageRun) -> page.Section:
  """Shows the most selective gates, each with images that open it."""
  title = f"The most selective gates, and the {run.noun}s that open them"
  rates, labels = run.gated.diagnosis.open_rates, run.images.labels
  # Gates that are open for no image, or for all, are not selective.
  few = np.count_nonzero((rates > 0) & (rates < SELECTIVE))
  shown = _selected(rates, run.layer_sizes)
  if not len(shown):
    return page.Section(title, f"No gate is open for some {run.noun}s and closed for others.")
  parts, shown_layers = [], set()
  for gate in shown:
    images = run.gated.most_open_images[:, gate]
    # -1 marks places without an image: fewer images open the gate.
    images = images[images >= 0]
    texts = [""] * len(images)
    if labels is not None:
      texts = [_class(run, k) for k in labels[images]]
    figure = image_pictures.draw_images(run.read(images), texts)
    place = _place(run, gate)
    shown_layers.add(place.layer)
    rate = f"open for {_percent(float(rates[gate]))} of {run.noun}s{_mostly(run, gate)}"
    caption = f"Layer {run.layer_names[place.layer]}, gate {place.number}: {rate}."
    parts.append(page.embed_figure(figure, caption, photo=True))
  layers = len(shown_layers)
  several = f", {len(shown)} gates of {layers} layer{'s' if layers > 1 else ''}, layer by layer"
  return page.Section(
    title,
    f"Of {len(rates):,} gates, {few:,} are open for some {run.noun}s but fewer than "
    f"{100 * SELECTIVE:.0f} %. Below are those of each layer that are open least{several}, with "
    f"the {run.noun}s that open them with the highest "
    f"probability{'' if labels is None else ', and their class'}.",
    parts,
  )


def _selected(rates: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Returns the gates to show, in order: from each layer in turn the gate that is open least.

  Where more layers have such gates than are shown, evenly spaced ones are taken. A gate that is
  open for less than 1 % comes after all others of its layer; one that is not selective is shown
  only where none is.

  Args:
    rates: `[G]` open rates.
    sizes: gates of each layer.
  """
  some = (rates > 0) & (rates < 1)
  if (some & (rates < SELECTIVE)).any():
    some &= rates < SELECTIVE
  ranked = []
  for gates in np.split(np.arange(len(rates)), np.cumsum(sizes)[:-1]):
    gates = gates[some[gates]]
    # 0 for all but the rare gates; among these the least rare comes first.
    rare = (rates[gates] < ALWAYS_CLOSED) * (1 - rates[gates])
    if len(gates):
      ranked.append(gates[np.lexsort((rates[gates], rare))])
  if len(ranked) > _SELECTIVE_SHOWN:
    spread = np.linspace(0, len(ranked) - 1, _SELECTIVE_SHOWN).astype(int)
    ranked = [ranked[i] for i in spread]
  in_turns = []
  for turn in range(max(map(len, ranked), default=0)):
    for gates in ranked:
      # A layer has its turns as long as it has such gates.
      in_turns += gates[turn : turn + 1].tolist()
  # Sorted: the page shows them layer by layer.
  return np.sort(np.array(in_turns[:_SELECTIVE_SHOWN], int))


def _mostly(run: ImageRun, gate: int) -> str:
  """Names the classes whose images open a gate most often."""
  class_rates = run.gated.class_rates
  if class_rates is None or run.class_names is None or len(run.class_names) < 2:
    return ""
  # A class without test images has the rate NaN.
  rates = np.nan_to_num(class_rates[:, gate])
  named = []
  for k in np.argsort(-rates, kind="stable")[:2]:
    if rates[k] > 0:
      named.append(f"{_percent(float(rates[k]))} of “{_class(run, int(k))}”")
  return "; " + ", ".join(named)


def _classes(run: ImageRun) -> page.Section:
  """Shows the gates with the most information about the class."""
  title, diagnosis = "Gates and classes", run.gated.diagnosis
  class_rates, information = run.gated.class_rates, diagnosis.class_information
  # As for all sets whose images have classes.
  assert class_rates is not None
  assert information is not None
  assert run.class_names is not None
  # Classes without test images have no rates.
  known = np.flatnonzero(~np.isnan(class_rates).any(axis=1))
  rates, names = class_rates[known], [run.class_names[k] for k in known.tolist()]
  order = np.argsort(-information, kind="stable")
  # Gates with 0 bits of the class are left out: their order is arbitrary.
  order = order[information[order] > 0]
  if len(known) < 2 or not len(order):
    return page.Section(
      title, "No gate is informative about the class: each opens equally often for every class."
    )
  mapped, best = order[:_MAPPED], order[:_INFORMED_SHOWN]
  some, most = "", gate_pictures.MOST_CLASSES
  if len(names) > most:
    some = f" of {len(names)} classes, the {most} whose rates differ most"
  short = [_short(run, gate) for gate in mapped]
  class_map = page.embed_figure(
    gate_pictures.draw_class_map(rates[:, mapped].T, short, names),
    f"Fraction of each class's images that open a gate, for the {len(mapped)} gates that are "
    f"most informative about the class{some}. Similar gates and classes are next to each other.",
    terms=[
      ("gate", "the numbers of its layer and of the gate, as layer:gate"),
      ("class", "of the test images"),
      ("colour", "fraction of the class's test images that open the gate, from 0 to 1"),
    ],
  )
  titles = []
  for gate in best:
    rate = _percent(float(diagnosis.open_rates[gate]))
    titles.append(f"{_short(run, gate)}: {information[gate]:.2f} bits, open for {rate}")
  bars = page.embed_figure(
    gate_pictures.draw_class_bars(rates[:, best].T, titles, names),
    f"Open rates of the {len(best)} gates that are most informative about the class, on each "
    "class or those with the highest rates.",
    terms=[
      ("open rate", "test images of the class that open the gate, in %"),
      ("bits", "mutual information of the gate and the class"),
    ],
  )
  return page.Section(
    title,
    "Mutual information of a gate and the class, in bits: 0 if the gate opens equally often for "
    f"every class, at most 1. To name one of {len(names)} classes takes "
    f"{np.log2(len(names)):.1f} bits.",
    [class_map, bars],
  )


def _extremes(run: ImageRun) -> page.Section:
  """Shows the images with the least and the largest loss."""
  images = run.images
  order = np.argsort(images.losses, kind="stable")

  def picture(chosen, caption):
    """Draws the images at `chosen` `[n]`, with their costs below."""
    texts = []
    for i in chosen:
      cost = f"{images.losses[i]:.2g} · {images.macs[i] / 1e6:.3g} M"
      if images.labels is None or images.correct is None or images.predicted is None:
        texts.append(cost)
        continue
      answer = "right" if images.correct[i] else f"→ {_class(run, int(images.predicted[i]))}"
      texts.append(f"{_class(run, int(images.labels[i]))}\n{answer}\n{cost}")
    figure = image_pictures.draw_images(run.read(chosen), texts)
    return page.embed_figure(figure, caption, photo=True)

  # No image is both among the easiest and the hardest, unless there is only one.
  half = max(1, min(_EXTREMES, len(order) // 2))
  easy, hard = order[:half], order[::-1][:half]
  what = "loss, summed over pixels, and MACs" if images.correct is None else "loss and MACs"
  if images.labels is not None:
    what = f"the true class, the predicted one if it is wrong, {what}"
  spread = f" {_on_hard(run)}" if np.ptp(images.macs) > 0 else ""
  return page.Section(
    f"Easiest and hardest {run.noun}s",
    f"The {half} {run.noun}s with the least loss and the {half} with the largest. Below each: "
    f"{what} (millions).{spread}",
    [picture(easy, "Least loss."), picture(hard, "Largest loss.")],
  )


def _percent(rate: float) -> str:
  """Formats a fraction as a percentage in two digits.

  >>> _percent(1.0), _percent(0.0333)
  ('100 %', '3.3 %')
  """
  value = 100 * rate
  # From 9.95 on, two digits are a whole number.
  return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def _class(run: ImageRun, k: int) -> str:
  """Returns the name of class `k`, shortened."""
  # As for every image with a class.
  assert run.class_names is not None
  return plain(run.class_names[k], 15)


class _Place(NamedTuple):
  """The place of a gate: the number of its layer, and its own number there."""

  layer: int
  number: int


def _place(run: ImageRun, gate: int) -> _Place:
  """Returns the place of the gate with this number among all gates."""
  ends = np.cumsum(run.layer_sizes)
  # The end of a layer is the first gate of the next one, hence `right`.
  layer = int(np.searchsorted(ends, gate, side="right"))
  return _Place(layer, int(gate - (ends[layer] - run.layer_sizes[layer])))


def _short(run: ImageRun, gate: int) -> str:
  """Returns the short name of a gate, `layer:number`."""
  place = _place(run, gate)
  return f"{place.layer:02d}:{place.number}"
