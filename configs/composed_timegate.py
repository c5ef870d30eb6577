"""TimeGate on the embedded task: long videos composed of scikit-learn's handwritten digits.

    gating-jax --config=configs/composed_timegate.py --workdir=runs/timegate --mode=train
    gating-jax --config=configs/composed_timegate.py:selection=uniform,share=0.25 --workdir=runs/uniform --mode=train

After Hussein et al., 2020; the task is described in gating_jax/data/composed.py. Time and score: docs/results.md.
"""

from configs import video_common


def get_config(arg: str = ""):
  config = video_common.video_config()
  config.model.heavy.stem = "small"
  config.model.light.name = "resnet8"
  config.model.light.width = 0.5
  config.model.heavy.width = 0.25
  config.model.gate.concepts = 32
  config.model.pooling = "attention"
  config.pretrain.epochs = 12
  config.optim.epochs = 240  # gates need them; other selections are done after 60
  config.model.gate.initial_open = 0.85
  config.loss.sparsity.full = 0.6
  config.loss.batch_shaping.coefficient = (
    3.0  # else gates of some seeds close for good before they know what matters
  )
  config.loss.batch_shaping.b = 0.9
  config.loss.sparsity.target = (
    0.4  # of the segments: with the light net, less than half of the multiply-accumulates
  )
  config.checkpoint_every = 5.0
  return video_common.apply_variants(config, arg)
