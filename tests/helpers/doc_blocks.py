"""Code blocks of a page of the documentation, and the commands in them."""

import re
import shlex

from tests.helpers import ROOT


def blocks(page, language):
  """Returns the code of a page in this language, block by block."""
  return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page):
  """Returns each `gating-jax` command of a page, as its flags `(name, value)`."""
  lines = [
    line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
  ]
  split = [shlex.split(line, comments=True) for line in lines]
  return [
    [flag.removeprefix("--").partition("=")[::2] for flag in words[1:]]
    for words in split
    if words[:1] == ["gating-jax"]
  ]
