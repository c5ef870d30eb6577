"""Every config file builds; its variants and defaults match its header."""

import importlib

import pytest

from configs import common, from_trained, worlds
from gating_jax.checks import one_of
from gating_jax.continual import registry
from gating_jax.data import worlds as worlds_sets
from gating_jax.images import build as image_build
from gating_jax.models.summary import model_summary
from gating_jax.training import objectives, optim, settings
from gating_jax.training.outlines import Outline
from gating_jax.training.rundir import flatten
from gating_jax.video import objectives as segment_objectives
from tests.helpers.config_files import FILES


@pytest.mark.parametrize("name", FILES)
def test_config_builds_and_names_known_choices(name):
  config = importlib.import_module(f"configs.{name}").get_config("")
  one_of("schedule", config.optim.schedule, optim.LEARNING_RATES)
  assert f"configs/{name}.py" in importlib.import_module(f"configs.{name}").__doc__
  if config.experiment == "continual":
    one_of("method", config.method, registry.METHODS)
    return
  videos = config.experiment == "long_video"
  shaping = config.loss.channels.batch_shaping if videos else config.loss.batch_shaping
  one_of("reduction", shaping.reduction, objectives.REDUCTIONS)
  sparsities = segment_objectives.SEGMENT_SPARSITIES if videos else objectives.SPARSITIES
  one_of("kind", config.loss.sparsity.kind, sparsities)


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_the_same_after_a_run_directory_has_kept_it(name, tmp_path):
  config = importlib.import_module(f"configs.{name}").get_config("")
  (tmp_path / "config.json").write_text(config.to_json())
  kept = settings.config_of(tmp_path)
  typed = lambda config: [(field, type(value), value) for field, value in flatten(config).items()]
  assert typed(kept) == typed(config.lock())


def test_full_recipe_has_the_numbers_of_the_paper():
  config = importlib.import_module("configs.cifar10_resnet20").get_config("")
  assert (config.optim.epochs, config.optim.batch_size, config.optim.learning_rate) == (
    500,
    256,
    0.1,
  )
  assert (config.optim.lr_drop_at, config.optim.momentum, config.optim.weight_decay) == (
    (0.6, 0.75, 0.9),
    0.9,
    5e-4,
  )
  shaping = config.loss.batch_shaping
  assert (shaping.coefficient, shaping.fade_end, shaping.a, shaping.b) == (0.75, 0.2, 0.6, 0.4)
  assert (config.loss.sparsity.ramp_start, config.loss.sparsity.ramp_end) == (0.2, 0.6)


def worlds_counts(row):
  config = importlib.import_module("configs.worlds").get_config(f"row={row}")
  depth = 4 if config.data.name == "worlds_told" else 3
  data = Outline(examples=512, class_names=tuple("0123456789"), shape=(16, 16, depth))
  return config, image_build.build(config.lock(), outlines=[data, data]).counts


@pytest.mark.parametrize(
  "row", sorted(set(worlds._ROWS) - {"ungated", "all_open", "scale", "kernels"})
)
def test_rows_of_worlds_have_the_macs_of_the_ungated_one(row):
  _, ungated = worlds_counts("ungated")
  config, counts = worlds_counts(row)
  gate, sparsity = config.model.gate, config.loss.sparsity
  if row == "bias":
    assert counts.macs + counts.gate_macs == ungated.macs
    return
  share = gate.initial_open if row == "random" else gate.share
  macs = counts.always_macs + (share or 0) * counts.gated
  if row == "iclr2020":
    macs = sparsity.target * counts.macs + counts.gate_macs
  assert macs == pytest.approx(ungated.macs, rel=1e-3)


def test_a_run_on_worlds_has_3000_steps_of_256_images_and_all_of_it_decays():
  config = importlib.import_module("configs.worlds").get_config()
  images = worlds_sets.count_worlds(config.data.train_split)
  assert images * config.optim.epochs == 3000 * config.optim.batch_size == 768_000
  assert config.optim.gate_weight_decay == config.optim.weight_decay == 5e-4


def test_scales_cost_little_and_all_rows_are_refused_by_no_check():
  _, ungated = worlds_counts("ungated")
  _, scaled = worlds_counts("scale")
  assert scaled.macs == ungated.macs
  assert scaled.gate_macs < 0.04 * ungated.macs
  _, mixed = worlds_counts("kernels")
  assert mixed.macs + mixed.gate_macs == pytest.approx(ungated.macs, rel=0.05)
  _, all_open = worlds_counts("all_open")
  assert all_open.macs == worlds_counts("recipe")[1].macs
  with pytest.raises(ValueError, match="the variant row must be one of .*; got 'best'"):
    importlib.import_module("configs.worlds").get_config("row=best")


