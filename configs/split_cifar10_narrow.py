"""Split CIFAR-10 with a ResNet18 of an eighth of the width, in a few epochs per task on one core.

    gating-jax --config=configs/split_cifar10_narrow.py --workdir=runs/split_cifar10_narrow \
      --mode=train

The paper's recipe is changed in the same way, and for the same reasons, as in split_mnist_short.py.
Time and score: docs/results/continual.md.
"""

from configs import continual_common, split_cifar10


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = split_cifar10.get_config()
  config.model.width = 0.125
  config.optim.epochs = 2
  config.optim.batch_size = 16
  config.optim.learning_rate = 0.06
  config.optim.grad_clip_norm = 5.0
  config.optim.gate_lr_multiplier = 50.0
  config.optim.schedule = "cosine"
  config.optim.lr_drop_at = ()
  config.replay.batch_size = 16
  config.gates.sparsity = 2.0
  config.gates.patience = 0.2
  config.gates.threshold = 0.5
  config.gates.when_full = "reuse"
  config.model.gate.noise_scale = 0.25
  config.log_every = 200
  return continual_common.apply_variants(config, arg)
