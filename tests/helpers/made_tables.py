"""Small text files of tables, and the error of one that cannot be read."""

import re

import pytest


def write(folder, files):
  for name, text in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
  return folder


def refused(rule):
  return pytest.raises(ValueError, match=re.escape(rule))
