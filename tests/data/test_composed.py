import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest

from gating_jax.data import composed as module
from gating_jax.data import image_sets
from gating_jax.data.composed import CLASS_NAMES, FRAMES, SIZE, UNIT_NAMES, make_videos, motions
from gating_jax.data.image_sets import SetSource

CENTRE = 4
VELOCITIES = ((0, -1), (0, 1), (-1, 0), (1, 0), (0, 0))  # left, right, up, down, still
TOOLS = ((4, 5, 6), (6, 7, 8), (8, 9, 4), (5, 7, 9))


@pytest.fixture(scope="module")
def train():
  return make_videos("train", videos=640)


@pytest.fixture
def without_noise(monkeypatch):
  monkeypatch.setattr(module, "_NOISE", 0)


def script(units):
  return [None if unit < 0 else divmod(int(unit), 5) for unit in units]


def test_a_set_has_all_that_training_asks_for(train):
  assert len(train) == len(train.names) == len(set(train.names)) == 640
  assert train.shapes == {
    "clips": (16, FRAMES, SIZE, SIZE, 1),
    "valid": (16,),
    "label": (),
    "weight": (),
    "units": (16,),
    "relevant": (16,),
  }
  arrays = train.arrays
  assert arrays["clips"].dtype == np.uint8
  assert arrays["valid"].all()
  assert (arrays["weight"] == 1).all()
  assert np.unique(np.bincount(arrays["label"])).tolist() == [40]
  assert not train.multi_label
  assert (
    (len(train.class_names), len(train.unit_names))
    == (len(CLASS_NAMES), len(UNIT_NAMES))
    == (16, 50)
  )


def test_validation_videos_are_of_digits_that_training_has_not_seen():
  digits = image_sets.load(SetSource(image_sets.DIGITS, "train"))
  parts = [module._part_of(digits, split, 0.2) for split in ("train", "validation")]
  assert sum(len(part.labels) for part in parts) == len(digits.labels)
  assert len(parts[1].labels) == pytest.approx(0.2 * len(digits.labels), abs=10)
  assert set(parts[1].labels) == set(range(10))
  held = make_videos("validation", videos=8, held_out=0.2).arrays
  cut = make_videos("train", videos=8, held_out=0.2).arrays
  assert not np.array_equal(held["clips"], cut["clips"])
  tested = [make_videos("test", videos=8, held_out=part).arrays["clips"] for part in (0.0, 0.2)]
  np.testing.assert_array_equal(*tested)
  with pytest.raises(ValueError, match=r"held_out must be in \(0, 1\) for the validation split"):
    make_videos("validation", videos=8)


def test_classes_are_balanced_for_any_number_of_videos():
  counts = np.bincount(make_videos("test", videos=21).arrays["label"], minlength=16)
  assert set(counts) == {1, 2}


def test_the_same_arguments_make_the_same_videos_and_others_do_not():
  make = lambda split, seed: make_videos(split, videos=8, seed=seed).arrays
  first, again, seed, test = make("train", 3), make("train", 3), make("train", 4), make("test", 3)
  for name, values in first.items():
    np.testing.assert_array_equal(again[name], values, err_msg=name)
  for other in (seed, test):
    assert (other["units"] != first["units"]).mean() > 0.5
    assert (other["clips"] != first["clips"]).mean() > 0.5


def test_a_video_is_a_scenes_anchor_runs_of_moving_digits_and_clutter(train):
  lengths, others = [], []
  for units, relevant, label in zip(
    *(train.arrays[name] for name in ("units", "relevant", "label")), strict=True
  ):
    scene, steps = label // 4, script(units)
    tools = motions(scene, label % 4)
    assert tuple(tools) == TOOLS[scene]
    assert [step for step in steps if step and step[0] < 4] == [(scene, 4)] * 2
    starts = {}
    for digit in range(4, 10):
      places = [t for t, step in enumerate(steps) if step and step[0] == digit]
      starts[digit] = places[0]
      assert places in ([places[0]], [places[0], places[0] + 1])
      lengths.append(len(places))
      (moving,) = {steps[t][1] for t in places}
      assert moving == tools[digit] if digit in tools else moving < 4
      others += [] if digit in tools else [moving]
      assert relevant[places].all() == relevant[places].any() == (digit in tools)
    assert not relevant[[t for t, step in enumerate(steps) if not step or step[0] < 4]].any()
    assert starts[TOOLS[scene][0]] < starts[TOOLS[scene][2]]
  assert np.bincount(others, minlength=4).min() > 400
  assert np.bincount(lengths).tolist()[0] == 0
  assert abs(np.mean(lengths) - 1.5) < 0.05


