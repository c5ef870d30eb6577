"""Worlds: images whose look decides what their labels mean, a control for conditional computation.

A digit lies on the texture of one of W worlds. A world moves and turns the four quarters of its
digits in its own way, and names the digits by a permutation of its own:

    label = permutation[world][digit]

The world is easy to see, and decides everything else. A network that computes the same for all
images has to solve W problems with all of its filters; one with gates can spend them on the world
at hand. Where gates work, a gated network beats an ungated one of equal cost here; where they do
not, they are broken.

The digits are scikit-learn's, with the splits `train` and `test` of the set `digits`. Image i
depends on the seed, the split and i alone, so that a split has as many images as one asks for.

Axes: M images, W worlds, H and W pixels of 16 x 16.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np

from gating_jax.checks import one_of
from gating_jax.data import image_sets
from gating_jax.data.image_sets import Images
from gating_jax.ops import arguments

# Names of the set, without and with the number of the world as the last channel of its images.
NAME, TOLD = NAMES = ("worlds", "worlds_told")
WORLDS = 8
SIZE = 16
CLASSES = 10
# Images of a split that names no number.
IMAGES = {"train": 200_000, "test": 10_000}
# Sides of a digit, and of the canvas on which it is drawn before its pixels are averaged.
_DIGIT, _CANVAS = 12, 24
# Largest turn in radians, change of scale, shear, and shift in units of half the canvas.
_TURN, _SCALE, _SHEAR, _SHIFT = 0.25, 0.1, 0.15, 0.06
# Waves of a texture, their lengths in periods per image, and their strength.
_WAVES, _LENGTHS, _CONTRAST = 3, (1.0, 3.2), 0.12
# Standard deviation of the noise on pixels in [0, 1].
_NOISE = 0.03
# Images with a random stream of their own; a block is made as a whole.
_BLOCK = 2_000


@dataclasses.dataclass(frozen=True)
class Worlds:
  """Images of worlds.

  Attributes:
    pixels: `[M, 16, 16, 3]` uint8.
    labels: `[M]` int32, the digit as its world names it.
    worlds: `[M]` int32.
    digits: `[M]` int32, the digit itself.
  """

  pixels: np.ndarray
  labels: np.ndarray
  worlds: np.ndarray
  digits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rules:
  """The rules by which worlds differ.

  Attributes:
    frequencies: `[W, 3, 2]` periods per image of the waves of its texture, down and across.
    amplitudes: `[W, 3, 3]` of each wave, by colour.
    tints: `[W, 3]` mean colours.
    permutations: `[W, 10]` from digit to label.
    places: `[W, 4]` the quarter that each place shows.
    turns: `[W, 4]` quarter turns of what a place shows, and 4 more where it is mirrored.
  """

  frequencies: np.ndarray
  amplitudes: np.ndarray
  tints: np.ndarray
  permutations: np.ndarray
  places: np.ndarray
  turns: np.ndarray


def make_worlds(
  split: str, images: int, *, first: int = 0, worlds: int = WORLDS, seed: int = 0
) -> Worlds:
  """Makes images, the same ones for the same arguments; any part of them can be made alone.

  Args:
    split: `train` or `test`, which share no digit; the worlds are those of both.
    images: M.
    first: number of the first image.
    worlds: W.
    seed: of the worlds and of their images.
  Raises:
    ValueError: an unknown split, or a number below its least value.

  >>> some, more = make_worlds("test", 3), make_worlds("test", 2, first=1)
  >>> some.pixels.shape, bool((some.pixels[1:] == more.pixels).all())
  ((3, 16, 16, 3), True)
  """
  one_of("split", split, IMAGES)
  arguments.whole_number("images", images)
  arguments.whole_number("first", first, 0)
  arguments.whole_number("worlds", worlds)
  arguments.whole_number("seed", seed, 0)
  parts = []
  for block in range(first // _BLOCK, -(-(first + images) // _BLOCK)):
    begin = block * _BLOCK
    made = _make_block(split, block, worlds, seed=seed)
    wanted = slice(max(first - begin, 0), first + images - begin)
    parts.append([array[wanted] for array in dataclasses.astuple(made)])
  return Worlds(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def open_worlds(name: str, split: str) -> Images:
  """Makes a set of the images programme.

  Args:
    name: `worlds`; or `worlds_told`, whose images have the number of their world as a fourth
      channel, for networks that know it.
    split: `train` or `test`, with the numbers of images as TFDS has them: `train[:50000]`.
  Raises:
    ValueError: an unknown name or split.
  """
  one_of("data name", name, NAMES)
  part, first, count = _part_of(split)
  made = make_worlds(part, count, first=first)
  pixels = made.pixels
  if name == TOLD:
    shape = (*pixels.shape[:-1], 1)
    told = np.broadcast_to(made.worlds.astype(np.uint8).reshape(-1, 1, 1, 1), shape)
    pixels = np.concatenate([pixels, told], axis=-1)
  return Images(pixels, made.labels, tuple(str(label) for label in range(CLASSES)))


def count_worlds(split: str) -> int:
  """Returns the number of images of a split, without making them; see `open_worlds`.

  >>> count_worlds("train"), count_worlds("test[100:300]")
  (200000, 200)
  """
  return _part_of(split)[2]


def _part_of(split: str) -> tuple[str, int, int]:
  """Returns the split's name, the number of its first image, and the number of its images."""
  found = re.fullmatch(r"(train|test)(?:\[(\d*):(\d*)\])?", split)
  if found:
    name = found[1]
    first, end = int(found[2] or 0), int(found[3] or IMAGES[name])
    if end > first:
      return name, first, end - first
  raise ValueError(
    "data split of worlds must be 'train' or 'test', or a part such as 'train[:50000]'; got "
    f"{split!r}"
  )


