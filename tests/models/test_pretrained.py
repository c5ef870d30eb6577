"""Weights of torchvision's and timm's networks, against forward passes as torch has them."""

import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax import lax

from configs.common import imagenet_config
from gating_jax import ResNet, checks, load_pretrained, save_pretrained, vgg
from gating_jax.layers.context import grid_means
from gating_jax.layers.gate import GateSettings
from gating_jax.models import pretrained
from gating_jax.models.pretrained import IMAGENET_MEAN, IMAGENET_STD, _without_prefixes
from gating_jax.models.vggs import POOL, VGG

FIXTURES = Path(__file__).parents[3] / "shared" / "data" / "pretrained"


def conv(state, name, x, stride=1):
  """torch's Conv2d with a border of half the window, on [N, C, H, W]."""
  kernel = state[f"{name}.weight"]
  border = [(kernel.shape[-1] // 2,) * 2] * 2
  y = lax.conv_general_dilated(x, kernel, (stride, stride), border)
  bias = state.get(f"{name}.bias")
  return y if bias is None else y + bias[:, None, None]


def norm(state, name, x):
  """torch's BatchNorm2d in evaluation."""
  mean, var, weight, bias = (
    state[f"{name}.{value}"][:, None, None]
    for value in ("running_mean", "running_var", "weight", "bias")
  )
  return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def pool(x, window, border):
  """torch's MaxPool2d with stride 2."""
  borders = ((0, 0), (0, 0), (border, border), (border, border))
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, window, window), (1, 1, 2, 2), borders)


def resnet_logits(state, images, blocks):
  x = jax.nn.relu(norm(state, "bn1", conv(state, "conv1", images.transpose(0, 3, 1, 2), 2)))
  x = pool(x, 3, 1)
  for stage, count in enumerate(blocks, start=1):
    for i in range(count):
      name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
      strides = (1, stride, 1) if f"{name}.conv3.weight" in state else (stride, 1)
      y = x
      for k, step in enumerate(strides, start=1):
        y = norm(state, f"{name}.bn{k}", conv(state, f"{name}.conv{k}", y, step))
        y = jax.nn.relu(y) if k < len(strides) else y
      if f"{name}.downsample.0.weight" in state:
        x = norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x, stride))
      x = jax.nn.relu(x + y)
  return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def vgg_logits(state, images, chain, side):
  x, place = images.transpose(0, 3, 1, 2), 0
  for channels in chain:
    if channels == POOL:
      x, place = pool(x, 2, 0), place + 1
      continue
    x = conv(state, f"features.{place}", x)
    place += 1
    if f"features.{place}.running_mean" in state:
      x, place = norm(state, f"features.{place}", x), place + 1
    x, place = jax.nn.relu(x), place + 1
  x = adaptive_mean(np.asarray(x), side).reshape(len(x), -1)
  for number in (0, 3):
    x = x @ state[f"classifier.{number}.weight"].T + state[f"classifier.{number}.bias"]
    x = np.maximum(x, 0)
  return x @ state["classifier.6.weight"].T + state["classifier.6.bias"]


def adaptive_mean(x, side):
  """torch's AdaptiveAvgPool2d, part by part."""
  parts = np.zeros((*x.shape[:2], side, side), np.float32)
  bounds = lambda i, size: slice(
    int(np.floor(i * size / side)), int(np.ceil((i + 1) * size / side))
  )
  for i in range(side):
    for j in range(side):
      part = x[:, :, bounds(i, x.shape[2]), bounds(j, x.shape[3])]
      parts[:, :, i, j] = part.mean((2, 3))
  return parts


def filled(shapes):
  """Random values, with variances above 0, and counters of steps as torch keeps them."""
  rng = np.random.default_rng(0)
  state = {}
  for name, shape in shapes.items():
    layer, _, variable = name.rpartition(".")
    fan_in = max(1, int(np.prod(shape[1:])))
    value = rng.normal(size=shape) / np.sqrt(fan_in)
    if variable == "running_var" or (variable == "weight" and len(shape) == 1):
      value = rng.uniform(0.5, 2, shape)
    state[name] = value.astype(np.float32)
    if variable == "running_mean":
      state[f"{layer}.num_batches_tracked"] = np.array(7)
  return state


