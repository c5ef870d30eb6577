"""ResNet18, 34 or 50 of any width on ImageNet, channel gates with batch-shaping and L0, read from disk while it trains.

    gating-jax --config=configs/imagenet_resnet18.py --workdir=runs/imagenet --mode=train
    gating-jax --config=configs/imagenet_resnet18.py:model=resnet50,budget=0.45 --workdir=runs/resnet50 --mode=train

The recipe of Bejnordi et al., ICLR 2020, for ImageNet is not known. The schedules of the gates' losses are those of the
CIFAR-10 recipe, in proportion to the epochs; learning rate, weight decay, crops and epochs are those commonly used for
ResNets, and are ours. This has not been run on ImageNet, which was not at hand. TFDS makes `imagenet2012` from files
that you download yourself; if it is not there, a run says where to put them. It trains on all devices there are, in
bfloat16; the batch is over all of them, and the learning rate is for 256. For wider: `width=2`; ungated: `gates=none`.
"""

from configs import common


def get_config(arg: str = ""):
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
