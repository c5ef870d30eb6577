"""ResNet20 on CIFAR-10, channel gates with batch-shaping and L0, after Bejnordi et al., ICLR 2020.

    gating-jax --config=configs/cifar10_resnet20.py --workdir=runs/cifar10 --mode=train

The defaults are the full recipe of 500 epochs. It has not been run; shorter ones have, see
docs/results/images.md.

From the authors: the prior, gates on single channels, noise. From independent re-implementations
that agree: optimiser, schedules, coefficient and corners of the batch-shaping term, corners of the
L0 term. Ours: the L0 coefficient (theirs is unknown), the initial open rate, and the reduction over
gates (`layer_mean`; re-implementations sum).

Variants, joined by commas after a colon: `gates=none`, `epochs=10`, `batch=128`, `sparsity=2.0`,
`budget=0.5`, `bas=0`, `width=2`, `inner=4` (blocks wider inside), `schedule=cosine`, `model=vgg8`,
`block=8`, `noise=0.25`, `noise_to=0`.

`gates=` sets what is gated: `none`, `channel`, `layer` as in ConvNet-AIG, `static` channels by L0
regularisation, `random` channels, `exits` after each stage as in BranchyNet, `experts` and
`sparse_experts` in place of the last stage. A `budget` needs `channel`, `static` or `layer`.

`regulariser=` sets what keeps gates conditional: `batch_shaping` with L0; `sparsity` (L0 alone);
and `entropy`, `decision_entropy`, `away_from_half` and `none`, which failed for the authors too.
"""

from configs import common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = common.image_config()
  config.data.name = "cifar10"
  config.data.mean = (0.4914, 0.4822, 0.4465)
  config.data.std = (0.2023, 0.1994, 0.2010)
  config.data.crop_padding = 4
  config.data.flip = True
  config.optim.epochs = 500
  config.optim.batch_size = 256
  config.loss.sparsity.coefficient = 0.5
  config = common.apply_variants(config, arg)
  config.eval_every = max(1.0, config.optim.epochs / 10)
  return config
