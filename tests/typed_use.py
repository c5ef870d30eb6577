"""Code of users that type checkers must accept, and mistakes that they must find.

Nothing here runs: `test_types.py` has pyright check it. A line with `pyright: ignore` is a mistake.
Where pyright finds none in it, it reports the comment.
"""

# pyright: basic, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import gating_jax
from configs import common
from gating_jax import (
  ChannelGate,
  GatedChannels,
  GatedModel,
  GateRecord,
  GateSettings,
  Prior,
  apply_gates,
  batch_shaping_loss,
  beta,
  executed_macs,
  find_pairs,
  fold,
  from_cdf,
  l0_loss,
  load_pretrained,
  load_run,
  mac_loss,
  model_summary,
  resnet,
  straight_through_gate,
  value_and_grad_over_devices,
)
from gating_jax.config_files import Config

Records = tuple[GateRecord, ...]


def exponential() -> Prior:
  """Makes a new prior from its two functions."""

  def cdf(x: jax.Array) -> jax.Array:
    return 1 - jnp.exp(-x)

  def pdf(x: jax.Array) -> jax.Array:
    return jnp.exp(-x)

  return from_cdf(cdf, pdf, name="exponential")


def gradient_of_loss(logits: jax.Array, prior: Prior) -> jax.Array:
  """Differentiates the loss of one layer of gates."""

  def loss(z: jax.Array) -> jax.Array:
    return batch_shaping_loss(z, prior).mean()

  return jax.grad(loss)(logits)


class GatedNet(nn.Module):
  """A user's module, `[N, H, W, D]` to `([N, 10] logits, records)`."""

  settings: GateSettings = GateSettings(initial_open=0.85)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, Records]:
    groups = (GatedChannels(32, macs_per_channel=9 * 16 * 64),)
    records = ChannelGate(groups, self.settings, name="gate")(x, train)
    h = nn.relu(nn.Conv(32, (3, 3))(x))
    h = apply_gates(h, records[0].gates)
    return nn.Dense(10)(jnp.mean(h, axis=(1, 2))), records


def train_loss(params: Any, batch_stats: Any, x: jax.Array, key: jax.Array) -> jax.Array:
  """Computes a loss of the module in training."""
  variables = {"params": params, "batch_stats": batch_stats}
  (logits, records), _ = GatedNet().apply(
    variables, x, True, mutable=["batch_stats"], rngs={"gate": key}
  )
  shaping = sum_over_layers(records, beta(0.6, 0.4))
  return jnp.mean(logits) + shaping + l0_loss(records) + mac_loss(records)


def loss_of_logged_gates(logits: np.ndarray, gates: np.ndarray) -> float:
  """Computes losses of arrays of the host."""
  record = GateRecord(logits=logits, probs=1 / (1 + np.exp(-logits)), gates=gates)
  return float(batch_shaping_loss(logits, beta(0.6, 0.4)).mean() + l0_loss([record, gates]))


def sum_over_layers(records: Records, prior: Prior) -> jax.Array:
  """Adds the losses of all layers."""
  losses = [batch_shaping_loss(record, prior).mean() for record in records]
  return jnp.stack(losses).sum()


def macs_of_images(images: jax.Array) -> float:
  """Counts the mean MACs of images in a network of the package."""
  model = resnet("resnet20", classes=10, gating="channel", width=0.5)
  variables = model.init(jax.random.key(0), images)
  logits, records = model.apply(variables, images)
  counts = model_summary(model, (32, 32, 3))
  print(logits.shape, [record.gates.mean() for record in records])
  return counts.always_macs + float(executed_macs(records).mean())


def step_on_devices(params: Any, x: jax.Array) -> tuple[Any, Any]:
  """Averages a gradient over the devices."""

  def loss(weights: Any) -> jax.Array:
    return jnp.mean(x @ weights)

  return value_and_grad_over_devices(loss, axis_name="batch")(params)


