import csv
import dataclasses
import functools
import importlib
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax import runner
from gating_jax.continual import build, compile, registry, report, run, training
from gating_jax.continual.method import LearnerState, Prediction, TaskTable
from gating_jax.data.image_sets import Images
from gating_jax.inference import folded
from gating_jax.models import resnets, vggs
from gating_jax.reports import tasks, timings
from gating_jax.training import devices, rundir
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import read_lines
from tests.helpers import pages, runs, tiny, tiny_cli
from tests.helpers.event_files import summaries
from tests.helpers.loaded import loaded
from tests.helpers.runs import announced, said


@pytest.fixture(scope="module")
def config():
  """`(**changes) -> config` of two tasks of digits, with a net of two layers."""

  def make(**changes):
    made = importlib.import_module("configs.split_digits").get_config()
    made.update_from_flattened_dict(
      {
        "model.name": "tiny",
        "tasks.count": 2,
        "optim.epochs": 1,
        "optim.batch_size": 64,
        "gates.patience": 0.0,
        "gates.when_full": "reuse",
        "gates.threshold": 0.5,
        "router.steps": 50,
        "checkpoint_every": 2,
      }
    )
    made.lock()
    made.update_from_flattened_dict(changes)
    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(vggs.VGGS, "tiny", (8, vggs.POOL, 8))
    patch.setitem(resnets.RESNETS, "tiny_resnet", tiny_cli.TINY)
    yield make


@pytest.fixture
def resumable(monkeypatch):
  """Runs keep every checkpoint, and draw no reports."""
  monkeypatch.setattr(runner, "Checkpoints", functools.partial(Checkpoints, keep=100))
  runs.without_reports(monkeypatch)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("method", "gate", "method must be one of .*; got 'gate'. Did you mean 'gates'"),
    (
      "model.name",
      "simple_cn",
      "model.name must be one of .*; got 'simple_cn'. Did you mean 'simple_cnn'",
    ),
    ("tasks.classes_per_task", 3, "^tasks: classes_per_task must divide the 10 classes; got 3"),
    ("tasks.count", 6, "^tasks: count must be at most 5, the tasks of 2 classes, or 0; got 6"),
    ("eval_every", -1.0, "eval_every must be None or a finite number >= 0; got -1.0"),
    ("tasks.validation", 1.0, r"^tasks: validation must be a fraction in \(0, 1\); got 1.0"),
    ("optim.batch_size", 12, "optim.batch_size must be a multiple of the 8 devices; got 12"),
    (
      "optim.batch_size",
      1024,
      "optim.batch_size must be at most .*, the training images of the smallest task",
    ),
    (
      "optim.eval_batch_size",
      12,
      "optim.eval_batch_size must be a multiple of the 8 devices; got 12",
    ),
    ("optim.grad_clip_norm", 0.0, "optim.grad_clip_norm must be a positive finite number; got 0.0"),
    ("optim.momentum", 1.5, r"^optim: momentum must be .*; got 1.5"),
    ("optim.warmup", 1.5, r"^optim: warmup must be .*; got 1.5"),
    (
      "gates.threshold",
      1.0,
      r"^method gates: gates: threshold must be a fraction in \[0, 1\); got 1.0",
    ),
    ("gates.sparsity", -1.0, "^method gates: gates: sparsity must be >= 0; got -1.0"),
    ("router.learning_rate", 0.0, "^method gates: router: learning_rate must be > 0; got 0.0"),
    ("router.batch_size", 0, "^method gates: router: batch_size must be >= 1; got 0"),
    ("replay.images", 0, "^method gates: replay: images must be >= 1; got 0"),
    ("gates.when_full", "grwo", "^method gates: gates: when_full must be one of .*; got 'grwo'"),
    (
      "router.rehearsal",
      "episodes",
      "router.rehearsal must be one of .*; got 'episodes'. Did you mean 'episodic'",
    ),
    ("generator.steps", 0, "generator.steps must be >= 1; got 0"),
    ("generator.gates.sparsity", -1.0, "generator.gates.sparsity must be .* >= 0; got -1.0"),
    (
      "generator.gates.threshold",
      1.0,
      r"generator.gates.threshold must be a fraction in \[0, 1\); got 1.0",
    ),
    (
      "generator.batch_size",
      12,
      "generator.batch_size must be a multiple of the 8 devices; got 12",
    ),
    ("replay.images", 3, "replay.images must be at least 4, one per class; got 3"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(config, field, value, message):
  with pytest.raises(ValueError, match=message):
    build.build(config(**{field: value}))


@pytest.mark.parametrize(
  ("changes", "clip"),
  [
    ({"method": "gates"}, 1.0),
    ({"method": "ewc"}, 1.0),
    ({"method": "fine_tuning", "optim.grad_clip_norm": 3.0}, 3.0),
    ({"method": "hat"}, 10_000.0),
    ({"method": "hat", "hat.grad_clip_norm": None}, 1.0),
    ({"method": "lwf", "lwf.grad_clip_norm": 5.0}, 5.0),
    ({"method": "er", "replay.grad_clip_norm": float("inf")}, float("inf")),
    ({"method": "er", "lwf.grad_clip_norm": 5.0}, 1.0),
  ],
)
def test_a_method_has_its_own_limit_on_the_gradient_or_that_of_all(config, changes, clip):
  assert registry.gradient_clip(config(**changes)) == clip


@pytest.mark.parametrize("method", sorted(registry.CLIPPING_SECTIONS))
def test_a_limit_that_is_not_positive_is_refused_before_the_data_are_read(config, method):
  field = f"{registry.CLIPPING_SECTIONS[method]}.grad_clip_norm"
  with pytest.raises(ValueError, match=f"^{field} must be positive, or None; got 0.0"):
    build.build(config(**{"method": method, field: 0.0}))


UNEVEN = {"tasks.count": 0, "tasks.classes": ((7, 0), (3, 1, 2))}


def test_tasks_with_other_numbers_of_classes_have_heads_of_the_largest(config):
  experiment = build.build(config(**UNEVEN))
  assert (experiment.problem.tasks, experiment.problem.classes) == (2, 3)
  assert experiment.problem.own_classes == (2, 3)
  assert experiment.problem.present.tolist() == [[True, True, False], [True, True, True]]
  assert experiment.task_names == ["7, 0", "3, 1, 2"]


def test_an_output_without_a_class_is_never_chosen(config, monkeypatch):
  experiment = build.build(config(**UNEVEN, **{"method": "fine_tuning"}))
  # Scores that rise with their place: the last output of each head would win.
  scores = jnp.arange(6.0)

  def predict(learner, x, task, seen):
    aware = jnp.broadcast_to(scores[:3], (len(x), 3))
    agnostic = jnp.where(jnp.arange(6) < seen * 3, scores, -jnp.inf)
    macs = jnp.ones(len(x))
    return Prediction(aware, jnp.broadcast_to(agnostic, (len(x), 6)), macs, macs)

  method = dataclasses.replace(experiment.method, predict=predict)
  evaluate = training.make_evaluate(dataclasses.replace(experiment, method=method))
  learner = devices.replicate(jnp.zeros(()))
  first = evaluate(learner, 0, 1)["predictions"]
  assert set(first.known) == set(first.chosen) == {1}
  second = evaluate(learner, 1, 2)["predictions"]
  assert set(second.known) == set(second.chosen) == {5}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gates", "icarl", "hat"])
def test_tasks_with_other_numbers_of_classes_are_learnt(config, tmp_path, monkeypatch, method):
  runs.without_reports(monkeypatch)
  run.run(config(**UNEVEN, **{"method": method, "optim.steps_per_task": 6}), tmp_path, "train")
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["task_names"] == ["7, 0", "3, 1, 2"]
  assert np.array(result["task_agnostic"]["confusion"]).shape == (5, 5)
  assert result["task_agnostic"]["classes_without_test"] == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tasks.classes": (0, 1)}, "tasks.classes must be a tuple of tuples of numbers, or None"),
    (
      {"method": "dgm"},
      "tasks.classes must have as many classes in every task with method='dgm'",
    ),
    ({"router.rehearsal": "generative"}, "as many classes in every task with rehearsal='gen"),
    ({"optim.steps_per_task": 0}, "optim.steps_per_task must be >= 1 or None; got 0"),
  ],
)
def test_tasks_that_cannot_be_learnt_are_refused(config, changes, message):
  with pytest.raises(ValueError, match=message):
    build.build(config(**(UNEVEN | changes)))


