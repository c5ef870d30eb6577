"""Build of the native CPU kernels with the machine's C++ compiler, and their loading.

    python -c 'from gating_jax.native import build; build.main()'

`launch/setup.sh` runs this after the installation.

The library is not an extension of the package's wheel. The headers it needs come with jax: pip
builds in isolation, so it would have to fetch a second jaxlib, and could get another version than
the one that loads the result. The library is therefore built where it runs, by that command or on
first use, into the user's cache, under a name with a hash of sources, compiler, flags and version
of jax. Several processes may build at the same time: each writes its own file and renames it. One
library holds the variants for all instruction sets of the architecture and picks one at run time.

Environment: `GATING_JAX_NATIVE=0` switches the kernels off; `CXX` names the compiler (default: c++,
g++, clang++); `XDG_CACHE_HOME` is the folder of caches (default: ~/.cache).
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
# Without -march: the code picks its instruction set at run time.
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
# Seconds.
_TIME_LIMIT = 300


class NotBuilt(Exception):
  """Error for a missing native library; the text says why, and what would help."""


def load() -> ctypes.CDLL:
  """Loads the library and builds it if necessary.

  Raises:
    NotBuilt: switched off, no compiler, or a compiler that fails.
  """
  try:
    return ctypes.CDLL(str(built()))
  except OSError as error:
    raise NotBuilt(f"the native library could not be loaded: {error}") from error


def built() -> Path:
  """Returns the library's file and builds it if it is not there.

  Raises:
    NotBuilt: as in `load`.
  """
  if os.environ.get(SWITCH, "1") == "0":
    raise NotBuilt(f"switched off by {SWITCH}=0")
  compiler = _compiler()
  # All that the result depends on is in its name, so an old library is never loaded.
  key = hashlib.sha256(repr((compiler, FLAGS, _version(compiler), jax.__version__)).encode())
  for source in SOURCES:
    key.update(source.read_bytes())
  path = _folder() / f"native-{key.hexdigest()[:16]}.so"
  if not path.exists():
    _compile(compiler, path)
  return path


def _compile(compiler: list[str], path: Path) -> None:
  """Compiles into a temporary file and renames it, so that the file at `path` is complete."""
  try:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # In the same folder, since a file system renames atomically only within itself.
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
  """Returns the command of the first compiler found, with the options that CXX has."""
  name, *options = shlex.split(os.environ.get("CXX", "")) or [""]
  names = [name] if name else _COMPILERS
  for each in names:
    found = shutil.which(each)
    if found:
      return [found, *options]
  raise NotBuilt(
    f"no C++ compiler found ({', '.join(names)}); install one, such as Debian's package g++, or "
    "name it in CXX"
  )


def _version(compiler: list[str]) -> str:
  """Returns what the compiler says of its version."""
  command = [*compiler, "--version"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT)
    return done.stdout
  except (OSError, subprocess.TimeoutExpired) as error:
    raise NotBuilt(f"{shlex.join(compiler)} failed: {error}") from error


def _folder() -> Path:
  """Returns the folder of the library in the user's cache."""
  try:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gating_jax"
  # There is no home directory.
  except RuntimeError as error:
    raise NotBuilt(f"no folder for the native library: {error}; set XDG_CACHE_HOME") from error


def main() -> None:
  """Builds the library and prints the result; never fails, since everything runs without it."""
  try:
    load()
    print(f"native kernels: {built()}")
  except NotBuilt as error:
    print(f"native kernels: none ({error}); everything runs without them, in plain JAX")
