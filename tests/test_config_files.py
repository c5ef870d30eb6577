"""Config files are found by path and by name, in the repository and in an installed package."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import types

import ml_collections
import pytest

from configs import common, continual_common, video_common
from gating_jax import config_files, programmes
from gating_jax.training import rundir
from tests.helpers import ROOT
from tests.helpers.config_files import FILES


@pytest.mark.parametrize(
  ("given", "name"),
  [
    ("digits", "digits_resnet20"),
    ("digits_resnet20", "digits_resnet20"),
    ("digits_resnet20.py", "digits_resnet20"),
    ("configs/digits_resnet20.py", "digits_resnet20"),
    ("composed", "composed_timegate"),
    ("split_mnist", "split_mnist"),
    ("imagenet_", "imagenet_resnet18"),
    ("dig", "digits_resnet20"),
  ],
)
def test_a_config_is_found_by_its_name_or_its_beginning_from_any_folder(
  given, name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "digits").mkdir()  # a run directory, say
  assert config_files.locate(given) == ROOT / "configs" / f"{name}.py"


def test_a_file_comes_before_a_packaged_config_of_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "digits_resnet20.py").touch()
  assert config_files.locate("digits_resnet20.py").absolute() == tmp_path / "digits_resnet20.py"


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "own[1].py").touch()
  assert config_files.locate("~/own[1].py") == tmp_path / "own[1].py"


@pytest.mark.parametrize(
  ("given", "file", "variant"),
  [
    ("lr:0.1/a:b.py", "lr:0.1/a:b.py", None),
    ("lr:0.1/a:b.py:epochs=3,x=1:2", "lr:0.1/a:b.py", "epochs=3,x=1:2"),
    ("lr:0.1/a", "lr:0.1/a", None),
    ("lr:0.1/a:", "lr:0.1/a", ""),
    ("digits:seed=" + "1" * 300, None, "seed=" + "1" * 300),
  ],
)
def test_a_colon_may_stand_in_a_path_and_a_variant_follows_the_longest(
  given, file, variant, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "lr:0.1").mkdir()
  (tmp_path / "lr:0.1" / "a").touch()
  (tmp_path / "lr:0.1" / "a:b.py").touch()
  expected = tmp_path / file if file else ROOT / "configs" / "digits_resnet20.py"
  path, found = config_files.find(given)
  assert (path.absolute(), found) == (expected, variant)


@pytest.mark.parametrize(
  "given", ["elsewhere/digits_resnet20.py", "configs/digits_resnet2.py", "digits/"]
)
def test_a_path_that_leads_nowhere_is_refused(given, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "digits").mkdir()
  if given == "digits/":
    assert config_files.locate(given).stem == "digits_resnet20"
    return
  with pytest.raises(ValueError, match=f"got '{given}'"):
    config_files.locate(given)


def test_what_configs_share_is_no_config_itself():
  assert list(config_files.packaged()) == FILES
  assert all(config_files.packaged().values())


def test_the_wheel_has_all_packages_and_the_configs_once():
  setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
  there = {
    ".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("gating_jax/**/__init__.py")
  }
  assert set(setuptools["packages"]) == there | {"gating_jax.configs"}
  assert setuptools["package-dir"] == {"gating_jax.configs": "configs"}
  assert not (ROOT / "gating_jax" / "configs").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with the package as in a wheel: the configs are inside."""
  folder = tmp_path_factory.mktemp("site")
  shutil.copytree(
    ROOT / "gating_jax", folder / "gating_jax", ignore=shutil.ignore_patterns("__pycache__")
  )
  shutil.copytree(
    ROOT / "configs",
    folder / "gating_jax" / "configs",
    ignore=shutil.ignore_patterns("__pycache__"),
  )
  return folder


_COMMAND = "import sys; from gating_jax import cli; sys.argv[0] = 'gating-jax'; cli.main()"


