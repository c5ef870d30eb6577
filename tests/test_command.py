"""Output and exit status of the command, within this process.

`test_cli.py` has the tests that need their own processes.
"""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

import gating_jax
from gating_jax import __main__, cli, command_flags, config_files, interrupts, programmes
from gating_jax.continual import run as continual
from gating_jax.images import classification
from gating_jax.models import resnets
from gating_jax.reports import timings
from gating_jax.training import hosts, provenance, rundir, smoke, stopping
from gating_jax.video import run as video
from tests.helpers import ROOT, environment, tiny_cli
from tests.helpers.command import run_command

CONFIG = f"--config={ROOT / 'configs' / 'digits_resnet20.py'}"


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.optim.lerning_rate=1", "got 'lerning_rate'. Did you mean 'learning_rate'"),
    ("--config.modle.gating=none", "got 'modle'. Did you mean 'model'"),
    ("--config.seed.first=1", "--config.seed.first: config.seed has no fields; its value is 0\n"),
    (
      "--config.model.gating=chanel",
      "model.gating must be one of .*; got 'chanel'. Did you mean 'channel'",
    ),
    ("--config.loss.sparsity.kind=l2", "must be one of budget, l0, macs, target_rate; got 'l2'"),
    ("--config.optim.epochs=ten", "config.optim.epochs=ten: must be a whole number; got 'ten'\n"),
    ("--config.model.width=wide", "model.width=wide: must be a number; got 'wide'\n"),
    ("--config.optim.epochs=None", "--config.optim.epochs must have a value; got None\n"),
    ("--config.data.flip=maybe", "data.flip=maybe: must be true or false; got 'maybe'\n"),
    ("--config.loss.batch_shaping=0", "section, .*--config.SECTION.FIELD=VALUE; got '0'\n"),
    ("--config.optim.batch_size=100000", "optim.batch_size must be at most 1437, .* got 100000"),
    ("--mode=trian", r"--mode must be one of .*report.*; got 'trian'. Did you mean 'train'\?"),
    ("--page=mine.html", "--page requires --mode=compare; got --mode=train"),
    ("--wrokdir=elsewhere", r"no flag --wrokdir. Did you mean --workdir\?"),
    ("--config.modle=1", "got 'modle'. Did you mean 'model'"),
    ("--unheard_of=elsewhere", "no flag --unheard_of; see --help"),
    ("evaluate", r"unknown arguments .*evaluate.*Did you mean --mode=evaluate\?"),
    ("digits", r"unknown arguments .*digits.*Did you mean --config=digits\?"),
    (
      "--config=configs/digits_resnet21.py",
      "got 'configs/digits_resnet21.py'. Did you mean configs/digits_resnet20.py",
    ),
    ("--config=digts", "got 'digts'. Did you mean digits_resnet20 or"),
    ("--config=split", "'split' could be split_cifar10 or"),
    ("--config=imagenet", "'imagenet' could be imagenet50 or imagenet_resnet18"),
    ("--config=elsewhere:1/mine.py:epochs=3", "got 'elsewhere:1/mine.py'"),
    ("--config=unheard_of", "one of cifar10_resnet20, .*, worlds; got 'unheard_of'\n"),
    ("--config=gating_jax/data", "must be a file; gating_jax/data is a folder"),
    ("--config", "Missing value for flag --config"),
    (
      "--config=configs/digits_resnet20.py:epoch=3",
      "a variant must be one of .*'epochs'.*; got 'epoch=3'. Did you mean epochs=3",
    ),
  ],
)
def test_a_wrong_argument_is_named_before_anything_is_compiled(
  argument, message, tmp_path, caplog, monkeypatch
):
  monkeypatch.chdir(ROOT)
  with jax.log_compiles():
    status, said = run_command(CONFIG, f"--workdir={tmp_path / 'new'}", argument)
  assert status != 0
  assert re.search(message, said), said
  assert "Traceback" not in said
  assert "Finished XLA compilation" not in caplog.text
  assert not (tmp_path / "new").exists()


