"""Training and tests of gated image classifiers in a run directory.

Other tasks on labelled images, such as segmentation, run by the same functions.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from gating_jax import programmes, runner
from gating_jax.analysis import outcomes, sources
from gating_jax.analysis import scores as class_scores
from gating_jax.checks import user_path
from gating_jax.config_files import Config
from gating_jax.data import augment, folders, image_sets, streaming, unions
from gating_jax.data.checked_files import write_unreadable
from gating_jax.images import compile, curve, export
from gating_jax.images import report as image_report
from gating_jax.images.build import AUTO, Experiment, build
from gating_jax.images.checks import EXITS
from gating_jax.images.start import (
  Weights,
  check_can_start,
  check_start,
  read_weights,
  start_from,
)
from gating_jax.images.teacher import Teacher, load_teacher
from gating_jax.models.pretrained import names_weights
from gating_jax.programmes import UNGATED_NETS
from gating_jax.reports import conclusion, page, predictions, tables
from gating_jax.reports import gates as gate_pictures
from gating_jax.reports.text import format_percent
from gating_jax.terminal import say, warn, working
from gating_jax.training import devices, evaluation, hosts, outlines, steps
from gating_jax.training.closed_gates import (
  CLOSED,
  MOST_CLOSED,
  NOTHING_LEFT,
  ClosingWatch,
  Limit,
  accepted_fraction,
  advise_on_loss,
)
from gating_jax.training.evaluation import Evaluation
from gating_jax.training.journal import numbers
from gating_jax.training.objectives import WITH_SPARSITY
from gating_jax.training.rundir import RunDir
from gating_jax.training.steps import Advance, MappedSteps, TrainState

# Folded into the key, so that cutting out does not repeat the random numbers of crops.
_CUT_OUT = 1
# Descriptions of networks in titles, by `model.gating`; the others name a kind of gates.
_GATING_TITLES = {
  "none": "without gates",
  "scale": "with scales of channels",
  "bias": "with biases of sources",
  "kernels": "with mixed kernels",
  "exits": "with early exits",
  "experts": "with experts",
}
# Regularisers with one strength, and its setting.
_REGULARISERS = {
  "entropy": "loss.entropy.coefficient",
  "decision_entropy": "loss.decision_entropy.coefficient",
  "away_from_half": "loss.away_from_half.coefficient",
}


def run(config: Config, workdir: Path, mode: str) -> None:
  """Runs a mode for a classifier in a run directory.

  Args:
    config: the config of the run.
    workdir: the run directory.
    mode: one of those of `runner.run`; `export` writes files that run without this package, and
      `compile` times programs that skip closed gates.
  """
  runner.run(_prepare(config, workdir, mode), workdir, mode)


def _prepare(config: Config, workdir: Path, mode: str) -> Classification:
  """Opens the data of a run, and checks what a training begins with."""
  config = _with_own_loader(config, workdir, mode)
  start = config.model.init_from if mode == "train" else None
  # A resumed run has parameters of its own, and does without the file.
  begins = not RunDir(user_path(workdir)).has_checkpoint()
  if start is not None and names_weights(start) and not begins:
    start = None
  # The weights of a file are read once: for the checks, a teacher and the training.
  weights = None
  # Before data are opened, which may take minutes.
  if start is not None and names_weights(start):
    weights = read_weights(config)
  elif start is not None:
    check_start(config, with_checkpoint=begins)
  with runner.opening_data(Classification, config, workdir, mode=mode):
    experiment = build(config)
  if start is not None:
    check_can_start(experiment, weights)
  programme = Classification(experiment, weights)
  if mode == "train":
    with working("loading the teacher, if there is one", "up to a minute"):
      # A wrong one is found before there is a run directory.
      _ = programme.teacher
  return programme


def _with_own_loader(config: Config, workdir: Path, mode: str) -> Config:
  """Returns the config with the loader that a run has in place of `auto`; as it is for a new run.

  A run keeps its loader, however much memory there is when it is resumed. Only `train` begins a run
  that has saved nothing again.
  """
  run_dir = RunDir(user_path(workdir))
  if config.data.loader != AUTO or not run_dir.exists():
    return config
  if mode == "train" and not run_dir.has_progress():
    return config
  own = config.copy_and_resolve_references()
  with own.unlocked():
    kept = run_dir.config().get("data", {})
    own.data.loader = kept.get("loader", AUTO)
    # Chosen with the loader. A run of an older version has none, and keeps its own way.
    if own.data.get("test_crop") is None:
      own.data.test_crop = kept.get("test_crop")
  return own.lock()


@dataclasses.dataclass(frozen=True)
class Classification(runner.Programme):
  """The classification of images; that of pixels overrides the use of labels.

  Attributes:
    experiment: the experiment of the run.
    weights: those of the file that `model.init_from` names, where they are read already.
    score: key of the score among the result's numbers, and its name.
  """

  experiment: Experiment
  weights: Weights | None = None
  score: ClassVar[tuple[str, str]] = ("accuracy", "accuracy")
  modes: ClassVar[Mapping[str, Callable[..., None]]] = {
    "export": export.export_run,
    "compile": functools.partial(compile.compile_run, then=("export",)),
    "curve": curve.curve_run,
  }

  @property
  def noun(self) -> str:
    """Returns the word for an example."""
    return programmes.PROGRAMMES[self.config.experiment].noun

  @functools.cached_property
  def teacher(self) -> Teacher | None:
    """Loads the teacher of the loss, at its first use; None without one."""
    return load_teacher(self.experiment, self.weights)

  def prepare(self, key: jax.Array, pixels: jax.Array) -> jax.Array:
    """Augments and normalises uint8 pixels for training."""
    data = self.config.data
    pixels = augment.crop_and_flip(
      key, pixels, pad=data.crop_padding, flip=data.flip, axis_name=devices.AXIS
    )
    return augment.cut_out(
      jax.random.fold_in(key, _CUT_OUT),
      self.experiment.normalise(pixels),
      size=data.cutout_size,
      axis_name=devices.AXIS,
    )

  @staticmethod
  def scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Returns the results of each image, as `steps.make_eval_step` takes them."""
    return steps.image_scores(logits, labels)

  def summarise(self, sums: Mapping[str, Any], images: int) -> dict[str, float]:
    """Returns the numbers of a set from sums over its images, as `evaluation.evaluate` does."""
    return evaluation.summarise(sums, images)

  def class_entries(self, evaluated: Evaluation) -> dict[str, Any]:
    """Returns the entries of a result that say what its score is worth: see `analysis.scores`."""
    images = evaluated.images
    if images.predicted is None or images.labels is None:
      return {}
    names = self.experiment.test.class_names
    return class_scores.score_predictions(images.labels, images.predicted, names)

  def source_entries(self, evaluated: Evaluation) -> dict[str, Any]:
    """Returns the entries of a result for the sets of a union: see `analysis.sources`."""
    experiment, images, gates = self.experiment, evaluated.images, evaluated.gates
    if not experiment.source_names or images.predicted is None or images.labels is None:
      return {}
    return sources.score_sources(
      sources.ImageOutcomes(
        labels=images.labels,
        predicted=images.predicted,
        macs=images.macs,
        class_rates=None if gates is None else gates.class_rates,
      ),
      experiment.source_names,
      np.asarray(experiment.class_sources),
      ungated_macs=experiment.counts.macs,
      known=self.config.loss.scope == "source",
    )

  def _list_untrained(self, train: Any) -> dict[str, Any]:
    """Returns the entry of a result with the classes that the training set lacks."""
    labels, names = getattr(train, "labels", None), self.experiment.test.class_names
    # A stream has not read its labels.
    if labels is None:
      return {}
    # Labels of pixels may have one more number, for those that are ignored.
    counts = np.bincount(np.ravel(labels), minlength=len(names))[: len(names)]
    return {"classes_without_training": class_scores.list_untrained(counts, names)}

  def rows(self, result: Mapping[str, Any]) -> list[tables.Row]:
    """Returns the result as names and values, the score first."""
    return tables.classification_rows(result)

  def classes(self) -> int | None:
    """Returns the number of classes of images; None where an image has no class of its own."""
    return len(self.experiment.test.class_names)

  def draw(self, state: TrainState) -> dict[str, tuple[Any, str]]:
    """Draws further pictures, `{file name: (figure, caption)}`."""
    return {}

  @property
  def class_names(self) -> tuple[str, ...]:
    """Returns the names of the classes."""
    return tuple(self.experiment.test.class_names)

  @property
  def title(self) -> str:
    """Describes the model and the data set."""
    model = self.config.model
    gates = _GATING_TITLES.get(model.gating, f"with {model.gating} gates")
    return f"{model.name} {gates} on {self.config.data.name}"

  def render(self, result: Mapping[str, Any]) -> str:
    """Returns the result as text."""
    return tables.render_rows(self.rows(result), result.get("layers"))

  def main_numbers(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the score, and MACs and outcomes of gates."""
    return [self.rows(result)[0], *conclusion.outcome_rows(result)]

  def next_modes(self) -> list[str]:
    """Returns the modes that work on this model."""
    model = self.experiment.model
    if conclusion.refusal(compile.check_compilable, model) or not compile.skips(model):
      return []
    return [mode for mode in ("compile", "export") if mode in self.modes]

  def fresh(self) -> TrainState:
    """Initialises the state with which training begins."""
    return self.experiment.init_state()

  def variables(self, state: TrainState) -> dict[str, Any]:
    """Returns the parameters and statistics, without the optimiser's state."""
    return jax.device_get({"params": state.params, "batch_stats": state.batch_stats})

  def train(self, run_dir: RunDir) -> dict[str, Any] | None:
    """Trains to the end; returns the result, or None where it was asked to stop."""
    experiment = self.experiment
    with working(
      "reading the training data and making the network",
      "up to half a minute, more for large sets",
    ):
      train = experiment.open_train()
      if run_dir.has_checkpoint():
        _warn_of_other_images(run_dir, train)
      # Kept in the run directory, so that the model can be loaded without its data.
      outlines.write_outlines(run_dir.path, [train, experiment.test])
      # Also of a run that is stopped before its end.
      hosts.on_writer(write_unreadable, run_dir.path, self._unreadable(train))
      training = runner.Training(run_dir.path, self.fresh(), experiment.settings.total_steps)
    teacher = self.teacher
    if teacher is not None:
      say(f"the teacher is {teacher.source}, of {teacher.macs:,.0f} MACs an image")
    with training:
      # A resumed run has its own parameters; only a fresh one starts from those of another.
      if not training.step and self.config.model.init_from is not None:
        with working("taking what is trained already", "up to a minute"):
          training.state = start_from(experiment, training.state, train, weights=self.weights)
      # The state and the teacher have what they need: memory for a training is not held twice.
      object.__setattr__(self, "weights", None)
      training.begin(f"{self.title}, tested on {len(experiment.test):,} {self.noun}s")
      evaluate = functools.partial(self._evaluate, training, self.make_test())
      try:
        ended = training.run(
          self.make_advance(train, training.step, teacher),
          experiment.settings,
          evaluate=evaluate,
          watch=watch_images(self.config),
        )
      finally:
        # Also of a training that was stopped or failed, in which no process may wait for others.
        if hosts.is_writer():
          write_unreadable(run_dir.path, self._unreadable(train))
      if not ended:
        return None
      evaluated = evaluate()
      evaluated.result.update(self._list_untrained(train))
      if teacher is not None:
        evaluated.result.update(teacher.entries(evaluated.result["macs"]))
      if evaluated.gates is not None:
        evaluated.result["batch_shaping_reduction"] = experiment.objective.reduction
      self._add_names(evaluated, train)
      hosts.on_writer(write_unreadable, run_dir.path, self._unreadable(train))
      with working("drawing the report", "about half a minute", training.say):
        hosts.on_writer(self._write_files, run_dir, training, evaluated)
    return evaluated.result | {"step": training.step}

  def test(self, step: int, state: TrainState) -> dict[str, Any]:
    """Tests a state; returns its result."""
    return self._test(state).result

  def report(self, run_dir: RunDir, step: int, state: TrainState, *, notice: str) -> dict[str, Any]:
    """Tests a state, and writes its page; returns the result."""
    evaluated = self._test(state)
    with working("drawing the report", "about half a minute"):
      # Only the writer draws: the others would compute pictures that nobody sees.
      drawn = self.draw(state) if hosts.is_writer() else {}
      hosts.on_writer(self.write_report, run_dir, step, evaluated, drawn=drawn, notice=notice)
    return evaluated.result

  def make_advance(self, train: Any, first_step: int, teacher: Teacher | None = None) -> Advance:
    """Returns `(state, step) -> (state, metrics)` over all devices, fed by the config's loader.

    Args:
      train: the training set.
      first_step: the step from which training continues.
      teacher: the teacher of the loss; None without one.
    Returns:
      a function that takes `steps_per_dispatch` steps; metrics are `[steps_per_dispatch]`.
    """
    experiment, config = self.experiment, self.config
    k, batch = config.devices.steps_per_dispatch, config.optim.batch_size
    process = (jax.process_index(), jax.process_count())
    # Any set has a length; only a union draws from several.
    examples = getattr(train, "shares", None) or len(train)

    def make_step(model):
      """Makes the training step of a model."""
      return steps.make_train_step(
        model,
        experiment.optimiser,
        experiment.objective,
        prepare=self.prepare,
        seed=config.seed,
        axis_name=devices.AXIS,
        noise_scale=experiment.noise_scale,
        share=experiment.share,
        softness=experiment.softness,
        # Training fits all exits.
        method="all_exits" if config.model.gating == EXITS else None,
        teach=None if teacher is None else teacher.teach,
      )

    def indices(step):
      """Returns the images of the steps of one call, from its first step."""
      return image_sets.process_indices(
        config.seed, step, k, batch_size=batch, examples=examples, process=process
      )

    mapped = MappedSteps(
      make_step,
      experiment.model,
      full=experiment.full,
      backend=config.devices.backend,
      constants=() if teacher is None else (teacher.variables,),
    )
    if isinstance(train, streaming.Stream):
      # From `first_step` on, so that a resumed run sees the batches it would have seen.
      total = experiment.settings.total_steps
      stream = train.batches(batch, first_step, k, total_steps=total, process=process)
      return mapped.on_stream(stream)
    # A small set is copied to every device once; a call sends indices alone.
    return mapped.on_resident((train.pixels, train.labels), indices)

  def make_test(self) -> Callable[[TrainState], Evaluation]:
    """Returns a test of a state on every test image once.

    The result includes the budget where there is one. The program is compiled at the first call
    only.
    """
    experiment, config = self.experiment, self.config

    def scores(logits, labels):
      """Returns the results of each image among the classes that compete."""
      return self.scores(experiment.competing(logits, labels), labels)

    run_batch = devices.map_over_devices(
      steps.make_eval_step(experiment.model, experiment.normalise, scores),
      args=(devices.REPLICATED, devices.BATCH, devices.BATCH),
      results=devices.BATCH,
      backend=config.devices.backend,
    )

    def test(state):
      """Returns the result of a state, with the behaviour of images and of gates."""
      evaluated = evaluation.evaluate(
        # Each process runs its part of a batch, and all see the whole result.
        lambda *batch: hosts.allgather(run_batch(state, *hosts.local_shard(batch))),
        image_sets.padded_batches(experiment.test, config.optim.batch_size),
        experiment.counts,
        summarise=self.summarise,
        classes=self.classes(),
        # The outcomes of gates need it: noise may draw a gate open and closed for the same image.
        noise_scale=experiment.drawn_noise_scale(int(state.step)),
      )
      evaluated.result.update(self.class_entries(evaluated))
      evaluated.result.update(self.source_entries(evaluated))
      if evaluated.gates is not None and experiment.objective.has_budget:
        evaluated.result["budget"] = experiment.objective.target
      return evaluated

    return test

  def _test(self, state: TrainState) -> Evaluation:
    """Tests a state that is not being trained."""
    with working(
      f"testing on {len(self.experiment.test):,} {self.noun}s",
      "the program is compiled first, up to a minute",
    ):
      evaluated = self.make_test()(state)
    self._add_names(evaluated)
    return evaluated

  def _evaluate(
    self, training: runner.Training, test: Callable[[TrainState], Evaluation]
  ) -> Evaluation:
    """Tests the state of a training; notes the result in the journal and prints the score."""
    what = f"testing on {len(self.experiment.test):,} {self.noun}s"
    with working(what, "minutes for large sets", training.say):
      evaluated = test(training.state)
    training.journal.write(training.step, "test", numbers(evaluated.result))
    if evaluated.gates is not None:
      histograms = evaluation.histograms(evaluated.gates, self.experiment.counts.gate_layers)
      training.journal.write_histograms(training.step, "test", histograms)
    key, name = self.score
    training.say(f"test {name} {format_percent(evaluated.result[key], 2)}")
    return evaluated

  def _unreadable(self, train: Any = None) -> dict[str, str]:
    """Returns the reasons for files that cannot be read, of the test set and of the training's."""
    found = {}
    for opened in (train, self.experiment.test):
      found |= getattr(opened, "unreadable", {})
    return found

  def _add_names(self, evaluated: Evaluation, train: Any = None) -> None:
    """Adds names, the number of unreadable files of folders and the outcomes of gates to a result.

    Args:
      evaluated: a test.
      train: the training set, where it is open.
    """
    name = self.config.data.name
    if name == folders.FOLDER or unions.is_union(name):
      evaluated.result["classes"] = list(self.experiment.test.class_names)
    if image_sets.has_folder(name):
      evaluated.result["unreadable_files"] = len(self._unreadable(train))
    if evaluated.gates is not None:
      evaluated.result["layers"] = outcomes.by_layer(
        evaluated.gates.diagnosis, self.experiment.counts.gate_layers
      )

  def _write_files(self, run_dir: RunDir, training: runner.Training, evaluated: Evaluation) -> None:
    """Writes pictures, files of gates and predictions, and the report of a run that has ended."""
    experiment, gates = self.experiment, evaluated.gates
    drawn = self.draw(training.state)
    figures = {name: figure for name, (figure, _) in drawn.items()}
    if gates is not None:
      figures["gates.png"] = gate_pictures.draw_gate_statistics(
        gates.logits, gates.diagnosis.open_rates, experiment.objective.prior
      )
      tables.write_gate_csv(
        run_dir.path / "gates.csv", gates.diagnosis, experiment.counts.gate_layers
      )
    found = None
    # The classes of pixels are no classes of scenes.
    if self.classes():
      file_names = getattr(experiment.test, "file_names", ())
      found = image_report.predict_images(evaluated.images, experiment.test.class_names, file_names)
    if found is not None:
      predictions.write_csv(run_dir.path, found)
    for name, figure in figures.items():
      page.save_figure(figure, run_dir.path / name)
      # TensorBoard shows the pictures too.
      training.journal.write_picture(
        training.step, f"pictures/{Path(name).stem}", run_dir.path / name
      )
    self.write_report(run_dir, training.step, evaluated, drawn=drawn)

  def write_report(
    self,
    run_dir: RunDir,
    step: int,
    evaluated: Evaluation,
    *,
    drawn: Mapping[str, tuple[Any, str]],
    notice: str = "",
  ) -> None:
    """Writes `report.html` of the state of `step`.

    Args:
      run_dir: the run directory.
      step: the step of the state.
      evaluated: results of its test.
      drawn: the pictures of `draw`.
      notice: the first line of the page; empty for none.
    """
    described = image_report.describe_run(
      run_dir,
      self.experiment,
      evaluated,
      step=step,
      rows=self.rows(evaluated.result),
      score=self.score,
      # The classes of pixels are no classes of scenes.
      class_names=self.class_names if self.classes() else None,
      pictures=list(drawn.values()),
      notice=notice,
    )
    image_report.write_report(run_dir.report, described)


def _warn_of_other_images(run_dir: RunDir, train: Any) -> None:
  """Warns where a run is resumed with another number of training images than before."""
  kept = outlines.read_outlines(run_dir.path)
  images = getattr(train, "in_epoch", None) or len(train)
  if kept and len(kept[0]) != images:
    warn(
      "%s was trained on %d images so far; now there are %d, whose order differs",
      run_dir.path,
      len(kept[0]),
      images,
    )


def watch_images(config: Config) -> ClosingWatch:
  """Returns the watch over classifiers and segmentation."""
  gating, gate, loss = config.model.gating, config.model.gate, config.loss
  # An exit that no image passes is not a closed gate; random gates learn nothing.
  if gating in (*UNGATED_NETS, "exits"):
    return ClosingWatch(())
  if gate.context in ("random", "assigned"):
    return ClosingWatch(())
  if gating == "experts":
    advice = "raise loss.balance.coefficient, with loss.regulariser=balance"
    return ClosingWatch([Limit(CLOSED, MOST_CLOSED, advice, subject="experts")])
  if loss.regulariser in _REGULARISERS:
    advice = f"lower {_REGULARISERS[loss.regulariser]}, or use loss.regulariser=batch_shaping"
  elif loss.regulariser == "none":
    advice = (
      "lower optim.learning_rate or optim.gate_lr_multiplier, or use loss.regulariser=batch_shaping"
    )
  else:
    advice = advise_on_loss("loss", loss, shaped=loss.regulariser == "batch_shaping")
  # Gates that see no input prune, and so do those that begin with a prior: they are meant to close
  # for all examples.
  prunes = gate.context == "none" or config.model.importance.form is not None
  most = MOST_CLOSED
  if prunes:
    most = NOTHING_LEFT
  elif loss.regulariser in WITH_SPARSITY:
    most = accepted_fraction(loss.sparsity)
  return ClosingWatch([Limit(CLOSED, most, advice)])
