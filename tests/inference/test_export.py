import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gating_jax.inference import costs, export, folded
from gating_jax.inference.analysing import analyse, prune
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.exits import compile_exits
from gating_jax.inference.export import ExportError, export_model, load_exported
from gating_jax.inference.folding import fold
from gating_jax.inference.quantising import dequantise, quantise
from gating_jax.inference.strategies import why_not
from gating_jax.models.resnet_variants import EarlyExitNet
from tests.helpers.gated_models import MODELS, SHAPE, images, random_variables

run = jax.jit(folded.run_net)


@pytest.fixture(scope="module")
def net():
  return prune(analyse(MODELS["basic"], random_variables(MODELS["basic"]), images(20)), multiple=1)


@pytest.fixture
def exported(net, tmp_path):
  return export_model(
    net, tmp_path / "net", input_shape=SHAPE, platforms=("cpu",), card={"accuracy": 0.5}
  )


def assert_same(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_loaded_computes_the_same_for_any_number_of_images(net, tmp_path):
  path = export_model(
    net, tmp_path / "net", input_shape=SHAPE, card={"accuracy": 0.5, "class_names": ["a", "b", "c"]}
  )
  loaded = load_exported(path)
  for count in (1, 5):
    assert_same(loaded(np.asarray(images(count))), run(net, images(count)))
  outputs, logits = run(net, images(1))
  nothing, none = loaded(np.asarray(images(1)[:0]))
  assert nothing.shape == (0, *outputs.shape[1:])
  assert [gates.shape for gates in none] == [(0, *gates.shape[1:]) for gates in logits]
  card = json.loads((path / "card.json").read_text())
  assert card == loaded.card
  assert card["platforms"] == ["cpu", "cuda", "tpu"]
  assert (card["input_shape"], card["batch_size"], card["class_names"]) == (
    [*SHAPE],
    None,
    ["a", "b", "c"],
  )
  assert card["dense_macs"] == costs.macs(net, SHAPE)
  assert card["parameters"] == sum(x.size for x in jax.tree.leaves(net))
  for name, said in card["files"].items():
    data = (path / name).read_bytes()
    assert said == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
  assert {file.name for file in path.iterdir()} == {"card.json", *card["files"]}
  assert [file.name for file in tmp_path.iterdir()] == ["net"]


def test_weights_are_no_part_of_the_program(exported, net):
  loaded = load_exported(exported)
  doubled = {
    name: 2 * w if name.startswith("classifier") else w for name, w in loaded.weights.items()
  }
  outputs, _ = loaded.program.call(doubled, images(2))
  np.testing.assert_allclose(outputs, 2 * run(net, images(2))[0], rtol=1e-5, atol=1e-5)
  assert "parts.0.conv.kernel" in loaded.weights


@pytest.mark.slow
def test_int8_weights_stay_int8_in_the_file_and_in_the_argument(net, tmp_path):
  small = quantise(net)
  path = export_model(small, tmp_path / "net", input_shape=SHAPE, platforms=("cpu",))
  loaded = load_exported(path)
  assert loaded.weights["parts.0.conv.kernel.values"].dtype == jnp.int8
  assert_same(loaded(images(3)), run(dequantise(small), images(3)))


@pytest.mark.parametrize(("name", "strategy"), [("basic", "switch"), ("layer", "layer_dispatch")])
def test_a_program_that_skips_is_exported_with_its_weights_beside_it(name, strategy, tmp_path):
  of = fold(MODELS[name], random_variables(MODELS[name]))
  made = compile_conditional(of, input_shape=SHAPE, batch_size=2, strategy=strategy)
  loaded = load_exported(export_model(made, tmp_path / "net", input_shape=SHAPE))
  assert loaded.card["batch_size"] == 2
  assert "parts.0.conv.kernel" in loaded.weights
  assert_same(loaded(images(2)), run(of, images(2)))
  with pytest.raises(
    ValueError, match="batch_size must be None or 2, that of the compiled model; got 3"
  ):
    export_model(made, tmp_path / "other", input_shape=SHAPE, batch_size=3)
  with pytest.raises(ValueError, match=r"input_shape must be \(9, 8, 3\), that of the compiled"):
    export_model(made, tmp_path / "other", input_shape=(8, 8, 3))


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["recipe", "weighted outputs", "scales"])
def test_a_net_with_weights_is_exported_for_any_number_of_images(name, tmp_path):
  of = fold(MODELS[name], random_variables(MODELS[name]))
  loaded = load_exported(export_model(of, tmp_path / "net", input_shape=SHAPE, platforms=("cpu",)))
  assert ("glance.conv.kernel" in loaded.weights) == (of.glance is not None)
  for count in (1, 5):
    assert_same(loaded(np.asarray(images(count))), run(of, images(count)))
  assert loaded.card["dense_macs"] == costs.macs(of, SHAPE)


