"""ResNet18, 34 or 50 of any width on ImageNet, channel gates with batch-shaping and L0.

    gating-jax --config=configs/imagenet_resnet18.py --workdir=runs/imagenet --mode=train
    gating-jax --config=configs/imagenet_resnet18.py:model=resnet50,budget=0.45 \
      --workdir=runs/resnet50 --mode=train

The recipe of Bejnordi et al., ICLR 2020, for ImageNet is unknown. The schedules of the gates'
losses are those of the CIFAR-10 recipe, in proportion to the epochs. Learning rate, weight decay,
crops and epochs are our choice, as commonly used for ResNets. This config has not been run on
ImageNet, which was not available.

Images are read from disk during training. TFDS makes `imagenet2012` from files that you download
yourself; if they are missing, a run says where to put them. Training uses all devices, in bfloat16;
the batch size is over all of them, and the learning rate is for 256. Wider: `width=2`; ungated:
`gates=none`.
"""

from configs import common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = common.imagenet_config()
  config.data.name = "imagenet2012"
  config.data.test_split = "validation"
  config.data.image_size = 224
  config.data.crop_area = 0.08
  config.data.workers = 8
  config.optim.batch_size = 256
  config.optim.weight_decay = 1e-4
  config.optim.warmup = 0.05
  config = common.apply_variants(config, arg)
  config.eval_every = max(1.0, config.optim.epochs / 10)
  return config