@functools.cache
def rules(worlds: int = WORLDS, seed: int = 0) -> Rules:
  """Draws the rules of worlds; the same arguments give the same worlds."""
  rng = np.random.default_rng((seed, worlds))
  reach = int(_LENGTHS[1])
  side = np.arange(-reach, reach + 1)
  grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
  length = np.hypot(*grid.T)
  # Waves of a whole number of periods, neither flat nor as fine as the pixels.
  grid = grid[(length >= _LENGTHS[0]) & (length <= _LENGTHS[1])]
  colours = rng.normal(0, 0.5, (worlds, _WAVES, 3)) + rng.normal(0, 0.8, (worlds, _WAVES, 1))
  return Rules(
    frequencies=rng.choice(grid, (worlds, _WAVES)),
    amplitudes=colours,
    tints=rng.uniform(0.3, 0.7, (worlds, 3)),
    permutations=np.stack([rng.permutation(CLASSES) for _ in range(worlds)]),
    places=np.stack([rng.permutation(4) for _ in range(worlds)]),
    turns=rng.integers(0, 8, (worlds, 4)),
  )


def _make_block(split: str, block: int, worlds: int, *, seed: int) -> Worlds:
  """Makes the images of a block, which have a random stream of their own."""
  rng = np.random.default_rng((seed, list(IMAGES).index(split), block))
  digits = _digits(split)
  chosen = rng.integers(0, len(digits), _BLOCK)
  world = rng.integers(0, worlds, _BLOCK)
  of_world = rules(worlds, seed)
  drawn = _warp(digits.pixels[chosen, ..., 0] / 255, rng)
  shown = _place(_rearrange(drawn, of_world, world), rng)[..., None]
  ink = rng.uniform(0.75, 1, (_BLOCK, 1, 1, 3))
  pixels = _texture(of_world, world, rng) * (1 - shown) + ink * shown
  pixels += rng.normal(0, _NOISE, pixels.shape)
  digit = digits.labels[chosen]
  return Worlds(
    pixels=np.clip(255 * pixels, 0, 255).astype(np.uint8),
    labels=of_world.permutations[world, digit].astype(np.int32),
    worlds=world.astype(np.int32),
    digits=digit.astype(np.int32),
  )


