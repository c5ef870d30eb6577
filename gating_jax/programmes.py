"""The programmes: one row for each, by the name in `config.experiment`.

The command, the config files, `load_run`, smoke tests and pages find here what they need to know of
a programme. A row is plain data and names modules without importing them: this file lies below all
of them, and `--help` reads it. `docs/extend/programme.md` says how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class Score(NamedTuple):
  """A measure that comparisons of runs show.

  Attributes:
    label: its name in texts.
    key: of its value in a result, a fraction.
    macs: key of the MACs that belong to it.
  """

  label: str
  key: str
  macs: str


class Example(NamedTuple):
  """An example of a programme in `--help`.

  Attributes:
    config: the name of a config, whose data need no download.
    workdir: the name of a run directory.
    about: what is trained, in a few words.
  """

  config: str
  workdir: str
  about: str


@dataclasses.dataclass(frozen=True)
class ProgrammeRow:
  """A programme, as far as the rest of the package knows it.

  Attributes:
    module: its module, with `run(config, workdir, mode)` and
      `build(config, outlines)`.
    programme: the name of the class there, a `runner.Programme`, made of what `build` made.
    base: the module in `configs`, and its function, that list every field with its default.
    example: for `--help`.
    scores: of a finished run, the most important first.
    noun: word for an example of the data, such as `image`.
    small: fields that a run's time grows with, and their largest value in a smoke test; next to
      those that `training.smoke` lowers for all programmes.
    field: the config's field that says what is gated.
    baselines: its values for ungated networks that pages compare with, the best baseline first.
    ungated: fields, and their values in a network that computes the same for every example. None
      stands for a field that an older config lacks.
    ignored: fields, or sections that end with a dot, in which a baseline may differ from a run.
    how: to train a baseline, as a text for readers.
    tested: fields that define what a run is tested on.
  """

  module: str
  programme: str
  base: tuple[str, str]
  example: Example
  scores: tuple[Score, ...]
  noun: str
  small: Mapping[str, int]
  field: str
  baselines: tuple[str, ...]
  ungated: Mapping[str, tuple[str | None, ...]]
  ignored: tuple[str, ...]
  how: str
  tested: tuple[str, ...]

  def is_ungated(self, config: Mapping[str, Any]) -> bool:
    """Checks that the network of a flat config computes the same for every example."""
    return all(config.get(field) in values for field, values in self.ungated.items())


# Values of `model.gating` of networks that close nothing: scales, biases and mixed kernels only
# change what is computed.
UNGATED_NETS = ("none", "scale", "bias", "kernels")
_ACCURACY = Score("accuracy", "accuracy", "macs")
# Continual methods that compute the same for every image of a task.
_UNGATED_METHODS = (
  "progressive",
  "fine_tuning",
  "joint",
  "ewc",
  "online_ewc",
  "si",
  "lwf",
  "er",
  "derpp",
  "agem",
  "icarl",
  "multitask_norms",
  "multitask_trunk",
  "dgm",
)
# Selections of segments that do not depend on the video.
_BLIND = ("all", "uniform", "random", "light")
# Fields that define the images that a run is tested on.
_IMAGE_SET = ("data.name", "data.test_split", "data.image_feature", "data.label_feature")

_CLASSIFICATION = ProgrammeRow(
  module="gating_jax.images.classification",
  programme="Classification",
  base=("common", "image_config"),
  example=Example("digits_resnet20", "digits", "images"),
  scores=(_ACCURACY,),
  noun="image",
  small={},
  field="model.gating",
  baselines=("none",),
  ungated={"model.gating": UNGATED_NETS},
  ignored=(
    "model.gate.",
    "model.noise.",
    "model.dense_first.",
    "model.equal_inner_width",
    "model.sources",
    "model.kernels.",
    "model.exits.",
    "model.experts.",
    "model.backward_share",
    "model.init_from",
    "model.importance.",
    "loss.",
    "optim.gate_weight_decay",
    "optim.gate_lr_multiplier",
    "optim.freeze_epochs",
    "optim.frozen_layers",
    "data.workers",
    "data.loader",
    # Tests on the way choose nothing; those of tasks and videos choose the state that is kept.
    "eval_every",
  ),
  how="the variant gates=none of its config",
  # Where the set of an image is known, its class is easier to recognise.
  tested=(*_IMAGE_SET, "loss.scope"),
)
# Scenes have the nets and gates of images.
_SEGMENTATION = dataclasses.replace(
  _CLASSIFICATION,
  module="gating_jax.images.segmentation",
  programme="Segmentation",
  base=("segmentation_common", "segmentation_config"),
  example=Example("segmentation_digits", "scenes", "a class for every pixel"),
  # The accuracy is that of pixels.
  scores=(Score("mean IoU", "mean_iou", "macs"), _ACCURACY),
  noun="scene",
  small={"data.train_scenes": 64, "data.test_scenes": 16},
  tested=("data.name", "data.test_split", "data.size", "data.digits", "data.test_scenes"),
)
_CONTINUAL = ProgrammeRow(
  module="gating_jax.continual.run",
  programme="ContinualLearning",
  base=("continual_common", "continual_config"),
  example=Example("split_digits", "split_digits", "tasks, one after the other"),
  scores=(
    Score("accuracy, task known", "task_aware.average_accuracy", "task_aware_macs"),
    Score("accuracy, task unknown", "task_agnostic.average_accuracy", "task_agnostic_macs"),
  ),
  noun="image",
  small={
    "tasks.count": 2,
    "router.steps": 10,
    "generator.steps": 4,
    "generator.images": 64,
    "ewc.examples": 64,
    "online_ewc.examples": 64,
    "replay.images": 64,
    "optim.eval_batch_size": 64,
  },
  field="method",
  baselines=("joint", "multitask_trunk", "fine_tuning"),
  ungated={"method": _UNGATED_METHODS},
  ignored=(
    "gates.",
    "hat.",
    "progressive.",
    "router.",
    "generator.",
    "ewc.",
    "online_ewc.",
    "si.",
    "lwf.",
    "replay.",
    "derpp.",
    "dgm.",
    "model.gate.",
    "optim.gate_lr_multiplier",
  ),
  how="the variant method=joint of its config, which learns all tasks together, or "
  "method=fine_tuning",
  tested=(
    *_IMAGE_SET,
    "tasks.classes_per_task",
    "tasks.count",
    "tasks.order_seed",
    "tasks.classes",
  ),
)
_LONG_VIDEO = ProgrammeRow(
  module="gating_jax.video.run",
  programme="LongVideo",
  base=("video_common", "video_config"),
  example=Example("composed_timegate", "timegate", "segments of long videos"),
  # A data set has one label for each video, or several; a result has one of the scores.
  scores=(_ACCURACY, Score("mean average precision", "mean_average_precision", "macs")),
  noun="video",
  small={
    "data.size": 16,
    "data.segments": 4,
    "model.gate.concepts": 16,
    "data.train_videos": 32,
    "data.test_videos": 16,
  },
  field="model.selection",
  baselines=("all",),
  ungated={"model.selection": _BLIND, "model.heavy.gating": ("none", None)},
  ignored=(
    "model.gate.",
    "model.segment_fraction",
    "model.heavy.gating",
    "model.heavy.gate.",
    "budget.",
    "loss.",
    "optim.epochs",
    "optim.gate_lr_multiplier",
    "data.workers",
    "data.cache",
    "data.cache_gb",
  ),
  how="the variant selection=all of its config",
  tested=(
    "data.name",
    "data.test_split",
    "data.layout",
    "data.table",
    "data.folder",
    "data.segments",
    "data.test_videos",
    "data.at_most",
  ),
)

# By `experiment` in a config. Comparisons show scores in this order: scenes come
# first, since their mean IoU comes before the accuracy that they share with images.
PROGRAMMES = {
  "segmentation": _SEGMENTATION,
  "classification": _CLASSIFICATION,
  "long_video": _LONG_VIDEO,
  "continual": _CONTINUAL,
}


def find_row(experiment: Any) -> ProgrammeRow | None:
  """Returns the row of a name in a config; None for one of another version, or a damaged one."""
  return PROGRAMMES.get(str(experiment))


def example_noun(experiment: Any) -> str:
  """Returns the word for an example of the data of a programme.

  >>> example_noun("segmentation"), example_noun("of another version")
  ('scene', 'image')
  """
  row = find_row(experiment)
  return row.noun if row else "image"


def all_scores() -> tuple[Score, ...]:
  """Returns the scores of all programmes, each once, in the order of the rows.

  >>> [score.label for score in all_scores()[:3]]
  ['mean IoU', 'accuracy', 'mean average precision']
  """
  # A dictionary keeps the first of equals, and the order.
  scores = {}
  for row in PROGRAMMES.values():
    scores.update(dict.fromkeys(row.scores))
  return tuple(scores)
