"""The loader that `auto` stands for, and the processes that decode by default."""

import contextlib
import json

import numpy as np
import pytest
from PIL import Image

from configs import common, union
from gating_jax import cores
from gating_jax.data import folders, image_sets
from gating_jax.data.image_sets import SetSource
from gating_jax.images import build, classification, model_card
from gating_jax.models import resnets
from gating_jax.training.checkpoints import CheckpointError
from gating_jax.training.outlines import Outline, write_outlines
from gating_jax.training.rundir import RunDir, RunDirError
from tests.helpers import made_tfds, tiny_cli

# Images of the training and of the test split, and bytes of each at 8 x 8 pixels.
TRAIN, TEST, BYTES = 16, 8, 8 * 8 * 3
SHAPE = (8, 8, 3)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  folders._list_images.cache_clear()
  yield
  folders._list_images.cache_clear()


@pytest.fixture
def folder(tmp_path):
  """A folder of images of two sizes."""
  for split, count in (("train", TRAIN), ("test", TEST)):
    for i in range(count):
      file = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.png"
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (8 + i % 3, 8), (9 * i, 100, 200)).save(file)
  return tmp_path / "data"


def config_of(folder, **changes):
  config = common.image_config()
  fields = {"data.name": "folder", "data.data_dir": str(folder), "data.image_size": 8}
  config.update_from_flattened_dict(
    {**fields, "model.name": "tiny", "optim.batch_size": 8, "optim.epochs": 1, **changes}
  )
  return config.lock()


@pytest.mark.parametrize(
  ("free", "crop_area", "loader", "said"),
  [
    (2 * (TRAIN + TEST) * BYTES, None, "resident", "the images are held in memory, 0.0 GB of 0.0"),
    (2 * (TRAIN + TEST) * BYTES - 1, None, "streaming", "are read from disk in the training, 0.0"),
    (10**9, 0.5, "streaming", "are read from disk in the training, since data.crop_area is set"),
  ],
)
def test_a_folder_is_resident_where_it_fits(
  folder, monkeypatch, capsys, free, crop_area, loader, said
):
  monkeypatch.setattr(image_sets, "available_memory", lambda: free)
  given = config_of(folder, **{"data.crop_area": crop_area})
  experiment = build.build(given)
  assert (given.data.loader, experiment.config.data.loader) == ("auto", loader)
  out = capsys.readouterr().out
  assert out.count("data.loader=auto: ") == 1
  assert said in out
  kind = type(experiment.open_train()).__name__
  assert kind == type(experiment.test).__name__ == {"resident": "Images"}.get(loader, "Stream")


def test_a_device_may_have_less_memory_than_its_host(monkeypatch):
  monkeypatch.setattr(image_sets, "available_memory", lambda: 1000)
  assert build._free_memory() == 1000

  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats

  for stats, free in (({"bytes_limit": 900, "bytes_in_use": 200}, 700), ({}, 1000)):
    monkeypatch.setattr(build.jax, "local_devices", lambda stats=stats: [Device(stats)])
    assert build._free_memory() == free


def test_made_images_are_in_memory_without_a_word(monkeypatch, capsys):
  monkeypatch.setattr(image_sets, "available_memory", lambda: 0)
  made = config_of(None, **{"data.name": "digits", "data.crop_area": 0.5})
  assert build.build(made).config.data.loader == "resident"
  assert "auto" not in capsys.readouterr().out


def test_the_loader_that_a_config_names_is_taken_whatever_the_memory(folder, monkeypatch):
  monkeypatch.setattr(image_sets, "decoded_bytes", lambda *_: pytest.fail("looked"))
  for loader in build.LOADERS:
    assert build.build(config_of(folder, **{"data.loader": loader})).config.data.loader == loader
  # Without the data there is nothing to choose.
  outline = Outline(examples=TRAIN, class_names=("a", "b"), shape=SHAPE)
  built = build.build(config_of(folder), outlines=[outline, outline])
  assert built.config.data.loader == "auto"