def norm_shapes(name, channels):
  return {f"{name}.{v}": (channels,) for v in ("weight", "bias", "running_mean", "running_var")}


def resnet_state(blocks, **settings):
  return filled(resnet_shapes(blocks, **settings))


def resnet_shapes(blocks, *, deep=False, features=4, inner=None, classes=3):
  shapes = {"conv1.weight": (features, 3, 7, 7), **norm_shapes("bn1", features)}
  last = features
  for stage, count in enumerate(blocks, start=1):
    wide = features * 2 ** (stage - 1)
    middle, out = (inner or features) * wide // features, wide * (4 if deep else 1)
    for i in range(count):
      name = f"layer{stage}.{i}"
      windows = (1, 3, 1) if deep else (3, 3)
      widths = (last, middle, middle, out) if deep else (last, middle, out)
      for k, window in enumerate(windows, start=1):
        shapes[f"{name}.conv{k}.weight"] = (widths[k], widths[k - 1], window, window)
        shapes |= norm_shapes(f"{name}.bn{k}", widths[k])
      if i == 0 and (stage > 1 or last != out):
        shapes[f"{name}.downsample.0.weight"] = (out, last, 1, 1)
        shapes |= norm_shapes(f"{name}.downsample.1", out)
      last = out
  return shapes | {"fc.weight": (classes, last), "fc.bias": (classes,)}


def vgg_state(chain, *, side, norm=True, classes=3):
  shapes, place, last = {}, 0, 3
  for channels in chain:
    if channels == POOL:
      place += 1
      continue
    shapes[f"features.{place}.weight"] = (channels, last, 3, 3)
    shapes[f"features.{place}.bias"] = (channels,)
    if norm:
      shapes |= norm_shapes(f"features.{place + 1}", channels)
    place, last = place + (3 if norm else 2), channels
  for number, (inputs, outputs) in {0: (last * side**2, 6), 3: (6, 5), 6: (5, classes)}.items():
    shapes[f"classifier.{number}.weight"] = (outputs, inputs)
    shapes[f"classifier.{number}.bias"] = (outputs,)
  return filled(shapes)


def written(state, file):
  if file.suffix == ".npz":
    np.savez(file, **state)
  else:
    safetensors.numpy.save_file(state, file)
  return file


def contents(file):
  """The arrays of a file by name."""
  if file.suffix == ".safetensors":
    return safetensors.numpy.load_file(file)
  with np.load(file) as opened:
    return dict(opened)


def images_of(size, count=2):
  return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def assert_near(logits, expected):
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.thin(5)
@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize(
  ("blocks", "deep", "inner"), [((2, 1), False, None), ((1, 2), True, None), ((1, 1), True, 8)]
)
def test_a_residual_net_has_the_logits_of_its_original(tmp_path, blocks, deep, inner, size):
  state = resnet_state(blocks, deep=deep, inner=inner)
  model, variables = load_pretrained(written(state, tmp_path / "net.safetensors"))
  assert (model.blocks, model.features, model.classes) == (blocks, 4, 3)
  assert model.inner_width == (2 if inner else 1)
  images = images_of(size)
  logits, records = model.apply(variables, images)
  assert records == ()
  assert_near(logits, resnet_logits(state, images, blocks))


@pytest.mark.thin(2)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [8, 13])
def test_a_vgg_net_has_the_logits_of_its_original(tmp_path, size, norm):
  chain = (4, POOL, 5, 6, POOL)
  state = vgg_state(chain, side=2, norm=norm)
  model, variables = load_pretrained(written(state, tmp_path / "net.npz"))
  assert (model.chain, model.hidden, model.pooled, model.norm) == (chain, (6, 5), 2, norm)
  images = images_of(size)
  assert_near(model.apply(variables, images)[0], vgg_logits(state, images, chain, side=2))


