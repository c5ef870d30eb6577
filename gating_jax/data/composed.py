"""Synthetic long videos of scikit-learn's handwritten digits, with ground truth for every segment.

A video is T segments of F frames in which one digit stands still or moves. Digit class and motion
together are the segment's unit action. An activity is a scene and a motion for each of the scene's
three tools:

- two segments show the scene's anchor, a still digit of class 0 to 3;
- each of the six digit classes 4 to 9 moves in a run of one or two segments. Three of them are the
  scene's tools, and their motions distinguish the activities of the scene; the other three move at
  random and mean nothing here, though they are tools in other scenes;
- the rest is clutter: moving digits with their pixels scrambled.

The first tool's run comes before the last one's; everything else is in random order. So every unit
action occurs in several activities, and one tool's motion leaves two activities of the scene open.
A centre frame shows no motion, and only the anchor, somewhere else in the video, tells whether a
moving digit matters.

Axes: M videos, T segments, F frames, H = W pixels.
Reference: after the unit actions of Breakfast (Kuehne et al., 2014) as used by Hussein et al.,
2020.
"""

from __future__ import annotations

import numpy as np

from gating_jax.data import image_sets
from gating_jax.data.videos import VideoArrays

NAME = "composed"
FRAMES, SIZE = 8, 16
# Two anchors and six runs of up to two segments.
MIN_SEGMENTS = 14

# Rows and columns by which the digit moves from frame to frame.
_MOTIONS = {
  "left": (0, -1),
  "right": (0, 1),
  "up": (-1, 0),
  "down": (1, 0),
  "still": (0, 0),
}
_STILL = list(_MOTIONS).index("still")
# Tools of each scene; every digit class is a tool of two scenes.
_TOOLS = (
  (4, 5, 6),
  (6, 7, 8),
  (8, 9, 4),
  (5, 7, 9),
)
# Which of its two motions each tool has, per activity. Any two bits give the third, so no single
# tool decides and any two do.
_CODES = (
  (0, 0, 0),
  (0, 1, 1),
  (1, 0, 1),
  (1, 1, 0),
)
# Standard deviation of a pixel, in levels of uint8.
_NOISE = 24

UNIT_NAMES = tuple(f"{digit} {motion}" for digit in range(10) for motion in _MOTIONS)
CLASS_NAMES = tuple(
  f"scene {scene}, activity {code}" for scene in range(len(_TOOLS)) for code in range(len(_CODES))
)


def composed(split: str, *, videos: int, segments: int = 16, seed: int = 0) -> VideoArrays:
  """Makes a split; the same arguments make the same videos. Splits share no digit image.

  Args:
    split: `train` or `test`.
    videos: M.
    segments: T, at least `MIN_SEGMENTS`.
    seed: of everything random.
  Returns:
    Videos of 16 classes, balanced. `units` is the unit action of each segment, -1 for clutter;
    `relevant` marks the tools of the video's scene.
  Raises:
    ValueError: no videos, or too few segments.

  >>> composed("test", videos=2).arrays["clips"].shape
  (2, 16, 8, 16, 16, 1)
  """
  if not videos >= 1:
    raise ValueError(f"videos must be >= 1; got {videos}")
  if not segments >= MIN_SEGMENTS:
    raise ValueError(
      f"segments must be >= {MIN_SEGMENTS}, the length of the longest activity; got {segments}"
    )
  digits = image_sets.load(image_sets.DIGITS, split)
  # The splits differ in their random numbers as well as in their digits.
  rng = np.random.default_rng((seed, split == "test"))
  labels = rng.permutation(np.arange(videos) % len(CLASS_NAMES)).astype(np.int32)
  scripts = [_script(rng, int(label), segments) for label in labels]
  units, relevant = (np.stack(rows) for rows in zip(*scripts, strict=True))
  clips = _render(rng, digits, units.ravel()).reshape(videos, segments, FRAMES, SIZE, SIZE, 1)
  arrays = {
    "clips": clips,
    "valid": np.ones((videos, segments), bool),
    "label": labels,
    "weight": np.ones(videos, np.float32),
    "units": units,
    "relevant": relevant,
  }
  return VideoArrays(arrays, CLASS_NAMES, tuple(f"{split} {i}" for i in range(videos)), UNIT_NAMES)


