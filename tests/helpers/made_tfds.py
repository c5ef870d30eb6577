"""A small TFDS image-classification set, written without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def images(count, shape, seed=0):
  """Random images and labels; the colour tells the class, so that there is something to learn."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % 2
  noise = rng.integers(0, 100, (count, *shape))
  return (noise + 120 * labels[:, None, None, None]).astype(np.uint8), labels


def write(data_dir, train, test, *, shape, name="made_set"):
  """Prepares the set as array_record; `train` and `test` are lists of (image, label)."""

  def info(self):
    features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(names=["dark", "light"])}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def generate(self, examples):
    for i, (image, label) in enumerate(examples):
      file = io.BytesIO()
      Image.fromarray(image).save(file, "PNG")
      file.seek(0)
      yield i, {"image": file, "label": int(label)}

  members = {
      "name": name,
      "VERSION": tfds.core.Version("1.0.0"),
      "_info": info,
      "_split_generators": lambda self, _: {"train": generate(self, train), "test": generate(self, test)},
      "_generate_examples": generate,
      "__module__": __name__,
  }
  builder = type("MadeSet", (tfds.core.GeneratorBasedBuilder,), members)
  builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