@pytest.mark.parametrize("loader", build.LOADERS)
def test_a_run_keeps_the_loader_that_it_began_with(folder, tmp_path, monkeypatch, loader):
  run = tmp_path / "run"
  own = config_of(folder, **{"data.loader": loader})
  (run / "checkpoints" / "1").mkdir(parents=True)
  (run / "config.json").write_text(own.to_json())
  # The other one would be chosen now.
  free = {"resident": (TRAIN + TEST) * BYTES, "streaming": 10**12}[loader]
  monkeypatch.setattr(image_sets, "available_memory", lambda: free)
  # As far as to the checkpoint, which holds nothing.
  with pytest.raises(CheckpointError):
    classification.run(config_of(folder), run, "evaluate")
  assert classification._with_own_loader(config_of(folder), run, "train").data.loader == loader
  # A run that has saved nothing is begun again.
  (run / "checkpoints" / "1").rmdir()
  assert classification._with_own_loader(config_of(folder), run, "train").data.loader == "auto"
  assert json.loads((run / "config.json").read_text())["data"]["loader"] == loader
  # The other modes say what is missing.
  with pytest.raises(RunDirError, match="no checkpoint in"):
    classification.run(config_of(folder), run, "evaluate")


def test_bytes_are_counted_of_every_kind_of_set(folder, tmp_path):
  source = SetSource("folder", "train", str(folder))
  assert image_sets.decoded_bytes(source, 8) == TRAIN * BYTES
  # The first image stands for all.
  assert image_sets.decoded_bytes(source) == TRAIN * BYTES
  made_tfds.write(
    tmp_path / "tfds",
    list(zip(*made_tfds.images(5, (6, 4, 3)), strict=True)),
    list(zip(*made_tfds.images(2, (6, 4, 3)), strict=True)),
    shape=(6, 4, 3),
    name="loader_set",
  )
  of_tfds = SetSource("loader_set", "train", str(tmp_path / "tfds"))
  assert image_sets.decoded_bytes(of_tfds) == 5 * 6 * 4 * 3
  assert image_sets.decoded_bytes(of_tfds, 10) == 5 * 10 * 10 * 3
  # It is refused when it is loaded.
  assert image_sets.decoded_bytes(of_tfds._replace(image="none"), 10) == 0
  name = f"union(digits,loader_set,folder:{folder})"
  of_union = SetSource(name, "train;test;train", str(tmp_path / "tfds"))
  assert image_sets.decoded_bytes(of_union, 8) == (2 + TRAIN) * 8 * 8 * 4
  assert image_sets.decoded_bytes(SetSource("union(digits,turned_digits)", "train"), 8) == 0


def test_a_union_with_a_folder_is_streamed_where_it_does_not_fit(folder, monkeypatch):
  monkeypatch.setattr(image_sets, "available_memory", lambda: 100)
  config = union.get_config(f"row=ungated,batch=8,epochs=1,images={TRAIN}")
  name = f"union(digits,folder:{folder})"
  config.update_from_flattened_dict({"data.name": name, "data.image_size": 8, "model.name": "tiny"})
  assert build.build(config.lock()).config.data.loader == "streaming"


def test_large_folders_are_decoded_by_processes_unless_the_config_says_otherwise(
  folder, monkeypatch
):
  monkeypatch.setattr(build, "count_workers", lambda sharing: 3)

  def workers(**changes):
    experiment = build.build(config_of(folder, **{"data.loader": "streaming", **changes}))
    return experiment.open_train().workers, experiment.test.workers

  assert workers() == (0, 0)
  monkeypatch.setattr(build, "_MANY", TRAIN)
  # The test has fewer images.
  assert workers() == (3, 0)
  assert workers(**{"data.workers": 0}) == (0, 0)
  assert workers(**{"data.workers": 2}) == (2, 2)
  with pytest.raises(ValueError, match="data.workers must be None or >= 0; got -1"):
    workers(**{"data.workers": -1})


@pytest.mark.parametrize(
  ("usable", "sharing", "expected"),
  [(1, 1, 0), (2, 1, 2), (8, 1, 8), (95, 1, 8), (96, 32, 3), (96, 96, 0), (12, 8, 8)],
)
def test_there_are_as_many_processes_as_cores_up_to_a_limit(monkeypatch, usable, sharing, expected):
  monkeypatch.setattr(cores, "usable_cores", lambda: usable)
  # Fewer than these are a part that a launcher has given to the process.
  monkeypatch.setattr(cores.os, "cpu_count", lambda: 96)
  assert cores.count_workers(sharing) == expected


