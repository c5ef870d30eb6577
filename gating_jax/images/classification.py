"""Training and tests of gated image classifiers in a run directory.

Other tasks on labelled images, such as segmentation, run by the same functions. A training may
start from an ungated checkpoint of the same network, with fresh gates.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
from flax import traverse_util

from gating_jax.analysis import outcomes
from gating_jax.data import augment, batches, streaming
from gating_jax.images import compile, export
from gating_jax.images import report as image_report
from gating_jax.images.build import Experiment, build
from gating_jax.layers.gate import is_gate_path
from gating_jax.paths import user_path
from gating_jax.reports import conclusion, failing, page, surroundings, tables
from gating_jax.reports import gates as gate_pictures
from gating_jax.terminal import Pace, lasting, say, working
from gating_jax.training import (
  closed_gates,
  devices,
  evaluation,
  hosts,
  loop,
  rundir,
  steps,
)
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import HISTOGRAMS_FILE, METRICS_FILE, Journal, read_lines
from gating_jax.training.steps import map_steps

# Folded into the key, so that cutting out does not repeat the random numbers of crops.
_CUT_OUT = 1


@dataclasses.dataclass(frozen=True)
class Task:
  """Definition of a task: the use of labels in training, tests and reports.

  Attributes:
    prepare: `(experiment, key, uint8 pixels) -> network input`, augmented.
    scores: `(logits, labels) -> results` of each image, as in `steps.make_eval_step`.
    summarise: as in `evaluation.evaluate`, after the experiment.
    rows: the result as names and values, for people.
    noun: the name of an example.
    score: key of the score among the result's numbers, and its name.
    classes: number of classes of images, for the gates' information on them; None where an image
      has no class of its own.
    draw: `(experiment, state) -> {file name: (figure, caption)}`, further pictures.
  """

  prepare: Callable[[Experiment, jax.Array, jax.Array], jax.Array]
  scores: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
  summarise: Callable[[Experiment, Mapping[str, Any], int], dict[str, float]]
  rows: Callable[[Mapping[str, Any]], list[tuple[str, str]]]
  noun: str = "image"
  score: tuple[str, str] = ("accuracy", "accuracy")
  classes: Callable[[Experiment], int | None] = lambda experiment: len(experiment.test.class_names)
  draw: Callable[[Experiment, steps.TrainState], Mapping[str, tuple[Any, str]]] = lambda *_: {}

  def render(self, result: Mapping[str, Any]) -> str:
    """Returns the result as text."""
    return tables.render_rows(self.rows(result), result.get("layers"))

  def title(self, experiment: Experiment) -> str:
    """Describes the model and the data set."""
    model = experiment.config.model
    gates = {"none": "without gates", "exits": "with early exits", "experts": "with experts"}
    return (
      f"{model.name} {gates.get(model.gating, f'with {model.gating} gates')} on "
      f"{experiment.config.data.name}"
    )


def _augment(experiment: Experiment, key: jax.Array, pixels: jax.Array) -> jax.Array:
  data = experiment.config.data
  pixels = augment.crop_and_flip(
    key, pixels, pad=data.crop_padding, flip=data.flip, axis_name=devices.AXIS
  )
  return augment.cut_out(
    jax.random.fold_in(key, _CUT_OUT),
    experiment.normalise(pixels),
    size=data.cutout_size,
    axis_name=devices.AXIS,
  )


# The task of a classifier; segmentation replaces most of its fields.
TASK = Task(
  prepare=_augment,
  scores=steps.image_scores,
  summarise=lambda _, sums, images: evaluation.summarise(sums, images),
  rows=tables.classification_rows,
)


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """Runs a mode for a classifier in a run directory.

  `train` trains to the end from wherever the run directory stands; `evaluate` tests its newest
  checkpoint, `report` writes a page of it, `export` writes it as files that run without this
  package, and `compile` times programs that skip its closed gates.

  Args:
    config: the config of the run.
    workdir: the run directory.
    mode: one of these modes.
  """
  with working("opening the data", "minutes for large sets"):
    experiment = build(config)
  if mode == "train" and config.model.init_from is not None:
    check_start(config)
  run_task(TASK, experiment, workdir, mode, export=export.run, compile=compile.run)


def run_task(
  task: Task, experiment: Experiment, workdir: Path, mode: str, **of_newest: Callable[..., None]
) -> None:
  """Runs a mode for any task.

  Args:
    task: the task of the experiment.
    experiment: the experiment to run.
    workdir: the run directory.
    mode: `train`, `evaluate`, `report` or a name in `of_newest`.
    of_newest: further modes, functions of `(experiment, run_dir, step, variables)` that write
      something of the newest checkpoint.
  """
  failing.run_mode(
    workdir,
    experiment.config,
    mode,
    render=functools.partial(_render_finished, task, experiment, workdir),
    train=functools.partial(_train, task, experiment),
    evaluate=functools.partial(_evaluate, task, experiment),
    report=functools.partial(_report, task, experiment),
    **{name: functools.partial(_make, make, experiment) for name, make in of_newest.items()},
  )


def _render_finished(
  task: Task, experiment: Experiment, path: Path, result: Mapping[str, Any]
) -> str:
  return f"{task.render(result)}\n{conclude(task, experiment, path, result, 'A finished run of')}"


def _make(make: Callable[..., None], experiment: Experiment, run_dir: rundir.RunDir) -> None:
  step, state = newest(experiment, run_dir)
  # Without the optimiser's state, which only training needs.
  variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
  hosts.on_writer(lambda: make(experiment, run_dir, step, variables))


def _evaluate(task: Task, experiment: Experiment, run_dir: rundir.RunDir) -> None:
  step, _, result, *_ = _test_newest(task, experiment, run_dir)
  say(f"checkpoint of step {step}")
  say(task.render(result))
  say(
    conclude(task, experiment, run_dir.path, result, f"Tested the checkpoint of step {step:,} of")
  )


def _report(task: Task, experiment: Experiment, run_dir: rundir.RunDir, notice: str = "") -> None:
  step, state, *tested = _test_newest(task, experiment, run_dir)
  with working("drawing the report", "about half a minute"):
    # Only the writer draws: the others would compute pictures that nobody sees.
    drawn = task.draw(experiment, state) if hosts.is_writer() else {}
    hosts.on_writer(lambda: write_report(task, experiment, run_dir, step, *tested, drawn, notice))
  say(f"report of the checkpoint of step {step}: {run_dir.report}")
  say(
    conclude(
      task,
      experiment,
      run_dir.path,
      tested[0],
      f"Wrote the page of the checkpoint of step {step:,} of",
    )
  )


def _test_newest(
  task: Task, experiment: Experiment, run_dir: rundir.RunDir
) -> tuple[int, Any, dict[str, Any], evaluation.ImageBehaviour, evaluation.GateBehaviour | None]:
  """Tests the newest checkpoint; returns its step and state, and the results of `make_test`."""
  step, state = newest(experiment, run_dir)
  with working(
    f"testing on {len(experiment.test):,} {task.noun}s",
    "the program is compiled first, up to a minute",
  ):
    result, images, gates = make_test(experiment, task)(state)
  if gates is not None:
    result["layers"] = outcomes.by_layer(gates.diagnosis, experiment.counts.gate_layers)
  return step, state, result, images, gates


def newest(experiment: Experiment, run_dir: rundir.RunDir) -> tuple[int, Any]:
  """Returns the newest checkpoint's step and state. Raises RunDirError where there is none."""
  with working("loading the newest checkpoint"):
    # The run may be training, so nothing in it is changed.
    checkpoints = Checkpoints(run_dir.checkpoints, read_only=True)
    try:
      step, state = _restore(experiment, checkpoints)
    finally:
      checkpoints.close()
  if not step:
    raise rundir.RunDirError(f"no checkpoint in {run_dir.checkpoints} yet")
  return step, state


