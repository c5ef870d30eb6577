"""Rows of the headline file: what each one is, the command that measures it, and its numbers.

`headline.py` runs the commands. In a command, `{seed}` stands for each seed in turn, `{runs}` for
the folder of the runs, `{data}` for a TFDS folder and `{authors}` for the authors' code; ` && `
separates commands. Parts that two rows share are run once.
"""

from typing import NamedTuple


class Figure(NamedTuple):
  """A number that a command leaves.

  Attributes:
    path: keys of the result, of which a dict finds the item of a list that has its values; or, for
      a row without a result file, a pattern of the output, whose group is the number. A list is
      one value for each seed.
    scale: factor, such as 100 for percent.
    over: path of the number by which it is divided, if any.
  """

  path: tuple | str
  scale: float = 1.0
  over: tuple | None = None


class Row(NamedTuple):
  """A row of the file.

  Attributes:
    what: in words.
    command: with its places.
    figures: by name.
    result: JSON file that the command leaves; empty where numbers are read from its output.
    seeds: of the runs. A command without `{seed}` takes all of them at once.
    device: `cpu` or `gpu`.
  """

  what: str
  command: str
  figures: dict[str, Figure]
  result: str = ""
  seeds: tuple[int, ...] = (0,)
  device: str = "cpu"


ACCURACY = Figure(("accuracy",), 100)
MEAN_IOU = Figure(("mean_iou",), 100)
MACS = Figure(("mac_ratio",), 100)
MILLIONS = Figure(("macs",), 1e-6)
CONDITIONAL = {"conditional": Figure(("conditional",)), "gates": Figure(("gates",))}
GATED = {"accuracy": ACCURACY, "macs": MACS, **CONDITIONAL}
FOLDER = "--config.data.data_dir={data}"


def train(name, config, *fields):
  """Returns the command that trains a config for one seed, into a folder of this name."""
  words = [
    "gating-jax",
    f"--config=configs/{config}",
    "--config.seed={seed}",
    *(f"--config.{field}" for field in fields),
  ]
  return " ".join([*words, f"--workdir={{runs}}/{name}-{{seed}}", "--mode=train"])


def of_run(name):
  """Returns the result file of a run."""
  return f"{{runs}}/{name}-{{seed}}/result.json"


# Images

CIFAR = "cifar10_resnet20.py:epochs=10,batch=64,schedule=cosine"
CIFAR_FIELDS = ("optim.learning_rate=0.05", "checkpoint_every=0.25", "data.data_dir={data}")


def cifar(name, what, variant, figures):
  """Returns a row of ResNet20 on CIFAR-10, 10 epochs."""
  command = train(name, f"{CIFAR},{variant}", *CIFAR_FIELDS)
  return Row(f"CIFAR-10, ResNet20, 10 epochs, {what}", command, figures, of_run(name))


LATE_START = train(
  "late_start",
  "cifar10_resnet20.py:gates=none,epochs=6,batch=128,schedule=cosine",
  "data.data_dir={data}",
)
LATE = f"{LATE_START} && " + train(
  "late",
  "cifar10_resnet20.py:epochs=5,batch=128,schedule=cosine,budget=0.5,noise=0.25",
  "optim.learning_rate=0.05",
  "model.init_from={runs}/late_start-{seed}",
  "model.gate.initial_open=0.95",
  "data.data_dir={data}",
)

FADING = (
  "optim.gate_lr_multiplier=5",
  "model.noise.ramp_start=0.5",
  "model.noise.ramp_end=0.9",
)


def scenes(name, what, variant, *fields, figures):
  """Returns a row of scenes of digits."""
  command = train(name, f"segmentation_digits.py:{variant}", *fields)
  return Row(f"scenes of digits, {what}", command, figures, of_run(name))


def imagenet(name, what, variant, figures):
  """Returns a row of 50 classes of ImageNet."""
  config = f"imagenet50.py:width=0.25,{variant},epochs=6,schedule=cosine"
  command = train(name, config, "model.dtype=float32", "data.data_dir={data}")
  return Row(f"50 classes of ImageNet, 64 x 64, {what}", command, figures, of_run(name))


def worlds(row, what):
  """Returns a row of made worlds, 3,000 steps."""
  name = f"worlds_{row}"
  figures = {"accuracy": ACCURACY, "thousands": Figure(("macs",), 1e-3)}
  command = train(name, f"worlds.py:row={row}")
  return Row(f"worlds, {what}", command, figures, of_run(name), (0, 1, 2))