def test_a_program_with_exits_is_exported(tmp_path):
  model = EarlyExitNet(3, (1, 1), features=4, threshold=0.9)
  made = compile_exits(
    model, random_variables(model), input_shape=SHAPE, batch_size=4, strategy="exit_dispatch"
  )
  # It knows the shape of its images.
  loaded = load_exported(export_model(made, tmp_path / "net"))
  assert loaded.card["input_shape"] == list(SHAPE)
  assert "stages.0.parts.0.conv.kernel" in loaded.weights
  assert_same(loaded(images(4)), made(images(4)))


@pytest.mark.skipif(bool(why_not("native")), reason=why_not("native"))
def test_a_program_of_the_native_kernel_is_refused(tmp_path):
  of = fold(MODELS["basic"], random_variables(MODELS["basic"]))
  made = compile_conditional(of, input_shape=SHAPE, batch_size=1, strategy="native")
  with pytest.raises(
    ValueError, match="model must be compiled without native, tied to one kind of device"
  ):
    export_model(made, tmp_path / "net", input_shape=SHAPE)


def test_a_function_is_exported_for_its_number_of_images(net, tmp_path):
  function = jax.jit(lambda x: {"out": folded.run_net(net, x)[0]})
  path = export_model(
    function, tmp_path / "net", input_shape=SHAPE, batch_size=2, platforms=("cpu",)
  )
  loaded = load_exported(path)
  assert loaded.card["batch_size"] == 2
  assert loaded.weights == {}
  assert_same(loaded(images(2))["out"], run(net, images(2))[0])
  with pytest.raises(ValueError, match="images must be 2, the batch_size of the export; got 3"):
    loaded(images(3))
  with pytest.raises(ValueError, match=r"images must be \[N, .*\]; got shape"):
    loaded(images(2)[:, 1:])


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      lambda d: (d / "model.safetensors").unlink(),
      "holds no complete export: model.safetensors cannot be read",
    ),
    (lambda d: (d / "card.json").unlink(), "holds no complete export: card.json cannot be read"),
    (lambda d: (d / "card.json").write_text("{"), "card.json is damaged: it must hold JSON"),
    (lambda d: (d / "card.json").write_text("[" * 200_000), "card.json is damaged: it must hold"),
    (
      lambda d: (d / "card.json").write_text("[]"),
      "card.json is damaged: it must have the SHA-256",
    ),
    (lambda d: edit(d, lambda card: card.update(format=2)), "format must be 1; got 2"),
    (lambda d: cut(d / "model.safetensors"), "model.safetensors is damaged"),
    (lambda d: cut(d / "program.stablehlo"), "program.stablehlo is damaged"),
    (
      lambda d: (cut(d / "model.safetensors"), sign(d, "model.safetensors")),
      "model.safetensors is damaged",
    ),
    (
      lambda d: (
        (d / "program.stablehlo").write_bytes(b"no program"),
        sign(d, "program.stablehlo"),
      ),
      "program.stablehlo is damaged or of another version",
    ),
    (
      lambda d: (
        (d / "model.safetensors").write_bytes(safetensors.numpy.save({"a": np.zeros(2)})),
        sign(d, "model.safetensors"),
      ),
      "does not have the weights that program.stablehlo takes",
    ),
  ],
)
def test_what_is_missing_or_damaged_is_named(exported, damage, message):
  damage(exported)
  with pytest.raises(ExportError, match=message):
    load_exported(exported)


