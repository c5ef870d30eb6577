"""Weights of torchvision's and timm's networks, read into our variables and written back.

A file holds a state dict, arrays by the names of torchvision's modules, as safetensors or npz.
Family, blocks, widths and classes follow from names and shapes. The names are those of ResNets with
the ImageNet stem, which timm shares, and of VGG nets; timm's names of a VGG's dense layers are
read, too. What torch puts before every name, such as `module.`, is left out. Our convolutions pad
as torch's do, symmetrically, and BatchNorm has the same epsilon and the same momentum (0.9 here is
0.1 there).

    theirs                                  ours
    conv1, bn1                              stem/conv, stem/norm
    layer2.0.conv1, layer2.0.bn1            stage2_block1/conv1/conv, stage2_block1/conv1/norm
    layer2.0.downsample.0, .1               stage2_block1/project/conv, stage2_block1/project/norm
    fc                                      classifier
    features.0, features.1                  layer1/conv/conv, layer1/conv/norm
    classifier.0, classifier.3              hidden1, hidden2
    classifier.6                            classifier

Axes: H and W pixels, I input and O output channels. Kernels are [O, I, H, W] there, [H, W, I, O]
here.
Reference: He et al., 2016; Simonyan and Zisserman, 2015; torchvision's models `resnet` and `vgg`.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple
from zipfile import BadZipFile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.checks import check_unpacked, few, first_line, one_of, printable, user_path
from gating_jax.extras import naming_extra
from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.resnets import RESNETS, ResNet
from gating_jax.models.vggs import POOL, VGG, Chain
from gating_jax.ops import arguments
from gating_jax.types import Path

# Statistics of ImageNet's colours, in [0, 1], by which torchvision's networks normalise images.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SUFFIXES = (".safetensors", ".npz")
# Prefixes that torch's wrappers put before the names of all values.
_PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
# Reading a pickle runs whatever its author wrote.
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
# ResNets of torchvision and timm.
RESNET_NAMES = tuple(name for name, net in RESNETS.items() if net.stem == "imagenet")
# Convolutions before each of the five pools.
_VGG_CONVS = {
  "vgg11": (1, 1, 2, 2, 2),
  "vgg13": (2, 2, 2, 2, 2),
  "vgg16": (2, 2, 3, 3, 3),
  "vgg19": (2, 2, 4, 4, 4),
}
_VGG_NAMES = (*_VGG_CONVS, *(f"{name}_bn" for name in _VGG_CONVS))
# Beginnings of the names of dense layers at the end, torchvision's and timm's.
_DENSE = ("fc.", "classifier.", "pre_logits.", "head.")
# Torch's name of a layer's variable, by its name here.
_VARIABLES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
# Types of arrays in safetensors. The integers are refused later, by name.
_TYPES: dict[str, Any] = {
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "F32": np.float32,
  "F64": np.float64,
  "I8": np.int8,
  "U8": np.uint8,
  "I16": np.int16,
  "I32": np.int32,
  "I64": np.int64,
  "BOOL": np.bool_,
}
# What relatives of the residual networks have, by the name of a value.
_BLOCK = r"layer\d+\.\d+\."
_OTHER_PARTS = {
  r"conv1\.0\.weight": "a stem of three convolutions (timm's resnet50d, resnet50t and the like)",
  rf"{_BLOCK}downsample\.2\.weight": "a pool in its shortcuts (timm's resnet50d and the like)",
  rf"{_BLOCK}se\.\w+\.weight": "squeeze-and-excitation (a SENet)",
  rf"{_BLOCK}bns\..*": "windows of several scales (a Res2Net)",
  rf"{_BLOCK}conv\d\.(conv|attn|fc).*": "attention over windows (a ResNeSt or an SKNet)",
}
# A number of steps, which no computation here uses.
_STEPS = "num_batches_tracked"
# The dense layers of a VGG net, as timm and as torchvision call them.
_TIMM_DENSE = {
  "pre_logits.fc1": "classifier.0",
  "pre_logits.fc2": "classifier.3",
  "head.fc": "classifier.6",
}
# Beginning of the names of timm's dense layers before the classifier.
_TIMM_HIDDEN = "pre_logits."
# Layers in a row of torchvision's `classifier`: dense, ReLU and dropout.
_DENSE_STEP = 3
# Dense layers of torchvision's VGG nets before the classifier.
_VGG_HIDDEN = 2
# Images large enough for the five pools of a VGG net.
_SIDE = 32

Shape = tuple[int, ...]


class Entry(NamedTuple):
  """A value of a state dict, and the variable that it makes.

  Attributes:
    name: of the value.
    shape: of the value.
    path: of the variable, its collection first.
    pixels: pixels, along a side, of the map whose flattened features a dense layer reads; else 1.
    absorbed: whether the value is subtracted from the variable. BatchNorm after a convolution with
      a bias computes the same without the bias, if its mean is smaller by it.
  """

  name: str
  shape: Shape
  path: Path
  pixels: int = 1
  absorbed: bool = False


@naming_extra()
def load_pretrained(
  path: str | os.PathLike, name: str | None = None, *, classifier: bool = True
) -> tuple[ResNet | VGG, dict[str, Any]]:
  """Loads a network that torchvision or timm trained, with its weights.

      model, variables = load_pretrained("resnet50.safetensors")
      logits, records = model.apply(variables, images)

  `images` are `[N, H, W, 3]`, normalised as the original wants them: for torchvision's weights
  `(pixels / 255 - mean) / std` with the `IMAGENET_MEAN` and `IMAGENET_STD` of this module.
  `model.clone(gating="channel")` is the same network with gates, whose variables `init` makes. The
  dropout of VGG nets is left out. A prefix that all names have, `module.`, `model.`, `backbone.` or
  `_orig_mod.`, is left out, too.

  Names and shapes are all that is known of the original. timm's nets that compute something else
  with a ResNet's names, such as `resnetaa50`, `resnetblur50` and those with dilated windows, cannot
  be distinguished: their logits here are wrong. timm's VGG nets slide their dense layers over last
  maps of more than 7 x 7 pixels; such images are refused.

  Args:
    path: a state dict, `.safetensors` or `.npz`, of a ResNet with the ImageNet stem (also of other
      widths and numbers of blocks) or of a VGG net.
    name: the network that it must be, such as `"resnet50"` or `"vgg16_bn"`, of any width; None for
      any.
    classifier: False leaves out the file's classifier and what other dense layers it has, or is for
      a file without any: outputs are then the mean of the last map over pixels, `[N, D]`.
  Returns:
    `(model, variables)`: an ungated network, and its `params` and `batch_stats` as float32 arrays
    of the host.
  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a pickle, as `.pth` is; a damaged file; another network than `name` says; no
      classifier; or a value that is missing, left over or of the wrong shape, which the message
      names.

  >>> import tempfile, jax
  >>> net = ResNet(3, (1, 1), features=4, stem="imagenet", shortcut="B")
  >>> shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
  >>> zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   model, variables = load_pretrained(save_pretrained(zeros, f"{folder}/net.npz"))
  >>> model.blocks, variables["params"]["classifier"]["kernel"].shape
  ((1, 1), (8, 3))
  """
  if name is not None:
    one_of("name", name, (*RESNET_NAMES, *_VGG_NAMES))
  arguments.instance("classifier", classifier, bool, rule="True or False")
  model, variables = read_network(path, name, classifier=classifier)
  if classifier:
    require_classifier(model, path)
  return model, variables


def require_classifier(model: Any, path: str | os.PathLike) -> None:
  """Raises a ValueError where a network that was read from a file has no classifier."""
  if model.classes is None:
    raise ValueError(
      f"the weights in {user_path(path)} must have a classifier, {_classifier_name(model)}; they "
      "have none, as backbones do. load_pretrained(path, classifier=False) returns the network "
      "without one, and a run with model.init_from gives it a fresh one"
    )


@naming_extra()
def read_network(
  path: str | os.PathLike, name: str | None = None, *, classifier: bool = True
) -> tuple[ResNet | VGG, dict[str, Any]]:
  """Reads a network, whose `classes` are None where the file has no classifier.

  Arguments, results and errors are otherwise those of `load_pretrained`.
  """
  file = user_path(path)
  read = _read_state(file)
  state = _with_torchvision_names(read)
  if not classifier:
    state = {key: value for key, value in state.items() if not _is_dense(key)}
  shapes = {key: value.shape for key, value in state.items()}
  model = _model_of(shapes, file)
  if name is not None:
    found, wanted = describe_network(model), describe_named(name)
    if found != wanted:
      raise ValueError(
        f"name must be that of the network in {file}, {found}; got {name!r}, {wanted}"
      )
  entries = _entries_of(model, _input_channels(model, shapes))
  _check_shapes(shapes, entries, f"the weights in {file}")
  flat: dict[Path, np.ndarray] = {}
  # Absorbed entries come last, after the means that they change.
  for entry in entries:
    value = state[entry.name].astype(np.float32)
    if entry.absorbed:
      flat[entry.path] = flat[entry.path] - value
    else:
      flat[entry.path] = _to_ours(value, entry.pixels)
  if isinstance(model, VGG) and model.hidden and any(key.startswith(_TIMM_HIDDEN) for key in read):
    model = model.clone(max_map=model.pooled)
  return model, traverse_util.unflatten_dict(flat)


@naming_extra()
def save_pretrained(
  variables: Mapping[str, Any], file: str | os.PathLike, model: nn.Module | None = None
) -> FilePath:
  """Writes the variables of an ungated network by torchvision's names.

      save_pretrained(variables, "resnet50.safetensors", model)

  torch reads the file by `model.load_state_dict(safetensors.torch.load_file(file))`. Gates have no
  place there: fold, prune or leave them out first.

  Args:
    variables: `params` and `batch_stats` of a `ResNet` with the ImageNet stem and shortcut B, or of
      a `VGG` with torchvision's chain and dense layers; as `load_pretrained` returns them.
    file: a path that ends in `.safetensors` or `.npz`; a file that is there is replaced.
    model: the network. Variables do not say where a `VGG` has its pools, nor what strides a
      `ResNet` has: without the model they are taken to be torchvision's.
  Returns:
    The path.
  Raises:
    TypeError: variables that are no mapping.
    ValueError: another ending, or variables or a model of a network that torchvision does not have.

  >>> import tempfile, jax
  >>> net = ResNet(3, (1,), features=4, stem="imagenet", shortcut="B")
  >>> shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
  >>> zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = save_pretrained(zeros, f"{folder}/net.npz")
  ...   print(np.load(file)["fc.weight"].shape)
  (3, 4)
  """
  arguments.instance("variables", variables, Mapping, rule="a mapping with params and batch_stats")
  target = user_path(file)
  if target.suffix not in _SUFFIXES:
    raise ValueError(f"file must end in {' or '.join(_SUFFIXES)}; got {target}")
  flat: dict[Path, np.ndarray] = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
    if path[0] in ("params", "batch_stats"):
      flat[path] = np.asarray(leaf, np.float32)
  state = _state_of(flat)
  shapes = {key: value.shape for key, value in state.items()}
  written = _model_of(shapes, target)
  if isinstance(written, VGG) and len(written.hidden) != _VGG_HIDDEN:
    raise ValueError(
      f"variables of a VGG net must have {_VGG_HIDDEN} hidden dense layers, as torchvision's do; "
      f"got {len(written.hidden)}"
    )
  if written.classes is None:
    raise ValueError(
      "variables must have a classifier, as torchvision's networks do; missing: fc.bias, fc.weight"
    )
  if model is not None:
    _check_written(model, written)
  entries = _entries_of(written, _input_channels(written, shapes))
  for entry in entries:
    if entry.absorbed:
      state[entry.name] = np.zeros(entry.shape, np.float32)
      shapes[entry.name] = entry.shape
  # The file must be one that can be read again.
  _check_shapes(shapes, entries, "variables of a network of torchvision's")
  _write_state(state, target)
  return target


def _check_written(model: nn.Module, written: ResNet | VGG) -> None:
  """Raises a ValueError unless a model computes what a network that is written does."""
  if type(model) is not type(written):
    raise ValueError(f"model must be the {type(written).__name__} of the variables; got {model!r}")
  if isinstance(model, ResNet) and model.output_stride is not None:
    raise ValueError(
      "model must have output_stride=None, since files of weights do not say which windows are "
      f"dilated; got {model.output_stride}"
    )
  if isinstance(model, VGG):
    found, wanted = _places_of_pools(model.chain), _places_of_pools(written.chain)
    if found != wanted:
      raise ValueError(
        f"model must have its pools at torchvision's places in the chain, {wanted}; got {found}"
      )


def _places_of_pools(chain: Chain) -> tuple[int, ...]:
  """Returns the places of the pools in a chain."""
  return tuple(i for i, channels in enumerate(chain) if channels == POOL)


def names_weights(path: str | os.PathLike) -> bool:
  """Returns whether a path is that of a file of weights, also of a pickle, and not a run."""
  target = user_path(path)
  return target.suffix.lower() in (*_SUFFIXES, *_PICKLES) and not target.is_dir()


# From a file to arrays by name, and back.


def _read_state(file: FilePath) -> dict[str, np.ndarray]:
  """Returns the floating-point values of a state dict, by their names without a prefix."""
  if file.suffix.lower() in _PICKLES:
    new = file.with_suffix(".safetensors")
    raise ValueError(
      f"path must be a .safetensors or .npz file, since reading a pickle such as {file} runs what "
      "is in it; where torch is installed, these two lines convert a state dict, also one that a "
      "checkpoint has under 'state_dict' or 'model':\n"
      "  import torch, safetensors.torch; state = "
      f"torch.load({str(file)!r}, map_location='cpu', weights_only=True)\n"
      "  safetensors.torch.save_file({k: v.contiguous() for k, v in state.get('state_dict', "
      f"state.get('model', state)).items()}}, {str(new)!r})"
    )
  if file.suffix not in _SUFFIXES:
    raise ValueError(f"path must end in {' or '.join(_SUFFIXES)}; got {file}")
  if not file.is_file():
    raise FileNotFoundError(f"path must be a file of weights; there is none at {file}")
  read = _read_npz if file.suffix == ".npz" else _read_safetensors
  found = {}
  for name, value in _without_prefixes(read(file)).items():
    if name.rpartition(".")[2] == _STEPS:
      continue
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(
        f"the weights in {file} must be floating-point numbers; {printable(name)} holds "
        f"{value.dtype}"
      )
    found[name] = value
  return found


def _without_prefixes(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a state dict without prefixes that all of its names have; they may be nested."""
  names = list(state)
  while True:
    common = [prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names)]
    if not names or not common:
      return dict(zip(names, state.values(), strict=True))
    names = [name.removeprefix(common[0]) for name in names]


