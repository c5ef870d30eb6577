"""Split SVHN: five tasks of two digits each, with the SimpleCNN of the paper.

    gating-jax --config=configs/split_svhn.py --workdir=runs/split_svhn --mode=train

Abati et al., 2020.
"""

from configs import continual_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = continual_common.continual_config()
  config.data.name = "svhn_cropped"
  config.optim.epochs = 800
  config.optim.batch_size = 256
  config.optim.lr_drop_at = (0.5, 0.75)
  return continual_common.apply_variants(config, arg)