def test_only_an_override_that_the_config_lacks_is_called_unknown(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["gating-jax"])

  def unknown(override):
    with flagsaver.flagsaver():
      flags.FLAGS.unparse_flags()
      try:
        return command_flags._unknown_field(["gating-jax", CONFIG, override])
      finally:
        flags.FLAGS.mark_as_parsed()

  assert unknown("--config.optim.epochs=3") is None
  assert "got 'epoch'. Did you mean 'epochs'" in unknown("--config.optim.epoch=3")


def test_fields_are_set_back_to_none_by_flags(tmp_path, monkeypatch):
  found = []
  monkeypatch.setattr(classification, "run", lambda config, *_: found.append(config))
  set_back = (
    "model.gate.share",
    "model.gate.weighted",
    "model.dense_first.form",
    "model.sources",
    "optim.frozen_layers",
  )
  flags = [f"--config.{name}=None" for name in set_back]
  status, said = run_command(f"{CONFIG}:share=0.5", f"--workdir={tmp_path}", *flags)
  assert (status, said) == (0, "")
  values = rundir.flatten(found[0])
  assert [values[name] for name in set_back] == [None] * len(set_back)


_INTERRUPTED = """
import os, signal, sys
from gating_jax.__main__ import main
class Finder:
  def find_spec(self, name, *_):
    if name == {module!r}:
      os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
main()
"""


@pytest.mark.parametrize(
  "module",
  [
    "absl",
    "jax",
    pytest.param("gating_jax.images.classification", marks=pytest.mark.slow),
  ],
)
def test_ctrl_c_while_libraries_load_is_one_line(module, tmp_path, ctrl_c):
  """As it is where the interrupt would come out of an import as a traceback."""
  done = subprocess.run(
    [sys.executable, "-c", _INTERRUPTED.format(module=module), CONFIG, f"--workdir={tmp_path}"],
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
    env=environment(devices=1),
  )
  assert (done.returncode, done.stdout) == (130, "")
  assert done.stderr == "interrupted before anything was read or written\n"


def test_ctrl_c_while_something_is_imported_ends_at_once(ctrl_c, capfd, monkeypatch):
  # It would end the tests.
  monkeypatch.setattr(os, "_exit", sys.exit)
  with pytest.raises(SystemExit) as ended, interrupts.ending_at_once():
    signal.raise_signal(signal.SIGINT)
  assert ended.value.code == 130
  assert capfd.readouterr().err == "interrupted before anything was read or written\n"
  # Afterwards, and for whoever handles it, it is an exception as everywhere.
  with pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)


def test_a_library_that_only_an_extra_brings_is_named_with_it(monkeypatch, capsys):
  def failing(name):
    def main():
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return main

  monkeypatch.setattr(cli, "main", failing("optax"))
  with pytest.raises(SystemExit) as ended:
    __main__.main()
  assert ended.value.code == 2
  assert re.fullmatch(r"error: .*gating-jax\[train\].*\n", capsys.readouterr().err)
  monkeypatch.setattr(cli, "main", failing("unheard_of"))
  with pytest.raises(ModuleNotFoundError, match="unheard_of"):
    __main__.main()


def test_a_training_that_ctrl_c_stopped_has_the_status_of_an_interrupt(tmp_path, monkeypatch):
  def stopped(*_):
    raise stopping.Interrupted

  monkeypatch.setattr(classification, "run", stopped)
  assert run_command(CONFIG, f"--workdir={tmp_path}") == (130, "")


@pytest.mark.parametrize(
  ("error", "reason"),
  [
    (MemoryError("Unable to allocate 8 GiB"), "Unable to allocate 8 GiB"),
    (MemoryError(), "MemoryError"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nLargest buffers: ..."),
      "RESOURCE_EXHAUSTED: Out of memory",
    ),
  ],
)
def test_a_lack_of_memory_is_named_with_what_to_lower(error, reason, tmp_path, monkeypatch):
  def exhausted(*_):
    raise error

  monkeypatch.setattr(classification, "run", exhausted)
  assert run_command(CONFIG, f"--workdir={tmp_path}") == (
    1,
    f"error: out of memory: {reason}; in a new run directory, a smaller optim.batch_size needs "
    "less, and a data set that does not fit is read from disk with data.loader=streaming\n",
  )


