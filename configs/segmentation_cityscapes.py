"""Cityscapes through TFDS: a gated ResNet50 with pyramid pooling, 19 classes.

    gating-jax --config=configs/segmentation_cityscapes.py --workdir=runs/cityscapes --mode=train

After Bejnordi et al., ICLR 2020, section 4.2, and Zhao et al., 2017. Neither recipe is known in
full: epochs, batch and learning rate are our choice, the gates' schedule is that of CIFAR-10, and
nothing is pretrained. Not measured.

Needs the files of www.cityscapes-dataset.com, which TFDS cannot download; without them the command
says what to do. TFDS needs TensorFlow to prepare them once; training does not.
"""

from configs import common, segmentation_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = segmentation_common.segmentation_config()
  config.data.name = "cityscapes"
  config.data.size = (1024, 2048)
  config.data.crop = (768, 768)
  config.data.flip = True
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.workers = 8
  config.model.name = "resnet50"
  config.model.output_stride = 8
  config.model.head = 512
  config.optim.epochs = 200
  config.optim.batch_size = 16
  config.optim.learning_rate = 0.02
  config.optim.schedule = "cosine"
  config.optim.warmup = 0.02
  return common.apply_variants(config, arg)