def test_all_else_is_in_random_order(train):
  """Each of two things comes first in about half of the videos.

  The order of a scene's first and last tool is the exception.
  """
  units, label = train.arrays["units"], train.arrays["label"]
  first = np.array([[np.argmax(row // 5 == digit) for digit in range(4, 10)] for row in units])
  for scene, tools in enumerate(TOOLS):
    rows = first[label // 4 == scene]
    for a, b in itertools.combinations(range(4, 10), 2):
      share = np.mean(rows[:, a - 4] < rows[:, b - 4])
      if {a, b} == {tools[0], tools[2]}:
        assert share == (a == tools[0])
      else:
        # two thirds, where one of them is a tool that must come first or last
        assert 0.2 < share < 0.8, (scene, a, b)


def test_one_tools_motion_leaves_two_activities_and_two_tools_decide():
  for scene, tools in enumerate(TOOLS):
    seen = [motions(scene, code) for code in range(4)]
    for tool in tools:
      assert sorted(np.unique([s[tool] for s in seen], return_counts=True)[1]) == [2, 2]
    for pair in itertools.combinations(tools, 2):
      assert len({tuple(s[tool] for tool in pair) for s in seen}) == 4


def test_every_moving_digit_is_a_tool_of_two_scenes():
  assert sorted(sum(TOOLS, ())) == sorted([*range(4, 10)] * 2)


def placed(picture, row, column):
  canvas = np.zeros((SIZE, SIZE), np.uint8)
  for i, j in np.ndindex(picture.shape):
    if 0 <= row + i < SIZE and 0 <= column + j < SIZE:
      canvas[row + i, column + j] = picture[i, j]
  return canvas


def find(frame, pictures):
  """Finds label and corners in frames that show exactly one of the pictures `{bytes: label}`."""
  views = np.lib.stride_tricks.sliding_window_view(frame, (8, 8))
  return [
    (pictures[views[at].tobytes()], at)
    for at in itertools.product(range(9), repeat=2)
    if views[at].tobytes() in pictures and views[at].sum(dtype=int) == frame.sum(dtype=int)
  ]


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_clips_show_the_splits_own_digits_in_the_middle_of_their_motion(
  split, other, without_noise
):
  load = lambda name: {
    image.tobytes(): label
    for image, label in zip(
      *(lambda d: (d.pixels[..., 0], d.labels))(
        image_sets.load(SetSource(image_sets.DIGITS, name))
      ),
      strict=True,
    )
  }
  own, others = load(split), load(other)
  assert not own.keys() & others.keys()
  scrambled = {bytes(sorted(image)) for image in own}
  arrays = make_videos(split, videos=3).arrays
  units, clips = arrays["units"].ravel(), arrays["clips"].reshape(-1, FRAMES, SIZE, SIZE)
  assert {unit % 5 for unit in units if unit >= 0} == set(range(5))
  for unit, clip in zip(units, clips, strict=True):
    centre = clip[CENTRE]
    if unit < 0:
      assert bytes(sorted(centre[centre > 0])) in {image.lstrip(b"\0") for image in scrambled}
      assert not find(centre, own)
      continue
    matches = find(centre, own)
    assert {label for label, _ in matches} == {unit // 5}
    row, column = matches[0][1]
    dy, dx = VELOCITIES[unit % 5]
    picture = centre[row : row + 8, column : column + 8]
    for f, frame in enumerate(clip):
      np.testing.assert_array_equal(
        frame, placed(picture, row + (f - CENTRE) * dy, column + (f - CENTRE) * dx)
      )


def test_a_centre_frame_shows_no_motion_and_the_first_frame_does(train):
  units = train.arrays["units"].ravel()
  clips = train.arrays["clips"].reshape(-1, FRAMES, SIZE, SIZE).astype(np.float64)
  place = np.arange(SIZE) - (SIZE - 1) / 2

  # Mean and standard error of the digits' weight by place, both axes.
  def off_centre(frame, motion):
    shown = clips[(units >= 20) & (units % 5 == motion), frame]
    shown = shown / shown.sum(axis=(1, 2), keepdims=True)
    moments = np.stack([shown.sum(2) @ place, shown.sum(1) @ place], axis=1)
    return moments.mean(0), moments.std(0) / np.sqrt(len(moments))

  overall = np.mean([off_centre(CENTRE, motion)[0] for motion in range(4)], axis=0)
  for motion in range(4):
    mean, error = off_centre(CENTRE, motion)
    np.testing.assert_array_less(np.abs(mean - overall), 4 * error)
    start = off_centre(0, motion)[0] - mean
    axis = 1 if motion < 2 else 0
    assert np.sign(start[axis]) == -VELOCITIES[motion][axis]
    assert abs(start[axis]) > 20 * error[axis]


def test_noise_has_the_spread_it_says(train):
  # Never a digit: half a normal distribution, clipped.
  corner = train.arrays["clips"][:, :, CENTRE, 0, 0].astype(float)
  assert abs((corner == 0).mean() - 0.5) < 0.02
  assert np.sqrt((corner**2).mean() * 2) == pytest.approx(24, rel=0.05)


@pytest.mark.slow
def test_context_is_needed_and_motion_too(train):
  """One segment tells little, four less than half, all everything; centre frames only the scene."""
  probe = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "composed_probe.py"))[
    "accuracy"
  ]
  test = make_videos("test", videos=480)
  one, four, all_, centres = (
    probe(train.arrays, test.arrays, count, motions=moving)
    for count, moving in ((1, True), (4, True), (16, True), (16, False))
  )
  assert 0.1 < one < 0.22
  assert one + 0.2 < four < 0.55
  assert all_ > 0.98
  assert 0.2 < centres < 0.3


@pytest.mark.parametrize("segments", [14, 31])
def test_videos_are_of_any_length_from_the_least(segments):
  video = make_videos("test", videos=16, segments=segments)
  assert video.shapes["clips"] == (segments, FRAMES, SIZE, SIZE, 1)
  assert (np.sum(video.arrays["units"] >= 0, axis=1) <= 14).all()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: make_videos("train", videos=0), "videos must be >= 1; got 0"),
    (
      lambda: make_videos("train", videos=1, segments=13),
      "segments must be >= 14, the length of the longest activity",
    ),
    (
      lambda: make_videos("valid", videos=1),
      "data split of digits must be 'train' or 'test'; got 'valid'",
    ),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    call()