def table(name, what, table_name, item, options, figures, seeds, device="gpu"):
  """Returns a row of a table of `images.py`; rows with the same options share the runs.

  Args:
    name: folder of the table.
    what: in words.
    table_name: of the benchmark.
    item: name of the table's row.
    options: of the benchmark.
    figures: by name, with paths within the table's row.
    seeds: of the runs.
    device: `cpu` or `gpu`.
  """
  command = (
    f"python benchmarks/images.py {table_name} --model=resnet8 --out={{runs}}/{name} "
    f"--data={{data}} --seeds={','.join(map(str, seeds))} {options}"
  )
  found = {}
  for key, figure in figures.items():
    over = figure.over and ({"name": item}, *figure.over)
    found[key] = Figure(({"name": item}, *figure.path), figure.scale, over)
  file = f"{{runs}}/{name}/{table_name}-resnet8.json"
  return Row(what, command, found, file, seeds, device)


EACH = Figure(("accuracies",), 100)
TRAINING = Figure(("training",), 100)
HUNDRED = (
  "--epochs=100 --only='^ungated, width 0|inner 4' --jobs=8 --devices.steps_per_dispatch=195"
)
# The gains of plain blocks are over ungated nets of equal MACs, so those are of the same table.
SHORTER = "--epochs=36 --only='ungated|gated' --jobs=9 --devices.steps_per_dispatch=195"


# Points that are missing to an ungated net of equal MACs.
BEHIND = Figure(("gain",), -100)


def hundred(what, item):
  """Returns a row of ResNet8 on CIFAR-10, 100 epochs, two seeds."""
  figures = {"accuracy": EACH, "training": TRAINING, "macs": MILLIONS}
  if item.startswith("gated"):
    figures["behind"] = BEHIND
  what = f"CIFAR-10, ResNet8, 100 epochs, {what}"
  return table("hundred", what, "budgets", item, HUNDRED, figures, (0, 1))


def shorter(what, item):
  """Returns a row of ResNet8 on CIFAR-10, 36 epochs, gates inside plain blocks."""
  figures = {"accuracy": EACH, "macs": MILLIONS, "behind": BEHIND}
  what = f"CIFAR-10, ResNet8, 36 epochs, plain blocks, {what}"
  return table("shorter", what, "budgets", item, SHORTER, figures, (0, 1))


def ablation(item):
  """Returns a row of what keeps gates conditional: shares of the gates, means over seeds."""
  figures = {"accuracy": EACH}
  for outcome in ("always_open", "always_closed", "random_dropout", "conditional"):
    figures[outcome] = Figure((outcome,), 100, ("gates",))
  what = f"CIFAR-10, ResNet8, 10 epochs, regulariser: {item}"
  options = "--epochs=10 --jobs=4 --devices.steps_per_dispatch=195"
  return table("ablation", what, "ablation", item, options, figures, (0, 1, 2))


