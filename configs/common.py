"""Fields of an image-classification config, with the recipe's defaults. The only home of a default."""

from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict


def image_config() -> ml_collections.ConfigDict:
  """Every field; fractions are of the whole training."""
  return ml_collections.ConfigDict(
    {
      "experiment": "classification",
      "seed": 0,
      "data": {
        "name": "digits",  # or any TFDS image-classification set
        "data_dir": config_dict.placeholder(str),  # None: ~/tensorflow_datasets
        "train_split": "train",
        "test_split": "test",
        "image_feature": config_dict.placeholder(str),  # of TFDS; None: image
        "label_feature": config_dict.placeholder(str),  # of TFDS; None: label
        "loader": "resident",  # resident: whole set on the device; streaming: what does not fit
        "image_size": 0,  # images are resized to this; 0: they are of one size already
        "crop_area": config_dict.placeholder(
          float
        ),  # streaming: least share of a random crop; None: no crop
        "workers": 0,  # streaming: processes that decode; 0: threads of this one
        "mean": (0.5,),
        "std": (0.5,),
        "pad": 0,  # random crop: largest shift in pixels
        "flip": False,
        "cutout": 0,  # pixels: width of a square at a random place that is set to the mean
      },
      "model": {
        "name": "resnet20",  # 8, 14, 20, 32, 44, 56, 110; 18, 34, 50, 101 for large images; vgg8, vgg16, simple_cnn
        "width": 1.0,  # of every channel count, such as 0.25 or 20
        "inner_width": 1.0,  # of the channels between a residual block's convolutions, which gates choose from
        "shortcut": config_dict.placeholder(str),  # None: the named network's own; A or B
        "dtype": "float32",  # or bfloat16
        "gating": "channel",  # or none, all_channels, layer; of classifiers also exits, experts
        "group_norm": False,  # GroupNorm in place of BatchNorm; not of vgg8, vgg16, simple_cnn
        "backward_share": 1.0,  # of layer gating: at most this share of images has one, or all where more are open
        "gate": {
          "hidden": 16,
          "initial_open": 0.85,
          "temperature": 2 / 3,
          "noise_scale": 1.0,
          "context": "pooled",  # or none: the same for all images; random: drawn at the rate initial_open
          "relaxation": "straight_through",  # or hard_concrete, sigmoid
          "block": 1,  # adjacent channels that share a gate, for hardware: 8, 16, 64 or 128
        },
        "noise": {  # of gates in training, from model.gate.noise_scale
          "final": config_dict.placeholder(float),  # to this; None: it stays
          "start": 0.0,  # up to this fraction as it is,
          "full": 0.5,  # linear to the final one at this
        },
        "init_from": config_dict.placeholder(
          str
        ),  # folder of an ungated run whose parameters to start from
        "exits": {
          "threshold": 0.3
        },  # of the entropy of an exit, as a share of the largest: below it an image leaves
        "experts": {
          "count": 4,
          "top_k": config_dict.placeholder(int),
        },  # how many count for an image; None: all
      },
      "loss": {
        # batch_shaping, with sparsity; or sparsity alone, entropy, decision_entropy, away_from_half, balance, none
        "regulariser": "batch_shaping",
        "entropy": {"coefficient": 0.5},  # asks that each gate be open for half of a batch
        "decision_entropy": {
          "coefficient": 0.5
        },  # asks that each be open with probability 1/2, for every image
        "balance": {"coefficient": 0.01},  # asks that images be spread evenly over experts
        "away_from_half": {"coefficient": 0.5},  # asks that open probabilities differ from 1/2
        "exit_weights": (1.0,),  # of exits before the last, whose own is 1; one number is for all
        "batch_shaping": {
          "coefficient": 0.75,  # at the start
          "end": 0.2,  # linear to 0 at this fraction
          "a": 0.6,
          "b": 0.4,
          "reduction": "layer_mean",  # over gates: layer_mean, mean or sum
        },
        "sparsity": {
          "kind": "l0",  # l0, macs, budget or target_rate
          "coefficient": 0.5,  # a budget needs about 50
          "start": 0.2,  # 0 up to this fraction
          "full": 0.6,  # linear to the coefficient at this one
          "target": 0.5,  # of budget, a share of the ungated MACs; of target_rate, a share of images
        },
      },
      "optim": {
        "epochs": 60,  # rounded up to whole dispatches
        "batch_size": 128,  # over all devices
        "learning_rate": 0.1,
        "schedule": "step",  # or cosine
        "drops": (0.6, 0.75, 0.9),
        "drop_factor": 0.1,
        "warmup": 0.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,  # 0 for gate parameters whatever stands here
        "gate_multiplier": 1.0,  # how much faster gate parameters learn
      },
      "devices": {
        "backend": "pmap",  # or shard_map
        "steps_per_dispatch": 1,  # more for small nets on an accelerator; on CPU a loop of steps is slower
      },
      "log_every": 50,  # steps
      "eval_every": 0.0,  # epochs; 0: at the end only
      "checkpoint_every": 1.0,  # epochs
    }
  )


