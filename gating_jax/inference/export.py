"""A network as files that run without this package: a program, its weights and a card.

    export/program.stablehlo     of `jax.export`: (weights, images) -> (outputs, gate logits)
    export/model.safetensors     the program's first argument, by name
    export/card.json             shapes, sizes and SHA-256 of each, and facts about the network
    export/model.onnx            and further files, where they are given

The weights are an argument of the program and no constants in it. The program stays small and
readable, any tool for safetensors finds the weights, they are not stored twice, and int8 weights go
to the device as they are.

Axes: N images, H and W pixels, D input channels.
Reference: the safetensors format; StableHLO's compatibility guarantees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from gating_jax.checks import one_of, shown, user_path
from gating_jax.extras import naming_extra
from gating_jax.inference import costs, folded
from gating_jax.inference.compiled import CompiledImages, check_image_shape, check_images
from gating_jax.inference.folded import FoldedNet
from gating_jax.inference.quantising import dequantise
from gating_jax.ops import arguments

PROGRAM, WEIGHTS, CARD = "program.stablehlo", "model.safetensors", "card.json"
# The name of the weights in exports of earlier versions, which are read, too.
_OLD_WEIGHTS = "weights.safetensors"
# Written by default; `rocm` is known, too, but has to be named.
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = (*PLATFORMS, "rocm")
# Version of the card and of the names of files; other versions are refused.
FORMAT = 1


class ExportError(Exception):
  """An error of a directory that cannot be written, or that holds no complete export.

  >>> load_exported("nowhere")
  Traceback (most recent call last):
  gating_jax.inference.export.ExportError: nowhere holds no complete export: card.json cannot be \
read: No such file or directory
  """


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A loaded export: `loaded(images)` runs it on `[N, H, W, D]` float32 network inputs.

  Attributes:
    card: the content of `card.json`.
    weights: by name.
    program: of `jax.export`.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = export_model(
  ...     lambda x: x.mean(axis=(1, 2)), f"{folder}/net", input_shape=(6, 6, 1), platforms=("cpu",)
  ...   )
  ...   loaded = load_exported(path)
  >>> float(loaded(jnp.full((2, 6, 6, 1), 0.5))[1, 0]), loaded.card["platforms"]
  (0.5, ['cpu'])
  """

  card: Mapping[str, Any]
  weights: Mapping[str, jax.Array]
  program: jax_export.Exported
  _call: Callable[..., Any] = dataclasses.field(repr=False)

  def __call__(self, images: Any) -> Any:
    """Returns outputs `[N, ...]`, and a tuple of the logits of each group of gates.

    An exported function returns what it returned before.

    Raises:
      ValueError: images of another shape or number than the program takes, or in integers.
    """
    x = check_images("images", images, self.card.get("input_shape"))
    size = self.card.get("batch_size")
    if size not in (None, len(x)):
      raise ValueError(f"images must be {size}, the batch_size of the export; got {len(x)}")
    if len(x):
      return self._call(dict(self.weights), x)
    # The program takes any number from 1 on.
    one = self._call(dict(self.weights), jnp.zeros((1, *x.shape[1:]), x.dtype))
    return jax.tree.map(lambda output: output[:0], one)


