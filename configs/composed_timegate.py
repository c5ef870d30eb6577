"""TimeGate on the embedded task: long videos composed of scikit-learn's handwritten digits.

    gating-jax --config=configs/composed_timegate.py --workdir=runs/timegate --mode=train
    gating-jax --config=configs/composed_timegate.py:selection=uniform,share=0.25 \
      --workdir=runs/uniform --mode=train

After Hussein et al., 2020; the task is described in gating_jax/data/composed.py. Time and score:
docs/results/video.md.
"""

from configs import video_common


def get_config(arg: str = ""):
  """Returns the config, with the variants in `arg`."""
  config = video_common.video_config()
  config.model.heavy.stem = "small"
  config.model.light.name = "resnet8"
  config.model.light.width = 0.5
  config.model.heavy.width = 0.25
  config.model.gate.concepts = 32
  config.model.pooling = "attention"
  config.pretrain.epochs = 12
  config.optim.epochs = 240  # gates need them; other selections converge in 60
  config.model.gate.initial_open = 0.85
  config.loss.sparsity.ramp_end = 0.6
  # A smaller coefficient lets the gates of some seeds close permanently before they learn anything.
  config.loss.batch_shaping.coefficient = 3.0
  config.loss.batch_shaping.b = 0.9
  # Fraction of segments; including the light net, this is less than half of the MACs.
  config.loss.sparsity.target = 0.4
  config.checkpoint_every = 5.0
  return video_common.apply_variants(config, arg)
