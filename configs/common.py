"""Fields of an image-classification config, with the recipe's defaults.

No default is defined anywhere else.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from gating_jax.checks import near
from gating_jax.config_files import Config

# Gates that open a fraction of units: normalised logits, the most open of a batch, without noise,
# and open ones weighted.
RECIPE = {
  "model.gate.normalise": 2.0,
  "model.gate.threshold": "quantile",
  "model.gate.weighted": True,
  "model.gate.noise_scale": 0.0,
}


def opening() -> dict[str, Any]:
  """Returns the fields of channel gates that say how they open; None for thresholds of 0."""
  return {
    "normalise": config_dict.placeholder(float),  # scale of normalised logits; None: as they are
    "threshold": config_dict.placeholder(str),  # None: zero; or quantile
    "share": config_dict.placeholder(float),  # of a layer's gates that a quantile opens
    "weighted": config_dict.placeholder(bool),  # open units count 2 sigmoid(logit); None: False
  }


def image_config() -> Config:
  """Returns a config with every field; fractions of a schedule are of the whole training."""
  return ml_collections.ConfigDict(
    {
      "experiment": "classification",
      "seed": 0,
      "data": {
        # or worlds, worlds_told, or any TFDS image-classification set; or folder, for images in
        # folders of their classes; or several, such as union(mnist,cifar10)
        "name": "digits",
        # None: ~/tensorflow_datasets; of folder: that of the images, or a .csv of path and label
        "data_dir": config_dict.placeholder(str),
        "train_split": "train",
        "test_split": "test",
        # of a union: images of each set in an epoch; None: as many as the largest has
        "images_per_set": config_dict.placeholder(int),
        "image_feature": config_dict.placeholder(str),  # of TFDS; None: image
        "label_feature": config_dict.placeholder(str),  # of TFDS; None: label
        # resident: the whole set on the device; streaming: read from disk in the training; auto:
        # resident where both splits take at most half of the free memory, else streaming
        "loader": "auto",
        "image_size": 0,  # images are resized to this; 0: they have one size already
        # streaming: smallest area of a random crop, as a fraction of the image; None: no crop
        "crop_area": config_dict.placeholder(float),
        # streaming: fraction of its sides that the middle part of another image keeps; 0: the whole
        # image; None: 0.875, of a union 1; auto sets what resident does
        "test_crop": config_dict.placeholder(float),
        # streaming: processes that decode; 0: threads of this one; None: as many as cores, at most
        # 8, for folders of many images, else 0
        "workers": config_dict.placeholder(int),
        "mean": (0.5,),
        "std": (0.5,),
        "crop_padding": 0,  # random crop: largest shift in pixels
        "flip": False,
        "cutout_size": 0,  # pixels: width of a square at a random place that is set to the mean
      },
      "model": {
        # resnet8, 14, 20, 32, 44, 56, 110; for large images 18, 34, 50, 101, 152; vgg8, 16;
        # simple_cnn
        "name": "resnet20",
        "width": 1.0,  # factor of every channel count, such as 0.25 or 20
        # factor of the channels between a residual block's convolutions, which gates choose from
        "inner_width": 1.0,
        # None; or the inner width of the ungated net whose MACs model.gate.share is solved for
        "equal_inner_width": config_dict.placeholder(float),
        "shortcut": config_dict.placeholder(str),  # None: the named network's own; A or B
        "stem": config_dict.placeholder(str),  # likewise; cifar, small (stride 2) or imagenet
        "dtype": "float32",  # or bfloat16
        # or none, all_channels, layer; ungated: scale (squeeze-and-excitation), bias (of sources),
        # kernels (mixed for each image); of classifiers also exits, experts
        "gating": "channel",
        # number of sources, whose number is the last channel of images; None: 0
        "sources": config_dict.placeholder(int),
        "group_norm": False,  # GroupNorm in place of BatchNorm; not of vgg8, vgg16, simple_cnn
        # of layer gating: fraction of images kept in the backward pass; all if more are open
        "backward_share": 1.0,
        "gate": {
          "hidden": 16,
          "initial_open": 0.85,
          "temperature": 2 / 3,
          "noise_scale": 1.0,
          # sums of pooled, moments, grid, glance, told, such as glance+pooled; none: the same for
          # all images; random: drawn at the rate initial_open; assigned: fixed for each source
          "context": "pooled",
          "relaxation": "straight_through",  # or hard_concrete, sigmoid
          "block": 1,  # adjacent channels that share a gate, for hardware: 8, 16, 64 or 128
          **opening(),
        },
        "dense_first": {  # schedule of model.gate.share, for thresholds that are quantiles
          # cosine, linear, or held at 1 until the end; None: the same throughout
          "form": config_dict.placeholder(str),
          "start": config_dict.placeholder(float),  # every gate is open up to here; None: 0
          "end": config_dict.placeholder(float),  # model.gate.share from here on; None: 0.5
        },
        "kernels": {  # of gating kernels: each convolution of a block mixes several, by a softmax
          "count": config_dict.placeholder(int),  # None: 4
          "temperature": config_dict.placeholder(float),  # of the softmax, at first; None: 30
          # the temperature has fallen to 1, linearly, at this fraction; None: 0.25
          "end": config_dict.placeholder(float),
        },
        "noise": {  # schedule of the gates' noise, which starts at model.gate.noise_scale
          "final": config_dict.placeholder(float),  # scale at the end; None: constant
          "ramp_start": 0.0,  # constant up to this fraction
          "ramp_end": 0.5,  # reaches the final scale, linearly, at this fraction
        },
        # initial parameters: folder of an ungated run, or file of torchvision's or timm's weights
        "init_from": config_dict.placeholder(str),
        # of the units of the network that init_from names: mean activity x norm of what reads them
        "importance": {
          # prior: gates begin with it, the same for all images; prune: an ungated network with a
          # smaller inner_width begins with the most important units; None: not used
          "form": config_dict.placeholder(str),
          "scale": config_dict.placeholder(float),  # of the prior, in normal scores; None: 2
          # of what gate networks say, at first; None: 0, all gates are static then
          "gain": config_dict.placeholder(float),
          # beginnings of the names of layers whose gates stay static, such as ("stage1",)
          "static_layers": config_dict.placeholder(tuple),
          "images": config_dict.placeholder(int),  # training images it is taken from; None: 512
        },
        # an image leaves at an exit whose entropy is below this fraction of the maximum
        "exits": {"threshold": 0.3},
        # top_k: how many experts run for an image; None: all
        "experts": {
          "count": 4,
          "top_k": config_dict.placeholder(int),
        },
      },
      "loss": {
        # batch_shaping includes sparsity; or sparsity alone, entropy, decision_entropy,
        # away_from_half, balance, none
        "regulariser": "batch_shaping",
        # of a union: classes that compete; None: all; or source, those of the image's own set,
        # which is then known: a head a set
        "scope": config_dict.placeholder(str),
        "entropy": {"coefficient": 0.5},  # each gate is to be open for half of a batch
        # each gate is to be open with probability 1/2, for every image
        "decision_entropy": {"coefficient": 0.5},
        "balance": {"coefficient": 0.01},  # images are to be spread evenly over experts
        "away_from_half": {"coefficient": 0.5},  # open probabilities are to differ from 1/2
        # of all exits but the last, whose weight is 1; one number is for all
        "exit_weights": (1.0,),
        # a trained network as a teacher: (1 - c) cross-entropy + c T^2 divergence from it
        "distillation": {
          "coefficient": config_dict.placeholder(float),  # c, in [0, 1]; None: no teacher
          "temperature": config_dict.placeholder(float),  # T; None: 4
          # folder of a finished run or file of weights; None: that of model.init_from
          "teacher": config_dict.placeholder(str),
        },
        "batch_shaping": {
          "coefficient": 0.75,  # at the start
          "fade_end": 0.2,  # falls linearly to 0 at this fraction
          "a": 0.6,
          "b": 0.4,
          "reduction": "layer_mean",  # over gates: layer_mean, mean or sum
        },
        "sparsity": {
          "kind": "l0",  # l0, macs, budget or target_rate
          "coefficient": 0.5,  # a budget needs about 50
          "ramp_start": 0.2,  # 0 up to this fraction
          "ramp_end": 0.6,  # rises linearly to the coefficient at this fraction
          "target": 0.5,  # budget: fraction of the ungated MACs; target_rate: fraction of images
        },
      },
      "optim": {
        "epochs": 60,  # rounded up to whole dispatches
        "batch_size": 128,  # over all devices
        "learning_rate": 0.1,
        "schedule": "step",  # or cosine
        "lr_drop_at": (0.6, 0.75, 0.9),
        "drop_factor": 0.1,
        "warmup": 0.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,  # of all but gate parameters
        "gate_weight_decay": config_dict.placeholder(float),  # of gate parameters; None: 0
        "gate_lr_multiplier": 1.0,  # factor of the learning rate of gate parameters
        "freeze_epochs": config_dict.placeholder(float),  # epochs with frozen layers; None: 0
        # beginnings of their names, such as ("stem", "stage1"); None: all but gates, exits and the
        # dense layers at the end
        "frozen_layers": config_dict.placeholder(tuple),
      },
      "devices": {
        "backend": "pmap",  # or shard_map
        # more for small nets on an accelerator; on CPU a loop of steps is slower
        "steps_per_dispatch": 1,
      },
      "log_every": 50,  # steps
      "eval_every": 0.0,  # epochs; 0: at the end only
      "checkpoint_every": 1.0,  # epochs
    }
  )


def imagenet_config() -> Config:
  """Returns the shared config for photographs.

  It has ImageNet's colour statistics, the streaming loader, and ResNet18 in bfloat16.
  """
  config = image_config()
  config.data.loader = "streaming"
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.flip = True
  config.model.name = "resnet18"
  config.model.dtype = "bfloat16"
  config.optim.epochs = 100
  return config


# By what is gated: the fields that this needs. Flags such as `--config.model.…` and
# `--config.loss.…` change single fields afterwards.
_GATES = {
  "none": {"model.gating": "none"},
  "channel": {"model.gating": "channel"},
  "static": {  # L0 regularisation, Louizos et al., 2018: channels close for all images or for none
    "model.gating": "channel",
    "model.gate.context": "none",
    "model.gate.relaxation": "hard_concrete",
    "loss.regulariser": "sparsity",
    "loss.sparsity.kind": "l0",
  },
  # Squeeze-and-excitation, Hu et al., 2018: an ungated network that scales its channels.
  "scale": {"model.gating": "scale", "loss.regulariser": "none"},
  # Dynamic convolution, Chen et al., 2020: an ungated network that mixes kernels for each image.
  "kernels": {"model.gating": "kernels", "loss.regulariser": "none"},
  "random": {
    "model.gating": "channel",
    "model.gate.context": "random",
    "model.gate.initial_open": 0.5,
    "loss.regulariser": "none",
  },
  "layer": {  # ConvNet-AIG, Veit and Belongie, 2018
    "model.gating": "layer",
    "model.gate.temperature": 1.0,
    "model.gate.initial_open": 0.87,
    "loss.regulariser": "sparsity",
    "loss.sparsity.kind": "target_rate",
    "loss.sparsity.target": 0.6,
    "loss.sparsity.coefficient": 1.0,
    "loss.sparsity.ramp_start": 0.0,
    "loss.sparsity.ramp_end": 0.0,
  },
  # BranchyNet, Teerapittayanon et al., 2016
  "exits": {
    "model.gating": "exits",
    "loss.regulariser": "none",
  },
  "experts": {"model.gating": "experts", "loss.regulariser": "none"},  # Jacobs et al., 1991
  "sparse_experts": {  # Shazeer et al., 2017; Fedus et al., 2022
    "model.gating": "experts",
    "model.experts.top_k": 1,
    "loss.regulariser": "balance",
  },
}
# Earlier names of what is gated, which old commands still use.
_EARLIER_GATES = {"channels": "channel", "layers": "layer"}

# A variant: from its value, a text, to the fields that it sets. Its errors begin with the rule.
Variant = Callable[[str], Mapping[str, Any]]
# How values of these types are described.
_RULES = {int: "a whole number", float: "a number"}


def _convert(kind: type, value: str) -> Any:
  """Converts the text of a value. Raises a ValueError with the rule that it breaks."""
  try:
    return kind(value)
  except ValueError:
    raise ValueError(f"must be {_RULES.get(kind, kind.__name__)}; got {value!r}") from None


def _list_choices(value: str, choices: Iterable[str]) -> str:
  """Returns the rule for a value that must be one of some names, and the name that is near."""
  close = near(value, choices)
  hint = f". Did you mean {close[0]!r}?" if close else ""
  return f"must be one of {sorted(choices)}; got {value!r}{hint}"


def setting(field: str, kind: type = str) -> Variant:
  """Returns a variant that sets one field of a config."""

  def set_field(value):
    """Returns the field with the value in its type."""
    return {field: _convert(kind, value)}

  return set_field


def _choose_gates(value: str) -> Mapping[str, Any]:
  """Returns the fields that a choice of what is gated sets."""
  value = _EARLIER_GATES.get(value, value)
  if value not in _GATES:
    raise ValueError(_list_choices(value, _GATES))
  return _GATES[value]


def _set_equal(inner: str) -> Mapping[str, Any]:
  """Returns the fields of gates that open as much as an ungated net of this inner width costs.

  They are those of `_set_share`, whose share is solved for.
  """
  return {
    **_set_share("1"),
    "model.gate.share": None,
    "model.equal_inner_width": _convert(float, inner),
  }


def _set_share(share: str) -> Mapping[str, Any]:
  """Returns the fields of gates of which this fraction is open in every batch.

  Logits are normalised, the most open of a batch are open, without noise, and open ones are
  weighted. The fraction falls from 1 in the first half of training; no penalty acts. Networks of
  normalised gates decay, since their kernels would only grow.
  """
  return {
    **RECIPE,
    "model.gate.share": _convert(float, share),
    "model.dense_first.form": "cosine",
    "optim.gate_weight_decay": 5e-4,
    "loss.regulariser": "none",
  }


def _begin_by_importance(form: str) -> Mapping[str, Any]:
  """Returns the fields of a network that begins by the importance of a trained one's units.

  Gates begin as static pruning does, with their fraction from the first step on.
  """
  if form == "prior":
    return {"model.importance.form": form, "model.dense_first.form": None}
  if form == "prune":
    return {"model.importance.form": form, "model.gating": "none", "loss.regulariser": "none"}
  raise ValueError(_list_choices(form, ("prior", "prune")))


def _set_budget(share: str) -> Mapping[str, Any]:
  """Returns the fields of a training to this fraction of the ungated network's MACs."""
  return {
    "loss.sparsity.kind": "budget",
    "loss.sparsity.target": _convert(float, share),
    "loss.sparsity.coefficient": 50.0,
  }


