"""Five tasks of two digits each, from scikit-learn's handwritten digits: no download needed.

    gating-jax --config=configs/split_digits.py --workdir=runs/split_digits --mode=train
    gating-jax --config=configs/split_digits.py:method=fine_tuning --workdir=runs/forgetting \
      --mode=train

The set has 1,797 images of 8 x 8 pixels. After Abati et al., 2020.
Time and score: docs/results/continual.md.
"""

from configs import continual_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = continual_common.continual_config()
  config.optim.epochs = 30
  config.optim.batch_size = 32
  config.optim.learning_rate = 0.05
  config.gates.sparsity = 10.0
  config.gates.patience = 5.0
  config.model.gate.noise_scale = 0.25
  config.replay.images = 100
  return continual_common.apply_variants(config, arg)
