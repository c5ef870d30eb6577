"""What all tests share: eight virtual devices, a compilation cache, float64 on request."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Compiling takes most of the time, and twice as long with all optimisations; set to 0 for the programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run, so that a failure is the change's; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("project", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
  """Thousands of programs in one process exceed the memory maps that Linux grants it, and crash it."""
  yield
  jax.clear_caches()


@pytest.fixture
def x64():
  """float64 within the test."""
  with jax.enable_x64(True):
    yield
