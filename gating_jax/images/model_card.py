"""Files that make an export a folder for a model hub: `config.json`, `README.md` and `load.py`.

The folder can be uploaded as it is. `load.py` runs the network on files without this package, and
so do the few lines of Python in `README.md`. None of the files names a folder of this machine.

Reference: Hugging Face's model cards, whose head is YAML with the fields of `model-index`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from gating_jax.data import folders, image_sets, streaming, unions
from gating_jax.images.checks import EXITS
from gating_jax.reports.text import format_percent
from gating_jax.timing import MASKED

# Needs no more than JAX and two readers.
LOADER = '''\
"""Runs this network: `python load.py IMAGE ...` says the class of each image.

A network that knows the set of an image takes its number: `python load.py --set=1 IMAGE`.
It needs `pip install jax flatbuffers safetensors pillow`, but not the package that trained it.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent
CONFIG = json.loads((FOLDER / "config.json").read_text("utf-8"))
HEIGHT, WIDTH, CHANNELS = CONFIG["input_shape"]
# Number of sets, where the last channel of an image is the number of its set.
SETS = CONFIG["sets"]
COLOURS = CHANNELS - bool(SETS)


def load(folder=FOLDER):
  program = jax.export.deserialize(bytearray((folder / "program.stablehlo").read_bytes()))
  weights = jax.device_put(load_file(folder / "model.safetensors"))
  return lambda images: jax.jit(program.call)(weights, images)


def resize(image):
  fraction = CONFIG["crop_fraction"]
  if not fraction or image.size == (WIDTH, HEIGHT):
    return image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
  # The middle, of the proportions that the network takes.
  edge = (1 - fraction) / 2
  return ImageOps.fit(image, (WIDTH, HEIGHT), Image.Resampling.BILINEAR, bleed=edge)


def prepare(file, number=0):
  image = ImageOps.exif_transpose(Image.open(file))
  if image.mode[0] == "I":
    # 16 bits become 8; Pillow would cut them off.
    image = Image.fromarray(np.uint8(np.round(np.array(image) / 257)))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  image = resize(image.convert("L" if COLOURS == 1 else "RGB"))
  pixels = np.float32(image).reshape(HEIGHT, WIDTH, COLOURS)
  if SETS:
    pixels = np.concatenate([pixels, np.full((HEIGHT, WIDTH, 1), number, np.float32)], axis=-1)
  pixels = pixels / 255
  return (pixels - np.float32(CONFIG["mean"])) / np.float32(CONFIG["std"])


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="Says the class of each image.")
  parser.add_argument("images", nargs="+", metavar="IMAGE")
  if SETS:
    parser.add_argument("--set", type=int, choices=range(SETS), required=True)
  given, run = parser.parse_args(), load()
  for file in given.images:
    logits, _ = run(prepare(file, given.set if SETS else 0)[None])
    print(file, CONFIG["id2label"][str(int(np.argmax(logits)))])