def _read_safetensors(file: FilePath) -> dict[str, np.ndarray]:
  """Returns the arrays of a file of safetensors."""
  # Imported here: only files of weights need it.
  from safetensors import SafetensorError, deserialize

  try:
    entries = deserialize(file.read_bytes())
  except (SafetensorError, ValueError) as error:
    raise ValueError(f"{file} is damaged or no file of safetensors: {first_line(error)}") from None
  found = {}
  for name, entry in entries:
    if entry["dtype"] not in _TYPES:
      raise ValueError(
        f"the weights in {file} must be of type F16, BF16, F32 or F64; it holds "
        f"{printable(entry['dtype'])}"
      )
    # A copy, since the bytes of a file are read-only.
    array = np.frombuffer(bytearray(entry["data"]), _TYPES[entry["dtype"]])
    found[name] = array.reshape(entry["shape"])
  return found


def _read_npz(file: FilePath) -> dict[str, np.ndarray]:
  """Returns the arrays of an npz file, none of which may be a pickle."""
  # An array whose header claims more than memory holds is a damaged one, too.
  faults = (
    BadZipFile,
    zlib.error,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    MemoryError,
  )
  try:
    loaded = np.load(file, allow_pickle=False)
    # A single array would be a file of NumPy, too.
    if not isinstance(loaded, np.lib.npyio.NpzFile):
      raise ValueError("it holds a single array")
    with loaded:
      assert loaded.zip is not None  # as long as it is open
      check_unpacked([member.file_size for member in loaded.zip.infolist()], file.stat().st_size)
      # A file in it that is no array comes as bytes.
      return {name: np.asarray(loaded[name]) for name in loaded.files}
  except faults as error:
    raise ValueError(f"{file} is damaged or no npz file: {first_line(error)}") from None


