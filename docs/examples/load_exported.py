"""An exported network without gating_jax: needs only `pip install jax flatbuffers`.

python docs/examples/load_exported.py DIRECTORY

flatbuffers is needed to read the program.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np


def load(directory):
  program = jax.export.deserialize(bytearray(Path(directory, "program.stablehlo").read_bytes()))
  data = Path(directory, "model.safetensors").read_bytes()
  start = 8 + int.from_bytes(data[:8], "little")
  array = lambda dtype, shape, data_offsets: np.frombuffer(
    data[start:][slice(*data_offsets)], {"F32": np.float32, "I8": np.int8}[dtype]
  ).reshape(shape)
  weights = jax.device_put(
    {name: array(**entry) for name, entry in json.loads(data[8:start]).items()}
  )
  return lambda images: jax.jit(program.call)(weights, images)


def main(directory):
  card = json.loads(Path(directory, "card.json").read_text())
  images = (
    np.random.default_rng(0)
    .normal(size=(card["batch_size"] or 3, *card["input_shape"]))
    .astype(np.float32)
  )
  outputs, _ = load(directory)(images)
  print(f"{len(images)} images of noise are of classes {np.argmax(outputs, axis=1).tolist()}")
  return images, outputs


if __name__ == "__main__":
  main(sys.argv[1])
