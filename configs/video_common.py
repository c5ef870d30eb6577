"""Fields of a long-video config, with their defaults.

No default is defined anywhere else.
"""

import ml_collections
from ml_collections import config_dict

from configs import common
from gating_jax.config_files import Config


def video_config() -> Config:
  """Returns a config with every field; fractions of a schedule are of the whole training."""
  channels = {
    "batch_shaping": {
      "coefficient": 0.0,
      "fade_end": 0.2,
      "a": 0.6,
      "b": 0.4,
      "reduction": "layer_mean",
    },
    "sparsity": {
      "kind": "l0",
      "coefficient": 0.0,
      "ramp_start": 0.0,
      "ramp_end": 0.2,
      "target": 0.5,
    },
  }
  return ml_collections.ConfigDict(
    {
      "experiment": "long_video",
      "seed": 0,
      "data": {
        # the embedded task; videos: a folder of files; features: folders of arrays
        "name": "composed",
        "segments": 16,  # of every video
        "frames": 8,  # of a segment; the embedded task has 8
        "size": 16,  # frames are resized to this square; those of the embedded task are 16 x 16
        "train_videos": 1600,  # of the embedded task
        "test_videos": 640,
        # csv: a table; folders: of classes, in `folder`; or breakfast, charades, multithumos
        "layout": "csv",
        # csv: the label table; folders: None; otherwise the folder of annotations
        "table": config_dict.placeholder(str),
        "train_split": "train",  # csv: a file of names; folders: a name; otherwise train or test
        "test_split": "test",
        # of the videos, or of the features that the gate sees
        "folder": config_dict.placeholder(str),
        # features that the classifier sees; None: the same
        "heavy_folder": config_dict.placeholder(str),
        # videos of a split, evenly spaced in its table; None: all
        "at_most": config_dict.placeholder(int),
        # fraction of the training videos that is held out, to set thresholds so that the budget is
        # met on new videos, and to choose the epoch where eval_every is set; None: nothing is
        "validation": config_dict.placeholder(float),
        # csv: a file of names to hold out, in place of a fraction
        "validation_split": config_dict.placeholder(str),
        "light_macs": 0,  # of extracting the features of a segment, where it is known
        "heavy_macs": 0,
        "workers": 0,  # processes that decode; 0: threads of this one
        # a folder that keeps resized frames, so that files are decoded once; None: none is kept
        "cache": config_dict.placeholder(str),
        "cache_gb": config_dict.placeholder(float),  # its size, in 10^9 bytes; None: 20
        # in training, segments of files start at random positions within their parts of the video
        "jitter": True,
        # in training, the same for all segments of a video; features of trained nets have none
        "crop_padding": config_dict.placeholder(int),  # largest shift in pixels; None: 0
        "flip": config_dict.placeholder(bool),  # mirrors half of the videos; None: no
        # largest change of brightness, contrast and saturation, as a fraction; None: 0
        "colour": config_dict.placeholder(float),
        "mean": (0.5,),
        "std": (0.5,),
      },
      "model": {
        "light": {"name": "mobilenet_small", "width": 1.0},
        "heavy": {
          "name": "resnet3d10",
          "width": 1.0,
          "stem": config_dict.placeholder(str),  # None: the named network's own
          "gating": "none",  # or channel
          "group_norm": False,  # GroupNorm in place of BatchNorm
          "gate": {
            "hidden": 16,
            "initial_open": 0.85,
            "temperature": 2 / 3,
            "noise_scale": 1.0,
            # sums of pooled, moments, grid, glance; None: pooled
            "context": config_dict.placeholder(str),
            **common.opening(),
          },
        },
        # or all, uniform, random, oracle; confidence (SCSampler), prefix (FrameExit); light
        "selection": "gate",
        # fraction of segments that a fixed selection takes, or that FrameExit may see on average
        "segment_fraction": 0.5,
        # end_to_end: no backward pass through the heavy net for segments that are not chosen
        "skip_backward": False,
        # of a gate: fraction of a batch kept in the backward pass; all of it if more are chosen
        "backward_share": 1.0,
        "pooling": "max",  # of chosen segments: max, mean or attention
        "dtype": "float32",  # or bfloat16
        "gate": {
          "concepts": 128,  # found by k-means in the light features
          "trained_concepts": False,
          "context": "attention",  # none, attention or convolution
          "relaxation": "straight_through",  # soft or clipped_sigmoid
          "hidden": 64,
          "initial_open": 0.5,
          "temperature": 2 / 3,
          "noise_scale": 1.0,
        },
      },
      "budget": {
        # video: each video has the budget, so that easy ones do not pay for others; set: the set
        # has it, on average; None: as set, but confidence takes a fixed number of each video
        "scope": config_dict.placeholder(str),
      },
      # gate and classifier on features of the trained nets; end_to_end: all together
      "training": "two_stage",
      "pretrained": "",  # run directory whose trained nets are used in place of new ones
      "pretrain": {  # both nets as classifiers of single segments
        "target": "units",  # unit actions where the data have them, or label
        "epochs": 8,
        "segments_per_video": 4,  # in every step, random ones
        "batch_size": 32,
        "learning_rate": 0.003,
        "weight_decay": 0.001,
      },
      "loss": {
        "sparsity": {
          "kind": "target",  # squared gap to the target fraction; mean: the fraction itself; none
          "coefficient": 100.0,
          "ramp_start": 0.0,  # 0 up to this fraction
          "ramp_end": 0.2,  # rises linearly to the coefficient at this fraction
          "target": 0.5,
        },
        # of the segment gates
        "batch_shaping": {
          "coefficient": 0.0,
          "fade_end": 1.0,
          "a": 0.6,
          "b": 0.4,
        },
        "light": 0.0,  # of the light net's own classification of every segment
        "channels": channels,  # of the heavy net's channel gates
      },
      "optim": {
        "kind": "adam",  # or sgd
        "epochs": 40,
        "batch_size": 64,
        "learning_rate": 0.002,
        "schedule": "cosine",
        "lr_drop_at": (0.6, 0.75, 0.9),
        "drop_factor": 0.1,
        "warmup": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.0005,
      },
      "devices": {"backend": "pmap", "steps_per_dispatch": 1},
      "log_every": 50,  # steps
      "eval_every": 0.0,  # epochs; 0: at the end only
      # whether the result has videos per second, measured at the end; None: it has
      "speed": config_dict.placeholder(bool),
      "checkpoint_every": 1.0,  # epochs
    }
  )


_VARIANTS = {
  "selection": common.setting("model.selection"),
  "share": common.setting("model.segment_fraction", float),
  "target": common.setting("loss.sparsity.target", float),
  "context": common.setting("model.gate.context"),
  "heavy": common.setting("model.heavy.name"),
  "scope": common.setting("budget.scope"),
  "validation": common.setting("data.validation", float),
  "training": common.setting("training"),
  "epochs": common.setting("optim.epochs", int),
  "layout": common.setting("data.layout"),
  "seed": common.setting("seed", int),
}


def apply_variants(config: Config, arg: str | None) -> Config:
  """Applies variants such as `context=none,target=0.25`; see `common.apply_variants`."""
  return common.apply_variants(config, arg, _VARIANTS)
