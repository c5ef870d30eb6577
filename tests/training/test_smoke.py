import importlib
from types import SimpleNamespace

import jax
import pytest

from gating_jax import config_files
from gating_jax.data import composed, tfds
from gating_jax.models.resnets import RESNETS
from gating_jax.models.vggs import VGGS
from gating_jax.models.video_backbones import HEAVY_NETS, LIGHT_NETS
from gating_jax.training import smoke
from gating_jax.training.rundir import flatten
from tests.helpers import stand_ins
from tests.helpers.command import run_command

CLASSES, EXAMPLES = 100, 60_000  # of a set that is missing
VIDEOS = 32  # made, with segments enough for the concepts of gates


@pytest.fixture
def opened(monkeypatch):
  """Every set of TFDS has many classes and examples."""
  splits = {
    name: SimpleNamespace(num_examples=EXAMPLES) for name in ("train", "test", "validation")
  }
  source = SimpleNamespace(
    class_names=CLASSES * ("a",), dataset_info=SimpleNamespace(splits=splits)
  )
  monkeypatch.setattr(tfds, "open_tfds", lambda *_, **__: source)


def config_of(name, **changes):
  config = importlib.import_module(f"configs.{name}").get_config().lock()
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize("name", sorted(config_files.packaged()))
def test_every_config_becomes_small_and_keeps_its_fields_and_method(name, opened):
  given, small = (flatten(each) for each in (config_of(name), smoke.shrink(config_of(name))))
  assert small.keys() == given.keys()
  assert given == flatten(config_of(name))
  changed = {field for field in given if given[field] != small[field]}
  assert {field.split(".")[0] for field in changed} <= {
    "model",
    "data",
    "tasks",
    "router",
    "generator",
    "ewc",
    "online_ewc",
    "replay",
    "optim",
    "pretrain",
    "gates",
    "log_every",
    "eval_every",
    "speed",
    "devices",
  }
  of_model = {field for field in changed if field.startswith("model.")}
  nets = {"model.name", "model.light.name", "model.heavy.name"}
  assert of_model <= {*nets, "model.width", "model.gate.concepts"}
  assert small["optim.epochs"] == 1
  assert small["optim.batch_size"] <= max(16, jax.device_count())
  assert small["optim.batch_size"] % jax.device_count() == 0
  assert smoke.shrink(smoke.shrink(config_of(name))) == smoke.shrink(config_of(name))


@pytest.mark.parametrize(
  ("config", "split", "first"),
  [
    ("cifar10_resnet20", "train", "train[0:64]"),
    ("cifar10_resnet20", "train[80%:]", "train[48000:48064]"),
    ("cifar10_resnet20", "train[:10]+test", "train[0:10]+test[0:54]"),
    ("cifar10_resnet20", "test[-5:]", "test[59995:60000]"),
    ("split_cifar10", "train", f"train[0:{20 * CLASSES}]"),
    ("segmentation_cityscapes", "train[10:]", "train[10:74]"),
  ],
)
def test_any_split_is_cut_to_its_first_examples_for_tasks_some_of_every_class(
  config, split, first, opened
):
  assert smoke.shrink(config_of(config, **{"data.train_split": split})).data.train_split == first


def test_a_union_is_cut_set_by_set_and_made_sets_stay(opened):
  config = config_of("union", **{"data.name": "union(digits,cifar10)"})
  small = smoke.shrink(config)
  assert small.data.train_split == "train;train[0:64]"
  assert small.data.test_split == "test;test[0:32]"
  assert small.data.images_per_set == 64
  assert smoke.shrink(small) == small


def write_pictures(root):
  """Writes folders of two splits with twenty pictures in each of three classes."""
  for split in ("train", "test"):
    for name in ("0", "1", "2"):
      (root / split / name).mkdir(parents=True)
      for i in range(20):
        (root / split / name / f"{i}.png").touch()
  return str(root)


