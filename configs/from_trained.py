"""A trained network, made cheaper by a short fine-tuning: gates, static pruning, narrower networks.

    gating-jax --config=configs/from_trained.py:row=dense --workdir=runs/dense --mode=train
    gating-jax --config=configs/from_trained.py:row=gated,macs=50,dense=runs/dense \\
        --workdir=runs/gated --mode=train

The first command trains the dense network, which is the teacher of all other rows. Rows have 70, 50
or 30 % of its multiply-accumulates, gate networks included, as `macs=` says.

Variants, joined by commas after a colon: those of configs/cifar10_resnet20.py; `task=`, `worlds`
(the default, see configs/worlds.py), `union` (configs/union.py) or `cifar10`; `dense=`, the run
directory of the first command; `macs=`, 70, 50 (the default) or 30; and `row=`:

| row | what | epochs |
|---|---|---|
| `dense` | the default: the network itself, ungated, without a teacher | all |
| `gated` | gates begin with the importance of units, as static pruning would | a quarter |
| `gated_last` | the same; gates before the last stage stay static | a quarter |
| `static` | ungated, begun with the most important units of the dense network | a quarter |
| `narrow` | ungated and fresh, of fewer channels everywhere | a quarter |
| `narrow_full` | the same | all |

The dense network of the first two tasks is a resnet8 whose blocks are four times as wide inside as
outside, so that there is much to choose from; a narrower one has ordinary blocks. That of CIFAR-10
is a resnet20. Gates have the recipe of configs/worlds.py, but their fraction is not annealed: they
begin as static pruning, open as much as has the MACs of the `static` row, and learn ten times
as fast as the rest.
"""

from typing import NamedTuple

from configs import cifar10_resnet20, common, union, worlds


class Task(NamedTuple):
  """A task's networks.

  Attributes:
    epochs: of the dense network.
    width: of the dense network, of gated and of pruned ones.
    inner: width inside the blocks of the dense network and of gated ones.
    pruned: the same of a pruned network, by percentage of the MACs, as near as whole channels are.
    narrow: widths of the narrower networks, whose blocks are as wide inside as outside.
  """

  epochs: int
  width: float
  inner: float
  pruned: dict[int, float]
  narrow: dict[int, float]


_WIDE = Task(
  4, 6 / 16, 4.0, {70: 2.76, 50: 1.94, 30: 1.11}, {70: 9.5 / 16, 50: 8.5 / 16, 30: 6.5 / 16}
)
TASKS = {
  "worlds": _WIDE,
  "union": _WIDE,
  "cifar10": Task(40, 1.0, 1.0, {70: 0.7, 50: 0.49, 30: 0.29}, {70: 0.84, 50: 0.71, 30: 0.54}),
}
_MACS = (70, 50, 30)
ROWS = ("dense", "gated", "gated_last", "static", "narrow", "narrow_full")


def _gated(inner):
  """Returns the fields of gates that begin as static pruning to this inner width."""
  return {
    "model.gating": "channel",
    "model.gate.context": "glance+pooled",
    **common.RECIPE,
    "model.equal_inner_width": inner,
    "model.importance.form": "prior",
    # A short training is all that they have.
    "optim.gate_lr_multiplier": 10.0,
  }


def _fields(task, row, macs):
  """Returns the fields of a row."""
  inner = task.pruned[macs]
  fields = {"model.width": task.width, "model.inner_width": task.inner, "model.gating": "none"}
  if row.startswith("gated"):
    fields |= _gated(inner)
  if row == "gated_last":
    # Of resnet8 and resnet20: all stages but the third.
    fields["model.importance.static_layers"] = ("stage1", "stage2")
  if row == "static":
    fields |= {"model.importance.form": "prune", "model.inner_width": inner}
  if row.startswith("narrow"):
    fields |= {"model.width": task.narrow[macs], "model.inner_width": 1.0}
  if row != "dense":
    fields["loss.distillation.coefficient"] = 0.5
  if row in ("gated", "gated_last", "static", "narrow"):
    fields["optim.epochs"] = task.epochs // 4
  if row in ("gated", "gated_last", "static"):
    # Of a network that is trained already.
    fields["optim.learning_rate"] = 0.05
  return fields


def _choose(name, value, choices):
  """Returns a value of a variant, which must be one of some choices."""
  if value not in choices:
    raise ValueError(f"the variant {name} must be one of {list(choices)}; got {value!r}")
  return value


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  defaults = {"task": "worlds", "row": "dense", "macs": "50", "dense": "runs/dense"}
  chosen, others = common.take_variants(arg, defaults)
  task = _choose("task", chosen["task"], tuple(TASKS))
  row = _choose("row", chosen["row"], ROWS)
  macs = int(_choose("macs", chosen["macs"], tuple(map(str, _MACS))))
  if task == "worlds":
    config = worlds.get_config("row=ungated")
  elif task == "union":
    config = union.get_config("row=ungated")
  else:
    config = cifar10_resnet20.get_config()
    config.optim.batch_size = 128
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.05
    config.optim.gate_weight_decay = config.optim.weight_decay
  config.optim.epochs = TASKS[task].epochs
  config.loss.regulariser = "none"
  config.update_from_flattened_dict(_fields(TASKS[task], row, macs))
  if row in ("gated", "gated_last", "static"):
    config.model.init_from = chosen["dense"]
  if row.startswith("narrow"):
    config.loss.distillation.teacher = chosen["dense"]
  config = common.apply_variants(config, others)
  config.eval_every = max(1.0, config.optim.epochs / 10)
  return config
