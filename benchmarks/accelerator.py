"""All measurements of a machine with one GPU or TPU, within a time limit.

They are speed, losses, the kernel and CIFAR-10 recipes.

    bash benchmarks/accelerator.sh [--data=FOLDER] [--out=runs/accelerator] [--minutes=24] [--smoke]

FOLDER holds CIFAR-10 as TFDS prepares it (array_record); without it the recipes are skipped. Every
part is a program of its own, which uses the device alone; a part that fails is noted, and the
others continue. The recipes come last and share the remaining time: each trains for as many whole
epochs as its measured speed allows, up to the full 500. Writes `accelerator.json`,
`accelerator.txt` and every part's output under OUT. `--smoke` runs the same in its smallest form,
on the embedded digits.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
CIFAR10, DIGITS = "configs/cifar10_resnet20.py", "configs/digits_resnet20.py"
COMMON = "batch=256,schedule=cosine"
# A quarter of the noise costs less accuracy: docs/results/images.md.
GATED = f"noise=0.25,{COMMON}"
RECIPES = {
  "ungated": f"{CIFAR10}:gates=none,{COMMON}",
  "gated to 75 %": f"{CIFAR10}:budget=0.75,{GATED}",
  "gated to 50 %": f"{CIFAR10}:budget=0.5,{GATED}",
  "gated to 25 %": f"{CIFAR10}:budget=0.25,{GATED}",
  "four times as wide inside, gated to 26 %": f"{CIFAR10}:budget=0.26,inner=4,{GATED}",
}
SMOKE = {"gated to 50 %": f"{DIGITS}:model=simple_cnn,width=0.1,budget=0.5,batch=32"}
FULL_EPOCHS, TRAIN_IMAGES = 500, 50000
# Largest fraction of the time for what comes before the recipes.
BEFORE_RECIPES = 0.45
# Seconds of the first recipe for reading, compiling, testing and its report; then as measured.
OVERHEAD = 90
# Fraction of the remaining time, for steps.
MARGIN = 0.85
# A fifth of an epoch of 195 steps: an accelerator should not wait for the host.
STEPS_A_CALL = 39
# Seconds in which a run must save its state and stop.
GRACE = 45


def main():
  """Measures everything that the time allows, and writes it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", type=Path, help="a TFDS folder with cifar10")
  parser.add_argument("--out", type=Path, default=Path("runs/accelerator"))
  parser.add_argument("--minutes", type=float, default=24)
  parser.add_argument(
    "--elapsed", type=float, default=0, help="seconds that the command has taken so far"
  )
  parser.add_argument("--smoke", action="store_true")
  args = parser.parse_args()
  if args.minutes <= 0:
    parser.error(f"--minutes must be above 0; got {args.minutes}")
  if args.data and not (args.data / "cifar10").is_dir():
    parser.error(f"--data must be a TFDS folder with cifar10 in it; got {args.data}")
  try:
    args.out.mkdir(parents=True)
  except FileExistsError:
    parser.error(f"--out must be a new folder; got {args.out}")

  job = Job(args.out.resolve(), 60 * args.minutes, args.elapsed)
  measure(job, SMOKE if args.smoke else RECIPES, args.smoke)
  if args.smoke or args.data:
    train(job, SMOKE if args.smoke else RECIPES, args)
  job.finish()


def measure(job, recipes, smoke):
  """Runs everything but the recipes."""
  device = job.run("device", [sys.executable, "-c", DEVICE], 120)
  count = json.loads(device.splitlines()[-1])["devices"] if device else 1
  tiny = ["--shapes=16x8", "--repeats=1"] if smoke else []
  throughput, kernels, training_step = [f"--devices.steps_per_dispatch={STEPS_A_CALL}"], [], []
  if smoke:
    throughput = ["--images=64", "--repeats=1", "--devices.steps_per_dispatch=2"]
    kernels = ["--shapes=4x4x4x32/16", "--dtypes=float32", "--repeats=1"]
    training_step = ["--model=resnet8", "--batch=8", "--repeats=1"]
  command = benchmark("throughput", *recipes.values(), *throughput)
  job.run("throughput", command, 300, rows=True)
  job.run("kernels", benchmark("kernels", *kernels), 240, rows=True)
  job.run("loss", benchmark("ecdf_loss", *tiny), 180, rows=True)
  job.run("exchange", benchmark("exchange", f"--devices={count}", *tiny), 120, rows=True)
  job.run("training_step", benchmark("training_step", *training_step), 150, rows=True)
  if not smoke:
    command = benchmark(
      "throughput",
      f"{CIFAR10}:gates=none,width=4",
      f"{CIFAR10}:gates=channel,block=64,width=4",
      "--optim.batch_size=1024",
      "--model.dtype=bfloat16",
      "--devices.steps_per_dispatch=8",
    )
    job.run("large", command, 240, rows=True)