def _train(task: Task, experiment: Experiment, run_dir: rundir.RunDir) -> None:
  started, total = time.monotonic(), experiment.settings.total_steps
  with working(
    "opening the data and making the network", "up to half a minute, more for large sets"
  ):
    train = experiment.open_train()
    # Kept in the run directory, so that the model can be loaded without its data.
    rundir.write_outlines(run_dir.path, [train, experiment.test])
    checkpoints = Checkpoints(run_dir.checkpoints)
    first_step, state = _restore(experiment, checkpoints)
  # A resumed run has its own parameters; only a fresh one starts from those of another.
  if first_step:
    say(f"resuming from the checkpoint of step {first_step} in {run_dir.path}")
  elif experiment.config.model.init_from is not None:
    state = start_from(experiment, state)
  journal = Journal(run_dir.path, first_step, total)
  test = make_test(experiment, task)
  layers, pace = experiment.counts.gate_layers, Pace(journal.say, total)
  journal.say(
    first_step, f"{task.title(experiment)}, tested on {len(experiment.test):,} {task.noun}s"
  )

  def evaluate(state, step):
    """Tests a state; writes the result to the journal and prints its score."""
    with working(
      f"testing on {len(experiment.test):,} {task.noun}s", tell=functools.partial(journal.say, step)
    ):
      result, images, gates = test(state)
    journal.write(step, "test", result)
    if gates is not None:
      journal.write_histograms(step, "test", evaluation.histograms(gates, layers))
    journal.say(step, f"test {task.score[1]} {100 * result[task.score[0]]:.2f} %")
    return result, images, gates

  try:
    advance = pace(make_advance(experiment, train, first_step, task))
    state, step = loop.train(
      state,
      first_step,
      advance,
      settings=experiment.settings,
      checkpoints=checkpoints,
      journal=journal,
      evaluate=evaluate,
      watch=closed_gates.watch_images(experiment.config),
    )
    if step < total:
      journal.say(step, "stopped as asked; a checkpoint is saved, run the same command to resume")
      return
    result, images, gates = evaluate(state, step)
    if gates is not None:
      result |= {
        "batch_shaping_reduction": experiment.objective.reduction,
        "layers": outcomes.by_layer(gates.diagnosis, layers),
      }
    with working("drawing the report", "about half a minute", functools.partial(journal.say, step)):
      hosts.on_writer(
        lambda: write_files(task, experiment, run_dir, state, journal, step, result, images, gates)
      )
  finally:
    journal.close()
    checkpoints.close()
  result |= {"step": step, "seconds_since_last_start": round(time.monotonic() - started, 1)}
  # The result marks the run as finished, so it is written after all other files.
  run_dir.finish(result)
  say(task.render(result))
  say(
    conclude(
      task, experiment, run_dir.path, result, f"Trained for {lasting(time.monotonic() - started)}:"
    )
  )


