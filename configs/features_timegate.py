"""TimeGate on precomputed features: a .npy or .npz file of `[T, ...]` per video, and a label table.

    gating-jax --config=configs/features_timegate.py --workdir=runs/features --mode=train \
      --config.data.folder=/data/mobilenet --config.data.heavy_folder=/data/i3d \
      --config.data.table=/data/labels.csv \
      --config.data.train_split=/data/train.txt --config.data.test_split=/data/test.txt

The gate sees the features in `folder`; the classifier sees those of the chosen segments in
`heavy_folder`, by default the same. For published sets use layout=charades and the like, as in
configs/videos_timegate.py. The MACs of extracting a segment's features are given by
--config.data.light_macs and --config.data.heavy_macs.
"""

from configs import video_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = video_common.video_config()
  config.data.name = "features"
  config.data.segments = 64
  config.data.validation = 0.2
  config.eval_every = 5.0  # the epoch is chosen on the videos held out
  config.model.light.name = "features"
  config.model.heavy.name = "features"
  config.pretrain.epochs = 0  # there are no nets to train
  return video_common.apply_variants(config, arg)
