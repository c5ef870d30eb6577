"""A trained network, made cheaper by a short fine-tuning: gates, static pruning, narrower networks.

    gating-jax --config=configs/from_trained.py:row=dense --workdir=runs/dense --mode=train
    gating-jax --config=configs/from_trained.py:row=gated,macs=50,dense=runs/dense \\
        --workdir=runs/gated --mode=train

The first command trains the dense network, which is the teacher of all other rows. Rows have 70, 50
or 30 % of its multiply-accumulates, gate networks included, as `macs=` says.

Variants, joined by commas after a colon: those of configs/cifar10_resnet20.py; `task=`, `worlds`
(the default, see configs/worlds.py) or `cifar10`; `dense=`, the run directory of the first command;
`macs=`, 70, 50 (the default) or 30; and `row=`:

| row | what | epochs |
|---|---|---|
| `dense` | the default: the network itself, ungated, without a teacher | all |
| `gated` | gates begin with the importance of units, as static pruning would | a quarter |
| `gated_last` | the same; gates before the last stage stay static | a quarter |
| `static` | ungated, begun with the most important units of the dense network | a quarter |
| `narrow` | ungated and fresh, of fewer channels everywhere | a quarter |
| `narrow_full` | the same | all |

Gates have the recipe of configs/worlds.py, but for its share, which is not annealed: they begin as
static pruning. Units of gated rows are open by quantiles; other rows are as wide as the MACs.
"""

from configs import cifar10_resnet20, common, worlds

_EPOCHS = {"worlds": 4, "cifar10": 40}
# Of the dense network: a resnet8 for worlds, a resnet20 for CIFAR-10.
_WIDTH = {"worlds": 12 / 16, "cifar10": 1.0}
_MACS = (70, 50, 30)
# By task and percentage: fraction of open units, with which gated rows have the MACs.
_SHARES = {
  "worlds": {70: 0.66363, 50: 0.44896, 30: 0.23428},
  "cifar10": {70: 0.69632, 50: 0.49411, 30: 0.2919},
}
# The inner width of pruned networks, and the width of narrower ones, as near as whole channels are.
_INNER = {
  "worlds": {70: 0.68, 50: 0.46, 30: 0.24},
  "cifar10": {70: 0.7, 50: 0.49, 30: 0.29},
}
_NARROW = {
  "worlds": {70: 0.6225, 50: 0.525, 30: 0.405},
  "cifar10": {70: 0.84, 50: 0.71, 30: 0.54},
}
ROWS = ("dense", "gated", "gated_last", "static", "narrow", "narrow_full")


def _gated(task, macs):
  """Returns the fields of gates that begin as static pruning."""
  return {
    "model.gating": "channel",
    "model.gate.context": "glance+pooled",
    **common.RECIPE,
    "model.gate.share": _SHARES[task][macs],
    "model.importance.form": "prior",
  }


def _fields(task, row, macs):
  """Returns the fields of a row."""
  fields = {"model.width": _WIDTH[task], "model.gating": "none"}
  if row.startswith("gated"):
    fields |= _gated(task, macs)
  if row == "gated_last":
    # Of resnet8 and resnet20: all stages but the third.
    fields["model.importance.static_layers"] = ("stage1", "stage2")
  if row == "static":
    fields |= {"model.importance.form": "prune", "model.inner_width": _INNER[task][macs]}
  if row.startswith("narrow"):
    fields["model.width"] = _NARROW[task][macs]
  if row != "dense":
    fields["loss.distillation.coefficient"] = 0.5
  if row in ("gated", "gated_last", "static", "narrow"):
    fields["optim.epochs"] = _EPOCHS[task] // 4
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
  task = _choose("task", chosen["task"], tuple(_EPOCHS))
  row = _choose("row", chosen["row"], ROWS)
  macs = int(_choose("macs", chosen["macs"], tuple(map(str, _MACS))))
  if task == "worlds":
    config = worlds.get_config("row=ungated")
  else:
    config = cifar10_resnet20.get_config()
    config.optim.batch_size = 128
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.05
    config.optim.gate_weight_decay = config.optim.weight_decay
  config.optim.epochs = _EPOCHS[task]
  config.loss.regulariser = "none"
  config.update_from_flattened_dict(_fields(task, row, macs))
  if row in ("gated", "gated_last", "static"):
    config.model.init_from = chosen["dense"]
  if row.startswith("narrow"):
    config.loss.distillation.teacher = chosen["dense"]
  config = common.apply_variants(config, others)
  config.eval_every = max(1.0, config.optim.epochs / 10)
  return config