_VARIANTS = {
  "gates": _choose_gates,
  "model": setting("model.name"),
  "width": setting("model.width", float),
  "inner": setting("model.inner_width", float),
  "equal": _set_equal,
  "block": setting("model.gate.block", int),
  "noise": setting("model.gate.noise_scale", float),
  "noise_to": setting("model.noise.final", float),
  "epochs": setting("optim.epochs", int),
  "batch": setting("optim.batch_size", int),
  "schedule": setting("optim.schedule"),
  "regulariser": setting("loss.regulariser"),
  "sparsity": setting("loss.sparsity.coefficient", float),
  "bas": setting("loss.batch_shaping.coefficient", float),
  "budget": _set_budget,
  "share": _set_share,
  "context": setting("model.gate.context"),
  "importance": _begin_by_importance,
  "teacher": setting("loss.distillation.coefficient", float),
  # Of unions of sets.
  "images": setting("data.images_per_set", int),
  "heads": setting("loss.scope"),
}
# Earlier variants, which old commands still use.
_EARLIER = {
  "l0": _VARIANTS["sparsity"],
  "gating": setting("model.gating"),
}


def take_variants(arg: str | None, defaults: Mapping[str, str]) -> tuple[dict[str, str], str]:
  """Splits off the variants that a config file reads itself.

  Args:
    arg: variants as `name=value`, joined by commas; None or empty for none.
    defaults: names of those that are split off, each with its value where `arg` lacks it.
  Returns:
    The values of these by name, and all other variants, joined by commas.

  >>> take_variants("row=told,epochs=3", {"row": "recipe", "sets": "digits"})
  ({'row': 'told', 'sets': 'digits'}, 'epochs=3')
  """
  found, others = dict(defaults), []
  for item in (arg or "").split(","):
    name, _, value = item.partition("=")
    if name in found:
      found[name] = value
    else:
      others.append(item)
  return found, ",".join(others)