def test_every_task_has_the_steps_that_are_asked_for_and_says_its_epochs(config):
  experiment = build.build(config(**{"optim.steps_per_task": 10}))
  assert experiment.steps_per_task == 11
  images = len(experiment.tasks[1].train)
  line = f"task 2: 10 steps, {10 * 64 / images:.1f} epochs of {images} images"
  assert experiment.describe_training(1) == line
  by_epochs = build.build(config(**{"optim.epochs": 3}))
  assert by_epochs.steps_per_task == 3 * by_epochs.steps_per_epoch + 1


def test_a_step_of_pretraining_takes_no_more_images_than_a_task_has(config):
  generative = {"router.rehearsal": "generative", "generator.batch_size": 160}
  message = "generator.batch_size times generator.critic_steps must be at most .*; got 320"
  with pytest.raises(ValueError, match=message):
    build.build(config(**generative))
  assert build.build(config(**{"generator.batch_size": 160})).pretrain_steps == 0


@pytest.mark.parametrize(("method", "alike"), [("hat", True), ("fine_tuning", False)])
def test_large_gradients_of_hats_embeddings_leave_the_updates_of_weights_as_they_are(
  config, method, alike
):
  optimiser = build._build_optimiser(config(method=method), steps_per_epoch=10)
  params = {"conv": {"kernel": jnp.ones(2)}, "gate": {"logits": jnp.ones(3)}}

  def update_of_weights(gradient_of_embeddings):
    grads = {
      "conv": {"kernel": jnp.array([0.1, -0.2])},
      "gate": {"logits": jnp.full(3, gradient_of_embeddings)},
    }
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    return np.asarray(updates["conv"]["kernel"])

  small, large = update_of_weights(0.0), update_of_weights(1000.0)
  assert np.all(small != 0)
  assert np.allclose(small, large, rtol=1e-6) == alike


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"router.rehearsal": "gated_generative", "generator.gates.initial_open": 1.0},
      r"method gates: generator.gates: gate initial_open must be in \(0, 1\); got 1.0",
    ),
    ({"method": "dgm", "dgm.steepness": 0.0}, "method dgm: dgm: steepness must be >= 1; got 0.0"),
    (
      {"method": "dgm", "dgm.real_weight": -1.0},
      "method dgm: dgm: real_weight must be .*; got -1.0",
    ),
    (
      {"router.rehearsal": "generative", "generator.critic_steps": 0},
      "method gates: generator: critic_steps must be >= 1; got 0",
    ),
    ({"method": "hat", "hat.steepness": 0.0}, "method hat: hat: steepness must be .*; got 0.0"),
    ({"method": "ewc", "ewc.strength": -1.0}, "method ewc: ewc: strength must be .*; got -1.0"),
    ({"method": "lwf", "lwf.temperature": 0.0}, "method lwf: lwf: temperature must be .*; got 0.0"),
    ({"method": "derpp", "derpp.alpha": -1.0}, "method derpp: derpp: alpha must be .*; got -1.0"),
    ({"method": "er", "replay.images": 0}, "method er: replay: images must be >= 1; got 0"),
  ],
)
def test_settings_of_methods_are_named_with_their_section(config, changes, message):
  with pytest.raises(ValueError, match=message):
    build.build(config(**changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model.norm": False},
      "method gates: model.norm must be True for resnet20, which has BatchNorm; got False",
    ),
    (
      {"router.network": True, "router.rehearsal": "none"},
      "method gates: a network for task inference needs",
    ),
    (
      {"method": "progressive", "model.norm": False},
      "method progressive: model.norm must be True for resnet20",
    ),
  ],
)
def test_what_residual_nets_cannot_be_is_refused(config, changes, message):
  with pytest.raises(ValueError, match=message):
    build.build(config(**{"model.name": "resnet20", **changes}))