@pytest.mark.thin(3)
@pytest.mark.parametrize("macs", [50, 70, 30])
@pytest.mark.parametrize("task", ["worlds", "cifar10"])
def test_rows_of_a_trained_network_have_the_macs_that_they_name(task, macs):
  get_config = importlib.import_module("configs.from_trained").get_config
  shape = (32, 32, 3) if task == "cifar10" else (16, 16, 3)

  def used(variants):
    """Returns the MACs of a row's network, as far as its gates open it."""
    model = get_config(f"task={task},{variants}").model
    model = image_build._at_equal_macs(model, 10, shape, network=image_build.network)
    found = model_summary(image_build.network(model, 10), shape)
    return found.always_macs + (model.gate.share or 0) * found.gated

  dense = used("row=dense")
  static = used(f"row=static,macs={macs}")
  # As near as whole channels are.
  assert static / dense == pytest.approx(macs / 100, abs=0.016)
  assert used(f"row=narrow,macs={macs}") / dense == pytest.approx(macs / 100, abs=0.016)
  assert used(f"row=gated,macs={macs}") == pytest.approx(static, rel=1e-4)


def test_rows_of_a_trained_network_name_it_as_their_start_or_their_teacher():
  get_config = importlib.import_module("configs.from_trained").get_config
  for row in from_trained.ROWS:
    config = get_config(f"row={row},dense=runs/mine,epochs=7,macs=30")
    importance, distillation = config.model.importance, config.loss.distillation
    began = {"gated": "prior", "gated_last": "prior", "static": "prune"}.get(row)
    assert (config.model.init_from, importance.form) == ("runs/mine" if began else None, began)
    assert (distillation.coefficient is None) == (row == "dense")
    assert (distillation.teacher is None) == (not row.startswith("narrow"))
    assert config.optim.epochs == 7
  assert get_config("row=narrow").optim.epochs * 4 == get_config("row=narrow_full").optim.epochs
  with pytest.raises(ValueError, match="the variant macs must be one of .*; got '60'"):
    get_config("macs=60")


def test_a_network_begins_by_importance_as_a_variant_says():
  get_config = importlib.import_module("configs.cifar10_resnet20").get_config
  model = get_config("share=0.5,importance=prior").model
  assert (model.gating, model.importance.form, model.dense_first.form) == ("channel", "prior", None)
  # Whatever the order of variants.
  for share in ("share=0.5", "equal=0.5"):
    first, last = get_config(f"importance=prior,{share}"), get_config(f"{share},importance=prior")
    assert first.to_dict() == last.to_dict()
    assert first.model.dense_first.form is None
  pruned = get_config("importance=prune,inner=0.5,teacher=0.5")
  assert (pruned.model.gating, pruned.model.inner_width) == ("none", 0.5)
  assert pruned.loss.distillation.coefficient == 0.5
  with pytest.raises(ValueError, match="the variant importance must be one of .*; got 'all'"):
    get_config("importance=all")


def test_variants_change_their_field():
  config = importlib.import_module("configs.cifar10_resnet20").get_config(
    "epochs=3,gating=none,l0=2.5,width=0.5,model=vgg8,block=16"
  )
  model = config.model
  assert (config.optim.epochs, config.loss.sparsity.coefficient) == (3, 2.5)
  assert (model.gating, model.width, model.name, model.gate.block) == ("none", 0.5, "vgg8", 16)


def test_a_variant_may_stand_for_several_fields_and_later_ones_change_them():
  config = importlib.import_module("configs.cifar10_resnet20").get_config("gates=layer,l0=2.5")
  sparsity = config.loss.sparsity
  assert (config.model.gating, config.model.gate.initial_open, config.loss.regulariser) == (
    "layer",
    0.87,
    "sparsity",
  )
  assert (sparsity.kind, sparsity.target, sparsity.coefficient, sparsity.ramp_end) == (
    "target_rate",
    0.6,
    2.5,
    0,
  )
  with pytest.raises(ValueError, match="the variant gates must be one of .*; got 'blocks'"):
    importlib.import_module("configs.cifar10_resnet20").get_config("gates=blocks")


@pytest.mark.parametrize(("earlier", "name"), [("channels", "channel"), ("layers", "layer")])
def test_variants_of_gates_are_named_as_the_field_and_by_their_earlier_names(earlier, name):
  get_config = importlib.import_module("configs.cifar10_resnet20").get_config
  assert get_config(f"gates={name}").model.gating == name
  assert get_config(f"gates={earlier}").to_dict() == get_config(f"gates={name}").to_dict()


