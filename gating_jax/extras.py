"""Extras of the installation: the libraries that they install, and errors that name them."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

# Libraries of each extra, as they are imported; an installation without extras lacks them.
EXTRAS = {
  "train": (
    "PIL",
    "absl",
    "array_record",
    "grain",
    "importlib_resources",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "optax",
    "orbax",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "tqdm",
  ),
  "export": ("flatbuffers", "onnx", "onnxruntime", "safetensors"),
  "video": ("av", "safetensors"),
}


def missing_extra(error: BaseException | None) -> str | None:
  """Returns the line that says which extra installs the library that an import lacks.

  None for any other error.

  >>> missing_extra(ModuleNotFoundError("No module named 'tqdm'", name="tqdm"))
  'tqdm is not installed; get it by: pip install "gating-jax[train]"'
  """
  # A library may have replaced the error by one of its own.
  while error is not None and not isinstance(error, ModuleNotFoundError):
    error = error.__cause__
  if error is None:
    return None
  library = (error.name or "").partition(".")[0]
  for extra, libraries in EXTRAS.items():
    if library in libraries:
      return _how_to_install(library, extra)
  return None


def _how_to_install(library: str, extra: str) -> str:
  return f'{library} is not installed; get it by: pip install "gating-jax[{extra}]"'


def require_extra(extra: str) -> None:
  """Raises a ModuleNotFoundError that says what to install, unless all of an extra is installed."""
  for library in EXTRAS[extra]:
    if importlib.util.find_spec(library) is None:
      raise ModuleNotFoundError(_how_to_install(library, extra), name=library)


@contextlib.contextmanager
def naming_extra() -> Iterator[None]:
  """Lets the error of a missing library say which extra installs it; decorates functions, too."""
  try:
    yield
  except ImportError as error:
    line = missing_extra(error)
    if line is None:
      raise
    raise ModuleNotFoundError(line, name=error.name) from error
