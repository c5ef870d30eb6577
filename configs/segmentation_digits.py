"""Segmentation on the embedded task: scenes of scikit-learn's digits, a class for every pixel.

    gating-jax --config=configs/segmentation_digits.py --workdir=runs/scenes --mode=train
    gating-jax --config=configs/segmentation_digits.py:gates=none \
      --workdir=runs/scenes_ungated --mode=train

After Bejnordi et al., ICLR 2020, section 4.2 (Cityscapes); the task is described in
gating_jax/data/scenes.py. Time and score: docs/results/images.md.
"""

from configs import common, segmentation_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = segmentation_common.segmentation_config()
  config.model.width = 0.5
  config.model.output_stride = 2
  config.optim.epochs = 6
  config.optim.batch_size = 32
  config.optim.schedule = "cosine"
  config.checkpoint_every = 1.0
  config.eval_every = 1.0
  return common.apply_variants(config, arg)
