"""Split CIFAR-10: five tasks of two classes each, with the ResNet18 of the paper.

    gating-jax --config=configs/split_cifar10.py --workdir=runs/split_cifar10 --mode=train

Abati et al., 2020; `width=0.25` is for small machines. Time and score: docs/results/continual.md.
"""

from configs import continual_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = continual_common.continual_config()
  config.data.name = "cifar10"
  config.data.mean = (0.4914, 0.4822, 0.4465)
  config.data.std = (0.2470, 0.2435, 0.2616)
  config.data.crop_padding = 4
  config.data.flip = True
  config.model.name = "resnet18"
  config.gates.sparsity = 1.0
  config.gates.patience = 10.0
  config.optim.epochs = 200
  config.optim.learning_rate = 0.1
  config.optim.lr_drop_at = (0.5, 0.75)
  return continual_common.apply_variants(config, arg)