'''

# The same in few lines, for a page.
_SHORT_LOADER = """\
import json, jax, numpy as np
from pathlib import Path
from PIL import Image, ImageOps
from safetensors.numpy import load_file

config = json.loads(Path("config.json").read_text("utf-8"))
program = jax.export.deserialize(bytearray(Path("program.stablehlo").read_bytes()))
weights = load_file("model.safetensors")
height, width, channels = config["input_shape"]
image = ImageOps.exif_transpose(Image.open("picture.png"))
if image.has_transparency_data:
  image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
image = image.convert({mode})
if image.size != (width, height):
  image = {resized}
pixels = np.float32(image).reshape(height, width, {colours})
{number}images = ((pixels / 255 - np.float32(config["mean"])) / np.float32(config["std"]))[None]
logits, gate_logits = jax.jit(program.call)(weights, images)
print(config["id2label"][str(int(np.argmax(logits)))])"""
# The last channel of an image, where the network knows its set.
_SET_CHANNEL = "pixels = np.dstack([pixels, np.zeros((height, width))])  # of set 0\n"
# Settings that name a file or a folder.
_PATH_FIELDS = ("data_dir", "init_from", "teacher")

_PAGE = """\
---
{head}
---

# {title}

A network for images of {classes} classes, trained and exported by gating_jax: a {model} with
`gating={gating}`, checkpoint of step {step:,}. {behaviour}

| measured on {images} | |
|---|---|
{rows}

```bash
pip install jax flatbuffers safetensors pillow
python load.py {number}picture.png
```

In Python, in this folder, for pictures of 8 bits:

```python
{loader}
```

With gating_jax installed, `gating_jax.load_exported(".")` returns a function of `images`, after
checking the files.
`load.py` reads `program.stablehlo` and `model.safetensors`, and runs them on image files.
`config.json` says how images are prepared: {crop} becomes {height} x {width} pixels of {channels},
divided by 255, minus `mean`, over `std`. {onnx}`card.json` has all settings, and the SHA-256 of
each file.
"""


def hub_files(
  card: Mapping[str, Any], input_shape: tuple[int, int, int], *, has_onnx: bool = False
) -> dict[str, bytes]:
  """Returns the further files of an export, by name.

  Args:
    card: the facts that the export's own card has.
    input_shape: `(H, W, D)` of an image.
    has_onnx: whether the export has an ONNX model, too.
  """
  config = json.dumps(_config(card, input_shape), indent=2, allow_nan=False)
  page = _page(card, input_shape, has_onnx)
  return {
    "config.json": config.encode(),
    "README.md": page.encode(),
    "load.py": LOADER.encode(),
  }


def without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config whose paths are the names of files and folders, without those above them.

  >>> without_folders({"data": {"data_dir": "/home/me/flowers", "name": "folder"}})
  {'data': {'data_dir': 'flowers', 'name': 'folder'}}
  """
  found: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      value = without_folders(value)
    elif isinstance(value, str):
      if unions.is_union(value):
        value = _union_without_folders(value)
      elif name in _PATH_FIELDS or value.startswith("~") or _is_absolute(value):
        value = _base_name(value)
    found[name] = value
  return found


def _is_absolute(path: str) -> bool:
  """Returns whether a text is an absolute path of this system or of another one."""
  return PurePath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def _base_name(path: str) -> str:
  """Returns the name of a file or a folder, of any system."""
  return PureWindowsPath(path).name


def _union_without_folders(union: str) -> str:
  """Returns the name of a union with the names of its folders, without those above them."""
  parts = []
  for part in unions.parts_of(union):
    kind, colon, path = part.partition(":")
    parts.append(f"{kind}:{_base_name(path)}" if colon and kind == folders.FOLDER else part)
  return f"{union.partition('(')[0]}({','.join(parts)})"


def _config(card: Mapping[str, Any], input_shape: tuple[int, int, int]) -> dict[str, Any]:
  """Returns what a program needs to prepare images and to name classes."""
  model, data, labels = card["config"]["model"], card["config"]["data"], {}
  for i, name in enumerate(card["class_names"]):
    labels[str(i)] = name
  return {
    "model_type": "gating_jax",
    "architecture": model["name"],
    "gating": model["gating"],
    "input_shape": list(input_shape),
    # The middle of an image that is resized, as test images are; null for the whole image.
    "crop_fraction": _crop_fraction(data),
    "mean": card["mean"],
    "std": card["std"],
    "id2label": labels,
    # Number of sets, where the last channel of an image is the number of its set; else 0.
    "sets": _count_sets(model),
  }


def _count_sets(model: Mapping[str, Any]) -> int:
  """Returns the number of sets of a network that knows the set of an image; 0 for others."""
  return model.get("sources") or 0


def _crop_fraction(data: Mapping[str, Any]) -> float | None:
  """Returns the fraction of its largest middle part that a test image keeps; None for all of it."""
  if data["loader"] == "streaming":
    fraction = data.get("test_crop")
    # 0 stands for the whole image.
    return streaming.central_fraction(data["name"]) if fraction is None else fraction or None
  return 1.0 if image_sets.keeps_proportions(data["name"]) else None


def _page(card: Mapping[str, Any], input_shape: tuple[int, int, int], has_onnx: bool) -> str:
  """Returns the page that a hub shows."""
  model, data = card["config"]["model"], card["config"]["data"]
  height, width, channels = input_shape
  sets = _count_sets(model)
  colours = channels - bool(sets)
  onnx = "`model.onnx` is the same network for onnxruntime and others. " if has_onnx else ""
  images = _name_of_images(data)
  return _PAGE.format(
    head=_head(model["name"], images, card["accuracy"]),
    loader=_short_loader(colours, sets, _crop_fraction(data)),
    title=f"{model['name']} on {images}{_kind(card)}",
    classes=len(card["class_names"]),
    model=model["name"],
    gating=model["gating"],
    step=card["step"],
    behaviour=_behaviour(card),
    images=f"{images}, {card['device']}",
    rows="\n".join(f"| {name} | {value} |" for name, value in _rows(card)),
    crop=_describe_crop(_crop_fraction(data)),
    height=height,
    width=width,
    channels=("grey" if colours == 1 else f"{colours} colours")
    + " and the number of the image's set" * bool(sets),
    number="--set=0 " * bool(sets),
    onnx=onnx,
  )


def _name_of_images(data: Mapping[str, Any]) -> str:
  """Returns the name of the data set; that of its folder, without the folders above, if any."""
  name = data["name"]
  if name == folders.FOLDER:
    return Path(data["data_dir"]).name or name
  return " + ".join(unions.source_names(name)) if unions.is_union(name) else name


def _skips(card: Mapping[str, Any]) -> bool:
  """Returns whether the program leaves out what is closed, in any of its parts."""
  return bool(set(card.get("strategies", ())) - {MASKED})


def _has_exits(card: Mapping[str, Any]) -> bool:
  """Returns whether images may leave the network early."""
  return card["config"]["model"]["gating"] == EXITS


def _kind(card: Mapping[str, Any]) -> str:
  """Returns the end of a title, which distinguishes the exports of a run."""
  if card.get("weights") == "int8":
    return ", 8-bit weights"
  return ", skipping closed units" if _skips(card) and not _has_exits(card) else ""


def _behaviour(card: Mapping[str, Any]) -> str:
  """Says in a sentence what the program computes for an image."""
  if _has_exits(card):
    if _skips(card):
      return "An image leaves at the first exit that is sure of it."
    return "The first exit that is sure of an image answers, but all of the network is computed."
  # Also where static gates are pruned away.
  if card["executed_macs"] >= card["macs"]:
    return "It computes the same units for each image."
  if _skips(card):
    return "Gates decide for each image which units run."
  return "Gates decide for each image which units are used: closed ones are multiplied by 0."


def _describe_crop(fraction: float | None) -> str:
  """Describes the part of an image that is resized."""
  if fraction is None:
    return "the whole image"
  part = "the largest part of these proportions in the middle"
  return part if fraction == 1 else f"{format_percent(fraction, 1)} of the sides of {part}"


def _short_loader(colours: int, sets: int, crop_fraction: float | None) -> str:
  """Returns lines of Python that run the network on an image."""
  resized = "image.resize((width, height), Image.Resampling.BILINEAR)"
  if crop_fraction is not None:
    edge = round((1 - crop_fraction) / 2, 6)
    resized = f"ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR, bleed={edge:g})"
  return _SHORT_LOADER.format(
    mode='"L"' if colours == 1 else '"RGB"',
    colours="channels - 1" if sets else "channels",
    number=_SET_CHANNEL * bool(sets),
    resized=resized,
  )


def _head(model: str, data: str, accuracy: float) -> str:
  """Returns the YAML that a hub reads; texts are JSON, which YAML includes."""
  return "\n".join(
    [
      "license: unknown  # write that of your weights here",
      "library_name: gating_jax",
      "pipeline_tag: image-classification",
      "tags: [jax, conditional-computation]",
      "metrics: [accuracy]",
      "model-index:",
      f"- name: {json.dumps(model)}",
      "  results:",
      "  - task: {type: image-classification}",
      f"    dataset: {{name: {json.dumps(data)}, type: {json.dumps(data)}}}",
      f"    metrics: [{{type: accuracy, value: {accuracy:.6f}}}]",
    ]
  )


def _rows(card: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the table of metrics."""
  # With a head a set, the score is among the classes of an image's own set.
  known = card["config"].get("loss", {}).get("scope") == "source"
  accuracy = "accuracy, the set of each image known" if known else "accuracy"
  rows = [(accuracy, format_percent(card["accuracy"], 2))]
  if "accuracy_as_trained" in card:
    rows.append(("accuracy as trained", format_percent(card["accuracy_as_trained"], 2)))
  rows += [
    ("MACs per image, everything open", f"{card['macs']:,}"),
    ("MACs per image, as the gates decide", f"{card['executed_macs']:,.0f}"),
  ]
  for runtime, of in (("JAX", card), ("onnxruntime", card.get("onnx", {}))):
    for size, time in of.get("milliseconds", {}).items():
      images = "one image" if size == "1" else f"{size} images"
      rows.append((f"{images} in {runtime}", f"{time:.2f} ms"))
  return rows
