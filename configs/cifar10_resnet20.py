"""ResNet20 on CIFAR-10, channel gates with batch-shaping and L0. Bejnordi et al., ICLR 2020, section 4.1.

    gating-jax --config=configs/cifar10_resnet20.py --workdir=runs/cifar10 --mode=train

The defaults are the full recipe, 500 epochs (independent re-implementations agree on it; the paper's own text is not at
hand). It has not been run: a few epochs have, see docs/results.md. Variants, joined by commas after a colon:
`gating=none`, `epochs=10`, `batch=128`, `l0=2.0`, `bas=0` and `schedule=cosine`.
"""

from configs import common


def get_config(arg: str = ""):
  config = common.image_config()
  config.data.name = "cifar10"
  config.data.mean = (0.4914, 0.4822, 0.4465)
  config.data.std = (0.2023, 0.1994, 0.2010)
  config.data.pad = 4
  config.data.flip = True
  config.optim.epochs = 500
  config.optim.batch_size = 256
  config.loss.sparsity.coefficient = 0.5
  return common.apply_variants(config, arg)
