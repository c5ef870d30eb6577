"""Made data in place of unavailable sets: TFDS sets, and folders of videos or features."""

import csv
import functools

import numpy as np
import tensorflow_datasets as tfds

from gating_jax.data import tfds as tfds_sets
from tests.helpers import made_tfds, made_videos

# By set of images: height, width and channels, classes, and the number of images of each.
SIZES = {
  "cifar10": ((32, 32, 3), 10, 60),
  "cifar100": ((32, 32, 3), 100, 40),
  "mnist": ((28, 28, 1), 10, 60),
  "svhn_cropped": ((32, 32, 3), 10, 60),
  "tiny_imagenet50": ((64, 64, 3), 50, 40),
  "imagenet2012": ((None, None, 3), 1000, 1),
}
SCENES = 40


def stand_in(monkeypatch, folder):
  """Lets every TFDS set be opened; its examples are made in `folder` at the first time."""
  opened = tfds_sets.open_tfds

  @functools.cache
  def write(name):
    made = f"made_{name}"
    second = "validation" if name in ("imagenet2012", "cityscapes") else "test"
    if name == "cityscapes":
      features = {
        "image_left": tfds.features.Image(shape=(64, 128, 3)),
        "segmentation_label": tfds.features.Image(shape=(64, 128, 1)),
      }
      splits = {"train": _street(SCENES), second: _street(SCENES)}
    else:
      shape, classes, each = SIZES[name]
      features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=classes),
      }
      splits = {split: _images(shape, classes, each) for split in ("train", second)}
    made_tfds.write_splits(folder, features, splits, name=made)
    return made

  monkeypatch.setattr(
    tfds_sets,
    "open_tfds",
    lambda name, split, _, **features: opened(write(name), split, str(folder), **features),
  )


def _images(shape, classes, each):
  """Makes as many images of every class, in turn; sizes vary where the set has no fixed one."""
  random = np.random.default_rng(0)
  examples = []
  for i in range(classes * each):
    sides = [side or 90 + 20 * ((i + at) % 2) for at, side in enumerate(shape[:2])]
    pixels = np.repeat(np.repeat(random.integers(0, 256, (2, 2, shape[2])), 64, 0), 64, 1)[
      : sides[0], : sides[1]
    ]
    image = pixels.astype(np.uint8)
    image = image[..., 0] if shape[2] == 1 else image
    examples.append({"image": made_tfds.encoded(image), "label": i % classes})
  return examples


def _street(count):
  """Makes scenes of four areas, each of a trained class or of none."""
  random = np.random.default_rng(0)
  examples = []
  for _ in range(count):
    label = np.kron(random.choice([0, 7, 11, 26], (2, 2)), np.ones((32, 64))).astype(np.uint8)
    image = np.repeat(5 * label[..., None], 3, axis=-1)
    examples.append(
      {"image_left": made_tfds.encoded(image), "segmentation_label": made_tfds.encoded(label)}
    )
  return examples


def video_files(folder, kind, count=8):
  """Makes videos or features with their tables; returns the fields of a config that name them.

  Composed videos have no such fields.
  """
  if kind == "composed":
    return {}
  random = np.random.default_rng(0)
  # Some of those to train are held out, and no file may be in both splits.
  names = [f"video{i}{'.mp4' if kind == 'videos' else ''}" for i in range(3 * count)]
  for name in names:
    if kind == "videos":
      made_videos.write(folder / name, 14, size=(16, 24))
    else:
      np.save(folder / f"{name}.npy", random.normal(size=(6, 5)).astype(np.float32))
  with (folder / "labels.csv").open("w", newline="") as file:
    csv.writer(file).writerows(
      [("video", "label"), *((name, "ab"[i % 2]) for i, name in enumerate(names))]
    )
  for split, own in (("train", names[: 2 * count]), ("test", names[2 * count :])):
    (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in own))
  tables = {"table": "labels.csv", "train_split": "train.txt", "test_split": "test.txt"}
  return {
    "data.folder": str(folder),
    **{f"data.{name}": str(folder / file) for name, file in tables.items()},
  }
