"""Matrices of cases: the fast tier runs a part, the slow tier all the others."""

import pytest


def in_turn(cases, *settings):
  """Every case with every setting, as pytest parameters; the fast tier meets every case once.

  Cases are tuples, or parameters with marks of their own. The settings, which are tuples too, take turns.
  """
  made = []
  for i, case in enumerate(cases):
    values, marks = (case.values, case.marks) if hasattr(case, "marks") else (case, ())
    for j, setting in enumerate(settings):
      slow = () if i % len(settings) == j else (pytest.mark.slow,)
      made.append(pytest.param(*values, *setting, marks=(*marks, *slow)))
  return made