JOB = ("--coordinator=localhost:1", "--processes=2", "--process=0")


@pytest.mark.parametrize(
  ("error", "status", "message"),
  [
    (OSError("no such disk"), 1, "error: no such disk\n"),
    (hosts.PeerError("process 1 is gone"), 1, "error: process 1 is gone\n"),
    (
      ModuleNotFoundError("No module named 'av'", name="av"),
      2,
      r"error: .*gating-jax\[video\].*\n",
    ),
  ],
)
def test_an_error_that_is_expected_is_one_line(error, status, message, tmp_path, monkeypatch):
  def failing(*_):
    raise error

  monkeypatch.setattr(classification, "run", failing)
  found, said = run_command(CONFIG, f"--workdir={tmp_path}")
  assert found == status
  assert re.fullmatch(message, said)


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (
      jax.errors.JaxRuntimeError("UNAVAILABLE: peer"),
      "error: JAX failed, perhaps because another process of the job ended: UNAVAILABLE: peer\n",
    ),
    (KeyError("unexpected"), "error: internal error:\nTraceback .*KeyError: 'unexpected'\n"),
  ],
)
def test_an_error_of_a_job_ends_its_process_at_once(error, message, tmp_path, monkeypatch):
  def failing(*_):
    raise error

  monkeypatch.setattr(classification, "run", failing)
  with pytest.raises(type(error)):
    run_command(CONFIG, f"--workdir={tmp_path}")
  monkeypatch.setattr(hosts, "connect", lambda *_: None)
  # It would end the tests.
  monkeypatch.setattr(os, "_exit", sys.exit)
  status, said = run_command(CONFIG, f"--workdir={tmp_path}", *JOB)
  assert status == 1
  assert re.fullmatch(message, said, re.DOTALL)


@pytest.mark.parametrize(
  ("arguments", "next_step"),
  [
    (("--mode=train",), "the same command resumes from the newest checkpoint, if there is one"),
    (("--mode=evaluate",), "the same command starts over"),
  ],
)
def test_ctrl_c_says_how_to_go_on(arguments, next_step, tmp_path, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(classification, "run", interrupted)
  # It would end the tests.
  monkeypatch.setattr(os, "_exit", sys.exit)
  said = run_command(CONFIG, f"--workdir={tmp_path}", *arguments)
  assert said == (130, f"interrupted; {next_step}\n")
  monkeypatch.setattr(cli.command_flags, "answer", interrupted)
  assert run_command("--help") == (130, "interrupted\n")


@pytest.mark.parametrize(
  ("arguments", "reason"),
  [
    ((CONFIG, "--workdir="), ""),
    ((CONFIG, "--mode=evaluate"), " with --mode=evaluate, which reads the run there"),
    (("--mode=compile",), " with --mode=compile, which reads the run there"),
    (("--mode=compare",), " with --mode=compare, which reads the runs there"),
    (
      (CONFIG, "--coordinator=localhost:1", "--processes=2", "--process=0"),
      " with --coordinator, since all processes of a job share it",
    ),
  ],
)
def test_a_workdir_is_asked_for_where_none_can_be_chosen(arguments, reason):
  assert run_command(*arguments) == (
    2,
    f"error: --workdir must be given{reason}, such as --workdir=runs/digits\n",
  )


@pytest.mark.parametrize(
  ("config", "name"),
  [
    ("digits", "digits"),
    ("digits:epochs=1", "digits"),
    ("configs/split_digits.py:method=ewc", "split_digits"),
    ("composed_timegate", "composed_timegate"),
  ],
)
def test_a_training_without_a_workdir_takes_the_next_free_one(config, name, tmp_path, monkeypatch):
  monkeypatch.setattr(interrupts, "same_command", interrupts.same_command)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / f"{name}-1").touch()
  (tmp_path / "runs" / f"{name}-2").symlink_to("nowhere")
  asked, others = [], []

  def run(config, workdir, mode):
    asked.append((workdir, mode, provenance.describe()["command"]))
    # A command that starts now takes another one.
    others.append(command_flags.make_workdir())
    raise KeyboardInterrupt

  for module in (classification, continual, video):
    monkeypatch.setattr(module, "run", run)
  # It would end the tests.
  monkeypatch.setattr(os, "_exit", sys.exit)
  chosen = f"runs/{name}-3"
  assert run_command(f"--config={config}") == (
    130,
    f"new run directory: {chosen}; to resume this run, add --workdir={chosen}\n"
    f"interrupted; the same command with --workdir={chosen} resumes from the newest checkpoint, "
    "if there is one\n",
  )
  command = f"gating-jax --config={config} --workdir={chosen}"
  assert asked == [(Path(chosen), "train", command)]
  assert others == [f"runs/{name}-4"]
  # One in which nothing was written is removed.
  assert not (tmp_path / chosen).exists()
  assert (tmp_path / others[0]).exists()