IMAGES = {
  "digits": Row(
    "digits, gated ResNet20, the quickstart",
    "env XLA_FLAGS=--xla_force_host_platform_device_count=2 "
    + train("digits", "digits_resnet20.py"),
    GATED,
    of_run("digits"),
    (0, 1, 2),
  ),
  "cifar_ungated": cifar("cifar_ungated", "ungated", "gating=none", {"accuracy": ACCURACY}),
  "cifar_half": cifar("cifar_half", "batch-shaping and L0 0.5", "l0=0.5", GATED),
  "cifar_strong": cifar("cifar_strong", "batch-shaping and L0 2", "l0=2.0", GATED),
  "cifar_plain": cifar("cifar_plain", "cross-entropy alone", "bas=0,l0=0", GATED),
  "late_start": Row(
    "CIFAR-10, ResNet20, six epochs, ungated",
    LATE_START,
    {"accuracy": ACCURACY},
    of_run("late_start"),
  ),
  "late": Row(
    "CIFAR-10, ResNet20, the same with gates for five more epochs", LATE, GATED, of_run("late")
  ),
  "scenes_ungated": scenes(
    "scenes_ungated",
    "ungated",
    "gates=none",
    figures={"mean_iou": MEAN_IOU, "millions": MILLIONS},
  ),
  "scenes_half": scenes(
    "scenes_half",
    "to half, noise that fades",
    "budget=0.5,noise=0.25,noise_to=0",
    *FADING,
    figures={"mean_iou": MEAN_IOU, "macs": MACS, "millions": MILLIONS, **CONDITIONAL},
  ),
  "scenes_narrow": scenes(
    "scenes_narrow",
    "ungated and as cheap, width 0.33",
    "gates=none,width=0.33",
    figures={"mean_iou": MEAN_IOU, "millions": MILLIONS},
  ),
  "imagenet_ungated": imagenet("imagenet_ungated", "ungated", "gates=none", {"accuracy": ACCURACY}),
  "imagenet_half": imagenet(
    "imagenet_half", "to half, noise of a quarter", "budget=0.5,noise=0.25", GATED
  ),
  "worlds_recipe": worlds("recipe", "gated by the recipe"),
  "worlds_ungated": worlds("ungated", "ungated"),
  "worlds_scale": worlds("scale", "scaled by squeeze-and-excitation"),
  "narrow_25": hundred("ungated, width 0.25", "ungated, width 0.25"),
  "narrow_35": hundred("ungated, width 0.35", "ungated, width 0.35"),
  "narrow_50": hundred("ungated, width 0.5", "ungated, width 0.5"),
  "wide_25": hundred("four times as wide inside, gated", "gated, width 0.25, inner 4, to 28 %"),
  "wide_35": hundred("four times as wide inside, gated", "gated, width 0.35, inner 4, to 27 %"),
  "wide_50": hundred("four times as wide inside, gated", "gated, width 0.5, inner 4, to 26.5 %"),
  "plain_half": shorter("gated to 50 %", "gated, width 1, to 50 %"),
  "plain_eighth": shorter("gated to 12.5 %", "gated, width 1, to 12.5 %"),
  "ablation_none": ablation("none"),
  "ablation_entropy": ablation("entropy of each decision"),
  "ablation_away": ablation("away from 1/2, begun there"),
  "ablation_l0": ablation("L0 alone, ten times"),
  "ablation_shaping": ablation("batch-shaping and L0"),
}

# Task sequences

KNOWN = Figure(("task_aware", "average_accuracy"), 100)
UNKNOWN = Figure(("task_agnostic", "average_accuracy"), 100)
TASKS = {
  "known": KNOWN,
  "unknown": UNKNOWN,
  "macs": Figure(("task_aware_macs",), 100, ("dense_macs",)),
  "macs_unknown": Figure(("task_agnostic_macs",), 100, ("dense_macs",)),
}


def tasks(name, what, config, method, seeds, fields=""):
  """Returns a row of `continual.py`.

  Args:
    name: folder of the runs.
    what: in words.
    config: with its variant.
    method: of continual learning.
    seeds: of the runs.
    fields: behind `--set`.
  """
  words = [
    f"python benchmarks/continual.py --runs={{runs}}/{name} --config={config}",
    f"--methods={method} --seeds={{seed}}",
  ]
  if fields:
    words.append(f"--set {fields}")
  file = f"{{runs}}/{name}/{config.replace(':', '-')}/{method}-{{seed}}/result.json"
  return Row(what, " ".join(words), TASKS, file, seeds)


MNIST, CIFAR_TASKS = "split_mnist_short", "split_cifar10_narrow"
# The TFDS folder of the sets that are not in the package.
TASK_DATA = "'data.data_dir=\"{data}\"'"
NETWORK = f"router.network=true {TASK_DATA}"
LONGER = f"optim.epochs=8 {TASK_DATA}"