def test_timm_names_the_dense_layers_of_a_vgg_net_in_its_own_way(tmp_path):
  state = vgg_state((4, POOL, 5, POOL), side=2)
  _, expected = load_pretrained(written(state, tmp_path / "theirs.npz"))
  model, variables = load_pretrained(written(renamed_by_timm(state, 2), tmp_path / "timm.npz"))
  jax.tree.map(np.testing.assert_array_equal, variables, expected)
  # There the dense layers slide over larger maps, and means of the results are taken.
  jax.eval_shape(model.apply, variables, images_of(8))
  with pytest.raises(
    ValueError, match=r"at most 2 x 2 pixels, .* slide .*; got 3 x 3\. model\.clone"
  ):
    jax.eval_shape(model.apply, variables, images_of(12))
  jax.eval_shape(model.clone(max_map=None).apply, variables, images_of(12))


def renamed_by_timm(state, side):
  """A state dict of a VGG net with the names and windows that timm has for its dense layers."""
  timm = {
    "classifier.0": "pre_logits.fc1",
    "classifier.3": "pre_logits.fc2",
    "classifier.6": "head.fc",
  }
  renamed = {}
  for name, value in state.items():
    layer, _, variable = name.rpartition(".")
    if layer in ("classifier.0", "classifier.3") and variable == "weight":
      window = side if layer == "classifier.0" else 1
      value = value.reshape(len(value), -1, window, window)
    renamed[f"{timm.get(layer, layer)}.{variable}"] = value
  return renamed


def test_parts_of_a_map_are_averaged_as_by_torch():
  x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(1, 5, 3, 2)
  expected = adaptive_mean(x.transpose(0, 3, 1, 2), 2).transpose(0, 2, 3, 1)
  np.testing.assert_allclose(grid_means(x, 2), expected, rtol=1e-6)
  # Rows 0 to 2 and 2 to 4; columns 0, 1 and 1, 2; values are 6 row + 2 column.
  np.testing.assert_allclose(grid_means(x, 2)[0, ..., 0], [[7, 9], [19, 21]], rtol=1e-6)
  np.testing.assert_array_equal(grid_means(x[:, :3], 3), x[:, :3])


