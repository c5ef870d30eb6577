"""TimeGate on a folder of videos with a label table, or with the annotations of a published set.

    gating-jax --config=configs/videos_timegate.py --workdir=runs/videos --mode=train \
      --config.data.folder=/data/videos --config.data.table=/data/labels.csv \
      --config.data.train_split=/data/train.txt --config.data.test_split=/data/test.txt
    gating-jax --config=configs/videos_timegate.py:layout=breakfast \
      --workdir=runs/breakfast --mode=train \
      --config.data.folder=/data/BreakfastII_15fps_qvga_sync \
      --config.data.table=/data/segmentation_coarse
    gating-jax --config=configs/videos_timegate.py:layout=charades \
      --workdir=runs/charades --mode=train \
      --config.data.folder=/data/Charades_v1_480 --config.data.table=/data/Charades

labels.csv has the columns `video` and `label`, with several labels separated by `;`. A split file
names one video per line. The nets are those of Hussein et al., 2020, as far as they are known:
MobileNet and a 3-D ResNet, 8 frames per segment, 64 segments for Breakfast and Charades.

Needs PyAV: pip install gating-jax[video]. These sets were not available for measurements.
"""

from configs import video_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = video_common.video_config()
  config.data.name = "videos"
  config.data.segments = 64
  config.data.size = 112
  config.data.workers = 4
  config.data.validation = 0.2
  config.eval_every = 5.0  # the epoch is chosen on the videos held out
  # A few hundred films are learnt by heart without these. Turn off the mirror where left and right
  # matter to the labels.
  config.data.crop_padding = 8
  config.data.flip = True
  config.data.colour = 0.2
  # As the paper trains; training=two_stage, which is ours, is faster and has no augmentation of
  # what the gate and the classifier see.
  config.training = "end_to_end"
  config.model.light.name = "mobilenet"
  config.model.heavy.name = "resnet3d18"
  config.model.dtype = "bfloat16"
  config.pretrain.target = "label"
  config.pretrain.batch_size = 16
  config.optim.batch_size = 8  # of 64 segments each, all of which a step of end_to_end holds
  return video_common.apply_variants(config, arg)
