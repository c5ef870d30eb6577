"""Five tasks of ten classes, from 50 classes of ImageNet at 32 x 32, with the paper's ResNet18.

    gating-jax --config=configs/split_imagenet50.py --workdir=runs/split_imagenet50 --mode=train

`data.name` is any TFDS set of 50 classes, here the first 50 of Tiny ImageNet. Abati et al., 2020.
"""

from configs import continual_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = continual_common.continual_config()
  config.data.name = "tiny_imagenet50"
  config.data.image_size = 32
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.crop_padding = 4
  config.data.flip = True
  config.tasks.classes_per_task = 10
  config.model.name = "resnet18"
  config.gates.sparsity = 1.0
  config.gates.patience = 0.0
  config.optim.epochs = 200
  config.optim.learning_rate = 0.1
  config.optim.lr_drop_at = (0.5, 0.75)
  return continual_common.apply_variants(config, arg)