@pytest.mark.parametrize(
  "state",
  [
    resnet_state((2, 1)),
    resnet_state((1, 1), deep=True, inner=8),
    vgg_state((2, POOL, 2, POOL, 3, 2, POOL, 2, 2, POOL, 2, 2, POOL), side=2),
    vgg_state((2, POOL, 2, POOL, 2, 2, POOL, 2, 2, POOL, 2, 2, POOL), side=2, norm=False),
  ],
  ids=["basic", "wide bottleneck", "vgg11_bn", "vgg11"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_what_is_written_is_read_again(tmp_path, state, suffix):
  model, variables = load_pretrained(written(state, tmp_path / "theirs.npz"))
  again = save_pretrained(variables, tmp_path / f"ours{suffix}", model)
  found, read = load_pretrained(again)
  assert found == model
  jax.tree.map(np.testing.assert_array_equal, read, variables)
  saved = contents(again)
  assert {n: v.shape for n, v in saved.items()} == {n: v.shape for n, v in state.items()}
  for name, value in state.items():
    # The bias of a convolution before BatchNorm went into the mean, a counter starts again.
    if saved[name].any() and not name.endswith("running_mean"):
      np.testing.assert_array_equal(saved[name], value)
  assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


@pytest.mark.parametrize(
  ("blocks", "deep", "name", "entries", "parameters"),
  [
    ((2, 2, 2, 2), False, "resnet18", 122, 11_689_512),
    ((3, 4, 6, 3), True, "resnet50", 320, 25_557_032),
  ],
)
def test_nets_of_full_size_have_torchvisions_entries(blocks, deep, name, entries, parameters):
  shapes = resnet_shapes(blocks, deep=deep, features=64, classes=1000)
  model = pretrained._model_of(shapes, Path("net.safetensors"))
  assert pretrained.describe_network(model) == pretrained.describe_named(name)
  found = {entry.name: entry.shape for entry in pretrained._entries_of(model, 3)}
  assert found == shapes
  # torch counts the steps of each BatchNorm, too.
  counters = sum(entry.endswith("running_mean") for entry in found)
  assert len(found) + counters == entries
  trained = [shape for entry, shape in found.items() if "running_" not in entry]
  assert sum(int(np.prod(shape)) for shape in trained) == parameters


def test_a_name_is_checked_whatever_the_width(tmp_path):
  small = written(resnet_state((2, 2, 2, 2), features=2), tmp_path / "resnet.npz")
  model, _ = load_pretrained(small, "resnet18")
  assert model.features == 2
  message = r"name must be that of the network in .*, a ResNet with 2, 2, 2, 2 blocks of the kind"
  with pytest.raises(ValueError, match=f"{message} BasicBlock; got 'resnet50', a ResNet with 3, 4"):
    load_pretrained(small, name="resnet50")
  chain = (2, POOL, 2, POOL, 2, 2, POOL, 2, 2, POOL, 2, 2, POOL)
  vgg11 = written(vgg_state(chain, side=1), tmp_path / "vgg.npz")
  load_pretrained(vgg11, name="vgg11_bn")
  for name in ("vgg11", "vgg16_bn", "resnet18"):
    with pytest.raises(ValueError, match=f"a VGG net of 1, 1, 2, 2, 2 .* got '{name}'"):
      load_pretrained(vgg11, name=name)
  with pytest.raises(ValueError, match="name must be one of .*; got 'resnet81'"):
    load_pretrained(small, name="resnet81")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s: s.pop("layer2.0.conv2.weight"), r"missing: layer2\.0\.conv2\.weight$"),
    (lambda s: s.pop("fc.bias"), r"missing: fc\.bias$"),
    (lambda s: s.pop("layer1.0.bn1.running_var"), r"missing: layer1\.0\.bn1\.running_var$"),
    (lambda s: s.pop("layer1.0.conv1.weight"), r"missing: layer1\.0\.conv1\.weight"),
    (lambda s: s.update({"layer2.0.se.fc": s["bn1.bias"]}), r"left over: layer2\.0\.se\.fc$"),
    (
      lambda s: s.update({"fc.weight": s["fc.weight"][:, 1:]}),
      r"of the wrong shape: fc\.weight \(3, 7\) in place of \(3, 8\)$",
    ),
    (
      lambda s: s.update({"conv1.weight": s["conv1.weight"][..., 1:-1, 1:-1]}),
      r"conv1\.weight \(4, 3, 5, 5\) in place of \(4, 3, 7, 7\)$",
    ),
    (
      lambda s: s.update({"bn1.bias": np.zeros(4, int)}),
      r"must be floating-point numbers; bn1\.bias holds int64",
    ),
  ],
)
def test_entries_that_do_not_fit_are_named(tmp_path, change, message):
  state = resnet_state((1, 1))
  change(state)
  with pytest.raises(ValueError, match=message):
    load_pretrained(written(state, tmp_path / "net.npz"))


