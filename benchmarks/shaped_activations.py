"""CIFAR-10 without BatchNorm: a small CNN whose pre-activations are pulled to Normal(0, 1).

    python benchmarks/shaped_activations.py [--train_images=20000] [--epochs=10] [--seeds=3]
        [--lr=0.05,0.1]

Three variants of one net, alike in initial kernels, data order and augmentation:
  batchnorm   BatchNorm before each ReLU
  shaped      no BatchNorm; `cdf_matching_loss` on a sample of each channel's values before the
              ReLU, mean over channels, sum over layers
  nothing     neither

Each variant takes the best of several learning rates, and for `shaped` of several coefficients: the
pair with the best accuracy on the last tenth of the training images after training on the rest. The
gap to the prior is measured on test images, on the inputs of the ReLUs; it is 1 for independent
samples of Normal(0, 1).
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from configs import cifar10_resnet20
from gating_jax import cdf_matching_loss, noise_floor, normal
from gating_jax.data import augment, image_sets
from gating_jax.training import optim, steps

VARIANTS = ("batchnorm", "shaped", "nothing")
CHANNELS = (32, 48, 64, 64)
STRIDES = (2, 2, 2, 1)
PRIOR = normal(0.0, 1.0)
DATA = cifar10_resnet20.get_config().data
# Divides CIFAR-10's test set.
TEST_BATCH = 250


class ConvNet(nn.Module):
  """A net that returns class logits of images `[N, H, W, 3]`, and the inputs of each ReLU."""

  norm: bool

  @nn.compact
  def __call__(self, x, train=False):
    inputs = []
    for i, (channels, stride) in enumerate(zip(CHANNELS, STRIDES, strict=True)):
      x = nn.Conv(
        channels, (3, 3), stride, kernel_init=nn.initializers.he_normal(), name=f"conv{i}"
      )(x)
      if self.norm:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x)
      inputs.append(x)
      x = nn.relu(x)
    return nn.Dense(10, name="classes")(x.mean(axis=(1, 2))), inputs


def main():
  """Prints a line for each variant."""
  args = parse()
  train = image_sets.load(
    image_sets.SetSource("cifar10", f"train[:{args.train_images}]", args.data_dir)
  )
  test = image_sets.load(image_sets.SetSource("cifar10", "test", args.data_dir))
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {len(train)} images, {args.epochs} "
    "epochs, "
    f"batch {args.batch}, {args.batch * args.positions} values of a channel per step"
  )
  trainers = {variant: Trainer(variant, train, args) for variant in VARIANTS}
  chosen = {variant: choose(trainer, args) for variant, trainer in trainers.items()}
  results = {variant: [] for variant in VARIANTS}
  # In turns, so that drifts of the machine affect all variants alike.
  for seed, variant in itertools.product(range(args.seeds), VARIANTS):
    results[variant].append(trainers[variant].score(*chosen[variant], seed, len(train), test))
  print(
    f"{'variant':<12}{'lr':>6}{'coefficient':>13}{'test accuracy':>18}{'gap of each layer':>34}"
    f"{'ms/step':>10}"
  )
  for variant in VARIANTS:
    accuracy, gap, seconds = (np.array(column) for column in zip(*results[variant], strict=True))
    spread = accuracy.std(ddof=1) if args.seeds > 1 else np.nan
    print(
      f"{variant:<12}{chosen[variant][0]:>6g}{chosen[variant][1]:>13g}{accuracy.mean():>10.2%} "
      f"± {spread:.2%}"
      f"{' '.join(f'{g:.1f}' for g in gap.mean(axis=0)):>34}{1e3 * np.median(seconds):>10.1f}"
    )


def parse():
  """Returns the arguments."""

  def numbers(text):
    """Reads numbers with commas between."""
    return [float(number) for number in text.split(",")]

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--epochs", type=int, default=10)
  parser.add_argument("--train_images", type=int, default=20_000)
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--lr", type=numbers, default=[0.05], help="one, or several to choose from")
  parser.add_argument(
    "--coefficient", type=numbers, default=[1.0], help="of `shaped`: one, or several to choose from"
  )
  parser.add_argument(
    "--positions", type=int, default=2, help="of each image, whose values the loss sees"
  )
  parser.add_argument("--data_dir", help="the TFDS folder (default: ~/tensorflow_datasets)")
  return parser.parse_args()


def choose(trainer, args):
  """Returns the learning rate and coefficient that are best on held-out training images.

  They are tried with as many steps as in the final training.
  """
  coefficients = args.coefficient if trainer.variant == "shaped" else [0.0]
  pairs = list(itertools.product(args.lr, coefficients))
  if len(pairs) == 1:
    return pairs[0]
  images = trainer.images
  fit = len(images) - max(1, len(images) // (10 * TEST_BATCH)) * TEST_BATCH
  held_out = image_sets.Images(images.pixels[fit:], images.labels[fit:], images.class_names)
  scores = {pair: trainer.score(*pair, 0, fit, held_out)[0] for pair in pairs}
  print(
    f"{trainer.variant}, validation: "
    + ", ".join(f"lr {lr:g} coefficient {c:g} {score:.2%}" for (lr, c), score in scores.items())
  )
  return max(scores, key=scores.get)


class Trainer:
  """Trains one variant; compiled once for all settings and seeds."""

  def __init__(self, variant, images, args):
    self.variant, self.images, self.args = variant, images, args
    self.model = ConvNet(norm=variant == "batchnorm")
    self.total = args.epochs * (len(images) // args.batch)
    self.resident = jax.device_put((images.pixels, images.labels))
    self.train_step = jax.jit(self._train_step)
    self.test_step = jax.jit(self._test_step)

  def score(self, lr, coefficient, seed, examples, held_out):
    """Trains on the first `examples` images.

    Returns accuracy and gap on `held_out`, and the median seconds of a step.
    """
    state = steps.init_state(self.model, self._optimiser(lr), seed, self.images.shape)
    seconds = []
    for step in tqdm(
      range(self.total), desc=f"{self.variant} lr {lr:g} seed {seed}", disable=None, leave=False
    ):
      index = image_sets.batch_indices(seed, step, self.args.batch, examples)
      start = time.perf_counter()
      state = jax.block_until_ready(self.train_step(state, index, lr, coefficient, seed))
      seconds.append(time.perf_counter() - start)
    parts = np.split(np.arange(len(held_out)), len(held_out) // TEST_BATCH)
    results = [self.test_step(state, *held_out.read(index)) for index in parts]
    accuracy, gap = (np.mean(column, axis=0) for column in zip(*results, strict=True))
    return accuracy, gap, np.median(seconds)

  def _optimiser(self, lr):
    shape = optim.learning_rate("cosine", 1.0, self.total)

    def schedule(step):
      """Returns the learning rate of a step."""
      return lr * shape(step)

    return optim.sgd(schedule, momentum=0.9, weight_decay=5e-4)

  def _train_step(self, state, index, lr, coefficient, seed):
    pixels, labels = (array[index] for array in self.resident)
    crop_key, sample_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    x = augment.normalise(
      augment.crop_and_flip(crop_key, pixels, pad=DATA.crop_padding, flip=DATA.flip),
      DATA.mean,
      DATA.std,
    )

    def loss(params):
      """Computes the loss of a batch, and the new running statistics."""
      variables = {"params": params, "batch_stats": state.batch_stats}
      (logits, inputs), updates = self.model.apply(
        variables, x, train=True, mutable=["batch_stats"]
      )
      total = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      if self.variant == "shaped":
        values = draw(sample_key, inputs, self.args.positions)
        total += coefficient * sum(layer_gaps(values))
      return total, updates.get("batch_stats", {})

    grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = self._optimiser(lr).update(grads, state.opt_state, state.params)
    return steps.TrainState(
      state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state
    )

  def _test_step(self, state, pixels, labels):
    x = augment.normalise(pixels, DATA.mean, DATA.std)
    logits, inputs = self.model.apply({"params": state.params, "batch_stats": state.batch_stats}, x)
    gaps = jnp.stack(layer_gaps(draw(jax.random.key(0), inputs, 1))) / noise_floor(len(x))
    return jnp.mean(logits.argmax(axis=-1) == labels), gaps


def draw(key, layers, count):
  """Returns `[N * count, C]` values at `count` evenly spaced positions of each image.

  The first position is random.
  """

  def positions(key, x):
    """Returns one layer's values at the positions."""
    pixels = x.shape[1] * x.shape[2]
    start = jax.random.randint(key, (len(x), 1, 1), 0, pixels)
    index = (start + jnp.arange(count)[:, None] * (pixels // count)) % pixels
    return jnp.take_along_axis(x.reshape(len(x), pixels, -1), index, axis=1).reshape(
      len(x) * count, -1
    )

  return [
    positions(key, x) for key, x in zip(jax.random.split(key, len(layers)), layers, strict=True)
  ]


def layer_gaps(layers):
  """Returns the loss of each layer's values `[N, C]`, mean over channels, with a single sort."""
  losses = cdf_matching_loss(jnp.concatenate(layers, axis=1), PRIOR)
  return [part.mean() for part in jnp.split(losses, np.cumsum(CHANNELS)[:-1])]


if __name__ == "__main__":
  main()
