"""One network for several sets: where gates can pay, next to its baselines at equal MACs.

    gating-jax --config=configs/union.py --workdir=runs/union --mode=train
    gating-jax --config=configs/union.py:row=ungated --workdir=runs/union_ungated --mode=train

By default the sets need no files: handwritten digits, scenes of one to three digits whose class is
the highest of them, and digits turned by a quarter, as negatives. All images come as 16 x 16
pixels in three colours, sets have equal shares of every batch, and one head serves all classes. The
network is a resnet8, for ungated rows six channels wide; gated rows have four times the channels
inside their blocks, and open the fraction of them at which an image costs as much, gate networks
included (`model.equal_inner_width`).

The frontier of four real sets is, with TFDS sets in FOLDER:

    --config=configs/union.py:sets=mnist+fashion_mnist+cifar10+tiny_imagenet50,width=0.5,images=64000
    --config.data.data_dir=FOLDER

Variants, joined by commas after a colon: those of configs/cifar10_resnet20.py, and these:

| variant | what |
|---|---|
| `row=` | a row of the table below; `recipe` by default |
| `sets=a+b` | the sets, of TFDS or made |
| `images=` | images of each set in an epoch |
| `heads=source` | a head a set, which is known: only its own classes compete |

| row | what |
|---|---|
| `recipe` | glance and pooled context, quantile of normalised logits, weights, dense first |
| `glance`, `no_glance` | the recipe with one of the two contexts |
| `no_dense_first`, `no_weight`, `noise` | the recipe without a part, or with noise |
| `random` | gates drawn by chance |
| `ungated`, `all_open` | no gates, as wide as the MACs, and with all of the gated rows' channels |
| `scale` | ungated, channels scaled by squeeze-and-excitation; 4 % more MACs |
| `kernels` | ungated, of width 5, each convolution a mixture of 4 kernels, weighed by context |
| `bias` | ungated, told the set by a bias for each set and channel |
| `oracle` | told the set; a fixed random set of open channels for each |
| `told` | the recipe, whose gates are told the set |

Of one network for each set, at equal training in all, each has `sets=` one of them: its epochs have
as many images of that set, and no others.
"""

from configs import common

_SETS = "digits+digit_scenes+turned_digits"
_WIDTH = 6 / 16
_COLOURS = 3
_CHANNELS = {"model.gating": "channel", "model.inner_width": 4.0, "loss.regulariser": "none"}
# The fraction of gates is solved for the MACs of the ungated network.
_EQUAL = {**_CHANNELS, "model.equal_inner_width": 1.0}
_UNGATED = {"model.gating": "none"}
# Rows whose networks are told the set of an image.
_TOLD = ("bias", "oracle", "told")


def _recipe(context="glance+pooled"):
  """Returns the fields of the recipe with this context."""
  return {
    **_EQUAL,
    "model.gate.context": context,
    **common.RECIPE,
    "model.dense_first.form": "cosine",
  }


_ROWS = {
  "recipe": _recipe(),
  "glance": _recipe("glance"),
  "no_glance": _recipe("pooled"),
  "no_dense_first": _recipe() | {"model.dense_first.form": None},
  "no_weight": _recipe() | {"model.gate.weighted": False},
  "noise": _recipe() | {"model.gate.noise_scale": 1.0},
  "random": {**_EQUAL, "model.gate.context": "random"},
  "ungated": _UNGATED,
  "all_open": {**_UNGATED, "model.inner_width": 4.0},
  "scale": {"model.gating": "scale", "model.gate.context": "glance+pooled"},
  "kernels": {
    "model.gating": "kernels",
    "model.gate.context": "glance+pooled",
    # Mixing costs a MAC for each number of all kernels.
    "model.width": 5 / 16,
  },
  "bias": {"model.gating": "bias"},
  "oracle": {**_EQUAL, "model.gate.context": "assigned"},
  "told": _recipe("told"),
}


def _choose_row(value):
  """Returns the fields of a row."""
  if value not in _ROWS:
    raise ValueError(f"the variant row must be one of {sorted(_ROWS)}; got {value!r}")
  return _ROWS[value]


def _name_sets(sets, told):
  """Returns the fields of the sets; a network that is told has their number as a fourth channel."""
  names = sets.split("+")
  kind = "union_told" if told else "union"
  fields = {"data.name": f"{kind}({','.join(names)})"}
  if told:
    fields |= {
      # The number of the set stays as it is.
      "data.mean": (*[0.45] * _COLOURS, 0.0),
      "data.std": (*[0.25] * _COLOURS, 1 / 255),
      "model.sources": len(names),
    }
  return fields


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = common.image_config()
  config.data.image_size = 16
  # Four epochs of 375 steps, with three sets.
  config.data.images_per_set = 32_000
  config.data.mean = (0.45,) * _COLOURS
  config.data.std = (0.25,) * _COLOURS
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
  # Rows and sets come first, since other variants change fields that they set.
  found, others = common.take_variants(arg, {"row": "recipe", "sets": _SETS})
  config.update_from_flattened_dict(_choose_row(found["row"]))
  config.update_from_flattened_dict(_name_sets(found["sets"], found["row"] in _TOLD))
  return common.apply_variants(config, others)