def test_the_coefficient_of_sparsity_is_also_known_by_its_earlier_name():
  get_config = importlib.import_module("configs.cifar10_resnet20").get_config
  assert get_config("l0=2.5").to_dict() == get_config("sparsity=2.5").to_dict()
  with pytest.raises(ValueError, match="a variant must be one of .* as name=value; got 'l0=2.5'"):
    importlib.import_module("configs.split_digits").get_config("l0=2.5")


def test_a_budget_is_a_share_to_train_to():
  sparsity = (
    importlib.import_module("configs.cifar10_resnet20").get_config("budget=0.25").loss.sparsity
  )
  assert (sparsity.kind, sparsity.target, sparsity.coefficient) == ("budget", 0.25, 50)
  for static in ("budget=0.25,gates=static", "gates=static,budget=0.25"):
    loss = importlib.import_module("configs.cifar10_resnet20").get_config(static).loss
    assert (loss.regulariser, loss.sparsity.kind, loss.sparsity.coefficient) == (
      "sparsity",
      "budget",
      50,
    )
  later = (
    importlib.import_module("configs.cifar10_resnet20")
    .get_config("budget=0.75,l0=100")
    .loss.sparsity
  )
  assert (later.kind, later.target, later.coefficient) == ("budget", 0.75, 100)


def test_variants_of_long_videos_change_their_field():
  variant = "context=none,target=0.25,heavy=r2plus1d10,seed=3"
  config = importlib.import_module("configs.composed_timegate").get_config(variant)
  assert (
    config.model.gate.context,
    config.loss.sparsity.target,
    config.model.heavy.name,
    config.seed,
  ) == ("none", 0.25, "r2plus1d10", 3)


@pytest.mark.parametrize("variant", ["epoch=3", "epochs", "nonsense=1"])
def test_unknown_variant_is_refused(variant):
  for name in ("cifar10_resnet20", "videos_timegate"):
    with pytest.raises(ValueError, match="a variant must be one of"):
      importlib.import_module(f"configs.{name}").get_config(variant)


@pytest.mark.parametrize(
  ("variant", "message"),
  [
    ("epochs=three", "the variant epochs must be a whole number; got 'three'"),
    ("sparsity=much", "the variant sparsity must be a number; got 'much'"),
    ("budget=half", "the variant budget must be a number; got 'half'"),
    ("share=half", "the variant share must be a number; got 'half'"),
    ("images=few", "the variant images must be a whole number; got 'few'"),
    ("gates=chanel", "the variant gates must be one of .*; got 'chanel'. Did you mean 'channel'"),
    ("epoch=3", "a variant must be one of .*; got 'epoch=3'. Did you mean epochs=3"),
  ],
)
def test_a_wrong_variant_is_named_with_its_rule_and_what_is_near(variant, message):
  with pytest.raises(ValueError, match=message):
    importlib.import_module("configs.digits_resnet20").get_config(variant)


def test_continual_recipes_have_the_numbers_of_the_sheet():
  recipe = lambda c: (
    c.optim.batch_size,
    c.optim.learning_rate,
    c.optim.epochs,
    c.optim.lr_drop_at,
    c.gates.sparsity,
    c.gates.patience,
  )
  of = lambda name: recipe(importlib.import_module(f"configs.{name}").get_config(""))
  assert of("split_mnist") == (256, 0.01, 400, (), 0.5, 20)
  assert of("split_svhn") == (256, 0.01, 800, (0.5, 0.75), 0.5, 20)
  assert of("split_cifar10") == (64, 0.1, 200, (0.5, 0.75), 1, 10)
  assert of("split_imagenet50") == (64, 0.1, 200, (0.5, 0.75), 1, 0)


def test_variants_of_a_config_of_an_earlier_version_are_pairs_and_tables():
  variants = {
    "rate": ("optim.learning_rate", float),
    "gates": {"few": {"model.gate.block": 8}},
    "short": lambda epochs: {"optim.epochs": int(epochs)},
  }
  config = common.apply_variants(common.image_config(), "rate=0.5,gates=few,short=2", variants)
  found = (config.optim.learning_rate, config.model.gate.block, config.optim.epochs)
  assert found == (0.5, 8, 2)
  with pytest.raises(ValueError, match="the variant gates must be one of .*'few'.*; got 'many'"):
    common.apply_variants(config, "gates=many", variants)
  with pytest.raises(ValueError, match="a variant must be one of .*; got 'l0=1'"):
    common.apply_variants(config, "l0=1", variants)