TASK_SEQUENCES = {
  # Training amplifies rounding, which differs between numbers of threads: five seeds, both ways.
  "split_digits": Row(
    "split digits, task gates, two cores",
    f"taskset -c 0,1 {train('split_digits', 'split_digits.py')}",
    TASKS,
    of_run("split_digits"),
    (0, 1, 2, 3, 4),
  ),
  "split_digits_one_core": Row(
    "split digits, task gates, one core",
    f"taskset -c 0 {train('split_digits_one_core', 'split_digits.py')}",
    TASKS,
    of_run("split_digits_one_core"),
    (0, 1, 2, 3, 4),
  ),
  "split_digits_replay": tasks(
    "split_digits_replay", "split digits, experience replay", "split_digits", "er", (0,)
  ),
  "mnist_images": tasks(
    "mnist_images",
    "Split MNIST, one epoch a task, task gates, 2,000 images",
    MNIST,
    "gates",
    (0, 1, 2),
    TASK_DATA,
  ),
  "mnist_generators": tasks(
    "mnist_generators",
    "Split MNIST, one epoch a task, task gates, generators",
    f"{MNIST}:rehearsal=generative",
    "gates",
    (0, 1, 2),
    TASK_DATA,
  ),
  "cifar2_gates": tasks(
    "cifar2_gates",
    "Split CIFAR-10, two epochs a task, task gates",
    CIFAR_TASKS,
    "gates",
    (0, 1),
    TASK_DATA,
  ),
  "cifar2_network": tasks(
    "cifar2_network",
    "Split CIFAR-10, two epochs a task, task gates and network",
    CIFAR_TASKS,
    "gates",
    (0, 1),
    NETWORK,
  ),
  "cifar2_replay": tasks(
    "cifar2_replay",
    "Split CIFAR-10, two epochs a task, experience replay",
    CIFAR_TASKS,
    "er",
    (0, 1),
    TASK_DATA,
  ),
  "cifar2_lwf": tasks(
    "cifar2_lwf",
    "Split CIFAR-10, two epochs a task, LwF",
    CIFAR_TASKS,
    "lwf",
    (0, 1),
    TASK_DATA,
  ),
  "cifar8_network": tasks(
    "cifar8_network",
    "Split CIFAR-10, eight epochs a task, task gates and network",
    CIFAR_TASKS,
    "gates",
    (0, 1),
    f"gates.sparsity=0.5 optim.warmup=0.05 router.network=true {LONGER}",
  ),
  "cifar8_replay": tasks(
    "cifar8_replay",
    "Split CIFAR-10, eight epochs a task, experience replay",
    CIFAR_TASKS,
    "er",
    (0, 1),
    LONGER,
  ),
}

# Long videos


def videos(row, what):
  """Returns a row of `long_video.py`, whose rows share the trained nets of a seed."""
  command = (
    "python benchmarks/long_video.py --runs={runs}/long_video --heavy=resnet3d10 --seed={seed} "
    f"--rows={','.join(dict.fromkeys(('all', row)))}"
  )
  figures = {"accuracy": ACCURACY, "macs": MACS, "segments": Figure(("share",), 100)}
  file = f"{{runs}}/long_video/resnet3d10-{{seed}}/{row}/result.json"
  return Row(f"embedded task, resnet3d10, {what}", command, figures, file, (0, 1, 2))


VIDEOS = {
  "videos_all": videos("all", "heavy net on all segments"),
  "videos_half": videos("gate50", "gate with attention, to 50 %"),
  "videos_quarter": videos("gate25", "gate with attention, to 25 %"),
  "videos_alone": videos("alone25", "gate without context, to 25 %"),
  "videos_uniform": videos("uniform25", "4 segments, evenly spaced"),
  "segments": Row(
    "one video of 16 segments, r2plus1d18 of width 0.5: times as fast",
    "python benchmarks/segments.py --repeats=5",
    {
      "half": Figure(r"^r2plus1d18\S*\s+1\s+8 of 16\s+\S+\s+\S+ ms\s+\S+ ms\s+([\d.]+)"),
      "quarter": Figure(r"^r2plus1d18\S*\s+1\s+4 of 16\s+\S+\s+\S+ ms\s+\S+ ms\s+([\d.]+)"),
    },
  ),
}

# Time


def milliseconds(size, net, program):
  """Returns a time that `trained.py` prints, which follows accuracy and MACs."""
  return Figure(rf"^\| {size} \| {net} \| {program}[^|]*\|(?:[^|]*\|){{2}} ([\d.]+) \|")


def block_ratio(macs):
  """Returns a ratio of `conditional.py`, five cells behind the MACs, which begin so."""
  return Figure(rf"^\| block N=1 C=64 32x32 \| {macs}\.\d% \|(?:[^|]*\|){{5}} ([\d.]+) \|")


def kernel_ratio(shape, share):
  """Returns how many times as fast as the dense form the GPU kernel is."""
  item = {"shape": shape, "dtype": "bfloat16", "open": share, "form": "kernel"}
  return Figure((item, "times_as_fast"))