def _with_torchvision_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a state dict with timm's dense layers of a VGG net as torchvision has them."""
  # timm convolves the last map with a window of its size, which is a dense layer. Without a
  # classifier, its last hidden layer must not pass for one.
  is_vgg = any(name.startswith("features.") for name in state)
  has_hidden = any(name.startswith(_TIMM_HIDDEN) for name in state)
  if not is_vgg:
    return dict(state)
  if has_hidden and "head.fc.weight" not in state:
    return {name: value for name, value in state.items() if not _is_dense(name)}
  renamed = {}
  for name, value in state.items():
    layer, _, variable = name.rpartition(".")
    if layer in _TIMM_DENSE:
      name = f"{_TIMM_DENSE[layer]}.{variable}"
      if value.ndim == 4:
        value = value.reshape(len(value), -1)
    renamed[name] = value
  return renamed


def _write_state(state: Mapping[str, np.ndarray], target: FilePath) -> None:
  """Writes a state dict, complete or not at all."""
  arrays = {}
  for name, value in state.items():
    arrays[name] = np.ascontiguousarray(value)
    layer, _, variable = name.rpartition(".")
    if variable == "running_mean":
      # torch counts the steps of each BatchNorm.
      arrays[f"{layer}.{_STEPS}"] = np.zeros((), np.int64)
  # The last step is a rename, so that a crash leaves no half of a file under this name.
  partial = target.with_name(f".{target.name}.partial")
  with partial.open("wb") as opened:
    if target.suffix == ".npz":
      np.savez(opened, **arrays)
    else:
      from safetensors.numpy import save

      # Readers of safetensors look here for the library that names the values.
      opened.write(save(arrays, metadata={"format": "pt"}))
  partial.replace(target)