@naming_extra()
def export_model(
  model: FoldedNet | CompiledImages | Callable[[jax.Array], Any],
  directory: str | os.PathLike,
  *,
  input_shape: tuple[int, int, int] | None = None,
  batch_size: int | None = None,
  card: Mapping[str, Any] = MappingProxyType({}),
  platforms: Sequence[str] = PLATFORMS,
  files: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
  """Writes a network to a new directory, completely or not at all.

  Args:
    model: a network of `fold`, `prune` or `quantise`; a program of `compile_conditional` with
      strategies among `EXPORTABLE`, or of `compile_exits`; or any function of `[N, H, W, D]` that
      `jax.jit` takes, whose weights are then in the program.
    directory: a path that does not exist yet; its parent does.
    input_shape: `(H, W, D)`; None for that of a compiled program, which has one.
    batch_size: N; None for a program that takes any N, or for a compiled program's own N.
    card: facts about the network, as JSON: accuracy, classes, how to normalise images.
    platforms: platforms that the program is for; all can be written from any of them.
    files: further files for the directory, by name, such as `{"model.onnx": to_onnx(net, shape)}`.
  Returns:
    The directory.
  Raises:
    ExportError: it exists, or cannot be written.
    ValueError: a card that is no JSON or names a field that is written anyway, or another bad
      argument.
    TypeError: a model that is not folded, or an argument of another kind.

  >>> import tempfile
  >>> from gating_jax.inference.folding import fold
  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> net = fold(model, model.init(jax.random.key(0), x))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = export_model(net, f"{folder}/net", input_shape=(6, 6, 1), platforms=("cpu",))
  ...   sorted(file.name for file in path.iterdir())
  ['card.json', 'model.safetensors', 'program.stablehlo']
  """
  arguments.instance("directory", directory, (str, os.PathLike), rule="a path")
  arguments.instance("card", card, Mapping, rule="a mapping of names to JSON values")
  arguments.instance("files", files, Mapping, rule="a mapping of names to bytes")
  for name, content in files.items():
    arguments.instance("files: a name", name, str, rule="a text")
    # `Path` takes the last two for names.
    if name in (PROGRAM, WEIGHTS, CARD, "", "..") or Path(name).name != name:
      raise ValueError(f"files must have names of their own, without folders; got {name!r}")
    arguments.instance(f"files[{name!r}]", content, bytes, rule="bytes, the content of a file")
  # A Flax module is callable, too, but not without its variables.
  if isinstance(model, nn.Module):
    raise TypeError(f"model must be folded first, by fold(model, variables); got {shown(model)}")
  if not isinstance(model, (FoldedNet, CompiledImages)):
    arguments.function("model", model, "a folded or compiled network, or a function of images")
  directory = user_path(directory)
  if directory.exists() or directory.is_symlink():
    raise ExportError(f"export directory must be new; {directory} exists")
  if input_shape is None and isinstance(model, CompiledImages):
    input_shape = model.input_shape
  input_shape = check_image_shape(input_shape)
  if batch_size is not None:
    arguments.whole_number("batch_size", batch_size)
  platforms = arguments.items("platforms", platforms, f"names among {', '.join(_KNOWN_PLATFORMS)}")
  for name in platforms:
    one_of("platforms", name, _KNOWN_PLATFORMS)
  if isinstance(model, CompiledImages):
    _check_compiled(model, input_shape, batch_size)
    batch_size = model.batch_size
  if isinstance(model, FoldedNet):
    model.check_channels(input_shape[2])
  from safetensors.numpy import save

  # Weights become an argument, so that the program holds no constants of their size.
  weights, function = _split_weights(model)
  program = _program(function, weights, _images(input_shape, batch_size), platforms=platforms)
  files = {
    PROGRAM: bytes(program.serialize()),
    WEIGHTS: save({name: np.asarray(w) for name, w in weights.items()}),
    **files,
  }
  own = {
    "format": FORMAT,
    "jax_version": jax.__version__,
    "platforms": list(program.platforms),
    "input_shape": list(input_shape),
    "batch_size": batch_size,
    "parameters": sum(int(np.size(w)) for w in weights.values()),
  }
  if isinstance(model, FoldedNet):
    own["dense_macs"] = int(costs.macs(model, input_shape))
  own["files"] = {}
  for name, data in files.items():
    own["files"][name] = {"bytes": len(data), "sha256": _digest(data)}
  _write(directory, {**files, CARD: _card(own, card)})
  return directory


def _check_compiled(
  model: CompiledImages, input_shape: tuple[int, int, int], batch_size: int | None
) -> None:
  """Raises ValueError unless a compiled network can be exported, for images of these shapes."""
  if batch_size not in (None, model.batch_size):
    raise ValueError(
      f"batch_size must be None or {model.batch_size}, that of the compiled model; got {batch_size}"
    )
  if input_shape != model.input_shape:
    raise ValueError(
      f"input_shape must be {model.input_shape}, that of the compiled model; got {input_shape}"
    )
  if model.device_bound:
    raise ValueError(
      f"model must be compiled without {', '.join(model.device_bound)}, tied to one kind of "
      "device; compile_conditional(..., candidates=EXPORTABLE) does"
    )


@naming_extra()
def load_exported(directory: str | os.PathLike) -> Loaded:
  """Loads an export on this process's default device, after checking it against its card.

  Args:
    directory: of `export_model`.
  Returns:
    A `Loaded`, a function of `[N, H, W, D]` images.
  Raises:
    ExportError: a file is missing, cut off, changed, or not what the program takes.

  >>> import tempfile
  >>> from gating_jax.inference.folding import fold
  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> net = fold(model, model.init(jax.random.key(0), x))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = export_model(net, f"{folder}/net", input_shape=(6, 6, 1), platforms=("cpu",))
  ...   loaded = load_exported(path)
  >>> outputs, gate_logits = loaded(x)
  >>> loaded.card["input_shape"], outputs.shape, gate_logits[0].shape
  ([6, 6, 1], (2, 3), (2, 4))
  """
  # Imported here: only exports need it.
  from safetensors import SafetensorError
  from safetensors.numpy import load as read_tensors

  arguments.instance("directory", directory, (str, os.PathLike), rule="a path")
  directory = user_path(directory)
  card = _read_card(directory)
  weights_file = _weights_name(card)
  serialised, tensors = _read(directory, PROGRAM, card), _read(directory, weights_file, card)
  try:
    weights = read_tensors(tensors)
  except (SafetensorError, ValueError, KeyError) as error:
    raise ExportError(f"{directory / weights_file} is damaged: {error}") from None
  try:
    program = jax_export.deserialize(bytearray(serialised))
  # flatbuffers raises many kinds of errors on damaged bytes.
  except Exception as error:
    raise ExportError(
      f"{directory / PROGRAM} is damaged or of another version of JAX than {jax.__version__}: "
      f"{error}"
    ) from None
  # The weights' digest is right; they must also be those of this very program.
  wanted = jax.tree.unflatten(program.in_tree, program.in_avals)[0][0]
  if _shapes(weights) != _shapes(wanted):
    raise ExportError(f"{directory / weights_file} does not have the weights that {PROGRAM} takes")
  return Loaded(card, jax.device_put(weights), program, _call=jax.jit(program.call))


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
  """Returns the shape and the type of each array, by name."""
  return {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}


def _split_weights(model: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any], Any], Any]]:
  """Splits a model into its weights by name, and a function of these and of images."""
  if isinstance(model, FoldedNet):
    tree, run = model, _run_folded
  elif isinstance(model, CompiledImages):
    tree, run = model.weights, model.program
  else:
    return {}, lambda _, x: model(x)
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  weights = {}
  # Names such as `parts.1.convs.0.kernel`, which readers of safetensors show.
  for path, leaf in leaves:
    weights[jax.tree_util.keystr(path, simple=True, separator=".")] = leaf
  names = list(weights)

  def function(weights: Mapping[str, Any], x: Any) -> Any:
    """Puts the weights back into their tree, which the program takes as a flat dict, and runs."""
    return run(jax.tree.unflatten(structure, [weights[name] for name in names]), x)

  return weights, function