@functools.cache
def _digits(split: str) -> Images:
  """Returns the digits of a split."""
  return image_sets.load(image_sets.SetSource(image_sets.DIGITS, split))


def _warp(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns digits `[M, h, h]` under small affine maps, `[M, 12, 12]`."""
  from scipy import ndimage

  count, side = len(digits), digits.shape[1]

  def draw(low, high):
    """Draws a number for each digit, `[M, 1, 1]`."""
    return rng.uniform(low, high, (count, 1, 1))

  turn, shear = draw(-_TURN, _TURN), draw(-_SHEAR, _SHEAR)
  scale = draw(1 - _SCALE, 1 + _SCALE)
  down, across = draw(-_SHIFT, _SHIFT), draw(-_SHIFT, _SHIFT)
  # Maps places of the canvas, in [-1, 1], to places of the digit.
  at = (np.arange(_CANVAS) + 0.5) / _CANVAS * 2 - 1
  y, x = np.meshgrid(at, at, indexing="ij")
  cos, sin = np.cos(turn) / scale, np.sin(turn) / scale
  column = cos * x + (shear / scale - sin) * y + across
  row = sin * x + cos * y + down
  image = np.broadcast_to(np.arange(count)[:, None, None], row.shape)
  pixel_of = [(place + 1) / 2 * side - 0.5 for place in (row, column)]
  canvas = ndimage.map_coordinates(digits.astype(np.float32), [image, *pixel_of], order=1)
  # Averaging pixels keeps thin strokes, which a sample would miss.
  ratio = _CANVAS // _DIGIT
  return canvas.reshape(count, _DIGIT, ratio, _DIGIT, ratio).mean(axis=(2, 4))


def _rearrange(digits: np.ndarray, of_world: Rules, world: np.ndarray) -> np.ndarray:
  """Returns digits `[M, 12, 12]` with their quarters moved and turned as their worlds have it."""
  half = _DIGIT // 2
  corners = [(0, 0), (0, half), (half, 0), (half, half)]
  result = np.empty_like(digits)
  for w in range(len(of_world.places)):
    of_this = world == w
    for place, (top, left) in enumerate(corners):
      y, x = corners[of_world.places[w, place]]
      turns = of_world.turns[w, place]
      piece = np.rot90(digits[of_this, y : y + half, x : x + half], turns % 4, (1, 2))
      # The second four of the eight turns are mirrored.
      piece = piece[:, :, ::-1] if turns >= 4 else piece
      result[of_this, top : top + half, left : left + half] = piece
  return result


def _place(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns digits `[M, 12, 12]` at random places of empty images, `[M, 16, 16]`."""
  shown = np.zeros((len(digits), SIZE, SIZE), np.float32)
  corners = rng.integers(0, SIZE - _DIGIT + 1, (len(digits), 2))
  for i, (top, left) in enumerate(corners):
    shown[i, top : top + _DIGIT, left : left + _DIGIT] = digits[i]
  return shown


def _texture(of_world: Rules, world: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns backgrounds `[M, 16, 16, 3]`: a world's waves at a random phase, on its tint."""
  at = np.arange(SIZE) / SIZE
  phase = rng.uniform(0, 1, (2, len(world), 1, 1, 1))
  y, x = at[None, None, :, None] + phase[0], at[None, None, None, :] + phase[1]
  frequency = of_world.frequencies[world][..., None, None]
  waves = np.cos(2 * np.pi * (frequency[:, :, 0] * y + frequency[:, :, 1] * x))
  texture = np.einsum(
    "mkhw,mkc->mhwc", waves.astype(np.float32), of_world.amplitudes[world], optimize=True
  )
  tint = 0.3 * of_world.tints[world] + rng.uniform(0.15, 0.55, (len(world), 3))
  return _CONTRAST * texture + tint[:, None, None]