def final_learner(config, workdir):
  experiment = build.build(config)
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.restore(experiment.fresh(), devices.replicated_sharding())
  finally:
    checkpoints.close()


def cut_back(workdir, step):
  """Returns a finished run as it was when the checkpoint of this step was its newest."""
  (workdir / "result.json").unlink()
  for folder in (workdir / "checkpoints").iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("network", [False, True])
def test_a_run_goes_on_within_a_task_and_between_tasks_to_the_same_end(
  network, config, tmp_path, capsys, resumable
):
  made = config(**{"router.network": network})
  run.run(made, tmp_path / "whole", "train")
  end, learner = final_learner(made, tmp_path / "whole")
  result = json.loads((tmp_path / "whole" / "result.json").read_text())
  per_task = build.build(made).steps_per_task
  assert end == 2 * per_task
  # Within task 1; between the tasks; all steps of task 2 taken. Or within task 2, with a memory.
  for first in (per_task + 1,) if network else (2, per_task, end - 1):
    workdir = tmp_path / str(first)
    shutil.copytree(tmp_path / "whole", workdir)
    cut_back(workdir, first)
    capsys.readouterr()
    run.run(made, workdir, "train")
    assert f"resuming from the checkpoint of step {first}" in capsys.readouterr().out
    again, resumed = final_learner(made, workdir)
    assert again == end
    assert tiny.bit_equal(resumed, learner)
    repeated = json.loads((workdir / "result.json").read_text())
    assert {**repeated, "seconds_since_last_start": 0} == {**result, "seconds_since_last_start": 0}


def learner_at(step):
  """Returns a learner after so many steps, whose only parameter is that number."""
  return LearnerState(
    step=jnp.int32(step),
    task=jnp.int32(0),
    params={"w": jnp.float32(step)},
    batch_stats={},
    opt_state=(),
    memory=(),
    table=TaskTable(*jnp.zeros((5, 1, 1))),
  )


@pytest.mark.parametrize(("scores", "taken"), [((0.5, 0.75, 0.25), 2), ((0.5, 0.25, 0.5), 3)])
def test_the_state_that_is_best_on_validation_images_ends_a_task(
  scores, taken, tmp_path, monkeypatch
):
  said, lines = [], []
  journal = SimpleNamespace(write=lambda *line: lines.append(line))
  training = SimpleNamespace(folder=tmp_path, journal=journal, say=said.append)
  of_step = dict(enumerate(scores, 1))
  monkeypatch.setattr(run, "validate", lambda _, learner, *__, **___: of_step[int(learner.step)])
  with run._EpochChoice(SimpleNamespace(steps_per_test=1), training, 0, None) as choice:
    for step in (1, 2):
      training.step, training.state = step, learner_at(step)
      choice.test()
    training.step, training.state = 3, learner_at(3)
    choice.take_best()
  # The parameters are those of the best step; all that follows counts from the last one.
  assert (float(training.state.params["w"]), int(training.state.step)) == (taken, 3)
  assert lines == [(step, "validation", {"task_aware": score}) for step, score in of_step.items()]
  assert any("taking the state of step 2" in line for line in said) == (taken == 2)
  assert (tmp_path / "best" / "task1").is_dir()
  choice.forget()
  assert not (tmp_path / "best" / "task1").exists()


@pytest.mark.parametrize("steps", [0, 100])
def test_without_tests_on_the_way_the_last_state_ends_a_task(steps, tmp_path, monkeypatch):
  monkeypatch.setattr(run, "validate", None)
  training = SimpleNamespace(folder=tmp_path, state="last")
  with run._EpochChoice(SimpleNamespace(steps_per_test=steps), training, 0, None) as choice:
    choice.take_best()
  choice.forget()
  assert training.state == "last"
  assert not list(tmp_path.glob("best/*"))


def test_a_best_state_that_a_kill_left_is_removed_on_resume(tmp_path, monkeypatch):
  left = tmp_path / "best" / "task1"
  left.mkdir(parents=True)
  monkeypatch.setattr(run, "make_advance", lambda experiment: None)
  monkeypatch.setattr(run, "_make_end_stage", lambda *_: None)
  # The only task has been learnt.
  training = SimpleNamespace(folder=tmp_path, state=SimpleNamespace(task=1))
  assert run.ContinualLearning(SimpleNamespace(stages=[0]))._learn(training, None)
  assert not left.exists()