def _restore(experiment: Experiment, checkpoints: Checkpoints) -> tuple[int, Any]:
  """Returns the newest checkpoint's step and state, or step 0 and a fresh state."""
  state = steps.init_state(
    experiment.model, experiment.optimiser, experiment.config.seed, experiment.test.shape
  )
  # The fresh state also gives a checkpoint its structure and shapes.
  return checkpoints.restore(state, devices.replicated_sharding()) or (0, devices.replicate(state))


def make_advance(
  experiment: Experiment, train: Any, first_step: int, task: Task = TASK
) -> Callable[[Any, int], tuple[Any, Any]]:
  """Returns `(state, step) -> (state, metrics)` over all devices, fed by the config's loader.

  Args:
    experiment: the experiment to train.
    train: its training set.
    first_step: the step from which training continues.
    task: the task of the experiment.
  Returns:
    a function that takes `steps_per_dispatch` steps; metrics are `[steps_per_dispatch]`.
  """
  config = experiment.config
  k, batch = config.devices.steps_per_dispatch, config.optim.batch_size
  process = (jax.process_index(), jax.process_count())
  make_step = lambda model: steps.make_train_step(
    model,
    experiment.optimiser,
    experiment.objective,
    functools.partial(task.prepare, experiment),
    seed=config.seed,
    axis_name=devices.AXIS,
    noise_scale=experiment.noise_scale,
  )
  mapped = lambda several, args: map_steps(
    lambda model: several(make_step(model)),
    experiment.model,
    experiment.full,
    args=args,
    backend=config.devices.backend,
  )
  if isinstance(train, streaming.Stream):
    # The stream begins at `first_step`, so that a resumed run sees the batches it would have seen.
    stream = train.batches(batch, first_step, k, experiment.settings.total_steps, process)
    run = mapped(steps.streamed_steps, (devices.REPLICATED, devices.BATCH))
    return lambda state, _: run(state, next(stream))
  # A small set is copied to every device once; a call sends indices alone.
  images = devices.replicate((train.pixels, train.labels))
  run = mapped(steps.resident_steps, (devices.REPLICATED, devices.REPLICATED, devices.BATCH))
  return lambda state, at: run(
    state, images, batches.indices(config.seed, at, k, batch, len(train), process)
  )