def test_a_run_directory_of_a_failed_training_stays_where_anything_is_in_it(tmp_path, monkeypatch):
  monkeypatch.setattr(interrupts, "same_command", interrupts.same_command)
  monkeypatch.chdir(tmp_path)

  def run(config, workdir, mode):
    (workdir / "config.json").touch()
    raise ValueError("no such data")

  monkeypatch.setattr(classification, "run", run)
  said = "new run directory: runs/digits-1; to resume this run, add --workdir=runs/digits-1\n"
  assert run_command("--config=digits") == (2, f"{said}error: no such data\n")
  assert (tmp_path / "runs" / "digits-1" / "config.json").exists()


def test_a_new_run_directory_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(interrupts, "same_command", interrupts.same_command)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs").touch()
  assert run_command("--config=digits") == (
    2,
    "error: workdir runs/digits-1 cannot be written: Not a directory\n",
  )


def test_a_refused_config_makes_no_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(interrupts, "same_command", interrupts.same_command)
  monkeypatch.chdir(tmp_path)
  for arguments in (
    ("--config=digist",),
    (CONFIG, "--config.optim.lerning_rate=1"),
    (CONFIG, "--config.model.gating=chanel"),
  ):
    status, said = run_command(*arguments)
    assert status == 2, said
  assert "Did you mean 'channel'" in said
  assert "\nremoved runs/digits_resnet20-1, in which nothing was written\n" in said
  assert list(tmp_path.iterdir()) == []


def test_a_config_is_asked_for_to_train_and_refused_to_compare(tmp_path):
  workdir = f"--workdir={tmp_path}"
  assert run_command(workdir) == (
    2,
    "error: --config must be given to train, such as --config=digits\n",
  )
  status, said = run_command(CONFIG, workdir, "--mode=compare")
  assert status == 2
  assert "--config must not be given with --mode=compare" in said
  assert run_command(workdir, "--mode=compare", "--processes=2") == (
    2,
    "error: --processes must not be given with --mode=compare, which is one process; got 2\n",
  )
  assert run_command(workdir, "--mode=report", "--smoke") == (
    2,
    "error: --smoke requires --mode=train; got --mode=report, which uses a run that is trained\n",
  )
  status, said = run_command("--config.optim.epochs=3", workdir, "--mode=evaluate")
  assert status == 2
  assert "--config.optim.epochs changes a field of --config, which is not given" in said


def test_the_bare_command_says_in_three_lines_where_to_begin():
  status, said = run_command()
  assert status == 2
  assert said.count("\n") == 3
  assert all(
    word in said for word in ("--config=configs/digits_resnet20.py", "--workdir=", "--help")
  )


