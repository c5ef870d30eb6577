"""ResNet20 on scikit-learn's handwritten digits (1,797 images of 8 x 8): the quickstart.

    gating-jax --config=configs/digits_resnet20.py --workdir=runs/digits --mode=train

The recipe of Bejnordi et al., ICLR 2020 (CIFAR-10), shortened.
Time and score: docs/results/images.md.
"""

from configs import common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = common.image_config()
  config.data.name = "digits"
  config.data.crop_padding = 1
  config.optim.epochs = 40
  config.loss.batch_shaping.reduction = "sum"  # so few steps need the stronger pull
  config.loss.sparsity.coefficient = 2.0
  config.optim.schedule = "cosine"
  config = common.apply_variants(config, arg)
  config.eval_every = max(1.0, config.optim.epochs / 10)
  return config