# From names and shapes to a network.


def _model_of(shapes: Mapping[str, Shape], file: FilePath) -> ResNet | VGG:
  """Returns the network that a state dict of these names and shapes describes."""
  if any(re.match(r"layer1\.", name) for name in shapes):
    return _resnet_of(shapes, file)
  if any(re.match(r"features\.", name) for name in shapes):
    return _vgg_of(shapes)
  names = few(sorted(shapes), 5) or "none"
  raise ValueError(
    "weights must be those of a ResNet (conv1, layer1.0.conv1, ..., fc) or a VGG net (features.0, "
    f"..., classifier.6); the names for {file} are {names}"
  )


def _resnet_of(shapes: Mapping[str, Shape], file: FilePath) -> ResNet:
  """Returns the residual network that names and shapes describe."""
  # Numbers of the blocks that are there, by the number of their stage.
  found: dict[str, set[str]] = {}
  for name in shapes:
    place = re.match(r"layer([0-9]+)\.([0-9]+)\.", name)
    if place:
      found.setdefault(place[1], set()).add(place[2])
  other = _other_part(shapes)
  if other is not None:
    raise ValueError(
      f"the weights in {file} are of a ResNet with {other}, which is not read: only torchvision's "
      "resnet and wide_resnet nets are, and timm's of the same structure, such as resnet50"
    )
  # Counted, not read as numbers: those of a strange name may be huge.
  blocks = tuple(len(found.get(str(stage), ())) for stage in range(1, len(found) + 1))
  is_deep = any(name.endswith(".conv3.weight") for name in shapes)
  features = _size(shapes, "conv1.weight", 0)
  return ResNet(
    classes=_size(shapes, "fc.weight", 0) if any(map(_is_dense, shapes)) else None,
    blocks=blocks,
    block=Bottleneck if is_deep else BasicBlock,
    features=features,
    # Wide residual networks have more channels between the convolutions.
    inner_width=_size(shapes, "layer1.0.conv1.weight", 0) / features,
    stem="imagenet",
    shortcut="B",
  )


