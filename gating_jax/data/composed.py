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
A centre frame shows no motion, and only the anchor, somewhere else in the video, shows whether a
moving digit matters.

Axes: M videos, T segments, F frames, H = W pixels.
Reference: after the unit actions of Breakfast (Kuehne et al., 2014) as used by Hussein et al.,
2020.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from gating_jax.data import image_sets, tasks
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

UNIT_NAMES = tuple(f"{digit} {motion}" for digit, motion in itertools.product(range(10), _MOTIONS))
CLASS_NAMES = tuple(
  f"scene {scene}, activity {code}"
  for scene, code in itertools.product(range(len(_TOOLS)), range(len(_CODES)))
)


def make_videos(
  split: str, *, videos: int, segments: int = 16, seed: int = 0, held_out: float = 0.0
) -> VideoArrays:
  """Makes a split; the same arguments make the same videos. Splits share no digit image.

  Args:
    split: `train`, `validation` or `test`.
    videos: M.
    segments: T, at least `MIN_SEGMENTS`.
    seed: of everything random.
    held_out: fraction of the training digits, in (0, 1), of which `validation` is made and `train`
      is not; 0 for no such split.
  Returns:
    Videos of 16 classes, balanced. `units` is the unit action of each segment, -1 for clutter;
    `relevant` marks the tools of the video's scene.
  Raises:
    ValueError: no videos, too few segments, or a validation split of nothing.

  >>> make_videos("test", videos=2).arrays["clips"].shape
  (2, 16, 8, 16, 16, 1)
  """
  if not videos >= 1:
    raise ValueError(f"videos must be >= 1; got {videos}")
  if not segments >= MIN_SEGMENTS:
    raise ValueError(
      f"segments must be >= {MIN_SEGMENTS}, the length of the longest activity; got {segments}"
    )
  if split == "validation" and not held_out:
    raise ValueError("held_out must be in (0, 1) for the validation split; got 0")
  of_digits = "train" if split == "validation" else split
  digits = image_sets.load(image_sets.SetSource(image_sets.DIGITS, of_digits))
  if held_out and split != "test":
    digits = _part_of(digits, split, held_out)
  # The splits differ in their random numbers as well as in their digits.
  rng = np.random.default_rng((seed, {"train": 0, "test": 1, "validation": 2}[split]))
  labels = rng.permutation(np.arange(videos) % len(CLASS_NAMES)).astype(np.int32)
  units = np.empty((videos, segments), np.int32)
  relevant = np.empty((videos, segments), bool)
  for video, label in enumerate(labels):
    units[video], relevant[video] = _script(rng, int(label), segments)
  clips = _render(rng, digits, units.ravel()).reshape(videos, segments, FRAMES, SIZE, SIZE, 1)
  arrays = {
    "clips": clips,
    "valid": np.ones((videos, segments), bool),
    "label": labels,
    "weight": np.ones(videos, np.float32),
    "units": units,
    "relevant": relevant,
  }
  names = tuple(f"{split} {i}" for i in range(videos))
  return VideoArrays(arrays, CLASS_NAMES, names, unit_names=UNIT_NAMES)


def _part_of(digits: image_sets.Images, split: str, held_out: float) -> image_sets.Images:
  """Returns the training digits of which a split is made, where some are held out."""
  # A fixed seed: the same digits are held out in every run.
  held = tasks.hold_out(digits.labels, held_out, np.random.default_rng(0))
  if split == "validation":
    return digits.take(held)
  return digits.take(np.setdiff1d(np.arange(len(digits.labels)), held))


def motions(scene: int, code: int) -> dict[int, int]:
  """Returns the motion of each tool of an activity, by digit class.

  A tool has two possible motions in a scene; the activities of the scene differ in which it has.
  """
  found = {}
  for digit, bit in zip(_TOOLS[scene], _CODES[code], strict=True):
    # The pair of motions, left and right or up and down, follows from digit and scene.
    pair = (digit + scene) % 2
    found[digit] = 2 * pair + bit
  return found


class _Run(NamedTuple):
  """Successive segments that show one unit action.

  Attributes:
    unit: -1 for clutter.
    relevant: whether the unit action belongs to the video's activity.
    length: number of segments.
  """

  unit: int
  relevant: bool
  length: int


def _script(rng: np.random.Generator, label: int, segments: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws the unit actions `[T]` of one video, and marks those that belong to its activity."""
  scene, code = divmod(label, len(_CODES))
  tools = motions(scene, code)
  moving = range(4, 10)
  anchor = _Run(_unit(scene, _STILL), relevant=False, length=1)
  clutter = _Run(-1, relevant=False, length=1)
  runs, left = [], segments - 2
  for digit in moving:
    # Drawn for tools too, so that the random numbers that follow do not depend on the activity.
    random_motion = int(rng.integers(4))
    unit = _unit(digit, tools.get(digit, random_motion))
    run = _Run(unit, relevant=digit in tools, length=int(rng.integers(1, 3)))
    runs.append(run)
    left -= run.length
  runs += [anchor] * 2 + [clutter] * left
  order = rng.permutation(len(runs))
  # The first tool's run and the last one's keep their two places, in this order.
  first_and_last = [moving.index(_TOOLS[scene][0]), moving.index(_TOOLS[scene][-1])]
  order[np.isin(order, first_and_last)] = first_and_last
  units, relevant = [], []
  for place in order:
    run = runs[place]
    units += [run.unit] * run.length
    relevant += [run.relevant] * run.length
  return np.array(units, np.int32), np.array(relevant, bool)


def _unit(digit: int, motion: int) -> int:
  """Returns the index of a unit action in `UNIT_NAMES`."""
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
    candidates = np.flatnonzero((digits.labels == c) | (c < 0))
    shown[classes == c] = rng.choice(candidates, np.sum(classes == c))
  images = digits.pixels[shown, ..., 0]
  scrambled = rng.permuted(images[clutter].reshape(-1, images[0].size), axis=1)
  images[clutter] = scrambled.reshape(-1, *images.shape[1:])
  motion[clutter] = rng.integers(len(_MOTIONS), size=clutter.sum())
  velocity = np.array(list(_MOTIONS.values()))[motion]
  # The place in the centre frame. A moving digit leaves the image by two pixels at most.
  centre = rng.integers(2, SIZE - images.shape[1] - 1, (len(units), 2))
  # [n, F, 2]: the place in each frame.
  steps = np.arange(FRAMES) - FRAMES // 2
  corner = centre[:, None] + steps[:, None] * velocity[:, None]
  # A window of the padded digit, moved against the motion, shows the digit at its place.
  canvas = np.pad(images, ((0, 0), (SIZE, SIZE), (SIZE, SIZE)))
  views = np.lib.stride_tricks.sliding_window_view(canvas, (SIZE, SIZE), axis=(1, 2))
  digit = np.arange(len(units))[:, None]
  frames = rng.standard_normal((len(units), FRAMES, SIZE, SIZE), np.float32)
  frames *= _NOISE
  frames += views[digit, SIZE - corner[..., 0], SIZE - corner[..., 1]]
  return frames.round(out=frames).clip(0, 255, out=frames).astype(np.uint8)
