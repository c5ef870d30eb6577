"""A made run for the report, with gates of known behaviour."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from gating_jax.images.report import ImageRun
from gating_jax.models.summary import ModelCounts
from gating_jax.ops.priors import beta
from gating_jax.training import evaluation

M, CLASSES = (
  60,
  ("<script>alert(1)</script>", "$b$", "a class of a very long name, longer than anybody reads"),
)
LAYERS = (("stage1/conv1", 3), ("stage2/conv1", 2))
COUNTS = ModelCounts(
  params=100, gate_params=10, gates=5, macs=1000, gate_macs=50, gated=600, gate_layers=LAYERS
)
# Without gates there are no gate networks.
UNGATED = ModelCounts(params=100, gate_params=0, gates=0, macs=1000, gate_macs=0, gated=0)
LABELS = np.arange(M) % 3
# Open always; never; for class 0; for images 7 and 11, more surely for 11; for class 2 and image 0.
LOGITS = np.stack(
  [
    np.full(M, 4.0),
    np.full(M, -4.0),
    np.where(LABELS == 0, 3.0, -3.0),
    np.full(M, -5.0),
    np.where((LABELS == 2) | (np.arange(M) == 0), 2.0, -2.0),
  ],
  axis=1,
).astype(np.float32)
LOGITS[[7, 11], 3] = 1, 2


def pixels(index):
  """Each image has one brightness."""
  return np.repeat(np.asarray(index, np.uint8), 64).reshape(-1, 8, 8, 1) * np.uint8(4)


def results(at, kind):
  """Returns the model's outputs: later images have larger losses; class 2 is taken for class 1."""
  found = {"cross_entropy": at.astype(np.float32)}
  if kind != "scenes":
    predicted = np.minimum(LABELS[at], 1)
    found |= {"predicted": predicted, "correct": predicted == LABELS[at]}
  if kind != "ungated":
    gates = LOGITS[at] > 0
    found |= {"gates": gates, "gate_logits": LOGITS[at], "macs": 100.0 * gates.sum(axis=1)}
  return found


def run(kind="gated", **changes):
  """A run of `gated` or `ungated` images, or of `scenes`."""
  summarise = (lambda sums, n: {"mean_iou": 0.5}) if kind == "scenes" else evaluation.summarise
  result, images, gates = evaluation.evaluate(
    lambda at, labels: results(at, kind),
    [((np.arange(M), LABELS), M)],
    UNGATED if kind == "ungated" else COUNTS,
    summarise,
    classes=None if kind == "scenes" else 3,
    noise_scale=1.0,
  )
  lines = evaluation.histograms(gates, LAYERS) if gates else {}
  figure = Figure(figsize=(3, 2))
  figure.subplots().set_title("$x")
  made = ImageRun(
    title="tiny on <b>",
    subtitle="Step 4 of 4.",
    noun="scene" if kind == "scenes" else "image",
    rows=[("a number", "1 of 2")],
    score=("mean_iou", "mean IoU") if kind == "scenes" else ("accuracy", "accuracy"),
    tests=[{"step": step, **result} for step in (2, 4)],
    histograms=[{"step": step, **lines} for step in (2, 4)],
    macs=1000,
    images=images,
    gates=gates,
    layers=LAYERS if gates else (),
    class_names=None if kind == "scenes" else CLASSES,
    prior=beta(0.6, 0.4),
    config=[("data.name", "<i>digits")],
    read=pixels,
    pictures=[(figure, "some scenes")] if kind == "scenes" else (),
  )
  return dataclasses.replace(made, **changes)
