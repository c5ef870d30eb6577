"""Split MNIST: five tasks of two digits each, with the SimpleCNN of the paper.

    gating-jax --config=configs/split_mnist.py --workdir=runs/split_mnist --mode=train

`split_mnist_short.py` is for small machines. For another set of the same kind, use
--config.data.name=fashion_mnist. Abati et al., 2020. Time and score: docs/results/continual.md.
"""

from configs import continual_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = continual_common.continual_config()
  config.data.name = "mnist"
  config.optim.epochs = 400
  config.optim.batch_size = 256
  return continual_common.apply_variants(config, arg)