def motions(scene: int, code: int) -> dict[int, int]:
  """Returns the motion of each tool of an activity, by digit class.

  A tool has two possible motions in a scene; the activities of the scene differ in which it has.
  """
  return {
    # The pair of motions, left and right or up and down, follows from digit and scene.
    digit: 2 * ((digit + scene) % 2) + bit
    for digit, bit in zip(_TOOLS[scene], _CODES[code], strict=True)
  }


def _script(rng: np.random.Generator, label: int, segments: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws the unit actions `[T]` of one video, and marks those that belong to its activity."""
  scene, code = divmod(label, len(_CODES))
  tools = motions(scene, code)
  moving = range(4, 10)
  # A run: unit action, whether it is relevant, number of segments.
  runs = [
    (_unit(digit, tools.get(digit, rng.integers(4))), digit in tools, rng.integers(1, 3))
    for digit in moving
  ]
  runs += [(_unit(scene, _STILL), False, 1)] * 2
  runs += [(-1, False, 1)] * (segments - sum(length for *_, length in runs))
  order = rng.permutation(len(runs))
  # The first tool's run and the last one's keep their two places, in this order.
  ends = np.isin(order, [moving.index(_TOOLS[scene][0]), moving.index(_TOOLS[scene][-1])])
  order[ends] = [moving.index(_TOOLS[scene][i]) for i in (0, -1)]
  units, relevant, lengths = zip(*(runs[i] for i in order), strict=True)
  return np.repeat(np.array(units, np.int32), lengths), np.repeat(relevant, lengths)


# The index of a unit action in `UNIT_NAMES`.
def _unit(digit: int, motion: int) -> int:
  return len(_MOTIONS) * digit + int(motion)


def _render(rng: np.random.Generator, digits: image_sets.Images, units: np.ndarray) -> np.ndarray:
  """Renders units as uint8 `[n, F, H, W]`: a digit of each unit's class, in motion.

  The digit is in the middle of its motion in the centre frame.
  """
  classes, motion = np.divmod(units, len(_MOTIONS))
  # Units of -1 have class -1; any digit will do, since its pixels are scrambled below.
  clutter = units < 0
  shown = np.empty(len(units), int)
  for c in np.unique(classes):
    shown[classes == c] = rng.choice(
      np.flatnonzero((digits.labels == c) | (c < 0)), np.sum(classes == c)
    )
  images = digits.pixels[shown, ..., 0]
  images[clutter] = rng.permuted(images[clutter].reshape(-1, images[0].size), axis=1).reshape(
    -1, *images.shape[1:]
  )
  motion[clutter] = rng.integers(len(_MOTIONS), size=clutter.sum())
  velocity = np.array(list(_MOTIONS.values()))[motion]
  # The place in the centre frame. A moving digit leaves the image by two pixels at most.
  corner = rng.integers(2, SIZE - images.shape[1] - 1, (len(units), 2))
  # [n, F, 2]: the place in each frame.
  corner = corner[:, None] + (np.arange(FRAMES) - FRAMES // 2)[:, None] * velocity[:, None]
  # A window of the padded digit, moved against the motion, shows the digit at its place.
  canvas = np.pad(images, ((0, 0), (SIZE, SIZE), (SIZE, SIZE)))
  views = np.lib.stride_tricks.sliding_window_view(canvas, (SIZE, SIZE), axis=(1, 2))
  frames = rng.standard_normal((len(units), FRAMES, SIZE, SIZE), np.float32)
  frames *= _NOISE
  frames += views[np.arange(len(units))[:, None], SIZE - corner[..., 0], SIZE - corner[..., 1]]
  return frames.round(out=frames).clip(0, 255, out=frames).astype(np.uint8)
