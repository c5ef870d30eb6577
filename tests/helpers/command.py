"""The command `gating-jax` within this process, for tests that need no process of their own."""

import contextlib
import io
import sys
import warnings

import pytest
from absl import flags
from absl.testing import flagsaver

from gating_jax import cli


def run_command(*arguments):
  """Returns the exit status of the command, and its stdout and stderr together."""
  with contextlib.ExitStack() as stack:
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(sys, "argv", ["gating-jax", *map(str, arguments)])
    patch.setattr(sys, "path", [*sys.path])
    stack.enter_context(flagsaver.flagsaver())
    stack.enter_context(warnings.catch_warnings())
    # ml_collections calls it.
    warnings.filterwarnings("ignore", message="the load_module", category=DeprecationWarning)
    written = io.StringIO()
    stack.enter_context(contextlib.redirect_stdout(written))
    stack.enter_context(contextlib.redirect_stderr(written))
    flags.FLAGS.unparse_flags()
    try:
      with pytest.raises(SystemExit) as ended:
        cli.main()
    finally:
      flags.FLAGS.mark_as_parsed()  # as libraries that look at flags expect
  return ended.value.code or 0, written.getvalue()