def _other_part(shapes: Mapping[str, Shape]) -> str | None:
  """Returns what sets a relative of the residual networks apart; None for one that is read."""
  for pattern, part in _OTHER_PARTS.items():
    if any(re.fullmatch(pattern, name) for name in shapes):
      return part
  # A grouped convolution reads a part of what the one before it makes.
  grouped = []
  for name, shape in shapes.items():
    if re.fullmatch(rf"{_BLOCK}conv2\.weight", name) and len(shape) == 4:
      made = _size(shapes, name.replace("conv2", "conv1"), 0)
      grouped.append(0 < shape[1] < made and made % shape[1] == 0)
  return "grouped convolutions (a ResNeXt)" if grouped and all(grouped) else None


def _vgg_of(shapes: Mapping[str, Shape]) -> VGG:
  """Returns the chain of convolutions that names and shapes describe."""
  norm = any(name.endswith(".running_mean") for name in shapes)
  places: list[int] = []
  dense: list[int] = []
  for name, shape in shapes.items():
    layer = re.fullmatch(r"(features|classifier)\.([0-9]{1,4})\.weight", name)
    if layer and layer[1] == "features" and len(shape) == 4:
      places.append(int(layer[2]))
    if layer and layer[1] == "classifier":
      dense.append(int(layer[2]))
  places, dense = sorted(places), sorted(dense)
  chain: list[Any] = []
  for i, place in enumerate(places):
    channels = _size(shapes, f"features.{place}.weight", 0)
    chain.append(channels)
    # A larger gap has a pool in it; one always ends the chain.
    is_last = i + 1 == len(places)
    if is_last or places[i + 1] - place > _conv_step(norm):
      chain.append(POOL)
  last = chain[-2] if chain else 1
  hidden = tuple(_size(shapes, f"classifier.{number}.weight", 0) for number in dense[:-1])
  features = _size(shapes, f"classifier.{dense[0]}.weight", 1) if dense else last
  return VGG(
    classes=_size(shapes, f"classifier.{dense[-1]}.weight", 0) if dense else None,
    chain=tuple(chain),
    norm=norm,
    hidden=hidden,
    pooled=max(1, math.isqrt(features // last)),
  )


def _size(shapes: Mapping[str, Shape], name: str, axis: int) -> int:
  """Returns the length of an axis; 1 where it is missing, which the check of shapes then names."""
  shape = shapes.get(name, ())
  return max(1, shape[axis]) if len(shape) > axis else 1


def _conv_step(norm: bool) -> int:
  """Returns how many of torchvision's modules a convolution takes, without a pool after it."""
  # A convolution, perhaps BatchNorm, and ReLU.
  return 3 if norm else 2


def _input_channels(model: ResNet | VGG, shapes: Mapping[str, Shape]) -> int:
  """Returns the number of channels of images."""
  first = "conv1.weight" if isinstance(model, ResNet) else "features.0.weight"
  return _size(shapes, first, 1)


def _is_dense(name: str) -> bool:
  """Returns whether a value is of a dense layer at the end of a network."""
  return name.startswith(_DENSE)


def _classifier_name(model: ResNet | VGG) -> str:
  """Returns what torchvision calls the classifier of a network."""
  return "fc" if isinstance(model, ResNet) else f"classifier.{_DENSE_STEP * _VGG_HIDDEN}"


def describe_named(name: str) -> str:
  """Describes the structure of torchvision's network of a name, as `describe_network` does."""
  if name in RESNET_NAMES:
    named = RESNETS[name]
    return _describe_blocks(named.block, named.blocks)
  base, _, norm = name.partition("_")
  return _describe_chain(_VGG_CONVS[base], bool(norm))


def describe_network(model: ResNet | VGG) -> str:
  """Describes the structure of a network, without its widths."""
  if isinstance(model, ResNet):
    inner = model.inner_width
    wide = "" if inner == 1 else f", {inner:g} times as wide between their convolutions"
    return _describe_blocks(model.block, model.blocks) + wide
  return _describe_chain(_convs_before_pools(model.chain), model.norm)


def _convs_before_pools(chain: Chain) -> tuple[int, ...]:
  """Returns the number of convolutions before each pool of a chain, which ends with a pool."""
  counts = [0]
  for channels in chain:
    if channels == POOL:
      counts.append(0)
    else:
      counts[-1] += 1
  return tuple(counts[:-1])


def _describe_blocks(block: type, blocks: Sequence[int]) -> str:
  """Describes a residual network."""
  return f"a ResNet with {', '.join(map(str, blocks))} blocks of the kind {block.__name__}"


def _describe_chain(convs: Sequence[int], norm: bool) -> str:
  """Describes a VGG net by its convolutions before each pool."""
  ending = "with" if norm else "without"
  return f"a VGG net of {', '.join(map(str, convs))} convolutions {ending} BatchNorm"


# The table of names and shapes.


def _entries_of(model: ResNet | VGG, channels: int) -> list[Entry]:
  """Returns the values that a state dict must have for a network of images with these channels."""
  images = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, channels), jnp.float32)
  # Nothing is computed, so that a strange file cannot ask for much memory.
  made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  entries, absorbed = [], []
  places = _conv_places(model.chain, model.norm) if isinstance(model, VGG) else ()
  hidden = len(model.hidden) if isinstance(model, VGG) else None
  flat: dict[Path, Any] = traverse_util.flatten_dict(dict(made))
  for path, leaf in flat.items():
    name = _their_name(path, places, hidden)
    assert name is not None  # since the network is one of theirs
    reads_map = isinstance(model, VGG) and path[1:] == (*model.dense_names[:1], "kernel")
    entries.append(
      Entry(name, _their_shape(leaf.shape), path, pixels=model.pooled if reads_map else 1)
    )
    if isinstance(model, VGG) and path[-1] == "mean":
      # torchvision's convolutions have a bias, also before BatchNorm.
      conv = places[int(path[1].removeprefix("layer")) - 1]
      absorbed.append(Entry(f"features.{conv}.bias", leaf.shape, path, absorbed=True))
  return entries + absorbed