def loss_time(form):
  """Returns milliseconds of a form of the loss."""
  return Figure(({"shape": "256x2048", "form": form}, "seconds"), 1000)


def export(name, what, folder):
  """Returns a row of an export of ResNet20 on CIFAR-10."""
  config = "cifar10_resnet20.py:epochs=5,batch=128,schedule=cosine,budget=0.5"
  fields = ("checkpoint_every=0.25", "model.gate.noise_scale=0.25", "data.data_dir={data}")
  trained = train("export", config, *fields)
  files = ("files", "model.safetensors", "bytes")
  return Row(
    f"CIFAR-10, ResNet20 at half of the MACs, {what}",
    f"{trained} && gating-jax --workdir={{runs}}/export-{{seed}} --mode=export",
    {"accuracy": ACCURACY, "kilobytes": Figure(files, 1e-3)},
    f"{{runs}}/export-{{seed}}/{folder}/card.json",
  )


TIMES = {
  "trained": Row(
    "ResNet20 of CIFAR-10 as in row late, milliseconds of 1 and 64 images, two cores",
    f"{LATE} && python benchmarks/trained.py --gated={{runs}}/late-{{seed}} "
    "--ungated={runs}/late_start-{seed} --data_dir={data}",
    {
      "one_xla": milliseconds(1, "ungated", "XLA"),
      "one": milliseconds(1, "gated", "auto"),
      "one_onnxruntime": milliseconds(1, "ungated", "onnxruntime"),
      "many_xla": milliseconds(64, "ungated", "XLA"),
      "many": milliseconds(64, "gated", "auto"),
      "many_onnxruntime": milliseconds(64, "ungated", "onnxruntime"),
    },
  ),
  "block": Row(
    "plain JAX, one image, 64 channels of 32 x 32: times as fast",
    "python benchmarks/conditional.py --repeats=50 --case='block N=1 C=64 32x32'",
    {"half": block_ratio(r"5\d"), "quarter": block_ratio(r"2\d")},
  ),
  "native": Row(
    "native kernel, 8 images of 64 x 16 x 16: times as fast",
    "python benchmarks/native.py --repeats=200",
    # Behind the case: three times, and for each share a time and a ratio.
    {
      "half": Figure(r"^\s*8x64x16(?:\s+\S+){6}\s+([\d.]+)x"),
      "quarter": Figure(r"^\s*8x64x16(?:\s+\S+){8}\s+([\d.]+)x"),
    },
  ),
  "gpu_kernel": Row(
    "GPU kernel, bfloat16: times as fast as dense or masked",
    "python benchmarks/kernels.py --dtypes=bfloat16 --json={runs}/kernels.json",
    {
      "half": kernel_ratio("64x32x32x128/64", 0.5),
      "quarter": kernel_ratio("64x32x32x128/64", 0.25),
      "small_quarter": kernel_ratio("64x8x8x512/128", 0.25),
    },
    "{runs}/kernels.json",
    device="gpu",
  ),
  "step": Row(
    "a gated training step of ResNet20, batch 128, against an ungated one",
    "env XLA_FLAGS=--xla_force_host_platform_device_count=2 "
    "python benchmarks/training_step.py --repeats=15 --json={runs}/step.json",
    {"ratio": Figure(({"form": "gated step"}, "times_ungated"))},
    "{runs}/step.json",
  ),
  "loss": Row(
    "batch-shaping loss, value and gradient, 256 x 2,048, milliseconds",
    "python benchmarks/ecdf_loss.py --authors={authors} --repeats=9 --json={runs}/loss.json",
    {
      "ours": loss_time("ours"),
      "autodiff": loss_time("plain autodiff"),
      "authors": loss_time("authors"),
    },
    "{runs}/loss.json",
  ),
  "loss_gpu": Row(
    "batch-shaping loss, value and gradient, 256 x 2,048, milliseconds, on a GPU",
    "python benchmarks/ecdf_loss.py --shapes=256x336,256x2048 --json={runs}/loss_gpu.json",
    {"ours": loss_time("ours"), "autodiff": loss_time("plain autodiff")},
    "{runs}/loss_gpu.json",
    device="gpu",
  ),
  "pruned": export("pruned", "pruned", "export"),
  "int8": export("int8", "pruned, int8 weights", "export_int8"),
}

ROWS = {**IMAGES, **TASK_SEQUENCES, **VIDEOS, **TIMES}