def test_a_vgg_entry_that_does_not_fit_is_named(tmp_path):
  state = vgg_state((4, POOL, 5, POOL), side=2)
  del state["features.4.bias"]
  with pytest.raises(ValueError, match=r"missing: features\.4\.bias$"):
    load_pretrained(written(state, tmp_path / "net.npz"))


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checks, "_UNPACKED", 1000)
  np.savez_compressed(tmp_path / "net.npz", **{"conv1.weight": np.zeros((1000, 100))})
  with pytest.raises(ValueError, match="net.npz is damaged .* at most 100 times its size"):
    load_pretrained(tmp_path / "net.npz")
  with zipfile.ZipFile(tmp_path / "net.npz", "w") as archive, archive.open("x.npy", "w") as file:
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**14,)}
    np.lib.format.write_array_header_1_0(file, header)
  with pytest.raises(ValueError, match="net.npz is damaged .*: Unable to allocate"):
    load_pretrained(tmp_path / "net.npz")


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "pytorch_model.bin", "net.pth.tar"])
def test_pickles_are_refused_with_the_lines_that_convert_them(tmp_path, monkeypatch, name):
  with pytest.raises(ValueError, match="runs what is in it") as error:
    load_pretrained(tmp_path / name)
  lines = [line.strip() for line in str(error.value).splitlines()[1:]]
  assert len(lines) == 2
  # In place of torch, which the project does without.
  state, asked, saved = resnet_state((1,)), [], {}
  contiguous = {key: SimpleNamespace(contiguous=lambda v=v: v) for key, v in state.items()}
  torch, writer = ModuleType("torch"), ModuleType("safetensors.torch")
  writer.save_file = lambda tensors, file: saved.update({file: tensors})
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "safetensors.torch", writer)
  monkeypatch.setattr(safetensors, "torch", writer, raising=False)
  for stored in (contiguous, {"epoch": 3, "state_dict": contiguous}, {"model": contiguous}):
    torch.load = lambda file, stored=stored, **settings: asked.append((file, settings)) or stored
    exec("\n".join(lines), {})
    assert asked[-1][0] == str(tmp_path / name)
    assert asked[-1][1] == {"map_location": "cpu", "weights_only": True}
    ((file, written_state),) = saved.items()
    assert file == str((tmp_path / name).with_suffix(".safetensors"))
    assert written_state.keys() == state.keys()
    saved.clear()


def test_files_that_hold_no_network_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is none at"):
    load_pretrained(tmp_path / "net.npz")
  with pytest.raises(ValueError, match=r"path must end in \.safetensors or \.npz; got"):
    load_pretrained(tmp_path / "net.onnx")
  for suffix in ("safetensors", "npz"):
    damaged = tmp_path / f"damaged.{suffix}"
    damaged.write_bytes(b"not a network at all")
    with pytest.raises(ValueError, match="is damaged or no"):
      load_pretrained(damaged)
  np.savez(tmp_path / "pickle.npz", **{"conv1.weight": np.array([{}], object)})
  with pytest.raises(ValueError, match="is damaged or no npz file"):
    load_pretrained(tmp_path / "pickle.npz")
  other = written({"patch_embed.proj.weight": np.zeros(2, np.float32)}, tmp_path / "other.npz")
  with pytest.raises(
    ValueError, match=r"a ResNet .* or a VGG net .* are patch_embed\.proj\.weight"
  ):
    load_pretrained(other)


def test_files_of_other_arrays_are_refused(tmp_path):
  header = b'{"fc.bias": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}'
  eight_bits = tmp_path / "net.safetensors"
  eight_bits.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
  with pytest.raises(ValueError, match="must be of type F16, BF16, F32 or F64; it holds F8_E4M3"):
    load_pretrained(eight_bits)
  with open(tmp_path / "net.npz", "wb") as file:
    np.save(file, np.zeros(2))
  with pytest.raises(ValueError, match="is damaged or no npz file: it holds a single array"):
    load_pretrained(tmp_path / "net.npz")


def test_variables_of_a_layer_that_torchvision_does_not_have_are_named(tmp_path):
  variables = {
    "params": {"stem": {"norm": {"bias": np.zeros(2)}}, "adapter": {"bias": np.zeros(2)}}
  }
  with pytest.raises(ValueError, match="network of torchvision's, which has no adapter/bias"):
    save_pretrained(variables, tmp_path / "net.npz")


