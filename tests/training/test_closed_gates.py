import importlib
import re

import pytest

from gating_jax.continual import run as continual_run
from gating_jax.images import classification, segmentation
from gating_jax.models import resnets, vggs, video_backbones
from gating_jax.training.closed_gates import CLOSED, SEGMENTS_CLOSED, ClosingWatch, Limit
from gating_jax.video import run as video_run
from tests.helpers import tiny_cli
from tests.helpers.runs import said, without_reports

CHANNELS = f"channels_{CLOSED}"
LIMIT = Limit(CLOSED, 0.5, "lower loss.sparsity.coefficient")


CHANNEL_LIMIT = Limit("channels", 0.9, "raise that", "channels")


def lines(shares, every=50):
  """Steps and means, as of a log."""
  means = [share if isinstance(share, dict) else {CLOSED: share} for share in shares]
  return [(every * i, m) for i, m in enumerate(means, start=1)]


def warnings_of(shares, limits=(LIMIT,), every=50):
  watch = ClosingWatch(limits)
  return [watch(*line) for line in lines(shares, every)]


def test_gates_that_stay_closed_are_said_once_with_what_to_change():
  assert warnings_of([0.2, 0.8, 0.9, 0.2, 0.9, 0.9]) == [
    [],
    [
      "warning: 80% of the gates are closed for all examples, and closed gates hardly learn. If "
      "this is unintended: lower loss.sparsity.coefficient. See docs/gate_your_model.md."
    ],
    [],
    [],
    [],
    [],
  ]


def test_a_watch_that_is_shown_earlier_lines_again_goes_on_as_if_never_stopped():
  shares = [
    {CLOSED: a, "channels": b}
    for a, b in [(0.2, 0.2), (0.8, 0.2), (0.8, 0.95), (0.8, 0.95), (0.2, 0.95)] * 2
  ]
  log = lines(shares, every=10)
  expected = warnings_of(shares, (LIMIT, CHANNEL_LIMIT), every=10)
  assert [i for i, warnings in enumerate(expected) if warnings] == [2, 3]
  for stop in range(len(log)):
    watch = ClosingWatch((LIMIT, CHANNEL_LIMIT))
    for line in log[:stop]:
      watch(*line)
    assert not any(watch(*line) for line in log[:stop])  # as before each phase of a task
    assert [watch(*line) for line in log[stop:]] == expected[stop:]


@pytest.mark.parametrize("shares", [[0.0] * 5, [0.5] * 5, [{"loss": 1.0}] * 3])
def test_open_gates_are_no_fault(shares):
  assert not any(warnings_of(shares))


def test_gates_that_close_for_a_moment_are_no_fault():
  assert not any(warnings_of([0.9, 0.9, 0.2] * 20, every=5))
  # After twenty steps.
  assert [i for i, text in enumerate(warnings_of([0.2] + [0.9] * 9, every=5)) if text] == [4]


def test_of_several_kinds_of_gates_each_has_a_limit():
  limits = LIMIT, CHANNEL_LIMIT
  assert not any(warnings_of([{CLOSED: 0.1, "channels": 0.8}] * 3, limits))
  ((warning,),) = warnings_of([{CLOSED: 0.1, "channels": 0.95}], limits)
  assert "95% of the channels" in warning
  (both,) = warnings_of([{CLOSED: 0.8, "channels": 0.95}], limits)
  assert [re.search(r"of the (\w+)", warning)[1] for warning in both] == ["gates", "channels"]
  assert not any(
    warnings_of(
      [{CLOSED: 0.9, "channels": 0.1}, {CLOSED: 0.1, "channels": 0.95}] * 9, limits, every=10
    )
  )


def config_of(name, variant="", **changes):
  config = importlib.import_module(f"configs.{name}").get_config(variant)
  config.update_from_flattened_dict(changes)
  return config


def warned(watch, metric, share):
  """Returns the warning, or None, if this fraction of gates is closed from some step on."""
  watch(50, {metric: 0.0})
  return next(iter(watch(100, {metric: share})), None)


def check_named(text, config):
  """Every setting that a warning names is in the config."""
  names = re.findall(r"\b(?:loss|optim|gates)\.[a-z_.]*[a-z]", text)
  assert names, text
  for name in names:
    section = config
    for part in name.split("."):
      assert part in section, name
      section = section[part]


@pytest.mark.parametrize("name", ["digits_resnet20", "segmentation_digits"])
@pytest.mark.parametrize(
  "variant",
  [
    "",
    "gates=layer",
    "l0=3.0",
    "budget=0.5",
    "regulariser=sparsity",
    "regulariser=entropy",
    "regulariser=none",
  ],
)
def test_most_gates_of_images_and_scenes_closed_is_said(name, variant):
  config = config_of(name, variant)
  text = warned(classification.watch_images(config), CLOSED, 0.6)
  check_named(text, config)
  if variant == "l0=3.0":
    assert "lower loss.sparsity.coefficient (now 3)" in text
  assert warned(classification.watch_images(config), CLOSED, 0.4) is None