def make_test(
  experiment: Experiment, task: Task = TASK
) -> Callable[
  [Any], tuple[dict[str, Any], evaluation.ImageBehaviour, evaluation.GateBehaviour | None]
]:
  """Returns a test, `state -> evaluation.evaluate` on every test image once.

  The result includes the budget where there is one. The program is compiled at the first call only.

  Args:
    experiment: the experiment to test.
    task: the task of the experiment.
  """
  config = experiment.config
  run = devices.map_over_devices(
    steps.make_eval_step(experiment.model, experiment.normalise, task.scores),
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH),
    results=devices.BATCH,
    backend=config.devices.backend,
  )

  def test(state):
    """Returns the result of a state, with the behaviour of images and of gates."""
    result, images, gates = evaluation.evaluate(
      # Each process runs its part of a batch, and all see the whole result.
      lambda *batch: hosts.allgather(run(state, *hosts.local_shard(batch))),
      batches.padded_batches(experiment.test, config.optim.batch_size),
      experiment.counts,
      functools.partial(task.summarise, experiment),
      classes=task.classes(experiment),
      # For the outcomes of gates: with noise, a gate may be drawn open and closed for the same
      # image.
      noise_scale=experiment.drawn_noise_scale(int(state.step)),
    )
    if gates is not None and experiment.objective.prices_budget:
      result["budget"] = experiment.objective.target
    return result, images, gates

  return test


def conclude(
  task: Task, experiment: Experiment, path: Path, result: Mapping[str, Any], done: str
) -> str:
  """Returns the closing lines of a mode that tests the network.

  Args:
    task: the task of the run.
    experiment: the experiment of the run.
    path: the run directory.
    result: the result of the test.
    done: the beginning of a sentence about the network.
  """
  rows = [task.rows(result)[0], *conclusion.gates(result), ("run directory:", str(path))]
  report = path / rundir.REPORT_FILE
  # The page is written when a run ends, or by --mode=report.
  if report.exists():
    rows.append(("page", f"{report}, for a browser"))
  modes = []
  # Only modes that work on this model are proposed.
  if not conclusion.refusal(compile.check, experiment.model) and compile.skips(experiment.model):
    modes = (
      ["compile", "export"] if experiment.config.experiment == "classification" else ["compile"]
    )
  return conclusion.text(
    f"{done} {task.title(experiment)}.", rows, conclusion.following(path, modes)
  )


def write_files(
  task: Task,
  experiment: Experiment,
  run_dir: rundir.RunDir,
  state: Any,
  journal: Journal,
  step: int,
  result: Mapping[str, Any],
  images: evaluation.ImageBehaviour,
  gates: evaluation.GateBehaviour | None,
) -> None:
  """Writes the pictures, a file of gates and the report of a run that has ended.

  Args:
    task: the task of the run.
    experiment: the experiment of the run.
    run_dir: the run directory.
    state: the state after training.
    journal: receives the pictures.
    step: the last step.
    result, images, gates: results of the test, as of `evaluation.evaluate`.
  """
  drawn, names = task.draw(experiment, state), []
  for name, (figure, _) in drawn.items():
    page.save_figure(figure, run_dir.path / name)
    names.append(name)
  if gates is not None:
    figure = gate_pictures.draw_gate_statistics(
      gates.logits, gates.diagnosis.open_rates, experiment.objective.prior
    )
    page.save_figure(figure, run_dir.path / "gates.png")
    tables.write_gate_csv(
      run_dir.path / "gates.csv", gates.diagnosis, experiment.counts.gate_layers
    )
    names.append("gates.png")
  # TensorBoard shows the pictures too.
  for name in names:
    journal.write_picture(step, f"pictures/{Path(name).stem}", run_dir.path / name)
  write_report(task, experiment, run_dir, step, result, images, gates, drawn)


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