def edit(directory, change):
  card = json.loads((directory / "card.json").read_text())
  change(card)
  (directory / "card.json").write_text(json.dumps(card))


def cut(file):
  file.write_bytes(file.read_bytes()[:-100])


def sign(directory, name):
  digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
  edit(directory, lambda card: card["files"][name].update(sha256=digest))


def test_nothing_is_overwritten(net, tmp_path):
  (tmp_path / "net").mkdir()
  with pytest.raises(ExportError, match="must be new; .*net exists"):
    export_model(net, tmp_path / "net", input_shape=SHAPE)
  assert list((tmp_path / "net").iterdir()) == []


def test_nothing_is_left_of_an_export_that_fails(net, tmp_path, monkeypatch):
  fsync, calls = export.os.fsync, []

  def full(descriptor):
    calls.append(descriptor)
    if len(calls) == 2:
      raise OSError(28, "No space left on device")
    fsync(descriptor)

  monkeypatch.setattr(export.os, "fsync", full)
  with pytest.raises(ExportError, match="cannot be written: No space left on device"):
    export_model(net, tmp_path / "net", input_shape=SHAPE, platforms=("cpu",))
  assert len(calls) == 2
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(ExportError, match="cannot be written: No such file"):
    export_model(net, tmp_path / "missing" / "net", input_shape=SHAPE, platforms=("cpu",))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"input_shape": (9, 8)}, r"input_shape must be \(H, W, D\)"),
    ({"input_shape": None}, r"input_shape must be \(H, W, D\), whole numbers >= 1; got None"),
    ({"input_shape": (9, 8, 1)}, "images must have 3 channels, as the network expects; got 1"),
    ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
    ({"platforms": ("gpu",)}, "platforms must be one of cpu, cuda, rocm, tpu; got 'gpu'"),
    ({"card": {"files": {}}}, "card must not name files"),
    ({"card": {"accuracy": float("nan")}}, "card must be of JSON values"),
    ({"card": {"accuracy": object()}}, "card must be of JSON values"),
    ({"files": {"": b""}}, "files must have names of their own, without folders; got ''"),
    ({"files": {"..": b""}}, "without folders; got '..'"),
    ({"files": {"card.json": b"{}"}}, "without folders; got 'card.json'"),
  ],
)
def test_bad_arguments_are_named(net, tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    export_model(net, tmp_path / "net", **{"input_shape": SHAPE, "platforms": ("cpu",), **options})
  assert list(tmp_path.iterdir()) == []


def test_further_files_must_be_bytes(net, tmp_path):
  with pytest.raises(TypeError, match=r"files\['notes.txt'\] must be bytes.*; got 'text'"):
    export_model(net, tmp_path / "net", input_shape=SHAPE, files={"notes.txt": "text"})
  assert list(tmp_path.iterdir()) == []


def test_an_export_of_an_earlier_version_is_loaded(exported):
  expected = load_exported(exported).weights
  (exported / "model.safetensors").rename(exported / "weights.safetensors")
  rename = lambda files: files.update({"weights.safetensors": files.pop("model.safetensors")})
  edit(exported, lambda card: rename(card["files"]))
  found = load_exported(exported).weights
  assert found.keys() == expected.keys()
  (exported / "weights.safetensors").unlink()
  with pytest.raises(ExportError, match="no complete export: weights.safetensors cannot be read"):
    load_exported(exported)


@pytest.mark.parametrize("name", ["model.safetensors", "program.stablehlo"])
def test_a_file_of_the_right_size_that_was_changed_is_not_loaded(exported, name):
  data = bytearray((exported / name).read_bytes())
  data[-1] ^= 1
  (exported / name).write_bytes(data)
  with pytest.raises(ExportError, match=f"{name} is damaged: its content has changed"):
    load_exported(exported)