def imagenet_config() -> ml_collections.ConfigDict:
  """What configs of photographs share: ImageNet's colours, the streaming loader, ResNet18 in bfloat16."""
  config = image_config()
  config.data.loader = "streaming"
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.flip = True
  config.model.name = "resnet18"
  config.model.dtype = "bfloat16"
  config.optim.epochs = 100
  return config


_GATES = {  # what is gated and what that needs; `--config.model` and `--config.loss` change single fields after it
  "none": {"model.gating": "none"},
  "channel": {"model.gating": "channel"},
  "static": {  # L0 regularisation, Louizos et al., 2018: channels that close do so for all images
    "model.gating": "channel",
    "model.gate.context": "none",
    "model.gate.relaxation": "hard_concrete",
    "loss.regulariser": "sparsity",
    "loss.sparsity.kind": "l0",
  },
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
    "loss.sparsity.start": 0.0,
    "loss.sparsity.full": 0.0,
  },
  "exits": {
    "model.gating": "exits",
    "loss.regulariser": "none",
  },  # BranchyNet, Teerapittayanon et al., 2016
  "experts": {"model.gating": "experts", "loss.regulariser": "none"},  # Jacobs et al., 1991
  "sparse_experts": {  # Shazeer et al., 2017; Fedus et al., 2022
    "model.gating": "experts",
    "model.experts.top_k": 1,
    "loss.regulariser": "balance",
  },
}
_VARIANTS = {
  "gates": _GATES,
  "model": ("model.name", str),
  "gating": ("model.gating", str),
  "width": ("model.width", float),
  "inner": ("model.inner_width", float),
  "block": ("model.gate.block", int),
  "noise": ("model.gate.noise_scale", float),
  "noise_to": ("model.noise.final", float),
  "epochs": ("optim.epochs", int),
  "batch": ("optim.batch_size", int),
  "schedule": ("optim.schedule", str),
  "regulariser": ("loss.regulariser", str),
  "l0": ("loss.sparsity.coefficient", float),
  "bas": ("loss.batch_shaping.coefficient", float),
  "budget": lambda share: {
    "loss.sparsity.kind": "budget",
    "loss.sparsity.target": float(share),
    "loss.sparsity.coefficient": 50.0,
  },
}


_EARLIER = {"gates=channels": "channel", "gates=layers": "layer"}  # names that variants had


def apply_variants(
  config: ml_collections.ConfigDict, arg: str | None, variants: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
  """`epochs=10,gates=layer` and the like: short names for what runs differ in most, each of one field or, where its
  values are listed or a function makes them, of several. In their order, but first `gates`, which others change."""
  variants = variants or _VARIANTS
  items = [item for item in (arg or "").split(",") if item]
  for item in sorted(items, key=lambda item: not item.startswith("gates=")):
    name, found, value = item.partition("=")
    value = _EARLIER.get(item, value)
    if not found or name not in variants:
      raise ValueError(f"a variant must be one of {sorted(variants)} as name=value; got {item!r}")
    if callable(variants[name]):
      config.update_from_flattened_dict(variants[name](value))
    elif not isinstance(variants[name], Mapping):
      field, kind = variants[name]
      config.update_from_flattened_dict({field: kind(value)})
    elif value in variants[name]:
      config.update_from_flattened_dict(variants[name][value])
    else:
      raise ValueError(f"the variant {name} must be one of {sorted(variants[name])}; got {value!r}")
  return config
