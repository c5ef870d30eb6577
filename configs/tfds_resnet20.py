"""ResNet20 on any TFDS image-classification set of one image size, with the CIFAR-10 recipe.

    gating-jax --config=configs/tfds_resnet20.py --config.data.name=mnist --workdir=runs/mnist \
      --mode=train

The losses are those of configs/cifar10_resnet20.py; 60 epochs of batches of 128. For photographs,
set `--config.data.flip`. Sets that do not fit into memory are read from disk. If images differ in
size, use `--config.data.image_size=224 --config.data.crop_area=0.08 --config.model.name=resnet50`.
The labelled test split of imagenet2012 is `--config.data.test_split=validation`.
"""

from configs import common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = common.image_config()
  config.data.name = "mnist"
  config.data.std = (0.25,)
  config.data.crop_padding = 2
  return common.apply_variants(config, arg)
