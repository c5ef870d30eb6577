"""Matrices of cases: the fast tier runs a part, the slow tier all the others.

Cases and settings are tuples of values, or pytest parameters with marks of their own.
"""

import pytest


def in_turn(cases, *settings):
  """Every case with every setting; the fast tier meets every case once, the settings take turns."""
  made = []
  for i, case in enumerate(cases):
    for j, setting in enumerate(settings):
      made.append(_joined(case, setting, slow=i % len(settings) != j))
  return made


def thinned(cases, step):
  """Every case; the fast tier meets each `step`-th."""
  return [_joined(case, (), slow=i % step != 0) for i, case in enumerate(cases)]


def _joined(case, setting, slow):
  values, marks = (case.values, case.marks) if hasattr(case, "marks") else (case, ())
  return pytest.param(*values, *setting, marks=(*marks, pytest.mark.slow) if slow else marks)
