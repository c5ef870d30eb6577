"""Fields of a segmentation config, with their defaults, on top of those of image classification."""

import ml_collections
from ml_collections import config_dict

from configs import common
from gating_jax.config_files import Config


def segmentation_config() -> Config:
  """Returns a config with every field; `configs/common.py` explains `loss`, `optim` and so on."""
  config = common.image_config()
  config.experiment = "segmentation"
  config.data = ml_collections.ConfigDict(
    {
      "name": "digit_scenes",  # the embedded task, or cityscapes
      "size": (24, 24),  # height and width of the embedded task's scenes; others are resized to it
      "train_scenes": 8000,  # of the embedded task
      "test_scenes": 400,
      "digits": 4,  # in a scene of the embedded task, at most
      "data_dir": config_dict.placeholder(str),  # of TFDS; None: ~/tensorflow_datasets
      "train_split": "train",  # of TFDS
      "test_split": "validation",
      # of TFDS, in training: height and width of a random part; None: the whole scene
      "crop": config_dict.placeholder(tuple),
      "flip": False,  # of TFDS, in training: mirrored with probability 1/2
      "workers": 0,  # of TFDS: processes that decode; 0: threads of this one
      "mean": (0.5,),
      "std": (0.5,),
    }
  )
  # Pixels of the image, along a side, to one of the feature map; None: the net's own.
  config.model.output_stride = config_dict.placeholder(int)
  config.model.head = 32  # channels of the head's last feature map
  return config