def apply_variants(
  config: Config,
  arg: str | None,
  variants: Mapping[str, Variant] | None = None,
) -> Config:
  """Applies variants such as `epochs=10,gates=layer`: short names for the most used settings.

  Args:
    config: changed in place.
    arg: variants as `name=value`, joined by commas; None or empty for none.
    variants: by name; None for those of image classification. A config of an earlier version has
      `(field, type)`, or a table of the fields of each value, in place of a function.
  Returns:
    The config.
  Raises:
    ValueError: a name or a listed value is unknown.
  """
  earlier = {} if variants else _EARLIER
  variants = variants or _VARIANTS
  items = [item for item in (arg or "").split(",") if item]
  for item in sorted(items, key=_place_of):
    name, found, value = item.partition("=")
    variant = variants.get(name) or earlier.get(name)
    if not found or variant is None:
      close = near(name, variants)
      hint = f". Did you mean {close[0]}={value or '...'}?" if close else ""
      raise ValueError(
        f"a variant must be one of {sorted(variants)} as name=value; got {item!r}{hint}"
      )
    try:
      fields = _fields_of(variant, value)
    except ValueError as error:
      raise ValueError(f"the variant {name} {error}") from error
    config.update_from_flattened_dict(fields)
  return config


def _place_of(item: str) -> int:
  """Returns the place of a variant; those of one place keep the order in which they are given."""
  name, _, _ = item.partition("=")
  # Other variants change fields that `gates` sets; `importance` changes some of `share`, `equal`.
  return {"gates": -1, "importance": 1}.get(name, 0)


def _fields_of(variant: Any, value: str) -> Mapping[str, Any]:
  """Returns the fields that a variant sets; see `apply_variants`."""
  if callable(variant):
    return variant(value)
  if not isinstance(variant, Mapping):
    field, kind = variant
    return {field: _convert(kind, value)}
  if value not in variant:
    raise ValueError(_list_choices(value, variant))
  return variant[value]