@pytest.mark.slow
def test_a_run_that_chooses_epochs_resumes_to_the_same_end(config, tmp_path, resumable):
  made = config(**{"optim.epochs": 3, "eval_every": 1.0})
  run.run(made, tmp_path / "whole", "train")
  end, learner = final_learner(made, tmp_path / "whole")
  records = read_lines(tmp_path / "whole" / "metrics.jsonl")
  validated = [record for record in records if record["split"] == "validation"]
  # Two tasks, each after epochs 1, 2 and 3.
  assert len(validated) == 6
  assert not list((tmp_path / "whole" / "best").iterdir())
  per_epoch = build.build(made).steps_per_epoch
  workdir = tmp_path / "resumed"
  shutil.copytree(tmp_path / "whole", workdir)
  # Within the second epoch, whose first was tested already.
  cut_back(workdir, per_epoch + per_epoch // 2)
  run.run(made, workdir, "train")
  again, resumed = final_learner(made, workdir)
  assert again == end
  assert tiny.bit_equal(resumed, learner)


def strict_json(path):
  """Reads a file as strict JSON, without NaN."""
  return json.loads(
    path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}")
  )


def list_programs(patch):
  """A list that grows by one entry whenever a training step is traced for compilation."""
  programs, make_step = [], training.make_step

  def listed(*args, **settings):
    step = make_step(*args, **settings)

    def traced(*args):
      programs.append(step)
      return step(*args)

    return traced

  patch.setattr(training, "make_step", listed)
  return programs


@pytest.fixture(scope="module")
def programs():
  """The traces in the training of `finished`."""
  return []


