"""Builds the native CPU kernels with the machine's C++ compiler, and loads them.

    python -c 'from gating_jax.native import build; build.main()'      (launch/setup.sh runs it after the installation)

Not an extension of the package's wheel, since the headers it needs come with jax itself: a build in isolation, as pip
makes it, would have to fetch a second jaxlib, and could get another version than the one that loads the result. So it
is built where it runs, by that command or else by the first use, into the user's cache, under a name that holds a hash
of sources, compiler, flags and version of jax. Several processes may do so at once: each writes a file of its own and
renames it. One library holds the variants for all instruction sets of the architecture and picks one when it runs.

Environment: `GATING_JAX_NATIVE=0` switches the kernels off; `CXX` names the compiler (default: c++, g++, clang++);
`XDG_CACHE_HOME` the folder of caches (default: ~/.cache).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

SWITCH = "GATING_JAX_NATIVE"
SOURCES = tuple(Path(__file__).parent / name for name in ("gated_chain.cc", "isa.inc"))
FLAGS = (
  "-std=c++17",
  "-O3",
  "-ffp-contract=fast",
  "-fno-math-errno",
  "-fvisibility=hidden",
  "-fPIC",
  "-shared",
  "-pthread",
)
_COMPILERS = ("c++", "g++", "clang++")
_TIME_LIMIT = 300  # seconds


class NotBuilt(Exception):
  """There is no native library here; the text says why, and what would help."""


def load() -> ctypes.CDLL:
  """The library, built if need be.

  Raises:
    NotBuilt: switched off, no compiler, or a compiler that fails.
  """
  try:
    return ctypes.CDLL(str(built()))
  except OSError as error:
    raise NotBuilt(f"the native library could not be loaded: {error}") from error


def built() -> Path:
  """The library's file, built if it is not there."""
  if os.environ.get(SWITCH, "1") == "0":
    raise NotBuilt(f"switched off by {SWITCH}=0")
  compiler = _compiler()
  key = hashlib.sha256(repr((compiler, FLAGS, _version(compiler), jax.__version__)).encode())
  for source in SOURCES:
    key.update(source.read_bytes())
  path = _folder() / f"native-{key.hexdigest()[:16]}.so"
  if not path.exists():
    _compile(compiler, path)
  return path


def _compile(compiler: list[str], path: Path) -> None:
  """Writes beside `path`, then renames: whoever sees the name sees the whole file."""
  try:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(".part", path.stem, path.parent)
    os.close(handle)
  except OSError as error:
    raise NotBuilt(f"the folder for the native library cannot be written: {error}") from error
  try:
    done = subprocess.run(
      [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCES[0]), "-o", part],
      capture_output=True,
      text=True,
      timeout=_TIME_LIMIT,
    )
    if done.returncode:
      raise NotBuilt(f"{shlex.join(compiler)} failed: {done.stderr.strip()[-2000:]}")
    os.replace(part, path)
  except (OSError, subprocess.TimeoutExpired) as error:
    raise NotBuilt(f"{shlex.join(compiler)} failed: {error}") from error
  finally:
    Path(part).unlink(missing_ok=True)


def _compiler() -> list[str]:
  named = shlex.split(os.environ.get("CXX", ""))
  for command in [named] if named else [[name] for name in _COMPILERS]:
    if found := shutil.which(command[0]):
      return [found, *command[1:]]
  sought = named[0] if named else ", ".join(_COMPILERS)
  raise NotBuilt(
    f"no C++ compiler found ({sought}); install one, such as Debian's package g++, or name it in CXX"
  )


def _version(compiler: list[str]) -> str:
  try:
    return subprocess.run(
      [*compiler, "--version"], capture_output=True, text=True, timeout=_TIME_LIMIT
    ).stdout
  except (OSError, subprocess.TimeoutExpired) as error:
    raise NotBuilt(f"{shlex.join(compiler)} failed: {error}") from error


def _folder() -> Path:
  try:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gating_jax"
  except RuntimeError as error:  # no home
    raise NotBuilt(f"no folder for the native library: {error}; set XDG_CACHE_HOME") from error


def main() -> None:
  """Builds, and says so, or why not; never fails, since everything runs without."""
  try:
    load()
    print(f"native kernels: {built()}")
  except NotBuilt as error:
    print(f"native kernels: none ({error}); everything runs without them, in plain JAX")
