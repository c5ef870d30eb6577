"""TimeGate on features made elsewhere: a file of `[T, ...]` for each video, .npy or .npz, with a label table.

    gating-jax --config=configs/features_timegate.py --workdir=runs/features --mode=train \
      --config.data.folder=/data/mobilenet --config.data.heavy_folder=/data/i3d --config.data.table=/data/labels.csv \
      --config.data.train_split=/data/train.txt --config.data.test_split=/data/test.txt

The gate sees the features in `folder`, the classifier those of the chosen segments in `heavy_folder`, or the same.
Of a published set: layout=charades and the like, as in configs/videos_timegate.py. What making a segment's features
costs is to be told: --config.data.light_macs and --config.data.heavy_macs.
"""

from configs import video_common


def get_config(arg: str = ""):
  config = video_common.video_config()
  config.data.name = "features"
  config.data.segments = 64
  config.model.light.name = "features"
  config.model.heavy.name = "features"
  config.pretrain.epochs = 0  # there are no nets to train
  return video_common.apply_variants(config, arg)