def _run_folded(net: FoldedNet, x: Any) -> Any:
  """Runs a folded network, whose weights may be int8."""
  return folded.run_net(dequantise(net), x)


def _images(input_shape: tuple[int, int, int], batch_size: int | None) -> jax.ShapeDtypeStruct:
  """Returns the shape of a program's images; N is symbolic without a batch size."""
  if batch_size is not None:
    return jax.ShapeDtypeStruct((batch_size, *input_shape), jnp.float32)
  # One program for any number of images from 1 on.
  (n,) = jax_export.symbolic_shape("n", constraints=("n >= 1",))
  return jax.ShapeDtypeStruct((n, *input_shape), jnp.float32)


def _program(
  function: Callable, weights: Mapping[str, Any], images: Any, platforms: Sequence[str]
) -> jax_export.Exported:
  """Exports a function of weights and images."""
  shapes = {}
  for name, array in weights.items():
    shapes[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
  return jax_export.export(jax.jit(function), platforms=platforms)(shapes, images)


def _card(own: Mapping[str, Any], given: Mapping[str, Any]) -> bytes:
  """Returns the card as JSON, of our own fields and those given."""
  if taken := own.keys() & given.keys():
    raise ValueError(f"card must not name {', '.join(sorted(taken))}, which export_model writes")
  try:
    # NaN and infinity are no JSON, and other readers refuse them.
    return json.dumps({**own, **given}, indent=2, allow_nan=False).encode()
  except (TypeError, ValueError) as error:
    raise ValueError(f"card must be of JSON values, numbers finite; {error}") from None


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
  """Writes under another name first, so that a directory of the right name is complete."""
  # Hidden and random, so that two exports of one name do not meet.
  partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
  try:
    partial.mkdir()
    try:
      for name, data in files.items():
        with (partial / name).open("wb") as file:
          file.write(data)
          file.flush()
          # On disk before the rename: a crash must not leave a complete name with cut-off files.
          os.fsync(file.fileno())
      partial.rename(directory)
      _sync(directory.parent)
    # A KeyboardInterrupt leaves no half-written directory either.
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise
  except OSError as error:
    raise ExportError(
      f"export directory {directory} cannot be written: {error.strerror}"
    ) from error


def _sync(directory: Path) -> None:
  """Makes a rename within a directory permanent."""
  # A rename is permanent only after an fsync of its directory.
  handle = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _read_card(directory: Path) -> dict[str, Any]:
  """Reads and checks the card."""
  data = _bytes(directory, CARD)
  try:
    card = json.loads(data)
  # RecursionError: a damaged file may nest deeper than Python can follow.
  except (ValueError, RecursionError) as error:
    raise ExportError(f"{directory / CARD} is damaged: it must hold JSON ({error})") from None
  files = card.get("files") if isinstance(card, dict) else None
  for name in (PROGRAM, _weights_name(card)):
    said = files.get(name) if isinstance(files, dict) else None
    if not isinstance(said, dict) or not isinstance(said.get("sha256"), str):
      raise ExportError(
        f"{directory / CARD} is damaged: it must have the SHA-256 of {PROGRAM} and {WEIGHTS}"
      )
  if card.get("format") != FORMAT:
    raise ExportError(f"{directory / CARD}: format must be {FORMAT}; got {card.get('format')!r}")
  return card


def _weights_name(card: Any) -> str:
  """Returns the name of the file of weights, as the card of an export has it."""
  files = card.get("files") if isinstance(card, dict) else None
  is_old = isinstance(files, dict) and WEIGHTS not in files and _OLD_WEIGHTS in files
  return _OLD_WEIGHTS if is_old else WEIGHTS


def _read(directory: Path, name: str, card: Mapping[str, Any]) -> bytes:
  """Reads a file, which must be the one that the card describes."""
  data, said = _bytes(directory, name), card["files"][name]
  # Cut-off and changed files are found here, before anything is read from them.
  if _digest(data) != said["sha256"]:
    raise ExportError(
      f"{directory / name} is damaged: its content has changed; its SHA-256 is not that in {CARD}"
    )
  return data


def _bytes(directory: Path, name: str) -> bytes:
  """Reads a file of an export.

  Raises:
    ExportError: it cannot be read.
  """
  try:
    return (directory / name).read_bytes()
  except OSError as error:
    raise ExportError(
      f"{directory} holds no complete export: {name} cannot be read: {error.strerror}"
    ) from None


def _digest(data: bytes) -> str:
  """Computes the SHA-256 of a file's contents."""
  return hashlib.sha256(data).hexdigest()