def test_a_folder_is_cut_before_its_files_are_opened(tmp_path):
  folder = {"data.name": "folder", "data.data_dir": write_pictures(tmp_path)}
  small = smoke.shrink(config_of("digits_resnet20", **folder))
  assert (small.data.train_split, small.data.test_split) == ("train[:64]", "test[:32]")
  assert smoke.shrink(small) == small
  tasks = smoke.shrink(config_of("split_digits", **folder))
  assert (tasks.data.train_split, tasks.data.test_split) == ("train[:60]", "test[:30]")
  assert smoke.shrink(tasks) == tasks
  union = config_of("union", **{"data.name": f"union(digits,folder:{tmp_path})"})
  small = smoke.shrink(union)
  assert (small.data.train_split, small.data.test_split) == ("train;train[:64]", "test;test[:32]")
  assert smoke.shrink(small) == small


def test_scenes_and_their_parts_become_small_by_one_factor(opened):
  small = smoke.shrink(config_of("segmentation_cityscapes"))
  assert (small.data.size, small.data.crop) == ((64, 128), (48, 48))


def test_films_become_small_and_short_and_made_videos_keep_their_frames():
  films, made = (
    smoke.shrink(config_of(name)).data for name in ("videos_timegate", "composed_timegate")
  )
  assert (films.size, films.frames, films.at_most) == (16, 4, 24)
  assert (made.size, made.frames, made.segments) == (16, 8, composed.MIN_SEGMENTS)


def test_a_large_network_becomes_a_small_one_unless_it_starts_from_trained_weights(opened):
  street = config_of("segmentation_cityscapes")
  assert (street.model.name, smoke.shrink(street).model.name) == ("resnet50", "resnet18")
  films = smoke.shrink(config_of("videos_timegate")).model
  assert (films.light.name, films.heavy.name) == ("resnet8", "resnet3d10")
  assert smoke.shrink(street).model.width == 0.375
  blocks = config_of("digits_resnet20", **{"model.gate.block": 8})
  assert smoke.shrink(blocks).model.width == 1
  begun = config_of("digits_resnet20", **{"model.init_from": "runs/plain"})
  assert smoke.shrink(begun).model.name == "resnet20"
  films = config_of("videos_timegate", pretrained="runs/other")
  assert smoke.shrink(films).pretrained == ""


def test_images_keep_the_size_that_a_teacher_takes(opened):
  teacher = {"loss.distillation.coefficient": 0.5, "loss.distillation.teacher": "runs/dense"}
  assert smoke.shrink(config_of("imagenet_resnet18")).data.image_size == 32
  assert smoke.shrink(config_of("imagenet_resnet18", **teacher)).data.image_size == 224


def test_tasks_that_are_listed_are_the_first_two(opened):
  listed = {"tasks.classes": ((0, 1), (2, 3), (4, 5)), "tasks.count": 0}
  small = smoke.shrink(config_of("split_digits", **listed))
  assert (small.tasks.classes, small.tasks.count) == (((0, 1), (2, 3)), 0)
  assert smoke.shrink(config_of("split_digits")).tasks.classes is None


@pytest.mark.parametrize("name", sorted({*smoke._SHALLOW, *smoke._SHALLOW.values()}))
def test_a_shallow_network_is_one_that_configs_can_name(name):
  assert name in {*RESNETS, *VGGS, *LIGHT_NETS, *HEAVY_NETS}


def test_programs_are_optimised_less_in_a_smoke_run_alone():
  option = "jax_disable_most_optimizations"
  before = jax.config.read(option)
  with smoke.compiling_quickly():
    assert jax.config.read(option)
  assert jax.config.read(option) == before


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "changes"),
  [  # the largest config of a programme, and many classes; thin networks compile as fast as any
    ("imagenet_resnet18", {"model.width": 0.125}),
    ("segmentation_cityscapes", {"model.name": "resnet18", "model.width": 0.125}),
    ("split_cifar10_narrow", {"data.name": "cifar100"}),
  ],
)
def test_a_config_trains_from_end_to_end_on_its_data_or_a_stand_in(
  name, changes, monkeypatch, tmp_path
):
  stand_ins.stand_in(monkeypatch, tmp_path / "sets")
  config = config_of(name)
  if config.experiment == "long_video":
    changes = changes | stand_ins.video_files(tmp_path, config.data.name, VIDEOS)
  given = [f"--config.{field}={value}" for field, value in changes.items()]
  status, said = run_command(f"--config={name}", f"--workdir={tmp_path / 'run'}", "--smoke", *given)
  assert status == 0, said
  assert (tmp_path / "run" / "result.json").exists()
  assert (tmp_path / "run" / "report.html").stat().st_size > 1000