def test_what_is_free_changes_no_image(folder, tmp_path, monkeypatch):
  noise = np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8)
  Image.fromarray(noise).save(folder / "test" / "a" / "wide.png")
  sets = [config_of(folder, **{"data.image_size": 7})]
  made = [list(zip(*made_tfds.images(9, (12, 9, 3)), strict=True))] * 2
  made_tfds.write(tmp_path / "tfds", *made, shape=(12, 9, 3), name="loader_set")
  sets.append(config_of(tmp_path / "tfds", **{"data.name": "loader_set"}))
  for config, fraction in zip(sets, (1.0, 0.0), strict=True):
    pixels = {}
    for free in (10**9, 1):
      monkeypatch.setattr(image_sets, "available_memory", lambda free=free: free)
      experiment = build.build(config)
      pixels[free] = experiment.test.read(np.arange(len(experiment.test)))[0]
    np.testing.assert_array_equal(pixels[1], pixels[10**9])
    data = experiment.config.data
    assert (data.loader, data.test_crop) == ("streaming", fraction)
    assert model_card._crop_fraction(data) == (fraction or None)
  # A resumed run, and one of an older version, keep their own way.
  run = tmp_path / "run"
  (run / "checkpoints" / "1").mkdir(parents=True)
  for kept in (1.0, None):
    own = config_of(folder, **{"data.loader": "streaming", "data.test_crop": kept})
    (run / "config.json").write_text(own.to_json())
    assert classification._with_own_loader(config_of(folder), run, "train").data.test_crop == kept


def test_a_crop_that_is_asked_for_is_streamed(folder, capsys):
  experiment = build.build(config_of(folder, **{"data.test_crop": 0.5}))
  assert (experiment.config.data.loader, experiment.test.central_fraction) == ("streaming", 0.5)
  assert "since data.test_crop is set" in capsys.readouterr().out
  with pytest.raises(ValueError, match=r"data.test_crop must be in \[0, 1\]; got 2"):
    build.build(config_of(folder, **{"data.test_crop": 2.0}))


def test_a_folder_without_an_image_size_is_held_in_memory_where_it_fits_at_all(folder, monkeypatch):
  for file in folder.rglob("*.png"):
    Image.new("RGB", (8, 8)).save(file)
  monkeypatch.setattr(image_sets, "available_memory", lambda: TRAIN * BYTES)
  assert build.build(config_of(folder, **{"data.image_size": 0})).config.data.loader == "resident"


def test_processes_of_one_host_share_its_memory(monkeypatch):
  monkeypatch.setattr(image_sets, "available_memory", lambda: 1000)
  monkeypatch.setattr(build.hosts, "count_on_host", lambda: 4)
  assert build._free_memory() == 250


def test_a_run_that_is_resumed_with_other_images_says_so(tmp_path, caplog):
  run_dir, train = RunDir(tmp_path), Outline(examples=16, class_names=("a",), shape=SHAPE)
  classification._warn_of_other_images(run_dir, train)
  write_outlines(tmp_path, [train])
  classification._warn_of_other_images(run_dir, train)
  assert not caplog.text
  classification._warn_of_other_images(run_dir, Outline(examples=15, class_names=("a",)))
  assert "was trained on 16 images so far; now there are 15, whose order differs" in caplog.text


@pytest.mark.parametrize("kind", [KeyboardInterrupt, None])
def test_a_training_that_is_stopped_lists_what_could_not_be_read(
  folder, tmp_path, monkeypatch, kind
):
  experiment = build.build(config_of(folder, **{"data.loader": "streaming"}))
  programme = classification.Classification(experiment)
  gone = folder / "train" / "a" / "0.png"

  def stop(*_, **__):
    """Stands in for a training in which a file is removed."""
    experiment.test.notes.note({str(gone): "is missing"})
    if kind:
      raise kind
    return False

  monkeypatch.setattr(classification.runner.Training, "run", stop)
  ends = pytest.raises(kind) if kind else contextlib.nullcontext()
  with ends:
    assert programme.train(RunDir(tmp_path)) is None
  assert f"{gone},is missing" in (tmp_path / "unreadable_files.csv").read_text()


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers(folder):
  config = {"data.loader": "streaming", "data.crop_area": 0.5}
  batches = {}
  for workers in (0, 1):
    train = build.build(config_of(folder, **config, **{"data.workers": workers})).open_train()
    assert train.workers == workers
    batches[workers] = next(train.batches(8, 1, 1, total_steps=2))
  np.testing.assert_array_equal(batches[0][0], batches[1][0])
  np.testing.assert_array_equal(batches[0][1], batches[1][1])