def test_prefixes_that_all_names_have_are_left_out(tmp_path):
  state = resnet_state((1,))
  longer = {f"_orig_mod.module.{name}": value for name, value in state.items()}
  _, variables = load_pretrained(written(longer, tmp_path / "longer.npz"))
  expected = state["conv1.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(variables["params"]["stem"]["conv"]["kernel"], expected)
  for prefix in ("model.", "backbone."):
    kept = {prefix + name: value for name, value in state.items()}
    assert _without_prefixes(kept).keys() == state.keys()
  longer["loss.weight"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match=r"are _orig_mod\.module\.bn1\.bias, .* and 13 more"):
    load_pretrained(written(longer, tmp_path / "partly.npz"))


@pytest.mark.thin(2)
@pytest.mark.parametrize("net", ["resnet", "vgg", "timm"])
def test_a_file_without_a_classifier_says_how_to_go_on(tmp_path, net):
  if net == "resnet":
    state, gone = resnet_state((1, 1)), ("fc.",)
  else:
    state, gone = vgg_state((4, POOL, 5, POOL), side=2), ("classifier.",)
  whole = written(state, tmp_path / "whole.npz")
  if net == "timm":
    # There `num_classes=0` keeps the hidden layers.
    state, gone = renamed_by_timm(state, 2), ("head.",)
  kept = {name: value for name, value in state.items() if not name.startswith(gone)}
  file = written(kept, tmp_path / "backbone.npz")
  with pytest.raises(ValueError, match=r"have a classifier, .*, classifier=False\) returns the"):
    load_pretrained(file)
  model, variables = load_pretrained(file, classifier=False)
  assert model.classes is None
  found, same = load_pretrained(whole, classifier=False)
  assert found == model
  jax.tree.map(np.testing.assert_array_equal, same, variables)
  width = {"resnet": 8, "vgg": 5, "timm": 5}[net]
  features, _ = jax.eval_shape(model.apply, variables, images_of(16))
  assert features.shape == (2, width)


def test_half_precision_becomes_float32(tmp_path):
  state = resnet_state((1, 1))
  half = {name: v.astype(np.float16) if v.ndim else v for name, v in state.items()}
  _, variables = load_pretrained(written(half, tmp_path / "net.safetensors"))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}


def test_bfloat16_becomes_float32(tmp_path):
  state = resnet_state((1, 1))
  half = {}
  for name, value in state.items():
    half[name] = value.astype(jnp.bfloat16) if value.ndim else value
  header, data = {}, b""
  for name, value in half.items():
    kind = {"bfloat16": "BF16", "int64": "I64"}[str(value.dtype)]
    places = [len(data), len(data) + value.nbytes]
    header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": places}
    data += value.tobytes()
  text = json.dumps(header).encode()
  file = tmp_path / "net.safetensors"
  file.write_bytes(len(text).to_bytes(8, "little") + text + data)
  _, variables = load_pretrained(file)
  kernel = variables["params"]["classifier"]["kernel"]
  assert kernel.dtype == np.float32
  np.testing.assert_array_equal(kernel, np.float32(half["fc.weight"]).T)


@pytest.mark.parametrize(
  ("change", "part"),
  [
    (lambda s: {"conv1.0.weight": s.pop("conv1.weight")}, "a stem of three convolutions"),
    (
      lambda s: {"layer2.0.downsample.2.weight": s.pop("layer2.0.downsample.1.weight")},
      "a pool in its shortcuts",
    ),
    (lambda s: {"layer1.0.se.fc1.weight": s["fc.weight"]}, r"squeeze-and-excitation \(a SENet\)"),
    (lambda s: {"layer1.0.bns.0.weight": s["bn1.weight"]}, "windows of several scales"),
    (lambda s: {"layer1.0.conv2.fc1.weight": s["fc.weight"]}, "attention over windows"),
    (
      lambda s: {k: v[:, ::2] for k, v in s.items() if k.endswith(".conv2.weight")},
      r"grouped convolutions \(a ResNeXt\)",
    ),
  ],
)
def test_relatives_of_residual_nets_are_named(tmp_path, change, part):
  state = resnet_state((1, 1), deep=True)
  state |= change(state)
  with pytest.raises(ValueError, match=f"are of a ResNet with {part}.*which is not read"):
    load_pretrained(written(state, tmp_path / "net.npz"))