@pytest.mark.parametrize(
  ("variant", "share"),
  [
    ("gates=none", 1.0),
    ("gates=random", 1.0),
    ("gates=exits", 1.0),
    ("gates=static", 0.95),
    ("budget=0.2", 0.75),
  ],
)
def test_pruning_that_is_wanted_is_no_fault(variant, share):
  assert (
    warned(classification.watch_images(config_of("digits_resnet20", variant)), CLOSED, share)
    is None
  )


@pytest.mark.parametrize(("variant", "share"), [("gates=static", 1.0), ("budget=0.2", 0.9)])
def test_pruning_beyond_what_is_wanted_is_said(variant, share):
  config = config_of("digits_resnet20", variant)
  check_named(warned(classification.watch_images(config), CLOSED, share), config)


def test_experts_that_no_image_reaches_are_said():
  config = config_of("digits_resnet20", "gates=sparse_experts")
  text = warned(classification.watch_images(config), CLOSED, 0.75)
  assert "75% of the experts" in text
  check_named(text, config)


def test_filters_left_for_later_tasks_are_no_fault_but_none_at_all_is():
  config = config_of("split_digits")
  assert warned(continual_run.watch_tasks(), CLOSED, 0.98) is None
  check_named(warned(continual_run.watch_tasks(), CLOSED, 1.0), config)


def test_segments_and_channels_of_videos_that_close_are_said():
  config = config_of("composed_timegate", **{"model.heavy.gating": "channel"})
  for metric in (SEGMENTS_CLOSED, CHANNELS):
    check_named(warned(video_run.watch_videos(config), metric, 0.9), config)
    assert warned(video_run.watch_videos(config), metric, 0.1) is None


def test_segments_chosen_by_a_rule_and_ungated_nets_are_not_watched():
  for metric in (SEGMENTS_CLOSED, CHANNELS):
    assert (
      warned(
        video_run.watch_videos(config_of("composed_timegate", "selection=uniform")), metric, 1.0
      )
      is None
    )


@pytest.fixture
def small(monkeypatch):
  """Returns `(name, **changes) -> (programme, config)`.

  Nets have one block or two layers, and a line is printed every ten steps.
  """
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.setitem(vggs.VGGS, "tiny_chain", (8, vggs.POOL, 8))
  monkeypatch.setitem(video_backbones.LIGHT_NETS, "tiny", tiny_cli.TINY_LIGHT)
  monkeypatch.setitem(video_backbones.HEAVY_NETS, "tiny", tiny_cli.TINY_HEAVY)
  sizes = {
    "digits_resnet20": {"model.name": "tiny", "optim.epochs": 8},
    "segmentation_digits": {
      "model.name": "tiny",
      "data.size": (16, 16),
      "data.train_scenes": 256,
      "data.test_scenes": 8,
      "optim.epochs": 8,
    },
    "split_digits": {
      "model.name": "tiny_chain",
      "tasks.count": 2,
      "optim.epochs": 20,
      "optim.batch_size": 64,
      "gates.patience": 0.0,
      "gates.when_full": "reuse",
      "router.steps": 5,
    },
    "composed_timegate": {
      "model.light.name": "tiny",
      "model.heavy.name": "tiny",
      "model.gate.concepts": 4,
      "model.gate.hidden": 8,
      "data.train_videos": 32,
      "data.test_videos": 8,
      "pretrain.epochs": 1,
      "pretrain.batch_size": 16,
      "optim.epochs": 60,
      "optim.batch_size": 16,
    },
  }
  programmes = {
    "digits_resnet20": classification,
    "segmentation_digits": segmentation,
    "split_digits": continual_run,
    "composed_timegate": video_run,
  }

  def make(name, **changes):
    return programmes[name], config_of(name, log_every=10, **sizes[name], **changes)

  return make


AT_ONCE = {
  "loss.sparsity.coefficient": 300.0,
  "loss.sparsity.ramp_start": 0.0,
  "loss.sparsity.ramp_end": 0.0,
  "loss.batch_shaping.coefficient": 0.0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "price", "wanted"),
  [
    ("digits_resnet20", AT_ONCE, {"model.gate.context": "none", "loss.sparsity.coefficient": 1.0}),
    ("segmentation_digits", AT_ONCE, {}),
    ("split_digits", {"gates.sparsity": 1000.0}, {"gates.sparsity": 1.0}),
    ("composed_timegate", {**AT_ONCE, "loss.sparsity.kind": "mean"}, {}),
  ],
)
def test_a_training_says_once_that_its_gates_close(
  small, tmp_path, monkeypatch, name, price, wanted
):
  lines = said(*small(name, **price), tmp_path / "closing", "train").splitlines()
  warnings = [i for i, line in enumerate(lines) if "warning: " in line]
  assert len(warnings) == 1
  assert "closed for all examples" in lines[warnings[0]]
  # while it continues
  assert any(re.search(r"step \d+/", line) for line in lines[warnings[0] + 1 :])
  without_reports(monkeypatch)  # the page of closed gates is enough
  assert "warning: " not in said(*small(name, **wanted), tmp_path / "open", "train")
