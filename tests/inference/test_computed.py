"""What strategies are said to compute against what their convolutions are given, run operation by operation."""

import jax
import numpy as np
import pytest
from test_conditional import KINDS, SHAPE, images, net

from gating_jax.inference import conditional, folded, folded_macs
from gating_jax.inference.computed import account, spent
from gating_jax.inference.folded import Group
from gating_jax.inference.kernel_strategies import EXPORTABLE, STRATEGIES
from gating_jax.inference.strategies import capacities, settings_of

CASES = [(kind, strategy) for kind, known in KINDS.items() for strategy in ("masked", *known) if strategy in EXPORTABLE]


def prepared(kind, count, buckets=3):
  """The network, its settings from calibration images, and its gates and what every part sees for a batch."""
  of = net(kind)
  gates = conditional._gates_of(of, images(6, seed=5))
  return of, settings_of(of, buckets, gates), conditional._seen(of, images(count))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_it_is_what_the_convolutions_are_given(kind, strategy, count, monkeypatch):
  of, settings, seen = prepared(kind, count)
  given = []
  convolve = folded.Conv.__call__

  def counting(conv, x):
    y = convolve(conv, x)
    given.append(y.size * np.prod(conv.kernel.shape[:3]))
    return y

  shape, compared = SHAPE, 0
  monkeypatch.setattr(folded.Conv, "__call__", counting)
  for part, setting, (x, gates, before) in zip(of.parts, settings, seen, strict=True):
    if (made := STRATEGIES[strategy](part, setting)) is not None:
      given.clear()
      with jax.disable_jit():
        made[1](made[0], x, gates, before)
      said = spent(strategy, part, setting, shape, gates, before, count)
      assert said == pytest.approx(sum(given), rel=1e-12)
      compared += 1
    shape, _ = folded_macs.part_macs(part, shape)
  assert compared


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "outputs"])
def test_native_computes_what_is_open(kind):
  of, settings, seen = prepared(kind, 5)
  gates = [np.asarray(g) for _, own, _ in seen for g in own]
  opened = folded_macs.macs_by_part(of, SHAPE, gates)
  shape = SHAPE
  for part, setting, (_, own, before), macs in zip(of.parts, settings, seen, opened, strict=True):
    expected = np.sum(np.broadcast_to(macs - folded_macs.head_macs(part), 5))
    assert spent("native", part, setting, shape, own, before, 5) == expected
    shape, _ = folded_macs.part_macs(part, shape)


def test_capacities_of_groups_that_switch_together():
  assert capacities([Group(64)], 4) == [(16, 32, 48, 64)]
  assert capacities([Group(64)], 2) == [(32, 64)]
  assert capacities([Group(64), Group(8, channels=2, always=4)], 4) == [(16, 32, 48, 64), (16, 32, 32, 32)]


def test_ratios_of_parts_and_of_whole_programs():
  of, settings, _ = prepared("blocks", 4)
  known = [[name for name in ("masked", "native", "pallas") if STRATEGIES[name](part, setting) or name == "native"]
           for part, setting in zip(of.parts, settings, strict=True)]
  found = account(of, known, settings, SHAPE, np.arange(6).reshape(2, 3))
  heads = [folded_macs.head_macs(part) for part in of.parts]
  dense = folded_macs.macs_by_part(conditional.ungated(of), SHAPE)
  assert found.dense == dense
  opened, computed = found.of_part(1)
  assert computed["masked"] == pytest.approx(1 + heads[1] / dense[1])
  assert computed["native"] == computed["pallas"] == pytest.approx(opened)
  assert opened < computed["masked"]
  classifier = of.classifier[0].size
  opened, computed = found.of_net({"masked": ["masked"] * 3, "mixed": ["masked", "native", "masked"]})
  total = sum(dense) + classifier
  assert computed["masked"] == pytest.approx((total + sum(heads)) / total)
  saved = found.computed[1]["masked"] - found.computed[1]["native"]
  assert computed["mixed"] == pytest.approx(computed["masked"] - saved / total)
  gates = [setting.gates[0] for setting in settings[1:]]
  assert opened == pytest.approx(folded_macs.macs(of, SHAPE, gates).mean() / total)