def write_report(
  task: Task,
  experiment: Experiment,
  run_dir: rundir.RunDir,
  step: int,
  result: Mapping[str, Any],
  images: evaluation.ImageBehaviour,
  gates: evaluation.GateBehaviour | None,
  drawn: Mapping[str, tuple[Any, str]] = MappingProxyType({}),
  notice: str = "",
) -> None:
  """Writes `report.html` of the state of `step`.

  Args:
    task: the task of the run.
    experiment: the experiment of the run.
    run_dir: the run directory.
    step: the step of the state.
    result, images, gates: results of the test, as of `evaluation.evaluate`.
    drawn: the pictures of `task.draw`.
    notice: the first line of the page; empty for none.
  """
  config, counts, total = experiment.config, experiment.counts, experiment.settings.total_steps
  kind = surroundings.KINDS[config.experiment]
  # The journal may have later tests than this state, written after its checkpoint.
  before = lambda file: [
    line
    for line in read_lines(run_dir.path / file)
    if line["split"] == "test" and line["step"] < step
  ]
  histograms = evaluation.histograms(gates, counts.gate_layers) if gates is not None else {}
  # Names of modules are long, so figures number the layers.
  numbered = functools.partial(_numbered, [name for name, _ in counts.gate_layers])
  # The page shows a prior only where it acts on the gates.
  pulled = config.loss.regulariser == "batch_shaping" and config.loss.batch_shaping.coefficient > 0
  image_report.write(
    run_dir.report,
    image_report.ImageRun(
      title=f"{config.model.name} on {config.data.name}",
      subtitle=f"{run_dir.path.name}, step {step:,} of {total:,}, gates: {config.model.gating}",
      noun=task.noun,
      rows=task.rows(result),
      score=task.score,
      # This test comes last: outside training the journal does not have it.
      tests=[*before(METRICS_FILE), {"step": step, **result}],
      histograms=[*map(numbered, [*before(HISTOGRAMS_FILE), {"step": step, **histograms}])],
      macs=counts.macs,
      images=images,
      gates=gates,
      layers=counts.gate_layers,
      # The classes of pixels are no classes of scenes.
      class_names=experiment.test.class_names if task.classes(experiment) else None,
      prior=experiment.objective.prior if pulled else None,
      config=[(name, str(value)) for name, value in rundir.flatten(config).items()],
      read=lambda index: experiment.test.read(index)[0],
      pictures=list(drawn.values()),
      around=surroundings.read_surroundings(
        run_dir,
        config,
        kind,
        step=step,
        not_compiled=conclusion.refusal(compile.check, experiment.model),
      ),
      how=kind.how,
      notice=notice,
    ),
  )


def check_start(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config of the run that `model.init_from` names.

  Raises:
    RunDirError: there is no run.
    ValueError: the run is of another experiment, gated, or of another network.
  """
  # Fields that their config lacks, being older, are taken from this one.
  theirs = config.copy_and_resolve_references()
  with theirs.unlocked():
    theirs.update(rundir.with_tuples(rundir.RunDir(user_path(config.model.init_from)).config()))
  # The fields that determine the names and shapes of parameters.
  for name, mine in (
    ("experiment", config.experiment),
    ("model.gating", "none"),
    ("model.name", config.model.name),
    ("model.width", config.model.width),
    ("model.inner_width", config.model.inner_width),
    ("model.group_norm", config.model.group_norm),
  ):
    found = rundir.flatten(theirs)[name]
    if found != mine:
      raise ValueError(
        f"model.init_from must name a run with {name}={mine!r}; that of {config.model.init_from} "
        f"has {found!r}"
      )
  return theirs


def start_from(experiment: Experiment, state: steps.TrainState) -> steps.TrainState:
  """Returns a fresh state with parameters and statistics of the run `model.init_from` names.

  They are those of its newest checkpoint.

  Args:
    experiment: the experiment to start.
    state: a fresh state of it.
  Raises:
    RunDirError: the run has no checkpoint.
    ValueError: a parameter has no place here, or one that is not of a gate or of an exit has none
      there.
  """
  folder = user_path(experiment.config.model.init_from)
  theirs = build(check_start(experiment.config))
  like = jax.eval_shape(
    lambda: steps.init_state(theirs.model, theirs.optimiser, theirs.config.seed, theirs.test.shape)
  )
  # Shapes are enough to restore, so no state of theirs is initialised.
  checkpoints = Checkpoints(rundir.RunDir(folder).checkpoints, read_only=True)
  try:
    found = checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()
  if found is None:
    raise rundir.RunDirError(
      f"model.init_from must name a run with a checkpoint; {folder} has none yet"
    )
  step, trained = found
  say(f"starting from the parameters of step {step} in {folder}")
  return state.replace(
    params=_merged(state.params, trained.params, folder),
    batch_stats=_merged(state.batch_stats, trained.batch_stats, folder),
  )


def _merged(mine: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
  mine, theirs = traverse_util.flatten_dict(mine), traverse_util.flatten_dict(theirs)
  for path in sorted(mine.keys() | theirs.keys()):
    here, there = (tree[path].shape if path in tree else None for tree in (mine, theirs))
    # An ungated network has neither gates nor exits: these keep their initial values.
    fresh = there is None and (is_gate_path(path) or path[0].startswith("exit"))
    if here != there and not fresh:
      raise ValueError(
        f"model.init_from must name a run of the same network; {'/'.join(path)} has shape {here} "
        f"here and {there} in {folder}"
      )
  return traverse_util.unflatten_dict({**mine, **theirs})
