"""Worlds: a control on which conditional computation decides everything, at equal MACs.

    gating-jax --config=configs/worlds.py --workdir=runs/worlds --mode=train
    gating-jax --config=configs/worlds.py:row=ungated --workdir=runs/worlds_ungated --mode=train

The images are made, see gating_jax/data/worlds.py. The network is a resnet8 on 16 x 16 pixels, for
ungated rows as wide as 116,592 MACs; gated rows have four times the channels inside their blocks,
and open as many of them as cost the same, gate networks and glance included.

Variants, joined by commas after a colon: those of configs/cifar10_resnet20.py, and `row=`:

| row | what |
|---|---|
| `recipe` | the default: glance, quantile of normalised logits, weights, no noise, dense first |
| `no_glance`, `glance_pooled` | the recipe with gates that see their own input, alone or as well |
| `no_dense_first`, `no_weight`, `noise` | the recipe without a part, or with noise |
| `iclr2020` | gates of a pooled context with noise, under a squared gap to the budget |
| `random` | gates drawn by chance |
| `ungated`, `all_open` | no gates, as wide as the MACs, and with all of the gated rows' channels |
| `scale` | ungated, channels scaled by squeeze-and-excitation of the same glance; 4 % more MACs |
| `kernels` | ungated, of width 5, each convolution a mixture of 4 kernels that a glance weighs |
| `bias` | ungated, told the world by a bias for each world and channel |
| `oracle` | told the world; a fixed random set of open channels for each |
| `told` | the recipe, whose gates are told the world |
"""

from configs import common

_WIDTH = 6 / 16
# Fractions of open channels at which a gated row has the MACs of the ungated one.
_SHARES = {
  "glance": 0.23426,
  "pooled": 0.24259,
  "glance+pooled": 0.23333,
  "told": 0.24259,
  "assigned": 0.25,
}
_CHANNELS = {"model.gating": "channel", "model.inner_width": 4.0, "loss.regulariser": "none"}
_TOLD = {
  "data.name": "worlds_told",
  # The number of the world stays as it is.
  "data.mean": (0.45, 0.45, 0.45, 0.0),
  "data.std": (0.25, 0.25, 0.25, 1 / 255),
  "model.sources": 8,
}
_UNGATED = {"model.gating": "none"}


def _recipe(context="glance"):
  """Returns the fields of the recipe with this context."""
  return {
    **_CHANNELS,
    "model.gate.context": context,
    **common.RECIPE,
    "model.gate.share": _SHARES[context],
    "model.dense_first.form": "cosine",
  }


_ROWS = {
  "recipe": _recipe(),
  "no_glance": _recipe("pooled"),
  "glance_pooled": _recipe("glance+pooled"),
  "no_dense_first": _recipe() | {"model.dense_first.form": None},
  "no_weight": _recipe() | {"model.gate.weighted": False},
  "noise": _recipe() | {"model.gate.noise_scale": 1.0},
  "iclr2020": {
    **_CHANNELS,
    "loss.regulariser": "batch_shaping",
    "loss.sparsity.kind": "budget",
    # Of all MACs without gate networks, which the budget leaves out.
    "loss.sparsity.target": 0.26546,
    "loss.sparsity.coefficient": 50.0,
    "loss.sparsity.ramp_start": 0.0,
    "loss.sparsity.ramp_end": 0.0,
  },
  "random": {
    **_CHANNELS,
    "model.gate.context": "random",
    "model.gate.initial_open": _SHARES["assigned"],
  },
  "ungated": _UNGATED,
  "all_open": {**_UNGATED, "model.inner_width": 4.0},
  "scale": {"model.gating": "scale", "model.gate.context": "glance"},
  "kernels": {
    "model.gating": "kernels",
    "model.gate.context": "glance",
    # Mixing costs a MAC for each number of all kernels.
    "model.width": 5 / 16,
  },
  "bias": {"model.gating": "bias", **_TOLD},
  "oracle": {
    **_CHANNELS,
    **_TOLD,
    "model.gate.context": "assigned",
    "model.gate.share": _SHARES["assigned"],
  },
  "told": {**_recipe("told"), **_TOLD},
}


def _choose_row(value):
  """Returns the fields of a row."""
  if value not in _ROWS:
    raise ValueError(f"the variant row must be one of {sorted(_ROWS)}; got {value!r}")
  return _ROWS[value]


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = common.image_config()
  config.data.name = "worlds"
  # Four epochs of 750 steps.
  config.data.train_split = "train[:192000]"
  config.data.mean = (0.45, 0.45, 0.45)
  config.data.std = (0.25, 0.25, 0.25)
  config.model.name = "resnet8"
  config.model.width = _WIDTH
  config.model.stem = "small"
  config.model.shortcut = "B"
  config.optim.epochs = 4
  config.optim.batch_size = 256
  config.optim.schedule = "cosine"
  config.optim.warmup = 0.05
  # The networks of gates and of scales decay as all others do.
  config.optim.gate_weight_decay = config.optim.weight_decay
  config.eval_every = 1.0
  # A row comes first, since other variants change fields that it sets.
  found, others = common.take_variants(arg, {"row": "recipe"})
  config.update_from_flattened_dict(_choose_row(found["row"]))
  return common.apply_variants(config, others)