@pytest.mark.parametrize(
  "kind",
  [
    "copied",
    pytest.param("packaged", marks=pytest.mark.slow),
    pytest.param("copied to a folder named configs", marks=pytest.mark.slow),
  ],
)
def test_an_installed_package_finds_its_configs_and_what_a_copy_of_one_imports(
  kind, installed, tmp_path
):
  config = "digits:epochs=0"
  if kind != "packaged":
    folder = tmp_path / ("mine" if kind == "copied" else "configs")
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "digits_resnet20.py", folder / "changed.py")
    config = f"{folder.name}/changed.py:epochs=0"
  done = subprocess.run(
    [sys.executable, "-c", _COMMAND, f"--config={config}", "--workdir=run"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
    env={"PYTHONPATH": str(installed), "PATH": ""},
  )
  assert done.returncode == 2
  assert done.stderr == "error: optim.epochs must be >= 1; got 0\n"


def test_the_fields_of_configs_leave_a_package_of_the_caller_alone(monkeypatch):
  theirs = {name: types.ModuleType(name) for name in ("configs", "configs.common")}
  for name, module in theirs.items():
    monkeypatch.setitem(sys.modules, name, module)
  path = list(sys.path)
  assert "optim" in config_files.base("classification")
  assert {name: sys.modules[name] for name in theirs} == theirs
  assert sys.path == path


def test_fields_that_were_renamed_are_those_of_today():
  fields = set()
  for programme in programmes.PROGRAMMES:
    for name in rundir.flatten(config_files.base(programme)):
      fields.add(tuple(name.split(".")[-2:]))
  for (section, old), new in config_files.RENAMED_FIELDS.items():
    assert (section, new) in fields
    assert (section, old) not in fields


def test_a_config_of_an_earlier_version_sets_the_fields_of_today(tmp_path, caplog):
  own = tmp_path / "own.py"
  own.write_text(
    "from configs import common\n"
    "def get_config(arg=''):\n"
    "  config = common.image_config()\n"
    "  config.loss.sparsity.start = 0.4\n"
    "  return config\n"
  )
  config = config_files.load_config(str(own))
  assert config.loss.sparsity.ramp_start == 0.4
  assert "start" not in config.loss.sparsity
  assert "sparsity.start is now sparsity.ramp_start" in caplog.text


def test_a_config_file_of_an_earlier_version_has_the_fields_that_are_none(tmp_path):
  own = tmp_path / "own.py"
  own.write_text(
    "from configs import common\n"
    "def get_config(arg=''):\n"
    "  config = common.image_config()\n"
    "  del config.model.stem, config.model.gate.share, config.model.dense_first\n"
    "  del config.optim.epochs\n"
    "  config.model.kernels = None\n"
    "  return config.lock()\n"
  )
  config = config_files.load_config(str(own))
  assert config.is_locked
  assert config.model.stem is config.model.gate.share is config.model.dense_first.form is None
  assert config.model.get_type("stem") is str
  # Also a section that is none as a whole.
  assert config.model.kernels.count is None
  # No value stands for what this field was before.
  assert "epochs" not in config.optim
  frozen = own.read_text().replace("config.lock()", "ml_collections.FrozenConfigDict(config)")
  own.write_text(f"import ml_collections\n{frozen}")
  assert config_files.load_config(str(own)).model.stem is None


@pytest.mark.parametrize(
  ("module", "made", "fields"),
  [
    (
      "continual",
      continual_common.continual_config,
      ("tasks.classes", "optim.steps_per_task", "hat.grad_clip_norm"),
    ),
    ("video", video_common.video_config, ("budget", "speed", "data.colour")),
  ],
)
def test_a_config_that_python_makes_is_completed_before_it_is_read(
  monkeypatch, module, made, fields
):
  build = importlib.import_module(f"gating_jax.{module}.build")
  monkeypatch.setattr(build, "_check", lambda config: read.append(config) or 1 / 0)
  read, config = [], made()
  with config.unlocked():
    for field in fields:
      section, _, name = field.rpartition(".")
      del (config[section] if section else config)[name]
  before = config.to_json()
  for given in (ml_collections.FrozenConfigDict(config), config):
    with pytest.raises(ZeroDivisionError):
      build.build(given)
  # That of the caller stays as it is.
  assert config.to_json() == before
  for found in read:
    for field in fields:
      values = rundir.flatten(found)
      assert values["budget.scope" if field == "budget" else field] is None
  assert read[-1].is_locked == config.is_locked


@pytest.mark.parametrize("module", ["build", "segmentation"])
def test_a_config_of_images_is_completed_before_it_is_read(monkeypatch, module):
  module = importlib.import_module(f"gating_jax.images.{module}")
  monkeypatch.setattr(module, "check_config", lambda config, **_: read.append(config) or 1 / 0)
  read, config = [], common.image_config()
  del config.loss.scope
  with pytest.raises(ZeroDivisionError):
    module.build(config.lock())
  assert read[0].loss.scope is None
  assert read[0].is_locked
  assert "scope" not in config.loss


@pytest.mark.parametrize(
  ("given", "taken"),
  [
    ("--config.optim.drops=(0.5,)", "--config.optim.lr_drop_at=(0.5,)"),
    ("-config.loss.channels.sparsity.full", "-config.loss.channels.sparsity.ramp_end"),
    ("--config.model.heavy.share=1", "--config.model.heavy.share=1"),
    ("--workdir=optim.drops=1", "--workdir=optim.drops=1"),
    ("optim.drops=1", "optim.drops=1"),
    ("--config", "--config"),
    ("", ""),
  ],
)
def test_an_override_of_a_renamed_field_sets_that_of_today(given, taken):
  assert config_files.rename_override(given) == taken


def test_a_config_file_has_the_ending_of_python(tmp_path):
  file = tmp_path / "mine.txt"
  file.write_text("def get_config(): pass")
  with pytest.raises(ValueError, match=f"^config {file}: a config file must end with .py$"):
    config_files.check(file, None)