def variables_of(model, size=32):
  made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), made)


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (
      ResNet(3, (1, 1), features=4, stem="imagenet", shortcut="B", gating="channel"),
      "without gates; got stage1_block1/gate",
    ),
    (ResNet(3, (1, 1), features=4, stem="imagenet"), r"missing: layer2\.0\.downsample\.0\.weight"),
    (ResNet(3, (1,), features=4, shortcut="B"), r"conv1\.weight \(4, 3, 3, 3\) in place of"),
    (ResNet(None, (1,), features=4, stem="imagenet"), r"missing: fc\.bias, fc\.weight"),
    (vgg("simple_cnn", 3, width=0.02), "of 8, 10, 13, 16 convolutions; got 3"),
    (vgg("vgg16", 3, width=0.01), "must have 2 hidden dense layers, .*; got 0"),
    (
      VGG(3, (2, POOL), gating="channel", gate=GateSettings(hidden=2)),
      "without gates; got layer1/gate/head",
    ),
  ],
)
def test_networks_that_torchvision_does_not_have_are_not_written(tmp_path, model, message):
  with pytest.raises(ValueError, match=message):
    save_pretrained(variables_of(model), tmp_path / "net.npz")
  assert list(tmp_path.iterdir()) == []


def test_a_model_that_computes_something_else_is_not_written(tmp_path):
  chain = (2, POOL, 2, POOL, 2, 2, POOL, 2, 2, POOL, 2, 2, POOL)
  model = VGG(3, chain, hidden=(2, 2), pooled=2)
  variables = variables_of(model)
  # The same variables, with the first pool later.
  other = model.clone(chain=(2, 2, POOL, POOL, *chain[4:]))
  with pytest.raises(ValueError, match=r"pools at torchvision's places .* \(1, 3, .* got \(2, 3,"):
    save_pretrained(variables, tmp_path / "other.npz", other)
  net = ResNet(3, (1,), features=4, stem="imagenet", shortcut="B", output_stride=4)
  with pytest.raises(ValueError, match="must have output_stride=None, .*; got 4"):
    save_pretrained(variables_of(net), tmp_path / "other.npz", net)
  with pytest.raises(ValueError, match="model must be the VGG of the variables; got ResNet"):
    save_pretrained(variables, tmp_path / "other.npz", net)
  assert list(tmp_path.iterdir()) == []


def test_files_of_other_endings_are_not_written(tmp_path):
  with pytest.raises(ValueError, match=r"file must end in \.safetensors or \.npz; got"):
    save_pretrained({}, tmp_path / "net.pth")
  with pytest.raises(TypeError, match="variables must be a mapping"):
    save_pretrained(3, tmp_path / "net.npz")


@pytest.mark.real_data
@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs torchvision's networks of shared/data")
@pytest.mark.parametrize(
  ("name", "blocks"), [("basic", (2, 2, 2, 2)), ("bottleneck", (1, 2, 1, 1))]
)
def test_networks_that_torch_ran_have_its_logits(tmp_path, name, blocks):
  model, variables = load_pretrained(FIXTURES / f"{name}.safetensors")
  assert (model.blocks, model.features, model.classes) == (blocks, 16, 10)
  data = contents(FIXTURES / f"{name}.npz")
  assert_near(jax.jit(model.apply)(variables, data["images"])[0], data["logits"])
  again = save_pretrained(variables, tmp_path / "again.safetensors")
  theirs, ours = contents(FIXTURES / f"{name}.safetensors"), contents(again)
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    if not key.endswith("num_batches_tracked"):
      np.testing.assert_array_equal(ours[key], value)


def test_the_colours_of_torchvision_are_those_of_the_config_for_photographs():
  data = imagenet_config().data
  assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