def get_config(arg: str = "") -> Config:
  """Makes a config, as a config file does."""
  config = common.image_config()
  config.seed = 3
  config.data.name = "digits"
  config.loss.batch_shaping.coefficient *= 2
  if config.model.width < 1 and "noise" in config.model:
    config.model.noise.final = 0.5
  return common.apply_variants(config, arg)


class PlainNet(nn.Module):
  """A user's module without gates."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
    h = nn.relu(nn.Conv(8, (3, 3), name="conv2")(h))
    return nn.Dense(10)(jnp.mean(h, axis=(1, 2)))


def gate_a_model(images: jax.Array, key: jax.Array) -> jax.Array:
  """Gates a model without a change of it, and computes its loss in training."""
  gated = GatedModel(PlainNet(), find_pairs(PlainNet(), images).pairs, GateSettings())
  variables = gated.init(key, images)
  (logits, records), new = gated.apply(
    variables, images, train=True, mutable=["batch_stats"], rngs={"gate": key}
  )
  print(len(fold(gated, {**variables, **new}).parts))
  return jnp.mean(logits) + sum_over_layers(records, beta(0.6, 0.4))


def use_pretrained(images: jax.Array, path: Path) -> jax.Array:
  """Gates a network that another library trained, and keeps it as files of that library."""
  model, variables = load_pretrained(path, "resnet50")
  gated = model.clone(gating="channel")
  fresh = gated.init(jax.random.key(0), images)
  logits, records = gated.apply({**fresh, **variables}, images)
  gating_jax.save_pretrained(variables, path.with_suffix(".npz"), model=model)
  return jnp.mean(logits) + mac_loss(records)


def use_run(images: jax.Array) -> jax.Array:
  """Uses a trained model."""
  model, variables, config = load_run("runs/digits")
  pixels = images - jnp.asarray(config.data.mean)
  logits, records = model.apply(variables, pixels)
  print(executed_macs(records), gating_jax.ops.entropy_loss(records))
  return logits


def mistakes(logits: jax.Array, images: jax.Array) -> None:
  """Makes mistakes, each of which a checker must find."""
  prior = beta(0.6, 0.4)
  beta("0.6", 0.4)  # pyright: ignore[reportArgumentType]
  batch_shaping_loss(logits, "beta(0.6, 0.4)")  # pyright: ignore[reportArgumentType]
  batch_shaping_loss(logits, prior, 0)  # pyright: ignore[reportCallIssue]
  straight_through_gate(logits)  # pyright: ignore[reportCallIssue]
  straight_through_gate(jax.random.key(0), logits, 0.5)  # pyright: ignore[reportCallIssue]
  executed_macs(logits)  # pyright: ignore[reportArgumentType]
  GatedChannels(32)  # pyright: ignore[reportCallIssue]
  GateSettings(initial_opened=0.5)  # pyright: ignore[reportCallIssue]
  GateRecord(logits, logits)  # pyright: ignore[reportCallIssue]
  GateRecord(logits=[0.5], probs=logits, gates=logits)  # pyright: ignore[reportArgumentType]
  resnet("resnet20", classes="ten")  # pyright: ignore[reportArgumentType]
  _, records = resnet("resnet20", classes=10).apply({}, images)
  print(records.logits)  # pyright: ignore[reportAttributeAccessIssue]
  print(records[0].logit)  # pyright: ignore[reportAttributeAccessIssue]
  model_summary("resnet20", (32, 32, 3))  # pyright: ignore[reportArgumentType]
  GatedModel(PlainNet(), ("conv1", "conv2"))  # pyright: ignore[reportArgumentType]
  GatedModel("PlainNet", ())  # pyright: ignore[reportArgumentType]
  load_pretrained("resnet50.npz", False)  # pyright: ignore[reportArgumentType]
  load_run(3)  # pyright: ignore[reportArgumentType]
  print(gating_jax.batch_shaping)  # pyright: ignore[reportAttributeAccessIssue]