@pytest.fixture(scope="module")
def finished(config, programs, tmp_path_factory):
  """`(config, directory, output)` of a finished run; tests that change the directory copy it."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  with pytest.MonkeyPatch.context() as patch:
    traced = list_programs(patch)
    announced(patch)
    printed = said(run, config(), workdir, "train")
  programs += traced
  return config(), workdir, printed


def test_a_result_says_what_its_accuracies_are_worth(finished):
  _, workdir, printed = finished
  result = json.loads((workdir / "result.json").read_text())
  assert sorted(result["classes"]) == [str(digit) for digit in range(10)]
  assert "unreadable_files" not in result
  for setting in ("task_aware", "task_agnostic"):
    of_setting = result[setting]
    low, high = of_setting["average_accuracy_low"], of_setting["average_accuracy_high"]
    assert low < of_setting["average_accuracy"] < high
    confusion = np.array(of_setting["confusion"])
    assert confusion.shape == (4, 4)
    # Each task has as many images as its rows.
    right = [np.trace(confusion[t : t + 2, t : t + 2]) for t in (0, 2)]
    accuracies = np.array(right) / confusion.reshape(2, -1).sum(axis=1)
    np.testing.assert_allclose(accuracies, of_setting["accuracies"][-1], rtol=1e-6)
    assert of_setting["classes_without_training"] == of_setting["classes_without_test"] == []
  # With the task known, no image is given a class of another task.
  known = np.array(result["task_aware"]["confusion"])
  assert not known[:2, 2:].any()
  assert not known[2:, :2].any()
  assert 0.5 <= result["task_aware"]["majority_rate"] < 0.56
  assert 0.25 <= result["task_agnostic"]["majority_rate"] < 0.28
  assert "95 % interval, task-aware" in printed
  assert "Confusions of classes" in (workdir / "report.html").read_text()


def test_the_training_step_is_one_program_for_all_tasks(finished, programs):
  assert len(programs) == 1


def test_a_run_leaves_what_it_measured_and_forgets_nothing(finished):
  made, workdir, printed = finished
  result = strict_json(workdir / "result.json")
  assert result["task_names"] == ["0, 1", "2, 3"]
  aware, agnostic = (
    np.array(result[name]["accuracies"]) for name in ("task_aware", "task_agnostic")
  )
  assert aware[0, 1] is None
  aware, agnostic = (x.astype(float) for x in (aware, agnostic))
  assert aware[1, 0] == aware[0, 0]  # nothing is forgotten
  assert result["task_aware"]["forgetting"] == 0
  assert (agnostic <= aware)[np.tril_indices(2)].all()
  assert 0 < result["task_classifier_accuracy"] <= 1
  assert result["task_aware_macs"] < result["task_agnostic_macs"]
  assert result["dense_macs"] == 9 * 8 * 64 + 9 * 8 * 8 * 16 + 8 * 2
  assert result["dense_macs_reduced"] == 9 * 8 * 64 + 9 * 8 * 16
  assert result["mean_gate_overlap"] == result["gate_overlap"][0][1]
  assert {f.name for f in workdir.glob("*.png")} == {"accuracies.png", "filters.png", "overlap.png"}
  assert re.search(r"average accuracy +\d+\.\d\d", printed)
  for what in (
    "making the network",
    "compiling the training step",
    "drawing pictures",
    "writing the report",
    "ending task 2 of 2 and testing on all tasks so far",
  ):
    assert f"{what} (" in printed
  points = [
    (step, value)
    for step, value in summaries(workdir)
    if value.tag.startswith(("gates/", "pictures/"))
  ]
  per_task = result["step"] // 2
  tags = {
    (step, value.tag): sum(value.histo.bucket)
    for step, value in points
    if value.WhichOneof("value") == "histo"
  }
  images = [len(task.test) for task in build.build(made).tasks]
  assert tags == {
    (per_task * (t + 1), f"gates/task{t + 1:02d}/layer{i}/conv/{name}"): count
    for t in (0, 1)
    for i in (1, 2)
    for name, count in (("probs", 8 * images[t]), ("open_rates", 8))
  }
  assert {(step, value.tag) for step, value in points if value.WhichOneof("value") == "image"} == {
    (result["step"], f"pictures/{name}") for name in ("accuracies", "filters", "overlap")
  }
  tests = [line for line in read_lines(workdir / "metrics.jsonl") if line["split"] == "test"]
  assert [line["task_aware.average_accuracy"] for line in tests][-1] == pytest.approx(
    result["task_aware"]["average_accuracy"]
  )
  assert [line["step"] for line in tests] == [per_task, 2 * per_task]
  free = [[line[f"free_units/layer{i}/conv/conv"] for i in (1, 2)] for line in tests]
  assert free[1] == [count for count, _ in result["free_units"].values()]
  assert (np.subtract(*free) >= 0).all()
  assert f"  free units, layer2/conv/conv: {free[0][1]:.0f} of 8\n" in printed
  report = (workdir / "report.html").read_text()
  assert all(
    f"{title}</h2>" in report for title in ("Accuracies", "Overlap", "One gate across tasks")
  )
  assert report.index("Filters that each task reuses") < report.index("<details>"), "opens the page"
  rows = list(csv.DictReader((workdir / "predictions.csv").read_text().splitlines()))
  assert [row["task"] for row in rows] == ["1"] * images[0] + ["2"] * images[1]
  for setting, column in (("task_aware", "task known"), ("task_agnostic", "task unknown")):
    right = np.array([row[column] == row["class"] for row in rows])
    of_tasks = [right[: images[0]].mean(), right[images[0] :].mean()]
    np.testing.assert_allclose(of_tasks, result[setting]["accuracies"][1], rtol=1e-5)
  assert len(re.findall(r"<figcaption>layer\d/\S+, unit \d+\.</figcaption>", report)) >= 2


@pytest.mark.slow
def test_a_report_is_written_again(finished, tmp_path):
  made, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / "report.html").unlink()
  said(run, made, tmp_path / "run", "report")
  assert pages.lasting(tmp_path / "run") == pages.lasting(workdir)


def test_a_finished_run_is_evaluated_again_and_not_repeated(config, finished):
  made, workdir, printed = finished
  table = said(run, made, workdir, "evaluate").split("average accuracy")[1].rpartition("\n\n")[0]
  assert table in printed
  assert "holds a finished run of this config; nothing was trained" in said(
    run, made, workdir, "train"
  )
  with pytest.raises(rundir.RunDirError, match="holds a run of another config"):
    run.run(config(seed=1), workdir, "train")


def test_a_run_is_loaded_in_one_call(finished):
  made, workdir, _ = finished
  method, learner, _ = loaded(workdir)
  built, score = build.build(made), strict_json(workdir / "result.json")["task_aware"]["accuracies"]
  predict = jax.jit(functools.partial(method.predict, seen=2))
  for task in range(2):
    test = built.tasks[task].test
    pixels, labels = test.read(np.arange(len(test)))
    found = predict(learner, built.problem.normalise(pixels), np.int32(task))
    right = np.argmax(found.aware, axis=-1) == labels - task * built.problem.classes
    assert np.mean(right) == pytest.approx(score[1][task], abs=2 / len(test))


@pytest.fixture(scope="module")
def compiled(finished, tmp_path_factory):
  return runs.compiled(run, finished, tmp_path_factory.mktemp("compiled"))


def test_each_tasks_net_is_compiled(compiled):
  found, printed = compiled
  assert "drawing the times (" in printed
  assert list(found["timings"]) == [
    "task 1, 0, 1: 3 images at a time",
    "task 2, 2, 3: 3 images at a time",
  ]
  for rows in found["timings"].values():
    assert {"masked", "ungated"} <= {row["strategy"] for row in rows if row["part"] is None}


@pytest.mark.slow
def test_a_run_cut_back_to_an_earlier_checkpoint_ends_with_the_same_learner(
  finished, tmp_path, monkeypatch
):
  made, workdir, _ = finished
  runs.without_reports(monkeypatch)
  copy = shutil.copytree(workdir, tmp_path / "run")
  steps = sorted(int(folder.name) for folder in (copy / "checkpoints").iterdir())
  cut_back(copy, steps[-2])
  assert f"resuming from the checkpoint of step {steps[-2]}" in said(run, made, copy, "train")
  (step, resumed), (end, learner) = final_learner(made, copy), final_learner(made, workdir)
  assert step == end == steps[-1]
  assert tiny.bit_equal(resumed, learner)


@pytest.mark.parametrize("method", ["er", "hat", "multitask_gates", "multitask_norms"])
def test_what_a_method_holds_is_counted(method, config):
  experiment = build.build(config(method=method))
  learner = jax.jit(experiment.fresh)()
  held = experiment.method.footprint(learner)
  assert held.params > 0
  assert (held.memory_mb > 0) == (method in ("er", "hat"))
  if method == "multitask_gates":
    assert jax.tree.leaves(experiment.method.task_net(learner, 0).variables)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  "changes",
  [
    *({"method": method} for method in registry.METHODS),
    {"router.network": True, "model.name": "resnet8"},
    {"router.rehearsal": "generative"},
    {"router.rehearsal": "gated_generative"},
    {"method": "progressive", "model.name": "resnet8"},
  ],
)
def test_every_method_is_built_and_predicts(changes, config):
  experiment = build.build(config(**changes, **{"generator.width": 2, "generator.batch_size": 16}))
  learner = jax.eval_shape(experiment.fresh)
  assert jax.tree.leaves(learner.params)
  # Otherwise the second task's types would differ.
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(learner))
  x = jax.ShapeDtypeStruct((4, *experiment.problem.shape), jnp.float32)
  found = jax.eval_shape(lambda learner, x: experiment.method.predict(learner, x, 1, 2), learner, x)
  assert found.agnostic.shape[0] == found.macs.shape[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model.name": "tiny_resnet"}])
def test_a_run_grows_where_the_first_task_takes_all_there_is(
  changes, config, tmp_path, monkeypatch
):
  if changes:  # the page of the first case is enough
    runs.without_reports(monkeypatch)
  made = config(
    **{
      "gates.when_full": "grow",
      "gates.growth": 0.5,
      "gates.threshold": 0.0,
      "gates.sparsity": 0.0,
      "model.gate.initial_open": 0.9,
      **changes,
    }
  )
  run.run(made, tmp_path, "train")
  tests = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["split"] == "test"]
  free = [[line[name] for name in line if name.startswith("free_units/")] for line in tests]
  assert max(free[0]) > 0  # some layer was full and has grown
  aware = np.array(strict_json(tmp_path / "result.json")["task_aware"]["accuracies"], float)
  assert aware[1, 0] == aware[0, 0]


@pytest.mark.slow
def test_a_full_layer_ends_a_run_that_keeps_and_shows_what_it_has_learnt(
  config, tmp_path, monkeypatch
):
  made = config(
    **{
      "gates.when_full": "error",
      "gates.threshold": 0.0,
      "gates.sparsity": 0.0,
      "model.gate.initial_open": 0.9,
    }
  )
  for _ in range(2):  # the same command prints the same
    with pytest.raises(
      ValueError, match="after task 1 of 2 no unit is free for the next task in layer1/conv/conv"
    ):
      run.run(made, tmp_path, "train")
    page = (tmp_path / "report.html").read_text()
    assert "This run failed and is not finished: after task 1 of 2 no unit is free" in page
    assert "average accuracy" in page
    (tmp_path / "report.html").unlink()
  tests = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["split"] == "test"]
  assert [line["step"] for line in tests] == [build.build(made).steps_per_task]
  assert tests[0]["task_aware.average_accuracy"] > 0
  assert tests[0]["free_units/layer1/conv/conv"] == 0
  drawn = {}
  for name in ("draw_filters", "draw_overlap"):
    draw = getattr(tasks, name)
    monkeypatch.setattr(
      tasks,
      name,
      lambda values, task_names, name=name, draw=draw: (
        drawn.update({name: (values, task_names)}) or draw(values, task_names=task_names)
      ),
    )
  run.run(made, tmp_path, "report")
  use, names = drawn["draw_filters"]
  assert names == ["0, 1"]
  assert {len(layer.free) for layer in use.values()} == {1}
  assert drawn["draw_overlap"][0].shape == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["si", "hat", "derpp"])
def test_what_other_methods_remember_is_part_of_the_checkpoint(method, config, tmp_path, resumable):
  made = config(method=method, checkpoint_every=1)
  run.run(made, tmp_path, "train")
  end, learner = final_learner(made, tmp_path)
  cut_back(tmp_path, build.build(made).steps_per_task + 2)  # within the second task
  run.run(made, tmp_path, "train")
  again, resumed = final_learner(made, tmp_path)
  assert again == end
  assert tiny.bit_equal(resumed, learner)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in registry.METHODS if m != "gates"])
def test_every_method_learns_two_tasks(method, config, tmp_path, monkeypatch):
  """Scores are finite, and better than chance with the task known.

  Each method's effect on forgetting is tested with the method.
  """
  # HAT begins with random masks, half of them closed.
  epochs = 40 if method == "hat" else 8
  made = config(
    method=method,
    **{
      "optim.epochs": epochs,
      "optim.learning_rate": 0.05,
      "checkpoint_every": 100,
      "hat.sparsity": 0.0,
      "dgm.real_weight": 0.5,
      "generator.steps": 50,
      "generator.batch_size": 16,
      "generator.width": 4,
      "generator.images": 20,
      "gates.sparsity": 0.0,
    },
  )
  programs = list_programs(monkeypatch)
  run.run(made, tmp_path, "train")
  assert len(programs) == 1
  result = json.loads((tmp_path / "result.json").read_text())
  accuracies = np.array(result["task_aware"]["accuracies"], float)
  together = build.build(made).method.simultaneous
  assert together == np.isnan(accuracies[0]).all()
  first, second = accuracies[1] if together else np.diag(accuracies)
  assert first > 0.8
  assert second > 0.6
  keep_nothing = ("fine_tuning", "progressive", *(m for m in registry.METHODS if "multitask" in m))
  assert (result["memory_mb"] > 0) == (method not in keep_nothing)
  refused = "--mode=compile cannot time this run: method must have conditional gates"
  assert (refused in (tmp_path / "report.html").read_text()) == (method != "multitask_gates")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rehearsal"), [("gates", "gated_generative"), ("dgm", "none")])
def test_a_run_with_generators_goes_on_within_their_training_to_the_same_end(
  config, tmp_path, capsys, resumable, method, rehearsal
):
  made = config(
    **{
      "method": method,
      "router.rehearsal": rehearsal,
      "generator.steps": 4,
      "generator.batch_size": 16,
      "generator.width": 2,
      "generator.images": 10,
    }
  )
  run.run(made, tmp_path, "train")
  end, learner = final_learner(made, tmp_path)
  per_task = build.build(made).steps_per_task
  assert per_task == 4 + build.build(config()).steps_per_task
  first = per_task + 3  # within the training of the second generator
  cut_back(tmp_path, first)
  capsys.readouterr()
  run.run(made, tmp_path, "train")
  assert f"resuming from the checkpoint of step {first}" in capsys.readouterr().out
  again, resumed = final_learner(made, tmp_path)
  assert again == end
  assert tiny.bit_equal(resumed, learner)


def test_batches_of_tasks_learnt_together_hold_as_much_of_each(config):
  experiment = build.build(
    config(method="multitask_trunk", **{"tasks.count": 3, "optim.batch_size": 16})
  )
  assert list(experiment.stages) == [2]
  assert [len(images) for images in training.training_sets(experiment, 2).values()] == [
    len(task.train) for task in experiment.tasks
  ]

  def loss(params, learner, batch):
    label, place = batch.labels.astype(float), jnp.arange(len(batch.labels))
    return 0.0, (
      {
        "misplaced": jnp.mean(batch.labels // 2 != place % 3),
        "size": 1.0 * len(label),
        "mean": jnp.mean(label),
      },
      learner.batch_stats,
    )

  experiment = dataclasses.replace(
    experiment, method=dataclasses.replace(experiment.method, loss=loss)
  )
  advance, learner, seen = (
    training.make_advance(experiment)(2),
    devices.replicate(experiment.fresh()),
    [],
  )
  for step in range(4):
    learner, metrics = advance(learner, step)
    assert float(metrics["misplaced"][0]) == 0
    assert float(metrics["size"][0]) == 3 * 16 / 8
    seen.append(float(metrics["mean"][0]))
  assert len(set(seen)) > 1  # the classes of a task are random


@pytest.mark.slow
def test_tasks_learnt_together_fill_the_last_row_and_resume_to_the_same_end(
  config, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(runner, "Checkpoints", functools.partial(Checkpoints, keep=100))
  made = config(method="multitask_gates")
  run.run(made, tmp_path, "train")
  assert "forgetting n/a: all tasks are learnt together" in capsys.readouterr().out
  result = strict_json(tmp_path / "result.json")
  for setting in ("task_aware", "task_agnostic"):
    first, last = result[setting]["accuracies"]
    assert first == [None, None]
    assert result[setting]["average_accuracy"] == pytest.approx(np.mean(last))
    assert result[setting]["forgetting"] is None
  assert np.array(result["gate_overlap"]).shape == (2, 2)
  assert {f.name for f in tmp_path.glob("*.png")} == {
    "accuracies.png",
    "filters.png",
    "overlap.png",
  }
  tags = {value.tag for _, value in summaries(tmp_path) if value.tag.startswith("gates/task")}
  assert {tag.split("/")[1] for tag in tags} == {"task01", "task02"}
  end, learner = final_learner(made, tmp_path)
  assert end == build.build(made).steps_per_task
  assert int(learner.task) == 2
  runs.without_reports(monkeypatch)  # the first run has drawn them
  for first in (end - 1, 2):  # all steps taken, and some
    cut_back(tmp_path, first)
    if first == 2:
      with pytest.raises(rundir.RunDirError, match="no task has been learnt"):
        run.run(made, tmp_path, "evaluate")
    run.run(made, tmp_path, "train")
    assert f"resuming from the checkpoint of step {first}" in capsys.readouterr().out
    again, resumed = final_learner(made, tmp_path)
    assert again == end
    assert tiny.bit_equal(resumed, learner)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes", [{}, {"method": "multitask_gates"}, {"model.name": "tiny_resnet"}]
)
def test_the_net_of_each_task_is_compiled(changes, config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(timings, "_REPEATS", 1)
  # One call of each program is no measurement.
  monkeypatch.setattr(timings, "MAX_EFFICIENCY", float("inf"))
  monkeypatch.setattr(timings, "_BATCHES", (1, 3))
  made = config(
    **{"model.gate.initial_open": 0.5, "gates.threshold": 0.0, "gates.sparsity": 0.0, **changes}
  )
  with monkeypatch.context() as patch:
    runs.without_reports(patch)
    run.run(made, tmp_path / "run", "train")
  run.run(made, tmp_path / "run", "compile")
  said = capsys.readouterr().out
  found = json.loads((tmp_path / "run" / "compile.json").read_text())
  assert list(found["timings"]) == [
    f"task {t}, {names}: {size} at a time"
    for t, names in ((1, "0, 1"), (2, "2, 3"))
    for size in ("1 image", "3 images")
  ]
  for title, rows in found["timings"].items():
    assert f"\n{title}\n" in said
    assert {"masked", "switch"} <= {row["strategy"] for row in rows if row["part"] == 1}
    assert {"masked", "ungated"} <= {row["strategy"] for row in rows if row["part"] is None}
  assert (tmp_path / "run" / "compile.png").stat().st_size > 10_000
  experiment = build.build(made)
  _, learner = final_learner(made, tmp_path / "run")
  for task in range(2):
    net = compile.folded_net(experiment, learner, task)
    x = experiment.problem.normalise(experiment.tasks[task].test.read(slice(32))[0])
    logits, gates = folded.run_net(net, x)
    aware = experiment.method.predict(learner, x, task, 2).aware
    assert np.ptp(aware) > 0.1
    np.testing.assert_allclose(logits, aware, rtol=1e-4, atol=1e-5)
    assert 0 < np.mean(np.concatenate(gates, axis=1) > 0) < 1


def test_what_has_no_gates_is_not_compiled(config, tmp_path):
  experiment = build.build(config(method="ewc"))
  with pytest.raises(ValueError, match="method must have conditional gates per task .*; got 'ewc'"):
    compile.compile_run(experiment, rundir.RunDir(tmp_path), 1, experiment.fresh())


def test_no_task_learnt_is_said(config, tmp_path):
  made = config()
  with rundir.open_run(tmp_path, made):
    pass
  with pytest.raises(rundir.RunDirError, match="no task has been learnt"):
    run.run(made, tmp_path, "evaluate")


def test_every_task_begins_with_a_fresh_optimiser():
  optimiser, params = optax.sgd(0.1, momentum=0.9), {"w": jnp.ones(2)}
  images = Images(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(2, np.int32), ())
  kept = SimpleNamespace(simultaneous=False, end_task=lambda learner, data, key: learner)
  experiment = SimpleNamespace(
    method=kept,
    optimiser=optimiser,
    key=jax.random.key,
    tasks=[SimpleNamespace(train=images, validation=images)],
  )
  moving = jax.tree.map(lambda x: x + 5, optimiser.init(params))
  learner = LearnerState(
    jnp.int32(7), jnp.int32(0), params, {}, moving, {}, TaskTable(*[jnp.zeros((1, 1))] * 5)
  )
  ended = training.finish_task(
    experiment, learner, 0, evaluate=lambda *_: dict.fromkeys(TaskTable._fields, 0.5)
  )
  assert tiny.bit_equal(ended.opt_state, optimiser.init(params))
  assert (int(ended.step), int(ended.task)) == (8, 1)


def test_steps_of_generators_that_are_left_are_those_of_this_task_and_the_next():
  experiment = SimpleNamespace(steps_per_task=20, pretrain_steps=10, stages=range(2))
  left = {step: run._pretrain_steps_left(experiment, step) for step in (0, 4, 10, 19, 20, 25, 39)}
  assert left == {0: 20, 4: 16, 10: 10, 19: 10, 20: 10, 25: 5, 39: 0}


def test_the_closing_lines_name_the_accuracies_that_a_result_has():
  score = {"average_accuracy": 0.75, "forgetting": 0.125}
  result = {"task_names": ["a", "b"], "task_aware": score, "task_aware_macs": 50, "dense_macs": 200}
  numbers = run.ContinualLearning(None).main_numbers
  macs = ("MACs per image, task known", "50, 25.0 % of the net without gates")
  known = ("accuracy, task known", "75.00 %, mean of 2 tasks; forgetting: 12.50 points")
  assert numbers(result) == [known, macs]
  alone = score | {"forgetting": None}
  unknown = ("accuracy, task unknown", "75.00 %, mean of 2 tasks")
  assert numbers(result | {"task_agnostic": alone}) == [known, unknown, macs]


def test_a_training_that_is_asked_to_stop_ends_no_task_and_has_no_result(tmp_path, monkeypatch):
  called = []
  experiment = SimpleNamespace(
    config=SimpleNamespace(method="gates", data=SimpleNamespace(name="digits")),
    tasks=[SimpleNamespace(train="images")],
    unreadable={},
    stages=[0],
    total_steps=4,
    steps_per_task=4,
    pretrain_steps=0,
    steps_per_test=0,
    first_step=lambda task: 0,
    phases=lambda task: [SimpleNamespace(total_steps=3)],
    describe_training=lambda task: "task 1",
    method=SimpleNamespace(check_capacity=lambda learner: None),
    fresh=lambda: SimpleNamespace(task=jnp.int32(0)),
  )
  monkeypatch.setattr(run.outlines, "write_outlines", lambda *_: None)
  monkeypatch.setattr(run, "make_advance", lambda experiment: lambda task: None)
  monkeypatch.setattr(run, "make_evaluate", lambda experiment: None)
  monkeypatch.setattr(run, "_make_end_stage", lambda *_: called.append)

  class Stopped:
    """Stands in for a training that is asked to stop at once."""

    def __init__(self, folder, fresh, total_steps):
      self.folder, self.state, self.step = folder, fresh, 0

    __enter__ = begin = lambda self, *_, **__: self
    __exit__ = lambda self, *_: None

    def say(self, text):
      called.append(text)

    def run(self, *_, **__):
      return False

  monkeypatch.setattr(runner, "Training", Stopped)
  assert run.ContinualLearning(experiment).train(rundir.RunDir(tmp_path)) is None
  # The line of the training is there, and no task has ended.
  assert called == ["task 1"]


def test_a_task_that_is_half_learnt_is_not_predicted(monkeypatch, capsys):
  experiment = SimpleNamespace(steps_per_task=10)
  programme, learner = run.ContinualLearning(experiment), SimpleNamespace(task=jnp.int32(2))
  monkeypatch.setattr(run, "make_evaluate", lambda experiment: "evaluate")
  monkeypatch.setattr(run, "test_tasks", lambda learner, evaluate, learnt: learner)
  monkeypatch.setattr(run, "predict_tasks", lambda learner, evaluate, learnt: [evaluate] * learnt)
  monkeypatch.setattr(run.metrics, "collect_result", lambda *given: given[2])
  assert programme._predict(23, learner, "evaluate") is None
  assert programme._predict(20, learner, "evaluate") == ["evaluate"] * 2
  capsys.readouterr()
  assert programme.test(23, learner) is None
  said_so = "a task is being learnt; the results are those of the earlier tasks"
  assert said_so in capsys.readouterr().out
  assert programme.test(20, learner) == ["evaluate"] * 2
  assert said_so not in capsys.readouterr().out


def test_a_unit_that_no_task_opens_has_no_picture(monkeypatch):
  logits = np.array([[[5.0, -5.0, -5.0]] * 4, [[5.0, -5.0, 1.0]] * 4])
  looks = [report._Look(np.full((4, 2, 2, 1), task, np.uint8), [logits[task]]) for task in (0, 1)]
  experiment = SimpleNamespace(
    task_names=["first", "second"],
    method=SimpleNamespace(footprint=lambda learner: SimpleNamespace(relevant={"conv1": None})),
  )
  monkeypatch.setattr(report, "_make_look", lambda experiment: lambda learner, task: looks[task])
  drawn = []
  monkeypatch.setattr(
    report.image_pictures, "draw_image_rows", lambda rows, labels: drawn.append(labels)
  )
  monkeypatch.setattr(report.page, "embed_figure", lambda figure, caption, photo: caption)
  section = report._one_gate_across_tasks(experiment, SimpleNamespace(task=2))
  assert section.parts == ["conv1, unit 0.", "conv1, unit 2."]
  opened = [label.split("\n") for labels in drawn for label in labels]
  assert opened == [
    ["first", "open: 100 %"],
    ["second", "open: 100 %"],
    ["second", "open: 100 %"],
  ]
