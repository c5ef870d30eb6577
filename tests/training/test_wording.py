from gating_jax.training.wording import headline


def test_a_line_of_training_is_in_words():
  line = headline(
    {
      "loss": 4.094,
      "cross_entropy": 2.167,
      "accuracy": 0.2553,
      "batch_shaping": 10.13,
      "batch_shaping_coefficient": 0.75,
      "l0": 0.8103,
      "l0_coefficient": 0.5,
      "mac_ratio": 0.816,
      "gates/batch_shaping_mean": 0.1,
      "gate_rate/a": 0.5,
      "gate_rate/b": 1.0,
      "gradient_norm": 1.8,
      "state_norm": 55.0,
    }
  )
  assert line == (
    "accuracy 25.5 %, loss 4.094 (cross-entropy 2.167, batch-shaping 10.13, L0 0.8103), MACs "
    "81.6 %, open gates 75.0 %"
  )


def test_a_line_of_long_videos_tells_segments_from_channels():
  line = headline(
    {
      "loss": 1.0,
      "classification": 0.5,
      "accuracy": 0.75,
      "share": 0.4,
      "mean": 0.4,
      "batch_shaping": 0.25,
      "channels_l0": 0.125,
      "channels_mac_ratio": 0.5,
      "gate_rate/segments": 0.1,
      "gate_rate/conv": 0.75,
    }
  )
  assert line == (
    "accuracy 75.0 %, loss 1 (classification 0.5, penalty on segments 0.4, batch-shaping 0.25, L0 "
    "of channel gates 0.125), MACs of the heavy net 50.0 %, segments chosen 40.0 %, open gates "
    "75.0 %"
  )


def test_a_line_without_a_loss_has_its_terms():
  assert (
    headline({"critic_loss": -0.5, "distance": 2.0, "gradient_norm": 1.0})
    == "critic loss -0.5, distance 2"
  )
