"""Networks for several sets: equal MACs, a head a set, and what a run says of each set."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import union, worlds
from gating_jax.data import unions
from gating_jax.data.image_sets import EqualShares
from gating_jax.images import build, classification, export, model_card
from gating_jax.layers.blocks import Bottleneck
from gating_jax.models import resnets
from gating_jax.models.summary import model_summary, solve_share
from gating_jax.training import objectives
from gating_jax.training.outlines import Outline
from tests.helpers import runs, tiny, tiny_cli

SETS = ("digits", "digit_scenes", "turned_digits")
CLASSES = tuple(f"{name}/{digit}" for name in SETS for digit in range(10))
UNGATED = ("ungated", "all_open", "scale", "kernels")


def built(variants, **changes):
  config = union.get_config(variants)
  config.update_from_flattened_dict(changes)
  depth = 4 if config.data.name.startswith("union_told") else 3
  data = Outline(examples=512, class_names=CLASSES, shape=(16, 16, depth))
  return build.build(config.lock(), outlines=[data, data])


@pytest.fixture(scope="module")
def ungated():
  return built("row=ungated").counts


@pytest.mark.thin(6)
@pytest.mark.parametrize("row", sorted(set(union._ROWS) - set(UNGATED)))
def test_rows_have_the_macs_of_the_ungated_one(row, ungated):
  experiment = built(f"row={row}")
  counts, gate = experiment.counts, experiment.model.gate
  share = gate.initial_open if row == "random" else gate.share
  macs = counts.always_macs + share * counts.gated
  assert macs == pytest.approx(ungated.macs, rel=1e-9)
  if experiment.share is not None:
    assert float(experiment.share(10**6)) == pytest.approx(share)


def test_mixed_kernels_cost_about_as_much_as_the_ungated_row(ungated):
  counts = built("row=kernels").counts
  assert counts.macs + counts.gate_macs == pytest.approx(ungated.macs, rel=0.06)


def test_the_share_of_a_row_follows_the_size_of_its_net():
  # Gate networks weigh more in a narrow net: that of width 6 / 16 opens 0.2426.
  assert built("row=no_glance", **{"model.width": 0.25}).model.gate.share < 0.241


def test_shares_are_those_of_worlds():
  config = worlds.get_config("row=no_glance")
  ungated = worlds.get_config("row=ungated")
  macs = model_summary(build.network(ungated.model, 10), (16, 16, 3)).macs
  share = solve_share(build.network(config.model, 10), (16, 16, 3), macs=macs)
  assert share == pytest.approx(config.model.gate.share, abs=1e-5)


def test_a_share_of_pairs_of_gates_is_solved_too():
  model = resnets.ResNet(10, (1,), Bottleneck, features=4, gating="channel")
  counts = model_summary(model, (8, 8, 3))
  share = solve_share(model, (8, 8, 3), macs=counts.always_macs + counts.gated / 3)
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  (_, records), _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), x)
  total = before = 0
  for record in records:
    units = record.gates.shape[-1] * share
    total += units * record.macs_per_unit + before * units * record.macs_per_pair
    before = units
  assert any(record.macs_per_pair for record in records)
  assert total == pytest.approx(counts.gated / 3)


@pytest.mark.parametrize(
  ("variants", "changes", "message"),
  [
    ("row=best", {}, "the variant row must be one of .*; got 'best'"),
    ("", {"model.gate.share": 0.5}, "model.gate.share must be None .*; got 0.5"),
    ("row=ungated", {"model.equal_inner_width": 1.0}, "equal_inner_width must be None where no"),
    ("", {"model.equal_inner_width": 9.0}, "^model.equal_inner_width: macs must be above .* most"),
    ("", {"model.equal_inner_width": 0.0}, "must be None or a positive number; got 0.0"),
    ("row=told", {"model.sources": 2}, "model.sources must be 3, the number of sets .*; got 2"),
    ("", {"model.sources": 3}, r"data.name must be a union_told\(...\) where model.sources"),
    ("row=told", {"data.mean": (0.45,)}, "data.mean must hold a number .* 0 for the last, where"),
    ("row=told", {"data.std": (0.25,) * 4}, "data.std must hold a number .* 1/255 for the last"),
    ("", {"data.images_per_set": 0}, "data.images_per_set must be None or >= 1; got 0"),
    ("heads=own", {}, "loss.scope must be one of"),
    ("", {"data.name": "digits"}, "data.images_per_set must be None unless data.name is a union"),
    (
      "heads=source",
      {"data.name": "digits", "data.images_per_set": None},
      "loss.scope must be None unless data.name is a union; got 'source'",
    ),
    (
      "row=ungated,heads=source",
      {"model.gating": "exits", "loss.regulariser": "none"},
      "loss.scope must be None where model.gating is 'exits'; got 'source'",
    ),
  ],
)
def test_a_setting_that_fits_no_union_is_named(variants, changes, message):
  with pytest.raises(ValueError, match=message):
    built(variants, **changes)


def test_an_export_is_scored_among_the_classes_of_its_result():
  # The most likely class of a scene is a digit; of those of scenes, it is its own.
  outputs = np.zeros((1, 30), np.float32)
  outputs[0, [3, 14]] = 2, 1
  right = {}
  for heads in ("", ",heads=source"):
    right[heads] = export._count_right(built(f"row=ungated{heads}"), outputs, np.array([14]))
  assert right == {"": 0, ",heads=source": 1}
  card = {"accuracy": 0.5, "macs": 2, "executed_macs": 1.0, "config": {"loss": {"scope": "source"}}}
  assert model_card._rows(card)[0] == ("accuracy, the set of each image known", "50.00 %")


def test_with_a_head_a_set_only_its_own_classes_compete():
  logits, labels = jnp.array([[1.0, 2.0, 9.0], [9.0, 0.0, 1.0]]), jnp.array([1, 2])
  fit = objectives.fit_sources(logits, labels, class_sources=(0, 0, 1))
  assert fit.accuracy == 1
  np.testing.assert_allclose(fit.cross_entropy, np.log1p(np.exp(-1)) / 2, rtol=1e-6)
  slope = jax.grad(lambda z: objectives.fit_sources(z, labels, class_sources=(0, 0, 1))[0])(logits)
  assert not slope[0, 2]
  assert not slope[1].any()


def tiny_config(**changes):
  config = union.get_config("images=16,batch=16,epochs=2,sets=digits+turned_digits")
  config.update_from_flattened_dict(
    {"model.name": "tiny", "model.width": 0.5, "data.image_size": 8, "log_every": 1, **changes}
  )
  return config.lock()


def test_a_run_on_a_union_says_what_became_of_each_set(tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  runs.without_reports(monkeypatch)
  whole, opened = unions.open_union, []

  def few(source):
    opened.append(source.split)
    return _Few(whole(source))

  monkeypatch.setattr(unions, "open_union", few)
  said = runs.said(classification, tiny_config(), tmp_path, "train")
  result = json.loads((tmp_path / "result.json").read_text())
  assert list(result["sets"]) == ["digits", "turned_digits"]
  digits = [str(digit) for digit in range(10)]
  assert result["classes"] == [f"{name}/{digit}" for name in result["sets"] for digit in digits]
  assert "unreadable_files" not in result
  macs = [entry["macs"] for entry in result["sets"].values()]
  assert np.mean(macs) == pytest.approx(result["macs"])
  assert len(result["set_overlap"]) == 2
  assert 0 <= result["mean_set_overlap"] <= 1
  for text in ("set turned_digits", "mean over sets", "gates that two sets share"):
    assert text in said
  opened.clear()
  train = build.build(tiny_config()).open_train()
  assert train.shares == EqualShares(sizes=(24, 24), per_set=16)
  # To count the images of an epoch, to test, and to train.
  assert opened == ["train", "test", "train"]


class _Few:
  """The first examples of each set, so that tests take no time."""

  def __init__(self, union, sizes=(24, 24)):
    self.class_names, self.shape, self.sizes = union.class_names, union.shape, sizes
    self._examples = []
    for first, size in zip((0, union.sizes[0]), sizes, strict=True):
      self._examples += [union[first + i] for i in range(size)]

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, index):
    return self._examples[index]


def test_a_union_with_an_empty_set_is_refused(monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  whole = unions.open_union
  monkeypatch.setattr(unions, "open_union", lambda source: _Few(whole(source), (24, 0)))
  with pytest.raises(ValueError, match="data.train_split must have .* none of turned_digits"):
    build.build(tiny_config())


@pytest.mark.slow
@pytest.mark.parametrize("loader", build.LOADERS)
def test_a_run_on_a_union_goes_on_to_the_same_end(loader, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  config = tiny_config(**{"data.loader": loader, "loss.scope": "source"})
  experiment = build.build(config)
  programme = classification.Classification(experiment)
  state, train = programme.fresh(), experiment.open_train()
  whole = state
  advance = programme.make_advance(train, 0)
  for step in range(4):
    if step == 2:
      state = jax.device_get(whole)
    whole, _ = advance(whole, step)
  resumed = programme.make_advance(experiment.open_train(), 2)
  for step in range(2, 4):
    state, _ = resumed(state, step)
  assert tiny.bit_equal(whole, state)


@pytest.mark.slow
def test_the_page_of_a_union_has_its_sets(tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  classification.run(tiny_config(), tmp_path / "run", "train")
  page = (tmp_path / "run" / "report.html").read_text()
  assert "Sets of the union" in page
  assert "overlap of the gates" in page