def train(job, recipes, args):
  """Runs the recipes, one after the other, by the command that users have."""
  speed = {}
  for row in job.parts["throughput"].get("rows", []):
    speed[row["config"]] = row["train_images_per_second"]
  job.before, overhead = job.end, OVERHEAD
  for i, (name, config) in enumerate(recipes.items()):
    share = (job.end - time.monotonic()) / (len(recipes) - i)
    epochs = 1
    if not args.smoke and config in speed:
      epochs = int(MARGIN * (share - overhead) * speed[config] / TRAIN_IMAGES)
      epochs = min(FULL_EPOCHS, max(1, epochs))
    workdir = job.out / f"recipe{i}"
    command = [
      sys.executable,
      "-m",
      "gating_jax.cli",
      f"--config={config},epochs={epochs}",
      f"--workdir={workdir}",
      f"--config.checkpoint_every={max(1, epochs / 4)}",
      "--config.log_every=200",
    ]
    if not args.smoke:
      command += [
        f"--config.data.data_dir={args.data.resolve()}",
        f"--config.devices.steps_per_dispatch={STEPS_A_CALL}",
      ]
    job.run(workdir.name, command, share)
    part = job.parts[workdir.name]
    part |= {"recipe": name, "epochs": epochs, **outcome(workdir)}
    if part["finished"] and config in speed:
      overhead = max(20, part["seconds"] - epochs * TRAIN_IMAGES / speed[config])


def outcome(workdir):
  """Returns the result of a run, or the last test of a run that was cut short."""
  result, metrics = workdir / "result.json", workdir / "metrics.jsonl"
  found = {}
  if result.exists():
    found = json.loads(result.read_text())
  elif metrics.exists():
    for text in metrics.read_text().splitlines():
      line = json.loads(text)
      # The last one stays.
      if line["split"] == "test":
        found = line
  return {
    "finished": result.exists(),
    **{key: found.get(key) for key in ("accuracy", "macs", "mac_ratio")},
  }


def benchmark(name, *arguments):
  """Returns the command of another benchmark."""
  return [sys.executable, str(HERE / f"{name}.py"), *arguments]


DEVICE = """
import jax, sys, json
print(json.dumps({
  "jax": jax.__version__,
  "python": sys.version.split()[0],
  "devices": jax.device_count(),
  "backend": jax.default_backend(),
  "kind": jax.devices()[0].device_kind,
}))
"""


def number(value, scale, form):
  """Formats a scaled number; an unknown one as `?`."""
  return "?" if value is None else f"{value * scale:{form}}"


class Job:
  """Programs that run one after the other, each within a time limit, and their output."""

  def __init__(self, out, seconds, elapsed=0):
    """`seconds` are those of the whole command, of which `elapsed` are over."""
    now = time.monotonic()
    self.out, self.parts, self.start = out, {}, now - elapsed
    self.end, self.before = self.start + seconds, now + BEFORE_RECIPES * (seconds - elapsed)

  def run(self, name, command, limit, *, rows=False):
    """Returns what a program printed; None if it failed or was stopped.

    It is stopped after `limit` seconds, or when the command's time is over.
    """
    file, json_file, begun = self.out / f"{name}.txt", self.out / f"{name}.json", time.monotonic()
    part = self.parts[name] = {
      "command": " ".join(["python", *command[1:]]) if name != "device" else None
    }
    limit = min(limit, self.before - begun)
    if limit < 5:
      print(f"== {name}: left out, no time is left", flush=True)
      part["status"] = "left out"
      return None
    print(f"== {name}, at most {limit:.0f} s", flush=True)
    with file.open("w") as output:
      process = subprocess.Popen(
        [*command, *([f"--json={json_file}"] if rows else [])],
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={
          **os.environ,
          "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
      )
      try:
        part["status"] = process.wait(limit)
      except subprocess.TimeoutExpired:
        part["status"] = "stopped"
        self._stop(process)
    part["seconds"] = round(time.monotonic() - begun, 1)
    if rows and json_file.exists():
      part["rows"] = json.loads(json_file.read_text())
    said = file.read_text()
    if part["status"] != 0:
      print(f"{said[-2000:]}\n== {name}: status {part['status']}", flush=True)
      return None
    print(said, flush=True)
    return said

  def _stop(self, process):
    process.send_signal(signal.SIGTERM)
    try:
      process.wait(GRACE)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()

  def finish(self):
    """Writes the JSON and the table; ends with status 1 if a part failed."""
    recipes = [part for part in self.parts.values() if "recipe" in part]
    table = [
      f"{'recipe':<32}{'epochs':>8}{'accuracy':>10}{'M MACs':>10}{'of ungated':>12}{'seconds':>10}"
    ]
    for part in recipes:
      table.append(
        f"{part['recipe']:<32}{part['epochs']:>8}{number(part['accuracy'], 100, '.2f'):>10}"
        f"{number(part['macs'], 1e-6, '.2f'):>10}{number(part['mac_ratio'], 1, '.3f'):>12}"
        f"{part.get('seconds', 0):>10}{'' if part['finished'] else '  cut short'}"
      )
    said = []
    for name, part in self.parts.items():
      if "recipe" not in part and part["status"] == 0:
        said.append(f"== {name}\n{(self.out / f'{name}.txt').read_text()}")
    if recipes:
      said += ["== recipes", *table]
    else:
      said.append("== recipes: left out, without --data")
    text = "\n".join(said)
    (self.out / "accelerator.txt").write_text(text + "\n")
    device = None
    if self.parts["device"]["status"] == 0:
      device = json.loads((self.out / "device.txt").read_text().splitlines()[-1])
    value = {
      "device": device,
      "seconds": round(time.monotonic() - self.start, 1),
      "parts": self.parts,
    }
    (self.out / "accelerator.json").write_text(json.dumps(value, indent=2) + "\n")
    print("\n".join(table) if recipes else text.splitlines()[-1])
    print(f"written: {self.out / 'accelerator.json'}, {self.out / 'accelerator.txt'}")
    failed = [name for name, part in self.parts.items() if part["status"] != 0]
    if failed:
      sys.exit(f"not done: {', '.join(failed)}")


if __name__ == "__main__":
  main()
