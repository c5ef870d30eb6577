"""ResNet18 on a set of 50 classes of ImageNet at 64 x 64, channel gates with batch-shaping and L0.

    gating-jax --config=configs/imagenet50.py --workdir=runs/imagenet50 --mode=train
    gating-jax --config=configs/imagenet50.py:epochs=5,width=0.25,gates=none \
      --workdir=runs/ungated --mode=train

`data.name` is any TFDS set of such images, by the name of its folder; here the first 50 classes of
Tiny ImageNet. The recipe of Bejnordi et al., ICLR 2020, for ImageNet is unknown; this one is ours,
with the schedules of the gates' losses of CIFAR-10.

The loader streams and the net computes in bfloat16, as in configs/imagenet_resnet18.py. The set
also fits on a device: use `--config.data.loader=resident`, without `--config.data.crop_area`.
"""

from configs import common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = common.imagenet_config()
  config.data.name = "tiny_imagenet50"
  config.data.crop_area = 0.25
  config.optim.batch_size = 128
  config = common.apply_variants(config, arg)
  config.eval_every = max(1.0, config.optim.epochs / 10)
  return config