def _conv_places(chain: Chain, norm: bool) -> tuple[int, ...]:
  """Returns the number of each convolution among torchvision's `features`."""
  places, place = [], 0
  for channels in chain:
    if channels == POOL:
      place += 1
    else:
      places.append(place)
      place += _conv_step(norm)
  return tuple(places)


def _their_name(path: Path, places: Sequence[int], hidden: int | None) -> str | None:
  """Returns torchvision's name of a variable; None where it has none.

  Args:
    path: of the variable, its collection first.
    places: the number of each convolution of a VGG net among its features.
    hidden: number of its dense layers before the classifier; None for a residual network.
  """
  layer = _their_layer(path[1:-1], places, hidden)
  variable = _VARIABLES.get(path[-1])
  return None if layer is None or variable is None else f"{layer}.{variable}"


def _their_layer(layer: Path, places: Sequence[int], hidden: int | None) -> str | None:
  """Returns torchvision's name of a layer; None where it has none. Arguments as `_their_name`."""
  if layer == ("classifier",):
    return "fc" if hidden is None else f"classifier.{_DENSE_STEP * hidden}"
  if hidden is None and layer in (("stem", "conv"), ("stem", "norm")):
    return "conv1" if layer[1] == "conv" else "bn1"
  module = "/".join(layer)
  block = re.fullmatch(r"stage(\d+)_block(\d+)/(conv(\d)|project)/(conv|norm)", module)
  if hidden is None and block:
    before = f"layer{block[1]}.{int(block[2]) - 1}"
    is_conv = block[5] == "conv"
    if block[3] == "project":
      return f"{before}.downsample.{0 if is_conv else 1}"
    return f"{before}.{'conv' if is_conv else 'bn'}{block[4]}"
  conv = re.fullmatch(r"layer(\d+)/conv/(conv|norm)", module)
  if hidden is not None and conv and int(conv[1]) <= len(places):
    # BatchNorm is the module after the convolution.
    return f"features.{places[int(conv[1]) - 1] + (conv[2] == 'norm')}"
  dense = re.fullmatch(r"hidden(\d+)", module)
  if hidden is not None and dense:
    return f"classifier.{_DENSE_STEP * (int(dense[1]) - 1)}"
  return None