@pytest.mark.parametrize(
  "arguments",
  [("--help",), ("-h",), (CONFIG, "--workdir=x", "--help"), ("--help=true",), ("--helpshort=1",)],
)
def test_help_has_an_example_of_each_programme_all_modes_configs_and_flags(arguments):
  status, said = run_command(*arguments)
  assert status == 0
  for name in config_files.packaged():
    assert re.search(rf"^  {name} +\S", said, re.MULTILINE)
  examples = re.findall(r"gating-jax --config=configs/(\w+)\.py --workdir=", said)
  named = {importlib.import_module(f"configs.{name}").get_config().experiment for name in examples}
  assert named == set(programmes.PROGRAMMES)
  assert all(f"--mode={mode}" in said for mode in cli.MODES)
  assert "--coordinator: " in said


def test_the_full_help_begins_like_the_help_and_has_the_flags_of_libraries():
  status, said = run_command("--helpfull")
  assert status == 0
  assert said.startswith(run_command("--help")[1].rstrip("\n"))
  assert "--config.model.gating" not in said
  assert "absl.logging:" in said


def test_the_version_is_that_of_the_project():
  status, said = run_command("--version")
  assert (status, said.split(",")[0]) == (0, f"gating-jax {gating_jax.__version__}")


@pytest.mark.parametrize("mode", ["evaluate", "report", "compile", "export"])
def test_a_mode_that_looks_at_a_run_reads_its_config(mode, tmp_path, monkeypatch):
  config, asked = importlib.import_module("configs.digits_resnet20").get_config(), []
  (tmp_path / "config.json").write_text(config.to_json())
  monkeypatch.setattr(classification, "run", lambda *arguments: asked.append(arguments))
  assert run_command(f"--workdir={tmp_path}", f"--mode={mode}") == (0, "")
  assert [(found.to_dict(), *rest) for found, *rest in asked] == [
    (config.to_dict(), tmp_path, mode)
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is damaged: it must hold JSON"),
    ("[" * 200_000, "is damaged: it must hold JSON"),
    ("{}", "is damaged: it must name the experiment"),
  ],
)
def test_a_run_whose_config_is_damaged_is_named(content, message, tmp_path):
  (tmp_path / "config.json").write_text(content)
  status, said = run_command(f"--workdir={tmp_path}", "--mode=evaluate")
  assert status == 2
  assert f"{tmp_path / 'config.json'} {message}" in said


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      "import unheard_of\ndef get_config(arg=''): pass",
      "line 1: ModuleNotFoundError: No module named 'unheard_of'",
    ),
    ("def get_config(arg=''):\n  return 1 / 0", "line 2: ZeroDivisionError"),
    ("def get_config(arg='')", "SyntaxError"),
    ("def get_config(arg=''): pass", "get_config must return a ConfigDict; got NoneType"),
    ("def get_config(arg=''): raise ValueError('unheard of')", ": unheard of"),
    ("", ": it has no function get_config, so it is no config"),
    (
      "import ml_collections\ndef get_config(arg=''): return ml_collections.ConfigDict()",
      "the field experiment must name one; got None",
    ),
  ],
)
def test_what_is_wrong_with_a_config_file_is_said_in_a_line(text, message, tmp_path):
  (tmp_path / "mine.py").write_text(text)
  status, said = run_command(f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
  assert status == 2
  assert f"config {tmp_path / 'mine.py'}" in said
  assert message in said
  assert said.count("\n") == 1


def check_concluded(said, number):
  """The last lines show the main number and the next command, and are few."""
  last = said.rstrip("\n").split("\n\n")[-1]
  assert last.count("\n") < 12
  assert number in last
  assert "\nnext: " in last


def test_a_run_is_trained_looked_at_and_compared(tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.chdir(tmp_path)
  command = (
    "--config=digits",
    f"--workdir={tmp_path / 'run'}",
    "--config.model.name=tiny",
    "--config.model.gating=none",
    "--config.optim.epochs=1",
  )
  status, said = run_command(*command)
  assert status == 0, said
  (start,) = provenance.read_starts(tmp_path / "run")
  assert shlex.split(start["command"]) == ["gating-jax", *command]
  accuracy = re.search(r"test accuracy +(\d+\.\d\d %)", said)[1]
  check_concluded(said, accuracy)
  for arguments in (command, (command[1], "--mode=evaluate"), (command[1], "--mode=report")):
    status, said = run_command(*arguments)
    assert status == 0, said
    check_concluded(said, accuracy)
    assert accuracy in said or arguments[-1] == "--mode=report"
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  status, said = run_command(f"--workdir={tmp_path / 'run'},{tmp_path / 'copy'}", "--mode=compare")
  assert status == 0, said
  check_concluded(said, f"accuracy {accuracy}")
  assert f"<td>{accuracy}</td><td>{accuracy}</td>" in (tmp_path / "comparison.html").read_text()
  status, said = run_command(*command, "--config.seed=1")
  assert status == 2
  assert "holds a run of another config" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lr[0.1] *?'\"<b>&$x", os.fsdecode(b"\xff:a,b\n")])
def test_every_mode_works_in_a_folder_of_any_name(name, tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.setattr(timings, "_REPEATS", 1)
  # One call of each program is no measurement.
  monkeypatch.setattr(timings, "MAX_EFFICIENCY", float("inf"))
  monkeypatch.setattr(timings, "_BATCHES", (3,))
  folder = tmp_path / name
  folder.mkdir()
  monkeypatch.chdir(folder)
  shutil.copy(ROOT / "configs" / "digits_resnet20.py", folder / "my:config.py")
  train = (f"--config={folder / 'my:config.py'}:epochs=1", "--config.model.name=tiny")
  run, other = (f"--workdir={folder / each}" for each in ("run", "other"))
  for arguments in (
    (*train, run),
    (run, "--mode=evaluate"),
    (run, "--mode=report"),
    (run, "--mode=compile"),
    (run, "--mode=export"),
    (*train, "--config.model.gating=none", other),
    (f"{run},{folder / 'other'}", "--mode=compare"),
  ):
    status, said = run_command(*arguments)
    assert status == 0, said
    if arguments[-1] == "--mode=evaluate":  # the next command names the folder, for a shell
      named = re.search("next: gating-jax (--workdir=.*) --mode=compile", said)[1]
      printed = subprocess.run(
        ["bash", "-c", f"printf %s {named}"], capture_output=True, check=True
      ).stdout
      assert os.fsdecode(printed) == run
  for made in ("comparison.html", "run/report.html", "run/compile.json", "run/export"):
    assert (folder / made).exists()


def test_processes_without_a_coordinator_and_a_folder_that_is_a_file_are_named(tmp_path):
  (tmp_path / "file").touch()
  status, said = run_command(CONFIG, f"--workdir={tmp_path / 'run'}", "--processes=2")
  assert (status, said) == (
    2,
    "error: --processes requires --coordinator, such as --coordinator=localhost:1234\n",
  )
  status, said = run_command(CONFIG, f"--workdir={tmp_path / 'file' / 'run'}")
  # The lines before it tell of long operations.
  assert (status, said.splitlines()[-1]) == (
    2,
    f"error: workdir {tmp_path}/file/run cannot be written: Not a directory",
  )


def test_a_smoke_run_of_several_processes_joins_them_before_it_counts_devices(monkeypatch):
  called = []
  monkeypatch.setattr(hosts, "connect", lambda *_: called.append("connect"))

  def shrink(config):
    called.append("shrink")
    raise ValueError("far enough")

  monkeypatch.setattr(smoke, "shrink", shrink)
  # It would end the tests.
  monkeypatch.setattr(os, "_exit", sys.exit)
  status, said = run_command(CONFIG, "--workdir=nowhere", "--smoke", *JOB)
  assert (status, called) == (2, ["connect", "shrink"])
  assert "far enough" in said