def _their_shape(shape: Shape) -> Shape:
  """Returns the shape that torch gives a variable."""
  if len(shape) == 4:
    height, width, inputs, outputs = shape
    return (outputs, inputs, height, width)
  return shape[::-1]


def _to_ours(value: np.ndarray, pixels: int) -> np.ndarray:
  """Returns a variable from torch's value; `pixels` as in `Entry`."""
  if value.ndim == 4:
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0))
  if value.ndim < 2:
    return value
  # torch flattens channels before pixels.
  maps = value.reshape(len(value), -1, pixels, pixels)
  return np.ascontiguousarray(maps.transpose(2, 3, 1, 0)).reshape(-1, len(value))


def _to_theirs(value: np.ndarray, pixels: int) -> np.ndarray:
  """Returns torch's value of a variable; the inverse of `_to_ours`."""
  if value.ndim == 4:
    return value.transpose(3, 2, 0, 1)
  if value.ndim < 2:
    return value
  outputs = value.shape[1]
  maps = value.reshape(pixels, pixels, -1, outputs)
  return maps.transpose(3, 2, 0, 1).reshape(outputs, -1)


def _state_of(flat: Mapping[Path, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a state dict from variables by path, without absorbed values.

  Raises:
    ValueError: a variable that torchvision's networks do not have; gates among them.
  """
  for path in flat:
    if is_gate_path(path):
      raise ValueError(
        f"variables must be those of a network without gates; got {'/'.join(path[1:-1])}"
      )
  modules = {path[1] for path in flat}
  convs = sum(1 for path in flat if path[2:] == ("conv", "conv", "kernel"))
  places, hidden, pixels = (), None, 1
  if "stem" not in modules:
    norm = any(path[-1] == "mean" for path in flat)
    places = _conv_places(_chain_with(convs), norm)
    hidden = sum(1 for module in modules if module.startswith("hidden"))
    pixels = _flattened_side(flat, convs)
  # The dense layer that reads the last map.
  first_dense = "hidden1" if hidden else "classifier"
  state = {}
  for path, value in flat.items():
    name = _their_name(path, places, hidden)
    if name is None:
      raise ValueError(
        "variables must be those of a network of torchvision's, which has no "
        f"{printable('/'.join(path[1:]))}"
      )
    reads_map = hidden is not None and path[1:] == (first_dense, "kernel")
    state[name] = _to_theirs(value, pixels if reads_map else 1)
  return state


def _chain_with(convs: int) -> Chain:
  """Returns the chain of torchvision's VGG net with so many convolutions; its widths are 1."""
  for counts in _VGG_CONVS.values():
    if sum(counts) == convs:
      chain: list[Any] = []
      for count in counts:
        chain += [1] * count + [POOL]
      return tuple(chain)
  known = ", ".join(str(sum(counts)) for counts in _VGG_CONVS.values())
  raise ValueError(
    f"variables must be those of a ResNet, or of a VGG net of {known} convolutions; got {convs}"
  )


def _flattened_side(flat: Mapping[Path, np.ndarray], convs: int) -> int:
  """Returns the pixels along a side of the map that the first dense layer reads; 1 if unclear."""
  kernel = flat.get(("params", "hidden1", "kernel"))
  last = flat.get(("params", f"layer{convs}", "conv", "conv", "kernel"))
  if kernel is None or last is None:
    return 1
  side = math.isqrt(len(kernel) // last.shape[-1])
  return side if side**2 * last.shape[-1] == len(kernel) else 1


def _check_shapes(shapes: Mapping[str, Shape], entries: Collection[Entry], subject: str) -> None:
  """Raises a ValueError that names values which are missing, left over or of another shape."""
  wanted = {entry.name: entry.shape for entry in entries}
  wrong = []
  for name in sorted(wanted.keys() & shapes.keys()):
    if shapes[name] != wanted[name]:
      wrong.append(f"{name} {shapes[name]} in place of {wanted[name]}")
  faults = (
    ("missing", sorted(wanted.keys() - shapes.keys())),
    ("left over", sorted(shapes.keys() - wanted.keys())),
    ("of the wrong shape", wrong),
  )
  said = [f"{what}: {few(names, 5)}" for what, names in faults if names]
  if said:
    raise ValueError(f"{subject} must have the names and shapes of the network; {'; '.join(said)}")
